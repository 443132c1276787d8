"""Jobs in order, one at a time, off the caller's thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from proctree import worker as worker_module
from proctree.worker import Worker

LONG = 60.0


def flush(worker: Worker) -> None:
    """Returns when everything that was posted before has run."""
    done = threading.Event()
    worker.post(done.set)
    assert done.wait(LONG)


def test_jobs_run_in_order_and_one_at_a_time():
    worker = Worker()
    order: list[int] = []
    running = threading.Lock()
    overlaps: list[int] = []

    def job(number: int) -> Callable[[], None]:
        def work() -> None:
            if not running.acquire(blocking=False):
                overlaps.append(number)
            else:
                order.append(number)
                running.release()

        return work

    for number in range(2000):
        worker.post(job(number))
    flush(worker)
    assert overlaps == []
    assert order == list(range(2000))


def test_post_does_not_wait_for_a_job():
    worker = Worker()
    gate = threading.Event()
    worker.post(lambda: gate.wait(LONG) and None)
    done = threading.Event()
    worker.post(done.set)
    assert not done.is_set()
    gate.set()
    assert done.wait(LONG)


def test_one_that_blocks_does_not_hold_up_another():
    gate = threading.Event()
    blocked = Worker()
    blocked.post(lambda: gate.wait(LONG) and None)
    flush(Worker())
    gate.set()
    flush(blocked)


def test_many_that_block_at_once():
    """Each needs a thread of its own: they wait for each other."""
    together = threading.Barrier(20)
    workers = [Worker() for _ in range(20)]
    for worker in workers:
        worker.post(lambda: together.wait(LONG) and None)
    for worker in workers:
        flush(worker)
    assert not together.broken


def test_jobs_from_many_threads_are_all_done():
    worker = Worker()
    count: list[int] = []

    def post_many() -> None:
        for _ in range(500):
            worker.post(lambda: count.append(1))

    threads = [threading.Thread(target=post_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    flush(worker)
    assert len(count) == 2000


def test_a_job_may_post():
    worker = Worker()
    done = threading.Event()
    worker.post(lambda: worker.post(done.set))
    assert done.wait(LONG)


def test_only_its_own_jobs_are_on_its_thread():
    worker, other = Worker(), Worker()
    seen: list[bool] = []
    worker.post(lambda: seen.extend([worker.is_current_thread(), other.is_current_thread()]))
    flush(worker)
    assert seen == [True, False]
    assert not worker.is_current_thread()


def when_a_thread_is_idle() -> None:
    deadline = time.monotonic() + LONG
    while not worker_module._threads._idle:  # it has no way to tell that it is idle
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_worker_that_has_nothing_to_do_claims_no_thread():
    """Its thread goes on with another worker's jobs, where it must not be taken for this one's."""
    worker, other = Worker(), Worker()
    idents: list[int] = []
    seen: list[tuple[int, bool]] = []
    worker.post(lambda: idents.append(threading.get_ident()))
    flush(worker)
    for _ in range(1000):
        when_a_thread_is_idle()
        other.post(lambda: seen.append((threading.get_ident(), worker.is_current_thread())))
        flush(other)
        if seen[-1][0] == idents[-1]:
            break
    assert seen[-1] == (idents[-1], False)


def test_a_thread_that_is_idle_is_used_again():
    flush(Worker())
    for _ in range(20):
        when_a_thread_is_idle()
        before = threading.active_count()
        flush(Worker())
        assert threading.active_count() <= before


def refuse_threads(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """None can be had any more, and nobody tries again later; `meanwhile` is what happens until
    that is known."""
    start = threading.Thread.start

    def refusing(self: threading.Thread) -> None:
        if not self.name.startswith("proctree-callbacks"):
            start(self)
            return
        meanwhile()
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(worker_module, "try_later", None)
    monkeypatch.setattr(threading.Thread, "start", refusing)


def test_a_job_that_was_refused_never_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "_threads", worker_module._Threads())
    ran: list[str] = []
    worker = Worker()
    with monkeypatch.context() as refused:
        refuse_threads(refused)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            worker_module.run(lambda: ran.append("run"))
        with pytest.raises(RuntimeError, match="can't start new thread"):
            worker.post(lambda: ran.append("post"))
    flush(worker)
    flush(Worker())
    assert ran == []


def test_a_job_that_a_busy_thread_has_taken_was_not_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "_threads", worker_module._Threads())
    busy, done = threading.Event(), threading.Event()
    gate = threading.Event()

    def job() -> None:
        busy.set()
        gate.wait(LONG)

    worker_module.run(job)
    assert busy.wait(LONG)

    def meanwhile() -> None:
        gate.set()
        assert done.wait(LONG)

    refuse_threads(monkeypatch, meanwhile)
    worker_module.run(done.set)


# -- others want the interpreter's lock


def _breathing() -> threading.Thread:
    """A worker between two pieces of its work."""
    thread = threading.Thread(target=worker_module.Worker().breathe, daemon=True)
    thread.start()
    return thread


def _until_aside(count: int) -> None:
    deadline = time.monotonic() + LONG
    while len(worker_module._aside) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_worker_stands_aside_until_no_loop_has_something_to_do(monkeypatch):
    monkeypatch.setattr(worker_module, "ASIDE_SECONDS", LONG)
    loops = object(), object()
    for loop in loops:
        worker_module.begin_turn(loop)
    try:
        thread = _breathing()
        _until_aside(1)
        worker_module.end_turn(loops[0])
        assert thread.is_alive()
        assert len(worker_module._aside) == 1
    finally:
        for loop in loops:
            worker_module.end_turn(loop)
    thread.join(LONG / 2)
    assert not thread.is_alive()


def test_a_loop_that_always_has_something_to_do_starves_no_worker():
    loop = object()
    worker_module.begin_turn(loop)
    try:
        thread = _breathing()
        thread.join(LONG)
        assert not thread.is_alive()
    finally:
        worker_module.end_turn(loop)
