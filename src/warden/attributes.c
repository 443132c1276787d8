/* What the main process is given between fork and exec.  Runs in the child of spawn_main(), which
 * shares our memory: nothing here may allocate, and the calls that change credentials are the bare
 * system calls, since those of a libc concern every thread of a process. */
#define _GNU_SOURCE
#include "warden.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define IOPRIO_WHO_PROCESS_NUMBER 1 /* ioprio_set(2): no header of a libc has it */
#define CPUS_MAX 8192               /* NR_CPUS of the largest configurations */
#define GROUPS_MAX 1024

/* 32-bit machines have the calls with 16-bit ids under the plain names (setuid(2), NOTES). */
#ifdef SYS_setresuid32
#define SETRESUID SYS_setresuid32
#define SETRESGID SYS_setresgid32
#define SETGROUPS SYS_setgroups32
#else
#define SETRESUID SYS_setresuid
#define SETRESGID SYS_setresgid
#define SETGROUPS SYS_setgroups
#endif

static const struct failure none = {0, 0};

static int set_affinity(const char *list)
{
    unsigned long mask[CPUS_MAX / (8 * sizeof(unsigned long))] = {0};
    const size_t bits = 8 * sizeof mask[0];
    unsigned long long cpu;

    for (const char *at = list; (at = parse_list(at, &cpu));) {
        if (cpu >= CPUS_MAX) {
            errno = EINVAL;
            return -1;
        }
        mask[cpu / bits] |= 1ul << (cpu % bits);
    }
    return (int)syscall(SYS_sched_setaffinity, 0, sizeof mask, mask);
}

/* RESOURCE,SOFT,HARD; RLIM_INFINITY is the largest number, which the kernel's 64-bit call takes as
 * such (prlimit(2)). */
static int set_rlimit(const char *text)
{
    unsigned long long resource = 0;
    struct {
        unsigned long long soft, hard;
    } limit = {0, 0};
    const char *at = parse_list(text, &resource);
    at = parse_list(at, &limit.soft);
    if (!parse_list(at, &limit.hard)) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_prlimit64, 0, (int)resource, &limit, NULL);
}

static int set_oom_score_adj(int proc, long value)
{
    char text[24], *at = text;
    if (value < 0)
        *at++ = '-';
    put_number(at, value < 0 ? -value : value);
    int error = write_text(proc, "self/oom_score_adj", text);
    errno = error;
    return error ? -1 : 0;
}

/* Everything that asks for privileges comes before credentials_apply() gives them up. */
struct failure attributes_apply(int proc, const struct attributes *a)
{
    if (a->set_oom_score_adj && set_oom_score_adj(proc, a->oom_score_adj) < 0)
        return failed(STEP_OOM_SCORE_ADJ);
    if (a->set_nice && syscall(SYS_setpriority, PRIO_PROCESS, 0, (int)a->nice) < 0)
        return failed(STEP_NICE);
    if (a->set_ionice &&
        syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS_NUMBER, 0, (int)a->ionice) < 0)
        return failed(STEP_IONICE);
    if (a->affinity && set_affinity(a->affinity) < 0)
        return failed(STEP_AFFINITY);
    for (int i = 0; i < RLIMITS_MAX && a->rlimits[i]; i++)
        if (set_rlimit(a->rlimits[i]) < 0)
            return failed(STEP_RLIMITS);
    if (a->set_umask)
        umask((mode_t)a->umask);
    return none;
}

static int set_groups(const char *list)
{
    unsigned groups[GROUPS_MAX];
    size_t count = 0;
    unsigned long long group;
    for (const char *at = list; (at = parse_list(at, &group));) {
        if (count == GROUPS_MAX || group > UINT_MAX) {
            errno = EINVAL;
            return -1;
        }
        groups[count++] = (unsigned)group;
    }
    return (int)syscall(SETGROUPS, count, groups);
}

/* In the order that setresuid(2) leaves possible: the groups first, the user last. */
struct failure credentials_apply(const struct attributes *a)
{
    if (a->groups && set_groups(a->groups) < 0)
        return failed(STEP_GROUPS);
    if (a->set_gid && syscall(SETRESGID, a->gid, a->gid, a->gid) < 0)
        return failed(STEP_GID);
    if (a->set_uid && syscall(SETRESUID, a->uid, a->uid, a->uid) < 0)
        return failed(STEP_UID);
    if (a->no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return failed(STEP_NO_NEW_PRIVS);
    return none;
}
