/* The PID namespace of the tree (pid_namespaces(7)).
 *
 * The warden stays outside.  It makes the namespace, puts a small init into it as its process 1, and
 * starts the main process in it as a child of its own: so everything it does to a tree, it does here
 * too, with the numbers that the supervisor knows.  What the namespace adds is the kernel's promise:
 * when its init ends, everything in it is killed and gone before the init is.  The init ends when
 *
 *   - the warden kills it, which kills the tree in one step;
 *   - the warden dies, by PR_SET_PDEATHSIG and by the end of the socket between the two;
 *   - the main process is gone and the init has no children left: then the namespace is empty.
 *
 * Orphans in the namespace become the init's children and not the warden's, so it is the init that
 * reaps them. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct failure none = {0, 0};

static int unshare_namespaces(int flags)
{
    return (int)syscall(SYS_unshare, flags);
}

/* One id, mapped to itself: the tree keeps being who it is (user_namespaces(7)). */
static int map_id(const struct warden *w, const char *file, long id)
{
    char text[64], *at = put_number(text, id);
    at = put_number(put_text(at, " "), id);
    put_text(at, " 1");
    return write_text(w->proc, file, text);
}

/* Without CAP_SYS_ADMIN a user namespace around it gives the right to make the others. */
static int unshare_as_user(const struct warden *w)
{
    const long uid = geteuid(), gid = getegid();
    int error;
    if (unshare_namespaces(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS) < 0)
        return errno;
    if ((error = map_id(w, "self/uid_map", uid)))
        return error;
    if ((error = write_text(w->proc, "self/setgroups", "deny")))
        return error;
    return map_id(w, "self/gid_map", gid);
}

static struct failure make_namespaces(const struct warden *w)
{
    if (unshare_namespaces(CLONE_NEWPID | CLONE_NEWNS) < 0) {
        int error = errno == EPERM ? unshare_as_user(w) : errno;
        if (error)
            return (struct failure){.error = error, .step = STEP_NAMESPACE};
    }
    /* What the host unmounts goes away here too; what is mounted here stays here. */
    if (syscall(SYS_mount, NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
        return failed(STEP_MOUNT);
    return none;
}

static struct failure receive_ready(int link)
{
    struct failure failure;
    ssize_t got;
    do
        got = recv(link, &failure, sizeof failure, 0);
    while (got < 0 && errno == EINTR);
    if (got != (ssize_t)sizeof failure)
        return (struct failure){.error = got < 0 ? errno : EPIPE, .step = STEP_INIT};
    return failure;
}

static struct failure start_init(struct warden *w)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return failed(STEP_INIT);
    pid_t pid = fork();
    if (pid == 0) {
        close(pair[0]);
        w->init_link = pair[1];
        _exit(be_init(w));
    }
    int error = errno;
    close(pair[1]);
    w->init_link = lift(pair[0]);
    if (pid < 0)
        return (struct failure){.error = error, .step = STEP_FORK};
    w->init = pid;
    return receive_ready(w->init_link);
}

/* A callable was forked into its namespace before we were its warden: the init is there then, and
 * it is the child that is not the main process. */
static struct failure adopt_init(struct warden *w)
{
    w->init_link = w->options.init;
    w->init = (pid_t)w->options.init_pid;
    return none;
}

struct failure namespace_prepare(struct warden *w)
{
    if (w->options.init >= 0)
        return adopt_init(w);
    if (!w->options.pid_namespace)
        return none;
    struct failure failure = make_namespaces(w);
    return failure.error ? failure : start_init(w);
}

/* From now on the init ends as soon as it has no children. */
void namespace_main_gone(struct warden *w)
{
    if (w->init)
        send(w->init_link, "m", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* ---- The init ---- */

static struct failure become_init(const struct warden *w)
{
    char byte;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        return failed(STEP_PDEATHSIG);
    /* Had the warden died before that, its signal would never come; getppid() cannot tell, it
     * answers 0 for a parent outside the namespace. */
    if (recv(w->init_link, &byte, 1, MSG_DONTWAIT | MSG_PEEK) == 0)
        return (struct failure){.error = ESRCH, .step = STEP_PARENT};
    if (prctl(PR_SET_NAME, "proctree-init") < 0)
        return failed(STEP_INIT);
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    /* For a callable it is mounted already: exec has taken from us what that takes. */
    if (!w->options.be_init && syscall(SYS_mount, "proc", "/proc", "proc", flags, NULL) < 0)
        return failed(STEP_MOUNT);
    return none;
}

/* Returns false when the warden has gone. */
static bool read_link(const struct warden *w, bool *main_gone)
{
    char byte;
    ssize_t got = recv(w->init_link, &byte, 1, MSG_DONTWAIT);
    if (got > 0)
        *main_gone = true;
    return got != 0;
}

int be_init(struct warden *w)
{
    struct failure failure = become_init(w);
    bool main_gone = false, warden_there = true;

    w->control = w->supervisor = w->proc = w->leaf = w->leaf_events = w->entry = w->terminal = -1;
    w->options.lock = w->options.run = w->options.listen = w->lease_timer = -1;
    descriptors_drop(w);
    if (send(w->init_link, &failure, sizeof failure, MSG_NOSIGNAL) < 0 || failure.error)
        return 1;
    while (warden_there) {
        struct pollfd fds[2] = {
            {.fd = w->signals, .events = POLLIN},
            {.fd = w->init_link, .events = POLLIN},
        };
        struct signalfd_siginfo info;
        pid_t pid;
        if (poll(fds, 2, -1) < 0) /* EINTR, or short of memory: nothing below blocks */
            fds[1].revents = POLLIN;
        if (fds[1].revents)
            warden_there = read_link(w, &main_gone);
        while (read(w->signals, &info, sizeof info) > 0)
            continue;
        while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
            continue;
        if (pid < 0 && errno == ECHILD && main_gone)
            return 0;
    }
    return 1;
}
