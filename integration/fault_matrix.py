"""What is promised: a table of faults and backends, and the moments at which a fault may come.

The promises here are what test_fault_matrix.py holds the backends to, and what the table in
docs/guarantees.md shows:

    python -m integration.fault_matrix            prints the table
    python -m integration.fault_matrix --write    puts it into the document

The variable PROCTREE_FAULT_MATRIX=all makes the tests run every combination. By default each fault
comes in each backend, at each of its moments and in each of its variants, but not in every
combination of them.
"""

from __future__ import annotations

import argparse
import enum
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parent.parent / "docs" / "guarantees.md"
BEGIN = "<!-- fault matrix: made by `python -m integration.fault_matrix --write` -->"
END = "<!-- end of the fault matrix -->"

BACKENDS = ("pidns", "cgroup", "warden", "group")


class Moment(enum.StrEnum):
    """When a fault comes."""

    STARTING = "starting"
    """The main process is there and has not executed its program yet."""
    RUNNING = "running"
    GRACE = "grace"
    """SIGTERM was sent, and its grace is not over."""
    KILLED = "killed"
    """SIGKILL was sent, to the main process or to the tree, and something is still there."""
    DRAINING = "draining"
    """The tree has ended, its output has not been delivered, and a process outside the tree holds
    the pipe."""


class Promise(enum.StrEnum):
    """What becomes of the tree."""

    ENDED = "ended"
    """Every process of it, and that is proved before it is reported."""
    REPORTED = "reported"
    """What cannot be ended is in `Outcome.survivors` with its state and why; the rest has ended."""
    BY_KERNEL = "by the kernel"
    """Every process ends though nobody is left who would act."""
    BY_SWEEP = "by sweep"
    """Every process ends with the next `proctree.sweep()`."""
    MAIN_THEN_SWEEP = "main, rest by sweep"
    """The main process at once, and whatever bears a mark of the tree when it is swept."""
    BEST_EFFORT = "best effort"
    """The main process, and whatever bears a mark of the tree."""
    NOTHING = "nothing happens"
    """The tree goes on as if nothing had been."""
    ABSENT = "-"
    """There is no such thing in this backend."""


class Cell(NamedTuple):
    """One cell of the table; the note is a number in the document's list of reasons."""

    promise: Promise
    note: int | None = None

    def __str__(self) -> str:
        return str(self.promise) if self.note is None else f"{self.promise} ({self.note})"


class Fault(NamedTuple):
    """One row.

    Attributes:
        name: of the test.
        happens: the row's first column.
        cells: one for each of BACKENDS.
        senseless: why it is not tried at a moment, or in one of its variants there. It is tried at
            all the others.
        variants: ways in which it comes, if there are several.
        turns: in how many backends it is tried by default in each way but the first.
    """

    name: str
    happens: str
    cells: tuple[Cell, Cell, Cell, Cell]
    senseless: dict[Moment | tuple[Moment, str], str]
    variants: tuple[str, ...] = ("",)
    turns: int = 2

    @property
    def moments(self) -> tuple[Moment, ...]:
        return tuple(moment for moment in Moment if moment not in self.senseless)

    def variants_at(self, moment: Moment) -> tuple[str, ...]:
        return tuple(name for name in self.variants if (moment, name) not in self.senseless)

    def promise(self, backend: str) -> Promise:
        return self.cells[BACKENDS.index(backend)].promise


_ENDED = Cell(Promise.ENDED)
_NOTHING = Cell(Promise.NOTHING)
_ABSENT = Cell(Promise.ABSENT)

_NO_PROGRAM = "the program that would do it has not been executed"
_NOBODY_LEFT = "no process is left that could"
_IN_THE_GRACE = "whoever ignores SIGTERM is met in the grace and nowhere else: see `running`"
_ONLY_MAIN = "there is no process but the main one yet"
_MAIN_GONE = "the main process has ended by its SIGKILL"

FAULTS = (
    Fault(
        "leaves",
        "The main process exits and leaves background processes",
        (_ENDED,) * 4,
        {Moment.STARTING: _NO_PROGRAM, Moment.DRAINING: _NOBODY_LEFT},
    ),
    Fault(
        "ignores",
        "A process ignores SIGTERM",
        (_ENDED,) * 4,
        {
            Moment.STARTING: _NO_PROGRAM,
            Moment.GRACE: _IN_THE_GRACE,
            Moment.KILLED: "nobody ignores SIGKILL",
            Moment.DRAINING: _NOBODY_LEFT,
        },
    ),
    Fault(
        "stopped",
        "A process is stopped",
        (_ENDED,) * 4,
        {Moment.DRAINING: _NOBODY_LEFT},
    ),
    Fault(
        "daemon",
        "A process calls setsid(2), forks twice, closes its descriptors and clears its environment",
        (_ENDED, _ENDED, Cell(Promise.ENDED, 1), Cell(Promise.BEST_EFFORT, 1)),
        {Moment.STARTING: _NO_PROGRAM, Moment.DRAINING: _NOBODY_LEFT},
    ),
    Fault(
        "bomb",
        "A fork bomb",
        (_ENDED, _ENDED, Cell(Promise.ENDED, 2), Cell(Promise.BEST_EFFORT, 3)),
        {Moment.STARTING: _NO_PROGRAM, Moment.DRAINING: _NOBODY_LEFT},
    ),
    Fault(
        "supervisor",
        "The supervisor is SIGKILLed, OOM-killed, or calls `os._exit`",
        (
            Cell(Promise.ENDED, 4),
            Cell(Promise.ENDED, 4),
            Cell(Promise.ENDED, 4),
            Cell(Promise.MAIN_THEN_SWEEP, 5),
        ),
        {},
        # The kernel's OOM killer sends SIGKILL; nobody can tell it from any other.
        variants=("sigkill", "exit"),
        turns=1,
    ),
    Fault(
        "thread",
        "The thread that started the tree ends",
        (_NOTHING, _NOTHING, _NOTHING, Cell(Promise.NOTHING, 5)),
        {Moment.STARTING: "it waits for the main process to execute its program"},
    ),
    Fault(
        "warden",
        "The warden is SIGKILLed",
        (_ENDED, _ENDED, Cell(Promise.MAIN_THEN_SWEEP, 7), _ABSENT),
        {Moment.DRAINING: "it has exited before"},
    ),
    Fault(
        "both",
        "Supervisor and warden are SIGKILLed together",
        (
            Cell(Promise.BY_KERNEL, 8),
            Cell(Promise.BY_SWEEP, 8),
            Cell(Promise.MAIN_THEN_SWEEP, 8),
            _ABSENT,
        ),
        {Moment.DRAINING: "the warden has exited before: see the supervisor's row"},
    ),
    Fault(
        "setuid",
        "A descendant that we may not signal (set-uid)",
        (
            Cell(Promise.ENDED, 9),
            Cell(Promise.ENDED, 9),
            Cell(Promise.REPORTED, 9),
            Cell(Promise.REPORTED, 9),
        ),
        {Moment.STARTING: "a program becomes set-uid when it is executed"}
        | {Moment.DRAINING: "what survives holds the pipe itself: see `running`"},
    ),
    Fault(
        "traced",
        "A process whose tracer, outside the tree, does not let go of it",
        (Cell(Promise.REPORTED, 10),) * 4,
        {
            Moment.DRAINING: _NOBODY_LEFT,
            (Moment.STARTING, "child"): _ONLY_MAIN,
            (Moment.KILLED, "main"): _MAIN_GONE,
        },
        variants=("child", "main"),
        turns=1,
    ),
    Fault(
        "frozen",
        "A process in uninterruptible sleep",
        (Cell(Promise.REPORTED, 10),) * 4,
        {
            Moment.DRAINING: _NOBODY_LEFT,
            (Moment.STARTING, "child"): _ONLY_MAIN,
            (Moment.STARTING, "all"): _ONLY_MAIN,
            (Moment.KILLED, "main"): _MAIN_GONE,
            (Moment.KILLED, "all"): _MAIN_GONE,
        },
        variants=("child", "main", "all"),
        turns=1,
    ),
)


class Case(NamedTuple):
    """One fault in one backend at one moment."""

    fault: Fault
    backend: str
    moment: Moment
    variant: str

    @property
    def promise(self) -> Promise:
        return self.fault.promise(self.backend)

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.moment, self.variant)))


def all_cases(fault: Fault) -> Iterator[Case]:
    for backend in BACKENDS:
        if fault.promise(backend) is not Promise.ABSENT:
            for moment in fault.moments:
                for variant in fault.variants_at(moment):
                    yield Case(fault, backend, moment, variant)


def cases(name: str) -> list[Case]:
    """What is run of a fault: in every backend while the tree runs, and at its other moments and in
    its other variants in some of them, in turn."""
    number, fault = next((n, fault) for n, fault in enumerate(FAULTS) if fault.name == name)
    found = list(all_cases(fault))
    if os.environ.get("PROCTREE_FAULT_MATRIX") == "all":
        return found
    backends = [name for name in BACKENDS if fault.promise(name) is not Promise.ABSENT]
    chosen = []
    for turn, way in enumerate(dict.fromkeys((case.moment, case.variant) for case in found)):
        here = [case for case in found if (case.moment, case.variant) == way]
        if way != (Moment.RUNNING, fault.variants[0]):
            turns = {backends[(number + turn + n) % len(backends)] for n in range(fault.turns)}
            here = [case for case in here if case.backend in turns]
        chosen += here
    return chosen


def table() -> str:
    lines = ["| What happens | " + " | ".join(f"`{name}`" for name in BACKENDS) + " |"]
    lines.append("|" + "---|" * (len(BACKENDS) + 1))
    for fault in FAULTS:
        lines.append(f"| {fault.happens} | " + " | ".join(map(str, fault.cells)) + " |")
    return "\n".join(lines) + "\n"


def _split(document: str) -> tuple[str, str, str]:
    before, begin, rest = document.partition(f"{BEGIN}\n")
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no table between {BEGIN!r} and {END!r}")
    return before, inside, after


def documented() -> str:
    """The table that the document shows."""
    return _split(DOCUMENT.read_text())[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="The table of faults and backends.")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    if parser.parse_args().write:
        before, _, after = _split(DOCUMENT.read_text())
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}{END}{after}")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
