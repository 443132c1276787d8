"""Who a process is, by /proc: the two parsers of /proc/PID/stat, in Python and in C, and what is
built on the one in Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helper_sources import SANITIZE, WARDEN
from proctree.process import proof
from proctree.process.proof import Stat, parse_stat

PARSERS_C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "warden.h"

/* A copy that ends where the text ends, so that reading behind it is noticed. */
static char *exact(const char *text, size_t length)
{
    char *copy = malloc(length ? length : 1);
    memcpy(copy, text, length);
    return copy;
}

static void show_stat(const char *text, size_t length)
{
    struct process p;
    char *copy = exact(text, length);
    bool known = parse_stat(copy, length, &p);
    free(copy);
    if (!known) {
        printf("null\n");
        return;
    }
    printf("[%d, %d, %d, %d, %d, %lu, %ld, %llu, %lu, [", p.pid, p.state, p.ppid, p.pgrp,
           p.session, p.flags, p.threads, p.start_time, p.pending);
    for (size_t i = 0; i < strlen(p.comm); i++)
        printf("%s%d", i ? ", " : "", (unsigned char)p.comm[i]);
    printf("]]\n");
}

/* As add_children() in tree.c does it: what was not understood is kept for the next piece. */
static void show_children(const char *text, size_t length, size_t split, size_t capacity)
{
    size_t held = 0, first = 1;
    char *rest = malloc(length + 1);
    pid_t *pids = malloc(capacity * sizeof *pids);
    printf("[");
    for (int piece = 0; piece < 3; piece++) {
        size_t from = piece == 0 ? 0 : piece == 1 ? split : length;
        size_t to = piece == 0 ? split : length;
        memcpy(rest + held, text + from, to - from);
        held += to - from;
        size_t count, used;
        do {
            char *copy = exact(rest, held);
            count = parse_children(copy, held, piece == 2, pids, capacity, &used);
            free(copy);
            for (size_t i = 0; i < count; i++, first = 0)
                printf("%s%d", first ? "" : ", ", pids[i]);
            memmove(rest, rest + used, held - used);
            held -= used;
        } while (count == capacity);
    }
    printf("]\n");
    free(rest);
    free(pids);
}

/* Records of: kind, capacity, length, text. For stat, every prefix of the text is tried; for
 * children, every point at which it may be split. */
int main(void)
{
    unsigned head[3];
    while (fread(head, sizeof head, 1, stdin) == 1) {
        char *text = malloc(head[2] + 1);
        if (fread(text, 1, head[2], stdin) != head[2])
            return 2;
        for (size_t at = 0; at <= head[2]; at++) {
            if (head[0] == 's')
                show_stat(text, at);
            else
                show_children(text, head[2], at, head[1]);
        }
        free(text);
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver(compile_c) -> str:
    return str(compile_c(PARSERS_C, WARDEN / "proc.c", WARDEN / "system.c", *SANITIZE))


def ask(driver: str, kind: str, texts: list[bytes], capacity: int = 0) -> list[list[object]]:
    """For each text, the driver's answer at every point of it."""
    data = b""
    for text in texts:
        head = (ord(kind), capacity, len(text))
        data += b"".join(value.to_bytes(4, sys.byteorder) for value in head) + text
    done = subprocess.run([driver], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    answers: Iterator[object] = map(json.loads, done.stdout.splitlines())
    result = [[next(answers) for _ in range(len(text) + 1)] for text in texts]
    assert next(answers, None) is None
    return result


def stat_text(
    name: bytes,
    *,
    pid: int = 4711,
    state: bytes = b"S",
    family: tuple[int, int, int] = (1, 2, 3),
    flags: int = 0x400040,
    threads: int = 5,
    start_time: int = 99,
    pending: int = 0,
) -> bytes:
    """As the kernel writes it (proc(5)): 52 fields and a newline."""
    fields: list[int] = [*family, 34816, -1, flags]
    fields += [0] * (17 - 1 - len(fields)) + [threads, 0, start_time]
    fields += [2**64 - 1] * (28 - 1 - len(fields)) + [pending]
    fields += [0] * (49 - len(fields))
    numbers = b" ".join(b"%d" % field for field in fields)
    return b"%d (%s) %s %s\n" % (pid, name, state, numbers)


NAMES = [
    b"cat",
    b"a b",
    b") S 1 2 3",
    b"((((",
    b"))))",
    b"a) (b",
    b"line\nbreak",
    b"fifteen bytes..",
    b"kworker/u16:3-events_unbound",
    b"\xff\xfe",
    b"\xc3",
    b"",
]
names = st.binary(max_size=20).map(lambda name: name.replace(b"\0", b"?"))
stats = st.builds(
    stat_text,
    names,
    pid=st.integers(1, 2**22),
    state=st.sampled_from([b"R", b"S", b"D", b"Z", b"T", b"t", b"X"]),
    family=st.tuples(st.integers(0, 2**22), st.integers(0, 2**22), st.integers(0, 2**22)),
    flags=st.integers(0, 2**32 - 1),
    threads=st.integers(0, 2**22),
    start_time=st.integers(0, 2**64 - 1),
    pending=st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_may_be_anything(name):
    assert parse_stat(stat_text(name)) == Stat(
        pid=4711,
        name=name.decode("utf-8", "replace"),
        state="S",
        ppid=1,
        pgrp=2,
        session=3,
        threads=5,
        start_time=99,
    )


@given(stats, st.data())
def test_what_is_cut_off_is_not_half_believed(text, data):
    """Nothing up to the start time may be missing; a number that is cut itself cannot be told from
    a whole one, but read(2) gives all of a stat or nothing."""
    whole = parse_stat(text)
    assert whole is not None
    end = len(text) - len(text[text.rindex(b")") + 2 :].split(b" ", 19)[19])
    assert parse_stat(text[: data.draw(st.integers(0, end))]) is None


@given(st.binary(max_size=80))
@example(b"")
@example(b")(")
@example(b"1 (a) ")
@example(b"x (a) S " + b"1 " * 50)
@example(b"1 (a) S " + b"x " * 50)
def test_garbage_is_nobody(data):
    assert parse_stat(data) is None


@pytest.mark.parametrize(
    ("state", "threads", "dead"),
    [("Z", 1, True), ("Z", 2, False), ("X", 1, True), ("x", 0, True), ("S", 1, False)],
)
def test_a_zombie_whose_threads_run_is_not_dead(state, threads, dead):
    assert Stat(1, "a", state, 1, 1, 1, threads, 1).dead is dead


# -- the two parsers


def as_c(stat: Stat | None, name: bytes) -> list[object] | None:
    """What C knows too."""
    if stat is None:
        return None
    family = [stat.ppid, stat.pgrp, stat.session]
    return [stat.pid, ord(stat.state), *family, stat.threads, stat.start_time, list(name[:15])]


def name_in(text: bytes) -> bytes:
    return text[text.find(b"(") + 1 : text.rfind(b")")]


def compare(driver: str, texts: list[bytes]) -> None:
    for text, answers in zip(texts, ask(driver, "s", texts), strict=True):
        assert answers[-1] is not None
        for at, answer in enumerate(answers):
            part = text[:at]
            expected = as_c(parse_stat(part), name_in(part))
            # C also reads what is pending, nine fields further on.
            if answer is not None:
                *before, flags, threads, start_time, pending, comm = answer  # type: ignore[misc]
                assert [*before, threads, start_time, comm] == expected
                assert (flags, pending) == pending_in(part)
            elif expected is not None:
                assert len(part[part.rindex(b")") + 2 :].split()) < 29


def pending_in(text: bytes) -> tuple[int, int]:
    fields = text[text.rindex(b")") + 2 :].split()
    return int(fields[6]), int(fields[28])


def test_c_reads_every_prefix_as_python_does(driver):
    compare(driver, [stat_text(name) for name in NAMES])


@given(st.lists(stats, min_size=1, max_size=5))
def test_c_reads_anything_as_python_does(driver, texts):
    compare(driver, texts)


@given(st.lists(st.binary(max_size=60), max_size=20))
@example([b")", b"(", b"1 (", b"1 (a)", b"1 (a) ", b"1 (a) S", b"1 (a) S ", b"1 (a)S 1", b") ("])
def test_c_survives_garbage(driver, texts):
    for answers in ask(driver, "s", texts):
        assert set(answers) == {None}


@given(
    st.lists(st.integers(1, 4 * 1024 * 1024), max_size=12),
    st.integers(1, 4),
    st.sampled_from([b"", b" "]),
)
@example([1, 22, 333, 4194304], 2, b" ")
@example([], 1, b"")
def test_children_are_the_same_wherever_they_are_split(driver, pids, capacity, end):
    """proc(5) ends the list with a blank; it does no harm if it does not."""
    text = b" ".join(b"%d" % pid for pid in pids) + end
    (answers,) = ask(driver, "c", [text], capacity)
    assert answers == [pids] * (len(text) + 1)


def test_children_that_no_process_can_be_are_left_out(driver):
    (answers,) = ask(driver, "c", [b"0 5 4194305 -7 99999999999 6 "], 8)
    assert answers == [[5, 6]] * len(answers)


@given(st.binary(max_size=40))
def test_children_survive_garbage(driver, text):
    (answers,) = ask(driver, "c", [text], 3)
    assert all(0 < pid <= 4 * 1024 * 1024 for answer in answers for pid in answer)


def test_c_reads_the_real_thing(driver):
    text = open("/proc/self/stat", "rb").read()  # noqa: SIM115
    answer = ask(driver, "s", [text])[0][-1]
    assert answer[0] == os.getpid()
    assert bytes(answer[-1]) == name_in(text)


# -- the environment


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (b"PROCTREE_TREE=abc\0", True),
        (b"A=1\0PROCTREE_TREE=xyz/abc/def\0B=2\0", True),
        (b"PROCTREE_TREE=xyz/abc", True),
        (b"PROCTREE_TREE=abcd\0", False),
        (b"PROCTREE_TREE=xyz\0", False),
        (b"MY_PROCTREE_TREE=abc\0", False),
        (b"A=PROCTREE_TREE=abc\0", False),
        (b"PROCTREE_TREE\0", False),
        (b"PROCTREE_TREE=\0abc\0", False),
        (b"", False),
    ],
)
def test_in_environ(environ, found):
    assert proof.in_environ(environ, b"PROCTREE_TREE", b"abc") is found


# -- real processes


def test_read_stat_of_ourselves():
    stat = proof.read_stat(os.getpid())
    assert stat is not None
    assert (stat.pid, stat.ppid) == (os.getpid(), os.getppid())
    assert (stat.pgrp, stat.session) == (os.getpgid(0), os.getsid(0))
    assert not stat.dead


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """A child and its child."""
    code = (
        "import os, sys\n"
        "pid = os.fork()\n"
        "if pid: print(pid, flush=True)\n"
        "sys.stdin.read()\n"
        "if pid: os.waitpid(pid, 0)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    yield child.pid, int(child.stdout.readline())
    child.communicate()


def test_is_below_knows_descendants_from_others(family):
    child, grandchild = family
    us = os.getpid()
    assert proof.is_below(child, us)
    assert proof.is_below(grandchild, us)
    assert proof.is_below(grandchild, child)
    assert not proof.is_below(child, grandchild)
    assert not proof.is_below(child, child)
    assert not proof.is_below(os.getppid(), us)
    assert not proof.is_below(us, child)


def test_is_below_leaves_no_descriptor_and_climbs_only_so_far(family, monkeypatch):
    child, grandchild = family
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(proof, "CLIMB_MAX", 0)
    assert proof.is_below(child, os.getpid())
    assert not proof.is_below(grandchild, os.getpid())
    assert os.listdir("/proc/self/fd") == before


def test_a_process_that_is_gone_is_nobody():
    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    try:
        zombie = proof.read_stat(child.pid)
        assert zombie is not None
        assert zombie.dead
        assert proof.holds_number(pidfd)  # until it is reaped
        child.wait()
        assert not proof.holds_number(pidfd)
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, 0)
    finally:
        os.close(pidfd)


def test_numbers_that_no_process_has():
    beyond = 2**22 + 1
    assert proof.read_stat(beyond) is None
    assert proof.open_pidfd(beyond) is None
    assert proof.read_environ(beyond) is None
    assert not proof.is_below(beyond, os.getpid())
