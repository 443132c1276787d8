/* What a supervisor may say: checked as a whole before any of it is believed.  Pure. */
#define _GNU_SOURCE
#include "warden.h"

#include <signal.h>

static size_t expected_size(uint8_t type)
{
    switch (type) {
    case MESSAGE_START:
        return sizeof(struct message_start);
    case MESSAGE_SIGNAL:
        return sizeof(struct message_signal);
    case MESSAGE_LIST:
    case MESSAGE_FREEZE:
    case MESSAGE_THAW:
    case MESSAGE_RELEASE:
    case MESSAGE_DETACH:
    case MESSAGE_ATTACH:
    case MESSAGE_CANCEL:
        return sizeof(struct message_header);
    case MESSAGE_KEEP:
        return sizeof(struct message_keep);
    case MESSAGE_NOTE:
        return sizeof(struct message_note);
    default:
        return 0;
    }
}

static bool valid_stage(const struct message_stage *stage)
{
    return stage->signo >= 0 && stage->signo < _NSIG && stage->scope >= SCOPE_MAIN &&
           stage->scope <= SCOPE_TREE;
}

static bool valid_plan(const struct message_start *start)
{
    if (start->stage_count == 0 || start->stage_count > PROTOCOL_STAGES_MAX)
        return false;
    for (uint32_t i = 0; i < start->stage_count; i++)
        if (!valid_stage(&start->stages[i]))
            return false;
    return true;
}

bool request_valid(const union request *request, size_t size)
{
    if (size < sizeof request->header || request->header.version != PROTOCOL_VERSION ||
        size != expected_size(request->header.type))
        return false;
    switch (request->header.type) {
    case MESSAGE_START:
        return valid_plan(&request->start);
    case MESSAGE_SIGNAL:
        return valid_stage(&request->signal.stage);
    case MESSAGE_NOTE:
        return request->note.length <= PROTOCOL_NOTE_MAX;
    default:
        return true;
    }
}
