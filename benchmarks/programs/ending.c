/* ending FILE MILLISECONDS [SLOT]: sleeps, notes the time in FILE and exits.
 *
 * The time is CLOCK_MONOTONIC in nanoseconds, 8 bytes, the SLOT-th such number of FILE (default: 0,
 * the first). FILE is mapped before, so that between reading the clock and exiting there is one
 * store to memory. */
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
    const size_t slot = argc > 3 ? (size_t)atol(argv[3]) : 0;
    int fd = open(argv[1], O_RDWR);
    int64_t *moments = mmap(NULL, (slot + 1) * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (moments == MAP_FAILED)
        return 3;
    volatile int64_t *moment = &moments[slot];
    *moment = 0; /* touched: the store below must not wait for a page */
    nanosleep(&delay, NULL);
    clock_gettime(CLOCK_MONOTONIC, &now);
    *moment = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    _exit(0);
}
