/* Kills a process with SIGKILL at the entry of its N-th system call.
 *
 *     crash_points N LOG PID
 *
 * All threads of PID are traced, also those that it makes, but none of its children.  Counted are
 * the calls of all threads between two marks: getpriority(PRIO_USER, MARK), which does nothing, opens
 * the window and closes it.  A call at whose entry the process is killed is not executed.  With N = 0
 * nothing is killed.  "seized\n" on stdout says that all threads are traced; this program ends when
 * the process has ended.
 *
 * LOG gets a line for each call: its number in the window, the thread, the number of the call and its
 * arguments, and "killed" behind the one that was not executed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Behind sys/ptrace.h, which has some of it under other names. */
#include <linux/ptrace.h>

#define MARK 0x7070
#define THREADS_MAX 256

static FILE *listing;
static pid_t process;
static unsigned long target, count;
static bool window;

static pid_t seized[THREADS_MAX];
static int threads;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static bool is_seized(pid_t thread)
{
    for (int i = 0; i < threads; i++)
        if (seized[i] == thread)
            return true;
    return false;
}

static void seize(pid_t thread)
{
    /* PTRACE_O_TRACECLONE is only about threads: for fork(2) and for the CLONE_VFORK of
     * posix_spawn(3) the kernel has events of their own, ptrace(2), which are not asked for. */
    const long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL;
    if (threads == THREADS_MAX) {
        errno = E2BIG;
        fail("threads");
    }
    if (ptrace(PTRACE_SEIZE, thread, NULL, options) < 0)
        fail("PTRACE_SEIZE");
    if (ptrace(PTRACE_INTERRUPT, thread, NULL, NULL) < 0)
        fail("PTRACE_INTERRUPT");
    seized[threads++] = thread;
}

/* A thread that is made while we look is made by one that we have, or is seen the next time. */
static void seize_all(void)
{
    char path[64];
    bool more = true;

    snprintf(path, sizeof path, "/proc/%d/task", process);
    while (more) {
        struct dirent *entry;
        DIR *tasks = opendir(path);
        if (!tasks)
            fail(path);
        more = false;
        while ((entry = readdir(tasks))) {
            pid_t thread = atoi(entry->d_name);
            if (thread > 0 && !is_seized(thread)) {
                seize(thread);
                more = true;
            }
        }
        closedir(tasks);
    }
}

static void note(pid_t thread, const struct __ptrace_syscall_info *info)
{
    fprintf(listing, "%lu %d %llu", count, thread, (unsigned long long)info->entry.nr);
    for (int i = 0; i < 6; i++)
        fprintf(listing, " %llx", (unsigned long long)info->entry.args[i]);
    if (count == target)
        fputs(" killed", listing);
    fputc('\n', listing);
}

static void entered(pid_t thread)
{
    struct __ptrace_syscall_info info;

    /* A thread that was killed meanwhile is not there to be asked. */
    if (ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof info, &info) < 0)
        return;
    if (info.op != PTRACE_SYSCALL_INFO_ENTRY)
        return;
    if (info.entry.nr == SYS_getpriority && info.entry.args[0] == PRIO_USER &&
        info.entry.args[1] == MARK) {
        window = !window;
        return;
    }
    if (!window)
        return;
    count++;
    note(thread, &info);
    /* The kernel does not execute a call at whose entry stop a fatal signal came. */
    if (count == target && kill(process, SIGKILL) < 0)
        fail("kill");
}

static void stopped(pid_t thread, int status)
{
    const int signo = WSTOPSIG(status), event = status >> 16;
    long deliver = 0;

    if (signo == (SIGTRAP | 0x80)) {
        entered(thread);
    } else if (event == PTRACE_EVENT_STOP && signo != SIGTRAP) {
        /* Stopped as a whole by a stopping signal: it stays so until SIGCONT. */
        if (ptrace(PTRACE_LISTEN, thread, NULL, NULL) < 0 && errno != ESRCH)
            fail("PTRACE_LISTEN");
        return;
    } else if (!event) {
        deliver = signo;
    }
    if (ptrace(PTRACE_SYSCALL, thread, NULL, deliver) < 0 && errno != ESRCH)
        fail("PTRACE_SYSCALL");
}

int main(int argc, char **argv)
{
    int status = 0;

    if (argc != 4) {
        fputs("usage: crash_points N LOG PID\n", stderr);
        return 2;
    }
    target = strtoul(argv[1], NULL, 10);
    process = atoi(argv[3]);
    listing = fopen(argv[2], "w");
    if (!listing)
        fail(argv[2]);
    seize_all();
    if (write(STDOUT_FILENO, "seized\n", 7) != 7)
        fail("write");
    for (;;) {
        pid_t thread = waitpid(-1, &status, __WALL);
        if (thread < 0) {
            if (errno == EINTR)
                continue;
            fail("waitpid");
        }
        if (WIFSTOPPED(status))
            stopped(thread, status);
        else if (thread == process) /* reported behind all its other threads */
            break;
    }
    return fclose(listing) == 0 ? 0 : 1;
}
