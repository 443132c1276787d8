/* A process that does what it is told, letter by letter, for tests that choose at random what their
 * trees do:
 *
 *     puppet LIFELINE SCRIPT [CONTROL]
 *
 * LIFELINE is a FIFO.  The puppet and everything that it forks hold its write end, so that whoever
 * reads it knows at every moment whether any of them lives: a read answers EAGAIN as long as one
 * does and the end of file when none does.  It is opened by name and not inherited: a process that
 * happens to be forked by the same supervisor at the same time never holds it.  When its reader goes
 * away, all of them end by themselves: no run, however broken, leaves puppets behind.
 *
 * SCRIPT is performed first, then what comes through the FIFO CONTROL, and then it waits for ever.
 *
 *     a   say so: one byte to the lifeline
 *     c   a child
 *     C   a child that ignores SIGTERM
 *     g   a grandchild in a session of its own, by two forks, that ignores SIGTERM
 *     z   a child that ends at once and is not waited for
 *     t   ignore SIGTERM from now on, and SIGINT and SIGHUP
 *     w   a line to standard output
 *     W   so much to standard output that no pipe holds it
 *     f   lines to standard output without end
 *     b   be busy without end, at the lowest priority
 *     s   stop (SIGSTOP)
 *     k   end by SIGKILL
 *     q   exit with status 3 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Both numbers are known to the tests: who has the FIFO there is a puppet of that tree. */
#define LIFELINE 100
#define CONTROL 101

#define EXIT_TOLD 3
#define EXIT_NO_READER 98
#define EXIT_FAILED 99

static void write_all(int fd, const char *text, size_t size)
{
    while (size > 0) {
        ssize_t written = write(fd, text, size);
        if (written < 0)
            _exit(EXIT_FAILED);
        text += written;
        size -= (size_t)written;
    }
}

static void ignore_polite_signals(void)
{
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
}

/* Returns when CONTROL, if it is given, can be read. */
static void wait_for(int control)
{
    for (;;) {
        struct pollfd fds[2] = {{.fd = LIFELINE}, {.fd = control, .events = POLLIN}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            _exit(EXIT_FAILED);
        if (fds[0].revents & POLLERR) /* nobody reads it any more: pipe(7) */
            _exit(EXIT_NO_READER);
        if (fds[1].revents & POLLIN)
            return;
    }
}

static pid_t fork_or_fail(void)
{
    pid_t pid = fork();
    if (pid < 0)
        _exit(EXIT_FAILED);
    return pid;
}

/* Signals are blocked around the fork, so that a SIGTERM finds the child as it is to be. */
static void child(int stubborn)
{
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    if (fork_or_fail() == 0) {
        if (stubborn)
            ignore_polite_signals();
        sigprocmask(SIG_SETMASK, &before, NULL);
        close(CONTROL);
        wait_for(-1);
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
}

static void grandchild(void)
{
    pid_t between = fork_or_fail();
    if (between == 0) {
        ignore_polite_signals();
        setsid();
        if (fork_or_fail() == 0) {
            close(CONTROL);
            wait_for(-1);
        }
        _exit(0);
    }
    while (waitpid(between, NULL, 0) < 0 && errno == EINTR)
        continue;
}

static void zombie(void)
{
    siginfo_t info;
    pid_t pid = fork_or_fail();
    if (pid == 0)
        _exit(0);
    while (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT) < 0 && errno == EINTR)
        continue;
}

static void much(void)
{
    static char lines[2 * 1024 * 1024];
    for (size_t i = 0; i < sizeof lines; i++)
        lines[i] = i % 64 == 63 ? '\n' : 'x';
    write_all(1, lines, sizeof lines);
}

/* Work that gives way to everybody else's. */
static void busy(void)
{
    if (nice(19) < 0)
        _exit(EXIT_FAILED);
    for (;;) {
        struct pollfd lifeline = {.fd = LIFELINE};
        for (volatile int i = 0; i < 1000000; i++)
            continue;
        if (poll(&lifeline, 1, 0) > 0)
            _exit(EXIT_NO_READER);
    }
}

static void perform(char letter)
{
    switch (letter) {
    case 'a':
        write_all(LIFELINE, "a", 1);
        break;
    case 'c':
    case 'C':
        child(letter == 'C');
        break;
    case 'g':
        grandchild();
        break;
    case 'z':
        zombie();
        break;
    case 't':
        ignore_polite_signals();
        break;
    case 'w':
        write_all(1, "line\n", 5);
        break;
    case 'W':
        much();
        break;
    case 'f':
        for (;;)
            much();
    case 'b':
        busy();
        break;
    case 's':
        raise(SIGSTOP);
        break;
    case 'k':
        raise(SIGKILL);
        break;
    case 'q':
        _exit(EXIT_TOLD);
    default:
        _exit(EXIT_FAILED);
    }
}

/* Puts a FIFO at a number of its own. */
static void open_at(int number, const char *path, int flags)
{
    int fd = open(path, flags);
    if (fd < 0)
        _exit(errno == ENXIO ? EXIT_NO_READER : EXIT_FAILED);
    if (dup2(fd, number) < 0 || close(fd) < 0)
        _exit(EXIT_FAILED);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 64;
    open_at(LIFELINE, argv[1], O_WRONLY | O_NONBLOCK);
    if (argc > 3)
        open_at(CONTROL, argv[3], O_RDONLY | O_NONBLOCK);
    for (const char *letter = argv[2]; *letter; letter++)
        perform(*letter);
    for (;;) {
        char letter;
        wait_for(argc > 3 ? CONTROL : -1);
        if (read(CONTROL, &letter, 1) == 1)
            perform(letter);
    }
}
