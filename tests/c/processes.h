/* Real processes for the test programs: each waits until its parent lets it go or is gone. */
#ifndef PROCTREE_PROCESSES_H
#define PROCTREE_PROCESSES_H

#include <signal.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

/* Forks a child that goes on; the parent's end of its life is ours too. */
static inline pid_t fork_child(void)
{
    const pid_t parent = getpid();
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
    }
    return pid;
}

static inline _Noreturn void rest(void)
{
    for (;;)
        pause();
}

static inline pid_t fork_resting(void)
{
    const pid_t pid = fork_child();
    if (pid == 0)
        rest();
    return pid;
}

static inline void end_child(pid_t pid)
{
    int status;
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, 0) == pid);
}

/* Ended, and not reaped. */
static inline void make_zombie(pid_t pid)
{
    siginfo_t info;
    kill(pid, SIGKILL);
    CHECK(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT) == 0);
}

#endif
