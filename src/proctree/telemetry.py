"""Spans and metrics of trees, by OpenTelemetry: the extra `otel`.

Theory of operation. A span is begun where a tree is launched, on the thread that launches it: only
there is it known which span is the current one, and only before the launch can the tree be given
its own span's identity. Everything else comes by events, whose times are used: neither the thread
that delivers them nor the exporter behind it has any part in what is measured. What is begun is
kept until the event of the tree's end, and there are four more ways out, so that nothing is kept
for ever: events that were missed (`_missed`), a limit (TRACED_MAX), the end of the instrumentation,
and a tree that ended while it was being adopted.

Names follow the semantic conventions for processes and for the callers of programs
(https://opentelemetry.io/docs/specs/semconv/cli/cli-spans/) where there are any.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from opentelemetry.util.types import AttributeValue
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "proctree.telemetry needs OpenTelemetry: pip install 'proctree-supervisor[otel]'",
        name=error.name,
    ) from None

import proctree
from proctree import launching, subscriptions, transitions
from proctree import tree as _tree
from proctree.command import Command
from proctree.lifecycle import State
from proctree.policy import to_seconds
from proctree.records import Reason
from proctree.supervisor.happenings import ChildRestarting
from proctree.transitions import LOGGED

TRACED_MAX = 20_000
"""Trees that may have a span at the same time."""

CLOSE_TIMEOUT = 10.0

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds. OpenTelemetry's default is for milliseconds."""

_W3C = TraceContextTextMapPropagator()

_Attributes = dict[str, AttributeValue]


class _Traced:
    """A tree that has a span."""

    __slots__ = ("containment", "running", "span", "start_ns", "stopping_ns", "tree")

    def __init__(self, span: Span, tree: _tree.Tree, start_ns: int) -> None:
        self.span = span
        self.start_ns = start_ns
        self.tree = weakref.ref(tree)
        """Weak: what was captured of its output must not live as long as a slow exporter takes."""
        self.containment = tree.contained.name
        self.running = False
        self.stopping_ns: int | None = None
        """When somebody wanted it to end."""


class Instrumentation:
    """What `instrument` returns; also a context manager."""

    def __init__(
        self,
        tracer: trace.Tracer,
        meter: metrics.Meter,
        attributes: Mapping[str, AttributeValue],
        propagate: bool,
    ) -> None:
        self._tracer = tracer
        self._attributes = dict(attributes)
        self._propagate = propagate
        self._owner_pid = os.getpid()
        self._closed = False
        # Launches and events come on different threads, and a launch may come in a signal handler:
        # no lock, and nothing but single operations of a dictionary, which are atomic.
        self._traced: dict[str, _Traced] = {}
        self._make_instruments(meter)
        self._begun = threading.Event()
        self._subscription = subscriptions.subscribe(self._on_event, *HANDLERS)
        launching.add(self._launched)
        try:
            self._adopt()
        except BaseException:
            self._begun.set()
            self.close()
            raise
        self._begun.set()

    def _make_instruments(self, meter: metrics.Meter) -> None:
        self._running = meter.create_up_down_counter(
            "proctree.trees.running", "{tree}", "Trees whose main process has started"
        )
        self._ended = meter.create_counter("proctree.trees.ended", "{tree}", "Trees that ended")
        self._survivors = meter.create_counter(
            "proctree.survivors", "{process}", "Processes that could not be ended"
        )
        self._restarts = meter.create_counter(
            "proctree.restarts", "{restart}", "Supervised children that are started again"
        )
        self._latency = meter.create_histogram(
            "proctree.kill.duration",
            "s",
            "From the wish that a tree ends to its proved end",
            explicit_bucket_boundaries_advisory=LATENCY_BUCKETS,
        )
        self._events_missed = meter.create_counter(
            "proctree.events.missed", "{event}", "Events thrown away: these figures lack them"
        )
        self._untraced = meter.create_counter(
            "proctree.trees.untraced", "{tree}", "Trees that ran and ended without a span"
        )

    def close(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Records what has happened so far, and nothing any more. The spans of trees that are under
        way are ended, with an event `telemetry.closed`. In a forked child it does nothing: the
        spans are its parent's.

        Args:
            timeout: seconds that your exporters may take for what has happened so far. Default 10.

        Raises:
            RuntimeError: called by an exporter, on the thread on which events are delivered.
            TypeError, ValueError: a bad timeout.
        """
        timeout = to_seconds(timeout, "timeout")
        if self._closed or os.getpid() != self._owner_pid:
            return
        launching.remove(self._launched)
        self._subscription.flush(timeout)
        self._subscription.close()
        # Before the spans are looked for: a launch that is under way looks at it behind its own.
        self._closed = True
        for tree_id in list(self._traced):
            self._let_go(tree_id, "telemetry.closed")

    def __enter__(self) -> Instrumentation:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # -- on the thread that launches a tree

    def _launched(self, tree: _tree.Tree) -> launching.Environment:
        traced = self._begin(tree, transitions.now(), None)
        if self._closed:
            self._let_go(tree.tree_id, "telemetry.closed")
        elif traced is not None:
            self._unless_ended(tree)
        return _environment(traced.span) if traced is not None and self._propagate else {}

    def _begin(self, tree: _tree.Tree, start_ns: int, context: Context | None) -> _Traced | None:
        if len(self._traced) >= TRACED_MAX:
            return None
        executable = _executable(tree.command)
        span = self._tracer.start_span(
            _span_name(tree.command, executable),
            context=context,
            kind=SpanKind.CLIENT,
            start_time=start_ns,
            attributes={
                **self._attributes,
                "process.executable.name": executable,
                "proctree.tree.id": tree.tree_id,
                "proctree.tree.name": _text(tree.command.name),
                "proctree.containment": tree.contained.name,
            },
        )
        traced = self._traced[tree.tree_id] = _Traced(span, tree, start_ns)
        return traced

    # -- trees that were under way before

    def _adopt(self) -> None:
        """Begins the spans of trees whose launch nobody asked us about, with their own times and
        with no parent: what was current at their launch is not known any more."""
        for tree in _tree.alive():
            if tree.tree_id not in self._traced:
                self._adopt_one(tree)

    def _adopt_one(self, tree: _tree.Tree) -> None:
        start_ns = transitions.now() - int(tree.age * 1e9)
        traced = self._begin(tree, start_ns, Context())
        if traced is None:
            return
        if tree.life.state not in (State.NEW, State.STARTING):
            self._runs(traced, tree.pid)
        self._unless_ended(tree)

    def _unless_ended(self, tree: _tree.Tree) -> None:
        """Its last event may have been delivered before there was a span: of one that ended while
        it was adopted, or was killed while it was launched."""
        if tree.ending is not None:
            self._subscription.behind(lambda: self._reconcile([tree.tree_id]))

    # -- events

    def _on_event(self, event: Any) -> None:
        self._begun.wait()
        HANDLERS[type(event)](self, event)

    def _starting(self, event: transitions.TreeStarting) -> None:
        """It has a span, unless it was launched before there was anybody to ask."""
        if event.tree_id not in self._traced and len(self._traced) < TRACED_MAX:
            self._adopt()

    def _started(self, event: transitions.TreeStarted) -> None:
        traced = self._traced.get(event.tree_id)
        if traced is not None:
            self._note(event)
            self._runs(traced, event.pid)

    def _runs(self, traced: _Traced, pid: int | None) -> None:
        if pid is not None:
            traced.span.set_attribute("process.pid", pid)
        if not traced.running:
            traced.running = True
            self._running.add(1, self._with_containment(traced))

    def _runs_no_more(self, traced: _Traced) -> None:
        if traced.running:
            traced.running = False
            self._running.add(-1, self._with_containment(traced))

    def _with_containment(self, traced: _Traced) -> _Attributes:
        return {**self._attributes, "proctree.containment": traced.containment}

    def _stopping(self, event: transitions.TreeStopping) -> None:
        traced = self._traced.get(event.tree_id)
        if traced is not None and event.reason is not None:
            traced.stopping_ns = event.time_ns
        self._note(event)

    def _note(self, event: Any) -> None:
        """As an event of the span, by its name and fields in the log."""
        traced = self._traced.get(event.tree_id)
        if traced is not None:
            name = LOGGED[type(event)][1]
            traced.span.add_event(name, _event_attributes(event), event.time_ns)

    def _has_ended(self, event: transitions.TreeEnded) -> None:
        attributes: _Attributes = {**self._attributes, "proctree.reason": str(event.reason)}
        self._ended.add(1, attributes)
        if event.survivors:
            self._survivors.add(event.survivors, self._attributes)
        traced = self._traced.pop(event.tree_id, None)
        if traced is None:
            if event.pid is not None:
                self._untraced.add(1, self._attributes)
            return
        if traced.stopping_ns is not None:
            # The clock of the events is the wall clock, which may be set back in between.
            self._latency.record(max(0, event.time_ns - traced.stopping_ns) / 1e9, attributes)
        _conclude(
            traced.span, event.reason, event.detail, event.returncode, event.pid, event.survivors
        )
        self._end(traced, event.time_ns)

    def _restarting(self, event: ChildRestarting) -> None:
        names = {
            "proctree.supervisor": _text(event.supervisor),
            "proctree.child": _text(event.child),
        }
        self._restarts.add(1, {**self._attributes, **names})

    def _missed(self, event: transitions.EventsMissed) -> None:
        """The ends of trees may be among them. Those that have ended by now and whose end was not
        missed have it among the events that wait: so it is decided behind these."""
        self._events_missed.add(event.missed, self._attributes)
        ended = [
            tree_id
            for tree_id, traced in list(self._traced.items())
            if (tree := traced.tree()) is None or tree.ending is not None
        ]
        self._subscription.behind(lambda: self._reconcile(ended))

    def _reconcile(self, ended: Iterable[str]) -> None:
        """Ends the spans that are still there of trees that have ended, by what is known."""
        for tree_id in ended:
            self._let_go(tree_id, "events.missed")

    def _let_go(self, tree_id: str, why: str) -> None:
        """Ends a span without the event that should have ended it."""
        traced = self._traced.pop(tree_id, None)
        if traced is None:
            return
        tree = traced.tree()
        ending = None if tree is None else tree.ending
        end_ns = transitions.now()
        if ending is not None:
            survivors = len(ending.survivors)
            _conclude(
                traced.span,
                ending.reason,
                ending.detail,
                ending.returncode,
                ending.pid,
                survivors,
            )
            end_ns = traced.start_ns + int(ending.duration * 1e9)
        traced.span.add_event(why, timestamp=end_ns)
        self._end(traced, end_ns)

    def _end(self, traced: _Traced, end_ns: int) -> None:
        self._runs_no_more(traced)
        traced.span.end(end_ns)


HANDLERS: dict[type, Callable[[Instrumentation, Any], None]] = {
    transitions.TreeStarting: Instrumentation._starting,
    transitions.TreeStarted: Instrumentation._started,
    transitions.TreeStopping: Instrumentation._stopping,
    transitions.TreeSignalled: Instrumentation._note,
    transitions.MainExited: Instrumentation._note,
    transitions.TreeSwept: Instrumentation._note,
    transitions.TreeDraining: Instrumentation._note,
    transitions.TreeSurvivor: Instrumentation._note,
    transitions.TreeEnded: Instrumentation._has_ended,
    ChildRestarting: Instrumentation._restarting,
    transitions.EventsMissed: Instrumentation._missed,
}
"""What is done with each kind of event."""


def _conclude(
    span: Span, reason: Reason, detail: str, returncode: int | None, pid: int | None, survivors: int
) -> None:
    """How the tree ended."""
    span.set_attribute("proctree.reason", str(reason))
    span.set_attribute("proctree.survivors", survivors)
    if detail:
        span.set_attribute("proctree.detail", _text(detail))
    if pid is not None:
        span.set_attribute("process.pid", pid)
    if returncode is not None:
        span.set_attribute("process.exit.code", returncode)
    error, why = str(reason), _describe(reason, detail, returncode)
    if reason is Reason.EXITED and returncode == 0:
        if not survivors:
            return  # left unset, as instrumentation is asked to: "OK" is the application's to say
        error, why = "survivors", "processes could not be ended"
    span.set_attribute("error.type", error)
    span.set_status(Status(StatusCode.ERROR, _text(why)))


def _describe(reason: Reason, detail: str, returncode: int | None) -> str:
    if detail:
        return f"{reason}: {detail}"
    return str(reason) if returncode is None else f"{reason} with {returncode}"


def _event_attributes(event: Any) -> _Attributes:
    """Not those of the span, and no None, which OpenTelemetry does not have."""
    values = transitions.fields(event)
    del values["tree_id"]
    if not isinstance(event, transitions.TreeSurvivor):
        del values["name"]
    return {
        _ATTRIBUTES.get(name, f"proctree.{name}"): _text(value) if isinstance(value, str) else value
        for name, value in values.items()
        if value is not None
    }


_ATTRIBUTES = {"pid": "process.pid", "returncode": "process.exit.code"}


def _text(value: str) -> str:
    """Without the surrogates that stand for what is no UTF-8: no exporter can encode them."""
    return value.encode("utf-8", "replace").decode()


def _executable(command: Command) -> str:
    # A callable runs in a fork of ours.
    program = command.program if command.argv else sys.executable
    return _text(os.path.basename(program))


def _span_name(command: Command, executable: str) -> str:
    """The executable's, as the conventions want it, and of few different values: not the tree's
    name, which may be one of a thousand. The interpreter's would say nothing of a callable."""
    if command.function is None:
        return executable
    return str(getattr(command.function, "__qualname__", type(command.function).__name__))


def _environment(span: Span) -> launching.Environment:
    """The W3C trace context of the span as environment variables. A TRACESTATE of another trace,
    which the tree would inherit from us, must not stay beside our TRACEPARENT."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    if not carrier:
        return {}
    state = carrier.get("tracestate")
    return {
        b"TRACEPARENT": carrier["traceparent"].encode("ascii"),
        b"TRACESTATE": None if state is None else state.encode("ascii"),
    }


def instrument(
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    propagate: bool = False,
) -> Instrumentation:
    """Records a span for each tree, and metrics of all of them, from now on.

    A tree that is launched within a current span becomes its child. Trees that are under way get a
    span too, with the time of their own start and without a parent. Your exporters are never called
    on a thread that trees depend on: one that is slow makes events wait, and at last get lost,
    which is counted.

    Args:
        tracer_provider, meter_provider: default None: the global ones.
        attributes: for every span and every metric, as the name of the service. Default: none.
        propagate: give each tree the identity of its span in its environment, as TRACEPARENT and
            TRACESTATE (https://www.w3.org/TR/trace-context/). Default False.

    Returns:
        The instrumentation, to `close`; also a context manager.

    Raises:
        TypeError: attributes is not a mapping from strings.
    """
    tracers = trace.get_tracer_provider() if tracer_provider is None else tracer_provider
    meters = metrics.get_meter_provider() if meter_provider is None else meter_provider
    version = proctree.__version__
    return Instrumentation(
        tracers.get_tracer("proctree", version),
        meters.get_meter("proctree", version),
        _checked(attributes),
        propagate,
    )


def _checked(attributes: Any) -> Mapping[str, AttributeValue]:
    if attributes is None:
        return {}
    if not isinstance(attributes, Mapping) or not all(isinstance(key, str) for key in attributes):
        raise TypeError(f"attributes: a mapping from strings, not {attributes!r}")
    return attributes
