"""Interrupting what runs at each single bytecode of it.

The interpreter runs a signal handler between two bytecodes, and only of some: behind a call, at a
jump backwards, at the entry of a function. Chance finds the fatal one of a thousand late or never.
So some of the code is traced by the opcode, and the N-th is the one: N is counted up until what is
done is through before it comes.

A signal is not simulated: at the N-th opcode it becomes pending, as the C handler of a signal does
it, without the interpreter noticing on the way from here, and so the Python handler runs exactly
where it would. Exceptions therefore come where they can come and nowhere else.
"""

from __future__ import annotations

import _thread
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

SIGNAL = signal.SIGUSR1


class Interrupt(BaseException):
    """What a handler raises; as a time limit does."""


class Tracer:
    """Makes a signal pending at the N-th opcode of some files that this thread comes to.

    Args:
        at: that one; counted from 0.
        files: their paths.
        direct: called instead.
        signo: the signal.
    """

    def __init__(
        self,
        at: int,
        files: Collection[str],
        direct: Callable[[], None] | None = None,
        signo: signal.Signals = SIGNAL,
    ) -> None:
        self.at = at
        self._files = files
        self.count = 0
        self.where = ""
        self._direct = direct
        self._signo = signo
        # Held: sys.settrace(None) in the middle of one would free it.
        self._call = self._on_call
        self._opcode = self._on_opcode

    def __enter__(self) -> Tracer:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    @property
    def reached(self) -> bool:
        return bool(self.where)

    def _on_call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._opcode

    def _on_opcode(self, frame: FrameType, event: str, _arg: Any) -> Any:
        mine = self._opcode
        if event != "opcode":
            return mine
        number = self.count
        self.count += 1
        if number != self.at:
            return mine
        self.where = (
            f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} +{frame.f_lasti} "
            f"in {frame.f_code.co_name}"
        )
        if self._direct is not None:
            self._direct()
            return mine
        # The next call of a trace function would notice the signal before its time.
        sys.settrace(None)
        # So would a call that Python makes here; a step of `for` does not.
        for _ in map(_thread.interrupt_main, (self._signo,)):
            return None
        return None
