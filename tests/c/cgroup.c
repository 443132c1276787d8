/* The cgroup of a tree, in the real hierarchy where we may make one. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>

#include "check.h"
#include "processes.h"
#include "warden.h"

#define SKIPPED 77 /* as automake(1) has it */

static struct warden warden;

/* What is written to cgroup.procs is noted and taken off the list, as the kernel does it. */
static char list_path[PATH_MAX];
static unsigned long moved[2000];
static size_t moved_count;

int __real_write_text(int directory, const char *path, const char *text);
int __wrap_write_text(int directory, const char *path, const char *text);

static void take_off_the_list(const char *number);

int __wrap_write_text(int directory, const char *path, const char *text)
{
    if (!*list_path || strcmp(path, "../cgroup.procs") != 0)
        return __real_write_text(directory, path, text);
    CHECK(moved_count < sizeof moved / sizeof moved[0]);
    moved[moved_count++] = strtoul(text, NULL, 10);
    take_off_the_list(text);
    return 0;
}

static void put_file(const char *path, const char *text)
{
    FILE *file = fopen(path, "we");
    CHECK(file != NULL && fputs(text, file) >= 0 && fclose(file) == 0);
}

static char *get_file(const char *path)
{
    static char text[20000];
    FILE *file = fopen(path, "re");
    CHECK(file != NULL);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    return text;
}

static char *below(const char *directory, const char *name)
{
    static char path[4][PATH_MAX];
    static unsigned next;
    char *to = path[next++ % 4];
    snprintf(to, PATH_MAX, "%s/%s", directory, name);
    return to;
}

static void take_off_the_list(const char *number)
{
    char line[32];
    snprintf(line, sizeof line, "%s\n", number);
    char *text = get_file(list_path), *at = text;
    while (at && strncmp(at, line, strlen(line)) != 0)
        at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL;
    CHECK(at != NULL); /* it was a member and not what was left of one */
    memmove(at, at + strlen(line), strlen(at + strlen(line)) + 1);
    put_file(list_path, text);
}

/* A kernel with pages of more than 4 KiB cuts its text wherever the buffer ends, in the middle of a
 * number too.  What is cut off is a member; what is left of it may be the number of anybody. */
static void letting_go_of_more_than_one_read_brings(const char *directory)
{
    static char text[20000];
    size_t count = 0;
    struct warden w = warden;

    for (char *at = text; count < 1700; count++)
        at += sprintf(at, "%zu\n", 123456 + count);
    strcpy(list_path, below(directory, "cgroup.procs"));
    put_file(list_path, text);
    put_file(below(directory, "cgroup.events"), "populated 1\nfrozen 0\n");
    w.leaf = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    w.leaf_events = openat(w.leaf, "cgroup.events", O_RDONLY | O_CLOEXEC);
    CHECK(w.leaf >= 0 && w.leaf_events >= 0);
    cgroup_evacuate(&w);
    CHECK(moved_count == count);
    for (size_t i = 0; i < count; i++)
        CHECK(moved[i] == 123456 + i);
    close(w.leaf);
    close(w.leaf_events);
    *list_path = '\0';
}

/* ---- In the real hierarchy ---- */

static char leaf[PATH_MAX];

static bool find_cgroup(char *path)
{
    char *at = strstr(get_file("/proc/self/cgroup"), "0::");
    char own[PATH_MAX] = "", mount[PATH_MAX] = "";
    if (!at || sscanf(at, "0::%4000s", own) != 1)
        return false;
    for (at = get_file("/proc/self/mounts"); at && *at; at = strchr(at, '\n') + 1)
        if (sscanf(at, "%*s %4000s cgroup2", mount) == 1 && strstr(at, " cgroup2 ") &&
            strstr(at, " cgroup2 ") < strchr(at, '\n'))
            break;
    snprintf(path, PATH_MAX, "%.2000s%.2000s", mount, strcmp(own, "/") ? own : "");
    return at && *at && access(path, W_OK) == 0;
}

static bool there(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0;
}

static int remove_nest(const char *path, const struct stat *info, int type, struct FTW *position)
{
    (void)info, (void)position;
    return type == FTW_DP ? rmdir(path) : 0;
}

/* Also when something does not hold. */
static void clean_up(void)
{
    if (there(leaf))
        __real_write_text(AT_FDCWD, below(leaf, "cgroup.kill"), "1");
    while (wait(NULL) > 0)
        continue;
    nftw(leaf, remove_nest, 16, FTW_DEPTH | FTW_PHYS);
}

static void make_leaf(struct warden *w)
{
    *w = warden;
    w->options.cgroup = leaf;
    const struct failure failure = cgroup_prepare(w);
    CHECK(failure.error == 0 && failure.step == 0);
    CHECK(w->leaf >= 0 && w->leaf_events >= 0);
}

static pid_t fork_into(const struct warden *w)
{
    char byte;
    int ends[2];
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    const pid_t pid = fork_child();
    if (pid == 0) {
        if (cgroup_enter(w) != 0 || write(ends[1], "x", 1) != 1)
            _exit(1);
        rest();
    }
    close(ends[1]);
    CHECK(read(ends[0], &byte, 1) == 1);
    close(ends[0]);
    return pid;
}

static void a_life(void)
{
    const unsigned before = open_descriptors();
    struct warden w;
    struct message_empty message = {.memory_peak = 0};

    make_leaf(&w);
    CHECK(there(leaf));
    CHECK(!cgroup_populated(&w) && cgroup_settled(&w) && cgroup_count(&w) == 0);
    const pid_t first = fork_into(&w), second = fork_into(&w);
    CHECK(cgroup_populated(&w) && cgroup_count(&w) == 2);
    CHECK(!cgroup_settled(&w));
    cgroup_freeze(&w, true);
    CHECK(w.leaf_frozen);
    cgroup_freeze(&w, false);
    CHECK(!w.leaf_frozen);
    if (!cgroup_kill(&w)) { /* before Linux 5.14 */
        kill(first, SIGKILL);
        kill(second, SIGKILL);
    }
    CHECK(waitpid(first, NULL, 0) == first && waitpid(second, NULL, 0) == second);
    CHECK(cgroup_settled(&w));
    cgroup_peaks(&w, &message);
    CHECK(message.oom_kills == 0);
    cgroup_remove(&w);
    CHECK(w.leaf == -1 && w.leaf_events == -1);
    CHECK(!there(leaf));
    cgroup_remove(&w);
    CHECK(open_descriptors() == before);
}

static void one_that_is_there_already(void)
{
    struct warden w = warden;
    CHECK(mkdir(leaf, 0755) == 0);
    w.options.cgroup = leaf;
    struct failure failure = cgroup_prepare(&w);
    CHECK(failure.error == EEXIST && failure.step == STEP_CGROUP && w.leaf == -1);
    CHECK(there(leaf)); /* it is not ours */
    w.options.adopt = 1;
    failure = cgroup_prepare(&w);
    CHECK(failure.error == 0 && w.leaf >= 0);
    cgroup_remove(&w);
    CHECK(!there(leaf));
}

static void limits_that_are_none(void)
{
    static char *const wrong[] = {"memory.max", "no.such.file,1", "cgroup.freeze,x"};
    const unsigned before = open_descriptors();
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        char limit[64];
        struct warden w = warden;
        strcpy(limit, wrong[i]);
        w.options.cgroup = leaf;
        w.options.limits[0] = limit;
        const struct failure failure = cgroup_prepare(&w);
        CHECK(failure.error != 0 && failure.step == STEP_LIMITS);
        cgroup_remove(&w);
        CHECK(!there(leaf));
    }
    CHECK(open_descriptors() == before);
}

static void letting_go(void)
{
    struct warden w;
    make_leaf(&w);
    const pid_t pid = fork_into(&w);
    cgroup_evacuate(&w);
    CHECK(!cgroup_populated(&w) && kill(pid, 0) == 0);
    cgroup_remove(&w);
    CHECK(!there(leaf));
    end_child(pid);
}

/* The tree has made cgroups of its own, and some of them side by side have others below them. */
static void nests(void)
{
    static const char *const nests[] = {"a", "a/1", "a/2", "b", "b/1", "b/1/x", "c", "d", "d/1"};
    const unsigned before = open_descriptors();
    struct warden w;

    make_leaf(&w);
    for (size_t i = 0; i < sizeof nests / sizeof nests[0]; i++)
        CHECK(mkdir(below(leaf, nests[i]), 0755) == 0);
    cgroup_remove(&w);
    CHECK(!there(leaf));
    CHECK(open_descriptors() == before);
}

/* Somebody lives in a nest: it stays, with what is above it, and that takes no time. */
static void a_nest_that_cannot_be_removed(void)
{
    struct warden w;

    make_leaf(&w);
    CHECK(mkdir(below(leaf, "a"), 0755) == 0 && mkdir(below(leaf, "a/1"), 0755) == 0);
    const pid_t pid = fork_resting();
    char number[16];
    snprintf(number, sizeof number, "%d", pid);
    put_file(below(leaf, "a/1/cgroup.procs"), number);
    cgroup_remove(&w);
    CHECK(there(below(leaf, "a/1")));
    end_child(pid);
    while (rmdir(below(leaf, "a/1")) < 0) /* a moment after its last process has been reaped */
        CHECK(errno == EBUSY);
    CHECK(rmdir(below(leaf, "a")) == 0 && rmdir(leaf) == 0);
}

/* Somebody else has removed it: then nobody is in it. */
static void one_that_was_removed_from_outside(void)
{
    const unsigned before = open_descriptors();
    struct warden w;

    make_leaf(&w);
    CHECK(rmdir(leaf) == 0);
    CHECK(!cgroup_populated(&w));
    CHECK(cgroup_settled(&w));
    CHECK(cgroup_count(&w) == 0);
    CHECK(!cgroup_kill(&w));
    cgroup_evacuate(&w);
    cgroup_remove(&w);
    CHECK(open_descriptors() == before);
}

int main(int argc, char **argv)
{
    char above[PATH_MAX];
    CHECK(argc == 2);
    warden.leaf = warden.leaf_events = -1;
    letting_go_of_more_than_one_read_brings(argv[1]);

    if (!find_cgroup(above)) {
        fprintf(stderr, "no cgroup2 hierarchy that we may write to\n");
        return SKIPPED;
    }
    snprintf(leaf, sizeof leaf, "%.4000s/proctree-test-%d", above, getpid());
    atexit(clean_up);
    a_life();
    one_that_is_there_already();
    limits_that_are_none();
    letting_go();
    nests();
    a_nest_that_cannot_be_removed();
    one_that_was_removed_from_outside();
    printf("%u\n", checks);
    return 0;
}
