/* The small parsers: a number, a list of numbers with commas, and who traces a process. */
#define _GNU_SOURCE
#include "fuzz.h"

static unsigned long long value_of(struct numeral number)
{
    if (!number.negative)
        return number.value;
    return 0 - (number.value < 1ull << 63 ? number.value : 1ull << 63);
}

static void a_number(const char *text, size_t size)
{
    char *copy = exact_copy(text, size);
    const char *end = copy + size, *at = copy;
    unsigned long long value = 4711;
    struct numeral wanted;

    const char *next = parse_number(copy, end, &value);
    const bool there = read_numeral(&at, end, &wanted);
    REQUIRE(there ? next == at && value == value_of(wanted) : !next && value == 4711);
    free(copy);
}

/* Numbers with one comma between each two of them; it ends at what is none. */
static void a_list(const char *text)
{
    const char *list = text, *at = text, *end = text + strlen(text);
    unsigned long long value = 4711;
    struct numeral wanted;

    while ((list = parse_list(list, &value))) {
        REQUIRE(read_numeral(&at, end, &wanted) && value == value_of(wanted));
        at += *at == ',';
        REQUIRE(list == at);
    }
    REQUIRE(at == end || !read_numeral(&at, end, &wanted));
}

static void a_status(const char *text, size_t size)
{
    static const char key[] = "\nTracerPid:\t";
    char *copy = exact_copy(text, size);
    const pid_t tracer = parse_tracer(copy, size);
    const char *at = memmem(copy, size, key, sizeof key - 1);
    struct numeral wanted = {.value = 0};

    if (at) {
        at += sizeof key - 1;
        read_numeral(&at, copy + size, &wanted);
    }
    /* No process has a number beyond that, and what such a text means does not matter. */
    if (!wanted.huge && !wanted.negative && wanted.value <= INT32_MAX)
        REQUIRE(tracer == (pid_t)wanted.value);
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    memcpy(text, data, size);
    text[size] = '\0';
    a_number(text, size);
    a_list(text);
    a_status(text, size);
    free(text);
    return 0;
}
