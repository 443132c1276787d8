"""What OpenTelemetry is told of real trees: spans with the times of the events, and metrics that
add up, whatever is missed and whenever the telling begins and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler, SamplingResult
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    use_span,
)

import proctree
from integration.conftest import DEADLINE, available, eventually
from integration.fault_tools import Helper, warden_of
from proctree import KillPolicy, Stage, launching, subscriptions, telemetry, transitions
from proctree.supervisor import ChildSpec, Supervisor
from proctree.telemetry import Instrumentation, instrument
from proctree.transitions import (
    LOGGED,
    EventsMissed,
    MainExited,
    TreeDraining,
    TreeEnded,
    TreeSignalled,
    TreeStarted,
    TreeStarting,
    TreeStopping,
    TreeSurvivor,
    TreeSwept,
)


class Told:
    """Providers that keep what they are told, and the same events for comparison."""

    def __init__(self, *processors: SpanProcessor, sampler: Sampler | None = None) -> None:
        self._spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider(sampler, shutdown_on_exit=False)
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)
        for processor in (SimpleSpanProcessor(self._spans), *processors):
            self.tracers.add_span_processor(processor)
        self.events: list[Any] = []
        self.subscription = proctree.subscribe(self.events.append)

    def instrument(self, **options: Any) -> Instrumentation:
        return instrument(self.tracers, self.meters, **options)

    def spans(self) -> tuple[ReadableSpan, ...]:
        """Those that have ended."""
        return self._spans.get_finished_spans()

    def span(self) -> ReadableSpan:
        (span,) = self.spans()
        return span

    def event(self, kind: type) -> Any:
        """The one of this kind."""
        assert self.subscription.flush(DEADLINE)
        (found,) = [event for event in self.events if type(event) is kind]
        return found

    def points(self, metric: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for found in scope.metrics
            if found.name == metric
            for point in found.data.data_points
        ]

    def values(self, metric: str) -> list[tuple[dict[str, Any], float]]:
        return [(dict(point.attributes), point.value) for point in self.points(metric)]

    def total(self, metric: str) -> float:
        return sum(value for _, value in self.values(metric))


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    told.subscription.close()


def names(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# -- one tree


def test_a_tree_that_ends_by_itself(told: Told) -> None:
    before = transitions.now()
    with told.instrument(attributes={"service.name": "tests"}):
        outcome = proctree.run(["sh", "-c", "exit 0"], name="nothing done")
    span = told.span()
    starting, ended = told.event(TreeStarting), told.event(TreeEnded)
    assert (span.name, span.kind, span.parent) == ("sh", SpanKind.CLIENT, None)
    assert span.start_time is not None
    assert before <= span.start_time <= starting.time_ns
    assert span.end_time == ended.time_ns
    assert attributes(span) == {
        "service.name": "tests",
        "process.executable.name": "sh",
        "process.pid": outcome.pid,
        "process.exit.code": 0,
        "proctree.tree.id": outcome.tree_id,
        "proctree.tree.name": "nothing done",
        "proctree.containment": outcome.containment,
        "proctree.reason": "exited",
        "proctree.survivors": 0,
    }
    assert span.status.status_code is StatusCode.UNSET
    noted = {event.name: event for event in span.events}
    for kind in (TreeStarted, MainExited):
        assert noted[LOGGED[kind][1]].timestamp == told.event(kind).time_ns
    assert dict(noted["tree.exited"].attributes or {}) == {
        "process.pid": outcome.pid,
        "process.exit.code": 0,
        "proctree.leftovers": 0,
    }


def test_a_tree_that_is_killed_in_stages(told: Told, actors: str) -> None:
    ready = threading.Event()
    with told.instrument():
        policy = KillPolicy((Stage(15, 0.05), Stage(9, 10.0)))
        handle = proctree.WatchedSubprocess.start(
            [actors, "ignore"], kill=policy, stdout=proctree.Lines(lambda _line: ready.set())
        )
        assert ready.wait(DEADLINE)
        handle.kill(reason="enough")
        handle.wait()
    span = told.span()
    assert attributes(span)["error.type"] == attributes(span)["proctree.reason"] == "killed"
    assert attributes(span)["process.exit.code"] == -9
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "killed: enough"
    (stopping,) = [event for event in span.events if event.name == "tree.stopping"]
    assert stopping.timestamp == told.event(TreeStopping).time_ns
    signalled = [event for event in told.events if isinstance(event, TreeSignalled)]
    stages = [event for event in span.events if event.name == "tree.signalled"]
    assert [stage.timestamp for stage in stages] == [event.time_ns for event in signalled]
    assert [dict(stage.attributes or {}) for stage in stages] == [
        {"proctree.signal": "SIGTERM", "proctree.scope": "tree"},
        {"proctree.signal": "SIGKILL", "proctree.scope": "tree"},
    ]
    (latency,) = told.points("proctree.kill.duration")
    took = told.event(TreeEnded).time_ns - told.event(TreeStopping).time_ns
    assert (latency.count, latency.sum) == (1, took / 1e9)
    assert latency.explicit_bounds == telemetry.LATENCY_BUCKETS


@pytest.mark.parametrize(
    ("argv", "code", "reason"),
    [(["sh", "-c", "exit 3"], 3, "exited"), (["sh", "-c", "kill -9 $$"], -9, "signaled")],
)
def test_a_tree_that_fails(told: Told, argv: list[str], code: int, reason: str) -> None:
    with told.instrument():
        proctree.run(argv)
    span = told.span()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == f"{reason} with {code}"
    found = attributes(span)
    assert (found["process.exit.code"], found["error.type"]) == (code, reason)
    assert told.values("proctree.trees.ended") == [({"proctree.reason": reason}, 1)]
    assert told.points("proctree.kill.duration") == []


def test_a_tree_that_cannot_start(told: Told) -> None:
    with told.instrument():
        with pytest.raises(FileNotFoundError):
            proctree.run(["/nonexistent/program"])
    span = told.span()
    assert span.name == "program"
    assert attributes(span)["error.type"] == "exec-failed"
    assert "process.pid" not in attributes(span)
    assert span.status.status_code is StatusCode.ERROR
    assert told.total("proctree.trees.running") == 0


def test_what_is_left_behind_is_not_a_kill(told: Told) -> None:
    """Nobody wanted the tree to end: it did, and its leftovers are ended with it."""
    with told.instrument():
        outcome = proctree.run(["sh", "-c", "sleep 60 &"])
    assert outcome.leftovers
    assert "tree.stopping" in names(told.span())
    assert told.span().status.status_code is StatusCode.UNSET
    assert told.points("proctree.kill.duration") == []


def test_a_callable_has_its_own_name_and_our_executable(told: Told) -> None:
    def work() -> None:
        raise SystemExit(0)

    with told.instrument():
        proctree.run(work, name="number 1 of 1000")
    assert told.span().name.endswith("work")
    executable = os.path.basename(sys.executable)
    assert attributes(told.span())["process.executable.name"] == executable


def test_what_is_no_utf_8_can_be_exported(told: Told) -> None:
    with told.instrument(), pytest.raises(FileNotFoundError):
        proctree.run([b"/nonexistent/\xff"])
    found = attributes(told.span())
    assert found["proctree.tree.name"] == found["process.executable.name"] == "?"
    for value in (*found.values(), told.span().name, told.span().status.description):
        str(value).encode()


def test_output_that_is_held_up(told: Told) -> None:
    go_on, called = threading.Event(), threading.Event()

    def line(_line: str) -> None:
        called.set()
        go_on.wait(DEADLINE)

    drained = threading.Event()
    with told.instrument(), proctree.subscribe(lambda _event: drained.set(), TreeDraining):
        handle = proctree.WatchedSubprocess.start(["echo", "x"], stdout=proctree.Lines(line))
        assert called.wait(DEADLINE)
        assert drained.wait(DEADLINE)
        go_on.set()
        handle.wait()
    (draining,) = [event for event in told.span().events if event.name == "tree.draining"]
    assert draining.timestamp == told.event(TreeDraining).time_ns


def test_a_survivor(told: Told, actors: str) -> None:
    """A zombie that its tracer holds cannot be ended, though all else went well."""
    tracer: Helper | None = None
    reader, writer = os.pipe()
    with told.instrument():
        try:
            handle = proctree.WatchedSubprocess.start(
                ["sh", "-c", "sleep 60 & read line; exit 0"],
                stdin=reader,
                containment=available("warden"),
                kill=KillPolicy((Stage(9, 0.1),)),
            )
            others = []

            def found() -> bool:
                others[:] = [info for info in handle.processes() if info.name == "sleep"]
                return bool(others)

            eventually(found, "it starts its child")
            tracer = Helper([actors, "trace", str(others[0].pid)], b"tracing\n")
            os.write(writer, b"go on\n")
            outcome = handle.wait(DEADLINE)
        finally:
            os.close(reader)
            os.close(writer)
            if tracer is not None:
                tracer.close()
    assert outcome is not None
    assert [member.pid for member in outcome.survivors] == [others[0].pid]
    span = told.span()
    assert span.status.status_code is StatusCode.ERROR
    values = attributes(span)
    assert (values["process.exit.code"], values["proctree.survivors"]) == (0, 1)
    assert (values["proctree.reason"], values["error.type"]) == (
        "exited",
        "survivors",
    )
    noted = {event.name: event for event in span.events}
    assert noted["tree.survivor"].timestamp == told.event(TreeSurvivor).time_ns
    assert dict(noted["tree.survivor"].attributes or {}) == {
        "process.pid": others[0].pid,
        "proctree.name": "sleep",
        "proctree.why": outcome.survivors[0].why,
    }
    assert told.values("proctree.survivors") == [({}, 1)]


def test_a_tree_that_is_swept(told: Told) -> None:
    with told.instrument():
        with proctree.WatchedSubprocess.start(
            ["sleep", "60"], containment=available("warden")
        ) as handle:
            os.kill(warden_of(os.getpid()), signal.SIGKILL)
            assert handle.wait(DEADLINE) is not None
    span = told.span()
    assert attributes(span)["error.type"] == "warden-lost"
    (swept,) = [event for event in span.events if event.name == "tree.swept"]
    assert swept.timestamp == told.event(TreeSwept).time_ns


# -- whose child it is


def test_the_current_span_is_the_parent_of_what_is_started_in_it(told: Told) -> None:
    tracer = told.tracers.get_tracer("tests")
    with told.instrument():
        with tracer.start_as_current_span("caller") as caller:
            inside = proctree.run(["true"])
            with proctree.WatchedSubprocess.start(["true"]) as handle:
                handle.wait()
        outside = proctree.run(["true"])
    spans = {attributes(span).get("proctree.tree.id"): span for span in told.spans()}
    for tree_id in (inside.tree_id, handle.tree_id):
        assert spans[tree_id].parent == caller.get_span_context()
        assert spans[tree_id].context.trace_id == caller.get_span_context().trace_id
    assert spans[outside.tree_id].parent is None


def printed(variables: Sequence[str], **options: Any) -> list[str]:
    script = "; ".join(f'echo "${{{name}-unset}}"' for name in variables)
    outcome = proctree.run(["sh", "-c", script], stdout=proctree.CAPTURE, **options)
    assert outcome.stdout is not None
    return outcome.stdout.decode().splitlines()


W3C = ("TRACEPARENT", "TRACESTATE")


def test_the_tree_is_told_its_span(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the trace that we were told of ourselves: neither as a parent, nor as a state beside
    another trace's parent."""
    monkeypatch.setenv("TRACEPARENT", "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    monkeypatch.setenv("TRACESTATE", "old=1")
    with told.instrument(propagate=True):
        parent, state = printed(W3C)
    context = told.span().context
    flags = f"{context.trace_flags:02x}"
    assert parent == f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags}"
    assert state == "unset"


def test_the_state_of_the_trace_goes_with_it(told: Told) -> None:
    state = TraceState([("vendor", "7")])
    remote = SpanContext(0xABC, 0xDEF, True, TraceFlags(TraceFlags.SAMPLED), state)
    with told.instrument(propagate=True), use_span(NonRecordingSpan(remote)):
        parent, printed_state = printed(W3C, env={"PATH": os.environ["PATH"]})
    assert parent.startswith(f"00-{0xABC:032x}-{told.span().context.span_id:016x}-")
    assert printed_state == "vendor=7"


def test_a_callable_is_told_too(told: Told) -> None:
    reader, writer = os.pipe()
    with told.instrument(propagate=True):
        proctree.run(lambda: os.write(writer, os.environb[b"TRACEPARENT"]), pass_fds=[writer])
    os.close(writer)
    with open(reader) as pipe:
        assert pipe.read().split("-")[2] == f"{told.span().context.span_id:016x}"


def test_the_environment_is_left_alone_unless_asked(told: Told) -> None:
    with told.instrument():
        assert printed(W3C) == ["unset", "unset"]


def test_nothing_is_propagated_where_nobody_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an SDK there is no identity to give, and what we were told is handed on."""
    monkeypatch.setenv("TRACEPARENT", "handed on")
    with instrument(propagate=True):
        assert printed(W3C) == ["handed on", "unset"]


class _Broken(Sampler):
    def should_sample(self, *_args: Any, **_options: Any) -> SamplingResult:
        raise RuntimeError("mine")

    def get_description(self) -> str:
        return "broken"


def test_a_sampler_that_raises_costs_the_span_and_not_the_tree() -> None:
    told = Told(sampler=_Broken())
    structlog.configure()
    try:
        with structlog.testing.capture_logs() as logs, told.instrument():
            outcome = proctree.run(["true"])
    finally:
        structlog.reset_defaults()
        told.subscription.close()
    assert outcome.ok
    (failed,) = [log for log in logs if log["event"] == "launch_hook.failed"]
    assert (failed["tree_id"], failed["error"]) == (outcome.tree_id, "RuntimeError('mine')")
    assert told.total("proctree.trees.ended") == 1


def test_an_instrumentation_that_cannot_begin_leaves_nothing_behind() -> None:
    told = Told(sampler=_Broken())
    with proctree.WatchedSubprocess.start(["sleep", "60"]):
        with pytest.raises(RuntimeError, match="mine"):
            told.instrument()
    assert launching.hooks == ()
    told.subscription.close()
    assert subscriptions._subscriptions == ()


# -- all of them


def test_how_many_run_and_how_they_ended(told: Told) -> None:
    with told.instrument(attributes={"host": "here"}) as instrumentation:
        with proctree.WatchedSubprocess.start(["sleep", "60"]) as first:
            with proctree.WatchedSubprocess.start(["sleep", "60"]):
                assert instrumentation._subscription.flush(DEADLINE)
                where = {"host": "here", "proctree.containment": first.containment}
                assert told.values("proctree.trees.running") == [(where, 2)]
        proctree.run(["true"])
    assert told.values("proctree.trees.running") == [(where, 0)]
    ended = {
        found["proctree.reason"]: value for found, value in told.values("proctree.trees.ended")
    }
    assert ended == {"killed": 2, "exited": 1}


def test_trees_that_were_under_way_before_get_a_span_of_their_own_age(told: Told) -> None:
    with proctree.WatchedSubprocess.start(["sleep", "60"]) as handle:
        started = told.event(TreeStarted).time_ns
        tracer = told.tracers.get_tracer("tests")
        with tracer.start_as_current_span("who instruments"):
            instrumentation = told.instrument()
        with instrumentation:
            assert told.total("proctree.trees.running") == 1
            # As if it had been on its way meanwhile.
            again = told.event(TreeStarted)
            subscriptions.publish(again)
            assert instrumentation._subscription.flush(DEADLINE)
            assert told.total("proctree.trees.running") == 1
            told.events.remove(again)
            handle.kill()
            handle.wait()
    assert told.total("proctree.trees.running") == 0
    (span,) = [span for span in told.spans() if span.name == "sleep"]
    assert told.event(TreeEnded).tree_id == attributes(span)["proctree.tree.id"]
    assert span.parent is None
    assert span.start_time is not None
    # Two clocks, read one after the other: the wall clock may be set meanwhile, by milliseconds.
    assert abs(span.start_time - told.event(TreeStarting).time_ns) < 1e9
    assert span.start_time < started + 1e9
    assert attributes(span)["process.pid"] == handle.pid
    assert span.end_time == told.event(TreeEnded).time_ns


def test_one_whose_launch_was_under_way_is_adopted_when_it_starts(told: Told) -> None:
    """As if the instrumentation had begun between the launch and the loop's turn."""
    with told.instrument() as instrumentation:
        launching.remove(instrumentation._launched)
        with proctree.WatchedSubprocess.start(["sleep", "60"]) as handle:
            assert instrumentation._subscription.flush(DEADLINE)
            assert told.total("proctree.trees.running") == 1
    assert attributes(told.span())["process.pid"] == handle.pid
    assert told.total("proctree.trees.running") == 0


def test_close_ends_the_spans_of_what_is_under_way(told: Told) -> None:
    with proctree.WatchedSubprocess(["sleep", "60"]) as handle:
        with told.instrument():
            handle.launch()
        span = told.span()
        assert names(span) == ["tree.started", "telemetry.closed"]
        assert span.status.status_code is StatusCode.UNSET
        assert "proctree.reason" not in attributes(span)
        assert told.total("proctree.trees.running") == 0
    assert proctree.run(["true"]).ok
    assert len(told.spans()) == 1
    assert launching.hooks == ()


def test_a_launch_that_close_overtakes_leaves_no_span_open(told: Told) -> None:
    with told.instrument() as instrumentation:
        pass
    launching.add(instrumentation._launched)  # as if it had been called before the close
    try:
        assert proctree.run(["true"]).ok
    finally:
        launching.remove(instrumentation._launched)
    assert names(told.span()) == ["telemetry.closed"]
    assert instrumentation._traced == {}


def test_closing_twice_and_beginning_again(told: Told) -> None:
    for count in (1, 2):
        instrumentation = told.instrument()
        proctree.run(["true"])
        instrumentation.close()
        instrumentation.close()
        assert len(told.spans()) == count
        assert told.total("proctree.trees.ended") == count


class _Noting(Sampler):
    """Notes on which threads it is asked."""

    def __init__(self) -> None:
        self.threads: set[str] = set()

    def should_sample(self, *args: Any, **options: Any) -> SamplingResult:
        self.threads.add(threading.current_thread().name)
        return ALWAYS_ON.should_sample(*args, **options)

    def get_description(self) -> str:
        return "noting"


def test_supervised_children(tmp_path: Path) -> None:
    """They are launched on the loop's thread, where nobody's sampler may run."""
    sampler = _Noting()
    told = Told(sampler=sampler)
    told.subscription.close()
    script = 'echo "$TRACEPARENT" >> told; test -e failed || { touch failed; exit 1; }'
    spec = ChildSpec("it", ["sh", "-c", script], restart="on-failure", cwd=tmp_path)
    with told.instrument(propagate=True):
        Supervisor([spec], name="those").run()
    spans = told.spans()
    assert [attributes(span)["process.exit.code"] for span in spans] == [1, 0]
    identities = [f"{span.context.span_id:016x}" for span in spans]
    given = (tmp_path / "told").read_text().split()
    assert [line.split("-")[2] for line in given] == identities
    names = {"proctree.supervisor": "those", "proctree.child": "it"}
    assert told.values("proctree.restarts") == [(names, 1)]
    assert sampler.threads == {"proctree-callbacks"}


class _Killing(Sampler):
    """Kills the tree whose launch it is asked about, and waits until all of that has been told."""

    def __init__(self) -> None:
        self.handle: proctree.WatchedSubprocess | None = None
        self.instrumentation: Instrumentation | None = None

    def should_sample(self, *args: Any, **options: Any) -> SamplingResult:
        assert self.handle is not None
        assert self.instrumentation is not None
        self.handle.kill()
        assert self.handle.wait(DEADLINE) is not None
        assert self.instrumentation._subscription.flush(DEADLINE)
        return ALWAYS_ON.should_sample(*args, **options)

    def get_description(self) -> str:
        return "killing"


def test_a_tree_that_is_killed_while_it_is_launched() -> None:
    sampler = _Killing()
    told = Told(sampler=sampler)
    told.subscription.close()
    with told.instrument() as instrumentation:
        sampler.instrumentation = instrumentation
        sampler.handle = proctree.WatchedSubprocess(["true"])
        with pytest.raises(proctree.ProctreeError, match="was killed before"):
            sampler.handle.launch()
        assert instrumentation._subscription.flush(DEADLINE)
        assert attributes(told.span())["proctree.reason"] == "killed"
        assert instrumentation._traced == {}


# -- a slow exporter


class _Gate(SpanProcessor):
    """An exporter that blocks at each span until it may go on."""

    def __init__(self) -> None:
        self._blocked, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self._open = False

    def on_end(self, span: ReadableSpan) -> None:
        if not self._open:
            self._blocked.release()
            assert self._permits.acquire(timeout=DEADLINE)

    def wait_blocked(self) -> None:
        assert self._blocked.acquire(timeout=DEADLINE)

    def one(self) -> None:
        self._permits.release()

    def open(self) -> None:
        self._open = True
        self._permits.release(100)


@pytest.fixture
def gate() -> Iterator[_Gate]:
    gate = _Gate()
    yield gate
    gate.open()


@pytest.fixture
def gated(gate: _Gate) -> Iterator[Told]:
    told = Told(gate)
    yield told
    told.subscription.close()


def flood(count: int) -> None:
    """Events of a tree that nobody knows."""
    for _ in range(count):
        subscriptions.publish(TreeDraining("a tree", "of none", transitions.now()))


def test_ends_that_were_missed_leave_no_span_open(gated: Told, gate: _Gate) -> None:
    """Neither is a span ended too early whose end is still among what waits."""
    with gated.instrument() as instrumentation:
        proctree.run(["true"])
        gate.wait_blocked()
        with proctree.WatchedSubprocess.start(["sleep", "60"]) as running:
            # Its events are the first that wait, and when they have gone there is room for as many.
            before = proctree.run(["sleep", "60"], timeout=0.01)
            flood(subscriptions.PENDING_MAX)
            missed = proctree.run(["sh", "-c", "exit 4"])
            handles = [proctree.WatchedSubprocess(["true"]) for _ in range(2)]
            handles[0].launch()
            handles[0].wait()
            gate.one()
            gate.wait_blocked()
            # `EventsMissed` goes out with the first event of this one, and its end waits behind.
            handles[1].launch()
            handles[1].wait()
            gate.open()
            assert instrumentation._subscription.flush(DEADLINE)
            # Once more: behind what was posted when `EventsMissed` was delivered.
            assert instrumentation._subscription.flush(DEADLINE)
            assert set(instrumentation._traced) == {running.tree_id}
            assert gated.total("proctree.trees.running") == 1
    spans = {attributes(span)["proctree.tree.id"]: span for span in gated.spans()}
    assert len(spans) == len(gated.spans()) == 6
    for tree_id in (before.tree_id, handles[1].tree_id):
        assert "events.missed" not in names(spans[tree_id])
        assert "tree.exited" in names(spans[tree_id])
    for tree_id in (missed.tree_id, handles[0].tree_id):
        assert names(spans[tree_id]) == ["events.missed"]
    # Its handle is there, and so it is known how it ended.
    span, outcome = spans[handles[0].tree_id], handles[0].outcome
    assert outcome is not None
    assert attributes(span)["process.exit.code"] == 0
    assert span.start_time is not None
    assert span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(outcome.duration, abs=1e-6)
    # All of the two trees, and those of the flood for which there was no room.
    assert gated.total("proctree.events.missed") >= 8
    assert gated.total("proctree.trees.running") == 0


def test_one_that_nobody_remembers_is_let_go_of(gated: Told, gate: _Gate) -> None:
    """A tree whose handle is gone and whose end was missed: there is nobody left to ask."""
    with gated.instrument() as instrumentation:
        proctree.run(["true"])
        gate.wait_blocked()
        flood(subscriptions.PENDING_MAX)
        proctree.run(["true"], name="forgotten")
        gate.open()
        assert instrumentation._subscription.flush(DEADLINE)
        proctree.run(["true"])
    for span in gated.spans():
        if attributes(span)["proctree.tree.name"] == "forgotten":
            assert "events.missed" in names(span)
            break
    else:
        pytest.fail("it was never ended")
    assert len(gated.spans()) == 3


def test_a_slow_exporter_holds_up_no_tree_and_close_only_so_long(gated: Told, gate: _Gate) -> None:
    instrumentation = gated.instrument()
    proctree.run(["true"])
    gate.wait_blocked()
    assert proctree.run(["true"]).ok
    closing = threading.Thread(target=instrumentation.close, args=(0.01,))
    closing.start()
    # The second span is ended by the close, whose exporter blocks in turn: the time had run out.
    gate.wait_blocked()
    gate.open()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    assert [name for span in gated.spans() for name in names(span) if "closed" in name] == [
        "telemetry.closed"
    ]


def test_there_are_no_more_spans_than_so_many(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "TRACED_MAX", 1)
    with told.instrument():
        with proctree.WatchedSubprocess.start(["sleep", "60"]):
            proctree.run(["true"])
    assert [span.name for span in told.spans()] == ["sleep"]
    assert told.total("proctree.trees.untraced") == 1
    assert told.total("proctree.trees.ended") == 2


# -- who pays for it


def test_a_forked_child_has_none_of_it(told: Told) -> None:
    with told.instrument() as instrumentation, proctree.WatchedSubprocess.start(["sleep", "60"]):
        child = os.fork()
        if child == 0:
            instrumentation.close()
            ok = proctree.run(["true"]).ok and launching.hooks == ()
            os._exit(0 if ok and told.spans() == () else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "tree.exited" in names(told.span())


def test_nothing_of_it_is_imported_unless_wanted() -> None:
    code = "import sys, proctree; proctree.run(['true']); print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_who_lacks_it_is_told_what_to_install() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None\nimport proctree.telemetry"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install 'proctree-supervisor[otel]'" in done.stderr


@pytest.mark.parametrize("wrong", [7, "service", [("a", 1)], {1: "a"}])
def test_attributes_are_a_mapping(wrong: Any) -> None:
    with pytest.raises(TypeError, match="attributes: a mapping from strings"):
        instrument(attributes=wrong)
    assert launching.hooks == ()


def test_every_kind_of_event_is_accounted_for() -> None:
    assert set(telemetry.HANDLERS) <= set(LOGGED)
    trees = {kind for kind in LOGGED if kind.__module__ == transitions.__name__}
    assert trees <= set(telemetry.HANDLERS)
    assert EventsMissed in telemetry.HANDLERS
