/* What /proc says about one process: living, stopped, dead, gone, and gone in between. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/stat.h>

#include "check.h"
#include "processes.h"
#include "warden.h"

/* The moment between open(2) and read(2), made long enough for somebody to end. */
static pid_t ends_when_opened;

int __real_openat(int directory, const char *path, int flags, ...);
int __wrap_openat(int directory, const char *path, int flags, ...);

int __wrap_openat(int directory, const char *path, int flags, ...)
{
    const int fd = __real_openat(directory, path, flags, 0600);
    if (ends_when_opened) {
        const pid_t pid = ends_when_opened;
        ends_when_opened = 0;
        end_child(pid);
    }
    return fd;
}

static int proc;

static void ourselves(void)
{
    struct process us;
    CHECK(process_read(proc, getpid(), &us) == 0);
    CHECK(us.pid == getpid() && us.ppid == getppid());
    CHECK(us.pgrp == getpgid(0) && us.session == getsid(0));
    CHECK(us.threads == 1);
    CHECK(us.start_time > 0);
    CHECK(us.state == 'R');
    CHECK(!process_dead(&us) && !process_dying(&us));
    CHECK(process_tracer(proc, getpid()) == 0);
}

static void any_name(void)
{
    static const char *names[] = {"", ")", "a) Z 1 2", "((((((((", "line\nbreak", "fifteen bytes..",
                                  "\n) (", "\x80\xff\x01"};
    char before[16];
    prctl(PR_GET_NAME, before);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        struct process us;
        CHECK(prctl(PR_SET_NAME, names[i]) == 0);
        CHECK(process_read(proc, getpid(), &us) == 0);
        CHECK(us.ppid == getppid() && us.state == 'R');
        CHECK(strcmp(us.comm, names[i]) == 0);
        CHECK(process_tracer(proc, getpid()) == 0);
    }
    prctl(PR_SET_NAME, before);
}

static void a_zombie(void)
{
    struct process process;
    const pid_t pid = fork_resting();
    make_zombie(pid);
    CHECK(process_read(proc, pid, &process) == 0);
    CHECK(process.state == 'Z' && process.ppid == getpid());
    CHECK(process_dead(&process) && process_dying(&process));
    end_child(pid);
    CHECK(process_read(proc, pid, &process) == ENOENT);
}

static void a_stopped_one_that_is_killed(void)
{
    struct process process;
    siginfo_t info;
    const pid_t pid = fork_resting();
    kill(pid, SIGSTOP);
    CHECK(waitid(P_PID, (id_t)pid, &info, WSTOPPED) == 0);
    CHECK(process_read(proc, pid, &process) == 0);
    CHECK(process.state == 'T');
    CHECK(!process_dead(&process) && !process_dying(&process));
    end_child(pid);
}

/* A tracer keeps it from running when SIGKILL comes: it stays in PTRACE_EVENT_EXIT until it is let
 * go, killed and not dead, for as long as we want to look. */
static void one_with_its_sigkill_that_is_not_dead_yet(void)
{
    struct process process;
    int status;
    const pid_t pid = fork_resting();

    CHECK(ptrace(PTRACE_SEIZE, pid, NULL, (void *)PTRACE_O_TRACEEXIT) == 0);
    CHECK(process_tracer(proc, pid) == getpid());
    kill(pid, SIGKILL);
    CHECK(waitpid(pid, &status, __WALL) == pid);
    CHECK(WIFSTOPPED(status) && status >> 8 == (SIGTRAP | PTRACE_EVENT_EXIT << 8));
    CHECK(process_read(proc, pid, &process) == 0);
    CHECK(!process_dead(&process));
    CHECK(process_dying(&process));
    ptrace(PTRACE_CONT, pid, NULL, NULL);
    CHECK(waitpid(pid, &status, __WALL) == pid && WIFSIGNALED(status));
    CHECK(process_tracer(proc, pid) == 0);
}

static void *rest_in_thread(void *unused)
{
    (void)unused;
    rest();
}

/* The leader has ended and a thread of it has not: a zombie that lives. */
static void a_leader_that_left_its_threads(void)
{
    struct process process;
    const pid_t pid = fork_child();
    if (pid == 0) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, rest_in_thread, NULL) == 0)
            pthread_exit(NULL);
        _exit(1);
    }
    do
        CHECK(process_read(proc, pid, &process) == 0);
    while (process.state != 'Z');
    CHECK(process.threads == 2);
    CHECK(!process_dead(&process) && !process_dying(&process));
    end_child(pid);
}

static void one_that_vanishes_between_open_and_read(void)
{
    const unsigned before = open_descriptors();
    struct process process;

    ends_when_opened = fork_resting();
    CHECK(process_read(proc, ends_when_opened, &process) == ESRCH);
    ends_when_opened = fork_resting();
    CHECK(process_tracer(proc, ends_when_opened) == 0);
    CHECK(open_descriptors() == before);
}

static void nobody(void)
{
    struct process process;
    CHECK(process_read(proc, (pid_t)PIDS_MAX, &process) == ENOENT);
    CHECK(process_read(proc, 0, &process) == ENOENT);
    CHECK(process_tracer(proc, (pid_t)PIDS_MAX) == 0);
}

static void put_file(int directory, const char *path, const char *text)
{
    const int fd = openat(directory, path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

/* What no kernel says, or none yet. */
static void a_strange_proc(int directory)
{
    const unsigned before = open_descriptors();
    struct process process;
    char huge[5000];

    CHECK(mkdirat(directory, "7", 0700) == 0);
    CHECK(process_read(directory, 7, &process) == ENOENT);
    put_file(directory, "7/stat", "");
    CHECK(process_read(directory, 7, &process) == ESRCH);
    put_file(directory, "7/stat", "7 (x) S 1 2");
    CHECK(process_read(directory, 7, &process) == EBADMSG);
    put_file(directory, "7/stat",
             "8 (x) S 1 2 3 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0 0 0 0 0 0 0 0 0 0 0 0\n");
    CHECK(process_read(directory, 7, &process) == EBADMSG);
    put_file(directory, "7/stat",
             "7 (x) S 1 2 3 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0 0 0 0 0 0 0 0 256 0 0\n");
    CHECK(process_read(directory, 7, &process) == 0);
    CHECK(process.start_time == 99 && process.pending == 256 && process_dying(&process));
    memset(huge, '(', sizeof huge - 1);
    huge[sizeof huge - 1] = '\0';
    put_file(directory, "7/stat", huge);
    CHECK(process_read(directory, 7, &process) == EBADMSG);

    put_file(directory, "7/status", "Name:\tx\nTracerPid:\t4711\nUid:\t0\n");
    CHECK(process_tracer(directory, 7) == 4711);
    put_file(directory, "7/status", "Name:\tTracerPid:\t4711\n");
    CHECK(process_tracer(directory, 7) == 0);
    put_file(directory, "7/status", "Name:\tx\nTracerPid:\t");
    CHECK(process_tracer(directory, 7) == 0);
    put_file(directory, "7/status", huge);
    CHECK(process_tracer(directory, 7) == 0);

    CHECK(unlinkat(directory, "7/stat", 0) == 0 && mkdirat(directory, "7/stat", 0700) == 0);
    CHECK(process_read(directory, 7, &process) == EISDIR);
    CHECK(open_descriptors() == before);
}

static void dead_and_dying(void)
{
    static const struct {
        struct process process;
        bool dead, dying;
    } cases[] = {
        {{.state = 'R', .threads = 1}, false, false},
        {{.state = 'D', .threads = 1}, false, false},
        {{.state = '?', .threads = 1}, false, false},
        {{.state = 'Z', .threads = 1}, true, true},
        {{.state = 'Z', .threads = 0}, true, true},
        {{.state = 'Z', .threads = 3, .flags = 0x4}, false, false},
        {{.state = 'X', .threads = 3}, true, true},
        {{.state = 'x', .threads = 1}, true, true},
        {{.state = 'R', .threads = 1, .flags = 0x4}, false, true},
        {{.state = 'S', .threads = 9, .flags = 0x400}, false, true},
        {{.state = 'D', .threads = 1, .pending = 1ul << (SIGKILL - 1)}, false, true},
        {{.state = 'D', .threads = 1, .pending = ~(1ul << (SIGKILL - 1))}, false, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        CHECK(process_dead(&cases[i].process) == cases[i].dead);
        CHECK(process_dying(&cases[i].process) == cases[i].dying);
    }
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    const int directory = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    CHECK(directory >= 0 && proc >= 0);

    ourselves();
    any_name();
    a_zombie();
    a_stopped_one_that_is_killed();
    one_with_its_sigkill_that_is_not_dead_yet();
    a_leader_that_left_its_threads();
    one_that_vanishes_between_open_and_read();
    nobody();
    a_strange_proc(directory);
    dead_and_dying();
    printf("%u\n", checks);
    return 0;
}
