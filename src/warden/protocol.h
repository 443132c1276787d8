/* The language between a supervisor and its warden.
 *
 * One SOCK_SEQPACKET message is one of the structs below, in host byte order: both ends are on
 * one machine and were built together.  src/proctree/protocol.py is the same language in Python,
 * and tests/test_protocol.py compiles this header and holds the two against each other. */
#ifndef PROCTREE_PROTOCOL_H
#define PROCTREE_PROTOCOL_H

#include <stdint.h>

#define PROTOCOL_VERSION 1
#define PROTOCOL_STAGES_MAX 8
#define PROTOCOL_MEMBERS_MAX 64 /* members in one MEMBERS message */
#define PROTOCOL_COMM_SIZE 16   /* TASK_COMM_LEN, proc(5) */
#define PROTOCOL_NOTE_MAX 236   /* bytes */

/* Supervisor to warden: 1 to 63.  Warden to supervisor: 64 and up. */
enum message_type {
    MESSAGE_START = 1,
    MESSAGE_SIGNAL = 2,
    MESSAGE_LIST = 3,
    MESSAGE_FREEZE = 4,
    MESSAGE_THAW = 5,
    MESSAGE_RELEASE = 6,
    /* To a durable warden only. */
    MESSAGE_KEEP = 7,
    MESSAGE_DETACH = 8,
    MESSAGE_ATTACH = 9,
    MESSAGE_CANCEL = 10,
    MESSAGE_NOTE = 11,

    MESSAGE_STARTED = 64,
    MESSAGE_EXEC_FAILED = 65,
    MESSAGE_EXITED = 66,
    MESSAGE_MEMBERS = 67,
    MESSAGE_SIGNALLED = 68,
    MESSAGE_DENIED = 69,
    MESSAGE_ASKED = 70,
    MESSAGE_EMPTY = 71,
    MESSAGE_FAULT = 72,
    MESSAGE_STOPPED = 73,
    MESSAGE_ATTACHED = 74
};

enum scope { SCOPE_MAIN = 1, SCOPE_GROUP = 2, SCOPE_TREE = 3 };

/* Where something failed.  The names that people read are in protocol.py. */
enum step {
    STEP_ARGUMENTS = 1,
    STEP_SETSID = 2,
    STEP_SUBREAPER = 3,
    STEP_SIGNALS = 4,
    STEP_PROC = 5,
    STEP_PIDFD = 6,
    STEP_MEMORY = 7,
    STEP_FORK = 8,
    STEP_PDEATHSIG = 9,
    STEP_CHDIR = 10,
    STEP_DESCRIPTORS = 11,
    STEP_EXEC = 12,
    STEP_ADOPT = 13,
    STEP_PROTOCOL = 14,
    STEP_STDIO = 15,
    STEP_PARENT = 16,
    STEP_CGROUP = 17,
    STEP_LIMITS = 18,
    STEP_NAMESPACE = 19,
    STEP_MOUNT = 20,
    STEP_INIT = 21,
    STEP_REGISTRY = 22,
    STEP_SETPGID = 23,
    STEP_TERMINAL = 24,
    STEP_OOM_SCORE_ADJ = 25,
    STEP_NICE = 26,
    STEP_IONICE = 27,
    STEP_AFFINITY = 28,
    STEP_RLIMITS = 29,
    STEP_GROUPS = 30,
    STEP_GID = 31,
    STEP_UID = 32,
    STEP_NO_NEW_PRIVS = 33,
    STEP_LOCK = 34,
    STEP_RUN = 35,
    STEP_RECORD = 36,
    STEP_LISTEN = 37,
    STEP_ATTACH = 38,
    STEP_LEASE = 39
};

/* Why a durable tree ended; in its exit record. */
enum cause {
    CAUSE_ITSELF = 0,
    CAUSE_OWNER = 1,     /* its owner ended it; the note says why */
    CAUSE_CANCELLED = 2, /* CANCEL */
    CAUSE_LEASE = 3,
    CAUSE_ASKED = 4, /* by a signal to the warden */
    CAUSE_NOT_STARTED = 5
};

#define STAGE_RESUME 1u     /* send SIGCONT to stopped members, so that they see the signal */
#define STAGE_FOREGROUND 2u /* give the terminal to the main process's group first */
#define STAGE_ENDING 4u     /* a stage of an ending, and not just a signal */
#define MEMBERS_MORE 1u     /* another MEMBERS message with the same serial follows */
#define ATTACH_OWN 1u       /* the sender wants to be the owner */
#define ATTACHED_OWNER 1u   /* the receiver is the owner now */
#define ATTACHED_ENDS 2u    /* what the main process leaves behind is to be ended */

struct message_header {
    uint8_t version;
    uint8_t type;
    uint16_t flags;
    uint32_t serial; /* a request's number, repeated in its answers; 0 for what nobody asked for */
};

struct message_stage {
    int32_t signo;
    uint16_t scope;
    uint16_t flags;
    uint32_t grace_ms;
};

/* The orphan plan: what the warden does by itself when its supervisor is gone. */
struct message_start {
    struct message_header header;
    uint32_t stage_count;
    struct message_stage stages[PROTOCOL_STAGES_MAX];
};

struct message_signal {
    struct message_header header;
    struct message_stage stage; /* grace_ms is ignored: the supervisor keeps the time */
};

struct message_keep { /* a new lease */
    struct message_header header;
    uint64_t lease_ms; /* how long; of a strict one until when, in ms of CLOCK_BOOTTIME */
};

struct message_note { /* what the exit record says when it is the owner who ends the tree */
    struct message_header header;
    uint32_t length;
    char text[PROTOCOL_NOTE_MAX];
};

struct message_started {
    struct message_header header;
    int32_t pid;
    int32_t reserved;
    uint64_t start_time; /* field 22 of /proc/PID/stat, in clock ticks since boot */
};

struct message_failure { /* EXEC_FAILED and FAULT */
    struct message_header header;
    int32_t error; /* errno */
    int32_t step;
};

struct message_usage {
    uint64_t user_us;
    uint64_t system_us;
    uint64_t max_rss; /* bytes, of the largest single process */
};

struct message_exited {
    struct message_header header;
    int32_t status;     /* as waitpid(2) gives it */
    uint32_t leftovers; /* live members, named in MEMBERS before; 1 if some are there but hide */
    struct message_usage usage;
};

struct message_member {
    int32_t pid;
    int32_t ppid;
    int32_t pgrp;
    int32_t session;
    uint64_t start_time;
    int32_t error;  /* errno when we may not signal it, else 0 */
    int32_t tracer; /* who traces it (ptrace(2)), as a number that we can see; else 0 */
    char state;     /* field 3 of /proc/PID/stat */
    char reserved[7];
    char comm[PROTOCOL_COMM_SIZE];
};

struct message_members {
    struct message_header header;
    uint32_t count;
    uint32_t total; /* of the whole answer, over all its messages */
    struct message_member members[PROTOCOL_MEMBERS_MAX];
};

struct message_signalled {
    struct message_header header;
    uint32_t count;
    uint32_t denied;
};

struct message_denied {
    struct message_header header;
    int32_t pid;
    int32_t error;
};

struct message_asked { /* somebody sent the warden itself a signal that asks it to end */
    struct message_header header;
    int32_t signo;
    int32_t pid;
    uint32_t uid;
};

struct message_empty {
    struct message_header header;
    uint64_t reaped;
    struct message_usage usage;
    /* What the cgroup of the tree says, where it has the controllers; else 0. */
    uint64_t memory_peak; /* bytes */
    uint64_t pids_peak;
    uint64_t oom_kills;
};

struct message_stopped { /* the main process, in a foreground job */
    struct message_header header;
    int32_t signo;
    int32_t reserved;
};

struct message_attached { /* answers ATTACH; and unasked, when the receiver becomes the owner */
    struct message_header header;
    int32_t owner;   /* its pid; 0: there is none, or it is in a PID namespace that we cannot see */
    uint32_t ending; /* 1 + the cause, when the warden itself is ending the tree; else 0 */
};

#endif
