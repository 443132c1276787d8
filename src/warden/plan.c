/* Why the warden ends the tree by itself, and how: the orphan plan, which came with START.
 *
 * Without a durable run there is one reason, that the supervisor is gone, and the plan is the last
 * thing that the warden does.  A durable tree lives on without a supervisor, so there are more, and
 * its exit record says which of them it was. */
#define _GNU_SOURCE
#include "warden.h"

/* How long a supervisor may take to act on a signal that asked the warden to end, before the
 * warden ends the tree by itself: a stopped supervisor must not keep it alive. */
#define ASKED_PATIENCE_MS 1000

bool durable(const struct warden *w)
{
    return w->options.run > 2;
}

/* Whoever comes first counts, and a main process that has ended was ended by nobody.  It may be
 * dead and not reaped yet: then its SIGCHLD has just not been read. */
static void cause_is(struct warden *w, enum cause cause)
{
    if (durable(w) && w->cause == CAUSE_ITSELF && !w->main_reaped &&
        child_of_ours(w->main) == OURS_ALIVE)
        w->cause = cause;
}

/* Every stage has had its grace and something is still there. */
static enum verdict plan_ended(struct warden *w)
{
    /* It cannot be ended by us.  There is nobody to report it to, and waiting on would help nobody. */
    if (!durable(w))
        return GIVEN_UP;
    /* Here it would: the lock says that something of this run is still there. */
    w->plan_due = 0;
    if (!w->killing) {
        struct sent sent = {0, 0};
        kill_tree(w, &sent, 0);
    }
    return GO_ON;
}

enum verdict plan_step(struct warden *w)
{
    if (w->plan_next >= w->plan_count)
        return plan_ended(w);
    const struct message_stage *stage = &w->plan[w->plan_next++];
    send_signal(w, stage, 0);
    w->plan_due = now_ms() + stage->grace_ms;
    return GO_ON;
}

enum verdict plan_begin(struct warden *w, enum cause cause)
{
    if (w->plan_running)
        return GO_ON;
    cause_is(w, cause);
    w->plan_running = true;
    w->ending = 1 + (uint32_t)cause;
    w->asked_due = w->lease_due = 0;
    return plan_step(w);
}

/* Of a durable tree, what its main process has left is its owner's business, as it is any
 * supervisor's; here there is none. */
enum verdict plan_leftovers(struct warden *w)
{
    if (durable(w) && w->options.end_leftovers && w->main_reported && w->control < 0)
        return plan_begin(w, CAUSE_ITSELF);
    return GO_ON;
}

/* Somebody asks the warden to end the tree: the supervisor decides how, as for any other kill.  If it
 * does not act, or the same is asked again, or there is none, the warden does. */
enum verdict ask_owner(struct warden *w, enum cause cause, struct message_asked message)
{
    if (w->plan_running)
        return GO_ON;
    if (w->asked_due)
        return plan_begin(w, w->asked_cause);
    if (durable(w) && w->control < 0)
        return plan_begin(w, cause);
    w->asked_cause = cause;
    header_init(&message.header, MESSAGE_ASKED, 0);
    channel_send(w, &message, sizeof message);
    w->asked_due = now_ms() + ASKED_PATIENCE_MS;
    return GO_ON;
}

/* Any request says that the supervisor is awake and knows what to do.  The owner of a durable tree
 * may be asked by people that it does not know, while it is busy with something else: there, only
 * what ends the tree is an answer. */
void owner_acts(struct warden *w, const union request *request)
{
    const bool ends =
        request->header.type == MESSAGE_SIGNAL && (request->signal.stage.flags & STAGE_ENDING);
    if (ends)
        cause_is(w, w->asked_due ? w->asked_cause : CAUSE_OWNER);
    w->owner_ends |= ends;
    if (ends || !durable(w))
        w->asked_due = 0;
}
