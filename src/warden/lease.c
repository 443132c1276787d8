/* The lease: how long a durable tree lives when nobody is attached.
 *
 * A strict one runs whoever is attached, and nothing but KEEP moves it: so its owner knows, by its
 * own clock and without an answer, until when the tree may run at most.  That is why it counts the
 * time in which the machine is suspended (CLOCK_BOOTTIME), and has a timer of the kernel, which poll(2)
 * with a timeout could not be: that one stands still meanwhile. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

/* When a strict one is over, the tree is not to be ended but dead: others may start it elsewhere
 * then.  So the orphan plan begins as much earlier as it may take. */
static uint64_t plan_at(const struct warden *w)
{
    uint64_t plan_ms = 0;
    for (uint32_t i = 0; i < w->plan_count; i++)
        plan_ms += w->plan[i].grace_ms;
    return plan_ms < w->lease_ms ? w->lease_ms - plan_ms : 0;
}

/* Until when, and not for how long: whoever says it, or we, may be stopped before it is heard. */
static int set_timer(const struct warden *w)
{
    const uint64_t at = plan_at(w);
    struct itimerspec to = {.it_value = {
                                .tv_sec = (time_t)(at / 1000),
                                .tv_nsec = (long)(at % 1000) * 1000000,
                            }};
    if (at == 0) /* all zero disarms it (timerfd_settime(2)) */
        to.it_value.tv_nsec = 1;
    return timerfd_settime(w->lease_timer, TFD_TIMER_ABSTIME, &to, NULL);
}

/* A tree whose time is over before it has begun is not started. */
struct failure lease_prepare(struct warden *w)
{
    w->lease_ms = (uint64_t)(w->options.strict ? w->options.until : w->options.lease);
    if (!w->options.strict)
        return (struct failure){0, 0};
    if ((uint64_t)boot_ms() >= plan_at(w))
        return (struct failure){.error = ETIMEDOUT, .step = STEP_LEASE};
    w->lease_timer = lift(timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK));
    return w->lease_timer < 0 || set_timer(w) < 0 ? failed(STEP_LEASE) : (struct failure){0, 0};
}

void lease_keep(struct warden *w, uint64_t lease_ms)
{
    w->lease_ms = w->options.strict || lease_ms < UINT32_MAX ? lease_ms : UINT32_MAX;
    if (w->options.strict && set_timer(w) < 0)
        send_failure(w, MESSAGE_FAULT, failed(STEP_LEASE));
}

/* Of the strict one. */
bool lease_ran_out(struct warden *w)
{
    uint64_t times;
    return read(w->lease_timer, &times, sizeof times) == (ssize_t)sizeof times;
}

/* The other one begins when the last one has gone, and ends when somebody comes. */
void lease_follow(struct warden *w)
{
    if (w->options.strict)
        return;
    if (w->plan_running || attached_any(w))
        w->lease_due = 0;
    else if (!w->lease_due)
        w->lease_due = now_ms() + (int64_t)w->lease_ms;
}
