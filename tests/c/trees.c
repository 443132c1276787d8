/* Who is in the tree: walks over real processes, by both of the ways to find them, while some of them
 * end at the worst moment. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "check.h"
#include "processes.h"
#include "warden.h"

static struct warden warden;

/* ---- Ends at the worst moment: around the reading of a file ---- */

enum moment { BEFORE_OPENING, BEFORE_READING, AFTER_READING };

static struct {
    pid_t pid;
    bool stays; /* as a zombie, that keeps its number and has lost its children */
    char path[96];
    enum moment moment;
    int fd;
} doom = {.fd = -1};

static void meet_doom(void)
{
    const pid_t pid = doom.pid;
    doom.pid = 0;
    if (doom.stays)
        make_zombie(pid);
    else
        end_child(pid);
}

int __real_openat(int directory, const char *path, int flags, ...);
int __wrap_openat(int directory, const char *path, int flags, ...);
int __real_close(int fd);
int __wrap_close(int fd);

int __wrap_openat(int directory, const char *path, int flags, ...)
{
    const bool now = doom.pid && strcmp(path, doom.path) == 0;
    if (now && doom.moment == BEFORE_OPENING)
        meet_doom();
    const int fd = __real_openat(directory, path, flags, 0600);
    if (now && doom.moment == BEFORE_READING)
        meet_doom();
    if (now && doom.moment == AFTER_READING)
        doom.fd = fd;
    return fd;
}

int __wrap_close(int fd)
{
    const int result = __real_close(fd);
    if (fd >= 0 && fd == doom.fd) {
        doom.fd = -1;
        meet_doom();
    }
    return result;
}

/* `pid` ends when that file of `whose` is read. */
static void let_end(pid_t pid, enum moment moment, pid_t whose, const char *file)
{
    snprintf(doom.path, sizeof doom.path, "%d/%s", whose, file);
    doom.pid = pid;
    doom.moment = moment;
}

/* ---- Trees ---- */

/* Everybody writes the number of its process to this pipe, and reads what is written by the others. */
static int announcements[2];

static void announce(void)
{
    const pid_t pid = getpid();
    if (write(announcements[1], &pid, sizeof pid) != (ssize_t)sizeof pid)
        _exit(1);
}

static pid_t next_announced(void)
{
    pid_t pid = 0;
    CHECK(read(announcements[0], &pid, sizeof pid) == (ssize_t)sizeof pid);
    return pid;
}

/* Forks one that calls `then`, announces itself and rests.  It ends with the test program, and not
 * with its parent: orphans are what this is about. */
static pid_t fork_that(void (*then)(void))
{
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        if (then)
            then();
        announce();
        rest();
    }
    return pid;
}

static void with_a_session(void)
{
    setsid();
}

static void with_a_child(void)
{
    fork_that(with_a_session);
}

static void with_grandchildren(void)
{
    for (int i = 0; i < 3; i++)
        fork_that(with_a_child);
}

static void with_twenty_pairs(void)
{
    for (int i = 0; i < 20; i++)
        fork_that(with_a_child);
}

static void *fork_in_thread(void *unused)
{
    (void)unused;
    fork_that(NULL);
    rest();
}

static void with_a_thread_that_forks(void)
{
    pthread_t thread;
    fork_that(NULL);
    if (pthread_create(&thread, NULL, fork_in_thread, NULL))
        _exit(1);
}

static size_t grow(void (*then)(void), size_t count, pid_t *members)
{
    fork_that(then);
    for (size_t i = 0; i < count; i++)
        members[i] = next_announced();
    return count;
}

/* Ends everything below us; whoever loses its parent comes to us. */
static void fell(void)
{
    struct sent sent = {0, 0};
    kill_tree(&warden, &sent, 0);
    while (waitpid(-1, NULL, 0) > 0)
        continue;
    CHECK(errno == ECHILD);
    warden.killing = false;
    forget_killed(&warden);
}

static size_t position(pid_t pid)
{
    size_t found = warden.pid_count;
    for (size_t i = 0; i < warden.pid_count; i++) {
        if (warden.pids[i] == pid) {
            CHECK(found == warden.pid_count); /* once */
            found = i;
        }
    }
    return found;
}

static bool listed(pid_t pid)
{
    return position(pid) < warden.pid_count;
}

static bool proven(pid_t pid)
{
    struct process process;
    const int fd = member_open(&warden, pid, &process);
    CHECK(fd < 0 || process.pid == pid);
    return fd >= 0;
}

static void snapshot(bool scan)
{
    warden.options.scan = scan;
    CHECK(tree_snapshot(&warden) == 0);
}

/* Exactly these, parents before their children, each of them proved. */
static void check_walk(const pid_t *members, size_t count, bool scan)
{
    snapshot(scan);
    CHECK(warden.pid_count == count);
    for (size_t i = 0; i < count; i++) {
        struct process process;
        const size_t at = position(members[i]);
        CHECK(at < count);
        CHECK(process_read(warden.proc, members[i], &process) == 0);
        CHECK(process.ppid == getpid() || position(process.ppid) < at);
        CHECK(proven(members[i]));
    }
    tree_forget(&warden);
    CHECK(warden.pid_count == 0);
    for (size_t i = count; i-- > 0;) /* from below, where no parent is known yet */
        CHECK(proven(members[i]));
    tree_forget(&warden);
}

static void walks(void (*then)(void), size_t count)
{
    pid_t members[64] = {0};
    const unsigned before = open_descriptors();
    grow(then, count, members);
    check_walk(members, count, false);
    check_walk(members, count, true);
    fell();
    CHECK(open_descriptors() == before);
    for (size_t i = 0; i < count; i++)
        CHECK(!proven(members[i]));
}

static void nobody_at_all(void)
{
    for (int scan = 0; scan < 2; scan++) {
        snapshot(scan);
        CHECK(warden.pid_count == 0);
        tree_forget(&warden);
    }
}

static void strangers(void)
{
    CHECK(!proven(getppid()));
    CHECK(!proven(getpid()));
    CHECK(!proven(1));
    CHECK(!proven((pid_t)PIDS_MAX));
    CHECK(!proven(0));
    CHECK(!proven(-1));
    tree_forget(&warden);
}

/* The init of a namespace is ours, and no member. */
static void the_init(void)
{
    const pid_t pid = fork_resting();
    warden.init = pid;
    CHECK(!proven(pid));
    warden.init = 0;
    CHECK(proven(pid));
    tree_forget(&warden);
    end_child(pid);
}

/* It is not counted, and neither is anybody where nobody can be seen: out of descriptors, say. */
static void kills_with_an_init(bool blind)
{
    struct sent sent = {0, 0};
    const int proc = warden.proc;
    const pid_t member = fork_resting();

    warden.init = fork_resting();
    if (blind)
        warden.proc = -1;
    kill_tree(&warden, &sent, 0);
    CHECK(sent.count == (blind ? 0 : 1) && sent.denied == 0);
    warden.proc = proc;
    end_child(member);
    while (waitpid(-1, NULL, 0) > 0)
        continue;
    warden.init = 0;
    warden.killing = false;
    forget_killed(&warden);
}

static void kinship(void)
{
    CHECK(child_of_ours(getppid()) == NOT_OURS);
    CHECK(child_of_ours(getpid()) == NOT_OURS);
    const pid_t pid = fork_resting();
    CHECK(child_of_ours(pid) == OURS_ALIVE);
    kill(pid, SIGSTOP);
    CHECK(waitid(P_PID, (id_t)pid, &(siginfo_t){.si_pid = 0}, WSTOPPED | WNOWAIT) == 0);
    CHECK(child_of_ours(pid) == OURS_ALIVE);
    make_zombie(pid);
    CHECK(child_of_ours(pid) == OURS_DEAD);
    CHECK(child_of_ours(pid) == OURS_DEAD); /* looking takes nothing away */
    CHECK(proven(pid));
    tree_forget(&warden);
    end_child(pid);
    CHECK(child_of_ours(pid) == NOT_OURS);
}

/* A parent that ends while its list of children is read: they are ours then, and are found. */
static void a_parent_that_ends_during_the_walk(const char *file, enum moment moment, bool scan)
{
    pid_t members[7];
    char path[64];
    const unsigned descriptors = open_descriptors();

    const pid_t top = fork_that(with_grandchildren);
    for (size_t i = 0; i < 7; i++)
        members[i] = next_announced();
    snprintf(path, sizeof path, file, top);
    let_end(top, moment, top, path);
    snapshot(scan);
    CHECK(doom.pid == 0);
    for (size_t i = 0; i < 7; i++) {
        if (members[i] == top)
            continue;
        CHECK(listed(members[i]));
        CHECK(proven(members[i]));
    }
    CHECK(!proven(top));
    fell();
    CHECK(open_descriptors() == descriptors);
}

/* ... and one that ends while its child is being proved: what was read before is not believed, and a
 * second look finds the new parent. */
static void a_parent_that_ends_during_the_proof(enum moment moment, bool of_child, bool known,
                                                bool stays)
{
    struct process process;
    const unsigned descriptors = open_descriptors();

    const pid_t top = fork_that(with_a_child);
    const pid_t first = next_announced(), second = next_announced();
    const pid_t child = first == top ? second : first;
    if (known)
        CHECK(proven(top));
    doom.stays = stays;
    let_end(top, moment, of_child ? child : top, "stat");
    const int fd = member_open(&warden, child, &process);
    CHECK(doom.pid == 0);
    /* A zombie is a parent still, as far as anybody can see who has looked before it became one. */
    CHECK(fd >= 0 && process.pid == child);
    CHECK(process.ppid == getpid() || (known && stays && process.ppid == top));
    doom.stays = false;
    tree_forget(&warden);
    fell();
    CHECK(open_descriptors() == descriptors);
}

static void parents_that_end_during_the_proof(void)
{
    for (int stays = 0; stays < 2; stays++) {
        for (enum moment moment = BEFORE_OPENING; moment <= AFTER_READING; moment++)
            a_parent_that_ends_during_the_proof(moment, false, false, stays);
        a_parent_that_ends_during_the_proof(AFTER_READING, true, false, stays);
        a_parent_that_ends_during_the_proof(AFTER_READING, true, true, stays);
    }
}

/* ---- Wardens of other trees ---- */

static pid_t fork_named(const char *name)
{
    const pid_t pid = fork_child();
    if (pid == 0) {
        prctl(PR_SET_NAME, name);
        fork_resting();
        kill(getpid(), SIGSTOP);
        rest();
    }
    siginfo_t info;
    CHECK(waitid(P_PID, (id_t)pid, &info, WSTOPPED) == 0);
    return pid;
}

/* Neither they nor what is below them is listed, and only where that was asked for. */
static void spared_wardens(bool scan)
{
    const pid_t other = fork_named("proctree-helper");
    const pid_t spared = fork_named(WARDEN_NAME);
    snapshot(scan);
    CHECK(warden.pid_count == 4 && listed(spared) && listed(other));
    tree_forget(&warden);
    warden.options.spare = true;
    snapshot(scan);
    CHECK(warden.pid_count == 2 && !listed(spared) && listed(other));
    tree_forget(&warden);
    warden.options.spare = false;
    end_child(spared);
    end_child(other);
    while (waitpid(-1, NULL, 0) > 0)
        continue;
}

/* ---- The set of numbers ---- */

static void bits(void)
{
    static uint64_t set[PIDS_MAX / 64 + 1];
    static const pid_t edges[] = {1, 2, 63, 64, 65, 127, 128, 4711, (pid_t)PIDS_MAX - 1};
    static const pid_t outside[] = {0, -1, -64, (pid_t)PIDS_MAX, (pid_t)PIDS_MAX + 1, INT32_MAX,
                                    INT32_MIN};
    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        CHECK(!bit_get(set, edges[i]));
        CHECK(bit_set(set, edges[i]));
        CHECK(!bit_set(set, edges[i]));
        CHECK(bit_get(set, edges[i]));
        for (size_t j = 0; j < sizeof edges / sizeof edges[0]; j++)
            CHECK(bit_get(set, edges[j]) == (i == j));
        bit_clear(set, edges[i]);
        bit_clear(set, edges[i]);
        CHECK(!bit_get(set, edges[i]));
    }
    for (size_t i = 0; i < sizeof outside / sizeof outside[0]; i++) {
        CHECK(!bit_set(set, outside[i]));
        CHECK(!bit_get(set, outside[i]));
        bit_clear(set, outside[i]);
    }
    for (size_t i = 0; i < sizeof set / sizeof set[0]; i++)
        CHECK(set[i] == 0);
}

/* What a walk has used is given back. */
static void memory(void)
{
    unsigned char resident = 1;
    warden.pids[0] = 4711;
    warden.pid_count = 1;
    CHECK(bit_set(warden.seen, 4711) && bit_set(warden.killed, 4711));
    tree_forget(&warden);
    CHECK(warden.pid_count == 0 && warden.pids[0] == 0);
    CHECK(!bit_get(warden.seen, 4711) && bit_get(warden.killed, 4711));
    forget_killed(&warden);
    CHECK(!bit_get(warden.killed, 4711));
    tree_forget(&warden);
    CHECK(mincore(warden.pids, 4096, &resident) == 0 && !(resident & 1));
}

int main(void)
{
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    CHECK(pipe2(announcements, O_CLOEXEC) == 0);
    warden.self = getpid();
    warden.leaf = warden.terminal = -1;
    warden.control = warden.supervisor = -1;
    warden.main_reaped = true;
    warden.proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    CHECK(warden.proc >= 0 && tree_prepare(&warden) == 0);

    bits();
    memory();
    nobody_at_all();
    strangers();
    the_init();
    kills_with_an_init(false);
    kills_with_an_init(true);
    kinship();
    walks(NULL, 1);
    walks(with_a_child, 2);
    walks(with_grandchildren, 7);
    walks(with_twenty_pairs, 41); /* more than the cache of proved members holds */
    walks(with_a_thread_that_forks, 3);
    for (enum moment moment = BEFORE_OPENING; moment <= AFTER_READING; moment++)
        a_parent_that_ends_during_the_walk("task/%d/children", moment, false);
    a_parent_that_ends_during_the_walk("stat", BEFORE_READING, true);
    parents_that_end_during_the_proof();
    spared_wardens(false);
    spared_wardens(true);
    printf("%u\n", checks);
    return 0;
}
