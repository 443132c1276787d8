/* Signalling the tree and reaping it. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* SIGKILL passes before the tree is stopped first: a tree that still has new members in the third
 * pass forks faster than it is killed. */
#define PASSES_BEFORE_FREEZE 3
#define PASSES_MAX 64
#define FREEZE_PASSES_MAX 200

/* What the passes could not see (a process hidden by hidepid, a fork in the very last moment) is
 * looked for again, ever less often. */
#define KILL_RETRY_FIRST_MS 50
#define KILL_RETRY_LAST_MS 5000

static void count_result(struct warden *w, struct sent *sent, int result, pid_t pid, uint32_t serial)
{
    if (result == 0) {
        sent->count++;
    } else if (errno != ESRCH) {
        struct message_denied message = {.pid = pid, .error = errno};
        sent->denied++;
        header_init(&message.header, MESSAGE_DENIED, serial);
        channel_send(w, &message, sizeof message);
    }
}

/* A stopped process keeps every signal but SIGKILL and SIGCONT pending (signal(7)): SIGCONT lets it
 * see the one that it was just sent. */
static void resume(int fd, const struct process *process, const struct message_stage *stage)
{
    if ((stage->flags & STAGE_RESUME) && (process->state == 'T' || process->state == 't'))
        sys_pidfd_send_signal(fd, SIGCONT);
}

static void signal_members(struct warden *w, const struct message_stage *stage, bool group_done,
                           struct sent *sent, uint32_t serial)
{
    for (size_t i = 0; i < w->pid_count; i++) {
        struct process process;
        int fd = member_open(w, w->pids[i], &process);
        if (fd < 0 || process_dead(&process))
            continue;
        bool in_group = process.pgrp == w->main;
        if (stage->scope == SCOPE_GROUP && !in_group)
            continue;
        if (stage->scope == SCOPE_MAIN && process.pid != w->main)
            continue;
        /* The group has had it: signal 0 only asks whether we were allowed to. */
        int signo = in_group && group_done ? 0 : stage->signo;
        count_result(w, sent, sys_pidfd_send_signal(fd, signo), process.pid, serial);
        resume(fd, &process, stage);
    }
}

/* The group is signalled in one call while that is exact: as long as the main process has not been
 * reaped, its number can be nobody else's group.  Afterwards its members are signalled one by one. */
static bool signal_group(struct warden *w, const struct message_stage *stage)
{
    if (w->main_reaped || stage->scope == SCOPE_MAIN)
        return false;
    return kill(-w->main, stage->signo) == 0;
}

struct sent send_signal(struct warden *w, const struct message_stage *stage, uint32_t serial)
{
    struct sent sent = {0, 0};

    if (stage->signo == SIGKILL && stage->scope == SCOPE_TREE) {
        kill_tree(w, &sent, serial);
        return sent;
    }
    if (w->leaf_frozen && ((stage->flags & STAGE_RESUME) || stage->signo == SIGCONT))
        cgroup_freeze(w, false);
    if (stage->flags & STAGE_FOREGROUND)
        terminal_give(w, w->main);
    if (stage->scope == SCOPE_MAIN) {
        if (w->main_reaped)
            return sent;
        w->pids[0] = w->main;
        w->pid_count = 1;
    } else {
        /* Everything is looked up before anything is signalled: a parent that ends at once would
         * take its place in the tree along. */
        tree_snapshot(w);
    }
    signal_members(w, stage, signal_group(w, stage), &sent, serial);
    tree_forget(w);
    return sent;
}

static unsigned freeze_pass(struct warden *w)
{
    unsigned moving = 0;
    tree_snapshot(w);
    for (size_t i = 0; i < w->pid_count; i++) {
        struct process process;
        int fd = member_open(w, w->pids[i], &process);
        if (fd < 0 || process.state == 'T' || process.state == 't' || process_dying(&process))
            continue;
        if (sys_pidfd_send_signal(fd, SIGSTOP) == 0)
            moving++;
    }
    tree_forget(w);
    return moving;
}

/* Stops the tree to a fixed point.  SIGSTOP leaves the members in their slots of RLIMIT_NPROC or
 * pids.max, where SIGKILL would make room for the next fork: this is what ends a fork bomb. */
static void stop_tree(struct warden *w)
{
    for (int pass = 0; pass < FREEZE_PASSES_MAX && freeze_pass(w); pass++) {
        /* A process stops when it is next scheduled, and nobody but its own parent can wait for
         * that: a millisecond lets the others run. */
        poll(NULL, 0, 1);
    }
}

/* The kernel's freezer stops a cgroup as a whole and shows nothing of it to a shell in the tree. */
void freeze_tree(struct warden *w)
{
    w->frozen = true;
    if (w->leaf >= 0)
        cgroup_freeze(w, true);
    if (!w->leaf_frozen)
        stop_tree(w);
}

struct sent thaw_tree(struct warden *w, uint32_t serial)
{
    w->frozen = false;
    const struct message_stage stage = {.signo = SIGCONT, .scope = SCOPE_TREE};
    return send_signal(w, &stage, serial);
}

/* Reaps what has ended.  Returns true when something ended by itself and not by SIGKILL: such a
 * process may have forked in its last moment, behind the back of a walk that was under way. */
bool reap(struct warden *w)
{
    bool by_itself = false;
    int status;
    pid_t pid;

    const int options = WNOHANG | (w->options.keep_session ? WUNTRACED : 0);

    while ((pid = waitpid(-1, &status, options)) > 0) {
        if (WIFSTOPPED(status)) {
            if (pid == w->main)
                w->main_stopped = WSTOPSIG(status);
            continue;
        }
        bit_clear(w->killed, pid);
        if (pid == w->init) {
            w->init = 0;
            continue;
        }
        w->reaped++;
        if (pid == w->main) {
            w->main_reaped = true;
            w->main_status = status;
        }
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
            by_itself = true;
    }
    return by_itself;
}

/* What one SIGKILL came to. */
struct killing {
    struct sent *sent;
    unsigned fresh; /* members that were able to run before it */
    uint32_t serial;
    bool first; /* the pass that is reported */
};

static void note_kill(struct warden *w, struct killing *killing, int result, pid_t pid, bool fresh)
{
    if (result == 0 && fresh)
        killing->fresh++;
    if (killing->first)
        count_result(w, killing->sent, result, pid, killing->serial);
}

/* A child of ours needs no pidfd, since its number stays its own until we reap it, and no second
 * look, since it is known which of them have their SIGKILL.  When a large tree is killed, nearly all
 * of it comes this way: its parents die first, and leave it to us. */
static bool kill_child(struct warden *w, struct killing *killing, pid_t pid)
{
    enum kinship kinship = child_of_ours(pid);
    if (kinship == NOT_OURS)
        return false;
    if (kinship == OURS_ALIVE && bit_set(w->killed, pid)) {
        /* In an earlier pass it may have had its SIGKILL as somebody else's child. */
        struct process process;
        bool again = !killing->first && process_read(w->proc, pid, &process) == 0 &&
                     process_dying(&process);
        note_kill(w, killing, kill(pid, SIGKILL), pid, !again);
    }
    return true;
}

static void kill_descendant(struct warden *w, struct killing *killing, pid_t pid)
{
    struct process process;
    int fd = member_open(w, pid, &process);
    if (fd < 0 || process_dead(&process))
        return;
    /* Even one that looks dying gets it: one thread in exit(2) does not end the others. */
    int result = sys_pidfd_send_signal(fd, SIGKILL);
    note_kill(w, killing, result, pid, !process_dying(&process));
}

static void kill_pass(struct warden *w, struct killing *killing)
{
    w->skip_killed = true;
    tree_snapshot(w);
    for (size_t i = 0; i < w->pid_count; i++)
        if (!kill_child(w, killing, w->pids[i]))
            kill_descendant(w, killing, w->pids[i]);
    w->skip_killed = false;
    tree_forget(w);
    /* Whatever the group has forked meanwhile, in one call; only while its number is certainly
     * still its own. */
    if (!w->main_reaped)
        kill(-w->main, SIGKILL);
}

/* Where the kernel ends the whole of a tree in one step, forks under way included, there is nothing
 * to walk: all that is left is to reap. */
static bool kill_at_once(struct warden *w, struct sent *sent)
{
    unsigned members = 0;

    if (w->init) {
        tree_snapshot(w);
        members = (unsigned)w->pid_count;
        members -= members > 0; /* the init, where anybody could be seen */
        tree_forget(w);
        if (kill(w->init, SIGKILL) < 0)
            return false;
    } else {
        members = cgroup_count(w);
        if (!cgroup_kill(w))
            return false;
    }
    sent->count += members;
    return true;
}

/* Kills to a fixed point: a pass that finds nobody able to run, after which nobody ended by
 * itself, means that every member has its SIGKILL.  None of them can fork any more, so all that is
 * left is to reap them as they go. */
static void kill_in_passes(struct warden *w, struct sent *sent, uint32_t serial)
{
    for (int pass = 0; pass < PASSES_MAX; pass++) {
        if (pass == PASSES_BEFORE_FREEZE)
            freeze_tree(w);
        struct killing killing = {.sent = sent, .serial = serial, .first = pass == 0};
        kill_pass(w, &killing);
        if (!killing.first)
            sent->count += killing.fresh;
        if (!reap(w) && killing.fresh == 0)
            break;
    }
}

static void killing_goes_on(struct warden *w)
{
    if (!w->killing)
        w->kill_backoff = KILL_RETRY_FIRST_MS;
    w->killing = true;
    w->kill_due = now_ms() + w->kill_backoff;
}

void kill_tree(struct warden *w, struct sent *sent, uint32_t serial)
{
    w->killed_at_once = kill_at_once(w, sent);
    if (!w->killed_at_once)
        kill_in_passes(w, sent, serial);
    killing_goes_on(w);
}

/* Children have been reaped while the tree is being killed.  One that ended by itself may have forked
 * in its last moment; and when its cgroup is empty and we still have children, then somebody moved
 * them out of it. */
void kill_again(struct warden *w, bool by_itself)
{
    struct sent sent = {0, 0};
    if (w->killed_at_once ? w->init || cgroup_populated(w) : !by_itself)
        return;
    kill_in_passes(w, &sent, 0);
    killing_goes_on(w);
}

void kill_retry(struct warden *w)
{
    struct sent sent = {0, 0};
    forget_killed(w); /* one that could not be killed then may be now */
    if (w->kill_backoff < KILL_RETRY_LAST_MS)
        w->kill_backoff *= 2;
    kill_at_once(w, &sent);
    kill_in_passes(w, &sent, 0);
    killing_goes_on(w);
}
