/* The cgroup of the tree: a leaf of its own in the cgroup2 hierarchy (cgroups(7), and
 * Documentation/admin-guide/cgroup-v2.rst of the kernel).
 *
 * The warden is not in it.  So one write to cgroup.kill ends the tree and leaves the warden to reap
 * it, to say so, and to remove the leaf. */
#define _GNU_SOURCE
#include "warden.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* How long the kernel may take to bring cgroup.events up to date, or to stop everybody. */
#define SETTLE_MS 100
#define FREEZE_MS 200

/* How far below the leaf it is looked for what is to be let go. */
#define EVACUATE_DEPTH 64

static struct failure cgroup_failure(int error, int step)
{
    return (struct failure){.error = error, .step = step};
}

static struct failure set_limit(const struct warden *w, char *limit)
{
    char *comma = strchr(limit, ',');
    if (!comma)
        return cgroup_failure(EINVAL, STEP_LIMITS);
    *comma = '\0';
    int error = write_text(w->leaf, limit, comma + 1);
    return cgroup_failure(error, error ? STEP_LIMITS : 0);
}

/* A callable was forked into its leaf before we were its warden: then it is there already. */
struct failure cgroup_prepare(struct warden *w)
{
    const char *path = w->options.cgroup;
    if (!path)
        return cgroup_failure(0, 0);
    if (mkdirat(AT_FDCWD, path, 0755) < 0 && !(errno == EEXIST && w->options.adopt))
        return failed(STEP_CGROUP);
    w->leaf = lift(open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (w->leaf < 0) {
        int error = errno;
        unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
        return cgroup_failure(error, STEP_CGROUP);
    }
    w->leaf_events = lift(openat(w->leaf, "cgroup.events", O_RDONLY | O_CLOEXEC));
    if (w->leaf_events < 0)
        return failed(STEP_CGROUP);
    struct failure failure = cgroup_failure(0, 0);
    for (int i = 0; i < LIMITS_MAX && w->options.limits[i] && !failure.error; i++)
        failure = set_limit(w, w->options.limits[i]);
    return failure;
}

/* In the child, for kernels without CLONE_INTO_CGROUP (before 5.7). */
int cgroup_enter(const struct warden *w)
{
    return write_text(w->leaf, "cgroup.procs", "0");
}

/* "populated 1\nfrozen 0\n" */
static bool event_is(const struct warden *w, const char *wanted)
{
    char text[128];
    ssize_t got = pread(w->leaf_events, text, sizeof text - 1, 0);
    if (got < 0) /* ENODEV: it has been removed by somebody else, so nobody is in it */
        return errno == ENODEV && strcmp(wanted, "populated 0") == 0;
    text[got] = '\0';
    const size_t length = strlen(wanted);
    for (const char *at = text; at; at = strchr(at, '\n')) {
        at += *at == '\n';
        if (strlen(at) >= length && memcmp(at, wanted, length) == 0)
            return true;
    }
    return false;
}

bool cgroup_populated(const struct warden *w)
{
    return w->leaf >= 0 && event_is(w, "populated 1");
}

/* cgroup.events reports a change by POLLPRI, to those who have read it before (cgroup-v2.rst,
 * "[Un]populated Notification"). */
static bool wait_event(const struct warden *w, const char *wanted, int patience)
{
    const int64_t end = now_ms() + patience;
    for (;;) {
        if (event_is(w, wanted))
            return true;
        const int64_t left = end - now_ms();
        struct pollfd fd = {.fd = w->leaf_events, .events = POLLPRI};
        if (left <= 0 || (poll(&fd, 1, (int)left) < 0 && errno != EINTR))
            return false;
    }
}

/* We have no children left.  Newer kernels take a process off its cgroup a moment after its parent
 * could reap it; somebody who was put into the leaf from outside stays for longer. */
bool cgroup_settled(const struct warden *w)
{
    return w->leaf < 0 || wait_event(w, "populated 0", SETTLE_MS);
}

/* How many processes are in the leaf itself. */
unsigned cgroup_count(const struct warden *w)
{
    char text[4096];
    unsigned count = 0;
    int fd = w->leaf < 0 ? -1 : openat(w->leaf, "cgroup.procs", O_RDONLY | O_CLOEXEC);
    ssize_t got;
    while (fd >= 0 && (got = read(fd, text, sizeof text)) > 0)
        for (ssize_t i = 0; i < got; i++)
            count += text[i] == '\n';
    if (fd >= 0)
        close(fd);
    return count;
}

/* False where the kernel has no cgroup.kill (before 5.14). */
bool cgroup_kill(const struct warden *w)
{
    return w->leaf >= 0 && write_text(w->leaf, "cgroup.kill", "1") == 0;
}

void cgroup_freeze(struct warden *w, bool frozen)
{
    if (write_text(w->leaf, "cgroup.freeze", frozen ? "1" : "0") == 0) {
        w->leaf_frozen = frozen;
        wait_event(w, frozen ? "frozen 1" : "frozen 0", FREEZE_MS);
    }
}

/* False when somebody may not be moved. */
static bool evacuate_one(const struct warden *w, int directory)
{
    char text[4096], number[24];
    ssize_t got = read_text(directory, "cgroup.procs", text, sizeof text);
    const char *end = got > 0 ? memrchr(text, '\n', (size_t)got) : NULL;
    unsigned long long pid;
    /* What stands behind the last line end is a number cut in two: somebody else's, perhaps. */
    for (const char *at = text; end && at < end && (at = parse_number(at, end, &pid)); at++) {
        put_number(number, (long)pid);
        const int error = write_text(w->leaf, "../cgroup.procs", number);
        if (error && error != ESRCH)
            return false;
    }
    return true;
}

static bool evacuate_below(const struct warden *w, int directory, unsigned depth)
{
    struct listing listing;
    const struct entry *entry = NULL;
    bool done = evacuate_one(w, directory);

    if (depth == EVACUATE_DEPTH || listing_open(&listing, directory, "."))
        return done;
    while (done && (entry = listing_next(&listing))) {
        if (entry->type != DT_DIR || !strcmp(entry->name, ".") || !strcmp(entry->name, ".."))
            continue;
        int below = openat(directory, entry->name,
                           O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (below >= 0) {
            done = evacuate_below(w, below, depth + 1);
            close(below);
        }
    }
    if (!done) /* at its end it has closed itself */
        listing_close(&listing);
    return done;
}

/* Lets go of what is in the leaf and below it, into the cgroup above: where it would be without
 * us. */
void cgroup_evacuate(const struct warden *w)
{
    for (int round = 0; round < 1000 && cgroup_populated(w); round++)
        if (!evacuate_below(w, w->leaf, 0))
            return;
}

static uint64_t read_value(const struct warden *w, const char *file, const char *key)
{
    char text[512];
    unsigned long long value = 0;
    ssize_t got = read_text(w->leaf, file, text, sizeof text - 1);
    const size_t length = strlen(key);
    if (got < 0)
        return 0;
    text[got] = '\0';
    for (const char *at = text; at; at = strchr(at, '\n')) {
        at += *at == '\n';
        if (strlen(at) > length && memcmp(at, key, length) == 0) {
            parse_number(at + length, text + got, &value);
            break;
        }
    }
    return value;
}

void cgroup_peaks(const struct warden *w, struct message_empty *out)
{
    if (w->leaf < 0)
        return;
    out->memory_peak = read_value(w, "memory.peak", "");
    out->pids_peak = read_value(w, "pids.peak", "");
    out->oom_kills = read_value(w, "memory.events", "oom_kill ");
}

static bool first_directory(int directory, char name[NAME_MAX + 1])
{
    struct listing listing;
    const struct entry *entry;
    if (listing_open(&listing, directory, "."))
        return false;
    while ((entry = listing_next(&listing))) {
        if (entry->type == DT_DIR && strcmp(entry->name, ".") && strcmp(entry->name, "..")) {
            put_text(name, entry->name);
            listing_close(&listing);
            return true;
        }
    }
    return false;
}

/* The tree may have made cgroups below its own, and nests of them: each is removed on the way up.
 * What cannot be removed is somebody's home again, and stays. */
static bool remove_below(int leaf)
{
    char name[NAME_MAX + 1];
    int at = fcntl(leaf, F_DUPFD_CLOEXEC, 3), depth = 0;
    bool from_below = false;

    while (at >= 0) {
        const bool found = first_directory(at, name);
        if (found && unlinkat(at, name, AT_REMOVEDIR) == 0) {
            from_below = false; /* what is found next is another one */
            continue;
        }
        if (found ? from_below : depth == 0) {
            close(at);
            return !found;
        }
        from_below = !found;
        depth += found ? 1 : -1;
        int next = openat(at, found ? name : "..",
                          O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        close(at);
        at = next;
    }
    return false;
}

void cgroup_remove(struct warden *w)
{
    const char *path = w->options.cgroup;
    if (w->leaf < 0) {
        /* That of a callable is there before us, and may have to go before we have opened it. */
        const int64_t end = now_ms() + SETTLE_MS;
        while (path && w->options.adopt && unlinkat(AT_FDCWD, path, AT_REMOVEDIR) < 0 &&
               errno == EBUSY && now_ms() < end)
            poll(NULL, 0, 1);
        return;
    }
    cgroup_settled(w);
    if (unlinkat(AT_FDCWD, path, AT_REMOVEDIR) < 0 && errno == EBUSY && remove_below(w->leaf))
        unlinkat(AT_FDCWD, path, AT_REMOVEDIR);
    close(w->leaf_events);
    close(w->leaf);
    w->leaf = w->leaf_events = -1;
}
