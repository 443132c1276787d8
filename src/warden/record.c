/* The exit record of a durable tree: how it ended, for whoever asks later.  recording.py reads it.
 *
 * It is written when the tree is proved empty, into a file whose blocks were there before the tree
 * began: a tree that fills its disk up does not lose its own result. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <unistd.h>

/* ---- Its text: pure ---- */

/* CRC-32 as zlib has it (ISO 3309), bit by bit: it is computed once, and a table would cost every
 * warden a kilobyte. */
uint32_t crc32_of(const char *text, size_t size)
{
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < size; i++) {
        crc ^= (unsigned char)text[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xedb88320 : crc >> 1;
    }
    return ~crc;
}

static char *put_hex(char *at, uint32_t value, unsigned digits)
{
    while (digits-- > 0)
        *at++ = "0123456789abcdef"[value >> (4 * digits) & 15];
    *at = '\0';
    return at;
}

static char *put_field(char *at, const char *name, uint64_t value)
{
    at = put_text(put_text(at, name), " ");
    return put_text(put_number(at, value > LONG_MAX ? LONG_MAX : (long)value), "\n");
}

static char *put_note(char *at, const struct message_note *note)
{
    at = put_text(at, "note ");
    for (uint32_t i = 0; i < note->length; i++)
        at = put_hex(at, (unsigned char)note->text[i], 2);
    return put_text(at, "\n");
}

size_t record_format(char out[RECORD_MAX], const struct record *record)
{
    const struct message_empty *empty = record->empty;
    static const struct message_note nothing;
    char *at = put_text(out, "proctree exit 1\n");

    if (record->status < 0)
        at = put_text(at, "status -1\n");
    else
        at = put_field(at, "status", (uint64_t)record->status);
    at = put_field(at, "cause", record->cause);
    at = put_field(at, "error", (uint64_t)record->failure.error);
    at = put_field(at, "step", (uint64_t)record->failure.step);
    at = put_field(at, "pid", (uint64_t)record->pid);
    at = put_field(at, "duration_ms", (uint64_t)record->duration_ms);
    at = put_field(at, "user_us", empty->usage.user_us);
    at = put_field(at, "system_us", empty->usage.system_us);
    at = put_field(at, "max_rss", empty->usage.max_rss);
    at = put_field(at, "memory_peak", empty->memory_peak);
    at = put_field(at, "pids_peak", empty->pids_peak);
    at = put_field(at, "oom_kills", empty->oom_kills);
    at = put_note(at, record->cause == CAUSE_OWNER ? record->note : &nothing);
    const uint32_t crc = crc32_of(out, (size_t)(at - out));
    at = put_text(put_hex(put_text(at, "crc32 "), crc, 8), "\n");
    return (size_t)(at - out);
}

/* ---- Its file ---- */

static int closing(int fd, int error)
{
    close(fd);
    return error;
}

/* What there is of the run must not be less durable than the news that it has ended. */
static int sync_file(int run, const char *name)
{
    int fd = openat(run, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? 0 : errno;
    return closing(fd, fdatasync(fd) < 0 ? errno : 0);
}

/* The directory, and those above it up to the one that all keys share: nobody has synced them when
 * the attempt began, since a machine that crashes takes the tree along (directory.py).  `run` may be
 * O_PATH, on which fsync(2) fails. */
static int sync_directories(int run)
{
    static const char *const paths[] = {".", "..", "../..", "../../.."};
    int error = 0;
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        int fd = openat(run, paths[i], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        int failed = fd < 0 ? errno : closing(fd, fsync(fd) < 0 ? errno : 0);
        error = error ? error : failed;
    }
    return error;
}

static int write_whole(int fd, const char *text, size_t size)
{
    size_t done = 0;
    while (done < size) {
        ssize_t now = pwrite(fd, text + done, size - done, (off_t)done);
        if (now <= 0 && errno != EINTR)
            return now < 0 ? errno : ENOSPC;
        done += now > 0 ? (size_t)now : 0;
    }
    return 0;
}

/* Cut to its length first: so from the last byte that is written on it is complete, and counts even
 * if we should be killed before it has its name.  What was allocated for it stays. */
static int write_record(int run, const char *text, size_t size)
{
    int fd = openat(run, "exit~", O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    int error = ftruncate(fd, (off_t)size) < 0 ? errno : write_whole(fd, text, size);
    if (!error && fsync(fd) < 0)
        error = errno;
    closing(fd, 0);
    if (!error && renameat(run, "exit~", run, "exit") < 0)
        error = errno;
    return error ? error : sync_directories(run);
}

static void tell_trouble(struct warden *w, int error)
{
    const struct failure failure = {.error = error, .step = STEP_RECORD};
    const struct message_failure message = failure_message(MESSAGE_FAULT, failure);
    if (error)
        tell_everybody(w, &message, sizeof message);
}

static void write_down(struct warden *w, const struct record *record)
{
    static char text[RECORD_MAX];
    const int run = w->options.run;
    const size_t size = record_format(text, record);
    /* Whatever becomes of the output, how the tree ended is known. */
    tell_trouble(w, sync_file(run, "out.log"));
    tell_trouble(w, sync_file(run, "err.log"));
    tell_trouble(w, sync_file(run, "request"));
    tell_trouble(w, write_record(run, text, size));
    unlinkat(run, "control", 0); /* nobody will listen there any more */
}

void record_end(struct warden *w, const struct message_empty *empty)
{
    const struct record record = {
        .status = w->main_status,
        .cause = w->cause,
        .pid = w->main,
        .duration_ms = boot_ms() - w->started_ms,
        .empty = empty,
        .note = &w->note,
    };
    write_down(w, &record);
}

void record_failure(struct warden *w, struct failure failure)
{
    static const struct message_empty nothing;
    const struct record record = {
        .status = -1, .cause = CAUSE_NOT_STARTED, .failure = failure, .empty = &nothing};
    write_down(w, &record);
}
