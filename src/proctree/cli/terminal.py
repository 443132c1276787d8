"""`proctree run` between two terminals, or as a job of the shell that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import threading
import tty
from typing import Any

from proctree.process import fds, proof
from proctree.terminal import END_OF_INPUT
from proctree.watched import WatchedSubprocess

_PIECE = 4096


def write_out(data: bytes) -> None:
    """What the tree's terminal shows, to our standard output, as it is."""
    fds.write_all(1, data)


class Relay:
    """Connects our terminal with the tree's: keys in raw mode, so that Ctrl-C and Ctrl-Z are the
    tree's; the size of the window; and our terminal as it was, at the end."""

    def __init__(self) -> None:
        self._saved: list[Any] | None = None
        self._handle: WatchedSubprocess | None = None

    def prepare(self) -> None:
        """Before the launch: from its first byte on, what the command's terminal shows is ready to
        be shown by ours as it is."""
        if os.isatty(0):
            self._saved = termios.tcgetattr(0)
            # Without the default's TCSAFLUSH: what was typed ahead is for the command.
            tty.setraw(0, termios.TCSADRAIN)

    def begin(self, handle: WatchedSubprocess) -> None:
        """After the launch."""
        self._handle = handle
        if self._saved is not None:
            signal.signal(signal.SIGWINCH, self._resized)
            self._resized(signal.SIGWINCH, None)
        threading.Thread(target=self._pump, daemon=True).start()

    def _resized(self, _signo: int, _frame: object) -> None:
        terminal = None if self._handle is None else self._handle.terminal
        if terminal is not None:
            # Ours is where the keys come from: standard output may be a file.
            with contextlib.suppress(OSError, ValueError):  # hung up, or a window of no size
                terminal.resize(*reversed(os.get_terminal_size(0)))

    def _pump(self) -> None:
        terminal = None if self._handle is None else self._handle.terminal
        if terminal is None:
            return
        typed = b"\n"
        try:
            while data := os.read(0, _PIECE):
                typed = data
                if not terminal.write(data):
                    return
        except OSError:  # our terminal hung up
            pass
        terminal.write(END_OF_INPUT if typed.endswith(b"\n") else END_OF_INPUT * 2)

    def end(self) -> None:
        if self._saved is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
            self._saved = None


class Job:
    """A foreground job: when the command is stopped, so are we, and when the shell lets us go on,
    it does too, with the terminal if we are in the foreground."""

    def __init__(self, handle: WatchedSubprocess) -> None:
        self._tree = handle._tree
        self._tree.when_stopped.append(self._stopped)
        signal.signal(signal.SIGCONT, self._continued)

    def _stopped(self, _signo: int) -> None:
        if self._orphaned():
            # Nobody is there who would let us go on: as the kernel does with such groups, the stop
            # is ignored (setpgid(2), "orphaned process group").
            self._tree.foreground()
        else:
            os.kill(0, signal.SIGSTOP)

    def _orphaned(self) -> bool:
        """Whether no process of our session outside of our group is above us. Our parent may be a
        script, which is in our group: then it is its parent that counts."""
        group, session = os.getpgrp(), os.getsid(0)
        above = proof.read_stat(os.getppid())
        while above is not None and above.session == session:
            if above.pgrp != group:
                return False
            above = proof.read_stat(above.ppid)
        return True

    def _continued(self, _signo: int, _frame: object) -> None:
        self._tree.foreground()
