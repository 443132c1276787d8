/* The system calls that glibc 2.31 does not wrap yet, the clock, and small files. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

int sys_pidfd_open(pid_t pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

int sys_pidfd_send_signal(int fd, int signo)
{
    return (int)syscall(SYS_pidfd_send_signal, fd, signo, NULL, 0);
}

static int64_t clock_ms(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int64_t now_ms(void)
{
    return clock_ms(CLOCK_MONOTONIC);
}

/* With the time that the machine was suspended. */
int64_t boot_ms(void)
{
    return clock_ms(CLOCK_BOOTTIME);
}

struct failure failed(int step)
{
    return (struct failure){.error = errno, .step = step};
}

/* One write(2), as the files of /proc and of cgroups want it.  Returns 0 or errno. */
int write_text(int directory, const char *path, const char *text)
{
    int fd = openat(directory, path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int error = write(fd, text, strlen(text)) < 0 ? errno : 0;
    close(fd);
    return error;
}

/* One read(2): what fits.  Returns the size, or -1 with errno. */
ssize_t read_text(int directory, const char *path, char *text, size_t size)
{
    int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t got = read(fd, text, size);
    int error = errno;
    close(fd);
    errno = error;
    return got;
}
