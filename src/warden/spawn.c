/* Starting the main process. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define CLOSE_RANGE_CLOEXEC_FLAG (1u << 2)

/* Room for PATH_MAX in exec_main(), the lists of attributes.c, and what a libc puts around them. */
#define CHILD_STACK (8 * PATH_MAX)

#define CLONE_INTO_CGROUP_FLAG 0x200000000ull

extern char **environ;

#if defined(__x86_64__)
/* clone3(arguments, size): the child starts on its own stack, runs function(argument) and exits. */
__asm__(".type clone3_raw, @function\n"
        "clone3_raw:\n" /* rdi: arguments, rsi: size, rdx: function, rcx: argument */
        "    mov %rdx, %r8\n"
        "    mov %rcx, %r9\n"
        "    mov $435, %eax\n" /* SYS_clone3 */
        "    syscall\n"
        "    test %rax, %rax\n"
        "    jz 1f\n"
        "    ret\n"
        "1:  xor %ebp, %ebp\n"
        "    mov %r9, %rdi\n"
        "    call *%r8\n"
        "    mov %eax, %edi\n"
        "    mov $231, %eax\n" /* SYS_exit_group */
        "    syscall\n"
        "    hlt\n");
long clone3_raw(void *arguments, size_t size, int (*function)(void *), void *argument);
#endif

static int set_cloexec(int fd, bool on)
{
    return fcntl(fd, F_SETFD, on ? FD_CLOEXEC : 0);
}

/* For kernels without close_range(2) (before 5.9), or without its CLOEXEC flag (before 5.11). */
static int span_by_proc(int proc, unsigned low, unsigned high, bool cloexec)
{
    struct listing open;
    /* Where another /proc has been mounted over ours, we are not to be found under its name. */
    int error = proc < 0 ? listing_open(&open, AT_FDCWD, "/proc/self/fd")
                         : listing_open(&open, proc, "self/fd");
    if (error)
        return error;
    for (long fd; (fd = listing_next_number(&open)) >= 0;) {
        if (fd < (long)low || fd > (long)high || fd == open.fd)
            continue;
        if (cloexec)
            set_cloexec((int)fd, true);
        else
            close((int)fd);
    }
    return 0;
}

static int span(int proc, unsigned low, unsigned high, bool cloexec)
{
    if (low > high)
        return 0;
    unsigned flags = cloexec ? CLOSE_RANGE_CLOEXEC_FLAG : 0;
    if (syscall(SYS_close_range, low, high, flags) == 0)
        return 0;
    return span_by_proc(proc, low, high, cloexec);
}

/* Whatever the host program let leak must not reach the tree. */
int descriptors_prepare(const struct warden *w)
{
    return span(w->options.proc, 3, UINT_MAX, true);
}

/* The warden keeps no copy of the tree's standard streams, so that they end when the tree does,
 * and none of a descriptor that was passed to it. */
void descriptors_drop(struct warden *w)
{
    int own[] = {w->control,     w->supervisor, w->signals,      w->proc,         w->leaf,
                 w->leaf_events, w->init_link,  w->entry,        w->terminal,     w->lease_timer,
                 w->options.lock, w->options.run, w->options.listen};
    unsigned low = 3;

    for (;;) { /* the gaps between our own, from below */
        unsigned next = UINT_MAX;
        for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
            if (own[i] >= (int)low && (unsigned)own[i] < next)
                next = (unsigned)own[i];
        if (next == UINT_MAX)
            break;
        span(w->proc, low, next - 1, false);
        low = next + 1;
    }
    span(w->proc, low, UINT_MAX, false);

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

/* A session, or for a foreground job a group, of its own. */
static struct failure lead_group(const struct warden *w)
{
    if (w->options.keep_session) {
        if (setpgid(0, 0) < 0)
            return failed(STEP_SETPGID);
        terminal_give(w, getpid());
    } else if (setsid() < 0) {
        return failed(STEP_SETSID);
    }
    if (w->options.terminal && ioctl(0, TIOCSCTTY, 0) < 0)
        return failed(STEP_TERMINAL);
    return (struct failure){0, 0};
}

/* Last of what concerns credentials: the kernel forgets the signal when they change (prctl(2)). */
static struct failure die_with_warden(const struct warden *w)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        return failed(STEP_PDEATHSIG);
    /* The warden may have been killed before the line above took effect, and then the signal will
     * never come: prctl(2), PR_SET_PDEATHSIG.  In a PID namespace of its own the child cannot see
     * its parent, but there the init ends with the warden, and everything with the init. */
    if (!w->init && getppid() != w->self)
        return (struct failure){.error = ESRCH, .step = STEP_PARENT};
    return (struct failure){0, 0};
}

/* Runs in the child, which shares our memory until it execs or exits.  Returns only on failure. */
static struct failure become_main(const struct warden *w, bool in_cgroup)
{
    sigset_t none;
    struct failure failure;
    int error;

    if (w->leaf >= 0 && !in_cgroup && (error = cgroup_enter(w)))
        return (struct failure){.error = error, .step = STEP_CGROUP};
    if ((failure = lead_group(w)).error)
        return failure;
    if ((failure = attributes_apply(w->proc, &w->options.attributes)).error)
        return failure;
    if (w->options.cwd && chdir(w->options.cwd) < 0)
        return failed(STEP_CHDIR);
    if ((failure = credentials_apply(&w->options.attributes)).error)
        return failure;
    if ((failure = die_with_warden(w)).error)
        return failure;
    if ((error = open_passed(w->options.pass)))
        return (struct failure){.error = error, .step = STEP_DESCRIPTORS};
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    return (struct failure){.error = exec_main(w->options.argv), .step = STEP_EXEC};
}

struct child {
    struct warden *warden;
    bool in_cgroup;
    struct failure failure;
};

static int run_child(void *argument)
{
    struct child *child = argument;
    child->failure = become_main(child->warden, child->in_cgroup);
    return 127;
}

/* The child is born in the leaf: moving it there later takes a lock that waits for an RCU grace
 * period, milliseconds on a large machine (cgroup_attach_lock() of the kernel).  clone3(2) has no
 * wrapper that takes a stack, so on other machines than this one the child moves itself. */
static pid_t clone_into_cgroup(struct child *child, char *stack, size_t size)
{
#if defined(__x86_64__)
    struct {
        uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls;
        uint64_t set_tid, set_tid_size, cgroup;
    } arguments = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP_FLAG,
        .exit_signal = SIGCHLD,
        .stack = (uint64_t)(uintptr_t)stack,
        .stack_size = size,
        .cgroup = (uint64_t)child->warden->leaf,
    };
    child->in_cgroup = true;
    long result = clone3_raw(&arguments, sizeof arguments, run_child, child);
    if (result > 0)
        return (pid_t)result;
    child->in_cgroup = false;
    errno = (int)-result;
    return -1;
#else
    (void)child, (void)stack, (void)size;
    errno = ENOSYS;
    return -1;
#endif
}

/* Before Linux 5.3 there is no clone3, before 5.7 it cannot do this; a filter may forbid it. */
static bool clone3_unsupported(int error)
{
    return error == ENOSYS || error == EINVAL || error == E2BIG || error == EPERM;
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

    pid_t pid = -1;
    if (w->leaf >= 0)
        pid = clone_into_cgroup(&child, stack, sizeof stack);
    if (pid < 0 && (w->leaf < 0 || clone3_unsupported(errno)))
        pid = clone(run_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, &child);
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

/* What the callable says of its way to where it waits (child.REPORT): an errno and a step, or
 * nothing.  It prepares itself while we do. */
static struct failure read_report(const struct warden *w)
{
    struct failure said = {0, 0};
    int32_t report[2];
    struct pollfd fds[2] = {
        {.fd = w->options.report, .events = POLLIN},
        {.fd = w->supervisor, .events = POLLIN},
    };
    while (poll(fds, 2, -1) < 0 && (errno == EINTR || errno == ENOMEM))
        continue;
    if (!fds[0].revents)
        return (struct failure){.error = ESRCH, .step = STEP_ADOPT}; /* nobody wants it any more */
    if (read(w->options.report, report, sizeof report) == (ssize_t)sizeof report)
        said = (struct failure){.error = report[0], .step = report[1]};
    close(w->options.report);
    return said;
}

/* The supervisor forked us and we forked the main process, both in Python, before we became the
 * warden: children and the subreaper flag survive exec. */
struct failure adopt_main(struct warden *w)
{
    siginfo_t info;
    if (waitid(P_PID, (id_t)w->options.adopt, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
        return failed(STEP_ADOPT);
    w->main = w->options.adopt;
    if (w->options.report >= 0) {
        struct failure said = read_report(w);
        if (said.error)
            return said;
    }
    if (w->options.gate >= 0) {
        /* It may have been killed meanwhile: that is an end like any other. */
        if (write(w->options.gate, "g", 1) < 0 && errno != EPIPE)
            return failed(STEP_ADOPT);
        close(w->options.gate);
    }
    return (struct failure){0, 0};
}
