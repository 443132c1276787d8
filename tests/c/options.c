/* The command line of the warden, and the lists in it. */
#define _GNU_SOURCE
#include <limits.h>
#include <string.h>

#include "check.h"
#include "warden.h"

#define ARGUMENTS_MAX 48

/* Copies of the texts, since options point into them and some are written to. */
static char *arguments[ARGUMENTS_MAX + 1];

static bool parse(struct options *options, const char *const *texts)
{
    for (size_t i = 0; i < ARGUMENTS_MAX; i++) {
        free(arguments[i]);
        arguments[i] = NULL;
    }
    for (size_t i = 0; texts[i]; i++) {
        CHECK(i < ARGUMENTS_MAX);
        arguments[i] = strdup(texts[i]);
    }
    memset(options, 0xa5, sizeof *options);
    return parse_arguments(options, arguments);
}

#define PARSE(...) parse(&options, (const char *const[]){"w", __VA_ARGS__, NULL})
#define COMMAND "control=3", "supervisor=1"

static struct options options;

static void the_least(void)
{
    const struct attributes none = {.umask = 0};

    CHECK(PARSE(COMMAND, "--", "true"));
    CHECK(options.control == 3 && options.supervisor == 1);
    CHECK(options.argv == arguments + 4 && strcmp(options.argv[0], "true") == 0);
    CHECK(options.init == -1 && options.init_pid == 0 && options.adopt == 0);
    CHECK(!options.scan && !options.pid_namespace && !options.be_init);
    CHECK(!options.keep_session && !options.terminal && !options.spare && options.watch == -1);
    CHECK(!options.cwd && !options.pass && !options.cgroup && !options.entry && !options.record);
    CHECK(options.lock == -1 && options.run == -1 && options.listen == -1);
    CHECK(options.lease == 0 && !options.strict && !options.end_leftovers);
    for (size_t i = 0; i < LIMITS_MAX; i++)
        CHECK(!options.limits[i]);
    CHECK(memcmp(&options.attributes, &none, sizeof none) == 0);

    CHECK(PARSE(COMMAND, "adopt=7") && options.adopt == 7 && !options.argv[0]);
    CHECK(PARSE("control=3", "beinit=1") && options.be_init);
}

static void everything(void)
{
    CHECK(PARSE(COMMAND, "adopt=5", "scan=1", "cwd=/a=b", "pass=3,4", "cgroup=/c", "limit=a,1",
                "limit=b,2", "limit=c,3", "limit=d,4", "pidns=1", "init=9", "initpid=77", "entry=/e",
                "record=r\nr", "spare=1", "watch=8", "keepsession=1", "terminal=1", "umask=18", "nice=-5", "ionice=16388",
                "oom=-1000", "uid=4294967294", "gid=0", "groups=", "affinity=0,2", "rlimit=7,1,2",
                "nonewprivs=1", "lock=11", "run=12", "listen=13", "lease=60000", "until=5000000000",
                "endleftovers=1", "--", "a", "--", "b=c"));
    CHECK(options.lock == 11 && options.run == 12 && options.listen == 13);
    CHECK(options.lease == 60000 && options.strict && options.until == 5000000000 && options.end_leftovers);
    CHECK(options.adopt == 5 && options.scan && options.pid_namespace);
    CHECK(strcmp(options.cwd, "/a=b") == 0 && strcmp(options.pass, "3,4") == 0);
    CHECK(strcmp(options.cgroup, "/c") == 0);
    CHECK(strcmp(options.limits[0], "a,1") == 0 && strcmp(options.limits[3], "d,4") == 0);
    CHECK(options.init == 9 && options.init_pid == 77);
    CHECK(strcmp(options.entry, "/e") == 0 && strcmp(options.record, "r\nr") == 0);
    CHECK(options.keep_session && options.terminal && options.spare && options.watch == 8);
    const struct attributes *a = &options.attributes;
    CHECK(a->set_umask && a->umask == 18 && a->set_nice && a->nice == -5);
    CHECK(a->set_ionice && a->ionice == 16388 && a->set_oom_score_adj && a->oom_score_adj == -1000);
    CHECK(a->set_uid && a->uid == 4294967294 && a->set_gid && a->gid == 0);
    CHECK(a->groups && *a->groups == '\0' && strcmp(a->affinity, "0,2") == 0);
    CHECK(strcmp(a->rlimits[0], "7,1,2") == 0 && !a->rlimits[1] && a->no_new_privs);
    CHECK(strcmp(options.argv[0], "a") == 0 && strcmp(options.argv[1], "--") == 0);
    CHECK(strcmp(options.argv[2], "b=c") == 0 && !options.argv[3]);
}

static void what_is_missing(void)
{
    CHECK(!parse(&options, (const char *const[]){NULL}));
    CHECK(!parse(&options, (const char *const[]){"w", NULL}));
    CHECK(!PARSE("--", "true"));
    CHECK(!PARSE("control=3", "--", "true"));
    CHECK(!PARSE("supervisor=1", "--", "true"));
    CHECK(!PARSE(COMMAND));
    CHECK(!PARSE(COMMAND, "--"));
    CHECK(!PARSE("beinit=1"));
}

static void what_is_not_understood(void)
{
    static const char *const wrong[] = {
        "",           "control",     "=",          "=3",          "Control=3",   "controls=3",
        "contro=3",   "true",        "-",          "unknown=1",   "control=",    "control=x",
        "control=3x", "control=3 ",  "adopt=1,2",  "scan=",       "scan=0",      "scan=11",
        "scan=yes",   "terminal=2",  "pidns=0",    "umask=",      "umask=0x12",  "nice=--1",
        "nice=1-",    "nonewprivs=", "beinit=off", "oom=1000.5",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        CHECK(!PARSE(COMMAND, wrong[i], "--", "true"));
        CHECK(!PARSE(wrong[i], COMMAND, "--", "true"));
    }
}

/* A number that does not fit is not some other number. */
static void numbers_out_of_range(void)
{
    static const char *const wrong[] = {
        "control=4294967299",  "control=-1",          "control=2147483648",
        "supervisor=-1",       "supervisor=0",        "supervisor=4294967297",
        "adopt=4294967297",    "initpid=99999999999", "control=18446744073709551619",
        "control=0",           "control=2",           "nice=9223372036854775808",
        "uid=18446744073709551616",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK(!PARSE(COMMAND, wrong[i], "--", "true"));
    CHECK(PARSE(COMMAND, "control=2147483647", "supervisor=4194304", "--", "true"));
    CHECK(options.control == INT_MAX && options.supervisor == 4194304);
    CHECK(PARSE(COMMAND, "nice=9223372036854775807", "oom=-9223372036854775808", "--", "true"));
    CHECK(options.attributes.nice == LONG_MAX && options.attributes.oom_score_adj == LONG_MIN);
    CHECK(PARSE(COMMAND, "nice=-0", "--", "true") && options.attributes.nice == 0);
}

/* What belongs to a durable run, without one or with descriptors that cannot be meant. */
static void durable_runs(void)
{
    static const char *const alone[] = {"lock=4", "listen=4", "lease=1", "until=1",
                                        "endleftovers=1"};
    static const char *const wrong[] = {
        "run=0",    "run=2",           "run=-1",   "lock=0",   "lock=2",     "listen=1",
        "lease=-1", "lease=4294967296", "until=-1", "lease=1s", "endleftovers=",
    };
    for (size_t i = 0; i < sizeof alone / sizeof alone[0]; i++) {
        CHECK(!PARSE(COMMAND, alone[i], "--", "true"));
        CHECK(PARSE(COMMAND, alone[i], "run=3", "--", "true"));
    }
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK(!PARSE(COMMAND, "run=3", wrong[i], "--", "true"));
    CHECK(PARSE(COMMAND, "run=3", "--", "true") && options.run == 3 && options.listen == -1);
    CHECK(PARSE(COMMAND, "run=3", "lease=4294967295", "--", "true"));
    CHECK(options.lease == 4294967295);
}

static void more_than_there_is_room_for(void)
{
    CHECK(PARSE(COMMAND, "limit=1", "limit=2", "limit=3", "limit=4", "--", "true"));
    CHECK(!PARSE(COMMAND, "limit=1", "limit=2", "limit=3", "limit=4", "limit=5", "--", "true"));
    const char *texts[RLIMITS_MAX + 7] = {"w", COMMAND};
    for (size_t i = 0; i <= RLIMITS_MAX; i++)
        texts[3 + i] = i < RLIMITS_MAX ? "rlimit=1,2,3" : "--";
    texts[4 + RLIMITS_MAX] = "true";
    CHECK(parse(&options, texts));
    CHECK(options.attributes.rlimits[RLIMITS_MAX - 1]);
    texts[3 + RLIMITS_MAX] = "rlimit=1,2,3";
    texts[4 + RLIMITS_MAX] = "--";
    texts[5 + RLIMITS_MAX] = "true";
    CHECK(!parse(&options, texts));
}

static bool list_is(const char *list, size_t count, const unsigned long long *wanted)
{
    unsigned long long number = 0;
    size_t at = 0;
    for (; (list = parse_list(list, &number)); at++)
        if (at >= count || number != wanted[at])
            return false;
    return at == count;
}

#define LIST_IS(list, ...)                                                                         \
    list_is(list, sizeof((unsigned long long[]){__VA_ARGS__}) / sizeof(unsigned long long),        \
            (unsigned long long[]){__VA_ARGS__})

static void lists(void)
{
    CHECK(list_is(NULL, 0, NULL));
    CHECK(list_is("", 0, NULL));
    CHECK(list_is(",", 0, NULL));
    CHECK(list_is("x", 0, NULL));
    CHECK(LIST_IS("0", 0));
    CHECK(LIST_IS("1,22,333", 1, 22, 333));
    CHECK(LIST_IS("1,", 1));
    CHECK(LIST_IS("1,,2", 1));
    CHECK(LIST_IS("1;2", 1));
    CHECK(LIST_IS("5,18446744073709551615,18446744073709551616", 5, ULLONG_MAX, ULLONG_MAX));
}

int main(void)
{
    the_least();
    everything();
    what_is_missing();
    what_is_not_understood();
    numbers_out_of_range();
    durable_runs();
    more_than_there_is_room_for();
    lists();
    CHECK(!parse(&options, (const char *const[]){NULL})); /* gives the copies back */
    printf("%u\n", checks);
    return 0;
}
