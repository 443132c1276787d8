/* Linked to the sanitized warden.  Its stderr is /dev/null and its environment is that of the tree,
 * so where it reports to is built in.  REPORTS comes from the command line of the compiler.
 *
 * No search for leaks: there is no heap, and the search would stop and trace the process when it
 * exits, below a supervisor that waits for that. */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>

const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "log_path=" REPORTS "/address:detect_leaks=0:detect_stack_use_after_return=1:"
           "strict_string_checks=1";
}

const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void)
{
    return "log_path=" REPORTS "/undefined:print_stacktrace=1";
}

/* The warden blocks every signal, and then SIGSEGV kills without a word: these stay with the
 * sanitizer (ld(1), --wrap). */
int __real_sigprocmask(int how, const sigset_t *set, sigset_t *old);
int __wrap_sigprocmask(int how, const sigset_t *set, sigset_t *old);
int __wrap_sigprocmask(int how, const sigset_t *set, sigset_t *old)
{
    static const int errors[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP};
    sigset_t others = *set;
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
        sigdelset(&others, errors[i]);
    return __real_sigprocmask(how, &others, old);
}
