/* Lists of children, through the loop of tree.c that reads them: whatever the sizes of the pieces in
 * which read(2) brings them, and wherever it fails, the candidates are those of a parser that has the
 * whole text at once.
 *
 * An input begins with a byte that says where reading fails (0: nowhere), and a byte with the number
 * of the piece sizes that follow; the rest is the text. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static struct {
    const uint8_t *sizes;
    size_t size_count;
    size_t reads, fails_at;
    const char *text;
    size_t size, at;
    bool open;
} fed;

static int feed_open(int directory, const char *path, int flags)
{
    (void)directory;
    REQUIRE(strcmp(path, "4711/task/4712/children") == 0);
    REQUIRE(flags & O_CLOEXEC);
    fed.open = true;
    return 1000;
}

static int feed_close(int fd)
{
    REQUIRE(fd == 1000 && fed.open);
    fed.open = false;
    return 0;
}

static ssize_t feed_read(int fd, void *to, size_t room)
{
    REQUIRE(fd == 1000 && fed.open);
    if (++fed.reads == fed.fails_at) {
        errno = ESRCH;
        return -1;
    }
    size_t size = fed.size_count ? 1u + fed.sizes[fed.reads % fed.size_count] : fed.size;
    if (size > room)
        size = room;
    if (size > fed.size - fed.at)
        size = fed.size - fed.at;
    memcpy(to, fed.text + fed.at, size);
    fed.at += size;
    return (ssize_t)size;
}

#define openat feed_open
#define read feed_read
#define close feed_close
#include "tree.c"

/* Every number once, but for those that no process can have, up to what is no number at all. */
static size_t reference(const char *text, size_t size, pid_t *out)
{
    static bool known[PIDS_MAX];
    const char *at = text, *end = text + size;
    struct numeral number;
    size_t count = 0;

    while (read_numeral(&at, end, &number)) {
        if (number.negative || number.huge || number.value == 0 || number.value >= PIDS_MAX)
            continue;
        if (!known[number.value])
            out[count++] = (pid_t)number.value;
        known[number.value] = true;
    }
    for (size_t i = 0; i < count; i++)
        known[out[i]] = false;
    return count;
}

/* A number that fills the whole buffer is not read to its end: no kernel writes such a one. */
#define LONGEST 1000

static bool has_long_number(const char *text, size_t size)
{
    size_t length = 0, longest = 0;
    for (size_t i = 0; i < size; i++) {
        length = text[i] >= '0' && text[i] <= '9' ? length + 1 : 0;
        longest = length > longest ? length : longest;
    }
    return longest > LONGEST;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct warden warden;
    struct input input = {data, size};

    if (!warden.pids)
        REQUIRE(tree_prepare(&warden) == 0);
    memset(&fed, 0, sizeof fed);
    fed.fails_at = take(&input, 1);
    fed.size_count = take(&input, 1) % (input.left + 1);
    fed.sizes = input.at;
    fed.text = (const char *)input.at + fed.size_count;
    fed.size = input.left - fed.size_count;

    REQUIRE(add_children(&warden, 4711, 4712) == 0);
    REQUIRE(!fed.open);
    pid_t *wanted = calloc(fed.size + 1, sizeof *wanted);
    const size_t count = reference(fed.text, fed.size, wanted);
    /* One that was not read to its end gives no more than its beginning, and no half number. */
    const bool failed = fed.fails_at && fed.reads >= fed.fails_at;
    if (!has_long_number(fed.text, fed.size)) {
        REQUIRE(failed ? warden.pid_count <= count : warden.pid_count == count);
        REQUIRE(memcmp(warden.pids, wanted, warden.pid_count * sizeof *wanted) == 0);
    }
    free(wanted);
    tree_forget(&warden);
    return 0;
}
