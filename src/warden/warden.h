/* What the parts of the warden share.  See warden.c for how they fit together. */
#ifndef PROCTREE_WARDEN_H
#define PROCTREE_WARDEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

/* PID_MAX_LIMIT of the kernel (include/linux/threads.h): no tree can have more members. */
#define PIDS_MAX (4u * 1024 * 1024)

/* How many verified members keep their pidfd open while a tree is walked. */
#define CACHE_SIZE 16

struct options {
    int control;
    pid_t supervisor;
    pid_t adopt;
    bool scan; /* do not use /proc/PID/task/TID/children even where the kernel has it */
    char *cwd;
    char *pass;
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

struct warden {
    struct options options;
    pid_t self;
    int control;    /* -1 once the supervisor is gone */
    int supervisor; /* pidfd, -1 once it is gone */
    int signals;    /* signalfd */
    int proc;       /* O_PATH of /proc */

    pid_t main;
    bool main_reaped; /* until then the number `main`, and so its group, cannot be reused */
    bool main_reported;
    int main_status;
    uint64_t reaped;

    /* The orphan plan. */
    struct message_stage plan[PROTOCOL_STAGES_MAX];
    uint32_t plan_count;
    uint32_t plan_next;
    bool plan_running;
    int64_t plan_due; /* CLOCK_MONOTONIC in ms; 0: no timer */
    int64_t asked_due;

    /* A SIGKILL of the tree that has not yet come to its end. */
    bool killing;
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

/* proc.c: reading /proc.  The parsers are pure: bytes in, values out. */
const char *parse_number(const char *at, const char *end, unsigned long long *out);
bool parse_stat(const char *text, size_t length, struct process *out);
size_t parse_children(const char *text, size_t length, bool last, pid_t *out, size_t capacity,
                      size_t *used);
char *put_text(char *at, const char *text);
char *put_number(char *at, long number);
int process_read(int proc, pid_t pid, struct process *out);
bool process_dead(const struct process *process);
bool process_dying(const struct process *process);

struct numbers {
    int fd;
    size_t at;
    size_t size;
    uint64_t text[256]; /* aligned as the entries in it */
};
int numbers_open(struct numbers *numbers, int directory, const char *path);
long numbers_next(struct numbers *numbers);
void numbers_close(struct numbers *numbers);

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
void kill_retry(struct warden *w);

/* spawn.c: the main process. */
struct failure {
    int error;
    int step;
};
struct failure spawn_main(struct warden *w);
struct failure adopt_main(struct warden *w);
int descriptors_prepare(void);
void descriptors_drop(struct warden *w);

/* channel.c: messages. */
void header_init(struct message_header *header, enum message_type type, uint32_t serial);
void channel_send(struct warden *w, const void *message, size_t size);
ssize_t channel_receive(struct warden *w, void *buffer, size_t size);
void send_failure(struct warden *w, enum message_type type, struct failure failure);
void send_exited(struct warden *w, uint32_t leftovers);
void send_empty(struct warden *w);
uint32_t send_members(struct warden *w, uint32_t serial);

/* system.c */
int sys_pidfd_open(pid_t pid);
int sys_pidfd_send_signal(int fd, int signo);
int64_t now_ms(void);

#endif
