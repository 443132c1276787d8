/* Reading /proc: see proc(5). */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* include/linux/sched.h; shown in field 9 of /proc/PID/stat. */
#define KERNEL_PF_EXITING 0x00000004ul
#define KERNEL_PF_SIGNALED 0x00000400ul

/* Positions of the fields behind the command name, counted from 0. */
enum {
    FIELD_STATE = 0,
    FIELD_PPID = 1,
    FIELD_PGRP = 2,
    FIELD_SESSION = 3,
    FIELD_FLAGS = 6,
    FIELD_THREADS = 17,
    FIELD_START_TIME = 19,
    FIELD_PENDING = 28
};

char *put_text(char *at, const char *text)
{
    const size_t length = strlen(text);
    memcpy(at, text, length + 1);
    return at + length;
}

char *put_number(char *at, long number)
{
    char digits[24];
    size_t count = 0;
    do
        digits[count++] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    while (count > 0)
        *at++ = digits[--count];
    *at = '\0';
    return at;
}

/* What is too large becomes the largest number that there is, and never some small one. */
#define SMALLEST (1ull << 63)

static unsigned long long add_digit(unsigned long long value, unsigned digit)
{
    return value > (ULLONG_MAX - digit) / 10 ? ULLONG_MAX : value * 10 + digit;
}

const char *parse_number(const char *at, const char *end, unsigned long long *out)
{
    while (at < end && *at == ' ')
        at++;
    bool negative = at < end && *at == '-';
    if (negative)
        at++;
    if (at >= end || *at < '0' || *at > '9')
        return NULL;
    unsigned long long value = 0;
    for (; at < end && *at >= '0' && *at <= '9'; at++)
        value = add_digit(value, (unsigned)(*at - '0'));
    *out = !negative ? value : 0 - (value < SMALLEST ? value : SMALLEST);
    return at;
}

static bool store_field(struct process *out, int field, unsigned long long value)
{
    switch (field) {
    case FIELD_PPID:
        out->ppid = (pid_t)value;
        break;
    case FIELD_PGRP:
        out->pgrp = (pid_t)value;
        break;
    case FIELD_SESSION:
        out->session = (pid_t)value;
        break;
    case FIELD_FLAGS:
        out->flags = (unsigned long)value;
        break;
    case FIELD_THREADS:
        out->threads = (long)value;
        break;
    case FIELD_START_TIME:
        out->start_time = value;
        break;
    case FIELD_PENDING:
        out->pending = (unsigned long)value;
        return true;
    default:
        break;
    }
    return false;
}

/* The command name is whatever the process chose: blanks, brackets, newlines.  It ends at the
 * *last* closing bracket, since nothing behind it contains one. */
bool parse_stat(const char *text, size_t length, struct process *out)
{
    const char *end = text + length;
    const char *open = memchr(text, '(', length);
    const char *close = memrchr(text, ')', length);
    unsigned long long value;

    memset(out, 0, sizeof *out);
    if (!open || !close || close < open || close + 3 > end || close[1] != ' ')
        return false;
    if (!parse_number(text, open, &value))
        return false;
    out->pid = (pid_t)value;
    size_t name = (size_t)(close - open - 1);
    memcpy(out->comm, open + 1, name < sizeof out->comm ? name : sizeof out->comm - 1);

    out->state = close[2];
    const char *at = close + 3;
    for (int field = FIELD_PPID; at; field++) {
        at = parse_number(at, end, &value);
        if (at && store_field(out, field, value))
            return true;
    }
    return false;
}

/* Numbers separated by blanks.  A number at the very end may go on in the next piece, so it only
 * counts when this piece is the `last`.  `*used` says how many bytes were understood. */
size_t parse_children(const char *text, size_t length, bool last, pid_t *out, size_t capacity,
                      size_t *used)
{
    const char *at = text, *end = text + length;
    size_t count = 0;

    while (count < capacity) {
        unsigned long long value;
        const char *next = parse_number(at, end, &value);
        if (!next || (next == end && !last))
            break;
        at = next;
        if (value > 0 && value <= PIDS_MAX)
            out[count++] = (pid_t)value;
    }
    while (at < end && *at == ' ')
        at++;
    *used = (size_t)(at - text);
    return count;
}

/* Returns 0, or the errno that says why not: ENOENT and ESRCH mean that the process is gone. */
int process_read(int proc, pid_t pid, struct process *out)
{
    char path[32], text[1024];
    put_text(put_number(path, pid), "/stat");
    ssize_t got = read_text(proc, path, text, sizeof text);
    if (got < 0)
        return errno;
    if (got == 0)
        return ESRCH;
    return parse_stat(text, (size_t)got, out) && out->pid == pid ? 0 : EBADMSG;
}

/* A thread group whose leader has ended still runs while other threads do, and its stat shows the
 * leader: Z. */
bool process_dead(const struct process *process)
{
    if (process->state == 'X' || process->state == 'x')
        return true;
    return process->state == 'Z' && process->threads <= 1;
}

/* True when the process can no longer run a single instruction of its own, and so can no longer
 * fork: it is dead, in exit(2), or has a SIGKILL pending.  complete_signal() in kernel/signal.c
 * puts SIGKILL into the *thread's* pending set, which field 31 shows, and a fork that is under way
 * sees it and gives up (copy_process() returns ERESTARTNOINTR while a signal is pending). */
bool process_dying(const struct process *process)
{
    if (process_dead(process))
        return true;
    if (process->state == 'Z')
        return false;
    return (process->flags & (KERNEL_PF_EXITING | KERNEL_PF_SIGNALED)) ||
           (process->pending & (1ul << (SIGKILL - 1)));
}

/* "TracerPid:\t4711\n" somewhere in /proc/PID/status; 0 when nobody traces it. */
pid_t parse_tracer(const char *text, size_t length)
{
    static const char key[] = "\nTracerPid:\t";
    const char *end = text + length;
    const size_t size = sizeof key - 1;
    for (const char *at = text; (at = memchr(at, '\n', (size_t)(end - at))); at++) {
        unsigned long long value;
        if ((size_t)(end - at) > size && memcmp(at, key, size) == 0)
            return parse_number(at + size, end, &value) ? (pid_t)value : 0;
    }
    return 0;
}

pid_t process_tracer(int proc, pid_t pid)
{
    char path[32], text[4096];
    put_text(put_number(path, pid), "/status");
    ssize_t got = read_text(proc, path, text, sizeof text);
    return got < 0 ? 0 : parse_tracer(text, (size_t)got);
}

/* Directories: /proc, /proc/PID/task, /proc/self/fd, cgroups. */
int listing_open(struct listing *listing, int directory, const char *path)
{
    listing->at = listing->size = 0;
    listing->fd = openat(directory, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return listing->fd < 0 ? errno : 0;
}

/* Returns the next entry, or NULL at the end; closes the directory there. */
const struct entry *listing_next(struct listing *listing)
{
    if (listing->at >= listing->size) {
        long got = syscall(SYS_getdents64, listing->fd, listing->text, sizeof listing->text);
        if (got <= 0) {
            listing_close(listing);
            return NULL;
        }
        listing->at = 0;
        listing->size = (size_t)got;
    }
    const struct entry *entry = (const void *)((char *)listing->text + listing->at);
    listing->at += entry->size;
    return entry;
}

/* The next name that is a number, or -1 at the end. */
long listing_next_number(struct listing *listing)
{
    const struct entry *entry;
    while ((entry = listing_next(listing))) {
        unsigned long long value;
        const char *end = entry->name + strlen(entry->name);
        const bool digits = entry->name[0] >= '0' && entry->name[0] <= '9';
        if (digits && parse_number(entry->name, end, &value) == end && value <= LONG_MAX)
            return (long)value;
    }
    return -1;
}

void listing_close(struct listing *listing)
{
    close(listing->fd);
}
