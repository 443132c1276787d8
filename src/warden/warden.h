/* What the parts of the warden share.  See warden.c for how they fit together. */
#ifndef PROCTREE_WARDEN_H
#define PROCTREE_WARDEN_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

/* PID_MAX_LIMIT of the kernel (include/linux/threads.h): no tree can have more members. */
#define PIDS_MAX (4u * 1024 * 1024)

/* How many verified members keep their pidfd open while a tree is walked. */
#define CACHE_SIZE 16

#define LIMITS_MAX 4
#define RLIMITS_MAX 16 /* RLIM_NLIMITS */

/* How many may be attached to a durable tree, besides its owner. */
#define WATCHERS_MAX 32

/* Of a supervisor that has ended, how many messages are read at most. */
#define LAST_WORDS_MAX 1024

/* What the main process is given between fork and exec.  A text is a list with commas. */
struct attributes {
    bool set_umask, set_nice, set_ionice, set_oom_score_adj, set_uid, set_gid;
    bool no_new_privs;
    long umask, nice, ionice, oom_score_adj, uid, gid;
    char *groups;
    char *affinity;
    char *rlimits[RLIMITS_MAX]; /* RESOURCE,SOFT,HARD */
};

/* Of every warden, in /proc/PID/stat. */
#define WARDEN_NAME "proctree-warden"

/* The command line of the warden: see options.c. */
struct options {
    int control;
    pid_t supervisor;
    int watch; /* a pidfd of the supervisor, which then need not be our parent; or -1 */
    pid_t adopt;
    int gate;  /* where the callable that is to be adopted waits for a byte, or -1 */
    int report; /* where it says why it cannot begin, and closes when it can; or -1 */
    int proc;  /* our /proc, where another one has been mounted over it; or -1 */
    bool scan; /* do not use /proc/PID/task/TID/children even where the kernel has it */
    char *cwd;
    char *pass;
    char *cgroup;            /* the leaf to make for the tree */
    char *limits[LIMITS_MAX]; /* FILE,VALUE for it */
    bool pid_namespace;
    int init;       /* the socket to an init that is there already (adopt), or -1 */
    int init_pid;
    bool be_init;   /* be that init: `control` is the socket to the warden */
    char *entry;    /* the file in the registry of running trees */
    char *record;   /* what it says */
    bool spare;     /* wardens that the main process forked are no members: see tree.c */
    bool keep_session; /* a foreground job: a group of its own, in our session */
    bool terminal;     /* standard input becomes the controlling terminal */

    /* Of a durable warden; what makes it one is `run`. */
    int lock;          /* nothing is done with it, but that it is open for as long as we live */
    int run;           /* the directory of this attempt, or -1 */
    int listen;        /* a bound socket on which others attach, or -1 */
    long lease;        /* ms that the tree lives on when nobody is attached */
    bool strict;       /* the lease runs whoever is attached */
    long until;        /* ms of CLOCK_BOOTTIME: then a strict one is over */
    bool end_leftovers; /* what the main process leaves ends when nobody owns the tree */
    struct attributes attributes;
    char **argv;
};

/* One process as /proc/PID/stat shows it. */
struct process {
    pid_t pid;
    pid_t ppid;
    pid_t pgrp;
    pid_t session;
    char state;
    unsigned long flags;
    unsigned long pending;
    long threads;
    unsigned long long start_time;
    char comm[PROTOCOL_COMM_SIZE];
};

struct cached {
    pid_t pid;
    int fd;
};

/* Somebody who has connected to a durable warden.  All zero: a free place. */
struct peer {
    int fd;
    int pidfd; /* 0: its process is in a PID namespace that we cannot see */
    pid_t pid;
    uid_t uid;
    bool attached;
    uint64_t came;  /* since this turn of all that have */
    uint64_t waits; /* for the ownership, since this turn of all that do; 0: it does not */
};

struct warden {
    struct options options;
    pid_t self;
    int control;    /* -1 once the supervisor is gone */
    int supervisor; /* pidfd, -1 once it is gone */
    pid_t owner;    /* its number, and that of its user, for people */
    uid_t owner_uid;
    bool promoted; /* the supervisor is one that has attached, and not the one that started us */
    int signals;    /* signalfd */
    int proc;       /* O_PATH of /proc */

    /* Stronger containment; -1 and 0 where there is none. */
    int leaf;         /* the cgroup of the tree */
    int leaf_events;  /* its cgroup.events */
    bool leaf_frozen;
    bool frozen; /* by FREEZE, however that was done */
    pid_t init;       /* of the tree's PID namespace: ours to reap, and no member */
    int init_link;    /* the socket to it */
    int entry;        /* the locked file in the registry of running trees */
    int terminal;     /* of a foreground job */
    pid_t terminal_owner; /* the group that gets it back */

    pid_t main;
    bool main_reaped; /* until then the number `main`, and so its group, cannot be reused */
    bool main_reported;
    int main_stopped; /* the signal that stopped it, until that has been told */
    int main_status;
    uint64_t reaped;

    /* What a durable warden knows besides. */
    struct peer *watchers; /* WATCHERS_MAX of them, in pages that no other warden touches */
    uint64_t came, waits; /* the last that were given out */
    int64_t listen_due;
    uint64_t lease_ms; /* as in struct message_keep */
    int lease_timer; /* of a strict lease; else 0 */
    int64_t lease_due;
    int64_t started_ms; /* CLOCK_BOOTTIME */
    struct message_started started;
    struct message_exited exited;
    struct message_note note;
    enum cause cause;

    /* The orphan plan. */
    struct message_stage plan[PROTOCOL_STAGES_MAX];
    uint32_t plan_count;
    uint32_t plan_next;
    bool plan_running;
    bool owner_ends; /* it has begun to end the tree */
    int64_t plan_due; /* CLOCK_MONOTONIC in ms; 0: no timer */
    int64_t asked_due;
    enum cause asked_cause;
    uint32_t ending; /* of message_attached */

    /* A SIGKILL of the tree that has not yet come to its end. */
    bool intruded; /* no children, and yet somebody is in the leaf */
    bool killing;
    bool killed_at_once; /* by the kernel, as a whole */
    int64_t kill_due;
    int64_t kill_backoff;

    /* The last snapshot of the tree, in memory that is given back after each walk. */
    pid_t *pids;
    size_t pid_count;
    uint64_t *seen;
    uint64_t *killed; /* children of ours that have their SIGKILL and are not reaped yet */
    bool skip_killed; /* a walk that need not look below them */
    struct cached cache[CACHE_SIZE];
    unsigned cache_next;
};

/* Where something failed, for a message; all zero: nowhere. */
struct failure {
    int error;
    int step;
};

/* What is to be done next. */
enum verdict { GO_ON, FINISHED, GIVEN_UP };

/* options.c: the command line.  Pure. */
bool parse_arguments(struct options *options, char **argv);
const char *parse_list(const char *at, unsigned long long *out);

/* request.c: what a supervisor may say.  Pure. */
union request {
    struct message_header header;
    struct message_start start;
    struct message_signal signal;
    struct message_keep keep;
    struct message_note note;
};
bool request_valid(const union request *request, size_t size);

/* proc.c: reading /proc.  The parsers are pure: bytes in, values out. */
const char *parse_number(const char *at, const char *end, unsigned long long *out);
bool parse_stat(const char *text, size_t length, struct process *out);
size_t parse_children(const char *text, size_t length, bool last, pid_t *out, size_t capacity,
                      size_t *used);
char *put_text(char *at, const char *text);
char *put_number(char *at, long number);
int process_read(int proc, pid_t pid, struct process *out);
pid_t parse_tracer(const char *text, size_t length);
pid_t process_tracer(int proc, pid_t pid);
bool process_dead(const struct process *process);
bool process_dying(const struct process *process);

/* The kernel's struct linux_dirent64, getdents64(2). */
struct entry {
    uint64_t inode;
    int64_t offset;
    uint16_t size;
    uint8_t type;
    char name[];
};

struct listing {
    int fd;
    size_t at;
    size_t size;
    uint64_t text[256]; /* aligned as the entries in it */
};
int listing_open(struct listing *listing, int directory, const char *path);
const struct entry *listing_next(struct listing *listing);
long listing_next_number(struct listing *listing);
void listing_close(struct listing *listing);

/* tree.c: who is in the tree. */
int tree_prepare(struct warden *w);
int tree_snapshot(struct warden *w);
void tree_forget(struct warden *w);
int member_open(struct warden *w, pid_t pid, struct process *out);
enum kinship { NOT_OURS, OURS_ALIVE, OURS_DEAD };
enum kinship child_of_ours(pid_t pid);
bool bit_get(const uint64_t *bits, pid_t pid);
bool bit_set(uint64_t *bits, pid_t pid);
void bit_clear(uint64_t *bits, pid_t pid);
void forget_killed(struct warden *w);

/* ending.c: signalling and reaping it. */
struct sent {
    unsigned count;
    unsigned denied;
};
struct sent send_signal(struct warden *w, const struct message_stage *stage, uint32_t serial);
void freeze_tree(struct warden *w);
struct sent thaw_tree(struct warden *w, uint32_t serial);
bool reap(struct warden *w);
void kill_tree(struct warden *w, struct sent *sent, uint32_t serial);
void kill_again(struct warden *w, bool by_itself);
void kill_retry(struct warden *w);

/* spawn.c: the main process. */
struct failure spawn_main(struct warden *w);
struct failure adopt_main(struct warden *w);
int descriptors_prepare(const struct warden *w);
void descriptors_drop(struct warden *w);
int lift(int fd);
int prepare_signals(struct warden *w);
void leave_nothing(struct warden *w);

/* attributes.c: what the main process is given before it execs. */
struct failure attributes_apply(int proc, const struct attributes *attributes);
struct failure credentials_apply(const struct attributes *attributes);

/* cgroup.c: the cgroup of the tree. */
struct failure cgroup_prepare(struct warden *w);
int cgroup_enter(const struct warden *w);
bool cgroup_populated(const struct warden *w);
bool cgroup_settled(const struct warden *w);
unsigned cgroup_count(const struct warden *w);
bool cgroup_kill(const struct warden *w);
void cgroup_freeze(struct warden *w, bool frozen);
void cgroup_evacuate(const struct warden *w);
void cgroup_peaks(const struct warden *w, struct message_empty *out);
void cgroup_remove(struct warden *w);

/* namespace.c: the PID namespace of the tree, and its init. */
struct failure namespace_prepare(struct warden *w);
void namespace_main_gone(struct warden *w);
int be_init(struct warden *w);

/* registry.c: our file in the registry of running trees. */
int registry_enter(struct warden *w);
void registry_started(const struct warden *w, unsigned long long start_time);
void registry_leave(struct warden *w);

/* terminal.c: a foreground job. */
void terminal_prepare(struct warden *w);
void terminal_give(const struct warden *w, pid_t group);
void terminal_take(const struct warden *w);

/* plan.c: why and how the warden ends the tree by itself. */
bool durable(const struct warden *w);
enum verdict plan_step(struct warden *w);
enum verdict plan_begin(struct warden *w, enum cause cause);
enum verdict plan_leftovers(struct warden *w);
enum verdict ask_owner(struct warden *w, enum cause cause, struct message_asked message);
void owner_acts(struct warden *w, const union request *request);

/* lease.c: how long a durable tree lives without anybody. */
struct failure lease_prepare(struct warden *w);
void lease_keep(struct warden *w, uint64_t lease_ms);
bool lease_ran_out(struct warden *w);
void lease_follow(struct warden *w);

/* attached.c: who has connected to a durable warden. */
#define ATTACHED_FDS (1 + 2 * WATCHERS_MAX)
struct failure attached_listen(struct warden *w);
size_t attached_poll(const struct warden *w, struct pollfd fds[ATTACHED_FDS]);
void attached_look(struct pollfd fds[ATTACHED_FDS]);
enum verdict attached_turn(struct warden *w, const struct pollfd fds[ATTACHED_FDS]);
bool attached_promote(struct warden *w);
bool attached_any(const struct warden *w);
void attached_tell_owner(struct warden *w, uint32_t serial);
void tell_everybody(struct warden *w, const void *message, size_t size);

/* record.c: the exit record of a durable tree. */
#define RECORD_MAX 2048
struct record {
    int status; /* as waitpid(2) gives it, or -1 */
    enum cause cause;
    struct failure failure;
    pid_t pid;
    int64_t duration_ms;
    const struct message_empty *empty;
    const struct message_note *note;
};
uint32_t crc32_of(const char *text, size_t size);
size_t record_format(char out[RECORD_MAX], const struct record *record);
void record_end(struct warden *w, const struct message_empty *empty);
void record_failure(struct warden *w, struct failure failure);

/* channel.c: messages. */
void header_init(struct message_header *header, enum message_type type, uint32_t serial);
void channel_send(struct warden *w, const void *message, size_t size);
ssize_t channel_receive(int fd, void *buffer, size_t size);
struct message_failure failure_message(enum message_type type, struct failure failure);
void send_failure(struct warden *w, enum message_type type, struct failure failure);
void send_exited(struct warden *w, uint32_t leftovers);
void send_empty(struct warden *w);
uint32_t send_members(struct warden *w, uint32_t serial);

/* system.c */
int sys_pidfd_open(pid_t pid);
int sys_pidfd_send_signal(int fd, int signo);
int64_t now_ms(void);
int64_t boot_ms(void);
struct failure failed(int step);
int write_text(int directory, const char *path, const char *text);
ssize_t read_text(int directory, const char *path, char *text, size_t size);

#endif
