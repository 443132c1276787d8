"""For the program that is supervised: the client of sd_notify(3).

It talks to whoever set NOTIFY_SOCKET: proctree's supervisor, systemd, a container engine. Nothing
of this needs the rest of the package, and every function may be called anywhere: without a
supervisor they do nothing and say so.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time

SOCKET_VARIABLE = "NOTIFY_SOCKET"
INTERVAL_VARIABLE = "WATCHDOG_USEC"
PID_VARIABLE = "WATCHDOG_PID"

SEND_SECONDS = 5.0
"""How long a supervisor that does not read is waited for."""


def _address() -> str | bytes | None:
    """None where there is nobody, or nobody whom a Unix socket reaches."""
    value = os.environb.get(SOCKET_VARIABLE.encode(), b"")
    if value.startswith(b"@") and len(value) > 1:
        return b"\0" + value[1:]  # unix(7), "Abstract sockets"
    return os.fsdecode(value) if value.startswith(b"/") else None


def _send(text: str, seconds: float, fd: int | None = None) -> bool:
    address = _address()
    if address is None:
        return False
    ancillary = []
    if fd is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    data = text.encode("utf-8", "surrogateescape")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(seconds)
            sock.sendmsg([data], ancillary, 0, address)
    except (OSError, ValueError):
        return False
    return True


def notify(*assignments: str) -> bool:
    """Sends assignments, "READY=1" or "STATUS=at work", in one message.

    A process that ends right afterwards should call `barrier` before: nobody can tell any more
    whose message it was otherwise.

    Returns:
        Whether they were sent: False without NOTIFY_SOCKET, and when nobody is there or reads.

    Raises:
        ValueError: an assignment without "=", or with a newline in it.
    """
    for assignment in assignments:
        if "=" not in assignment or "\n" in assignment or "\0" in assignment:
            raise ValueError(f"notify: 'NAME=value' in one line, not {assignment!r}")
    return _send("\n".join(assignments), SEND_SECONDS)


def ready(status: str | None = None) -> bool:
    """It has started, or has finished reloading. As `notify`."""
    return notify("READY=1", *([] if status is None else [_status(status)]))


def reloading() -> bool:
    """It has begun to load its configuration again; `ready` when it has. As `notify`."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> bool:
    """It has begun to end. As `notify`."""
    return notify("STOPPING=1")


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.replace("\0", " ").splitlines())


def status(text: str) -> bool:
    """What it is doing, for people, in one line: newlines become blanks. As `notify`."""
    return notify(_status(text))


def watchdog() -> bool:
    """It is alive. As `notify`."""
    return notify("WATCHDOG=1")


def watchdog_interval() -> float | None:
    """Seconds within which `watchdog` must be called: half of them is a good time. None: no
    watchdog waits for this process (sd_watchdog_enabled(3))."""
    value, pid = os.environ.get(INTERVAL_VARIABLE, ""), os.environ.get(PID_VARIABLE)
    if not (value.isascii() and value.isdigit()) or pid not in (None, "", str(os.getpid())):
        return None
    return int(value) / 1e6 or None


def barrier(timeout: float = SEND_SECONDS) -> bool:
    """Waits until everything that was sent before has been handled: sd_notify_barrier(3).

    Args:
        timeout: in seconds.

    Returns:
        Whether it has. False without NOTIFY_SOCKET, and when nobody answers in time.
    """
    deadline = time.monotonic() + timeout
    reader, writer = os.pipe()
    try:
        try:
            sent = _send("BARRIER=1", timeout, writer)
        finally:
            os.close(writer)
        poller = select.poll()
        poller.register(reader, 0)  # the end of a pipe is always reported: poll(2), POLLHUP
        left = max(0.0, deadline - time.monotonic())
        return sent and bool(poller.poll(left * 1000))
    finally:
        os.close(reader)
