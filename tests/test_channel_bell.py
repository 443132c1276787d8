"""A bell may be rung in the middle of anything, and closed in the middle of ringing."""

from __future__ import annotations

import itertools
import os
import select
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest
from tests.channel_ends import DEADLINE

from proctree.channel.bell import Bell


def interrupted(code: CodeType, number: int, then: Callable[[], object]) -> Any:
    """A trace function that calls `then` before instruction `number` of a call of `code`."""
    seen = itertools.count()

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(seen) == number:
            then()
        return trace

    return trace


def ring_interrupted(bell: Bell, number: int, then: Callable[[], object]) -> bool:
    """Whether it had so many instructions."""
    happened = []

    def note() -> None:
        happened.append(True)
        then()

    before = sys.gettrace()
    sys.settrace(interrupted(Bell.ring.__code__, number, note))
    try:
        bell.ring()
    finally:
        sys.settrace(before)
    return bool(happened)


def in_thread(function: Callable[[], object]) -> None:
    """Returns when it has."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "it is kept waiting"


def is_rung(bell: Bell) -> bool:
    return bool(select.select([bell.fd], [], [], 0)[0])


def test_who_is_interrupted_while_it_rings_keeps_nobody_from_ringing() -> None:
    """A signal handler that asks waits for an answer, and who delivers it rings before."""
    bell = Bell()
    for number in itertools.count():
        if not ring_interrupted(bell, number, lambda: in_thread(bell.ring)):
            break
        assert is_rung(bell)
        bell.silence()
    assert number > 3
    bell.close()


def test_one_that_is_closed_while_it_rings_rings_no_other_file() -> None:
    for number in itertools.count():
        bell = Bell()
        others: list[int] = []

        def close(bell: Bell = bell, others: list[int] = others) -> None:
            in_thread(bell.close)
            others.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

        happened = ring_interrupted(bell, number, close)
        for other in others:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(other)
            os.close(other)
        bell.close()
        if not happened:
            break
    assert number > 3


def test_it_is_silent_until_it_rings_again() -> None:
    bell = Bell()
    assert not is_rung(bell)
    bell.ring()
    bell.ring()
    assert is_rung(bell)
    bell.silence()
    bell.silence()
    assert not is_rung(bell)
    bell.close()


def test_a_closed_one_does_nothing() -> None:
    bell = Bell()
    bell.close()
    with pytest.raises(OSError):
        os.fstat(bell.fd)
    other = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    assert other == bell.fd
    bell.ring()
    bell.silence()
    bell.close()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)


def test_in_a_forked_child_it_closes_nothing() -> None:
    bell = Bell()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open(os.devnull, "rb") as file:
                os.dup2(file.fileno(), bell.fd)  # it is closed there, and the number free
            bell.close()
            os.fstat(bell.fd)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    bell.close()
