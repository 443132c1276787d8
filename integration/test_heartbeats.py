"""Heartbeats of real trees to real servers, which do what servers do."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, Lines, eventually, is_alive
from integration.http_servers import (
    Behaviour,
    Server,
    closing,
    dribbling,
    flooding,
    free_port,
    hanging,
    hanging_after,
    raw,
    resetting,
    serving,
    status,
)
from proctree import Reason, WatchedSubprocess
from proctree import loop as loop_module
from proctree.process import fds
from proctree.supervisor import exchange
from proctree.supervisor.beating import BeatAccepted, BeatFailed, Beating, BeatRejected
from proctree.supervisor.heartbeat import Beat, Heartbeat, HttpBeat, Rejected

BEAT = Beat("child", "0123456789abcdef", 4711)
SOON = 0.02
"""Seconds between two beats."""


class Watch:
    """A heartbeat that is going, and what came of it, in order."""

    def __init__(self, heartbeat: Heartbeat, beat: Beat = BEAT) -> None:
        self.loop = loop_module.get()
        self.told: list[Any] = []
        self.ended: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self.beating = Beating(
            self.loop,
            heartbeat,
            lambda detail: self._end("heartbeat-rejected", detail),
            lambda detail: self._end("heartbeat-failed", detail),
            self._tell,
        )
        self.start(beat)

    def start(self, beat: Beat = BEAT) -> None:
        self.run(lambda: self.beating.start(beat))

    def stop(self) -> None:
        self.run(self.beating.stop)

    def run(self, function: Callable[[], None]) -> None:
        done = threading.Event()
        self.loop.post(function)
        self.loop.post(done.set)
        assert done.wait(DEADLINE)

    def _tell(self, event: Any) -> None:
        with self._changed:
            self.told.append(event)
            self._changed.notify_all()

    def _end(self, reason: str, detail: str) -> None:
        assert self.loop.is_current_thread()
        with self._changed:
            self.ended.append((reason, detail))
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.told) >= count, DEADLINE), self.told
            return list(self.told)

    def wait_for_end(self) -> tuple[str, str]:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ended, DEADLINE), self.told
        return self.ended[0]

    def errors(self) -> list[str]:
        return [event.error for event in self.told if isinstance(event, BeatFailed)]


@contextlib.contextmanager
def watching(heartbeat: Heartbeat, beat: Beat = BEAT) -> Iterator[Watch]:
    watch = Watch(heartbeat, beat)
    try:
        yield watch
    finally:
        watch.stop()


def quick(heartbeat: Heartbeat, interval: float = SOON) -> Heartbeat:
    """Beats one after the other, with much time for each: how long one takes says nothing on a busy
    machine. No user can have that: the time is longer than the interval."""
    object.__setattr__(heartbeat, "interval", interval)
    return heartbeat


def http(url: str, failures: int = 3, **options: Any) -> Heartbeat:
    return quick(Heartbeat(HttpBeat(url, **options), 60.0, 60.0, failures))


def http_within(seconds: float, url: str, failures: int) -> Heartbeat:
    """For a server that does not answer."""
    return Heartbeat(HttpBeat(url), seconds, seconds, failures)


@pytest.mark.parametrize("line", ["404 Not Found", "409 Conflict", "410 Gone"])
def test_a_rejection_ends_it_at_once(line):
    with serving(status("200 OK"), status("204 No Content"), status(line, body=b"stale")) as server:
        with watching(http(server.url, failures=1)) as watch:
            assert watch.wait_for_end() == ("heartbeat-rejected", f"{line}: stale")
            kinds = [type(event) for event in watch.told]
            assert kinds == [BeatAccepted, BeatAccepted, BeatRejected]
            assert watch.told[0].beat == BEAT


def test_what_is_sent():
    bodies = iter([b"1", b"22", b"333"])

    def body(beat: Beat) -> bytes:
        assert beat == BEAT
        assert threading.current_thread().name == "proctree-callbacks"
        return next(bodies)

    with serving(status("200 OK")) as server:
        headers = {"Authorization": "Bearer token", "content-type": "text/plain"}
        heartbeat = http(server.url, method="PUT", headers=headers, body=body)
        with watching(heartbeat):
            server.wait_for(3)
        head, _, sent = server.requests[2].partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"PUT /beat?run=7 HTTP/1.1"
        assert f"Host: 127.0.0.1:{server.port}".encode() in lines
        assert b"Authorization: Bearer token" in lines
        assert b"Connection: close" in lines
        assert b"Content-Length: 3" in lines
        assert sent == b"333"


def test_failures_in_a_row_end_it():
    with serving(status("500 Internal Server Error", body=b"<h1>no\n</h1>")) as server:
        with watching(http(server.url)) as watch:
            text = "500 Internal Server Error: <h1>no </h1>"
            expected = f"3 heartbeats in a row failed, the last one: {text}"
            assert watch.wait_for_end() == ("heartbeat-failed", expected)
            assert [event.in_a_row for event in watch.told] == [1, 2, 3]
            assert [event.allowed for event in watch.told] == [3, 3, 3]
    assert len(server.requests) == 3


def test_a_success_sets_the_failures_back():
    bad, good = status("503 Service Unavailable"), status("200 OK")
    with serving(bad, bad, good, bad, bad, good) as server:
        with watching(http(server.url)) as watch:
            told = watch.wait_for(6)
            assert [getattr(event, "in_a_row", 0) for event in told] == [1, 2, 0, 1, 2, 0]
            assert watch.ended == []


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        (resetting, "ECONNRESET at the answer"),
        (closing, "without response at the answer"),
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), "no HTTP in the answer: BadStatusLine"),
        (raw(b"HTTP/1.1 2000 OK\r\n\r\n"), "no HTTP in the answer"),
        (raw(HEAD + b"X: y\r\n" * 200 + b"\r\n"), "more than 100 headers"),
        (raw(HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n"), "the answer is too long"),
        (flooding, "the answer is too long"),
        (status("302 Found", "Location: http://127.0.0.1:1/elsewhere"), "redirects are not follo"),
        (status("304 Not Modified"), "304 Not Modified"),
        (status("401 Unauthorized"), "401 Unauthorized"),
        (status("101 Switching Protocols"), "101 Switching Protocols"),
    ],
)
def test_every_other_answer_is_a_failure(behaviour: Behaviour, text: str):
    with serving(behaviour) as server:
        with watching(http(server.url, failures=1)) as watch:
            reason, detail = watch.wait_for_end()
    assert reason == "heartbeat-failed"
    assert text in detail


def test_a_redirect_says_where_to_and_is_not_followed():
    with serving(status("200 OK")) as elsewhere:
        moved = status("307 Temporary Redirect", f"Location: {elsewhere.url}")
        with serving(moved) as server:
            with watching(http(server.url, failures=1)) as watch:
                _, detail = watch.wait_for_end()
        assert f"redirects are not followed: {elsewhere.url}" in detail
        assert elsewhere.requests == []


def test_a_refused_connection_is_a_failure():
    with free_port() as port:
        with watching(http(f"http://127.0.0.1:{port}/")) as watch:
            assert watch.wait_for_end()[1].endswith("ECONNREFUSED at connect")
            assert watch.errors() == ["ECONNREFUSED at connect"] * 3


def test_a_name_that_means_nothing_is_a_failure():
    """An interface that there is not: nobody has to be asked for that."""
    with watching(http("http://[::1%nope]/", failures=1)) as watch:
        assert "at looking up ::1%nope" in watch.wait_for_end()[1]


def callbacks() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "proctree-callbacks"]


CALLED_IN_VAIN = 20
"""Threads that were called for work which was done when they came, and wait for more."""


@pytest.mark.parametrize("behaviour", [hanging, dribbling, hanging_after(HEAD)])
def test_a_server_that_takes_for_ever_is_a_failure_and_holds_nothing(behaviour: Behaviour):
    with serving(behaviour) as server:
        with watching(http_within(0.05, server.url, failures=4)) as watch:
            assert watch.wait_for_end()[0] == "heartbeat-failed"
            for error in watch.errors():
                assert re.search("within|out of time|still hanging", error), error
            # The thread comes free by itself, although the server goes on for ever.
            eventually(lambda: not watch.beating._aside.busy, "the call returned")


@pytest.mark.parametrize(
    "behaviour",
    [
        hanging_after(b"HTTP/1.1 409 Conflict\r\nContent-Length: 9\r\n\r\nstale"),
        hanging_after(b"HTTP/1.1 409 Conflict\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nsta"),
        raw(b"HTTP/1.1 409 Conflict\r\nContent-Length: 9\r\n\r\nstale"),
        raw(b"HTTP/1.1 409 Conflict\r\nTransfer-Encoding: chunked\r\n\r\nnonsense"),
        status("409 Conflict", body=b"x" * 1_000_000),
    ],
)
def test_the_head_decides_whatever_becomes_of_the_body(
    behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exchange, "LINGER_SECONDS", 0.1)
    with serving(behaviour) as server:
        with watching(http(server.url, failures=1)) as watch:
            reason, detail = watch.wait_for_end()
    assert reason == "heartbeat-rejected"
    assert detail.startswith("409 Conflict")
    assert len(detail) < 400


def test_its_sockets_belong_to_supervision():
    """So that no forked child keeps a connection open."""
    with serving(hanging) as server:
        with watching(http(server.url)) as watch:
            server.wait_for(1)

            def peers() -> list[int]:
                found = []
                for name in os.listdir("/proc/self/fd"):
                    with contextlib.suppress(OSError):
                        if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                            continue
                        with socket.socket(fileno=os.dup(int(name))) as sock:
                            peer = sock.getpeername() if sock.family == socket.AF_INET else None
                            if peer == ("127.0.0.1", server.port):
                                found.append(int(name))
                return found

            (mine,) = peers()
            assert mine in fds._owned
            watch.stop()
        server.over.set()
        eventually(lambda: mine not in fds._owned, "the socket was given back")


# -- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tls") / "both.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", path, "-out", path + ".crt", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl(1)")
    with open(path, "a") as both, open(path + ".crt") as crt:
        both.write(crt.read())
    return path


def over_tls(certificate: str, inner: Behaviour) -> Behaviour:
    """Handshakes with what the plain server has taken for a request still in the socket."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def behave(server: Any, sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            request = wrapped.recv(65536)
            server.requests.append(request)
            inner(server, wrapped)

    return behave


@pytest.fixture
def raw_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server leaves the beginning to the behaviour."""
    monkeypatch.setattr("integration.http_servers.Server._read", staticmethod(lambda _sock: b""))


@pytest.mark.usefixtures("raw_sockets")
def test_over_tls(certificate: str):
    import ssl

    trusting = ssl.create_default_context(cafile=certificate)
    with serving(over_tls(certificate, status("410 Gone"))) as server:
        url = server.url.replace("http:", "https:")
        with watching(http(url, context=trusting)) as watch:
            assert watch.wait_for_end() == ("heartbeat-rejected", "410 Gone")
        assert server.requests[1].startswith(b"POST /beat?run=7 HTTP/1.1\r\n")
        with watching(http(url, failures=1)) as watch:
            reason, detail = watch.wait_for_end()
    assert reason == "heartbeat-failed"
    assert "certificate verify failed" in detail
    assert detail.endswith("at the TLS handshake")


@pytest.mark.usefixtures("raw_sockets")
def test_a_handshake_that_takes_for_ever_is_a_failure():
    with serving(hanging) as server:
        url = server.url.replace("http:", "https:")
        with watching(http_within(0.1, url, failures=2)) as watch:
            assert watch.wait_for_end()[0] == "heartbeat-failed"
            eventually(lambda: not watch.beating._aside.busy, "the call returned")


# -- callables


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no"), "ValueError: no"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_callable_that_raises_fails(error: BaseException, text: str):
    def beat(_beat: Beat) -> None:
        raise error

    with watching(quick(Heartbeat(beat, 60.0, 60.0, failures=2))) as watch:
        expected = f"2 heartbeats in a row failed, the last one: {text}"
        assert watch.wait_for_end() == ("heartbeat-failed", expected)


def test_a_callable_rejects():
    def beat(_beat: Beat) -> None:
        raise Rejected("somebody else has the run")

    with watching(Heartbeat(beat, interval=10.0)) as watch:
        expected = ("heartbeat-rejected", "Rejected: somebody else has the run")
        assert watch.wait_for_end() == expected


def test_a_callable_that_hangs_fails_by_the_interval_and_is_not_called_again():
    release = threading.Event()
    called: list[Beat] = []

    def beat(beat: Beat) -> None:
        called.append(beat)
        assert release.wait(DEADLINE)

    try:
        with watching(Heartbeat(beat, interval=0.05, failures=4)) as watch:
            reason, detail = watch.wait_for_end()
            assert reason == "heartbeat-failed"
            assert "still hanging after" in detail
            assert called == [BEAT]
            # The next tree's heartbeat has the same thread to wait for, and says so.
            other = Beat("child", "fedcba9876543210", 4712)
            watch.start(other)
            watch.wait_for(5)
            assert called == [BEAT]
            release.set()
            eventually(lambda: called[-1] is other, "called again")
            eventually(lambda: isinstance(watch.told[-1], BeatAccepted), "a success")
            watch.stop()
    finally:
        release.set()


def test_a_beat_that_came_due_meanwhile_begins_when_the_one_before_is_settled():
    release = threading.Event()

    def beat(_beat: Beat) -> None:
        assert release.wait(DEADLINE)

    try:
        with watching(quick(Heartbeat(beat, 60.0, 60.0))) as watch:
            eventually(lambda: watch.beating._owed, "a beat was due")
            watch.run(lambda: watch.beating._timer.cancel())  # no other comes due
            release.set()
            first, second = watch.wait_for(2)
            assert (type(first), type(second)) == (BeatAccepted, BeatAccepted)
    finally:
        release.set()


def test_nothing_comes_after_it_was_stopped():
    entered, release = threading.Event(), threading.Event()

    def beat(_beat: Beat) -> None:
        entered.set()
        assert release.wait(DEADLINE)
        raise Rejected("too late")

    try:
        with watching(Heartbeat(beat, interval=10.0)) as watch:
            assert entered.wait(DEADLINE)
            watch.stop()
            release.set()
            eventually(lambda: not watch.beating._aside.busy, "the call returned")
            watch.run(lambda: None)
            assert (watch.told, watch.ended) == ([], [])
    finally:
        release.set()


def test_what_those_who_are_told_do_is_no_trouble():
    """Stopping, and starting for the next tree, in the middle of being told."""
    beats: list[Beat] = []
    done = threading.Event()
    loop = loop_module.get()

    def rejecting(beat: Beat) -> None:
        beats.append(beat)
        raise Rejected

    def rejected(_detail: str) -> None:
        if len(beats) == 5:
            done.set()
        else:
            beating.start(Beat("child", f"tree {len(beats)}", None))

    def report(_event: Any) -> None:
        raise ZeroDivisionError("a defect in who is told")

    beating = Beating(loop, Heartbeat(rejecting, interval=10.0), rejected, print, report)
    loop.post(lambda: beating.start(BEAT))
    assert done.wait(DEADLINE)
    assert [beat.tree_id for beat in beats[1:]] == ["tree 1", "tree 2", "tree 3", "tree 4"]


def test_a_stall_of_the_loop_is_not_made_up_for():
    times: list[float] = []
    before: list[int] = []
    over: list[float] = []
    interval = 0.04

    def stall() -> None:
        before.append(len(times))
        time.sleep(0.4)  # the loop is to be late: there is no event for that
        over.append(time.monotonic())

    heartbeat = Heartbeat(
        lambda _beat: times.append(time.monotonic()), interval=interval, failures=1_000_000
    )
    with watching(heartbeat) as watch:
        watch.wait_for(2)
        watch.run(stall)
        watch.wait_for(len(watch.told) + 3)
    # The one that is due by then, and perhaps the next one of the grid: not one for each missed.
    assert len([at for at in times[before[0] :] if at < over[0] + interval / 2]) <= 2


# -- many


def test_half_of_the_requests_hang_and_the_others_beat_on():
    """200 at once. Of those that hang each has one request and one thread under way."""

    def answer(server: Server, sock: socket.socket) -> None:
        (hanging if b"hang" in server.request_of[sock] else status("200 OK"))(server, sock)

    with serving(answer) as server:
        watches = []
        for number in range(200):
            url = server.url + ("&hang" if number % 2 else "")
            heartbeat = quick(Heartbeat(HttpBeat(url), 60.0, 60.0, 1), 0.2)
            watches.append(Watch(heartbeat, Beat("child", f"{number:016x}", None)))
        try:
            for watch in watches[::2]:
                watch.wait_for(3)
            assert all(watch.ended == [] for watch in watches)
            assert all(watch.told == [] for watch in watches[1::2])
            server.wait_for(400)
            assert sum(b"hang" in request for request in server.requests) == 100
            assert len(callbacks()) <= 200 + CALLED_IN_VAIN
        finally:
            for watch in watches:
                watch.loop.post(watch.beating.stop)


def test_half_of_the_callables_hang_and_the_others_beat_on():
    """200 at once. Those that hang have one thread each, though their time is over."""
    release = threading.Event()
    entered: list[str] = []
    good: dict[str, int] = {}
    enough = threading.Event()
    lock = threading.Lock()

    def beat(beat: Beat) -> None:
        if beat.name.startswith("hangs"):
            with lock:
                entered.append(beat.name)
            assert release.wait(DEADLINE)
            return
        with lock:
            good[beat.name] = good.get(beat.name, 0) + 1
            if len(good) == 100 and min(good.values()) >= 4:
                enough.set()

    watches = []
    heartbeat = Heartbeat(beat, interval=0.1, failures=1_000_000)
    try:
        for number in range(200):
            name = f"{'hangs' if number % 2 else 'beats'} {number}"
            watches.append(Watch(heartbeat, Beat(name, f"{number:016x}", None)))
        assert enough.wait(DEADLINE)
        assert sorted(entered) == sorted(set(entered))
        assert len(entered) == 100
        assert len(callbacks()) <= 200 + CALLED_IN_VAIN
        hanging_ones = [watch for watch in watches if watch.told and watch.errors()]
        assert len(hanging_ones) >= 100
    finally:
        for watch in watches:
            watch.loop.post(watch.beating.stop)
        release.set()


def test_a_server_that_hangs_delays_no_tree():
    """While 50 requests hang, a tree starts, talks, and ends."""
    with serving(hanging) as server:
        watches = [
            Watch(http(server.url), Beat("child", str(number), None)) for number in range(50)
        ]
        try:
            server.wait_for(50)
            outcome = proctree.run(["echo", "hello"], stdout=proctree.CAPTURE)
            assert outcome.stdout == b"hello\n"
            assert all(watch.told == [] for watch in watches)
        finally:
            for watch in watches:
                watch.loop.post(watch.beating.stop)


# -- a real tree


def test_a_rejected_heartbeat_ends_a_real_tree():
    lines = Lines()
    script = "sh -c 'trap \"\" TERM; setsid sleep 1000 & echo $!; wait' & echo $$; wait"
    with serving(status("200 OK"), status("200 OK"), status("409 Conflict")) as server:
        handle = WatchedSubprocess.start(
            ["sh", "-c", script], stdout=proctree.Lines(lines), kill=QUICK
        )
        with handle:
            lines.wait_for(2)
            members = {info.pid for info in handle.processes()}
            assert len(members) >= 3

            def end(detail: str) -> None:
                handle.kill(reason=f"heartbeat-rejected: {detail}")

            heartbeat = http(server.url)
            beating = Beating(loop_module.get(), heartbeat, end, end)
            beat = Beat(handle.name, handle.tree_id, handle.pid)
            loop_module.get().post(lambda: beating.start(beat))
            outcome = handle.wait(DEADLINE)
        assert outcome is not None
        assert outcome.reason is Reason.KILLED
        assert outcome.detail == "heartbeat-rejected: 409 Conflict"
        assert outcome.survivors == ()
        assert len(server.requests) == 3
    assert not any(is_alive(pid) for pid in members)
