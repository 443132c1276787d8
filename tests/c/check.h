/* What the test programs in C have in common.  Each of them runs twice, with the sanitizers and under
 * valgrind, and links its own functions in front of some of the libc's (ld(1), --wrap). */
#ifndef PROCTREE_CHECK_H
#define PROCTREE_CHECK_H

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned checks;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        checks++;                                                                                  \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s: does not hold: %s\n", __FILE__, __LINE__, __func__,        \
                    #condition);                                                                   \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* Without the one that counts them. */
static inline unsigned open_descriptors(void)
{
    unsigned count = 0;
    DIR *directory = opendir("/proc/self/fd");
    CHECK(directory != NULL);
    while (readdir(directory))
        count++;
    closedir(directory);
    return count - 3; /* . and .. and the directory itself */
}

#endif
