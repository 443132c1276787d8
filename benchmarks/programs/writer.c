/* writer BLOCKS [LINE]: writes BLOCKS times 64 KiB to standard output, as fast as it is read.
 * With LINE the bytes are lines of LINE bytes each, newline included. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK 65536

int main(int argc, char **argv)
{
    const long blocks = argc > 1 ? atol(argv[1]) : 0;
    const long line = argc > 2 ? atol(argv[2]) : 0;
    /* A whole number of lines, so that the same bytes can be written again and again. */
    const size_t period = line ? (size_t)line * BLOCK : BLOCK;
    char *bytes = malloc(period);

    if (!bytes)
        return 2;
    memset(bytes, 'x', period);
    for (size_t at = (size_t)line; line && at <= period; at += (size_t)line)
        bytes[at - 1] = '\n';
    for (long block = 0; block < blocks; block++) {
        const char *from = bytes + (size_t)block * BLOCK % period;
        for (size_t done = 0; done < BLOCK;) {
            ssize_t written = write(1, from + done, BLOCK - done);
            if (written < 0)
                return 3;
            done += (size_t)written;
        }
    }
    return 0;
}
