/* Linked to the warden that runs under valgrind, in front of syscall(2) (ld(1), --wrap).
 *
 * Valgrind knows no pidfd_open(2) and pidfd_send_signal(2) before 3.22, and answers ENOSYS.  Both
 * take numbers only and write no memory, so nothing is lost when they are made outside of it. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <valgrind/valgrind.h>

#define PIDFD_SEND_SIGNAL 424
#define PIDFD_OPEN 434

long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);

struct call {
    long number;
    long arguments[4];
};

/* Runs on the real processor, neither watched nor translated, and without a thread pointer: no libc
 * function here, not even errno. */
static unsigned long make_call(unsigned long thread, unsigned long at)
{
    const struct call *call = (const struct call *)at;
    const long *a = call->arguments;
    register long r10 __asm__("r10") = a[3];
    long result;
    (void)thread;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(call->number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10)
                     : "rcx", "r11", "memory");
    return (unsigned long)result;
}

long __wrap_syscall(long number, ...)
{
    struct call call = {.number = number};
    long *a = call.arguments;
    va_list list;

    va_start(list, number);
    for (int i = 0; i < 4; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (number != PIDFD_SEND_SIGNAL && number != PIDFD_OPEN)
        return __real_syscall(number, a[0], a[1], a[2], a[3]);
    const long result = (long)VALGRIND_NON_SIMD_CALL1(make_call, &call);
    if (result >= 0)
        return result;
    errno = (int)-result;
    return -1;
}
