/* sessions COUNT [CGROUP_PROCS]: a main process and COUNT children, each in a session of its own.
 *
 * Says "ready" when all of them are there, and then all wait for the end of standard input, so that
 * nothing is left of them when whoever started them is gone.  With CGROUP_PROCS, the path of a
 * cgroup.procs file, everything is put into that cgroup first. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void wait_for_end_of_input(void)
{
    char byte;
    while (read(0, &byte, 1) > 0)
        continue;
}

static int enter_cgroup(const char *path)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int entered = fd >= 0 && write(fd, "0", 1) == 1;
    if (fd >= 0)
        close(fd);
    return entered;
}

int main(int argc, char **argv)
{
    const int count = argc > 1 ? atoi(argv[1]) : 0;
    int ready[2];
    char byte = 0;

    if (argc > 2 && !enter_cgroup(argv[2]))
        return 2;
    if (pipe(ready) < 0)
        return 3;
    for (int i = 0; i < count; i++) {
        pid_t pid = fork();
        if (pid < 0)
            return 4;
        if (pid == 0) {
            if (setsid() < 0 || write(ready[1], &byte, 1) != 1)
                _exit(5);
            close(ready[0]);
            close(ready[1]);
            wait_for_end_of_input();
            _exit(0);
        }
    }
    close(ready[1]);
    for (int i = 0; i < count; i++)
        if (read(ready[0], &byte, 1) != 1)
            return 6;
    if (write(1, "ready\n", 6) != 6)
        return 7;
    wait_for_end_of_input();
    return 0;
}
