/* What a supervisor may say: every byte of the header and every length, the limits of each field. */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>

#include "check.h"
#include "warden.h"

/* In memory that ends where the message does: reading on is noticed. */
static bool valid(const void *message, size_t size)
{
    void *copy = malloc(size ? size : 1);
    CHECK(copy != NULL);
    memcpy(copy, message, size);
    const bool result = request_valid(copy, size);
    free(copy);
    return result;
}

static size_t size_of(int type)
{
    switch (type) {
    case MESSAGE_START:
        return 12 + 8 * 12;
    case MESSAGE_SIGNAL:
        return 8 + 12;
    case MESSAGE_LIST:
    case MESSAGE_FREEZE:
    case MESSAGE_THAW:
    case MESSAGE_RELEASE:
    case MESSAGE_DETACH:
    case MESSAGE_ATTACH:
    case MESSAGE_CANCEL:
        return 8;
    case MESSAGE_KEEP:
        return 8 + 8;
    case MESSAGE_NOTE:
        return 8 + 4 + 236;
    default:
        return 0;
    }
}

static void fill(union request *request, int version, int type)
{
    memset(request, 0, sizeof *request);
    request->header.version = (uint8_t)version;
    request->header.type = (uint8_t)type;
    request->header.serial = 4711;
    if (type == MESSAGE_START) {
        request->start.stage_count = 1;
        request->start.stages[0] = (struct message_stage){.signo = SIGTERM, .scope = SCOPE_TREE};
    } else if (type != MESSAGE_NOTE) {
        request->signal.stage = (struct message_stage){.signo = SIGTERM, .scope = SCOPE_TREE};
    }
}

static void every_version_type_and_size(void)
{
    union request requests[2];
    for (int version = 0; version < 256; version++)
        for (int type = 0; type < 256; type++) {
            fill(&requests[0], version, type);
            requests[1] = requests[0];
            for (size_t size = 0; size <= sizeof requests[0] + 8; size++) {
                const bool known = version == PROTOCOL_VERSION && size_of(type);
                if (!known && size != 8 && version > 2)
                    continue; /* nothing new in 256 versions */
                CHECK(valid(requests, size) == (known && size == size_of(type)));
            }
        }
}

static const struct message_stage good_stages[] = {
    {.signo = 0, .scope = SCOPE_MAIN},
    {.signo = 1, .scope = SCOPE_GROUP},
    {.signo = SIGKILL, .scope = SCOPE_TREE, .flags = STAGE_RESUME, .grace_ms = 0xffffffff},
    {.signo = 64, .scope = SCOPE_TREE, .flags = STAGE_FOREGROUND},
};

static const struct message_stage bad_stages[] = {
    {.signo = -1, .scope = SCOPE_TREE},
    {.signo = 65, .scope = SCOPE_TREE},
    {.signo = 0x7fffffff, .scope = SCOPE_TREE},
    {.signo = -0x7fffffff - 1, .scope = SCOPE_TREE},
    {.signo = 256 + SIGTERM, .scope = SCOPE_TREE},
    {.signo = SIGTERM, .scope = 0},
    {.signo = SIGTERM, .scope = 4},
    {.signo = SIGTERM, .scope = 0xffff},
    {.signo = SIGTERM, .scope = 0x0103},
};

#define COUNT(array) (sizeof array / sizeof array[0])

static void stages_of_signal(void)
{
    union request request;
    fill(&request, PROTOCOL_VERSION, MESSAGE_SIGNAL);
    for (size_t i = 0; i < COUNT(good_stages); i++) {
        request.signal.stage = good_stages[i];
        CHECK(valid(&request, sizeof request.signal));
    }
    for (size_t i = 0; i < COUNT(bad_stages); i++) {
        request.signal.stage = bad_stages[i];
        CHECK(!valid(&request, sizeof request.signal));
    }
}

/* Only what the count covers is part of the plan. */
static void stages_of_start(void)
{
    union request request;
    static const uint32_t counts[] = {0, 1, 2, 7, 8, 9, 255, 256 + 1, 0x80000001, 0xffffffff};

    for (size_t c = 0; c < COUNT(counts); c++)
        for (uint32_t where = 0; where < PROTOCOL_STAGES_MAX; where++) {
            fill(&request, PROTOCOL_VERSION, MESSAGE_START);
            request.start.stage_count = counts[c];
            for (size_t i = 0; i < PROTOCOL_STAGES_MAX; i++)
                request.start.stages[i] = good_stages[i % COUNT(good_stages)];
            const bool fits = counts[c] >= 1 && counts[c] <= PROTOCOL_STAGES_MAX;
            CHECK(valid(&request, sizeof request.start) == fits);
            for (size_t i = 0; i < COUNT(bad_stages); i++) {
                request.start.stages[where] = bad_stages[i];
                CHECK(valid(&request, sizeof request.start) == (fits && where >= counts[c]));
            }
        }
}

static void lengths_of_note(void)
{
    static const uint32_t lengths[] = {0, 1, 235, 236, 237, 256, 0x80000000, 0xffffffff};
    union request request;
    fill(&request, PROTOCOL_VERSION, MESSAGE_NOTE);
    for (size_t i = 0; i < COUNT(lengths); i++) {
        request.note.length = lengths[i];
        CHECK(valid(&request, sizeof request.note) == (lengths[i] <= 236));
    }
}

int main(void)
{
    every_version_type_and_size();
    stages_of_signal();
    stages_of_start();
    lengths_of_note();
    printf("%u\n", checks);
    return 0;
}
