/* The command line: any arguments at all, and those of a supervisor.
 *
 * As bytes: the arguments, each with its final NUL, as /proc/PID/cmdline shows them. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <limits.h>

#define ARGUMENTS_MAX 64
#define TEXT_MAX 65536

/* Where the arguments lie, in memory that ends with them. */
struct arguments {
    char *text;
    size_t size;
    char *argv[ARGUMENTS_MAX + 1];
};

static struct arguments split(const uint8_t *data, size_t size)
{
    struct arguments a = {.text = malloc(size + 1), .size = size + 1};
    memcpy(a.text, data, size);
    a.text[size] = '\0';
    size_t count = 0;
    for (char *at = a.text; at < a.text + size && count < ARGUMENTS_MAX; at += strlen(at) + 1)
        a.argv[count++] = at;
    return a;
}

/* A text that was given, or none. */
static void check_text(const struct arguments *a, const char *text)
{
    REQUIRE(!text || (text > a->text && text < a->text + a->size));
    REQUIRE(!text || strlen(text) < a->size);
}

static void check_accepted(const struct arguments *a, const struct options *o)
{
    REQUIRE(o->control > 2 && o->supervisor >= 0 && o->adopt >= 0);
    REQUIRE(o->proc >= -1 && o->init >= -1 && o->init_pid >= 0);
    REQUIRE(o->be_init || (o->supervisor > 0 && (o->adopt > 0 || o->argv[0])));
    REQUIRE(o->lock == -1 || o->lock > 2);
    REQUIRE(o->run == -1 || o->run > 2);
    REQUIRE(o->listen == -1 || o->listen > 2);
    REQUIRE(o->lease >= 0 && o->lease <= 0xffffffffl);
    REQUIRE(o->run > 2 || (o->lock < 0 && o->listen < 0 && !o->lease && !o->strict));
    check_text(a, o->cwd);
    check_text(a, o->pass);
    check_text(a, o->cgroup);
    check_text(a, o->entry);
    check_text(a, o->record);
    check_text(a, o->attributes.groups);
    check_text(a, o->attributes.affinity);
    for (size_t i = 0; i < LIMITS_MAX; i++)
        check_text(a, o->limits[i]);
    for (size_t i = 0; i < RLIMITS_MAX; i++)
        check_text(a, o->attributes.rlimits[i]);
    /* The command is the rest of the arguments, and nothing in it is an option. */
    char *const *at = a->argv + 1;
    while (*at && strcmp(*at, "--") != 0)
        at++;
    REQUIRE(o->argv == (*at ? at + 1 : at));
}

static void anything(const uint8_t *data, size_t size)
{
    struct arguments a = split(data, size);
    struct options first, second;

    memset(&first, 0xa5, sizeof first);
    const bool accepted = parse_arguments(&first, a.argv);
    if (accepted)
        check_accepted(&a, &first);
    /* What was in the memory before does not matter, and the arguments have not been changed. */
    memset(&second, 0x5a, sizeof second);
    REQUIRE(parse_arguments(&second, a.argv) == accepted);
    REQUIRE(first.control == second.control && first.argv == second.argv);
    REQUIRE(memcmp(a.text, data, size) == 0);
    free(a.text);
}

/* ---- What a supervisor writes, and the same by another way than a table ---- */

struct writer {
    char text[TEXT_MAX];
    size_t size;
};

static void add(struct writer *writer, const char *name, const char *value)
{
    const int room = (int)(sizeof writer->text - writer->size);
    const int got = snprintf(writer->text + writer->size, (size_t)room, "%s%s", name, value);
    REQUIRE(got >= 0 && got < room);
    writer->size += (size_t)got + 1;
}

static void add_number(struct writer *writer, const char *name, long value)
{
    char text[32];
    snprintf(text, sizeof text, "%ld", value);
    add(writer, name, text);
}

static int take_int(struct input *input, int least)
{
    const int value = (int)(take(input, 4) & INT_MAX);
    return value < least ? least : value;
}

static const char *take_text(struct input *input, char room[16])
{
    size_t size = take(input, 1) % 15;
    memset(room, 0, 16);
    for (size_t i = 0; i < size; i++) {
        room[i] = (char)take(input, 1);
        if (!room[i])
            room[i] = '=';
    }
    return room;
}

static bool same(const char *a, const char *b)
{
    return a && b && strcmp(a, b) == 0;
}

static void written(const uint8_t *data, size_t size)
{
    static struct writer writer;
    struct input input = {data, size};
    const uint32_t which = (uint32_t)take(&input, 4);
    char cwd[16], pass[16], groups[16], limits[LIMITS_MAX][16], rlimit[16], command[16];
    struct options o;
    const int control = take_int(&input, 3), supervisor = take_int(&input, 1);
    const int adopt = which & 1 ? take_int(&input, 1) : 0, init = take_int(&input, 0);
    const int run = take_int(&input, 3), listen = take_int(&input, 3);
    const long lease = (long)take(&input, 4);
    const long nice = (long)take(&input, 8), uid = (long)take(&input, 4);

    writer.size = 0;
    memset(writer.text, 0, 4096); /* more than is ever written here */
    add(&writer, "proctree-warden: ", take_text(&input, command));
    add_number(&writer, "control=", control);
    add_number(&writer, "supervisor=", supervisor);
    if (adopt)
        add_number(&writer, "adopt=", adopt);
    if (which & 2)
        add(&writer, "cwd=", take_text(&input, cwd));
    if (which & 4)
        add(&writer, "pass=", take_text(&input, pass));
    if (which & 8)
        add(&writer, "scan=", "1");
    if (which & 16)
        add_number(&writer, "init=", init);
    if (which & 32)
        add_number(&writer, "nice=", nice);
    if (which & 64)
        add_number(&writer, "uid=", uid);
    if (which & 128)
        add(&writer, "groups=", take_text(&input, groups));
    const bool durable = which & (1u << 31);
    if (durable) {
        add_number(&writer, "listen=", listen);
        add_number(&writer, "lease=", lease);
        add_number(&writer, "run=", run);
    }
    const size_t limit_count = (which >> 8) % (LIMITS_MAX + 1);
    for (size_t i = 0; i < limit_count; i++)
        add(&writer, "limit=", take_text(&input, limits[i]));
    const size_t rlimit_count = (which >> 16) % (RLIMITS_MAX + 2);
    take_text(&input, rlimit);
    for (size_t i = 0; i < rlimit_count; i++)
        add(&writer, "rlimit=", rlimit);
    add(&writer, "--", "");
    add(&writer, "", take_text(&input, command));

    anything((const uint8_t *)writer.text, writer.size);
    struct arguments a = split((const uint8_t *)writer.text, writer.size);
    const bool accepted = parse_arguments(&o, a.argv);
    REQUIRE(accepted == (rlimit_count <= RLIMITS_MAX));
    if (accepted) {
        REQUIRE(o.control == control && o.supervisor == supervisor && o.adopt == adopt);
        REQUIRE(which & 2 ? same(o.cwd, cwd) : !o.cwd);
        REQUIRE(which & 4 ? same(o.pass, pass) : !o.pass);
        REQUIRE(o.scan == !!(which & 8));
        REQUIRE(o.run == (durable ? run : -1) && o.listen == (durable ? listen : -1));
        REQUIRE(o.lease == (durable ? lease : 0));
        REQUIRE(o.init == (which & 16 ? init : -1));
        REQUIRE(o.attributes.set_nice == !!(which & 32) && o.attributes.nice == (which & 32 ? nice : 0));
        REQUIRE(o.attributes.set_uid == !!(which & 64) && o.attributes.uid == (which & 64 ? uid : 0));
        REQUIRE(which & 128 ? same(o.attributes.groups, groups) : !o.attributes.groups);
        for (size_t i = 0; i < LIMITS_MAX; i++)
            REQUIRE(i < limit_count ? same(o.limits[i], limits[i]) : !o.limits[i]);
        for (size_t i = 0; i < RLIMITS_MAX; i++)
            REQUIRE(i < rlimit_count ? same(o.attributes.rlimits[i], rlimit)
                                     : !o.attributes.rlimits[i]);
        REQUIRE(same(o.argv[0], command) && !o.argv[1]);
    }
    free(a.text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    anything(data, size);
    written(data, size);
    return 0;
}
