/* Stands where the warden should be, and runs it under strace(1).
 *
 * The environment says how: TRACED_WARDEN is the real one, TRACED_LOG the file for strace's output,
 * TRACED_CALL the system call, TRACED_FAULT what to inject, or nothing. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    const char *fault = getenv("TRACED_FAULT");
    char trace[128], inject[256];
    char *command[argc + 16];
    int count = 0;
    sigset_t alarm;

    /* strace -D gives its grandchild 3 seconds to attach and dies of SIGALRM then: too few on a
     * busy machine. */
    sigemptyset(&alarm);
    sigaddset(&alarm, SIGALRM);
    sigprocmask(SIG_BLOCK, &alarm, NULL);
    /* For a callable we are a subreaper already, and strace, whose parent goes away, would become a
     * member of the tree.  The warden makes itself a subreaper again. */
    if (prctl(PR_SET_CHILD_SUBREAPER, 0) < 0)
        return 90;

    /* -D: the tracer is the grandchild, so that the warden stays our parent's child. */
    command[count++] = "strace";
    command[count++] = "-DDD";
    command[count++] = "-qq";
    command[count++] = "-y";
    command[count++] = "-o";
    command[count++] = getenv("TRACED_LOG");
    snprintf(trace, sizeof trace, "trace=%s", getenv("TRACED_CALL"));
    command[count++] = "-e";
    command[count++] = trace;
    if (fault && *fault) {
        snprintf(inject, sizeof inject, "inject=%s", fault);
        command[count++] = "-e";
        command[count++] = inject;
    }
    command[count++] = getenv("TRACED_WARDEN");
    for (int i = 1; i < argc; i++)
        command[count++] = argv[i];
    command[count] = NULL;
    execvp("strace", command);
    return 91;
}
