/* request_valid(): what it accepts can be acted upon, and what a supervisor may say is accepted. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <signal.h>

static bool stage_good(const struct message_stage *stage)
{
    return stage->signo >= 0 && stage->signo <= 64 && stage->scope >= 1 && stage->scope <= 3;
}

static size_t size_of(uint8_t type)
{
    static const size_t sizes[] = {
        [MESSAGE_START] = sizeof(struct message_start),
        [MESSAGE_SIGNAL] = sizeof(struct message_signal),
        [MESSAGE_LIST] = sizeof(struct message_header),
        [MESSAGE_FREEZE] = sizeof(struct message_header),
        [MESSAGE_THAW] = sizeof(struct message_header),
        [MESSAGE_RELEASE] = sizeof(struct message_header),
        [MESSAGE_KEEP] = sizeof(struct message_keep),
        [MESSAGE_DETACH] = sizeof(struct message_header),
        [MESSAGE_ATTACH] = sizeof(struct message_header),
        [MESSAGE_CANCEL] = sizeof(struct message_header),
        [MESSAGE_NOTE] = sizeof(struct message_note),
    };
    return type < sizeof sizes / sizeof sizes[0] ? sizes[type] : 0;
}

static bool good(const union request *request, size_t size)
{
    if (size < sizeof request->header || request->header.version != 1 || !size_of(request->header.type))
        return false;
    if (size != size_of(request->header.type))
        return false;
    if (request->header.type == MESSAGE_SIGNAL)
        return stage_good(&request->signal.stage);
    if (request->header.type == MESSAGE_NOTE)
        return request->note.length <= 236;
    if (request->header.type != MESSAGE_START)
        return true;
    bool result = request->start.stage_count >= 1 && request->start.stage_count <= 8;
    for (uint32_t i = 0; result && i < request->start.stage_count; i++)
        result = stage_good(&request->start.stages[i]);
    return result;
}

static void anything(const uint8_t *data, size_t size)
{
    char *copy = exact_copy(data, size);
    const union request *request = (const union request *)(void *)copy;
    REQUIRE(request_valid(request, size) == good(request, size));
    REQUIRE(size == 0 || memcmp(copy, data, size) == 0);
    free(copy);
}

static struct message_stage take_stage(struct input *input)
{
    return (struct message_stage){
        .signo = (int32_t)(take(input, 1) % 65),
        .scope = (uint16_t)(1 + take(input, 1) % 3),
        .flags = (uint16_t)take(input, 1),
        .grace_ms = (uint32_t)take(input, 4),
    };
}

/* One that is good, and then the same with one bit of it changed. */
static void written(const uint8_t *data, size_t size)
{
    static const uint8_t types[] = {MESSAGE_START, MESSAGE_SIGNAL, MESSAGE_LIST,
                                    MESSAGE_FREEZE, MESSAGE_THAW,   MESSAGE_RELEASE,
                                    MESSAGE_KEEP,   MESSAGE_DETACH, MESSAGE_ATTACH,
                                    MESSAGE_CANCEL, MESSAGE_NOTE};
    struct input input = {data, size};
    union request request;

    memset(&request, 0, sizeof request);
    request.header.version = 1;
    request.header.type = types[take(&input, 1) % sizeof types];
    request.header.flags = (uint16_t)take(&input, 2);
    request.header.serial = (uint32_t)take(&input, 4);
    const size_t bit = take(&input, 2);
    if (request.header.type == MESSAGE_SIGNAL)
        request.signal.stage = take_stage(&input);
    if (request.header.type == MESSAGE_START) {
        request.start.stage_count = 1 + (uint32_t)take(&input, 1) % PROTOCOL_STAGES_MAX;
        for (uint32_t i = 0; i < request.start.stage_count; i++)
            request.start.stages[i] = take_stage(&input);
    }
    if (request.header.type == MESSAGE_KEEP)
        request.keep.lease_ms = take(&input, 8);
    if (request.header.type == MESSAGE_NOTE)
        request.note.length = (uint32_t)take(&input, 1) % (PROTOCOL_NOTE_MAX + 1);
    const size_t whole = size_of(request.header.type);
    REQUIRE(good(&request, whole));
    anything((const uint8_t *)&request, whole);
    anything((const uint8_t *)&request, whole - 1);
    ((uint8_t *)&request)[bit / 8 % whole] ^= (uint8_t)(1u << bit % 8);
    anything((const uint8_t *)&request, whole);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    anything(data, size);
    written(data, size);
    return 0;
}
