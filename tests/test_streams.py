"""Pipes on the loop, where the kernel decides what a read gives: real pipes, a real loop."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

import pytest

from proctree import loop
from proctree.output import PENDING_MAX, REST_MAX, PullSink
from proctree.process import fds
from proctree.streams import CALLBACK_CHUNK, CALLBACKS_PER_TURN, PIPE_SIZE, OutputStream, widen

DEADLINE = 30.0


class Piped:
    """A stream whose write end we hold, as somebody outside a tree might."""

    def __init__(self, size: int) -> None:
        reader, self.writer = os.pipe()
        widen(reader)
        self.ended = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.sink = PullSink(self.arrived.release)
        os.write(self.writer, bytes(size))
        fds.own(reader)
        self.stream = OutputStream(loop.get(), reader, self.sink, self.ended.set)
        self.sink.attach(self.stream.resume)

    def on_loop(self, job: object) -> None:
        """Runs it there, and returns when it has run."""
        done = threading.Event()
        loop.get().post(lambda: (job(), done.set()))  # type: ignore[operator]
        assert done.wait(DEADLINE)


@pytest.fixture
def closed() -> Iterator[list[Piped]]:
    piped: list[Piped] = []
    yield piped
    for each in piped:
        each.on_loop(each.stream.close)
        os.close(each.writer)


@pytest.mark.parametrize("less", [0, 1, CALLBACK_CHUNK - 1, CALLBACK_CHUNK])
def test_a_pipe_that_is_emptied_by_the_last_read_of_a_turn(less: int, closed: list[Piped]) -> None:
    """The tree is empty and somebody outside holds its pipe open: nothing more comes, and so epoll
    has nothing to tell either."""
    piped = Piped(CALLBACK_CHUNK * CALLBACKS_PER_TURN - less)
    closed.append(piped)
    piped.on_loop(lambda: (piped.stream.start(), piped.stream.drain()))
    assert piped.ended.wait(DEADLINE)


def test_a_stream_that_nobody_takes_stops_at_its_limit_and_goes_on(closed: list[Piped]) -> None:
    piped = Piped(PIPE_SIZE)
    closed.append(piped)
    piped.on_loop(piped.stream.start)
    most = PENDING_MAX // CALLBACK_CHUNK
    for _ in range(most):
        assert piped.arrived.acquire(timeout=DEADLINE)
    piped.on_loop(lambda: None)
    assert piped.sink.waiting == PENDING_MAX
    assert not piped.arrived.acquire(blocking=False)
    taken = 0
    while True:
        while piped.sink.ready:
            taken += len(piped.sink.take(CALLBACK_CHUNK))
        if taken == PIPE_SIZE:
            break
        assert piped.arrived.acquire(timeout=DEADLINE)
    assert not piped.ended.is_set()


def test_of_a_tree_that_has_ended_everything_is_read_whoever_takes_it(closed: list[Piped]) -> None:
    piped = Piped(PIPE_SIZE)
    closed.append(piped)
    piped.on_loop(piped.stream.start)
    piped.on_loop(piped.stream.drain)
    assert piped.ended.wait(DEADLINE)
    assert piped.sink.waiting == PIPE_SIZE <= REST_MAX
    assert len(piped.sink.take(2 * PIPE_SIZE)) == PIPE_SIZE


@pytest.mark.parametrize("drained", [False, True])
def test_what_there_is_no_memory_to_read_is_read_later(
    drained: bool, closed: list[Piped], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs none for a pipe today; nothing of the output may depend on that."""
    refused: list[int] = []
    read = os.read

    def refusing(fd: int, size: int) -> bytes:
        if fd == piped.stream._fd and len(refused) < 3:
            refused.append(fd)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return read(fd, size)

    monkeypatch.setattr("proctree.streams.os.read", refusing)
    piped = Piped(1000)
    closed.append(piped)
    piped.on_loop(lambda: (piped.stream.start(), drained and piped.stream.drain()))
    assert piped.arrived.acquire(timeout=DEADLINE)
    assert len(refused) == 3
    assert len(piped.sink.take(CALLBACK_CHUNK)) == 1000
    assert piped.ended.wait(DEADLINE if drained else 0) is drained
