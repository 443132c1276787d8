"""What tests of things on the loop have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from proctree import loop as loop_module

LONG = 60.0
T = TypeVar("T")


def on_loop(function: Callable[[], T]) -> T:
    """What the function returns, or raises, on the loop's thread."""
    future: Future[T] = Future()

    def job() -> None:
        try:
            future.set_result(function())
        except BaseException as exception:
            future.set_exception(exception)

    loop_module.get().post(job)
    return future.result(LONG)


class Heard:
    """What was called, in order, and somebody who waits for it."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, *what: Any) -> None:
        with self._changed:
            self.all.append(what[0] if len(what) == 1 else what)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()

    def wait_for(self, count: int = 1) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all) >= count, LONG), self.all
            return list(self.all)

    def named(self, name: str) -> Callable[..., None]:
        """A function whose calls are told from others' by a name."""
        return lambda *what: self(name, *what)
