/* Who is in the tree.
 *
 * The warden is a child subreaper, so a process that is once below it stays below it until it
 * dies: its parent can only change to another member, or to the warden.  That makes membership a
 * fact that can be proved, and two observations are enough to prove it:
 *
 *   - a process whose parent is the warden is a member, and its number cannot be reused until the
 *     warden itself reaps it;
 *   - a process whose parent is a member is a member.  "P is its parent" holds when it names P
 *     while a pidfd of P says that P has not been reaped: only then does the number P still mean P.
 *
 * Nothing here trusts a number that was read a moment ago: a snapshot gives candidates, and
 * member_open() proves each one behind a pidfd before anything is sent to it. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PIDS_BYTES (PIDS_MAX * sizeof(pid_t))
#define SEEN_BYTES (PIDS_MAX / 8 + 8)

/* How far up member_open() looks for a known member.  Walks go from the root down, so a parent is
 * nearly always in the cache. */
#define CLIMB_MAX 1024

/* Address space only: a page is touched when a walk needs it and given back after the walk. */
int tree_prepare(struct warden *w)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    for (unsigned i = 0; i < CACHE_SIZE; i++)
        w->cache[i].fd = -1;
    void *pids = mmap(NULL, PIDS_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (pids == MAP_FAILED)
        return errno;
    void *seen = mmap(NULL, SEEN_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (seen == MAP_FAILED)
        return errno;
    void *killed = mmap(NULL, SEEN_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (killed == MAP_FAILED)
        return errno;
    w->pids = pids;
    w->seen = seen;
    w->killed = killed;
    return 0;
}

void tree_forget(struct warden *w)
{
    for (unsigned i = 0; i < CACHE_SIZE; i++) {
        if (w->cache[i].fd >= 0)
            close(w->cache[i].fd);
        w->cache[i].fd = -1;
    }
    madvise(w->pids, PIDS_BYTES, MADV_DONTNEED);
    madvise(w->seen, SEEN_BYTES, MADV_DONTNEED);
    w->pid_count = 0;
}

void forget_killed(struct warden *w)
{
    madvise(w->killed, SEEN_BYTES, MADV_DONTNEED);
}

static bool in_range(pid_t pid)
{
    return pid > 0 && pid < (pid_t)PIDS_MAX;
}

bool bit_get(const uint64_t *bits, pid_t pid)
{
    return in_range(pid) && (bits[pid / 64] >> (pid % 64) & 1);
}

/* Returns whether it was not set before. */
bool bit_set(uint64_t *bits, pid_t pid)
{
    if (!in_range(pid) || bit_get(bits, pid))
        return false;
    bits[pid / 64] |= 1ull << (pid % 64);
    return true;
}

void bit_clear(uint64_t *bits, pid_t pid)
{
    if (in_range(pid))
        bits[pid / 64] &= ~(1ull << (pid % 64));
}

/* A template's main process forks the wardens of other trees.  They have plans of their own for the
 * death of the supervisor, with graces that ours must not cut short, and what is below them is not
 * ours to signal or to name.  Still they are our descendants: so the tree is not empty before they
 * have ended, and it is we who reap them when the template is gone. */
static bool is_spared(const struct warden *w, pid_t pid)
{
    struct process process;
    return w->options.spare && process_read(w->proc, pid, &process) == 0 &&
           (process.ppid == w->main || process.ppid == w->self) &&
           strcmp(process.comm, WARDEN_NAME) == 0;
}

static void add_candidate(struct warden *w, pid_t pid)
{
    if (is_spared(w, pid))
        return;
    if (w->pid_count < PIDS_MAX && bit_set(w->seen, pid))
        w->pids[w->pid_count++] = pid;
}

/* Adds what one /proc/PID/task/TID/children names.  Returns an errno when it cannot be opened. */
static int add_children(struct warden *w, pid_t pid, long tid)
{
    char path[64], text[4096];
    put_text(put_number(put_text(put_number(path, pid), "/task/"), tid), "/children");
    int fd = openat(w->proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    size_t held = 0;
    for (;;) {
        ssize_t got = read(fd, text + held, sizeof text - held);
        if (got < 0)
            break; /* the process went away: its children are the warden's now */
        held += (size_t)got;
        size_t used, count;
        pid_t pids[512];
        do {
            count = parse_children(text, held, got == 0, pids, 512, &used);
            for (size_t i = 0; i < count; i++)
                add_candidate(w, pids[i]);
            memmove(text, text + used, held - used);
            held -= used;
        } while (count == 512);
        if (got == 0)
            break;
    }
    close(fd);
    return 0;
}

/* Children belong to the thread that forked them, so every thread has to be asked. */
static void add_children_of_threads(struct warden *w, pid_t pid, const char *path)
{
    struct listing threads;
    if (listing_open(&threads, w->proc, path))
        return;
    for (long tid; (tid = listing_next_number(&threads)) >= 0;)
        add_children(w, pid, tid);
}

static int expand(struct warden *w, pid_t pid)
{
    char path[32];
    struct stat task;

    /* The link count of the task directory is 2 + the number of threads (proc_task_getattr() in
     * fs/proc/base.c): it spares nearly every process the reading of a directory. */
    put_text(put_number(path, pid), "/task");
    if (fstatat(w->proc, path, &task, 0) < 0)
        return errno;
    if (task.st_nlink > 3) {
        add_children_of_threads(w, pid, path);
        return 0;
    }
    return add_children(w, pid, pid);
}

/* A list of children that changes while it is read may lose entries: what its parent's death moved
 * to the warden is found by asking for the warden's own children again until nothing is new. */
static int snapshot_by_children(struct warden *w)
{
    size_t next = 0, before;
    do {
        before = w->pid_count;
        int error = expand(w, w->self);
        if (error)
            return error;
        for (; next < w->pid_count; next++)
            if (!w->skip_killed || !bit_get(w->killed, w->pids[next]))
                expand(w, w->pids[next]);
    } while (w->pid_count > before);
    return 0;
}

/* For kernels without CONFIG_PROC_CHILDREN: every process of the machine, and from its parent
 * numbers the closure over the warden's.  The pairs are kept behind the candidates. */
static size_t collect_pairs(struct warden *w, pid_t *pairs, size_t capacity)
{
    struct listing processes;
    size_t count = 0;
    if (listing_open(&processes, w->proc, "."))
        return 0;
    for (long pid; (pid = listing_next_number(&processes)) >= 0;) {
        struct process process;
        if (count + 2 > capacity || process_read(w->proc, (pid_t)pid, &process))
            continue;
        pairs[count++] = process.pid;
        pairs[count++] = process.ppid;
    }
    return count;
}

static void snapshot_by_scan(struct warden *w)
{
    size_t capacity = PIDS_MAX / 4 * 2, before;
    pid_t *pairs = w->pids + PIDS_MAX - capacity;
    const size_t count = collect_pairs(w, pairs, capacity);

    do {
        before = w->pid_count;
        for (size_t i = 0; i + 1 < count; i += 2)
            if (pairs[i + 1] == w->self || bit_get(w->seen, pairs[i + 1]))
                add_candidate(w, pairs[i]);
    } while (w->pid_count > before);
}

/* Fills w->pids with everything that looks like a member, parents before their children. */
int tree_snapshot(struct warden *w)
{
    tree_forget(w);
    if (!w->options.scan) {
        int error = snapshot_by_children(w);
        if (error != ENOENT)
            return error;
        w->options.scan = true;
    }
    snapshot_by_scan(w);
    return 0;
}

/* Alive here means: not reaped, so that its number is still its own. */
static bool holds_number(int pidfd)
{
    return sys_pidfd_send_signal(pidfd, 0) == 0 || errno == EPERM;
}

static int cache_find(const struct warden *w, pid_t pid)
{
    for (unsigned i = 0; i < CACHE_SIZE; i++)
        if (w->cache[i].fd >= 0 && w->cache[i].pid == pid)
            return w->cache[i].fd;
    return -1;
}

static void cache_drop(struct warden *w, int fd)
{
    for (unsigned i = 0; i < CACHE_SIZE; i++) {
        if (w->cache[i].fd == fd) {
            close(fd);
            w->cache[i].fd = -1;
        }
    }
}

static void cache_put(struct warden *w, pid_t pid, int fd)
{
    struct cached *slot = &w->cache[w->cache_next++ % CACHE_SIZE];
    if (slot->fd >= 0)
        close(slot->fd);
    *slot = (struct cached){.pid = pid, .fd = fd};
}

static bool prove(struct warden *w, pid_t pid, struct process *out, unsigned depth);

/* The parent is not in the cache: prove it first, then see that it still is the parent. */
static bool prove_through_parent(struct warden *w, struct process *child, unsigned depth)
{
    struct process parent, again;
    pid_t ppid = child->ppid;
    int fd = sys_pidfd_open(ppid);
    if (fd < 0)
        return false;
    if (!prove(w, ppid, &parent, depth + 1) || process_read(w->proc, child->pid, &again) ||
        again.ppid != ppid || !holds_number(fd)) {
        close(fd);
        return false;
    }
    cache_put(w, ppid, fd);
    return true;
}

/* waitid(2) answers for our own children and for no other process: the cheapest proof of all. */
enum kinship child_of_ours(pid_t pid)
{
    siginfo_t info;
    info.si_pid = 0; /* POSIX leaves it open what WNOHANG writes when nothing has ended */
    if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
        return NOT_OURS;
    return info.si_pid == pid ? OURS_DEAD : OURS_ALIVE;
}

/* /proc may hide what belongs to other users (proc(5), hidepid), as a set-uid program does. */
static bool is_hidden_child(const struct warden *w, pid_t pid, struct process *out)
{
    if (child_of_ours(pid) != OURS_ALIVE)
        return false;
    *out = (struct process){.pid = pid, .ppid = w->self, .state = '?', .threads = 1};
    return true;
}

/* The caller holds a pidfd of `pid`.  If the number has been reused since, what is proved here is
 * about a stranger, and the signal goes to the pidfd, which is dead: nobody gets it. */
static bool prove(struct warden *w, pid_t pid, struct process *out, unsigned depth)
{
    if (depth > CLIMB_MAX)
        return false;
    if (process_read(w->proc, pid, out))
        return is_hidden_child(w, pid, out);
    if (out->ppid == w->self)
        return true;
    int parent = cache_find(w, out->ppid);
    if (parent >= 0) {
        if (holds_number(parent))
            return true;
        cache_drop(w, parent);
    }
    if (out->ppid <= 1)
        return false;
    return prove_through_parent(w, out, depth);
}

/* Returns a pidfd of a proven member, or -1.  The descriptor belongs to the cache: it stays open
 * until CACHE_SIZE others have been opened, or the walk ends. */
int member_open(struct warden *w, pid_t pid, struct process *out)
{
    int fd = pid == w->init ? -1 : sys_pidfd_open(pid); /* the init is ours, and no member */
    if (fd < 0)
        return -1;
    if (!prove(w, pid, out, 0)) {
        /* A parent that died between two looks has made it a child of the warden: one look more
         * finds it there.  A third cause there is not. */
        if (!prove(w, pid, out, 0)) {
            close(fd);
            return -1;
        }
    }
    cache_put(w, pid, fd);
    return fd;
}
