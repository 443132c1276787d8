"""Calls off the loop: exactly one answer each, on the loop, and one thread at most."""

from __future__ import annotations

import gc
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from on_loop import LONG, Heard, on_loop
from proctree import loop as loop_module
from proctree import worker
from proctree.supervisor.aside import (
    TEXT_MAX,
    Aside,
    Raised,
    TimedOut,
    describe,
    result_of,
    shorten,
    to_function,
)


@pytest.fixture
def aside() -> Aside:
    return Aside(loop_module.get())


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end whatever happens."""
    event = threading.Event()
    yield event
    event.set()


def call(
    aside: Aside, function: Callable[[], Any], timeout: float = LONG, heard: Heard | None = None
) -> Heard:
    heard = heard or Heard()
    on_loop(lambda: aside.call(function, timeout, heard))
    return heard


def idle(aside: Aside) -> None:
    """Returns when nothing is under way."""
    done = Heard()
    call(aside, lambda: None, LONG, done).wait_for()
    assert not on_loop(lambda: aside.busy)


def test_what_it_returns_comes_on_the_loop_from_another_thread(aside):
    heard = call(aside, lambda: threading.current_thread().name)
    assert heard.wait_for() == ["proctree-callbacks"]
    assert heard.threads == {"proctree-loop"}
    assert not on_loop(lambda: aside.busy or aside.awaited)


def test_a_call_may_have_all_the_time_there_is(aside):
    assert call(aside, lambda: 7, math.inf).wait_for() == [7]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no"), "ValueError: no"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_what_it_raises_is_told_and_ends_no_thread(aside, error, text):
    threads: list[threading.Thread] = []

    def function() -> None:
        threads.append(threading.current_thread())
        raise error

    assert call(aside, function).wait_for() == [Raised(text)]
    assert threads[0].is_alive()


def test_the_answer_may_be_the_next_question(aside):
    answers = Heard()

    def done(result: int) -> None:
        answers(result)
        if result < 20:
            aside.call(lambda: result + 1, LONG, done)

    on_loop(lambda: aside.call(lambda: 0, LONG, done))
    assert answers.wait_for(21) == list(range(21))


def test_two_answers_cannot_be_awaited(aside, gate):
    heard = call(aside, gate.wait)
    with pytest.raises(RuntimeError, match="still awaited"):
        call(aside, lambda: None)
    gate.set()
    assert heard.wait_for() == [True]


def test_a_late_result_is_dropped(aside, gate):
    heard = call(aside, gate.wait, 0.02)
    assert heard.wait_for() == [TimedOut("not done within 0.02 s")]
    assert on_loop(lambda: aside.busy and not aside.awaited)
    gate.set()
    idle(aside)
    assert len(heard.all) == 1


def test_while_one_hangs_no_other_begins(aside, gate):
    began: list[int] = []
    heard = Heard()
    call(aside, gate.wait, 0.01, heard).wait_for()
    for number in range(1, 4):
        call(aside, lambda number=number: began.append(number), 0.01, heard)
        heard.wait_for(number + 1)
    assert began == []
    for result in heard.all[1:]:
        assert result.text.startswith("not begun: the call before it is still hanging after ")
    waiting = call(aside, lambda: "came to its turn")
    gate.set()
    assert waiting.wait_for() == ["came to its turn"]
    assert began == []


def test_a_cancelled_call_is_not_answered_and_gives_back_its_place(aside, gate):
    heard = call(aside, gate.wait)
    on_loop(aside.cancel)
    waiting = call(aside, lambda: "next")
    gate.set()
    assert waiting.wait_for() == ["next"]
    assert heard.all == []


def test_a_call_that_is_cancelled_before_its_turn_never_begins(aside, gate):
    began: list[int] = []
    on_loop(aside.cancel)
    heard = call(aside, gate.wait, 0.01)
    heard.wait_for()
    call(aside, lambda: began.append(1))
    on_loop(aside.cancel)
    gate.set()
    idle(aside)
    assert began == []


def test_a_cancelled_limit_does_not_strike_the_next_call(aside, gate):
    def twice() -> None:
        aside.call(lambda: None, 0.0, lost)
        aside.cancel()
        aside.call(gate.wait, LONG, heard)

    lost, heard = Heard(), Heard()
    on_loop(twice)
    later = threading.Event()
    loop = loop_module.get()
    on_loop(lambda: loop.call_later(0.05, later.set))
    assert later.wait(LONG)
    gate.set()
    assert heard.wait_for() == [True]
    assert lost.all == []


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """None can be had, until it is called."""
    start = threading.Thread.start
    allowed = threading.Event()

    def refusing(self: threading.Thread) -> None:
        if not allowed.is_set() and self.name.startswith("proctree-callbacks"):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(worker, "_threads", worker._Threads())
    monkeypatch.setattr(threading.Thread, "start", refusing)
    yield allowed.set
    allowed.set()


def test_without_threads_a_call_is_late_and_the_next_one_waits(aside, no_threads):
    began: list[int] = []
    heard = call(aside, lambda: began.append(1), 0.02)
    assert heard.wait_for() == [TimedOut("not begun within 0.02 s: there is no thread for it")]
    for number in range(2, 12):
        call(aside, lambda: began.append(2), 0.001, heard).wait_for(number)
    assert len(worker._threads._jobs) == 1
    waiting = call(aside, lambda: "there is one again")
    no_threads()
    assert waiting.wait_for() == ["there is one again"]
    assert began == []


def test_without_threads_and_without_hope_a_call_fails(aside, gate, no_threads, monkeypatch):
    monkeypatch.setattr(worker, "try_later", None)
    began: list[int] = []
    (result,) = call(aside, lambda: began.append(1)).wait_for()
    assert result == Raised("no thread to call it on: can't start new thread")
    assert not on_loop(lambda: aside.busy or aside.awaited)
    # It must not come to its turn now, and end another call's.
    no_threads()
    assert call(aside, gate.wait, 0.2).wait_for() == [TimedOut("not done within 0.2 s")]
    assert on_loop(lambda: aside.busy)
    assert began == []


def test_what_the_function_held_and_raised_is_not_kept(aside):
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    inside: list[weakref.ref[Held]] = []

    def function(held: Held = held) -> None:
        local = Held()
        inside.append(weakref.ref(local))
        raise ValueError(held)

    del held
    heard = call(aside, function)
    heard.wait_for()
    del function
    idle(aside)
    gc.collect()
    assert gone() is None
    assert inside[0]() is None


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit


def test_an_exception_is_described_whatever_it_does():
    assert describe(Unprintable()) == "Unprintable"
    assert describe(OSError()) == "OSError"
    assert describe(ValueError("a\nb\x1b[31m")) == "ValueError: a b [31m"
    assert len(describe(ValueError("x" * 10**6))) < TEXT_MAX + 30


def test_a_text_is_one_short_line():
    assert shorten("a\r\nb") == "a  b"
    assert shorten("x" * 300) == "x" * 300
    assert shorten("x" * 301) == "x" * 300 + "..."
    assert shorten("abc", 2) == "ab..."


async def coroutine_function() -> None:
    raise AssertionError


class AsyncCallable:
    async def __call__(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("value", [None, 7, "f", ValueError, coroutine_function, AsyncCallable()])
def test_only_ordinary_functions_can_be_called_on_a_thread(value):
    with pytest.raises(TypeError, match=r"^field: "):
        to_function(value, "field")


def test_a_coroutine_is_no_result(recwarn):
    with pytest.raises(TypeError, match="coroutine"):
        result_of(lambda: coroutine_function())
    gc.collect()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]
    assert result_of(lambda number: number + 1, 2) == 3
    assert sys.exc_info() == (None, None, None)
