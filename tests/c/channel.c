/* Messages between two ends, of which one does not read, or is gone. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>

#include "check.h"
#include "processes.h"
#include "warden.h"

static struct warden warden;
static int peer;

/* Called when the warden is about to wait for room. */
static void (*when_waiting)(void);
static unsigned waits;

int __real_poll(struct pollfd *fds, nfds_t count, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout);

/* Instead of waiting: time goes on by as much as it would have taken. */
static int64_t passed;
static int last_timeout;

int __wrap_clock_gettime(clockid_t clock, struct timespec *out);

int __wrap_clock_gettime(clockid_t clock, struct timespec *out)
{
    CHECK(clock == CLOCK_MONOTONIC);
    *out = (struct timespec){.tv_sec = 1000 + passed / 1000, .tv_nsec = passed % 1000 * 1000000};
    return 0;
}

int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    waits++;
    last_timeout = timeout;
    if (timeout > 0) {
        passed += timeout;
        timeout = 0;
    }
    if (when_waiting)
        when_waiting();
    return __real_poll(fds, count, timeout);
}

static void connect_pair(void)
{
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    warden = (struct warden){.control = pair[0], .supervisor = -1};
    peer = pair[1];
    waits = 0;
}

static void disconnect(void)
{
    close(warden.control);
    if (peer >= 0)
        close(peer);
    if (warden.supervisor >= 0)
        close(warden.supervisor);
}

static void say(uint32_t serial)
{
    struct message_signalled message = {.count = 7, .denied = 8};
    header_init(&message.header, MESSAGE_SIGNALLED, serial);
    channel_send(&warden, &message, sizeof message);
}

static bool heard(uint32_t serial)
{
    struct message_signalled message;
    return recv(peer, &message, sizeof message, MSG_DONTWAIT | MSG_TRUNC) == sizeof message &&
           message.header.version == PROTOCOL_VERSION && message.header.type == MESSAGE_SIGNALLED &&
           message.header.flags == 0 && message.header.serial == serial && message.count == 7 &&
           message.denied == 8;
}

/* How many messages there is room for. */
static uint32_t fill_up(void)
{
    char message[16] = {0};
    uint32_t count = 0;
    while (send(warden.control, message, sizeof message, MSG_DONTWAIT) >= 0)
        count++;
    CHECK(errno == EAGAIN);
    return count;
}

static void messages_arrive(void)
{
    connect_pair();
    say(1);
    say(0xffffffff);
    CHECK(heard(1) && heard(0xffffffff) && waits == 0);
    send_failure(&warden, MESSAGE_FAULT, (struct failure){.error = 71, .step = 14});
    struct message_failure failure;
    CHECK(recv(peer, &failure, sizeof failure, MSG_TRUNC) == sizeof failure);
    CHECK(failure.header.type == MESSAGE_FAULT && failure.error == 71 && failure.step == 14);
    disconnect();
}

static void receiving(void)
{
    char small[8];
    connect_pair();
    CHECK(channel_receive(warden.control, small, sizeof small) == -1 && errno == EAGAIN);
    CHECK(send(peer, "12345678", 8, 0) == 8 && send(peer, "123456789", 9, 0) == 9);
    CHECK(channel_receive(warden.control, small, sizeof small) == 8);
    /* Too long a message is not taken for its beginning. */
    CHECK(channel_receive(warden.control, small, sizeof small) == 9);
    close(peer);
    peer = -1;
    CHECK(channel_receive(warden.control, small, sizeof small) == 0);
    disconnect();
}

static void nobody_listens(void)
{
    connect_pair();
    close(peer);
    peer = -1;
    say(1); /* no SIGPIPE, no end of this program */
    CHECK(waits == 0);
    const int control = warden.control;
    warden.control = -1;
    say(1);
    warden.control = control;
    disconnect();
}

static uint32_t filled;

/* One that has read a little only is not enough: the kernel says that there is room when three
 * quarters of it are free (unix_writable() in net/unix/af_unix.c). */
static void read_all(void)
{
    char message[16];
    for (; filled > 0; filled--)
        CHECK(recv(peer, message, sizeof message, MSG_DONTWAIT) == sizeof message);
}

static void one_that_reads_late(void)
{
    connect_pair();
    filled = fill_up();
    when_waiting = read_all;
    say(4711);
    CHECK(waits == 1 && filled == 0);
    CHECK(heard(4711));
    when_waiting = NULL;
    disconnect();
}

static pid_t supervisor;

static void end_supervisor(void)
{
    if (supervisor) {
        end_child(supervisor);
        supervisor = 0;
    }
}

/* A copy of the other end is still open, so there is no end of file. */
static void one_that_dies_and_does_not_read(void)
{
    connect_pair();
    supervisor = fork_resting();
    warden.supervisor = sys_pidfd_open(supervisor);
    CHECK(warden.supervisor >= 0);
    fill_up();
    when_waiting = end_supervisor;
    say(1);
    CHECK(supervisor == 0 && waits == 1);
    when_waiting = NULL;
    disconnect();
}

static void close_peer(void)
{
    close(peer);
    peer = -1;
    when_waiting = NULL;
}

static void one_that_closes_and_does_not_read(void)
{
    connect_pair();
    fill_up();
    when_waiting = close_peer;
    say(1);
    CHECK(peer == -1 && waits == 1);
    disconnect();
}

/* ---- The owner of a durable tree ---- */

static uint32_t owner_that_is_full(void)
{
    connect_pair();
    warden.options.run = 3;
    passed = 0;
    return fill_up();
}

static bool connection_has_ended(void)
{
    char message[16];
    ssize_t got;
    do
        got = recv(peer, message, sizeof message, MSG_DONTWAIT);
    while (got > 0);
    return got == 0;
}

static void an_owner_that_does_not_read(void)
{
    owner_that_is_full();
    say(1);
    CHECK(waits == 1 && passed == 2000);
    say(2); /* it has had its time */
    CHECK(waits == 1 && passed == 2000);
    CHECK(connection_has_ended());
    disconnect();
}

static void an_owner_that_reads_late(void)
{
    filled = owner_that_is_full();
    when_waiting = read_all;
    say(7);
    when_waiting = NULL;
    CHECK(waits == 1 && heard(7) && !connection_has_ended());
    disconnect();
}

static void an_owner_whose_lease_runs_out_meanwhile(void)
{
    owner_that_is_full();
    warden.lease_timer = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK);
    struct itimerspec now = {.it_value = {.tv_nsec = 1}};
    CHECK(timerfd_settime(warden.lease_timer, 0, &now, NULL) == 0);
    struct pollfd fd = {.fd = warden.lease_timer, .events = POLLIN};
    CHECK(__real_poll(&fd, 1, 10000) == 1);
    say(1);
    CHECK(waits == 1 && connection_has_ended());
    CHECK(lease_ran_out(&warden)); /* that is left for the loop to read */
    close(warden.lease_timer);
    disconnect();
}

/* Without a durable run there is nobody else, and no limit. */
static void a_supervisor_has_its_time(void)
{
    connect_pair();
    warden.lease_timer = 0;
    filled = fill_up();
    when_waiting = read_all;
    passed = 0;
    say(9);
    when_waiting = NULL;
    CHECK(waits == 1 && passed == 0 && last_timeout == -1 && heard(9));
    disconnect();
}

int main(void)
{
    const unsigned before = open_descriptors();
    messages_arrive();
    receiving();
    nobody_listens();
    one_that_reads_late();
    one_that_dies_and_does_not_read();
    one_that_closes_and_does_not_read();
    an_owner_that_does_not_read();
    an_owner_that_reads_late();
    an_owner_whose_lease_runs_out_meanwhile();
    a_supervisor_has_its_time();
    CHECK(open_descriptors() == before);
    printf("%u\n", checks);
    return 0;
}
