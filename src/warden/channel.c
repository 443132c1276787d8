/* Messages to and from the supervisor. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

/* How often, and after how long, a message is sent again for which there was no memory. */
#define SEND_TRIES 100
#define SEND_PAUSE_MS 10

/* How long the owner of a durable tree may not read what it is told. */
#define OWNER_PATIENCE_MS 2000

void header_init(struct message_header *header, enum message_type type, uint32_t serial)
{
    *header = (struct message_header){
        .version = PROTOCOL_VERSION,
        .type = (uint8_t)type,
        .serial = serial,
    };
}

/* A supervisor that does not read holds the warden up here, and so loses nothing; one that dies
 * lets it go.  Both are events, so there is nothing to poll for on an interval.  The owner of a
 * durable tree is one of several, and is not waited for beyond its patience and its lease. */
static bool wait_writable(struct warden *w)
{
    struct pollfd fds[3] = {
        {.fd = w->control, .events = POLLOUT},
        {.fd = w->supervisor, .events = POLLIN},
        {.fd = w->lease_timer > 0 ? w->lease_timer : -1, .events = POLLIN},
    };
    const int64_t end = now_ms() + OWNER_PATIENCE_MS;
    int ready;
    do {
        const int64_t left = end - now_ms();
        ready = poll(fds, 3, !durable(w) ? -1 : left > 0 ? (int)left : 0);
    } while (ready < 0 && errno == EINTR);
    return ready > 0 && !(fds[1].revents & POLLIN) && !fds[2].revents &&
           !(fds[0].revents & (POLLERR | POLLHUP));
}

/* A message arrives, or the channel ends: the supervisor may be waiting for it, and would wait for
 * ever for one that is just missing.  The end is an end of file for both sides, and both act on it. */
void channel_send(struct warden *w, const void *message, size_t size)
{
    int tries = 0;
    while (w->control >= 0) {
        if (send(w->control, message, size, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
            return;
        if (errno == EINTR || (errno == EAGAIN && wait_writable(w)))
            continue;
        /* ENOBUFS, ENOMEM: the kernel is short of memory for the message. */
        if ((errno != ENOBUFS && errno != ENOMEM) || ++tries > SEND_TRIES) {
            shutdown(w->control, SHUT_RDWR);
            return;
        }
        poll(NULL, 0, SEND_PAUSE_MS);
    }
}

/* Returns the size, 0 at the end of file, or -1 with errno.
 *
 * A supervisor that closes its end before it has read everything leaves ECONNRESET here, once, and
 * ahead of what it had sent before (unix(7) does not say so; net/unix/af_unix.c does).  RELEASE may
 * be among that. */
ssize_t channel_receive(int fd, void *buffer, size_t size)
{
    ssize_t got;
    do
        got = recv(fd, buffer, size, MSG_DONTWAIT | MSG_TRUNC);
    while (got < 0 && (errno == EINTR || errno == ECONNRESET));
    return got;
}

struct message_failure failure_message(enum message_type type, struct failure failure)
{
    struct message_failure message = {.error = failure.error, .step = failure.step};
    header_init(&message.header, type, 0);
    return message;
}

void send_failure(struct warden *w, enum message_type type, struct failure failure)
{
    const struct message_failure message = failure_message(type, failure);
    channel_send(w, &message, sizeof message);
}

static struct message_usage usage_of(const struct rusage *usage)
{
    return (struct message_usage){
        .user_us = (uint64_t)usage->ru_utime.tv_sec * 1000000 + (uint64_t)usage->ru_utime.tv_usec,
        .system_us = (uint64_t)usage->ru_stime.tv_sec * 1000000 + (uint64_t)usage->ru_stime.tv_usec,
        .max_rss = (uint64_t)usage->ru_maxrss * 1024,
    };
}

/* RUSAGE_CHILDREN of the subreaper is the whole tree: everything that anybody in it waited for,
 * and everything that the warden reaped itself (getrusage(2)). */
static struct message_usage usage_of_tree(void)
{
    struct rusage usage;
    memset(&usage, 0, sizeof usage);
    getrusage(RUSAGE_CHILDREN, &usage);
    return usage_of(&usage);
}

void send_empty(struct warden *w)
{
    struct message_empty message = {.reaped = w->reaped, .usage = usage_of_tree()};
    header_init(&message.header, MESSAGE_EMPTY, 0);
    cgroup_peaks(w, &message);
    if (durable(w))
        record_end(w, &message);
    leave_nothing(w);
    tell_everybody(w, &message, sizeof message);
}

static void fill_member(struct message_member *to, const struct process *from, int error,
                        pid_t tracer)
{
    *to = (struct message_member){
        .pid = from->pid,
        .ppid = from->ppid,
        .pgrp = from->pgrp,
        .session = from->session,
        .start_time = from->start_time,
        .error = error,
        .tracer = tracer,
        .state = from->state,
    };
    memcpy(to->comm, from->comm, sizeof to->comm);
}

static bool may_be_traced(const struct process *process)
{
    return process->state == 't' || process_dead(process);
}

/* Answers a LIST.  Sent in pieces, so that neither side needs memory for a whole tree at once. */
uint32_t send_members(struct warden *w, uint32_t serial)
{
    struct message_members message;
    uint32_t count = 0, total = 0;

    tree_snapshot(w);
    for (size_t i = 0; i < w->pid_count; i++) {
        struct process process;
        int fd = member_open(w, w->pids[i], &process);
        if (fd < 0)
            continue;
        /* One that its tracer holds as a zombie cannot be reaped by its parent: ptrace(2). */
        pid_t tracer = may_be_traced(&process) ? process_tracer(w->proc, process.pid) : 0;
        if (process_dead(&process) && !tracer)
            continue;
        if (count == PROTOCOL_MEMBERS_MAX) {
            header_init(&message.header, MESSAGE_MEMBERS, serial);
            message.header.flags = MEMBERS_MORE;
            message.count = count;
            message.total = total;
            channel_send(w, &message, sizeof message);
            count = 0;
        }
        int denied = sys_pidfd_send_signal(fd, 0) < 0 ? errno : 0;
        fill_member(&message.members[count++], &process, denied, tracer);
        total++;
    }
    tree_forget(w);
    header_init(&message.header, MESSAGE_MEMBERS, serial);
    message.count = count;
    message.total = total;
    memset(&message.members[count], 0, (PROTOCOL_MEMBERS_MAX - count) * sizeof message.members[0]);
    channel_send(w, &message, sizeof message);
    return total;
}

void send_exited(struct warden *w, uint32_t leftovers)
{
    w->exited = (struct message_exited){
        .status = w->main_status, .leftovers = leftovers, .usage = usage_of_tree()};
    header_init(&w->exited.header, MESSAGE_EXITED, 0);
    tell_everybody(w, &w->exited, sizeof w->exited);
}
