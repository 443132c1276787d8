/* parse_stat(): any bytes at all, and what a kernel could have written. */
#define _GNU_SOURCE
#include "fuzz.h"

static bool same_but_pending(const struct process *a, const struct process *b)
{
    return a->pid == b->pid && a->ppid == b->ppid && a->pgrp == b->pgrp &&
           a->session == b->session && a->state == b->state && a->flags == b->flags &&
           a->threads == b->threads && a->start_time == b->start_time &&
           memcmp(a->comm, b->comm, sizeof a->comm) == 0;
}

static bool parse(const char *text, size_t size, struct process *out)
{
    char *copy = exact_copy(text, size);
    memset(out, 0xa5, sizeof *out);
    const bool result = parse_stat(copy, size, out);
    free(copy);
    return result;
}

/* Nothing behind the fields that are read changes them, and a text that has been cut off is either
 * refused or gives the same, but for the last number, which may be the one that was cut. */
static void check_prefixes(const char *text, size_t size, const struct process *whole, size_t cut)
{
    struct process part;
    const char *close = memrchr(text, ')', size);
    const size_t head = (size_t)(close - text) + 1;

    cut = head + cut % (size - head + 1);
    if (parse(text, cut, &part))
        REQUIRE(same_but_pending(&part, whole));

    char *more = malloc(size + 5);
    memcpy(more, text, size);
    memcpy(more + size, " 1 -\n", 5);
    REQUIRE(parse(more, size + 5, &part));
    REQUIRE(same_but_pending(&part, whole) && part.pending == whole->pending);
    free(more);
}

static void check_result(const struct process *process)
{
    REQUIRE(memchr(process->comm, '\0', sizeof process->comm));
    REQUIRE(!process_dead(process) || process_dying(process));
}

static void anything(const uint8_t *data, size_t size)
{
    struct process process;
    if (!parse((const char *)data, size, &process))
        return;
    check_result(&process);
    check_prefixes((const char *)data, size, &process, size ? data[0] * 7 : 0);
}

static void written(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct process wanted = {
        .pid = (pid_t)take(&input, 3),
        .ppid = (pid_t)take(&input, 3),
        .pgrp = (pid_t)take(&input, 4),
        .session = (pid_t)take(&input, 4),
        .flags = (uint32_t)take(&input, 4),
        .pending = take(&input, 8),
        .threads = (long)take(&input, 3),
        .start_time = take(&input, 8),
        .state = "RSDTtZXxI"[take(&input, 1) % 9],
    };
    const size_t cut = take(&input, 2);
    char comm[65] = "", text[2048];
    /* TASK_COMM_LEN is 16; names of kernel threads may be longer in /proc. */
    const size_t length = input.left < 64 ? input.left : 64;
    for (size_t i = 0; i < length; i++)
        comm[i] = input.at[i] ? (char)input.at[i] : 'x';
    memcpy(wanted.comm, comm, sizeof wanted.comm - 1);

    const int got = snprintf(
        text, sizeof text,
        "%d (%s) %c %d %d %d 34816 -1 %lu %llu 0 18446744073709551615 0 1 2 3 4 20 -20 %ld 0 %llu "
        "9223372036854775807 -1 18446744073709551615 1 1 0 0 0 %lu 0 0 0 0 0 0 17 1 0 0 0 0 0\n",
        wanted.pid, comm, wanted.state, wanted.ppid, wanted.pgrp, wanted.session, wanted.flags,
        wanted.start_time, wanted.threads, wanted.start_time, wanted.pending);
    struct process process;
    REQUIRE(parse(text, (size_t)got, &process));
    REQUIRE(same_but_pending(&process, &wanted) && process.pending == wanted.pending);
    check_result(&process);
    check_prefixes(text, (size_t)got, &process, cut);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    anything(data, size);
    written(data, size);
    return 0;
}
