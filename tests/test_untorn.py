from __future__ import annotations

import contextvars
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from proctree.durable.untorn import untorn


class Handled(BaseException):
    pass


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Has a handler raise on the main thread, whoever calls it."""

    def handle(_signo: int, _frame: FrameType | None) -> None:
        raise Handled

    before = signal.signal(signal.SIGUSR1, handle)
    yield lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_it_answers_what_the_work_does():
    assert untorn(lambda: 5) == 5
    assert untorn(lambda: None) is None


def test_it_raises_what_the_work_does():
    with pytest.raises(ZeroDivisionError) as caught:
        untorn(lambda: 1 // 0)
    assert caught.traceback[-1].name == "<lambda>"


def test_a_handler_raises_out_of_the_wait_and_not_out_of_the_work(interrupt):
    go_on, done = threading.Event(), threading.Event()

    def work():
        interrupt()
        go_on.wait()
        done.set()

    with pytest.raises(Handled):
        untorn(work)
    assert not done.is_set()
    go_on.set()
    assert done.wait(30)


def test_the_work_sees_our_context():
    known = contextvars.ContextVar("known", default="nothing")
    known.set("ours")
    assert untorn(known.get) == "ours"


def test_where_no_handler_runs_it_stays_on_its_thread():
    seen = []

    def work():
        seen.append(untorn(threading.current_thread))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [thread]


def test_without_a_thread_it_is_done_all_the_same():
    before = threading.stack_size(1 << 47)  # all that a process can address
    try:
        assert untorn(threading.current_thread) is threading.main_thread()
    finally:
        threading.stack_size(before)
