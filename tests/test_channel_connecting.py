"""How a connection is got, and how its descriptors go: as soon as nobody uses them."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from tests.channel_ends import DEADLINE, Ends, eventually, warm

from proctree.channel import Channel, ChannelClosed, Server, handle, rendezvous

__all__ = ["warm"]

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """We are the tree, too."""
    server = Server()
    server.handle("Echo", lambda request, _caller: request["key"], inline=True)
    with Ends(server) as ends:
        inode = ends.variable.partition(b":")[2].decode()
        monkeypatch.setenv("PROCTREE_CHANNEL", f"{ends.door.fileno()}:{inode}")
        os.set_inheritable(ends.door.fileno(), True)
        yield ends


def echo(key: str) -> dict[str, str]:
    return {"type": "Echo", "key": key}


def test_nothing_of_it_outlives_an_exec(ends: Ends) -> None:
    with Channel.connect() as channel:
        assert not os.get_inheritable(channel.fileno())
        assert not os.get_inheritable(handle())
        code = "import os; print(sorted(os.listdir('/proc/self/fd'), key=int))"
        argv = [sys.executable, "-c", code]
        seen = subprocess.run(argv, close_fds=False, capture_output=True, text=True, check=True)
        for fd in (channel.fileno(), handle()):
            assert f"'{fd}'" not in seen.stdout


def test_an_answer_to_one_who_has_gone_is_passed_over(ends: Ends) -> None:
    ends.door.send(b"g" * 16)
    with Channel.connect(timeout=DEADLINE) as channel:
        assert channel.request(echo("mine"), timeout=DEADLINE) == "mine"
        eventually(lambda: len(ends.lanes) == 1, "the other connection has ended")


def test_a_supervisor_that_does_not_answer() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROCTREE_CHANNEL", f"{ours.fileno()}:{os.fstat(ours.fileno()).st_ino}")
        with pytest.raises(TimeoutError, match="did not answer"):
            Channel.connect(timeout=0.01)


def test_a_supervisor_that_has_gone() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROCTREE_CHANNEL", f"{ours.fileno()}:{os.fstat(ours.fileno()).st_ino}")
        with pytest.raises(ChannelClosed, match="is gone"):
            Channel.connect(timeout=DEADLINE)


def test_another_process_that_connects_at_the_same_time_is_waited_for(ends: Ends) -> None:
    """It would be the one that receives the answer."""
    reader, writer = os.pipe()
    go_on, their_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(their_end)
            fcntl.lockf(ends.door.fileno(), fcntl.LOCK_EX)
            os.write(writer, b"x")
            os.read(go_on, 1)
        finally:
            os._exit(0)
    os.read(reader, 1)
    with pytest.raises(TimeoutError):
        Channel.connect(timeout=0.05)
    os.close(their_end)
    with Channel.connect(timeout=DEADLINE) as channel:
        assert channel.request(echo("mine"), timeout=DEADLINE) == "mine"
    os.waitpid(pid, 0)
    for fd in (reader, writer, go_on):
        os.close(fd)


def test_a_signal_handler_that_connects_in_the_middle_does_not_let_others_in(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim on a file ends when any descriptor of it is closed, or anybody lets it go."""
    exchange = rendezvous._exchange
    inner: list[Channel] = []
    others: list[bool] = []

    def may_others() -> bool:
        pid = os.fork()
        if pid == 0:
            try:
                fcntl.lockf(ends.door.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os._exit(1)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0

    def interrupted(*arguments: Any) -> Any:
        if not inner:
            inner.append(None)  # type: ignore[arg-type]
            inner[0] = Channel.connect(timeout=DEADLINE)
            others.append(may_others())
        return exchange(*arguments)

    monkeypatch.setattr(rendezvous, "_exchange", interrupted)
    with Channel.connect(timeout=DEADLINE) as channel, inner[0]:
        assert channel.request(echo("outer"), timeout=DEADLINE) == "outer"
        assert inner[0].request(echo("inner"), timeout=DEADLINE) == "inner"
    assert others == [False]
    assert may_others()


# -- the descriptors after the end


def descriptors() -> set[int]:
    # The one by which they are listed is gone when it is looked at.
    return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def test_they_go_at_once_when_nobody_waits(ends: Ends) -> None:
    before = descriptors()
    channel = Channel.connect()
    channel.request(echo("a"))
    servers = {lane._fd for lane in ends.lanes}  # which go when its thread sees the end
    channel.close()
    assert channel.fileno() == -1
    assert descriptors() <= before | servers
    channel.close()
    with pytest.raises(ChannelClosed):
        channel.request(echo("b"))


def test_they_go_with_the_last_thread_that_waits(ends: Ends) -> None:
    channel = Channel.connect()
    ended: list[type[BaseException]] = []

    def wait() -> None:
        try:
            while True:
                channel.request(echo("a"))
        except ChannelClosed as error:
            ended.append(type(error))

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    channel.listen(lambda _message: None)
    channel.close()
    for thread in threads:
        thread.join(DEADLINE)
    assert ended == [ChannelClosed] * 4
    eventually(lambda: channel.fileno() == -1, "the descriptor has gone")


def test_they_go_when_an_event_loop_has_let_go(ends: Ends) -> None:
    async def ask() -> Channel:
        channel = Channel.connect()
        assert await channel.arequest(echo("a")) == "a"
        return channel

    async def inside() -> None:
        channel = await ask()
        channel.close()
        assert channel.fileno() == -1
        with pytest.raises(ChannelClosed):
            await channel.arequest(echo("b"))

    async def from_outside() -> None:
        channel = await ask()
        await asyncio.to_thread(channel.close)
        while channel.fileno() != -1:
            await asyncio.sleep(0.001)

    asyncio.run(inside())
    asyncio.run(from_outside())
    channel = asyncio.run(ask())
    channel.close()
    assert channel.fileno() == -1


def test_they_go_when_trio_has_let_go(ends: Ends) -> None:
    async def run() -> None:
        channel = Channel.connect()
        assert await channel.arequest(echo("a")) == "a"
        channel.close()
        while channel.fileno() != -1:
            await trio.sleep(0.001)
        with pytest.raises(ChannelClosed):
            await channel.arequest(echo("b"))

    trio.run(run)


def test_they_go_with_a_channel_that_nobody_closed(ends: Ends) -> None:
    channel = Channel.connect()
    number = channel.fileno()
    del channel
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
