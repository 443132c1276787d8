"""The helper's own memory and text functions do what the libc's do.

Every symbol of freestanding.c gets a prefix, so that both are in one program.
"""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest

from helper_sources import WARDEN

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="freestanding.c is for x86-64"),
    pytest.mark.skipif(shutil.which("objcopy") is None, reason="there is no objcopy"),
]

# As src/warden/meson.build has it: these decide whether the compiler turns a loop into a call of
# the very function that it is in.
FLAGS = [
    *("-std=gnu99", "-O3", "-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fno-pie"),
    *("-U_FORTIFY_SOURCE", "-fno-tree-loop-distribute-patterns", "-fno-asynchronous-unwind-tables"),
]

DRIVER = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void *own_memcpy(void *, const void *, size_t);
void *own_memmove(void *, const void *, size_t);
void *own_memset(void *, int, size_t);
int own_memcmp(const void *, const void *, size_t);
void *own_memchr(const void *, int, size_t);
void *own_memrchr(const void *, int, size_t);
size_t own_strlen(const char *);
char *own_strchr(const char *, int);
int own_strcmp(const char *, const char *);
int own_sigfillset(sigset_t *);
int own_sigemptyset(sigset_t *);
int own_sigprocmask(int, const sigset_t *, sigset_t *);
pid_t own_getpid(void);
pid_t own_getsid(pid_t);
int own_close(int);
int *own___errno_location(void);
int own_main(int, char **);
int own_main(int argc, char **argv) { (void)argc; (void)argv; return 0; } /* its _start wants one */

#define ROOM 160
#define LARGEST 70

static unsigned checks;

static void hold(int good, const char *what, int a, int b, int c)
{
    checks++;
    if (!good) {
        printf("%s differs at %d, %d, %d\n", what, a, b, c);
        exit(1);
    }
}

static int sign(int value) { return (value > 0) - (value < 0); }

static void fill(unsigned char *at)
{
    for (int i = 0; i < ROOM; i++)
        at[i] = (unsigned char)(i * 37 + 200);
}

static void copies(const char *name)
{
    unsigned char a[ROOM], b[ROOM], from[ROOM];
    int moving = !strcmp(name, "memmove"), setting = !strcmp(name, "memset");
    for (int size = 0; size <= LARGEST; size++)
        for (int to = 0; to < 20; to++)
            for (int at = 0; at < 20; at++) {
                fill(a);
                fill(b);
                fill(from);
                void *result;
                if (setting) {
                    result = own_memset(a + to, at * 29 - 100, size);
                    memset(b + to, at * 29 - 100, size);
                } else if (moving) {
                    result = own_memmove(a + to, a + at, size);
                    memmove(b + to, b + at, size);
                } else {
                    result = own_memcpy(a + to, from + at, size);
                    memcpy(b + to, from + at, size);
                }
                hold(result == a + to && !memcmp(a, b, ROOM), name, size, to, at);
            }
}

static void compares(void)
{
    unsigned char a[ROOM], b[ROOM];
    static const int values[] = {0, 1, 127, 128, 255};
    for (int size = 0; size < 20; size++)
        for (int at = 0; at < 20; at++)
            for (int x = 0; x < 5; x++)
                for (int y = 0; y < 5; y++) {
                    fill(a);
                    fill(b);
                    a[at] = (unsigned char)values[x];
                    b[at] = (unsigned char)values[y];
                    int wanted = sign(memcmp(a, b, size));
                    hold(sign(own_memcmp(a, b, size)) == wanted, "memcmp", size, at, x * 5 + y);
                    a[19] = b[19] = 0;
                    wanted = sign(strcmp((char *)a, (char *)b));
                    int got = sign(own_strcmp((char *)a, (char *)b));
                    hold(got == wanted, "strcmp", size, at, x * 5 + y);
                }
}

static void searches(void)
{
    /* Each of 0, 'a', 0x80, 0xff at each place, also twice, and not at all. */
    static const int wanted[] = {0, 'a', 0x80, 0xff, 'a' + 256, -1, -128, 'z'};
    unsigned char text[32];
    for (int first = 0; first < 24; first++)
        for (int second = 0; second < 24; second++)
            for (int w = 0; w < 8; w++) {
                memset(text, 'x', sizeof text);
                text[first] = text[second] = (unsigned char)wanted[w];
                text[24] = 0;
                for (int size = 0; size <= 24; size++) {
                    hold(own_memchr(text, wanted[w], size) == memchr(text, wanted[w], size),
                         "memchr", size, first, w);
                    hold(own_memrchr(text, wanted[w], size) == memrchr(text, wanted[w], size),
                         "memrchr", size, first, w);
                    hold(own_memchr(text, 'q', size) == NULL, "memchr", size, first, w);
                    hold(own_memrchr(text, 'q', size) == NULL, "memrchr", size, first, w);
                }
                hold(own_strchr((char *)text, wanted[w]) == strchr((char *)text, wanted[w]),
                     "strchr", first, second, w);
                hold(own_strchr((char *)text, 'q') == NULL, "strchr", first, second, w);
                hold(own_strlen((char *)text) == strlen((char *)text), "strlen", first, second, w);
            }
}

static void calls(void)
{
    hold(own_getpid() == getpid(), "getpid", 0, 0, 0);
    hold(own_getsid(0) == getsid(0), "getsid", 0, 0, 0);
    /* A failure is -1 and its own errno, the libc's is left alone. */
    errno = 0;
    *own___errno_location() = 0;
    hold(own_close(-1) == -1 && *own___errno_location() == EBADF && errno == 0, "errno", 0, 0, 0);

    sigset_t own, libc;
    own_sigfillset(&own);
    hold(own_sigprocmask(SIG_SETMASK, &own, NULL) == 0, "sigprocmask", 0, 0, 0);
    sigprocmask(SIG_SETMASK, NULL, &libc);
    hold(sigismember(&libc, SIGTERM) && sigismember(&libc, SIGRTMIN), "sigfillset", 0, 0, 0);
    own_sigemptyset(&own);
    own_sigprocmask(SIG_SETMASK, &own, NULL);
    sigprocmask(SIG_SETMASK, NULL, &libc);
    hold(!sigismember(&libc, SIGTERM) && !sigismember(&libc, SIGCHLD), "sigemptyset", 0, 0, 0);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "compares"))
        compares();
    else if (!strcmp(what, "searches"))
        searches();
    else if (!strcmp(what, "calls"))
        calls();
    else
        copies(what);
    printf("%u\n", checks);
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver(compile_c, tmp_path_factory) -> str:
    own = tmp_path_factory.mktemp("own") / "freestanding.o"
    subprocess.run(["cc", *FLAGS, "-c", WARDEN / "freestanding.c", "-o", own], check=True)
    subprocess.run(["objcopy", "--prefix-symbols=own_", own], check=True)
    return str(compile_c(DRIVER, own, "-fno-pie", "-no-pie", "-fno-builtin", "-Wno-nonnull"))


@pytest.mark.parametrize("what", ["memcpy", "memmove", "memset", "compares", "searches", "calls"])
def test_as_the_libc_does(driver, what):
    done = subprocess.run([driver, what], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert int(done.stdout) > 0
