/* Starting the main process. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define CLOSE_RANGE_CLOEXEC_FLAG (1u << 2)

/* Room for PATH_MAX in exec_main() and for what a libc puts around it. */
#define CHILD_STACK (4 * PATH_MAX)

extern char **environ;

static int set_cloexec(int fd, bool on)
{
    return fcntl(fd, F_SETFD, on ? FD_CLOEXEC : 0);
}

/* For kernels without close_range(2) (before 5.9), or without its CLOEXEC flag (before 5.11). */
static int span_by_proc(unsigned low, unsigned high, bool cloexec)
{
    struct numbers open;
    int error = numbers_open(&open, AT_FDCWD, "/proc/self/fd");
    if (error)
        return error;
    for (long fd; (fd = numbers_next(&open)) >= 0;) {
        if (fd < (long)low || fd > (long)high || fd == open.fd)
            continue;
        if (cloexec)
            set_cloexec((int)fd, true);
        else
            close((int)fd);
    }
    return 0;
}

static int span(unsigned low, unsigned high, bool cloexec)
{
    if (low > high)
        return 0;
    unsigned flags = cloexec ? CLOSE_RANGE_CLOEXEC_FLAG : 0;
    if (syscall(SYS_close_range, low, high, flags) == 0)
        return 0;
    return span_by_proc(low, high, cloexec);
}

/* Whatever the host program let leak must not reach the tree. */
int descriptors_prepare(void)
{
    return span(3, UINT_MAX, true);
}

/* The warden keeps no copy of the tree's standard streams, so that they end when the tree does,
 * and none of a descriptor that was passed to it. */
void descriptors_drop(struct warden *w)
{
    int own[] = {w->control, w->supervisor, w->signals, w->proc};
    unsigned low = 3;

    for (;;) { /* the gaps between our own, from below */
        unsigned next = UINT_MAX;
        for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
            if (own[i] >= (int)low && (unsigned)own[i] < next)
                next = (unsigned)own[i];
        if (next == UINT_MAX)
            break;
        span(low, next - 1, false);
        low = next + 1;
    }
    span(low, UINT_MAX, false);

    /* /dev/null where there is one: a bare chroot has none, and then they are just closed. */
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd < 3; fd++)
        if (null < 0 || (null != fd && dup2(null, fd) < 0))
            close(fd);
    if (null > 2)
        close(null);
}

static int open_passed(const char *list)
{
    unsigned long long fd;
    const char *end = list ? list + strlen(list) : list;
    for (const char *at = list; at && at < end; at++) { /* numbers with a comma between them */
        at = parse_number(at, end, &fd);
        if (!at)
            return EINVAL;
        if (set_cloexec((int)fd, false) < 0)
            return errno;
    }
    return 0;
}

static const char *search_path(void)
{
    for (char **at = environ; *at; at++) {
        const char *equals = strchr(*at, '=');
        if (equals && equals - *at == 4 && memcmp(*at, "PATH", 4) == 0)
            return equals + 1;
    }
    return "/bin:/usr/bin";
}

/* Tries one candidate.  As execvp(3) and Python's subprocess do: a missing file lets the search go
 * on silently, any other error is remembered and the first one is reported. */
static void try_exec(const char *path, char **argv, int *saved)
{
    execve(path, argv, environ);
    if (errno != ENOENT && errno != ENOTDIR && *saved == 0)
        *saved = errno;
}

/* Nothing here may allocate: between vfork and exec the memory is the parent's. */
static int exec_main(char **argv)
{
    int saved = 0;
    if (strchr(argv[0], '/')) {
        try_exec(argv[0], argv, &saved);
        return saved ? saved : errno;
    }
    const char *at = search_path();
    const size_t name = strlen(argv[0]);
    for (;;) {
        char path[PATH_MAX];
        const char *colon = strchr(at, ':');
        size_t length = colon ? (size_t)(colon - at) : strlen(at);
        if (length + 1 + name + 1 <= sizeof path) {
            memcpy(path, at, length);
            size_t slash = length > 0 && at[length - 1] != '/';
            if (slash)
                path[length] = '/';
            memcpy(path + length + slash, argv[0], name + 1);
            try_exec(path, argv, &saved);
        }
        if (!at[length])
            break;
        at += length + 1;
    }
    return saved ? saved : ENOENT;
}

static struct failure failed(int step)
{
    return (struct failure){.error = errno, .step = step};
}

/* Runs in the child, which shares our memory until it execs or exits.  Returns only on failure. */
static struct failure become_main(const struct warden *w)
{
    sigset_t none;

    if (setsid() < 0)
        return failed(STEP_SETSID);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        return failed(STEP_PDEATHSIG);
    /* The warden may have been killed before the line above took effect, and then the signal will
     * never come: prctl(2), PR_SET_PDEATHSIG. */
    if (getppid() != w->self)
        return (struct failure){.error = ESRCH, .step = STEP_PARENT};
    if (w->options.cwd && chdir(w->options.cwd) < 0)
        return failed(STEP_CHDIR);
    int error = open_passed(w->options.pass);
    if (error)
        return (struct failure){.error = error, .step = STEP_DESCRIPTORS};
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    return (struct failure){.error = exec_main(w->options.argv), .step = STEP_EXEC};
}

struct child {
    struct warden *warden;
    struct failure failure;
};

static int run_child(void *argument)
{
    struct child *child = argument;
    child->failure = become_main(child->warden);
    return 127;
}

/* As vfork(2), but on a stack of its own: we are suspended until the child has become the command
 * or has failed, so that "started" means started, and the main process leads its own session and
 * group before anybody can ask for a signal. */
struct failure spawn_main(struct warden *w)
{
    struct child child = {.warden = w};
    /* Static, and not in our own frame: what the child leaves on it is nobody's business, least of all
     * that of a sanitizer, which would take its marks for ours. */
    static _Alignas(16) char stack[CHILD_STACK];

    pid_t pid = clone(run_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, &child);
    if (pid < 0)
        return failed(STEP_FORK);
    if (child.failure.error) {
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            continue;
        return child.failure;
    }
    w->main = pid;
    return child.failure;
}

/* The supervisor forked us and we forked the main process, both in Python, before we became the
 * warden: children and the subreaper flag survive exec. */
struct failure adopt_main(struct warden *w)
{
    siginfo_t info;
    if (waitid(P_PID, (id_t)w->options.adopt, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
        return failed(STEP_ADOPT);
    w->main = w->options.adopt;
    return (struct failure){0, 0};
}
