/* A foreground job: a main process that stays in the session of its supervisor and has the terminal
 * for as long as it runs, as a shell's job has (tcsetpgrp(3), credentials(7)).
 *
 * Every signal is blocked in the warden, and until exec in the main process, so that SIGTTOU does
 * not stop whoever of them hands the terminal over from the background. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

/* Without a terminal there is nothing to hand over, and a job like any other. */
void terminal_prepare(struct warden *w)
{
    if (!w->options.keep_session)
        return;
    w->terminal = lift(open("/dev/tty", O_RDWR | O_NOCTTY | O_CLOEXEC));
    w->terminal_owner = getpgid(w->options.supervisor);
}

static void hand_over(const struct warden *w, pid_t from, pid_t to)
{
    pid_t now;
    if (w->terminal >= 0 && ioctl(w->terminal, TIOCGPGRP, &now) == 0 && now == from)
        ioctl(w->terminal, TIOCSPGRP, &to);
}

/* Only what the supervisor's own group has can be given: a background job stays in the background. */
void terminal_give(const struct warden *w, pid_t group)
{
    hand_over(w, w->terminal_owner, group);
}

/* A group of the tree that has ended may have it still: a job of a shell that was killed. */
static bool is_nobody(pid_t group)
{
    return group > 1 && kill(-group, 0) < 0 && errno == ESRCH;
}

void terminal_take(const struct warden *w)
{
    pid_t now;
    if (w->terminal < 0 || ioctl(w->terminal, TIOCGPGRP, &now) < 0)
        return;
    if (now == w->main || is_nobody(now))
        hand_over(w, now, w->terminal_owner);
}
