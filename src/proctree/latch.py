"""Something that becomes true once, and the threads that wait for it."""

from __future__ import annotations

import contextlib
import threading

# A signal that comes between the interpreter's last look for one and the system call that sleeps is
# not noticed before that sleep ends: its handler, and so a KeyboardInterrupt, would wait as long as
# we do. The gap is open only at the entry, so a wait is entered a few times: what was missed at one
# entry is seen at the next. A wait that lasts costs three wake-ups and no more.
ENTRIES = (0.01, 0.1, 1.0, threading.TIMEOUT_MAX)


class Latch:
    """Like `threading.Event` that is never cleared, with one difference: it holds no lock of its
    own, so that a signal handler may wait on it, or set it, while the thread that it interrupted is
    in the middle of doing the same."""

    __slots__ = ("_gates", "_set")

    def __init__(self) -> None:
        self._set = False
        # A list: there are two of these for each tree, and an empty deque takes 700 bytes.
        self._gates: list[threading.Lock] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        while True:
            try:
                gate = self._gates.pop()
            except IndexError:
                return
            gate.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits at most `timeout` seconds (None: for ever); returns whether it is set."""
        if self._set:
            return True
        gate = threading.Lock()
        gate.acquire()
        self._gates.append(gate)
        # Looked at again: `set` may have emptied the queue just before the gate was put into it.
        if self._set:
            return True
        limit = threading.TIMEOUT_MAX if timeout is None else max(timeout, 0.0)
        for slice_ in ENTRIES:
            if gate.acquire(timeout=min(slice_, limit, threading.TIMEOUT_MAX)):
                return True
            limit -= slice_
            if limit <= 0:
                break
        # `set` may have come and taken it.
        with contextlib.suppress(ValueError):
            self._gates.remove(gate)
        return self._set
