"""sd_notify(3) with real trees: who is heard, who is not, and what a tree can do to us by it."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, available, eventually
from integration.test_other_users import NOBODY
from proctree import SpawnAttributes, WatchedSubprocess, notify
from proctree import loop as loop_module
from proctree.containment import NAMES
from proctree.process import proof
from proctree.supervisor import notify_directory, notify_socket
from proctree.supervisor.notification import DATAGRAM_MAX, Notification
from proctree.supervisor.notify_socket import NotifySocket
from proctree.supervisor.watchdog import Watchdog

T = TypeVar("T")


def on_loop(function: Callable[[], T]) -> T:
    future: Future[T] = Future()

    def job() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    loop_module.get().post(job)
    return future.result(DEADLINE)


@contextlib.contextmanager
def held_loop() -> Iterator[None]:
    """The loop is busy with something else, and nothing is read."""
    entered, release = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        release.wait(DEADLINE)

    loop_module.get().post(hold)
    assert entered.wait(DEADLINE)
    try:
        yield
    finally:
        release.set()


class Listener:
    """A tree, and what it says."""

    def __init__(
        self,
        target: Any,
        containment: str = "warden",
        *,
        reachable: bool = False,
        watchdog: float | None = None,
        is_member: Callable[[int], bool] | None = None,
        received: Callable[[Notification], None] | None = None,
        **options: Any,
    ) -> None:
        self.got: queue.Queue[Notification] = queue.Queue()
        self.gone: queue.Queue[int | None] = queue.Queue()
        self.socket = NotifySocket(
            loop_module.get(),
            "a tree",
            "test",
            is_member or self.has_member,
            received or self.got.put,
            main_gone=self.gone.put,
            reachable=reachable,
        )
        variables = os.environ | self.socket.environment(watchdog)
        self.handle = WatchedSubprocess(
            target, containment=containment, env=variables, kill=QUICK, **options
        )
        self.handle.launch()

    def has_member(self, pid: int) -> bool:
        return self.handle._tree.contained.has_member(pid)

    def next(self) -> Notification:
        return self.got.get(timeout=DEADLINE)

    def send_as_stranger(self, *assignments: str) -> None:
        """A process of ours that is none of the tree's, and that waits until it was heard."""
        pid = os.fork()
        if pid == 0:
            os.environ["NOTIFY_SOCKET"] = self.socket.path
            os._exit(0 if notify.notify(*assignments) and notify.barrier(DEADLINE) else 1)
        assert os.waitpid(pid, 0)[1] == 0

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.handle.kill()
        assert self.handle.wait(60) is not None
        on_loop(self.socket.close)
        assert not os.path.exists(self.socket.path)


class Gate:
    """Something that a child waits for; or, the other way round, that we wait for."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def open(self) -> None:
        os.write(self.writer, b"x")

    def wait(self) -> None:
        ready, _, _ = select.select([self.reader], [], [], DEADLINE)
        assert ready
        assert os.read(self.reader, 1) == b"x"

    @property
    def fds(self) -> tuple[int, int]:
        return self.reader, self.writer

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    made = [Gate(), Gate()]
    yield made
    for gate in made:
        gate.close()


def all_of(gates: list[Gate]) -> list[int]:
    return [fd for gate in gates for fd in gate.fds]


OPENED = "warden, pidfds opened"


@pytest.fixture(params=[*NAMES, OPENED])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The containment. Newer kernels send the sender's pidfd; on older ones, and for what comes
    with descriptors, it is opened."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sent = notify_socket._passes_pidfds(sock)
    if request.param == OPENED:
        if not sent:
            pytest.skip("here they always are (before Linux 6.5)")
        monkeypatch.setattr(notify_socket, "_passes_pidfds", lambda _sock: False)
        return available("warden")
    return available(str(request.param))


def pause() -> None:
    while True:
        signal.pause()


# -- who is heard


def test_the_main_process_is_heard(containment: str) -> None:
    def work() -> None:
        assert notify.ready("up")
        assert notify.watchdog_interval() == 2.5
        assert notify.barrier(DEADLINE)
        assert notify.notify("STATUS=", "WATCHDOG=1", "ERRNO=ENOENT")
        pause()

    with Listener(work, containment, watchdog=2.5) as tree:
        assert tree.next() == Notification(ready=True, status="up")
        assert tree.next() == Notification(status="", watchdog=True, errno=errno.ENOENT)
        assert tree.socket.refused == 0


FAR = (
    "import os; from proctree import notify\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    parent = os.getpid()\n"
    "    if os.fork() == 0:\n"
    "        while os.getppid() == parent: pass\n"
    "        notify.ready('far'); notify.barrier(60)\n"
    "    os._exit(0)\n"
    "os.wait()\n"
)


def test_a_daemon_is_heard(containment: str) -> None:
    """In a session of its own, and its parent is gone."""
    with Listener(["sh", "-c", '"$0" -c "$1"; sleep 60', sys.executable, FAR], containment) as tree:
        assert tree.next() == Notification(ready=True, status="far")


@pytest.mark.skipif(shutil.which("systemd-notify") is None, reason="there is no systemd-notify")
def test_systemd_notify(containment: str) -> None:
    script = "systemd-notify --ready --status='at work' && echo done; sleep 60"
    with Listener(["sh", "-c", script], containment) as tree:
        assert tree.next() == Notification(ready=True, status="at work")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare")
def test_from_another_network_namespace() -> None:
    """Abstract addresses end there: unix(7), network_namespaces(7)."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0:
        pytest.skip("no network namespace can be made here")
    code = "from proctree import notify; notify.ready(); notify.barrier(60)"
    with Listener(["unshare", "-n", sys.executable, "-c", code]) as tree:
        assert tree.next().ready


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("reachable", [True, False])
def test_a_tree_of_another_user(reachable: bool) -> None:
    def work() -> None:
        if not notify.ready():
            raise SystemExit(7)
        notify.barrier(DEADLINE)

    attributes = SpawnAttributes(uid=NOBODY, gid=NOBODY, groups=())
    with Listener(work, reachable=reachable, attributes=attributes) as tree:
        outcome = tree.handle.wait(DEADLINE)
        assert outcome is not None
        assert outcome.returncode == (0 if reachable else 7)
        assert tree.got.qsize() == (1 if reachable else 0)


# -- who is not


def test_a_stranger_is_refused(
    way: str, caplog: pytest.LogCaptureFixture, gates: list[Gate]
) -> None:
    def work() -> None:
        gates[0].wait()
        notify.ready()
        pause()

    with Listener(work, way, pass_fds=all_of(gates)) as tree:
        tree.send_as_stranger("READY=1", "STATUS=not mine", "MAINPID=1")
        assert tree.socket.refused == 1
        assert tree.got.empty()
        gates[0].open()
        assert tree.next() == Notification(ready=True)
    (event,) = (r.getMessage() for r in caplog.records if r.message.startswith("notify."))
    assert event.startswith("notify.stranger tree_id='a tree' name='test' sender=")


def test_nor_are_we_a_member(containment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor, init, and the warden, by way of what a privileged sender may claim to be."""
    with Listener(pause, containment) as tree:
        monkeypatch.setenv("NOTIFY_SOCKET", tree.socket.path)
        assert notify.ready()
        assert notify.barrier(DEADLINE)
        assert tree.socket.refused == 1
        eventually(lambda: tree.handle.pid is not None, "it runs")
        contained = tree.handle._tree.contained
        others = {1, os.getpid(), os.getppid(), contained.root()} - {contained.pid}
        for pid in others:
            assert pid is not None
            assert not on_loop(lambda pid=pid: contained.has_member(pid))
        assert on_loop(lambda: contained.has_member(contained.pid or 0))
        assert tree.got.empty()
    assert not on_loop(lambda: contained.has_member(contained.pid or 0))


@pytest.mark.parametrize("waits", [True, False])
def test_a_sender_that_has_ended(
    way: str,
    waits: bool,
    gates: list[Gate],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And was reaped before anybody looked who it was: nobody knows any more. One that waits at a
    barrier cannot have ended."""

    def work() -> None:
        gates[0].wait()
        pid = os.fork()
        if pid == 0:
            notify.status("from a child")
            if waits:
                gates[1].open()
                os._exit(0 if notify.barrier(DEADLINE) else 1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        gates[1].open()
        notify.notify("READY=1", f"EXIT_STATUS={os.waitstatus_to_exitcode(status)}")
        pause()

    with Listener(work, way, pass_fds=all_of(gates)) as tree:
        eventually(lambda: tree.handle.pid is not None, "it runs")
        with held_loop():
            gates[0].open()
            gates[1].wait()
        if waits:
            assert tree.next() == Notification(status="from a child")
        assert tree.next() == Notification(ready=True, exit_status=0)
        assert tree.socket.refused == (0 if waits else 1)
    events = [r.getMessage() for r in caplog.records if r.message.startswith("notify.")]
    assert len(events) == (0 if waits else 1)
    if events:
        assert events[0].startswith("notify.sender_gone ")
        assert "sd_notify_barrier(3)" in events[0]


def test_a_zombie_is_still_known(way: str, gates: list[Gate]) -> None:
    """Its parent has not reaped it, so its number is its own."""

    def work() -> None:
        gates[0].wait()
        pid = os.fork()
        if pid == 0:
            notify.status("last words")
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        gates[1].open()
        pause()

    with Listener(work, way, pass_fds=all_of(gates)) as tree:
        eventually(lambda: tree.handle.pid is not None, "it runs")
        with held_loop():
            gates[0].open()
            gates[1].wait()
        assert tree.next() == Notification(status="last words")


def test_by_its_cgroup_a_process_belongs(gates: list[Gate]) -> None:
    """As for systemd: somebody who was put there is part of it; who was moved out still descends
    from the warden."""
    available("cgroup")
    with Listener(["sleep", "60"], "cgroup") as tree:
        eventually(lambda: tree.handle.pid is not None, "it runs")
        contained: Any = tree.handle._tree.contained
        leaf = Path(contained.cgroup)
        stranger = subprocess.Popen(["sleep", "60"])
        try:
            assert not on_loop(lambda: contained.has_member(stranger.pid))
            (leaf / "cgroup.procs").write_text(str(stranger.pid))
            assert on_loop(lambda: contained.has_member(stranger.pid))
            (leaf / "below").mkdir()
            (leaf / "below" / "cgroup.procs").write_text(str(stranger.pid))
            assert on_loop(lambda: contained.has_member(stranger.pid))
            (leaf.parent / "cgroup.procs").write_text(str(contained.pid))
            assert on_loop(lambda: contained.has_member(contained.pid))
        finally:
            stranger.kill()
            stranger.wait()


# -- what is sent along


@pytest.mark.parametrize("count", [1, 2, 253])
def test_descriptors_are_closed(count: int) -> None:
    """Of every message, however many there are (SCM_MAX_FD is 253)."""

    def work() -> None:
        reader, writer = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [writer] * count))]
            sock.connect(os.environ["NOTIFY_SOCKET"])
            sock.sendmsg([b"READY=1\nFDNAME=x\nFDSTORE=1"], ancillary)
        os.close(writer)
        assert os.read(reader, 1) == b""
        notify.status("closed")
        pause()

    before = len(os.listdir("/proc/self/fd"))
    with Listener(work) as tree:
        told = tree.next()
        assert told.ready
        assert [refused.name for refused in told.refused] == ["FDSTORE"]
        assert tree.next() == Notification(status="closed")
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before, "descriptors are closed")


def send_what_lingers() -> socket.socket:
    """A connection whose close waits for a peer that does not read. Returns the peer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"x" * 65536)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30_000))
    with ours, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(sock, [b"STATUS=lingers"], [ours.fileno()])
    return peer


def test_a_descriptor_that_cannot_be_closed_holds_up_nobody(gates: list[Gate]) -> None:
    def work() -> None:
        gates[1].wait()
        peer = send_what_lingers()
        gates[0].open()
        gates[1].wait()
        peer.close()
        notify.ready()
        pause()

    def talk() -> None:
        assert notify.ready()
        assert notify.barrier(DEADLINE)
        notify.stopping()
        pause()

    with Listener(work, pass_fds=all_of(gates)) as tree:
        with held_loop():  # or the sender might be the last who closes it
            gates[1].open()
            gates[0].wait()
        with Listener(talk) as other:
            assert other.next().ready
            assert other.next().stopping
            assert tree.got.empty()
        gates[1].open()
        assert tree.next().status == "lingers"
        assert tree.next().ready


def test_nor_does_one_that_was_never_received(gates: list[Gate]) -> None:
    def work() -> None:
        gates[0].wait()
        notify.ready()
        _peer = send_what_lingers()
        gates[1].open()
        pause()

    closed = threading.Event()

    def close(_notification: Notification) -> None:
        tree.socket.close()
        closed.set()

    with Listener(work, received=close, pass_fds=all_of(gates)) as tree:
        with held_loop():
            gates[0].open()
            gates[1].wait()
        assert closed.wait(DEADLINE)
        assert on_loop(lambda: True)


def test_what_was_refused_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        notify.notify("STATUS=" + "x" * DATAGRAM_MAX)
        notify.notify("STATUS=\x1b[2J", "MAINPID=no")
        notify.notify("READY=0", "X_UNKNOWN=1")
        pause()

    with Listener(work) as tree:
        assert [r.name for r in tree.next().refused] == [""]
        assert tree.next().status == "\ufffd[2J"
        assert [r.name for r in tree.next().refused] == ["READY"]
    events = [r.getMessage() for r in caplog.records if r.message.startswith("notify.malformed")]
    assert len(events) == 1, "once a second"
    assert "4096 bytes" in events[0]


# -- how much is sent

FLOOD = 20_000


def flood(gates: list[Gate]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        sock.setblocking(False)
        sent = 0
        while True:
            for _ in range(FLOOD):
                with contextlib.suppress(BlockingIOError):
                    sock.send(b"STATUS=x")
                    sent += 1
            gates[0].open()


def test_a_flood_is_read_slowly_and_holds_up_nobody(
    gates: list[Gate], caplog: pytest.LogCaptureFixture
) -> None:
    def talk() -> None:
        for number in range(30):
            assert notify.status(str(number))
            assert notify.barrier(DEADLINE)
        notify.ready()
        pause()

    began = time.monotonic()
    with Listener(lambda: flood(gates), pass_fds=all_of(gates)) as noisy:
        gates[0].wait()
        with Listener(talk) as quiet:
            assert [quiet.next().status for _ in range(30)] == [str(n) for n in range(30)]
            assert quiet.next().ready
            gates[0].wait()
        assert proctree.run(["true"]).ok
        eventually(lambda: "notify.flood" in caplog.text, "it is said that there is a flood")
        # Both ends of the span are outside of what is counted.
        count = noisy.got.qsize()
        most = notify_socket.BURST + notify_socket.RATE * (time.monotonic() - began) + 1
        assert 0 < count <= most
        assert noisy.handle.outcome is None


def test_what_floods_is_heard_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits, and nothing is lost."""
    monkeypatch.setattr(notify_socket, "BURST", 10.0)
    monkeypatch.setattr(notify_socket, "PAUSE", 0.01)

    def work() -> None:
        for number in range(200):
            assert notify.status(str(number))
        pause()

    with Listener(work) as tree:
        assert [tree.next().status for _ in range(200)] == [str(n) for n in range(200)]


def test_a_sender_for_whom_there_are_no_descriptors_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ours may be used up when its message comes: it is looked at again, and nothing is lost."""
    looks: queue.Queue[int] = queue.Queue()

    def is_member(pid: int) -> bool:
        looks.put(pid)
        if looks.qsize() < 3:
            raise OSError(errno.EMFILE, "no descriptors")
        return True

    def work() -> None:
        notify.status("one")
        notify.status("two")
        pause()

    with Listener(work, is_member=is_member) as tree:
        assert [tree.next().status, tree.next().status] == ["one", "two"]
        assert looks.qsize() == 4
    assert "notify.delayed tree_id='a tree' name='test' errno='EMFILE'" in caplog.text


def test_it_is_closed_while_a_message_waits() -> None:
    looked = threading.Event()

    def is_member(_pid: int) -> bool:
        looked.set()
        raise OSError(errno.EMFILE, "no descriptors")

    def work() -> None:
        notify.ready()
        pause()

    with Listener(work, is_member=is_member) as tree:
        assert looked.wait(DEADLINE)
    assert tree.got.empty()


def test_it_is_closed_by_what_it_says(gates: list[Gate]) -> None:
    def work() -> None:
        gates[0].wait()
        notify.ready()
        notify.ready()
        pause()

    closed: queue.Queue[Notification] = queue.Queue()

    def close(notification: Notification) -> None:
        tree.socket.close()
        closed.put(notification)

    with Listener(work, received=close, pass_fds=all_of(gates)) as tree:
        gates[0].open()
        assert closed.get(timeout=DEADLINE).ready
    assert closed.empty()


# -- MAINPID


def main_pid_of_a_child(gates: list[Gate], end: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        gates[0].wait()
        end()
    notify.notify(f"MAINPID={pid}", "READY=1")
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    pause()


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("end", "status"), [(lambda: os._exit(7), 7 << 8), (be_killed, 9)])
def test_the_end_of_the_main_process_that_it_named(
    containment: str, gates: list[Gate], end: Callable[[], None], status: int
) -> None:
    """In a PID namespace it names it by another number than ours."""
    work = lambda: main_pid_of_a_child(gates, end)  # noqa: E731
    with Listener(work, containment, pass_fds=all_of(gates)) as tree:
        told = tree.next()
        assert told.main_pid is not None
        stat = proof.read_stat(told.main_pid)
        assert stat is not None
        assert stat.ppid == tree.handle.pid
        gates[0].open()
        assert tree.gone.get(timeout=DEADLINE) == status
        assert tree.socket._main is not None
        assert tree.socket._main.pid is None


def test_the_last_one_that_is_named_counts(gates: list[Gate]) -> None:
    def work() -> None:
        children = []
        for gate in gates:
            pid = os.fork()
            if pid == 0:
                gate.wait()
                os._exit(5)
            children.append(pid)
        for pid in (*children, children[1]):
            notify.notify(f"MAINPID={pid}")
        os.waitpid(children[0], 0)
        notify.ready()
        pause()

    with Listener(work, pass_fds=all_of(gates)) as tree:
        first, second, again = (tree.next().main_pid for _ in range(3))
        assert first != second == again
        gates[0].open()
        assert tree.next().ready
        gates[1].open()
        assert tree.gone.get(timeout=DEADLINE) == 5 << 8
        assert tree.gone.empty()


def test_a_main_process_that_is_none_of_the_tree(
    containment: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before stays."""
    stranger = subprocess.Popen(["sleep", "60"])
    number = stranger.pid

    def work() -> None:
        notify.notify(f"MAINPID={os.getpid()}")
        notify.notify(f"MAINPID={number}", "READY=1")
        pause()

    try:
        with Listener(work, containment) as tree:
            assert tree.next().main_pid == tree.handle.pid
            assert tree.next() == Notification(ready=True)
            assert tree.socket._main is not None
            assert tree.socket._main.pid == tree.handle.pid
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    # A number of ours is nobody's in another namespace.
    why = "no such process" if containment == "pidns" else "no process of this tree"
    assert f"notify.main_pid_refused tree_id='a tree' name='test' pid={number}" in caplog.text
    assert why in caplog.text


@pytest.mark.parametrize("reaped", [True, False])
def test_a_main_process_that_has_ended(
    containment: str, reaped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        notify.notify(f"MAINPID={pid}", "READY=1")
        pause()

    with Listener(work, containment) as tree:
        assert tree.next() == Notification(ready=True)
    assert "notify.main_pid_refused" in caplog.text
    assert tree.gone.empty()


def test_a_number_of_another_namespace_without_help_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, gates: list[Gate]
) -> None:
    """Before Linux 6.11 every process is looked at."""
    available("pidns")
    from proctree.process import pid_namespaces

    monkeypatch.setattr(pid_namespaces, "_NS_GET_TGID_FROM_PIDNS", 0x8004B7FF)
    work = lambda: main_pid_of_a_child(gates, lambda: os._exit(3))  # noqa: E731
    with Listener(work, "pidns", pass_fds=all_of(gates)) as tree:
        assert tree.next().main_pid is not None
        gates[0].open()
        assert tree.gone.get(timeout=DEADLINE) == 3 << 8


# -- the watchdog of a tree


@pytest.mark.parametrize(
    ("last", "seconds", "why"),
    [
        ((), 0.3, "no WATCHDOG=1 for 0.3 s"),
        (("WATCHDOG=trigger",), 3600.0, "WATCHDOG=trigger"),
        (("WATCHDOG_USEC=20000",), 3600.0, "no WATCHDOG=1 for 0.02 s"),
    ],
)
def test_a_watchdog(last: tuple[str, ...], seconds: float, why: str) -> None:
    def work() -> None:
        for _ in range(3):
            assert notify.watchdog()
        if last:
            notify.notify(*last)
        pause()

    said: queue.Queue[str] = queue.Queue()
    watchdog = on_loop(lambda: Watchdog(loop_module.get(), seconds, said.put))
    feedings = []

    def received(notification: Notification) -> None:
        if notification.watchdog:
            watchdog.fed()
            feedings.append(notification)
        if notification.watchdog_seconds is not None:
            watchdog.set_interval(notification.watchdog_seconds)
        if notification.watchdog_trigger:
            watchdog.trigger()

    with Listener(work, received=received):
        assert said.get(timeout=DEADLINE) == why
        assert said.empty()
        # A machine may be so busy that this is too late for the short one.
        assert len(feedings) == 3 or not last


# -- the socket and its directory


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize(
    ("reachable", "folder", "file"), [(False, 0o700, 0o600), (True, 0o711, 0o666)]
)
def test_who_may_reach_it(reachable: bool, folder: int, file: int) -> None:
    before = os.umask(0)
    try:
        with Listener(pause, reachable=reachable) as tree:
            path = tree.socket.path
            assert (mode(os.path.dirname(path)), mode(path)) == (folder, file)
            assert len(os.fsencode(path)) <= notify_directory.ADDRESS_MAX
    finally:
        os.umask(before)


LEAVES = (
    "import os, sys\n"
    "from proctree import loop\n"
    "from proctree.supervisor.notify_socket import NotifySocket\n"
    "sock = NotifySocket(loop.get(), 'x', 'x', lambda pid: True, print)\n"
    "if os.fork() == 0:\n"
    "    number = sock._fd\n"
    "    try: os.fstat(number); sys.exit(1)\n"
    "    except OSError: pass\n"
    # Its number may be another file's soon, which no object of ours may close.
    "    sys.exit(sock._sock.fileno() != -1)\n"
    "assert os.wait()[1] == 0\n"
    "assert os.path.exists(sock.path)\n"
    "os.write(1, os.path.dirname(sock.path).encode())\n"
    "if sys.argv[1] == 'crash': os._exit(0)\n"
)


def leave(runtime: Path, how: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, how],
        env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def short_path() -> Iterator[Path]:
    """One that leaves room for a socket's name: that of `tmp_path` may be too long."""
    with tempfile.TemporaryDirectory(prefix="proctree-") as folder:
        yield Path(folder)


def test_at_the_end_the_directory_is_removed_and_a_forked_child_leaves_it(short_path: Path) -> None:
    folder = leave(short_path, "end")
    assert os.path.dirname(folder) == str(short_path)
    assert not os.path.exists(folder)


def test_what_a_crash_left_is_removed_by_the_next(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave(short_path, "crash")
    assert os.listdir(left)
    (short_path / "proctree-notify-file").touch()
    (short_path / "proctree-notify-link").symlink_to(short_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    mine = notify_directory.make(False)
    try:
        assert not os.path.exists(left)
        assert len(os.listdir(short_path)) == 3
        other = notify_directory.make(False)
        other.remove()
        assert os.path.isdir(mine.path)
    finally:
        mine.remove()
    assert not os.path.exists(mine.path)


def test_a_path_that_is_too_long_for_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    made = notify_directory.make(False)
    made.remove()
    assert not made.path.startswith(str(long))
    monkeypatch.setattr(notify_directory, "candidates", lambda _reachable: iter([str(long)]))
    with pytest.raises(OSError, match=r"too long for the address of a socket, unix\(7\)") as failed:
        notify_directory.make(False)
    assert failed.value.errno == errno.ENAMETOOLONG
    monkeypatch.setattr(notify_directory, "candidates", lambda _reachable: iter(["/nowhere"]))
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        notify_directory.make(False)


def test_a_directory_that_was_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody cleans up in /tmp."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(notify_directory, "_made", {})
    first = notify_directory.get()
    assert notify_directory.get() is first
    os.rmdir(first.path)
    second = notify_directory.get()
    try:
        assert os.path.isdir(second.path)
    finally:
        second.remove()


def test_the_variables() -> None:
    with Listener(pause) as tree:
        path = tree.socket.path
        assert tree.socket.environment() == {"NOTIFY_SOCKET": path}
        assert tree.socket.environment(0.0) == {"NOTIFY_SOCKET": path}
        variables = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "2500000"}
        assert tree.socket.environment(2.5) == variables
