/* Our entry in the registry of running trees: a file that says which tree this is, under a lock that
 * the kernel drops when we end, however we end.  So an entry without its lock is one whose warden is
 * dead, and that is not a guess.  registry.py reads them. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

static int append(int fd, const char *text)
{
    const size_t length = strlen(text);
    ssize_t done = write(fd, text, length);
    return done == (ssize_t)length ? 0 : done < 0 ? errno : ENOSPC;
}

static char *put_process(char *at, const char *what, pid_t pid, unsigned long long start_time)
{
    at = put_number(put_text(at, what), pid);
    at = put_number(put_text(at, " "), (long)start_time);
    return put_text(at, "\n");
}

/* Made under another name, so that nobody sees it before it is locked and complete. */
int registry_enter(struct warden *w)
{
    char temporary[PATH_MAX], line[64];
    struct process self;
    int error;

    if (!w->options.entry || !w->options.record)
        return 0;
    if (strlen(w->options.entry) + 2 > sizeof temporary)
        return ENAMETOOLONG;
    put_text(put_text(temporary, w->options.entry), "~");
    w->entry = lift(open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (w->entry < 0)
        return errno;
    if ((error = process_read(w->proc, w->self, &self)) == 0) {
        put_process(line, "warden ", w->self, self.start_time);
        if (flock(w->entry, LOCK_EX | LOCK_NB) < 0)
            error = errno;
        else if ((error = append(w->entry, w->options.record)) == 0)
            error = append(w->entry, line);
    }
    if (!error && renameat(AT_FDCWD, temporary, AT_FDCWD, w->options.entry) < 0)
        error = errno;
    if (error) {
        unlinkat(AT_FDCWD, temporary, 0);
        close(w->entry);
        w->entry = -1;
    }
    return error;
}

void registry_started(const struct warden *w, unsigned long long start_time)
{
    char line[64];
    put_process(line, "main ", w->main, start_time);
    if (w->entry >= 0)
        append(w->entry, line); /* without it, the tree is known by its other marks */
}

void registry_leave(struct warden *w)
{
    if (w->entry < 0)
        return;
    unlinkat(AT_FDCWD, w->options.entry, 0);
    close(w->entry);
    w->entry = -1;
}
