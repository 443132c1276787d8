/* The few libc functions that the warden uses, without a libc, for x86-64.
 *
 * Why: a statically linked glibc program spends most of its start in cpu-feature detection
 * (init_cpu_features() runs dozens of CPUID instructions, and each of them leaves a virtual machine
 * for the hypervisor).  Measured from posix_spawn to waitpid on one such machine: 410 us for an
 * empty static program with glibc, 96 us for one without.  A warden is started for every tree, so
 * that difference is most of what supervision would cost.
 *
 * The names and types are those of the system's headers, so that the other files are ordinary C
 * for any libc: they are built against one on other machines and for the sanitizers. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if !defined(__x86_64__)
#error "freestanding.c is written for x86-64 only; build with the libc instead"
#endif

/* The kernel's sigset_t has one bit a signal; the libc's has room for more (rt_sigprocmask(2)). */
#define KERNEL_SIGSET_SIZE 8

char **environ;

/* One thread and no handlers: a plain variable is enough.  The child of spawn_main() shares it
 * while the parent is suspended. */
int *__errno_location(void)
{
    static int value;
    return &value;
}

static long raw(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static long check(long result)
{
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

#define CALL(number, a, b, c, d, e, f)                                                             \
    check(raw(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f)))

long syscall(long number, ...)
{
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    return CALL(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ---- Start, and the one child that shares our memory ---- */

__asm__(".globl _start\n"
        ".type _start, @function\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call start_with_stack\n"
        "    hlt\n");

int main(int argc, char **argv);
void start_with_stack(long *stack);

/* System V ABI for AMD64, section 3.4.1: argc, argv, NULL, environment, NULL. */
void start_with_stack(long *stack)
{
    int argc = (int)stack[0];
    char **argv = (char **)(stack + 1);
    environ = argv + argc + 1;
    _exit(main(argc, argv));
}

void _exit(int status)
{
    for (;;)
        raw(SYS_exit_group, status, 0, 0, 0, 0, 0);
}

/* clone(flags, stack): the child starts on its own stack, where the function and its argument wait
 * for it, and never comes back here. */
__asm__(".type clone_raw, @function\n"
        "clone_raw:\n" /* rdi: function, rsi: stack, rdx: flags, rcx: argument */
        "    and $-16, %rsi\n"
        "    sub $16, %rsi\n"
        "    mov %rdi, (%rsi)\n"
        "    mov %rcx, 8(%rsi)\n"
        "    mov %rdx, %rdi\n"
        "    xor %edx, %edx\n"
        "    xor %r10d, %r10d\n"
        "    xor %r8d, %r8d\n"
        "    mov $56, %eax\n" /* SYS_clone */
        "    syscall\n"
        "    test %rax, %rax\n"
        "    jz 1f\n"
        "    ret\n"
        "1:  xor %ebp, %ebp\n"
        "    pop %rax\n"
        "    pop %rdi\n"
        "    call *%rax\n"
        "    mov %eax, %edi\n"
        "    mov $231, %eax\n" /* SYS_exit_group */
        "    syscall\n"
        "    hlt\n");
long clone_raw(int (*function)(void *), void *stack, long flags, void *argument);

int clone(int (*function)(void *), void *stack, int flags, void *argument, ...)
{
    return (int)check(clone_raw(function, stack, flags, argument));
}

/* ---- Memory and text: the compiler may call the first four by itself ---- */

void *memcpy(void *restrict to, const void *restrict from, size_t size)
{
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return result;
}

void *memset(void *to, int value, size_t size)
{
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return result;
}

void *memmove(void *to, const void *from, size_t size)
{
    char *t = to;
    const char *f = from;
    if (t <= f)
        return memcpy(to, from, size);
    while (size-- > 0)
        t[size] = f[size];
    return to;
}

int memcmp(const void *a, const void *b, size_t size)
{
    const unsigned char *x = a, *y = b;
    for (size_t i = 0; i < size; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

void *memchr(const void *text, int wanted, size_t size)
{
    const unsigned char *at = text;
    for (size_t i = 0; i < size; i++)
        if (at[i] == (unsigned char)wanted)
            return (void *)(at + i);
    return NULL;
}

void *memrchr(const void *text, int wanted, size_t size)
{
    const unsigned char *at = text;
    while (size-- > 0)
        if (at[size] == (unsigned char)wanted)
            return (void *)(at + size);
    return NULL;
}

size_t strlen(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

char *strchr(const char *text, int wanted)
{
    for (;; text++) {
        if (*text == (char)wanted)
            return (char *)text;
        if (!*text)
            return NULL;
    }
}

int strcmp(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return (unsigned char)*a - (unsigned char)*b;
}

/* ---- System calls ---- */

/* The mode is there with O_CREAT only; without it, the kernel does not look at what we pass. */
#define MODE_OF(list, flags) ((flags) & O_CREAT ? va_arg(list, mode_t) : 0)

int openat(int directory, const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = MODE_OF(list, flags);
    va_end(list);
    return (int)CALL(SYS_openat, directory, path, flags, mode, 0, 0);
}

int open(const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = MODE_OF(list, flags);
    va_end(list);
    return (int)CALL(SYS_openat, AT_FDCWD, path, flags, mode, 0, 0);
}

ssize_t read(int fd, void *buffer, size_t size)
{
    return CALL(SYS_read, fd, buffer, size, 0, 0, 0);
}

ssize_t pread(int fd, void *buffer, size_t size, off_t offset)
{
    return CALL(SYS_pread64, fd, buffer, size, offset, 0, 0);
}

ssize_t write(int fd, const void *buffer, size_t size)
{
    return CALL(SYS_write, fd, buffer, size, 0, 0, 0);
}

ssize_t pwrite(int fd, const void *buffer, size_t size, off_t offset)
{
    return CALL(SYS_pwrite64, fd, buffer, size, offset, 0, 0);
}

int ftruncate(int fd, off_t size)
{
    return (int)CALL(SYS_ftruncate, fd, size, 0, 0, 0, 0);
}

int fsync(int fd)
{
    return (int)CALL(SYS_fsync, fd, 0, 0, 0, 0, 0);
}

int fdatasync(int fd)
{
    return (int)CALL(SYS_fdatasync, fd, 0, 0, 0, 0, 0);
}

int listen(int fd, int backlog)
{
    return (int)CALL(SYS_listen, fd, backlog, 0, 0, 0, 0);
}

int accept4(int fd, struct sockaddr *address, socklen_t *restrict size, int flags)
{
    return (int)CALL(SYS_accept4, fd, address, size, flags, 0, 0);
}

int getsockopt(int fd, int level, int name, void *restrict value, socklen_t *restrict size)
{
    return (int)CALL(SYS_getsockopt, fd, level, name, value, size, 0);
}

int socketpair(int domain, int type, int protocol, int pair[2])
{
    return (int)CALL(SYS_socketpair, domain, type, protocol, pair, 0, 0);
}

int close(int fd)
{
    return (int)CALL(SYS_close, fd, 0, 0, 0, 0, 0);
}

int dup2(int from, int to)
{
    return (int)CALL(SYS_dup2, from, to, 0, 0, 0, 0);
}

int fcntl(int fd, int command, ...)
{
    va_list list;
    va_start(list, command);
    long argument = va_arg(list, long);
    va_end(list);
    return (int)CALL(SYS_fcntl, fd, command, argument, 0, 0, 0);
}

int fstatat(int directory, const char *restrict path, struct stat *restrict out, int flags)
{
    return (int)CALL(SYS_newfstatat, directory, path, out, flags, 0, 0);
}

ssize_t readlinkat(int directory, const char *restrict path, char *restrict out, size_t size)
{
    return CALL(SYS_readlinkat, directory, path, out, size, 0, 0);
}

int mkdirat(int directory, const char *path, mode_t mode)
{
    return (int)CALL(SYS_mkdirat, directory, path, mode, 0, 0, 0);
}

int unlinkat(int directory, const char *path, int flags)
{
    return (int)CALL(SYS_unlinkat, directory, path, flags, 0, 0, 0);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to)
{
    return (int)CALL(SYS_renameat, from_directory, from, to_directory, to, 0, 0);
}

int flock(int fd, int operation)
{
    return (int)CALL(SYS_flock, fd, operation, 0, 0, 0, 0);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    va_start(list, request);
    long argument = va_arg(list, long);
    va_end(list);
    return (int)CALL(SYS_ioctl, fd, request, argument, 0, 0, 0);
}

mode_t umask(mode_t mask)
{
    return (mode_t)raw(SYS_umask, mask, 0, 0, 0, 0, 0);
}

int chdir(const char *path)
{
    return (int)CALL(SYS_chdir, path, 0, 0, 0, 0, 0);
}

int poll(struct pollfd *fds, nfds_t count, int timeout)
{
    return (int)CALL(SYS_poll, fds, count, timeout, 0, 0, 0);
}

ssize_t send(int fd, const void *message, size_t size, int flags)
{
    return CALL(SYS_sendto, fd, message, size, flags, 0, 0);
}

int shutdown(int fd, int how)
{
    return (int)CALL(SYS_shutdown, fd, how, 0, 0, 0, 0);
}

ssize_t recv(int fd, void *buffer, size_t size, int flags)
{
    return CALL(SYS_recvfrom, fd, buffer, size, flags, 0, 0);
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    return (void *)CALL(SYS_mmap, at, size, protection, flags, fd, offset);
}

int madvise(void *at, size_t size, int advice)
{
    return (int)CALL(SYS_madvise, at, size, advice, 0, 0, 0);
}

int clock_gettime(clockid_t clock, struct timespec *out)
{
    return (int)CALL(SYS_clock_gettime, clock, out, 0, 0, 0, 0);
}

int timerfd_create(clockid_t clock, int flags)
{
    return (int)CALL(SYS_timerfd_create, clock, flags, 0, 0, 0, 0);
}

int timerfd_settime(int fd, int flags, const struct itimerspec *to, struct itimerspec *old)
{
    return (int)CALL(SYS_timerfd_settime, fd, flags, to, old, 0, 0);
}

int prctl(int option, ...)
{
    va_list list;
    va_start(list, option);
    long argument = va_arg(list, long);
    va_end(list);
    return (int)CALL(SYS_prctl, option, argument, 0, 0, 0, 0);
}

int getrusage(__rusage_who_t who, struct rusage *out)
{
    return (int)CALL(SYS_getrusage, who, out, 0, 0, 0, 0);
}

pid_t getpid(void)
{
    return (pid_t)raw(SYS_getpid, 0, 0, 0, 0, 0, 0);
}

pid_t getppid(void)
{
    return (pid_t)raw(SYS_getppid, 0, 0, 0, 0, 0, 0);
}

uid_t geteuid(void)
{
    return (uid_t)raw(SYS_geteuid, 0, 0, 0, 0, 0, 0);
}

gid_t getegid(void)
{
    return (gid_t)raw(SYS_getegid, 0, 0, 0, 0, 0, 0);
}

pid_t getpgid(pid_t pid)
{
    return (pid_t)CALL(SYS_getpgid, pid, 0, 0, 0, 0, 0);
}

int setpgid(pid_t pid, pid_t group)
{
    return (int)CALL(SYS_setpgid, pid, group, 0, 0, 0, 0);
}

pid_t fork(void)
{
    return (pid_t)CALL(SYS_clone, SIGCHLD, 0, 0, 0, 0, 0);
}

pid_t getsid(pid_t pid)
{
    return (pid_t)CALL(SYS_getsid, pid, 0, 0, 0, 0, 0);
}

pid_t setsid(void)
{
    return (pid_t)CALL(SYS_setsid, 0, 0, 0, 0, 0, 0);
}

int kill(pid_t pid, int signo)
{
    return (int)CALL(SYS_kill, pid, signo, 0, 0, 0, 0);
}

pid_t waitpid(pid_t pid, int *status, int options)
{
    return (pid_t)CALL(SYS_wait4, pid, status, options, 0, 0, 0);
}

int waitid(idtype_t type, id_t id, siginfo_t *info, int options)
{
    return (int)CALL(SYS_waitid, type, id, info, options, 0, 0);
}

int execve(const char *path, char *const argv[], char *const environment[])
{
    return (int)CALL(SYS_execve, path, argv, environment, 0, 0, 0);
}

int sigfillset(sigset_t *set)
{
    memset(set, 0xff, sizeof *set);
    return 0;
}

int sigemptyset(sigset_t *set)
{
    memset(set, 0, sizeof *set);
    return 0;
}

int sigprocmask(int how, const sigset_t *restrict set, sigset_t *restrict old)
{
    return (int)CALL(SYS_rt_sigprocmask, how, set, old, KERNEL_SIGSET_SIZE, 0, 0);
}

int signalfd(int fd, const sigset_t *set, int flags)
{
    return (int)CALL(SYS_signalfd4, fd, set, KERNEL_SIGSET_SIZE, flags, 0, 0);
}

/* Only for SIG_DFL and SIG_IGN: a handler would need a restorer. */
__sighandler_t signal(int signo, __sighandler_t handler)
{
    struct {
        __sighandler_t handler;
        unsigned long flags;
        void (*restorer)(void);
        unsigned long mask;
    } action = {.handler = handler};
    long result = CALL(SYS_rt_sigaction, signo, &action, NULL, KERNEL_SIGSET_SIZE, 0, 0);
    return result < 0 ? SIG_ERR : SIG_DFL;
}
