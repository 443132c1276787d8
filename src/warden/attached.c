/* Who has connected to a durable warden.
 *
 * The owner is the supervisor that every tree has: its socket and its pidfd are w->control and
 * w->supervisor, whoever it is.  The others watch, and one of them that waits for it becomes the
 * owner when the owner goes.  Nobody here can hold the warden up: what a watcher has no room for,
 * it has lost, and with it the connection. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

#define BACKLOG 16

/* Until it is tried again to accept somebody for whom there was no descriptor or no memory; they
 * wait in the queue, and poll(2) would say so all the time. */
#define ACCEPT_PAUSE_MS 100

#define EACH_PEER(w, peer)                                                                         \
    for (struct peer *peer = (w)->watchers; peer < (w)->watchers + WATCHERS_MAX; peer++)

struct failure attached_listen(struct warden *w)
{
    const int fd = w->options.listen;
    if (fd < 0)
        return (struct failure){0, 0};
    /* Whoever connects sees the credentials of who has called listen(2): unix(7), SO_PEERCRED. */
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0 || listen(fd, BACKLOG) < 0)
        return failed(STEP_LISTEN);
    return (struct failure){0, 0};
}

/* ---- Talking to them ---- */

/* One that cannot be told has lost its connection, but keeps its place until that is read: so
 * nobody's place is given away while somebody looks at it. */
static void peer_send(const struct peer *peer, const void *message, size_t size)
{
    while (send(peer->fd, message, size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        if (errno != EINTR) {
            shutdown(peer->fd, SHUT_RDWR);
            return;
        }
    }
}

static void peer_refuse(const struct peer *peer, struct failure failure)
{
    const struct message_failure message = failure_message(MESSAGE_FAULT, failure);
    peer_send(peer, &message, sizeof message);
}

void tell_everybody(struct warden *w, const void *message, size_t size)
{
    channel_send(w, message, size);
    if (!durable(w))
        return;
    EACH_PEER(w, peer)
        if (peer->attached)
            peer_send(peer, message, size);
}

bool attached_any(const struct warden *w)
{
    if (w->control >= 0)
        return true;
    for (unsigned i = 0; i < WATCHERS_MAX; i++)
        if (w->watchers[i].attached)
            return true;
    return false;
}

static struct message_attached state_for(const struct warden *w, uint32_t serial, bool owner)
{
    struct message_attached message = {
        .owner = w->control >= 0 ? w->owner : 0,
        .ending = w->ending,
    };
    header_init(&message.header, MESSAGE_ATTACHED, serial);
    message.header.flags = (uint16_t)((owner ? ATTACHED_OWNER : 0) |
                                      (w->options.end_leftovers ? ATTACHED_ENDS : 0));
    return message;
}

void attached_tell_owner(struct warden *w, uint32_t serial)
{
    const struct message_attached message = state_for(w, serial, true);
    channel_send(w, &message, sizeof message);
}

/* ---- Coming and going ---- */

static void peer_close(const struct peer *peer)
{
    close(peer->fd);
    if (peer->pidfd > 0)
        close(peer->pidfd);
}

static void peer_drop(struct peer *peer)
{
    peer_close(peer);
    *peer = (struct peer){.fd = 0};
}

/* A copy of the client's socket may be in a process that it has forked, so that its end never comes:
 * the pidfd does not have that problem. */
static int peer_pidfd(const struct peer *peer)
{
    int fd = -1;
    socklen_t size = sizeof fd;
    if (getsockopt(peer->fd, SOL_SOCKET, SO_PEERPIDFD, &fd, &size) == 0)
        return lift(fd);
    if (peer->pid == 0)
        return 0;
    /* Linux before 6.5.  A newer one answers this when it is gone already. */
    return errno == ENOPROTOOPT ? lift(sys_pidfd_open(peer->pid)) : -1;
}

/* Whoever could connect could also have signalled us, or else they have no business here. */
static struct failure admit(struct peer *peer)
{
    struct ucred who;
    socklen_t size = sizeof who;
    if (getsockopt(peer->fd, SOL_SOCKET, SO_PEERCRED, &who, &size) < 0)
        return failed(STEP_ATTACH);
    if (who.uid != 0 && who.uid != geteuid())
        return (struct failure){.error = EPERM, .step = STEP_ATTACH};
    peer->pid = who.pid;
    peer->uid = who.uid;
    peer->pidfd = peer_pidfd(peer);
    return peer->pidfd < 0 ? failed(STEP_ATTACH) : (struct failure){0, 0};
}

/* Of those that have not attached, who has been silent for longest gives its place to who comes: so a
 * program that connects and then hangs does not lock others out.  One that was just about to say
 * something finds its connection reset, and comes again. */
static struct peer *free_place(struct warden *w)
{
    struct peer *silent = NULL;
    EACH_PEER(w, peer) {
        if (!peer->fd)
            return peer;
        if (!peer->attached && (!silent || peer->came < silent->came))
            silent = peer;
    }
    if (silent)
        peer_drop(silent);
    return silent;
}

static void accept_one(struct warden *w)
{
    struct peer peer = {.fd = lift(accept4(w->options.listen, NULL, NULL,
                                           SOCK_CLOEXEC | SOCK_NONBLOCK))};
    if (peer.fd < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
            w->listen_due = now_ms() + ACCEPT_PAUSE_MS;
        return;
    }
    struct failure failure = admit(&peer);
    struct peer *place = failure.error ? NULL : free_place(w);
    if (!failure.error && !place)
        failure = (struct failure){.error = EUSERS, .step = STEP_ATTACH};
    if (failure.error) {
        peer_refuse(&peer, failure);
        peer_close(&peer);
    } else {
        peer.came = ++w->came;
        *place = peer;
    }
}

static void become_owner(struct warden *w, struct peer *peer)
{
    w->control = peer->fd;
    w->supervisor = peer->pidfd > 0 ? peer->pidfd : -1;
    w->owner = peer->pid;
    w->owner_uid = peer->uid;
    w->promoted = true;
    *peer = (struct peer){.fd = 0};
}

/* There is no owner any more.  Returns whether there is one again. */
bool attached_promote(struct warden *w)
{
    struct peer *first = NULL;
    EACH_PEER(w, peer)
        if (peer->waits && (!first || peer->waits < first->waits))
            first = peer;
    if (!first)
        return false;
    become_owner(w, first);
    attached_tell_owner(w, 0);
    return true;
}

/* What there is to be known about the main process, for one who comes late. */
static void tell_story(const struct warden *w, const struct peer *peer)
{
    peer_send(peer, &w->started, sizeof w->started);
    if (w->main_reported)
        peer_send(peer, &w->exited, sizeof w->exited);
}

/* ATTACH, the first one or another one. */
static void attach(struct warden *w, struct peer *peer, const struct message_header *request)
{
    const bool first = !peer->attached;
    const bool wants = request->flags & ATTACH_OWN;

    peer->attached = true;
    if (!wants)
        peer->waits = 0;
    else if (!peer->waits)
        peer->waits = ++w->waits;
    const struct peer self = *peer;
    const bool owns = wants && w->control < 0;
    if (owns)
        become_owner(w, peer);
    const struct message_attached message = state_for(w, request->serial, owns);
    peer_send(&self, &message, sizeof message);
    if (first)
        tell_story(w, &self);
}

/* ---- What they say ---- */

static bool owners_only(uint8_t type)
{
    return type != MESSAGE_START && type != MESSAGE_ATTACH && type != MESSAGE_DETACH &&
           type != MESSAGE_CANCEL;
}

static enum verdict peer_obey(struct warden *w, struct peer *peer, const union request *request)
{
    const uint8_t type = request->header.type;

    if (type == MESSAGE_ATTACH) {
        attach(w, peer, &request->header);
    } else if (!peer->attached || type == MESSAGE_START) {
        peer_refuse(peer, (struct failure){.error = EPROTO, .step = STEP_PROTOCOL});
        peer_drop(peer);
    } else if (owners_only(type)) {
        peer_refuse(peer, (struct failure){.error = EPERM, .step = STEP_ATTACH});
    } else if (type == MESSAGE_DETACH) {
        peer_drop(peer);
    } else {
        const struct message_asked asked = {.pid = peer->pid, .uid = peer->uid};
        return ask_owner(w, CAUSE_CANCELLED, asked);
    }
    return GO_ON;
}

static enum verdict peer_read(struct warden *w, struct peer *peer)
{
    union request request;
    const ssize_t size = channel_receive(peer->fd, &request, sizeof request);

    if (size < 0 && errno == EAGAIN)
        return GO_ON;
    if (size > 0 && request_valid(&request, (size_t)size))
        return peer_obey(w, peer, &request);
    if (size > 0)
        peer_refuse(peer, (struct failure){.error = EPROTO, .step = STEP_PROTOCOL});
    peer_drop(peer);
    return GO_ON;
}

/* Its process has ended: what it said last, and that is all. */
static enum verdict peer_ended(struct warden *w, struct peer *peer)
{
    struct pollfd fd = {.fd = peer->fd, .events = POLLIN};
    enum verdict verdict = GO_ON;
    for (int i = 0; i < LAST_WORDS_MAX && verdict == GO_ON && peer->fd == fd.fd; i++) {
        if (poll(&fd, 1, 0) <= 0)
            break;
        verdict = peer_read(w, peer);
    }
    if (peer->fd == fd.fd)
        peer_drop(peer);
    return verdict;
}

/* ---- The loop ---- */

/* First the one where they connect, then two for each place. */
size_t attached_poll(const struct warden *w, struct pollfd fds[ATTACHED_FDS])
{
    if (!durable(w))
        return 0;
    const int listening = w->listen_due ? -1 : w->options.listen;
    *fds++ = (struct pollfd){.fd = listening, .events = POLLIN};
    for (unsigned i = 0; i < WATCHERS_MAX; i++) {
        const struct peer *peer = &w->watchers[i];
        *fds++ = (struct pollfd){.fd = peer->fd ? peer->fd : -1, .events = POLLIN};
        *fds++ = (struct pollfd){.fd = peer->pidfd ? peer->pidfd : -1, .events = POLLIN};
    }
    return ATTACHED_FDS;
}

/* Nobody could be asked: what can be read without waiting is looked at, and the pidfds are not. */
void attached_look(struct pollfd fds[ATTACHED_FDS])
{
    for (unsigned i = 0; i < ATTACHED_FDS; i++) {
        const bool is_pidfd = i > 0 && i % 2 == 0;
        fds[i].revents = is_pidfd || fds[i].fd < 0 ? 0 : POLLIN;
    }
}

/* Who connects comes last, so that no place has somebody else than when it was polled. */
enum verdict attached_turn(struct warden *w, const struct pollfd fds[ATTACHED_FDS])
{
    enum verdict verdict = GO_ON;
    for (unsigned i = 0; i < WATCHERS_MAX && verdict == GO_ON; i++) {
        struct peer *peer = &w->watchers[i];
        const struct pollfd *at = &fds[1 + 2 * i];
        if (peer->fd && peer->fd == at[0].fd && at[0].revents)
            verdict = peer_read(w, peer);
        if (verdict == GO_ON && peer->fd && peer->fd == at[0].fd && at[1].revents)
            verdict = peer_ended(w, peer);
    }
    if (w->listen_due && w->listen_due <= now_ms())
        w->listen_due = 0;
    else if (fds[0].revents)
        accept_one(w);
    return verdict;
}
