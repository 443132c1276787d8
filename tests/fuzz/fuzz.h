/* What the fuzz targets have in common.  Each of them has LLVMFuzzerTestOneInput(), which libFuzzer
 * calls with ever new inputs, and replay.c with given ones.  A property that does not hold ends the
 * program, as a sanitizer's report does. */
#ifndef PROCTREE_FUZZ_H
#define PROCTREE_FUZZ_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "warden.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);         \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* A copy that ends where the data does, so that reading on is noticed. */
static inline char *exact_copy(const void *data, size_t size)
{
    char *copy = malloc(size ? size : 1);
    REQUIRE(copy != NULL);
    memcpy(copy, data, size);
    return copy;
}

/* The input, from which values are taken; zeros when it has ended. */
struct input {
    const uint8_t *at;
    size_t left;
};

static inline uint64_t take(struct input *input, size_t bytes)
{
    uint64_t value = 0;
    const size_t size = bytes < input->left ? bytes : input->left;
    memcpy(&value, input->at, size);
    input->at += size;
    input->left -= size;
    return value;
}

/* A number as a text has it: blanks, a sign, digits.  Written once more, and in another way than
 * parse_number(), to be compared with it.  False when there is none. */
struct numeral {
    bool negative;
    bool huge; /* more than 64 bits */
    uint64_t value;
};

static inline bool read_numeral(const char **at, const char *end, struct numeral *out)
{
    const char *p = *at;
    unsigned __int128 value = 0;

    *out = (struct numeral){.negative = false};
    for (; p < end && *p == ' '; p++)
        continue;
    if (p < end && *p == '-') {
        out->negative = true;
        p++;
    }
    const char *digits = p;
    for (; p < end && *p >= '0' && *p <= '9'; p++)
        if ((value = value * 10 + (unsigned)(*p - '0')) > UINT64_MAX) {
            out->huge = true;
            value = UINT64_MAX;
        }
    out->value = (uint64_t)value;
    if (p == digits)
        return false;
    *at = p;
    return true;
}

#endif
