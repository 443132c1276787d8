"""Trees that abuse their channel: others are answered meanwhile, and nothing of it stays."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, Lines, eventually
from proctree import WatchedSubprocess
from proctree.channel import Channel, Message, Server, tasks
from proctree.channel.passed import SO_PASSRIGHTS
from proctree.channel.server import _channel_loop


class Ask(Message):
    key: str


class Reply(Message):
    key: str


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What the first use makes is the process's and no test's."""
    _channel_loop()
    tasks.loop()


def echoing(**options: Any) -> Server:
    server = Server(**options)
    server.handle(Ask, lambda request, _: Reply(request.key))
    return server


BEGINNING = """
import os, socket, struct, sys, threading, time
import msgspec
from proctree.channel import Channel, handle
def frame(value):
    body = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return struct.pack(">I", len(body)) + body
def ask(key):
    return {"type": "Ask", "key": key}
def stream():
    channel = Channel.connect()
    sock = socket.socket(fileno=os.dup(channel.fileno()))
    sock.setblocking(False)
    kept.append(channel)
    return sock
def offer(sock, data):
    sent = 0
    try:
        while sent < len(data):
            sent += sock.send(data[sent : sent + 65536])
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    return sent
def wait(sock):
    import select
    select.select([sock], [], [])
kept = []
def done():
    os.write(1, b"done\\n")
    time.sleep(3600)
"""

HOSTILE = {
    "reads no answers": "s = stream(); offer(s, frame([1, ask('x' * 1000)]) * 5000); done()",
    "half a frame": "s = stream(); offer(s, frame([1, ask('x')])[:-3]); done()",
    "4 GiB": """
s = stream()
offer(s, b"\\xff" * 4 + b"\\x92\\x01" + b"x" * (8 << 20))
done()""",
    "tiny frames": """
s = stream()
for _ in range(50):
    offer(s, frame(b"\\x91") * 20000)
    try:
        while s.recv(1 << 20): pass
    except BlockingIOError: pass
done()""",
    "deep": """
s = stream()
for kind in (b"\\x91", b"\\x81\\x01", b"\\x81\\xa1a"):
    offer(s, frame(b"\\x92\\x01" + kind * 100000))
done()""",
    "sizes": """
s = stream()
for tag in (b"\\xdd", b"\\xdf", b"\\xc9", b"\\xdb", b"\\xc6"):
    offer(s, frame(b"\\x92\\x01" + tag + b"\\xff\\xff\\xff\\xff"))
done()""",
    "ids": """
s = stream()
for number in (-1, 2**64 - 1, 0, "x", 1.5, None, [1]):
    offer(s, frame([number, ask('x')]) + frame([number]) + frame([number, 1, 2, 3, 4]))
done()""",
    "descriptors": """
s = stream()
s.setblocking(True)
r, w = os.pipe()
try:
    for n in range(200):
        socket.send_fds(s, [frame([n, ask('x')])], [w] * 16)
        s.recv(1 << 16)
except PermissionError: pass  # SO_PASSRIGHTS
door = socket.socket(fileno=os.dup(handle()))
try: socket.send_fds(door, [b"n" * 16], [w] * 16)
except PermissionError: pass
done()""",
    "connections": """
try:
    while True: kept.append(Channel.connect())
except Exception as error:
    assert "already" in str(error), error
assert len(kept) == 32
done()""",
    "the door": """
door = socket.socket(fileno=os.dup(handle()))
door.setblocking(False)
for n in range(20000):
    try: door.send(b"n" * (n % 40 or 16))
    except BlockingIOError: pass
done()""",
    "closes in the middle": """
for n in range(100):
    channel = Channel.connect()
    s = socket.socket(fileno=os.dup(channel.fileno()))
    s.send(frame([1, ask('x')])[: n % 20])
    if n % 3: s.shutdown(n % 3 - 1)
    s.close(); channel.close(); del channel
done()""",
    "long frames": """
s, t = stream(), stream()
offer(s, frame([1, ask('x' * (40 << 20))])[:-1])
offer(t, frame([1, ask('x' * (40 << 20))])[:-1])
done()""",
}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", BEGINNING + code]


ASKER = """
with Channel.connect() as channel:
    for line in sys.stdin:
        for n in range(20):
            key = f"{line.strip()} {n}"
            answer = channel.request(ask(key), timeout=25)
            assert answer == {"type": "Reply", "key": key}, answer
        os.write(1, b"answered\\n")
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_others_are_answered_and_nothing_stays(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "proctree")
    server = echoing()
    reader, writer = os.pipe()
    others, hostile = Lines(), Lines()
    with WatchedSubprocess.start(
        python(ASKER), channel=server, stdin=reader, stdout=proctree.Lines(others), kill=QUICK
    ):
        os.close(reader)
        os.write(writer, b"before\n")
        others.wait_for(1)
        fds, memory = len(os.listdir("/proc/self/fd")), psutil.Process().memory_info().rss
        with WatchedSubprocess.start(
            python(HOSTILE[name]), channel=server, stdout=proctree.Lines(hostile), kill=QUICK
        ) as tree:
            os.write(writer, b"meanwhile\n")
            others.wait_for(2)
            assert hostile.wait_for() == ["done"]
            os.write(writer, b"afterwards\n")
            others.wait_for(3)
            served = tree._served
            assert served is not None
            assert len(served._lanes) <= 32
            assert len(os.listdir("/proc/self/fd")) < fds + 50
            assert psutil.Process().memory_info().rss < memory + (200 << 20)
        eventually(lambda: not served._under_way and not served._lanes, "all of it has ended")
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= fds, "no descriptor is left")
        os.close(writer)
    told = [record.getMessage() for record in caplog.records]
    assert not [line for line in told if line.startswith("loop.defect")], told
    assert len(told) < 60
    assert all(len(line) < 5000 for line in told)
    assert threading.active_count() < 60


# -- who has the channel, and who has not

GRANDCHILD = """
from proctree.channel import Channel, ChannelUnavailable
try:
    with Channel.connect() as channel:
        print(channel.request({"type": "Ask", "key": "grandchild"}, timeout=25)["key"])
except ChannelUnavailable as error:
    print("pass_fds=[proctree.channel.handle()]" in str(error))
"""


def test_in_every_containment_and_only_who_was_handed_it(containment: str) -> None:
    code = f"""
import subprocess
with Channel.connect() as channel:
    print(channel.request(ask("child"), timeout=25)["key"], flush=True)
code = {GRANDCHILD!r}
subprocess.run([sys.executable, "-c", code], check=True)
subprocess.run([sys.executable, "-c", code], check=True, pass_fds=[handle()])
"""
    lines = Lines()
    outcome = proctree.run(
        python(code),
        channel=echoing(),
        containment=containment,
        stdout=proctree.Lines(lines),
        kill=QUICK,
    )
    assert outcome.ok
    assert lines.wait_for(3) == ["child", "True", "grandchild"]


def test_a_callable_asks(containment: str) -> None:
    reader, writer = os.pipe()

    def child() -> None:
        with Channel.connect() as channel:
            os.write(writer, channel.request(Ask("callable"), timeout=25)["key"].encode())

    outcome = proctree.run(
        child, channel=echoing(), containment=containment, pass_fds=[writer], kill=QUICK
    )
    os.close(writer)
    assert outcome.ok
    assert os.read(reader, 100) == b"callable"
    os.close(reader)


def test_another_file_at_the_number_is_not_touched(tmp_path: Path) -> None:
    code = """
fd = handle()
other = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.dup2(other, fd)
os.set_inheritable(fd, True)
try:
    Channel.connect()
except Exception as error:
    assert "another file" in str(error), error
    assert os.get_inheritable(fd) and os.fstat(fd).st_ino == os.fstat(other).st_ino
    os.write(1, type(error).__name__.encode() + b"\\n")
"""
    lines = Lines()
    path = tmp_path / "file"
    outcome = proctree.run(
        [*python(code), str(path)], channel=echoing(), stdout=proctree.Lines(lines), kill=QUICK
    )
    assert outcome.ok
    assert lines.wait_for() == ["ChannelUnavailable"]
    assert path.read_bytes() == b""


def test_without_a_channel_it_is_said_what_to_do() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PROCTREE_CHANNEL"}
    code = "from proctree.channel import Channel; Channel.connect()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "ChannelUnavailable" in done.stderr
    assert "channel=" in done.stderr


def test_a_signal_handler_may_notify() -> None:
    import signal

    server = echoing()
    lines = Lines()
    code = """
heard = threading.Event()
with Channel.connect() as channel:
    channel.listen(lambda message: (os.write(1, message.encode() + b"\\n"), heard.set()))
    os.write(1, b"listening\\n")
    heard.wait(25)
"""
    with WatchedSubprocess.start(
        python(code), channel=server, stdout=proctree.Lines(lines), kill=QUICK
    ) as tree:
        lines.wait_for()
        before = signal.signal(signal.SIGUSR1, lambda *_: tree.notify("signalled"))
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert lines.wait_for(2) == ["listening", "signalled"]
        outcome = tree.wait(DEADLINE)
        assert outcome is not None
        assert outcome.ok


LINGERING = """
listener = socket.create_server(("127.0.0.1", 0))
linger = socket.create_connection(listener.getsockname())
kept = [listener, listener.accept()]
linger.setblocking(False)
try:
    while True:
        linger.send(bytes(65536))
except BlockingIOError:
    pass
linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1000))
channel = Channel.connect()
refused = []
for number in (channel.fileno(), handle()):
    with socket.socket(fileno=os.dup(number)) as sock:
        try:
            socket.send_fds(sock, [b"x"], [linger.fileno()])
        except PermissionError:
            refused.append("refused")
os.write(1, (" ".join(refused) + chr(10)).encode())
time.sleep(1000)
"""


def test_a_socket_that_takes_a_thousand_seconds_to_close_is_not_taken() -> None:
    """The loop would close it, and no channel would be served meanwhile: take_none()."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError as error:
            pytest.skip(f"the kernel has no SO_PASSRIGHTS: {error}")
    lines = Lines()
    argv = [sys.executable, "-c", BEGINNING + LINGERING]
    with WatchedSubprocess.start(argv, channel=echoing(), stdout=proctree.Lines(lines), kill=QUICK):
        assert lines.wait_for() == ["refused refused"]
        assert proctree.run(asks_once, channel=echoing()).ok


def asks_once() -> None:
    with Channel.connect() as channel:
        assert channel.request(Ask("x"), timeout=DEADLINE)["key"] == "x"
