/* The command line of the warden: NAME=VALUE, then "--", then the command.  It is written by
 * containment/warden.py and by nobody else, so what is not understood is an error.  Pure. */
#define _GNU_SOURCE
#include "warden.h"

#include <limits.h>
#include <string.h>

enum kind { NUMBER, LONG, FLAG, TEXT, TEXTS };

/* Where a value goes in struct options; `set` is the bool that says it was there, or 0. */
struct option {
    const char *name;
    enum kind kind;
    size_t at;
    size_t set;
    size_t room; /* of TEXTS */
};

#define AT(field) offsetof(struct options, field)
#define OWN(field) offsetof(struct options, attributes.field)

static const struct option known[] = {
    {"control", NUMBER, AT(control), 0, 0},
    {"supervisor", NUMBER, AT(supervisor), 0, 0},
    {"watch", NUMBER, AT(watch), 0, 0},
    {"adopt", NUMBER, AT(adopt), 0, 0},
    {"gate", NUMBER, AT(gate), 0, 0},
    {"report", NUMBER, AT(report), 0, 0},
    {"proc", NUMBER, AT(proc), 0, 0},
    {"scan", FLAG, AT(scan), 0, 0},
    {"cwd", TEXT, AT(cwd), 0, 0},
    {"pass", TEXT, AT(pass), 0, 0},
    {"cgroup", TEXT, AT(cgroup), 0, 0},
    {"limit", TEXTS, AT(limits), 0, LIMITS_MAX},
    {"pidns", FLAG, AT(pid_namespace), 0, 0},
    {"init", NUMBER, AT(init), 0, 0},
    {"initpid", NUMBER, AT(init_pid), 0, 0},
    {"beinit", FLAG, AT(be_init), 0, 0},
    {"entry", TEXT, AT(entry), 0, 0},
    {"record", TEXT, AT(record), 0, 0},
    {"spare", FLAG, AT(spare), 0, 0},
    {"keepsession", FLAG, AT(keep_session), 0, 0},
    {"terminal", FLAG, AT(terminal), 0, 0},
    {"lock", NUMBER, AT(lock), 0, 0},
    {"run", NUMBER, AT(run), 0, 0},
    {"listen", NUMBER, AT(listen), 0, 0},
    {"lease", LONG, AT(lease), 0, 0},
    {"until", LONG, AT(until), AT(strict), 0},
    {"endleftovers", FLAG, AT(end_leftovers), 0, 0},
    {"umask", LONG, OWN(umask), OWN(set_umask), 0},
    {"nice", LONG, OWN(nice), OWN(set_nice), 0},
    {"ionice", LONG, OWN(ionice), OWN(set_ionice), 0},
    {"oom", LONG, OWN(oom_score_adj), OWN(set_oom_score_adj), 0},
    {"uid", LONG, OWN(uid), OWN(set_uid), 0},
    {"gid", LONG, OWN(gid), OWN(set_gid), 0},
    {"groups", TEXT, OWN(groups), 0, 0},
    {"affinity", TEXT, OWN(affinity), 0, 0},
    {"rlimit", TEXTS, OWN(rlimits), 0, RLIMITS_MAX},
    {"nonewprivs", FLAG, OWN(no_new_privs), 0, 0},
};

static const struct option *find_option(const char *argument, size_t length)
{
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strlen(known[i].name) == length && memcmp(known[i].name, argument, length) == 0)
            return &known[i];
    return NULL;
}

static bool add_text(char **texts, size_t room, char *value)
{
    for (size_t i = 0; i < room; i++) {
        if (!texts[i]) {
            texts[i] = value;
            return true;
        }
    }
    return false;
}

static bool store_number(char *to, enum kind kind, const char *value)
{
    unsigned long long number;
    const char *end = value + strlen(value);
    if (parse_number(value, end, &number) != end)
        return false;
    if (kind == LONG) {
        *(long *)(void *)to = (long)number;
        return (*value == '-') == ((long)number < 0) || number == 0;
    }
    *(int *)(void *)to = (int)number;
    return number <= INT_MAX;
}

static bool take_option(struct options *options, char *argument)
{
    char *value = strchr(argument, '=');
    const struct option *option = value ? find_option(argument, (size_t)(value - argument)) : NULL;
    if (!option)
        return false;
    value++;
    char *to = (char *)options + option->at;
    if (option->set)
        *((bool *)options + option->set) = true;
    switch (option->kind) {
    case FLAG:
        *(bool *)to = true;
        return strcmp(value, "1") == 0;
    case TEXT:
        *(char **)(void *)to = value;
        return true;
    case TEXTS:
        return add_text((char **)(void *)to, option->room, value);
    default:
        return store_number(to, option->kind, value);
    }
}

/* One that is inherited, and not one of the standard streams; or none. */
static bool inherited(int fd)
{
    return fd == -1 || fd > 2;
}

static bool valid_durable(const struct options *options)
{
    if (options->run < 0 && (options->lock >= 0 || options->listen >= 0 || options->lease ||
                             options->strict || options->end_leftovers))
        return false;
    return inherited(options->lock) && inherited(options->run) && inherited(options->listen) &&
           options->lease >= 0 && (unsigned long)options->lease <= UINT32_MAX &&
           options->until >= 0;
}

bool parse_arguments(struct options *options, char **argv)
{
    *options = (struct options){.control = -1,
                                .watch = -1,
                                .gate = -1,
                                .report = -1,
                                .init = -1,
                                .proc = -1,
                                .lock = -1,
                                .run = -1,
                                .listen = -1};
    char **at = argv[0] ? argv + 1 : argv;
    for (; *at && strcmp(*at, "--") != 0; at++)
        if (!take_option(options, *at))
            return false;
    options->argv = *at ? at + 1 : at;
    if (options->control <= 2 || !valid_durable(options))
        return false;
    if (options->be_init)
        return true;
    return options->supervisor > 0 && (options->adopt > 0 || options->argv[0]);
}

/* The next number of a list with commas.  Returns where to go on, NULL at its end; what is no
 * number ends it too, with *out untouched: lists come from the same hand as the options. */
const char *parse_list(const char *at, unsigned long long *out)
{
    if (!at || !*at)
        return NULL;
    const char *next = parse_number(at, at + strlen(at), out);
    return next && *next == ',' ? next + 1 : next;
}
