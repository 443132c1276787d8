"""Jobs, with a store in memory and a cluster in memory: who calls what, and how often."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from durable_memory import MemoryStore
from proctree.durable.errors import DifferentTarget, NotRunning, StoreUnusable, UnknownKey
from proctree.durable.jobs import (
    GONE,
    RUNNING,
    Ended,
    Job,
    Polled,
    Stopped,
    cancel_job,
    run_job,
)
from proctree.durable.recording import Cause, Exit, Request
from proctree.durable.store import Attempt
from proctree.outcome import Outcome
from proctree.records import Reason

KEY = "nightly"
DEADLINE = 30.0


class Cluster:
    """Where the jobs run. `answers` are those of `poll`, for each job in turn; without one more it
    runs on."""

    def __init__(self, *answers: Polled) -> None:
        self.answers = list(answers)
        self.submitted: list[str] = []
        self.calls: list[str] = []
        self.ended: dict[str, Polled] = {}
        self.polled = threading.Event()

    def submit(self, key: str) -> str:
        self.calls.append("submit")
        self.submitted.append(key)
        return f"handle of {key}"

    def find(self, key: str) -> str | None:
        self.calls.append("find")
        return f"handle of {key}" if key in self.submitted else None

    def poll(self, handle: str) -> Polled:
        self.calls.append("poll")
        assert handle.removeprefix("handle of ") in self.submitted
        if handle not in self.ended and self.answers:
            answer = self.answers.pop(0)
            if answer is RUNNING:
                return RUNNING
            self.ended[handle] = answer
        self.polled.set()
        return self.ended.get(handle, RUNNING)

    def cancel(self, handle: str) -> None:
        self.calls.append("cancel")
        self.ended.setdefault(handle, -15)

    def job(self, **changed: Any) -> Job:
        functions = {"submit": self.submit, "find": self.find, "poll": self.poll}
        options = {"cancel": self.cancel, "name": "report", "every": 0.01}
        return Job(**{**functions, **options, **changed})  # type: ignore[arg-type]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def failing(error: Exception, times: int, then: Callable[..., Any]) -> Callable[..., Any]:
    left = [error] * times

    def function(argument: str) -> Any:
        if left:
            raise left.pop()
        return then(argument)

    return function


def test_a_job_from_its_submission_to_its_end(store: MemoryStore) -> None:
    cluster = Cluster(RUNNING, RUNNING, Ended(0, "all rows written"))
    outcome = run_job(KEY, cluster.job(), store=store)
    assert cluster.calls == ["submit", "poll", "poll", "poll"]
    (attempt,) = store.attempts(KEY)
    assert attempt.request is not None
    assert attempt.handle == f"handle of {attempt.request.tree_id}"
    assert (outcome.returncode, outcome.reason, outcome.detail) == (
        0,
        Reason.EXITED,
        "all rows written",
    )
    assert (outcome.containment, outcome.tree_id) == ("job", attempt.request.tree_id)
    assert len(outcome.tree_id) == 16
    assert int(outcome.tree_id, 16)
    assert outcome.ok
    assert not store.claimed(KEY)


def test_a_result_is_taken_without_any_call(store: MemoryStore) -> None:
    first = run_job(KEY, Cluster(Ended(3, "so so")).job(), store=store, allowed={3})
    cluster = Cluster()
    again = run_job(KEY, cluster.job(), store=store, allowed={3})
    assert again == first
    assert cluster.calls == []


def test_the_intent_is_recorded_before_anything_is_submitted(store: MemoryStore) -> None:
    cluster = Cluster(0)

    def submit(key: str) -> str:
        (attempt,) = store.attempts(KEY)
        assert attempt.request is not None
        assert attempt.request.tree_id == key
        assert attempt.handle is None
        return cluster.submit(key)

    assert run_job(KEY, cluster.job(submit=submit), store=store).ok


def test_what_failed_before_is_tried_again(store: MemoryStore) -> None:
    cluster = Cluster(1, 0)
    assert run_job(KEY, cluster.job(), store=store).returncode == 1
    assert run_job(KEY, cluster.job(), store=store).returncode == 0
    assert [attempt.exit.returncode for attempt in store.attempts(KEY) if attempt.exit] == [1, 0]
    assert len(set(cluster.submitted)) == 2


def test_retries_are_counted(store: MemoryStore) -> None:
    cluster = Cluster(1, 2, 3, 4)
    assert run_job(KEY, cluster.job(), store=store, retries=2).returncode == 3
    assert len(cluster.submitted) == 3


def test_submit_may_or_may_not_have_happened(store: MemoryStore) -> None:
    """It raises: once behind its effect, once before it."""
    cluster = Cluster(RUNNING, 0)

    def and_then_lost(key: str) -> str:
        cluster.submit(key)
        raise ConnectionResetError("the answer was lost")

    with pytest.raises(ConnectionResetError):
        run_job(KEY, cluster.job(submit=and_then_lost), store=store)
    assert run_job(KEY, cluster.job(), store=store).ok
    assert cluster.calls == ["submit", "find", "poll", "poll"]
    (attempt,) = store.attempts(KEY)
    assert attempt.request is not None
    assert cluster.submitted == [attempt.request.tree_id]

    refused = failing(ConnectionRefusedError("nobody is there"), 1, str)
    with pytest.raises(ConnectionRefusedError):
        run_job("other", cluster.job(submit=refused), store=store)
    cluster.calls.clear()
    cluster.answers = [0]
    assert run_job("other", cluster.job(), store=store).ok
    assert cluster.calls == ["find", "submit", "poll"]
    (attempt,) = store.attempts("other")
    assert attempt.request is not None
    assert cluster.submitted[1:] == [attempt.request.tree_id]


def test_what_is_gone_is_begun_anew(store: MemoryStore) -> None:
    """One from before costs nothing; one's own costs a retry, and without one it is the result."""
    cluster = Cluster()
    with pytest.raises(KeyboardInterrupt):
        run_job(KEY, cluster.job(poll=interrupted), store=store)
    cluster.answers = [GONE, GONE]
    outcome = run_job(KEY, cluster.job(), store=store)
    assert (outcome.returncode, outcome.reason) == (None, Reason.EXITED)
    assert "gone" in outcome.detail
    assert len(cluster.submitted) == 2
    cluster.answers = [GONE, 0]
    assert run_job(KEY, cluster.job(), store=store, retries=1).ok
    assert len(cluster.submitted) == 4


def interrupted(_handle: str) -> Polled:
    raise KeyboardInterrupt


def test_an_interrupt_leaves_the_job(store: MemoryStore) -> None:
    cluster = Cluster(0)
    with pytest.raises(KeyboardInterrupt):
        run_job(KEY, cluster.job(poll=interrupted), store=store)
    assert not store.claimed(KEY)
    assert run_job(KEY, cluster.job(), store=store).ok
    assert cluster.calls == ["submit", "poll"]


@pytest.mark.parametrize("step", ["find", "poll"])
def test_what_fails_is_tried_again(store: MemoryStore, step: str) -> None:
    cluster = Cluster(0)
    if step == "find":
        broken = failing(ValueError("lost"), 1, str)
        with pytest.raises(ValueError, match="lost"):
            run_job(KEY, cluster.job(submit=broken), store=store)
    function = failing(OSError("away"), 3, getattr(cluster, step))
    assert run_job(KEY, cluster.job(**{step: function}), store=store).ok
    assert len(cluster.submitted) == 1


@pytest.mark.parametrize("step", ["find", "poll"])
def test_but_not_for_ever(store: MemoryStore, step: str) -> None:
    """And nothing is recorded by that."""
    cluster = Cluster(0)
    if step == "find":
        broken = failing(ValueError("lost"), 1, str)
        with pytest.raises(ValueError, match="lost"):
            run_job(KEY, cluster.job(submit=broken), store=store)
    function = failing(OSError("away"), 1_000_000, str)
    with pytest.raises(OSError, match="away") as caught:
        run_job(KEY, cluster.job(**{step: function}), store=store, patience=0.05)
    assert f"{step} failed for" in caught.value.__notes__[0]
    (attempt,) = store.attempts(KEY)
    assert attempt.exit is None
    assert not store.claimed(KEY)
    assert run_job(KEY, cluster.job(), store=store).ok
    assert len(cluster.submitted) == 1


def test_the_store_may_be_away_for_a_while(store: MemoryStore) -> None:
    """At any access, one after the other."""
    for skipped in range(12):
        key, cluster = f"key {skipped}", Cluster(RUNNING, 0)
        left, access = [skipped], store.access

        def sometimes(left: list[int] = left, access: Callable[[], None] = access) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise StoreUnusable("the store is away")
            access()

        store.access = sometimes  # type: ignore[method-assign]
        assert run_job(key, cluster.job(), store=store).ok
        store.access = access  # type: ignore[method-assign]
        assert len(cluster.submitted) == 1, skipped
        assert len(store.attempts(key)) == 1


def test_the_store_may_not_be_away_for_ever(store: MemoryStore) -> None:
    store.troubles = 1_000_000
    with pytest.raises(StoreUnusable, match="away"):
        run_job(KEY, Cluster().job(), store=store, patience=0.05)


def test_another_job_under_the_same_key(store: MemoryStore) -> None:
    cluster = Cluster(0)
    run_job(KEY, cluster.job(fingerprint="image 1"), store=store)
    other = cluster.job(fingerprint="image 2")
    with pytest.raises(DifferentTarget, match=r"'nightly'.*'report'.*forget"):
        run_job(KEY, other, store=store)
    assert run_job(KEY, other, store=store, same_target=False).ok
    assert cluster.calls == ["submit", "poll"]
    assert not store.claimed(KEY)


def test_a_tree_that_may_be_running_is_no_job(store: MemoryStore) -> None:
    claim = store.claim(KEY)
    assert claim is not None
    attempt = claim.begin(Request(KEY, "make", "f", "0" * 16, "tree", "b", 1, "h", 2, 3))
    claim.release()
    cluster = Cluster(0)
    with pytest.raises(DifferentTarget, match="tree 'make'"):
        run_job(KEY, cluster.job(), store=store, same_target=False)
    assert cluster.calls == []
    claim = store.claim(KEY)
    assert claim is not None
    claim.finish(attempt, Exit(1 << 8))
    claim.release()
    assert run_job(KEY, cluster.job(), store=store, same_target=False).ok


def test_stop_leaves_the_job(store: MemoryStore, threads: ThreadPoolExecutor) -> None:
    cluster, stop = Cluster(), threading.Event()
    waiting = threads.submit(run_job, KEY, cluster.job(every=1000.0), store=store, stop=stop)
    assert cluster.polled.wait(DEADLINE)
    stop.set()
    with pytest.raises(Stopped, match="nightly"):
        waiting.result(DEADLINE)
    assert not store.claimed(KEY)
    assert store.attempts(KEY)[0].exit is None


class Watched(MemoryStore):
    """Knows who has looked at it without having the key."""

    def __init__(self) -> None:
        super().__init__()
        self.watchers: set[int] = set()
        self.looked = threading.Condition()

    def attempts(self, key: str) -> list[Attempt]:
        attempts = super().attempts(key)
        holder = self.holder.get(key)
        if holder is not None and attempts and not self.lock._is_owned():  # type: ignore[attr-defined]
            with self.looked:
                self.watchers.add(threading.get_ident())
                self.looked.notify_all()
        return attempts


def test_many_at_once_share_one_job(threads: ThreadPoolExecutor) -> None:
    """Those that watch get the outcome of the attempt that they watched, and start none after it,
    though it failed."""
    store, cluster = Watched(), Cluster()
    waiting = [threads.submit(run_job, KEY, cluster.job(), store=store) for _ in range(8)]
    with store.looked:
        assert store.looked.wait_for(lambda: len(store.watchers) == 7, DEADLINE), store.watchers
    cluster.ended[f"handle of {cluster.submitted[0]}"] = 7
    outcomes = {future.result(DEADLINE) for future in waiting}
    assert {(outcome.returncode, outcome.tree_id) for outcome in outcomes} == {
        (7, cluster.submitted[0])
    }
    assert len(cluster.submitted) == 1


def test_a_watcher_takes_over(store: MemoryStore, threads: ThreadPoolExecutor) -> None:
    cluster = Cluster()
    stop = threading.Event()
    first = threads.submit(run_job, KEY, cluster.job(), store=store, stop=stop)
    assert cluster.polled.wait(DEADLINE)
    second = threads.submit(run_job, KEY, cluster.job(), store=store)
    stop.set()
    with pytest.raises(Stopped):
        first.result(DEADLINE)
    cluster.ended[f"handle of {cluster.submitted[0]}"] = 0
    assert second.result(DEADLINE).ok
    assert len(cluster.submitted) == 1


def test_a_lost_lease_is_no_end(store: MemoryStore) -> None:
    """What is found out without it is not recorded; with it again the job is reconnected to."""
    cluster = Cluster()

    def poll(handle: str) -> Polled:
        cluster.poll(handle)
        if cluster.calls.count("poll") == 2:
            store.take_away(KEY)
            return 9
        return RUNNING if cluster.calls.count("poll") < 4 else 0

    outcome = run_job(KEY, cluster.job(poll=poll), store=store)
    assert outcome.returncode == 0
    assert len(cluster.submitted) == 1


def test_without_the_lease_nothing_is_submitted(store: MemoryStore) -> None:
    """It ran out during `find`, and somebody else has submitted since."""
    cluster = Cluster(0)
    with pytest.raises(ValueError, match="lost"):
        run_job(KEY, cluster.job(submit=failing(ValueError("lost"), 1, str)), store=store)

    def find(key: str) -> str | None:
        found = cluster.find(key)
        if cluster.calls.count("find") == 1:
            store.take_away(KEY)
            cluster.submit(key)
        return found

    assert run_job(KEY, cluster.job(find=find), store=store).ok
    assert len(cluster.submitted) == 1


# -- cancelling


def test_a_job_is_cancelled(store: MemoryStore, threads: ThreadPoolExecutor) -> None:
    """Whoever supervises it gets to know, and does not try again."""
    cluster = Cluster()
    waiting = threads.submit(run_job, KEY, cluster.job(), store=store, retries=5)
    assert cluster.polled.wait(DEADLINE)
    outcome = cancel_job(KEY, cluster.job(), store=store, timeout=DEADLINE)
    assert (outcome.reason, outcome.returncode) == (Reason.KILLED, -15)
    assert waiting.result(DEADLINE) == outcome
    assert len(cluster.submitted) == 1


def test_a_job_that_nobody_supervises_is_cancelled(store: MemoryStore) -> None:
    cluster = Cluster()
    with pytest.raises(KeyboardInterrupt):
        run_job(KEY, cluster.job(poll=interrupted), store=store)
    outcome = cancel_job(KEY, cluster.job(), store=store, timeout=DEADLINE)
    assert outcome.reason is Reason.KILLED
    (attempt,) = store.attempts(KEY)
    assert attempt.exit is not None
    assert attempt.exit.cause is Cause.CANCELLED
    # What was ended has not finished: it is a new one that the next call begins.
    cluster.answers = [0]
    assert run_job(KEY, cluster.job(), store=store).ok
    assert len(cluster.submitted) == 2


def test_what_was_not_submitted_is_cancelled(store: MemoryStore) -> None:
    cluster = Cluster()
    with pytest.raises(ValueError, match="lost"):
        run_job(KEY, cluster.job(submit=failing(ValueError("lost"), 1, str)), store=store)
    outcome = cancel_job(KEY, cluster.job(), store=store, timeout=DEADLINE)
    assert (outcome.reason, outcome.returncode) == (Reason.KILLED, None)
    assert cluster.submitted == []


def test_what_ended_by_itself_was_not_cancelled(store: MemoryStore) -> None:
    """Its end, which nobody had recorded, is noticed and recorded as what it is."""
    cluster = Cluster()
    with pytest.raises(KeyboardInterrupt):
        run_job(KEY, cluster.job(poll=interrupted), store=store)
    cluster.ended[f"handle of {cluster.submitted[0]}"] = 0
    assert cancel_job(KEY, cluster.job(), store=store, timeout=DEADLINE).ok
    assert "cancel" not in cluster.calls
    with pytest.raises(NotRunning, match="nightly"):
        cancel_job(KEY, cluster.job(), store=store)


def test_cancelled_during_a_poll(store: MemoryStore) -> None:
    """The end that a poll reports was brought about by who wrote the wish down while it was under
    way: it is not taken for the job's own."""
    cluster = Cluster()

    def poll(handle: str) -> Polled:
        store.ask_cancel(KEY, 1)
        cluster.cancel(handle)
        return cluster.poll(handle)

    assert run_job(KEY, cluster.job(poll=poll), store=store, retries=3).reason is Reason.KILLED
    assert len(cluster.submitted) == 1


def test_who_cannot_be_cancelled(store: MemoryStore) -> None:
    cluster = Cluster()
    with pytest.raises(UnknownKey, match="nightly"):
        cancel_job(KEY, cluster.job(), store=store)
    with pytest.raises(KeyboardInterrupt):
        run_job(KEY, cluster.job(poll=interrupted), store=store)
    with pytest.raises(ValueError, match="no `cancel`"):
        cancel_job(KEY, cluster.job(cancel=None), store=store)
    with pytest.raises(DifferentTarget):
        cancel_job(KEY, cluster.job(name="other"), store=store)
    stubborn = cluster.job(cancel=lambda _handle: None)
    with pytest.raises(TimeoutError, match="nightly"):
        cancel_job(KEY, stubborn, store=store, timeout=0.05)
    # The wish stays: who comes next carries it out.
    cluster.calls.clear()
    assert run_job(KEY, cluster.job(), store=store).reason is Reason.KILLED
    assert "cancel" in cluster.calls


# -- arguments and answers


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"submit": None}, TypeError, "submit: a function"),
        ({"find": 3}, TypeError, "find: a function"),
        ({"poll": "x"}, TypeError, "poll: a function"),
        ({"cancel": "x"}, TypeError, "cancel: a function"),
        ({"name": ""}, ValueError, "name: must not be empty"),
        ({"name": b"x"}, TypeError, "name: a text"),
        ({"every": 0}, ValueError, "every: 0 is not"),
        ({"every": float("inf")}, ValueError, "every: inf is not"),
        ({"every": "1"}, TypeError, "every: seconds"),
        ({"fingerprint": 1}, TypeError, "fingerprint"),
    ],
)
def test_jobs_are_checked(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Cluster().job(**changed)


@pytest.mark.parametrize("options", [{"retries": -1}, {"retries": 1.5}, {"patience": 0}])
def test_arguments_are_checked(store: MemoryStore, options: dict[str, Any]) -> None:
    cluster = Cluster(0)
    with pytest.raises(ValueError, match=next(iter(options))):
        run_job(KEY, cluster.job(), store=store, **options)
    assert cluster.calls == []


@pytest.mark.parametrize("answer", ["0", None, True, 256, Ended(-100)])
def test_answers_are_checked(store: MemoryStore, answer: Any) -> None:
    """At once: it would be the same a second time. And nothing is recorded."""
    cluster = Cluster()
    with pytest.raises((TypeError, ValueError), match="poll of job 'report'"):
        run_job(KEY, cluster.job(poll=lambda _handle: answer), store=store)
    assert store.attempts(KEY)[0].exit is None


def test_handles_are_checked(store: MemoryStore) -> None:
    with pytest.raises(TypeError, match="submit of job 'report': a text, not 5"):
        run_job(KEY, Cluster().job(submit=lambda _key: 5), store=store)
    assert store.attempts(KEY)[0].handle is None


def test_names_and_fingerprints_do_not_run_into_each_other() -> None:
    one, other = Cluster().job(name="a", fingerprint="b"), Cluster().job(name="ab")
    assert one.identity() != other.identity()
    assert one.identity() == Cluster().job(name="a", fingerprint="b", every=9.0).identity()


def test_a_signal_of_its_own(store: MemoryStore) -> None:
    outcome: Outcome = run_job(KEY, Cluster(-9).job(), store=store)
    assert (outcome.reason, outcome.returncode) == (Reason.SIGNALED, -9)
