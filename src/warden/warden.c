/* proctree-warden: the small process between a supervisor and its tree.
 *
 *     supervisor -> warden -> main process -> everything else
 *
 * Theory of operation.  The warden is a child subreaper (prctl(2), PR_SET_CHILD_SUBREAPER) in a
 * session of its own, so that every descendant stays below it, however it forks.  From that follow
 * the two things that it can promise and nobody else can:
 *
 *   - waitpid(-1) answering ECHILD is the proof that the tree is empty, since a live descendant
 *     always has a live ancestor that is a child of the warden;
 *   - the tree does not outlive its supervisor, since the warden does, for as long as its orphan
 *     plan takes.
 *
 * It has one thread and one poll(2): the control socket, a pidfd of the supervisor, a signalfd.
 * Which signal when is the supervisor's business, but for the orphan plan, which has to run when
 * there is no supervisor.
 *
 *   proc.c     what /proc says about a process        (parsers: pure)
 *   tree.c     who is in the tree, and the proof of it
 *   ending.c   signal it, freeze it, kill it, reap it
 *   spawn.c    start or adopt the main process
 *   plan.c     why and how the warden ends it by itself
 *   channel.c  messages                               (protocol.h)
 *   system.c   the system calls that libc does not wrap
 *
 * A durable warden (the option `run`) is one whose tree outlives its supervisor:
 *
 *   attached.c who has connected to it, and who of them is the supervisor now
 *   lease.c    how long it lives when nobody is there
 *   record.c   what is written down when it has ended */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* How long the end of what had been made for a tree that cannot begin may take. */
#define ABANDON_PATIENCE_MS 2000

/* ---- The supervisor ---- */

static enum verdict supervisor_lost(struct warden *w)
{
    if (w->control >= 0)
        close(w->control);
    if (w->supervisor >= 0)
        close(w->supervisor);
    w->control = w->supervisor = -1;
    if (!durable(w))
        return plan_begin(w, CAUSE_LEASE);
    if (w->cause != CAUSE_OWNER) /* it is about an ending that this one has not begun */
        w->note.length = 0;
    const bool owned = attached_promote(w);
    if (w->owner_ends) /* what it has begun is carried through, whoever comes next */
        return plan_begin(w, w->cause);
    return owned ? GO_ON : plan_leftovers(w);
}

/* ---- What the supervisor says ---- */

/* A durable tree outlives its supervisor, and so one that talks nonsense. */
static enum verdict refuse(struct warden *w)
{
    send_failure(w, MESSAGE_FAULT, (struct failure){.error = EPROTO, .step = STEP_PROTOCOL});
    return durable(w) ? supervisor_lost(w) : plan_begin(w, CAUSE_LEASE);
}

static void answer(struct warden *w, struct sent sent, uint32_t serial)
{
    struct message_signalled message = {.count = sent.count, .denied = sent.denied};
    header_init(&message.header, MESSAGE_SIGNALLED, serial);
    channel_send(w, &message, sizeof message);
}

/* Once it is in the record that the owner ends the tree, why it does is settled too. */
static void take_note(struct warden *w, const struct message_note *note)
{
    if (w->cause != CAUSE_OWNER || !w->note.length)
        w->note = *note;
}

/* What only a durable warden understands. */
static enum verdict obey_owner(struct warden *w, const union request *request)
{
    const struct message_asked self = {.pid = w->owner, .uid = w->owner_uid};

    switch (request->header.type) {
    case MESSAGE_KEEP:
        lease_keep(w, request->keep.lease_ms);
        return GO_ON;
    case MESSAGE_NOTE:
        take_note(w, &request->note);
        return GO_ON;
    case MESSAGE_ATTACH:
        attached_tell_owner(w, request->header.serial);
        return GO_ON;
    case MESSAGE_DETACH:
        return supervisor_lost(w);
    case MESSAGE_CANCEL:
        return ask_owner(w, CAUSE_CANCELLED, self);
    default:
        return refuse(w);
    }
}

/* Nobody would be left who could let it go on. */
static enum verdict release(struct warden *w, uint32_t serial)
{
    if (durable(w)) { /* nor anybody who has its lock, and writes down how it ended */
        send_failure(w, MESSAGE_FAULT, (struct failure){.error = EPERM, .step = STEP_ATTACH});
        return GO_ON;
    }
    if (w->frozen)
        thaw_tree(w, serial);
    cgroup_evacuate(w);
    leave_nothing(w);
    return FINISHED;
}

static enum verdict obey(struct warden *w, const union request *request)
{
    const uint32_t serial = request->header.serial;

    owner_acts(w, request);
    switch (request->header.type) {
    case MESSAGE_SIGNAL:
        answer(w, send_signal(w, &request->signal.stage, serial), serial);
        return GO_ON;
    case MESSAGE_LIST:
        send_members(w, serial);
        return GO_ON;
    case MESSAGE_FREEZE:
        freeze_tree(w);
        answer(w, (struct sent){0, 0}, serial);
        return GO_ON;
    case MESSAGE_THAW:
        answer(w, thaw_tree(w, serial), serial);
        return GO_ON;
    case MESSAGE_RELEASE:
        return release(w, serial);
    default:
        return durable(w) ? obey_owner(w, request) : refuse(w);
    }
}

static enum verdict read_control(struct warden *w)
{
    union request request;
    ssize_t size = channel_receive(w->control, &request, sizeof request);

    if (size < 0 && errno == EAGAIN)
        return GO_ON;
    if (size <= 0)
        return supervisor_lost(w);
    if (!request_valid(&request, (size_t)size))
        return refuse(w);
    return obey(w, &request);
}

/* The supervisor has ended.  What it said last is obeyed first, and that may be RELEASE; it is no
 * more than a socket holds, and whoever has a copy of the other end does not keep us here. */
static enum verdict hear_out(struct warden *w)
{
    struct pollfd fd = {.fd = w->control, .events = POLLIN};
    enum verdict verdict = GO_ON;
    for (int i = 0; i < LAST_WORDS_MAX && verdict == GO_ON && w->control == fd.fd; i++) {
        if (poll(&fd, 1, 0) <= 0)
            break;
        verdict = read_control(w);
    }
    return verdict;
}

/* ---- Signals that the warden itself receives ---- */

static enum verdict tree_empty(struct warden *w)
{
    terminal_take(w);
    send_empty(w);
    return FINISHED;
}

static bool no_children(void)
{
    siginfo_t info;
    return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD;
}

/* Where there is a PID namespace, its init is still there when the main process is reaped, and
 * decides what is left: no member of a namespace is hidden from the warden that made it. */
static void main_exited(struct warden *w, bool empty)
{
    w->main_reported = true;
    terminal_take(w);
    namespace_main_gone(w);
    uint32_t visible = empty ? 0 : send_members(w, 0);
    send_exited(w, empty || visible || w->init ? visible : 1);
}

static void main_stopped(struct warden *w)
{
    struct message_stopped message = {.signo = w->main_stopped};
    w->main_stopped = 0;
    terminal_take(w);
    header_init(&message.header, MESSAGE_STOPPED, 0);
    channel_send(w, &message, sizeof message);
}

static enum verdict children_changed(struct warden *w)
{
    const bool by_itself = reap(w);
    const bool childless = no_children();
    const bool empty = childless && cgroup_settled(w);

    if (w->main_stopped)
        main_stopped(w);
    if (w->main_reaped && !w->main_reported)
        main_exited(w, empty);
    if (empty)
        return tree_empty(w);
    w->intruded = childless;
    if (w->killing)
        kill_again(w, by_itself);
    return plan_leftovers(w);
}

static enum verdict asked_to_end(struct warden *w, const struct signalfd_siginfo *info)
{
    const struct message_asked asked = {
        .signo = (int32_t)info->ssi_signo,
        .pid = (int32_t)info->ssi_pid,
        .uid = info->ssi_uid,
    };
    return ask_owner(w, CAUSE_ASKED, asked);
}

static enum verdict read_signals(struct warden *w)
{
    struct signalfd_siginfo info;
    bool children = false;
    enum verdict verdict = GO_ON;

    while (read(w->signals, &info, sizeof info) == (ssize_t)sizeof info) {
        switch (info.ssi_signo) {
        case SIGCHLD:
            children = true;
            break;
        case SIGTERM:
        case SIGINT:
        case SIGHUP:
        case SIGQUIT:
            verdict = asked_to_end(w, &info);
            break;
        default: /* ignored: nothing in the tree or outside it gets rid of the warden by accident */
            break;
        }
    }
    return children ? children_changed(w) : verdict;
}

/* ---- The loop ---- */

static int next_timeout(const struct warden *w)
{
    const int64_t due[] = {w->plan_due, w->asked_due, w->kill_due, w->lease_due, w->listen_due};
    int64_t first = 0;
    for (size_t i = 0; i < sizeof due / sizeof due[0]; i++)
        if (due[i] && (!first || due[i] < first))
            first = due[i];
    if (!first)
        return -1;
    int64_t left = first - now_ms();
    return left < 0 ? 0 : left > 3600000 ? 3600000 : (int)left;
}

static enum verdict run_timers(struct warden *w)
{
    const int64_t now = now_ms();

    if (durable(w))
        lease_follow(w);
    if (w->kill_due && w->kill_due <= now)
        kill_retry(w);
    if (w->asked_due && w->asked_due <= now)
        return plan_begin(w, w->asked_cause);
    if (w->lease_due && w->lease_due <= now)
        return plan_begin(w, CAUSE_LEASE);
    if (w->plan_due && w->plan_due <= now)
        return plan_step(w);
    return GO_ON;
}

static bool supervisor_there(const struct warden *w)
{
    if (w->options.watch < 0 && !w->promoted)
        return getppid() == w->options.supervisor;
    return w->supervisor >= 0 && (sys_pidfd_send_signal(w->supervisor, 0) == 0 || errno == EPERM);
}

/* Of every warden; behind them come those that are attached. */
#define FIXED_FDS 5

/* EINTR, or short of memory: then everything is looked at, and nothing of that blocks.  Whether the
 * supervisor is there can be told without a poll: from whose child we are. */
static void look_without_poll(const struct warden *w, struct pollfd *fds, size_t attached,
                              int error)
{
    for (size_t i = 0; i < FIXED_FDS + attached; i++)
        fds[i].revents = error == EINTR || fds[i].fd < 0 ? 0 : fds[i].events;
    if (supervisor_there(w))
        fds[2].revents = 0;
    if (attached && error != EINTR)
        attached_look(fds + FIXED_FDS);
    if (error != EINTR)
        poll(NULL, 0, 1);
}

static enum verdict turn(struct warden *w)
{
    struct pollfd fds[FIXED_FDS + ATTACHED_FDS] = {
        {.fd = w->signals, .events = POLLIN},
        {.fd = w->control, .events = POLLIN},
        {.fd = w->supervisor, .events = POLLIN},
        {.fd = w->intruded ? w->leaf_events : -1, .events = POLLPRI},
        {.fd = w->lease_timer > 0 ? w->lease_timer : -1, .events = POLLIN},
    };
    const size_t attached = attached_poll(w, fds + FIXED_FDS);
    if (poll(fds, FIXED_FDS + attached, next_timeout(w)) < 0)
        look_without_poll(w, fds, attached, errno);
    enum verdict verdict = GO_ON;
    if (fds[0].revents)
        verdict = read_signals(w);
    if (verdict == GO_ON && fds[3].revents)
        verdict = children_changed(w);
    if (verdict == GO_ON && fds[4].revents && lease_ran_out(w))
        verdict = plan_begin(w, CAUSE_LEASE);
    if (verdict == GO_ON && fds[1].revents && fds[1].fd == w->control)
        verdict = read_control(w);
    /* A forked helper of the host program may hold a copy of the socket, so that its end never
     * comes: the pidfd does not have that problem. */
    if (verdict == GO_ON && fds[2].revents && fds[2].fd == w->supervisor) {
        verdict = hear_out(w);
        if (verdict == GO_ON && fds[2].fd == w->supervisor)
            verdict = supervisor_lost(w);
    }
    if (verdict == GO_ON && attached)
        verdict = attached_turn(w, fds + FIXED_FDS);
    return verdict == GO_ON ? run_timers(w) : verdict;
}

/* ---- Setting up ---- */

/* Our own descriptors stay above the standard streams, which the host program may have closed. */
int lift(int fd)
{
    if (fd < 0 || fd > 2)
        return fd;
    int lifted = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    close(fd);
    return lifted;
}

static struct failure failure_at(int step, int error)
{
    return (struct failure){.error = error, .step = step};
}

/* A host program that ignores SIGCHLD hands that on through exec, and then the kernel reaps our
 * children behind our back; SIGPIPE and SIGXFSZ are ignored by every Python. */
int prepare_signals(struct warden *w)
{
    sigset_t all;
    if (signal(SIGCHLD, SIG_DFL) == SIG_ERR || signal(SIGPIPE, SIG_DFL) == SIG_ERR ||
        signal(SIGXFSZ, SIG_DFL) == SIG_ERR)
        return errno;
    sigfillset(&all);
    if (sigprocmask(SIG_SETMASK, &all, NULL) < 0)
        return errno;
    w->signals = lift(signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK));
    return w->signals < 0 ? errno : 0;
}

/* A /proc of another PID namespace would tell us about other processes under our numbers. */
static int prepare_proc(struct warden *w)
{
    char self[16];
    w->proc = w->options.proc;
    if (w->proc < 0)
        w->proc = lift(open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (w->proc < 0)
        return errno;
    ssize_t got = readlinkat(w->proc, "self", self, sizeof self - 1);
    if (got < 0)
        return errno;
    unsigned long long pid = 0;
    parse_number(self, self + got, &pid);
    if ((pid_t)pid == w->self)
        return 0;
    close(w->proc); /* nobody is ever looked up there */
    w->proc = -1;
    return ENXIO;
}

static int prepare_supervisor(struct warden *w)
{
    /* Forked by a template: the supervisor is not our parent, and has opened this itself. */
    if (w->options.watch >= 0) {
        w->supervisor = w->options.watch;
        return 0;
    }
    w->supervisor = lift(sys_pidfd_open(w->options.supervisor));
    if (w->supervisor < 0)
        return errno;
    /* Only now is it certain that the descriptor is our parent's and not of a process that was
     * given its number. */
    return getppid() == w->options.supervisor ? 0 : ESRCH;
}

/* What abandon() needs comes before what may fail because the supervisor has died. */
static struct failure prepare(struct warden *w)
{
    int error;

    if ((error = tree_prepare(w)))
        return failure_at(STEP_MEMORY, error);
    if ((error = descriptors_prepare(w)))
        return failure_at(STEP_DESCRIPTORS, error);
    if ((error = prepare_signals(w)))
        return failure_at(STEP_SIGNALS, error);
    if (w->options.keep_session) {
        if (setpgid(0, 0) < 0)
            return failure_at(STEP_SETPGID, errno);
    } else if (getsid(0) != w->self && setsid() < 0) {
        return failure_at(STEP_SETSID, errno);
    }
    if (prctl(PR_SET_CHILD_SUBREAPER, 1) < 0)
        return failure_at(STEP_SUBREAPER, errno);
    if (prctl(PR_SET_NAME, WARDEN_NAME) < 0)
        return failure_at(STEP_SUBREAPER, errno);
    if ((error = prepare_proc(w)))
        return failure_at(STEP_PROC, error);
    if ((error = prepare_supervisor(w)))
        return failure_at(STEP_PIDFD, error);
    terminal_prepare(w);
    return failure_at(0, 0);
}

/* What outlives us if we are killed: so it is made late, and told to the registry first. */
static struct failure contain(struct warden *w)
{
    int error = registry_enter(w);
    if (error) /* the tree can do without: the supervisor says so */
        send_failure(w, MESSAGE_FAULT, failure_at(STEP_REGISTRY, error));
    struct failure failure = cgroup_prepare(w);
    return failure.error ? failure : namespace_prepare(w);
}

/* START carries the orphan plan.  Until it is here nothing is started, so that the supervisor has
 * a pidfd of a warden that is certainly alive before that warden can do anything. */
static bool receive_start(struct warden *w)
{
    union request request;
    struct pollfd fds[2] = {
        {.fd = w->control, .events = POLLIN},
        {.fd = w->supervisor, .events = POLLIN},
    };
    ssize_t size;
    do {
        if (poll(fds, 2, -1) < 0 && errno != EINTR && errno != ENOMEM)
            return false;
        if (fds[1].revents && !fds[0].revents)
            return false;
        size = channel_receive(w->control, &request, sizeof request);
    } while (size < 0 && errno == EAGAIN);
    if (size < 0)
        send_failure(w, MESSAGE_FAULT, failure_at(STEP_PROTOCOL, errno));
    if (size <= 0)
        return false;
    if (!request_valid(&request, (size_t)size) || request.header.type != MESSAGE_START) {
        send_failure(w, MESSAGE_FAULT, (struct failure){EPROTO, STEP_PROTOCOL});
        return false;
    }
    w->plan_count = request.start.stage_count;
    memcpy(w->plan, request.start.stages, w->plan_count * sizeof w->plan[0]);
    return true;
}

static void keep_path(char **path, char room[PATH_MAX])
{
    if (*path && strlen(*path) < PATH_MAX) {
        put_text(room, *path);
        *path = room;
    }
}

/* ps(1) shall say whose warden this is, and nothing else: the command is shown by the command. */
static void set_title(struct warden *w, char **argv)
{
    static char cgroup[PATH_MAX], entry[PATH_MAX];
    keep_path(&w->options.cgroup, cgroup);
    keep_path(&w->options.entry, entry);
    char **last = argv;
    while (last[1])
        last++;
    if (last > argv)
        memset(argv[1], 0, (size_t)(*last + strlen(*last) - argv[1]));
}

static struct failure prepare_durable(struct warden *w)
{
    if (!durable(w))
        return failure_at(0, 0);
    w->started_ms = boot_ms();
    struct failure failure = attached_listen(w);
    return failure.error ? failure : lease_prepare(w);
}

static bool begin(struct warden *w)
{
    struct failure failure = prepare_durable(w);
    if (!failure.error)
        failure = contain(w);
    if (!failure.error)
        failure = w->options.adopt ? adopt_main(w) : spawn_main(w);
    if (failure.error) {
        if (durable(w))
            record_failure(w, failure);
        send_failure(w, MESSAGE_EXEC_FAILED, failure);
        return false;
    }
    struct process process;
    struct message_started *message = &w->started;
    message->pid = w->main;
    if (process_read(w->proc, w->main, &process) == 0)
        message->start_time = process.start_time;
    registry_started(w, message->start_time);
    header_init(&message->header, MESSAGE_STARTED, 0);
    channel_send(w, message, sizeof *message);
    return true;
}

/* Nothing of us stays in the file system. */
void leave_nothing(struct warden *w)
{
    cgroup_remove(w);
    registry_leave(w);
}

/* A callable was forked before we became the warden, so it is there even when we cannot begin; so is
 * the init of a namespace.  Nobody waits for them but us, and not for ever. */
static int abandon(struct warden *w)
{
    /* It may be on its way to where it waits, and lead no group yet; it is not reaped, so that the
     * number is its own. */
    if (w->options.adopt > 0)
        kill(w->options.adopt, SIGKILL);
    if (!w->killed) { /* no memory to walk with */
        if (w->options.adopt > 0) {
            kill(-w->options.adopt, SIGKILL);
            waitpid(w->options.adopt, NULL, 0);
        }
        cgroup_remove(w);
        return 1;
    }
    if (w->options.adopt > 0) {
        struct sent sent = {0, 0};
        w->main = w->options.adopt;
        kill_tree(w, &sent, 0);
    }
    if (w->init)
        kill(w->init, SIGKILL);
    for (int64_t end = now_ms() + ABANDON_PATIENCE_MS; !no_children() && now_ms() < end; reap(w)) {
        struct signalfd_siginfo info;
        struct pollfd fd = {.fd = w->signals, .events = POLLIN};
        poll(&fd, 1, ABANDON_PATIENCE_MS);
        while (read(w->signals, &info, sizeof info) > 0)
            continue;
    }
    if (w->options.adopt > 0 && w->leaf < 0) /* its leaf was made before us */
        cgroup_prepare(w);
    leave_nothing(w);
    return 1;
}

static int supervise(struct warden *w, char **argv)
{
    struct failure failure = prepare(w);
    if (failure.error) {
        send_failure(w, MESSAGE_FAULT, failure);
        return abandon(w);
    }
    if (!receive_start(w))
        return abandon(w);
    if (!begin(w))
        return abandon(w);
    set_title(w, argv);
    descriptors_drop(w);

    /* A callable may have ended before we were its warden.  Its SIGCHLD is lost then: setting a
     * signal that is ignored by default to SIG_DFL discards what is pending (signal(7)). */
    enum verdict verdict = w->options.adopt ? children_changed(w) : GO_ON;
    while (verdict == GO_ON)
        verdict = turn(w);
    return verdict == FINISHED ? 0 : 1;
}

int main(int argc, char **argv)
{
    static struct peer watchers[WATCHERS_MAX];
    static struct warden warden; /* all zero, so that it takes no page of its own beside the rest */
    struct warden *w = &warden;

    w->control = w->supervisor = w->signals = w->proc = -1;
    w->leaf = w->leaf_events = w->init_link = w->entry = w->terminal = -1;
    w->watchers = watchers;
    if (argc < 1 || !parse_arguments(&w->options, argv)) {
        static const char text[] = "proctree-warden: started by proctree, not by hand\n";
        return write(2, text, sizeof text - 1) < 0 ? 1 : 2;
    }
    w->self = getpid();
    if (w->options.be_init) {
        w->init_link = w->options.control;
        return prepare_signals(w) ? 1 : be_init(w);
    }
    w->control = w->options.control;
    w->owner = w->options.supervisor;
    w->owner_uid = geteuid();
    return supervise(w, argv);
}
