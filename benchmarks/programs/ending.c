/* ending FILE MILLISECONDS: sleeps, notes the time in FILE and exits.
 *
 * The time is CLOCK_MONOTONIC in nanoseconds, 8 bytes; FILE is mapped before, so that between
 * reading the clock and exiting there is one store to memory. */
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec now;

    if (argc < 3)
        return 2;
    const struct timespec delay = {.tv_nsec = atol(argv[2]) * 1000000};
    int fd = open(argv[1], O_RDWR);
    volatile int64_t *moment = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (moment == MAP_FAILED)
        return 3;
    *moment = 0; /* touched: the store below must not wait for a page */
    nanosleep(&delay, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    *moment = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    _exit(0);
}
