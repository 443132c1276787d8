"""The event loops that trees are tried in, and tasks that are interrupted at a certain await."""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Callable, Collection, Coroutine, Generator
from typing import Any

import anyio
import anyio.lowlevel
import pytest

ASYNCIO, UVLOOP, TRIO = "asyncio", "uvloop", "trio"
NAMES = (ASYNCIO, UVLOOP, TRIO)


def run_in(name: str, function: Callable[..., Coroutine[Any, Any, Any]], *args: object) -> Any:
    """Runs it in a new event loop of this kind."""
    if name == TRIO:
        return anyio.run(function, *args, backend="trio")
    if name == UVLOOP and importlib.util.find_spec("uvloop") is None:
        pytest.skip("there is no uvloop here")
    options = {"use_uvloop": name == UVLOOP}
    return anyio.run(function, *args, backend="asyncio", backend_options=options)


@pytest.fixture(scope="module", autouse=True)
def uvloop_is_set_up() -> None:
    """For the modules that import it: uvloop has a pipe for signals, which belongs to the process
    and not to the first test."""
    with contextlib.suppress(pytest.skip.Exception):
        run_in(UVLOOP, anyio.lowlevel.checkpoint)


@types.coroutine
def interrupted(
    task: Coroutine[Any, Any, Any], at: Collection[int], interrupt: Callable[[], object]
) -> Generator[Any, Any, tuple[Any, int]]:
    """Runs it, and calls `interrupt` each time when it is about to wait for the nth time, n as in
    `at`. What that raises is raised where it waits, as that of a signal handler would be. Answers
    its result, and how often it has waited."""
    count = 0
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            waits_for = task.send(value) if error is None else task.throw(error)
        except StopIteration as stop:
            return stop.value, count
        value = error = None
        count += 1
        try:
            if count in at:
                interrupt()
            value = yield waits_for
        except BaseException as exception:
            error = exception
