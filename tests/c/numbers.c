/* Numbers as text, and directories of numbers. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>

#include "check.h"
#include "processes.h"
#include "warden.h"

static bool parses(const char *text, unsigned long long wanted, size_t rest)
{
    unsigned long long value = 77;
    const char *end = text + strlen(text);
    const char *next = parse_number(text, end, &value);
    return next && value == wanted && (size_t)(end - next) == rest;
}

static bool refused(const char *text)
{
    unsigned long long value = 77;
    return !parse_number(text, text + strlen(text), &value) && value == 77;
}

static void numbers_that_are(void)
{
    CHECK(parses("0", 0, 0));
    CHECK(parses("007", 7, 0));
    CHECK(parses("   12 34", 12, 3));
    CHECK(parses("12x", 12, 1));
    CHECK(parses("12-3", 12, 2));
    CHECK(parses("18446744073709551615", ULLONG_MAX, 0));
    CHECK(parses("-1", ULLONG_MAX, 0));
    CHECK(parses("-0", 0, 0));
    CHECK(parses("-9223372036854775808 ", 1ull << 63, 1));
}

static void numbers_that_are_not(void)
{
    CHECK(refused(""));
    CHECK(refused("   "));
    CHECK(refused("-"));
    CHECK(refused("- 1"));
    CHECK(refused("--1"));
    CHECK(refused("+1"));
    CHECK(refused("x"));
    CHECK(refused("\t1"));
    CHECK(refused("\xff"));
}

/* What has no room stays too large for anything, and does not become a small number. */
static void numbers_too_large(void)
{
    CHECK(parses("18446744073709551616", ULLONG_MAX, 0));
    CHECK(parses("18446744073709551621 5", ULLONG_MAX, 2));
    CHECK(parses("99999999999999999999999999999999999999999", ULLONG_MAX, 0));
    CHECK(parses("-9223372036854775809", 1ull << 63, 0));
    CHECK(parses("-18446744073709551615", 1ull << 63, 0));
}

static void written_as_the_libc_writes_them(void)
{
    static const long values[] = {0, 1, 9, 10, 99, 100, 4194304, INT_MAX, LONG_MAX};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        char own[32], libc[32];
        memset(own, 'x', sizeof own);
        char *end = put_text(put_number(put_text(own, "a/"), values[i]), "/b");
        snprintf(libc, sizeof libc, "a/%ld/b", values[i]);
        CHECK(strcmp(own, libc) == 0);
        CHECK(end == own + strlen(own));
        CHECK(end[1] == 'x' || end + 1 == own + sizeof own);
    }
    char empty[2] = "xy";
    CHECK(put_text(empty, "") == empty && empty[0] == '\0' && empty[1] == 'y');
}

static void make_file(int directory, const char *name)
{
    int fd = openat(directory, name, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    close(fd);
}

/* More names than one getdents64(2) brings, and names that are no numbers among them. */
static void directory_of_many(int directory)
{
    enum { MANY = 1000 };
    static bool seen[MANY + 1];
    static const char *strange[] = {"x", "1x", "x1", "-1", " 7", "1 2", "12.", "0x10", "1\n",
                                    "18446744073709551615", "18446744073709551616",
                                    "9223372036854775808", "99999999999999999999999"};
    const unsigned before = open_descriptors();
    struct listing listing;

    for (int i = 1; i <= MANY; i++) {
        char name[16];
        put_number(name, i);
        make_file(directory, name);
    }
    for (size_t i = 0; i < sizeof strange / sizeof strange[0]; i++)
        make_file(directory, strange[i]);

    CHECK(listing_open(&listing, directory, ".") == 0);
    CHECK(open_descriptors() == before + 1);
    CHECK(fcntl(listing.fd, F_GETFD) == FD_CLOEXEC);
    unsigned count = 0;
    for (long number; (number = listing_next_number(&listing)) >= 0; count++) {
        CHECK(number >= 1 && number <= MANY);
        CHECK(!seen[number]);
        seen[number] = true;
    }
    CHECK(count == MANY);
    CHECK(open_descriptors() == before);
}

static void directory_left_half_way(int directory)
{
    const unsigned before = open_descriptors();
    struct listing listing;
    CHECK(listing_open(&listing, directory, ".") == 0);
    CHECK(listing_next_number(&listing) >= 0);
    listing_close(&listing);
    CHECK(open_descriptors() == before);
}

static void directory_that_is_none(int directory)
{
    const unsigned before = open_descriptors();
    struct listing listing;
    CHECK(listing_open(&listing, directory, "missing") == ENOENT);
    CHECK(listing_open(&listing, directory, "1") == ENOTDIR);
    CHECK(open_descriptors() == before);
}

static void descriptors_of_this_process(void)
{
    bool seen = false, itself = false;
    int other = open("/dev/null", O_RDONLY | O_CLOEXEC);
    struct listing listing;
    CHECK(listing_open(&listing, AT_FDCWD, "/proc/self/fd") == 0);
    const int own = listing.fd;
    for (long fd; (fd = listing_next_number(&listing)) >= 0;) {
        seen |= fd == other;
        itself |= fd == own;
    }
    CHECK(seen && itself);
    close(other);
}

/* The directory is open, and then its process is gone. */
static void directory_that_vanishes(bool begun)
{
    const unsigned before = open_descriptors();
    const pid_t pid = fork_resting();
    char path[64];
    struct listing listing;

    put_text(put_number(put_text(path, "/proc/"), pid), "/task");
    CHECK(listing_open(&listing, AT_FDCWD, path) == 0);
    if (begun)
        CHECK(listing_next_number(&listing) == pid);
    end_child(pid);
    CHECK(listing_next_number(&listing) == -1);
    CHECK(open_descriptors() == before);
    CHECK(listing_open(&listing, AT_FDCWD, path) == ENOENT);
}

static void *wait_for(void *lock)
{
    pthread_mutex_lock(lock);
    pthread_mutex_unlock(lock);
    return NULL;
}

static void threads_of_this_process(void)
{
    enum { THREADS = 5 };
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_t threads[THREADS];
    struct listing listing;
    unsigned count = 0;

    pthread_mutex_lock(&lock);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, wait_for, &lock) == 0);
    CHECK(listing_open(&listing, AT_FDCWD, "/proc/self/task") == 0);
    while (listing_next_number(&listing) >= 0)
        count++;
    CHECK(count == THREADS + 1);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    int directory = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(directory >= 0);

    numbers_that_are();
    numbers_that_are_not();
    numbers_too_large();
    written_as_the_libc_writes_them();
    directory_of_many(directory);
    directory_left_half_way(directory);
    directory_that_is_none(directory);
    descriptors_of_this_process();
    directory_that_vanishes(false);
    directory_that_vanishes(true);
    threads_of_this_process();
    printf("%u\n", checks);
    return 0;
}
