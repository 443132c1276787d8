/* What the main process is given: what can be had is there afterwards, what cannot is an error that
 * names its step.  Each in a child of its own. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "check.h"
#include "processes.h"
#include "warden.h"

static int proc;

typedef struct failure (*apply_function)(const struct attributes *attributes);

static struct failure apply(const struct attributes *attributes)
{
    return attributes_apply(proc, attributes);
}

/* What came of it, out of a child that `good` has looked into. */
static struct failure outcome(apply_function function, const struct attributes *attributes,
                              bool (*good)(void))
{
    struct failure failure = {-1, -1};
    int ends[2], status;
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    const pid_t pid = fork_child();
    if (pid == 0) {
        /* Whatever failed before is not what failed here. */
        errno = 0;
        failure = function(attributes);
        if (write(ends[1], &failure, sizeof failure) != (ssize_t)sizeof failure)
            _exit(1);
        _exit(!failure.error && good ? !good() : 0);
    }
    close(ends[1]);
    CHECK(read(ends[0], &failure, sizeof failure) == (ssize_t)sizeof failure);
    close(ends[0]);
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(status == 0);
    return failure;
}

static bool works(const struct attributes attributes, bool (*good)(void))
{
    const struct failure failure = outcome(apply, &attributes, good);
    return failure.error == 0 && failure.step == 0;
}

static bool fails(const struct attributes attributes, int error, int step)
{
    const struct failure failure = outcome(apply, &attributes, NULL);
    return failure.error == error && failure.step == step;
}

static bool has_umask(void)
{
    return umask(0) == 027;
}

static bool has_limits(void)
{
    struct rlimit core, time;
    getrlimit(RLIMIT_CORE, &core);
    getrlimit(RLIMIT_CPU, &time);
    return core.rlim_cur == 0 && core.rlim_max == 4096 && time.rlim_cur == 1000;
}

static bool has_unlimited_core(void)
{
    struct rlimit core;
    getrlimit(RLIMIT_CORE, &core);
    return core.rlim_cur == 0 && core.rlim_max == RLIM_INFINITY;
}

static bool runs_on_one_processor(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) == 1;
}

static bool is_nice(void)
{
    return getpriority(PRIO_PROCESS, 0) == 19;
}

static bool score_is(const char *wanted)
{
    char text[16] = "";
    const int fd = open("/proc/self/oom_score_adj", O_RDONLY | O_CLOEXEC);
    return read(fd, text, sizeof text - 1) > 0 && strcmp(text, wanted) == 0;
}

static bool has_high_score(void)
{
    return score_is("1000\n");
}

static bool has_low_score(void)
{
    return score_is("-500\n");
}

static void what_can_be_had(void)
{
    char list[16];
    cpu_set_t set;
    int first = 0;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
    while (!CPU_ISSET(first, &set))
        first++;
    snprintf(list, sizeof list, "%d", first);

    CHECK(works((struct attributes){.umask = 0}, NULL));
    CHECK(works((struct attributes){.set_umask = true, .umask = 027}, has_umask));
    CHECK(works((struct attributes){.rlimits = {"4,0,4096", "0,1000,2000"}}, has_limits));
    struct rlimit core;
    getrlimit(RLIMIT_CORE, &core);
    if (core.rlim_max == RLIM_INFINITY)
        CHECK(works((struct attributes){.rlimits = {"4,0,18446744073709551615"}},
                    has_unlimited_core));
    CHECK(works((struct attributes){.affinity = list}, runs_on_one_processor));
    CHECK(works((struct attributes){.set_nice = true, .nice = 19}, is_nice));
    const struct attributes high = {.set_oom_score_adj = true, .oom_score_adj = 1000},
                            low = {.set_oom_score_adj = true, .oom_score_adj = -500};
    CHECK(works(high, has_high_score));
    CHECK(works(low, has_low_score) || fails(low, EACCES, STEP_OOM_SCORE_ADJ));
}

static void what_cannot(void)
{
    CHECK(fails((struct attributes){.affinity = ""}, EINVAL, STEP_AFFINITY));
    CHECK(fails((struct attributes){.affinity = "8191"}, EINVAL, STEP_AFFINITY));
    CHECK(fails((struct attributes){.affinity = "8192"}, EINVAL, STEP_AFFINITY));
    CHECK(fails((struct attributes){.affinity = "99999999999999999999"}, EINVAL, STEP_AFFINITY));
    CHECK(fails((struct attributes){.rlimits = {"7,1"}}, EINVAL, STEP_RLIMITS));
    CHECK(fails((struct attributes){.rlimits = {""}}, EINVAL, STEP_RLIMITS));
    CHECK(fails((struct attributes){.rlimits = {"7,2,1"}}, EINVAL, STEP_RLIMITS));
    CHECK(fails((struct attributes){.rlimits = {"999,1,1"}}, EINVAL, STEP_RLIMITS));
    CHECK(fails((struct attributes){.set_oom_score_adj = true, .oom_score_adj = 1001}, EINVAL,
                STEP_OOM_SCORE_ADJ));
    CHECK(fails((struct attributes){.set_oom_score_adj = true, .oom_score_adj = -1001}, EINVAL,
                STEP_OOM_SCORE_ADJ));
    CHECK(fails((struct attributes){.set_ionice = true, .ionice = -1}, EINVAL, STEP_IONICE));
}

static char *many_groups(size_t count)
{
    char *list = calloc(count, 2);
    for (size_t i = 0; i < count; i++)
        memcpy(list + 2 * i, i + 1 < count ? "7," : "7", 2);
    return list;
}

/* A list that is cut short, or a number that is, would give rights that nobody asked for. */
static void groups(void)
{
    char *fit = many_groups(1024), *too_many = many_groups(1025);
    const struct attributes all = {.groups = fit}, more = {.groups = too_many},
                            large = {.groups = "4294967296"};
    const struct failure three[] = {
        outcome(credentials_apply, &all, NULL),
        outcome(credentials_apply, &more, NULL),
        outcome(credentials_apply, &large, NULL),
    };
    CHECK(three[0].error == (geteuid() == 0 ? 0 : EPERM));
    CHECK(three[1].error == EINVAL && three[1].step == STEP_GROUPS);
    CHECK(three[2].error == EINVAL && three[2].step == STEP_GROUPS);
    free(fit);
    free(too_many);
}

int main(void)
{
    proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    CHECK(proc >= 0);
    what_can_be_had();
    what_cannot();
    groups();
    printf("%u\n", checks);
    return 0;
}
