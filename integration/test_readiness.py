"""Readiness of real programs: what listens, what is written, and what was there before."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, Lines, eventually
from integration.http_servers import (
    closing,
    free_port,
    hanging,
    resetting,
    serving,
    status,
)
from proctree import WatchedSubprocess
from proctree import loop as loop_module
from proctree.supervisor import connecting, probing
from proctree.supervisor.connecting import Trouble, connect
from proctree.supervisor.probing import Probing
from proctree.supervisor.readiness import (
    Check,
    Completed,
    File,
    Http,
    Notified,
    OutputLine,
    Readiness,
    Tcp,
    UnixSocket,
)

READY = ("ready", "")


class Child:
    """What a supervisor does: looks before, starts, and waits."""

    def __init__(self, probe: Readiness) -> None:
        self.loop = loop_module.get()
        self.heard: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self.probing = Probing(
            self.loop,
            probe,
            lambda: self._hear(*READY),
            lambda text: self._hear("not ready", text),
        )

    def _hear(self, *what: str) -> None:
        assert self.loop.is_current_thread()
        with self._changed:
            self.heard.append((what[0], what[1]))
            self._changed.notify_all()

    def on_loop(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self.loop.post(function)
        self.loop.post(done.set)
        assert done.wait(DEADLINE)

    def prepare(self) -> str | None:
        answers: list[str | None] = []
        done = threading.Event()

        def prepared(why_not: str | None) -> None:
            answers.append(why_not)
            done.set()

        self.on_loop(lambda: self.probing.prepare(prepared))
        assert done.wait(DEADLINE)
        return answers[0]

    def start(self) -> None:
        self.on_loop(self.probing.start)

    def wait_for(self, count: int = 1) -> list[tuple[str, str]]:
        with self._changed:
            found = self._changed.wait_for(lambda: len(self.heard) >= count, DEADLINE)
            assert found, self.probing.last_trouble
            return list(self.heard)

    def eventually_in_trouble(self, text: str) -> None:
        eventually(lambda: text in self.probing.last_trouble, text)


@contextlib.contextmanager
def child(probe: Readiness) -> Iterator[Child]:
    """One that was looked at and started."""
    made = Child(probe)
    assert made.prepare() is None
    made.start()
    try:
        yield made
    finally:
        made.on_loop(made.probing.stop)


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, Callable[[], None]]]:
    """What a program reads from, and what lets it go on by a line."""
    reader, writer = os.pipe()
    try:
        yield reader, lambda: os.write(writer, b"\n") and None
    finally:
        os.close(reader)
        os.close(writer)


def test_a_port_is_ready_when_it_accepts():
    with free_port() as port:
        with child(Tcp(port)) as waiting:
            waiting.eventually_in_trouble("ECONNREFUSED at connect")
            assert waiting.heard == []
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(("127.0.0.1", port))
                listener.listen()
                assert waiting.wait_for() == [READY]
                peer, _ = listener.accept()
                with peer:
                    peer.settimeout(DEADLINE)
                    assert peer.recv(1) == b""


def test_a_real_program_becomes_ready():
    code = """
import socket, sys
with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", int(sys.argv[1])))
    input()
    listener.listen()
    listener.accept()
    input()
"""
    with free_port() as port:
        waiting = Child(Tcp(port))
        assert waiting.prepare() is None
        argv = [sys.executable, "-S", "-c", code, str(port)]
        with pipe() as (reader, go_on), WatchedSubprocess.start(argv, stdin=reader, kill=QUICK):
            waiting.start()
            waiting.eventually_in_trouble("ECONNREFUSED at connect")
            go_on()
            assert waiting.wait_for() == [READY]


def test_a_strangers_port_is_a_reason_not_to_start():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        stranger = Child(Tcp(port))
        why_not = stranger.prepare()
        text = f"port: tcp 127.0.0.1:{port} answers before the child was started"
        assert why_not is not None
        assert why_not.startswith(text)


def test_when_time_runs_out_it_says_what_the_trouble_was():
    with free_port() as port:
        with child(Tcp(port, timeout=60)) as waiting:
            waiting.eventually_in_trouble("ECONNREFUSED at connect")
            waiting.on_loop(waiting.probing._fail)  # the time is over
            text = f"not ready within 60 s: tcp 127.0.0.1:{port}: ECONNREFUSED at connect"
            assert waiting.heard == [("not ready", text)]


def test_time_runs_out_in_the_middle_of_an_attempt():
    with serving(status("503 Not Yet"), hanging) as server:
        with child(Http(server.url, timeout=0.2)) as waiting:
            (heard,) = waiting.wait_for()
            assert heard[0] == "not ready"
            assert heard[1].startswith("not ready within 0.2 s: GET http://127.0.0.1:")


def test_nothing_comes_after_it_was_stopped():
    with free_port() as port:
        with child(Tcp(port, timeout=0.05)) as waiting:
            waiting.on_loop(waiting.probing.stop)
            over = threading.Event()
            waiting.on_loop(lambda: waiting.loop.call_later(0.1, over.set))
            assert over.wait(DEADLINE)
            waiting.on_loop(waiting.probing.arrived)
            assert waiting.heard == []


def test_of_several_addresses_one_is_enough(monkeypatch: pytest.MonkeyPatch):
    """As `localhost` has ::1 first and a server only listens at 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        tcp = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        found = [(*tcp, ("127.0.0.2", port)), (*tcp, ("127.0.0.1", port))]
        monkeypatch.setattr(connecting.socket, "getaddrinfo", lambda *_a, **_k: found)
        connect("two.example", port, connecting.time.monotonic() + DEADLINE).end()
    with pytest.raises(Trouble) as caught:
        connect("two.example", port, connecting.time.monotonic() + DEADLINE)
    expected = "; ".join(f"ECONNREFUSED at connect to 127.0.0.{n}:{port}" for n in (2, 1))
    assert str(caught.value) == expected


def test_ipv6():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("there is no IPv6")
    with listener:
        port = listener.getsockname()[1]
        why_not = Child(Tcp(port, "::1")).prepare()
        assert why_not is not None
        assert f"tcp [::1]:{port}" in why_not


def test_a_connection_to_itself_is_none(monkeypatch: pytest.MonkeyPatch):
    """The kernel may give a client the very port that it calls. Bound to it, it always does."""
    new_socket = connecting._new_socket

    def bound(*arguments: int) -> socket.socket:
        sock = new_socket(*arguments)
        sock.bind(("127.0.0.1", 0))
        ports.append(sock.getsockname()[1])
        return sock

    ports: list[int] = []
    monkeypatch.setattr(connecting, "_new_socket", bound)
    deadline = connecting.time.monotonic() + DEADLINE
    monkeypatch.setattr(
        connecting.Stream,
        "connect",
        lambda self, _address, connect=connecting.Stream.connect: connect(
            self, ("127.0.0.1", ports[-1])
        ),
    )
    with pytest.raises(Trouble, match=r"ECONNREFUSED .*reached itself"):
        connect("127.0.0.1", 1, deadline)
    # And nothing is left of it that would keep the port from who is to listen there.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))
        listener.listen()


def test_a_unix_socket(tmp_path: Path):
    path = str(tmp_path / "socket")
    with child(UnixSocket(path)) as waiting:
        waiting.eventually_in_trouble("ENOENT at connect")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            waiting.eventually_in_trouble("ECONNREFUSED at connect")
            assert waiting.heard == []
            listener.listen()
            assert waiting.wait_for() == [READY]
            why_not = Child(UnixSocket(path)).prepare()
            assert why_not is not None
            assert why_not.startswith(f"path: unix socket {path} answers before")
    # What it has left behind accepts nothing, so it is no reason against the next start.
    assert os.path.exists(path)
    assert Child(UnixSocket(path)).prepare() is None


def test_an_abstract_unix_socket():
    name = f"\0proctree-test-{os.getpid()}"
    with child(UnixSocket(name)) as waiting:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
            listener.listen()
            assert waiting.wait_for() == [READY]


def test_a_url_is_ready_when_the_status_is_right():
    bad = [resetting, closing, status("503 Service Unavailable", body=b"soon")]
    with serving(*bad, *bad, status("302 Found", "Location: /login")) as server:
        with child(Http(server.url, headers={"X-Probe": "yes"})) as waiting:
            assert waiting.wait_for() == [READY]
        assert len(server.requests) == 7
        assert server.requests[0].startswith(b"GET /beat?run=7 HTTP/1.1\r\n")
        assert b"X-Probe: yes\r\n" in server.requests[0]
        why_not = Child(Http(server.url)).prepare()
        assert why_not is not None
        assert why_not.startswith("url: GET http://127.0.0.1:")


def test_other_statuses_may_be_asked_for():
    with serving(status("200 OK")) as server:
        with child(Http(server.url, status={204})) as waiting:
            waiting.eventually_in_trouble("200 OK")
            assert waiting.heard == []


def test_a_server_that_does_not_answer_is_no_reason_not_to_start(
    monkeypatch: pytest.MonkeyPatch,
):
    """It accepts for a child that is not there yet, as for a socket that is handed on."""
    monkeypatch.setattr(probing, "ATTEMPT_SECONDS", 0.1)
    with serving(hanging, hanging, status("200 OK")) as server:
        with child(Http(server.url)) as waiting:
            assert waiting.wait_for() == [READY]
        assert len(server.requests) >= 3


def test_a_file_of_an_earlier_run_does_not_count(tmp_path: Path):
    path = tmp_path / "ready"
    with child(File(path)) as waiting:
        waiting.eventually_in_trouble("ENOENT at stat")
        path.write_text("")
        assert waiting.wait_for() == [READY]
    with child(File(str(path))) as waiting:
        waiting.eventually_in_trouble("it has not changed since before the start")
        path.chmod(0o600)
        assert waiting.heard == []
        path.write_text("")
        assert waiting.wait_for() == [READY]
    with child(File(path)) as waiting:
        other = tmp_path / "other"
        other.write_text("")
        before = path.stat()
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        waiting.eventually_in_trouble("it has not changed since before the start")
        assert waiting.heard == []
        other.rename(path)
        assert waiting.wait_for() == [READY]


def test_a_file_that_cannot_be_looked_at_in_time_is_a_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    release = threading.Event()
    monkeypatch.setattr(probing, "ATTEMPT_SECONDS", 0.05)
    monkeypatch.setattr(probing, "_identity", lambda _path: release.wait(DEADLINE))
    waiting = Child(File(tmp_path / "ready"))
    why_not = waiting.prepare()
    release.set()
    assert why_not is not None
    assert why_not.startswith("path: file ")
    assert "could not be looked at: not done within 0.05 s" in why_not


def test_a_check_is_ready_when_it_says_so():
    answers: list[Any] = [ValueError("no table"), SystemExit(1), None, 0, "yes"]
    seen: list[str] = []

    def check() -> object:
        seen.append(waiting.probing.last_trouble)
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    waiting = Child(Check(check))
    assert waiting.prepare() is None
    assert seen == []
    waiting.start()
    assert waiting.wait_for() == [READY]
    nothing = "it returned nothing true"
    assert seen == ["", "ValueError: no table", "SystemExit: 1", nothing, nothing]


def test_a_check_that_hangs_is_called_once_for_all_incarnations(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probing, "ATTEMPT_SECONDS", 0.02)
    release = threading.Event()
    called: list[int] = []

    def check() -> bool:
        called.append(1)
        return release.wait(DEADLINE)

    waiting = Child(Check(check, timeout=math.inf))
    try:
        for _ in range(3):
            assert waiting.prepare() is None
            assert waiting.probing.last_trouble == ""
            waiting.start()
            waiting.eventually_in_trouble("still hanging after")
        assert called == [1]
        assert waiting.heard == []
        release.set()
        assert waiting.wait_for() == [READY]
        assert len(called) >= 2
    finally:
        release.set()
        waiting.on_loop(waiting.probing.stop)


def test_a_line_of_a_real_program():
    waiting = Child(OutputLine(r"^listening on \d+$", "stderr"))
    assert waiting.prepare() is None
    matcher = waiting.probing.matcher
    assert matcher is not None

    def line(stream: str) -> Callable[[str], None]:
        def feed(text: str) -> None:
            if matcher.feed(stream, text):
                waiting.loop.post(lambda: waiting.probing.arrived(matcher))

        return feed

    script = "echo listening on 80; read a; echo warming up >&2; read a; echo listening on 80 >&2"
    out = Lines()
    with (
        pipe() as (reader, go_on),
        WatchedSubprocess.start(
            ["sh", "-c", script],
            stdin=reader,
            stdout=proctree.Lines(lambda text: (line("stdout")(text), out(text))),
            stderr=proctree.Lines(line("stderr")),
            kill=QUICK,
        ),
    ):
        waiting.start()
        out.wait_for(1)
        assert waiting.probing.last_trouble == "no line has come"
        go_on()
        waiting.eventually_in_trouble("the last one is 'warming up'")
        assert waiting.heard == []
        go_on()
        assert waiting.wait_for() == [READY]


def test_a_line_may_come_before_the_start_and_not_from_an_earlier_incarnation():
    waiting = Child(OutputLine("ready", timeout=0.05))
    waiting.prepare()
    old = waiting.probing.matcher
    assert old is not None
    assert old.feed("stdout", "ready")
    waiting.prepare()
    waiting.on_loop(lambda: waiting.probing.arrived(old))
    waiting.start()
    assert waiting.wait_for()[0][0] == "not ready"
    waiting.prepare()
    waiting.on_loop(lambda: waiting.probing.arrived(waiting.probing.matcher))
    assert len(waiting.heard) == 1
    waiting.start()
    assert waiting.wait_for(2)[1] == READY


def test_what_comes_by_itself_has_no_attempts():
    with child(Completed(timeout=0.05)) as waiting:
        text = "not ready within 0.05 s: its end with success: it never came"
        assert waiting.wait_for() == [("not ready", text)]


def test_a_notification_or_none():
    with child(Notified(timeout=0.05)) as waiting:
        text = "not ready within 0.05 s: READY=1 by sd_notify: it never came"
        assert waiting.wait_for() == [("not ready", text)]
    with child(Notified()) as waiting:
        waiting.on_loop(waiting.probing.arrived)
        assert waiting.wait_for() == [READY]
        waiting.on_loop(waiting.probing.arrived)
        assert waiting.heard == [READY]
        # The next incarnation has not said anything yet.
        waiting.prepare()
        waiting.start()
        assert waiting.heard == [READY]


@contextlib.contextmanager
def full() -> Iterator[int]:
    """A port whose queue is full: the kernel drops each SYN, and nothing answers."""
    with socket.socket() as listener, contextlib.ExitStack() as filling:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = filling.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_connection_that_nobody_accepts_is_given_up_at_the_deadline():
    with full() as port:
        with pytest.raises(Trouble, match=r"^out of time at connect$"):
            connect("127.0.0.1", port, connecting.time.monotonic() + 0.1)


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch):
    with full() as silent, socket.create_server(("127.0.0.1", 0)) as listener:
        tcp = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        found = [(*tcp, ("127.0.0.1", silent)), (*tcp, listener.getsockname())]
        monkeypatch.setattr(connecting.socket, "getaddrinfo", lambda *_a, **_k: found)
        connect("two.example", 80, connecting.time.monotonic() + 4.0).end()


def test_a_descriptor_that_cannot_be_had_is_trouble(monkeypatch: pytest.MonkeyPatch):
    def refusing(*_arguments: object) -> socket.socket:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(connecting, "_new_socket", refusing)
    with pytest.raises(Trouble, match="EMFILE at socket"):
        connect("127.0.0.1", 1, connecting.time.monotonic() + 1)
