"""Trees of puppets (puppet.c), and what is certain about them at every moment.

Whoever tests what was chosen at random cannot wait for what one script is known to do. What is
needed instead is an oracle: whether anything of this tree lives, now, whatever became of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import time
from pathlib import Path

from proctree import WatchedSubprocess
from proctree.process import proof

LIFELINE_FD = 100
EXIT_TOLD = 3
LINE = b"line\n"
MUCH = (b"x" * 63 + b"\n") * (2 * 1024 * 1024 // 64)
CHILDREN = "cCg"
"""Letters that each leave one living process more."""

_numbers = itertools.count()


def build(folder: Path) -> str:
    """Compiles the program; returns its path."""
    path = str(folder / "puppet")
    source = str(Path(__file__).parent / "puppet.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", path, source], check=True)
    return path


def output_of(script: str) -> bytes:
    """What a puppet that performs all of it has written."""
    return b"".join({"w": LINE, "W": MUCH}.get(letter, b"") for letter in script)


class Puppets:
    """One tree of puppets: its FIFOs, and what they tell."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        number = next(_numbers)
        self.path = str(folder / f"lifeline-{number}")
        self._control_path = str(folder / f"control-{number}")
        os.mkfifo(self.path)
        os.mkfifo(self._control_path)
        self._lifeline = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # For reading too: then it can be written to before there is a puppet, and after.
        self._control = os.open(self._control_path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._said = 0

    def argv(self, script: str) -> list[str]:
        return [self._program, self.path, script, self._control_path]

    def tell(self, script: str) -> None:
        os.write(self._control, script.encode())

    def live(self) -> bool:
        """Whether any of them lives. Exact: the kernel closes a process's files before anybody can
        learn that it has ended."""
        while True:
            try:
                said = os.read(self._lifeline, 4096)
            except BlockingIOError:
                return True
            if not said:
                return False
            self._said += len(said)

    def wait_until_said(self, count: int, timeout: float) -> bool:
        """Waits until `a` was performed `count` times in all, or none of them lives."""
        poller = select.poll()
        poller.register(self._lifeline, select.POLLIN)
        deadline = time.monotonic() + timeout
        while True:
            lives = self.live()
            if self._said >= count:
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # A FIFO that nobody has opened for writing yet has no end of file: it is waited for.
            for _, mask in poller.poll(left * 1000):
                if not lives and mask & select.POLLHUP and not mask & select.POLLIN:
                    return False

    def open_main(self, pid: int | None) -> int | None:
        """A pidfd of the main process, or None when the number is not a puppet's of this tree (any
        more): it can be reused at any time."""
        if pid is None:
            return None
        pidfd = proof.open_pidfd(pid)
        if pidfd is None:
            return None
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{LIFELINE_FD}") == self.path:
                return pidfd
        os.close(pidfd)
        return None

    def shoot_main(self, pid: int | None, signo: int) -> bool:
        """Signals the main process behind the supervisor's back; whether it was there."""
        pidfd = self.open_main(pid)
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, signo)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def hold_stdout(self, pid: int | None) -> int | None:
        """Another descriptor for the standard output of the main process, as a process outside the
        tree that got it by mistake would have."""
        pidfd = self.open_main(pid)
        if pidfd is None:
            return None
        try:
            return os.open(f"/proc/{pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """All that still live end by themselves now, unless they are stopped."""
        os.close(self._lifeline)
        os.close(self._control)
        os.unlink(self.path)
        os.unlink(self._control_path)


def signal_warden(handle: WatchedSubprocess, signo: int) -> bool:
    """Signals the warden that holds a tree, if one does; whether it was there."""
    contained = handle._tree.contained
    pid = contained.root()
    pidfd = None if pid is None else proof.open_pidfd(pid)
    if pid is None or pidfd is None:
        return False
    try:
        # All of it is read behind the pidfd: what is a child of ours, and named by the tree now as
        # before, is what it holds its members by. Without a helper that is the main process.
        stat = proof.read_stat(pid)
        ours = stat is not None and stat.ppid == os.getpid()
        if not ours or contained.root() != pid or contained.pid == pid:
            return False
        signal.pidfd_send_signal(pidfd, signo)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True
