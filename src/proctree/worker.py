"""Where the user's Python code runs: never on the loop.

A callback that blocks or raises must not hold up other trees, so each tree's callbacks run one
after the other on a thread that is nobody else's while they last. Threads are made when they are
needed and kept for a while for the next.

Whoever has much to do here (a program that floods its output) would be felt by everybody: who wants
the interpreter's lock from a thread that does not give it up waits for sys.getswitchinterval()
(5 ms), and the loop wants it again after every system call. So a worker that has been busy for a
moment sleeps for a shorter one. Nothing less than a sleep will do: a thread that only lets go of
the lock has it back before another one has woken up. And while a loop has something to do, workers
stand aside until it has done it, within reason.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep

Job = Callable[[], None]

IDLE_SECONDS = 5.0
"""How long a thread without work is kept."""

BUSY_SECONDS = 0.001
"""How long a worker may keep others from the interpreter's lock."""

ASIDE_SECONDS = 0.005
"""How long it stands aside at most before it goes on for a moment."""

BREATH_SECONDS = 0.000001
"""How long it sleeps then. The kernel adds its timer slack, 50 us: prctl(2), PR_SET_TIMERSLACK."""


class _Threads:
    """As many threads as there are jobs that take long, and a few idle ones.

    One thread at a time is on its way to the work that waits, and calls the next when it is there.
    Jobs that are done at once are thus done by two or three threads one after the other, without a
    wake-up each; and each job that blocks costs those behind it no more than one such step.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._idle: list[threading.Lock] = []
        self.coming = False
        """Whether a thread was called and has not arrived."""

    def run(self, job: Job) -> None:
        with self._lock:
            self._jobs.append(job)
            wanted = self._call()
        if not wanted:
            return
        try:
            self._start()
        except RuntimeError:
            # Whoever is told that it does not run must be able to rely on that.
            if self._take_back(job):
                raise

    def _take_back(self, job: Job) -> bool:
        """False when a thread that was busy until now has taken it after all."""
        with self._lock:
            for place, waiting in enumerate(self._jobs):
                if waiting is job:
                    del self._jobs[place]
                    return True
        return False

    def _call(self) -> bool:
        """With the lock: has one more thread come if there is work for it; returns whether it has
        to be made."""
        if self.coming or not self._jobs:
            return False
        self.coming = True
        if not self._idle:
            return True
        self._idle.pop().release()
        return False

    def _start(self) -> None:
        """Where no thread can be had for now the work is kept: for one of those that there are, or
        until we are asked to try again."""
        try:
            threading.Thread(target=self._work, name="proctree-callbacks", daemon=True).start()
        except RuntimeError:  # EAGAIN or ENOMEM of pthread_create(3)
            if try_later is None:
                with self._lock:
                    self.coming = False
                raise
            try_later(self._start_again)

    def _start_again(self) -> None:
        with self._lock:
            self.coming = False
            wanted = self._call()
        if wanted:
            self._start()

    def _work(self) -> None:
        arrived = True
        while True:
            job, gate = self._take(arrived)
            if job is not None:
                arrived = False
                job()
            elif self._is_called(gate):
                arrived = True
            else:
                return

    def _take(self, arrived: bool) -> tuple[Job | None, threading.Lock]:
        """A job, or the gate to rest behind."""
        gate = threading.Lock()
        with self._lock:
            if arrived:
                self.coming = False
            if not self._jobs:
                gate.acquire()
                self._idle.append(gate)
                return None, gate
            job, wanted = self._jobs.popleft(), self._call()
        if wanted:
            # Without another thread the work waits for the next one that is done with its own.
            with contextlib.suppress(RuntimeError):
                self._start()
        return job, gate

    def _is_called(self, gate: threading.Lock) -> bool:
        """Whether an idle thread is needed again before its time is up."""
        if gate.acquire(timeout=IDLE_SECONDS):
            return True
        with self._lock:
            if gate not in self._idle:
                return True  # just now
            self._idle.remove(gate)
        return False


_pressing: set[object] = set()
"""The loops that have something to do at this moment."""

_aside: deque[threading.Lock] = deque()
"""The gates of the workers that stand aside for them."""


def begin_turn(loop: object) -> None:
    """A loop has something to do."""
    _pressing.add(loop)


def end_turn(loop: object) -> None:
    """It has done it."""
    _pressing.discard(loop)
    while _aside and not _pressing:
        try:
            gate = _aside.popleft()
        except IndexError:
            return  # another loop was faster
        gate.release()


def _stand_aside() -> None:
    gate = threading.Lock()
    gate.acquire()
    _aside.append(gate)
    # Looked at again: the turn may have ended just before the gate was there.
    if _pressing:
        gate.acquire(timeout=ASIDE_SECONDS)


try_later: Callable[[Job], None] | None = None
"""Calls something after a while; the loop, which knows of time, puts it here."""

_threads = _Threads()


def reset() -> None:
    """In a forked child no thread is left."""
    global _threads
    _threads = _Threads()
    _pressing.clear()
    _aside.clear()


def run(job: Job) -> None:
    """Runs a job that must not raise on a thread that is nobody else's meanwhile. Does not block.

    Raises:
        RuntimeError: there is no thread for it, and no loop to try again later: it does not run.
    """
    _threads.run(job)


class Worker:
    """Runs jobs in order, one at a time, off the caller's thread.

    A job must not raise: whoever posts it catches what the user's code does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._running = False
        self._thread: int | None = None
        self._breathed = 0.0

    def post(self, job: Job) -> None:
        """Does not block.

        Raises:
            RuntimeError: as `run`.
        """
        with self._lock:
            self._jobs.append(job)
            if self._running:
                return
            self._running = True
        try:
            run(self._drain)
        except RuntimeError:
            with self._lock:
                # There was none before it, or it would have been running.
                self._jobs.popleft()
                self._running = False
            raise

    def is_current_thread(self) -> bool:
        """Whether the caller is one of this worker's own jobs."""
        return self._thread == threading.get_ident()

    def breathe(self) -> None:
        """In a job, between two pieces of work that nobody waits for: lets others go on."""
        if _pressing:
            _stand_aside()
            self._breathed = monotonic()
        elif _threads.coming or monotonic() - self._breathed >= BUSY_SECONDS:
            sleep(BREATH_SECONDS)
            self._breathed = monotonic()

    def _drain(self) -> None:
        self._thread = threading.get_ident()
        self._breathed = monotonic()
        while True:
            with self._lock:
                if not self._jobs:
                    self._running = False
                    self._thread = None
                    return
                job = self._jobs.popleft()
            job()
