"""`proctree.notify`, against a socket of the test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proctree import notify


@pytest.fixture(params=["path", "abstract"])
def receiver(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    name = f"@proctree-test-{os.getpid()}" if request.param == "abstract" else f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0"))
        sock.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_what_is_sent(receiver):
    assert notify.notify("READY=1", "STATUS=ä €")
    assert receiver.recv(100) == "READY=1\nSTATUS=ä €".encode()
    assert notify.ready()
    assert receiver.recv(100) == b"READY=1"
    assert notify.ready("up")
    assert receiver.recv(100) == b"READY=1\nSTATUS=up"
    assert notify.status("one\ntwo\0three\x85four\udcff")
    assert receiver.recv(100) == b"STATUS=one two three four\xff"
    assert notify.watchdog()
    assert receiver.recv(100) == b"WATCHDOG=1"
    assert notify.stopping()
    assert receiver.recv(100) == b"STOPPING=1"
    assert notify.reloading()
    name, _, value = receiver.recv(100).partition(b"\nMONOTONIC_USEC=")
    assert name == b"RELOADING=1"
    assert int(value) > 0


def test_a_barrier_lasts_until_its_descriptor_is_closed(receiver):
    done: list[bool] = []
    waiting = threading.Thread(target=lambda: done.append(notify.barrier(30)))
    waiting.start()
    data, fds, _, _ = socket.recv_fds(receiver, 100, 4)
    assert data == b"BARRIER=1"
    (fd,) = fds
    assert not done
    os.close(fd)
    waiting.join(30)
    assert done == [True]


def test_a_barrier_that_nobody_lifts(receiver):
    assert not notify.barrier(0.05)


@pytest.mark.parametrize("value", [None, "", "@", "relative", "vsock:2:1234", "/nobody/there"])
def test_without_anybody_who_listens(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert not notify.notify("READY=1")
    assert not notify.barrier(30)


def test_a_name_that_is_too_long_for_a_socket(monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/" + "x" * 200)
    assert not notify.ready()


def test_who_does_not_read_is_not_waited_for_for_ever(receiver, monkeypatch):
    monkeypatch.setattr(notify, "SEND_SECONDS", 0.01)
    for _ in range(100_000):
        if not notify.watchdog():
            return
    pytest.fail("the socket never filled")


@pytest.mark.parametrize("wrong", ["READY", "", "STATUS=a\nMAINPID=1", "STATUS=\0"])
def test_what_is_no_assignment(wrong, monkeypatch):
    """Also where nobody listens: a mistake is not found in production only."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with pytest.raises(ValueError, match="NAME=value"):
        notify.notify("READY=1", wrong)


@pytest.mark.parametrize(
    ("value", "pid", "interval"),
    [
        (None, None, None),
        ("2500000", None, 2.5),
        ("2500000", "own", 2.5),
        ("2500000", "1", None),
        ("0", None, None),
        ("-1", None, None),
        ("", None, None),
        ("x", None, None),
        ("²", None, None),
    ],
)
def test_the_interval_of_the_watchdog(monkeypatch, value, pid, interval):
    for name, text in (("WATCHDOG_USEC", value), ("WATCHDOG_PID", pid)):
        if text is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(os.getpid()) if text == "own" else text)
    assert notify.watchdog_interval() == interval


def test_it_needs_nothing_of_the_package():
    """A child that only wants to say that it is ready does not pay for a supervisor."""
    code = (
        "import sys, proctree.notify\n"
        "assert not proctree.notify.ready()\n"
        "print([m for m in sys.modules if m.startswith('proctree.')])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=environment,
    )
    only = subprocess.run(
        [sys.executable, "-c", code.replace("proctree.notify\nassert not", "proctree\nTrue or")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    more = set(eval(done.stdout)) - set(eval(only.stdout))
    assert more == {"proctree.notify"}
