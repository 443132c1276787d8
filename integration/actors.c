/* Processes that misbehave on purpose, each in one small mode.  Built once for the tests.
 *
 * A mode that takes `say` writes one line to standard output when it is what it is to be. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

static void say(const char *text)
{
    if (write(1, text, strlen(text)) < 0)
        _exit(9);
}

static void close_all(void)
{
    for (int fd = 0; fd < 256; fd++)
        close(fd);
}

/* `count` children, each in a session of its own, then waits for ever. */
static void sessions(int count)
{
    int ready[2];
    if (pipe(ready) < 0)
        _exit(8);
    for (int i = 0; i < count; i++) {
        if (fork() == 0) {
            setsid();
            close(ready[1]);
            for (;;)
                pause();
        }
    }
    close(ready[1]);
    char byte;
    while (read(ready[0], &byte, 1) > 0) /* ends when every child has its own session */
        continue;
    say("ready\n");
    for (;;)
        pause();
}

/* Daemonises: session, second fork, no descriptors.  Prints the daemon's pid first. */
static void daemonise(void)
{
    int report[2];
    char text[32];
    if (pipe(report) < 0)
        _exit(8);
    if (fork() == 0) {
        setsid();
        /* Before it is there: it is reported before it runs, and may be signalled at once. */
        signal(SIGTERM, SIG_IGN);
        signal(SIGHUP, SIG_IGN);
        pid_t pid = fork();
        if (pid == 0) {
            close_all();
            for (;;)
                pause();
        }
        dprintf(report[1], "%d\n", (int)pid);
        _exit(0);
    }
    close(report[1]);
    ssize_t got = read(report[0], text, sizeof text - 1);
    wait(NULL);
    if (got > 0) {
        text[got] = 0;
        say(text);
    }
}

/* Forks as fast as it can while there are fewer than `limit` of its kind (RLIMIT_NPROC is set by
 * the test, so that fork fails with EAGAIN and the bomb goes on trying). */
static void bomb(void)
{
    signal(SIGTERM, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    for (;;)
        if (fork() < 0)
            usleep(1000);
}

/* At most `limit` processes in all: each new one forks the next two. */
static void bounded_bomb(int limit)
{
    int tokens[2];
    signal(SIGTERM, SIG_IGN);
    if (pipe(tokens) < 0)
        _exit(8);
    for (int i = 0; i < limit; i++)
        if (write(tokens[1], "x", 1) != 1)
            _exit(8);
    fcntl(tokens[0], F_SETFL, O_NONBLOCK);
    for (;;) {
        char byte;
        if (read(tokens[0], &byte, 1) != 1) {
            say("x");
            for (;;)
                pause();
        }
        if (fork() == 0)
            setsid();
    }
}

/* A relay: forks a successor and ends, again and again, always in a new session, so that nobody
 * who looks it up finds it where it was. */
static void comet(void)
{
    signal(SIGTERM, SIG_IGN);
    say("ready\n");
    for (;;) {
        if (fork() != 0)
            _exit(0);
        setsid();
    }
}

/* Children that end at once and are never waited for. */
static void zombies(int count)
{
    for (int i = 0; i < count; i++)
        if (fork() == 0)
            _exit(0);
    for (int i = 0; i < count; i++) { /* all are dead, none is reaped */
        siginfo_t info;
        waitid(P_ALL, 0, &info, WEXITED | WNOWAIT);
    }
    say("ready\n");
    for (;;)
        pause();
}

/* A chain: every process has one child, `depth` deep. */
static void chain(int depth)
{
    signal(SIGTERM, SIG_IGN);
    for (int i = 0; i < depth; i++) {
        if (fork() != 0)
            for (;;)
                pause();
        setsid();
    }
    say("ready\n");
    for (;;)
        pause();
}

/* A family in many sessions: one that ignores SIGTERM, one with a child, and one whose parent is
 * gone.  When all of them are what they are to be, it writes a line to each standard stream, and
 * then to the descriptor `fd`, which nobody keeps open but the family. */
static void family(int fd)
{
    int ready[2];
    pid_t parting;
    if (pipe(ready) < 0)
        _exit(8);
    if (fork() == 0) {
        setsid();
        signal(SIGTERM, SIG_IGN);
        close(ready[1]);
        for (;;)
            pause();
    }
    if (fork() == 0) {
        setsid();
        fork();
        close(ready[1]);
        for (;;)
            pause();
    }
    if ((parting = fork()) == 0) {
        setsid();
        if (fork() > 0)
            _exit(0);
        close(ready[1]);
        for (;;)
            pause();
    }
    waitpid(parting, NULL, 0);
    close(ready[1]);
    char byte;
    while (read(ready[0], &byte, 1) > 0)
        continue;
    say("out\n");
    if (write(2, "err\n", 4) != 4 || write(fd, "ready\n", 6) != 6)
        _exit(9);
    for (;;)
        pause();
}

/* Counts SIGTERMs and prints "N" when it gets SIGUSR1. */
static volatile sig_atomic_t terms;
static void on_term(int signo)
{
    (void)signo;
    terms++;
}
static void on_usr1(int signo)
{
    char digit[2] = {(char)('0' + terms), '\n'};
    (void)signo;
    if (write(1, digit, 2) < 0)
        _exit(9);
}
static void counter(void)
{
    signal(SIGTERM, on_term);
    signal(SIGUSR1, on_usr1);
    say("ready\n");
    for (;;)
        pause();
}

static void stopped(void)
{
    say("ready\n");
    raise(SIGSTOP);
    for (;;)
        pause();
}

static void ignore(void)
{
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    say("ready\n");
    for (;;)
        pause();
}

/* Says so when it gets SIGTERM, and goes on. */
static void on_term_say(int signo)
{
    (void)signo;
    say("term\n");
}
static void deaf(void)
{
    signal(SIGTERM, on_term_say);
    say("ready\n");
    for (;;)
        pause();
}

/* Takes SIGTERM for a reason to stop. */
static void on_term_stop(int signo)
{
    (void)signo;
    raise(SIGSTOP);
}
static void stops_on_term(void)
{
    signal(SIGTERM, on_term_stop);
    say("ready\n");
    for (;;)
        pause();
}

/* Exits by itself, with status 7: by SIGTERM or at the end of its standard input. */
static void on_term_exit(int signo)
{
    (void)signo;
    _exit(7);
}
static void exits(void)
{
    char byte;
    signal(SIGTERM, on_term_exit);
    say("ready\n");
    while (read(0, &byte, 1) > 0)
        continue;
    _exit(7);
}

static void become(char **argv)
{
    execvp(argv[0], argv);
    _exit(127);
}

/* Starts a command in the moment in which it gets SIGTERM, which it survives. */
static void when_term(char **argv)
{
    sigset_t term, before;
    int signo;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, &before);
    say("ready\n");
    sigwait(&term, &signo);
    if (fork() == 0) {
        sigprocmask(SIG_SETMASK, &before, NULL);
        become(argv);
    }
    for (;;)
        pause();
}

/* Has a child that becomes a command in the moment in which it loses its parent.  The signal of
 * PR_SET_PDEATHSIG comes when it has its new parent; the end of a pipe would come before. */
static void when_orphaned(char **argv)
{
    sigset_t orphaned, before;
    int signo;
    sigemptyset(&orphaned);
    sigaddset(&orphaned, SIGUSR1);
    sigprocmask(SIG_BLOCK, &orphaned, &before);
    if (fork() == 0) {
        signal(SIGTERM, SIG_IGN);
        prctl(PR_SET_PDEATHSIG, SIGUSR1);
        say("ready\n");
        sigwait(&orphaned, &signo);
        sigprocmask(SIG_SETMASK, &before, NULL);
        become(argv);
    }
    for (;;)
        pause();
}

/* Traces a process and never asks how it is: when that dies it stays a zombie, which nobody else can
 * reap, for as long as we live. */
static int trace(pid_t pid)
{
    if (ptrace(PTRACE_SEIZE, pid, 0, 0) < 0)
        return 1;
    say("tracing\n");
    for (;;)
        pause();
}

/* Becomes root for good if its file lets it, and says who it is. */
static void set_uid(void)
{
    if (setuid(geteuid()) < 0)
        _exit(8);
    say(getuid() == 0 ? "root\n" : "nobody\n");
    signal(SIGTERM, SIG_IGN);
    for (;;)
        pause();
}

/* Short-lived children, without end: pids come and go. */
static void churn(void)
{
    say("ready\n");
    for (;;) {
        pid_t pid = fork();
        if (pid == 0)
            _exit(0);
        if (pid > 0)
            waitpid(pid, NULL, 0);
    }
}

/* Children that live for a moment, twenty at a time, and a parent that knows how each of them
 * ended: says "hit" when one was ended by a signal, which nobody had any business to send. */
static void witness(void)
{
    int alive = 0;
    say("ready\n");
    for (;;) {
        while (alive < 20) {
            pid_t pid = fork();
            if (pid == 0) {
                usleep(500 + (unsigned)getpid() % 1500);
                _exit(0);
            }
            if (pid < 0)
                break;
            alive++;
        }
        int status;
        if (wait(&status) > 0) {
            alive--;
            if (WIFSIGNALED(status))
                say("hit\n");
        }
    }
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    int number = argc > 2 ? atoi(argv[2]) : 0;

    if (!strcmp(mode, "sessions"))
        sessions(number);
    else if (!strcmp(mode, "daemonise"))
        daemonise();
    else if (!strcmp(mode, "bomb"))
        bomb();
    else if (!strcmp(mode, "bounded-bomb"))
        bounded_bomb(number);
    else if (!strcmp(mode, "comet"))
        comet();
    else if (!strcmp(mode, "zombies"))
        zombies(number);
    else if (!strcmp(mode, "chain"))
        chain(number);
    else if (!strcmp(mode, "family"))
        family(number);
    else if (!strcmp(mode, "counter"))
        counter();
    else if (!strcmp(mode, "stopped"))
        stopped();
    else if (!strcmp(mode, "ignore"))
        ignore();
    else if (!strcmp(mode, "deaf"))
        deaf();
    else if (!strcmp(mode, "stops-on-term"))
        stops_on_term();
    else if (!strcmp(mode, "exits"))
        exits();
    else if (!strcmp(mode, "when-term") && argc > 2)
        when_term(argv + 2);
    else if (!strcmp(mode, "when-orphaned") && argc > 2)
        when_orphaned(argv + 2);
    else if (!strcmp(mode, "trace"))
        return trace(number);
    else if (!strcmp(mode, "set-uid"))
        set_uid();
    else if (!strcmp(mode, "churn"))
        churn();
    else if (!strcmp(mode, "witness"))
        witness();
    else if (!strcmp(mode, "pause"))
        for (say("ready\n");;)
            pause();
    else
        return 64;
    return 0;
}
