"""As durable_parts.py, for keys that are held in a database: on this machine, and on another one.

Two machines are two local directories here. Everything runs in a zygote or in what it forks.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from integration import crash_points, durable_parts
from integration.crash_points import forked, settle, settled, traced
from integration.durable_parts import (
    KEY,
    Place,
    Scenario,
    check_delivered,
    check_files,
    check_stored,
    complete,
    finish,
    leave,
    reconnect,
    recorded,
    resume,
    start,
    succeeded,
    whole,
)
from proctree import KillPolicy, Stage, durable
from proctree.durable import FileStore
from proctree.durable.leased import RunElsewhere
from proctree.durable.recording import Cause, Exit, Request
from proctree.durable.sql import SqlStore

LONG = 600.0
"""No retry on the same machine may wait for the end of a lease."""
SHORT = 1.5
QUICK = KillPolicy((Stage(15, 0.05), Stage(9, 0.3)))
"""It has to fit into half of that."""

SCENARIOS = {
    "start": Scenario(start),
    "run": Scenario(whole),
    "finish": Scenario(finish),
    "reconnect": Scenario(reconnect, leave),
}


class Leased(Place):
    """As its base; by `containment` it is also told which machine it is on, and how long the lease
    is."""

    @property
    def options(self) -> dict[str, Any]:
        machine, lease = self.containment.split()
        store = SqlStore(
            f"sqlite:///{self.path}/records",
            lease=float(lease),
            local=FileStore(f"{self.path}/{machine}"),
        )
        return super().options | {"store": store, "containment": "warden", "kill": QUICK}

    @property
    def store(self) -> str:
        return f"{self.path}/{self.containment.split()[0]}"

    def on(self, machine: str, lease: float) -> Leased:
        return Leased(self.path, f"{machine} {lease}")


@contextlib.contextmanager
def place(folder: str, lease: float) -> Iterator[Leased]:
    with durable_parts.place(folder, "") as at:
        yield Leased(at.path, at.containment).on("here", lease)


def resume_elsewhere(at: Place) -> int | None:
    """The gate is closed until it is started there: what runs here cannot end before by itself."""
    while True:
        run = durable.start(KEY, at.target, **at.options)
        if not isinstance(run, RunElsewhere):
            gate = at.open_gate()
            outcome = run.wait()
            os.close(gate)
            assert outcome is not None
            return outcome.returncode
        run.wait()


# -- What must hold.


class Row(NamedTuple):
    """An attempt in the database, read without the help of what is tested."""

    number: int
    request: Request
    exit: Exit | None


def rows(at: Place) -> list[Row]:
    query = "SELECT number, request, exit FROM proctree_attempts ORDER BY number"
    return [
        Row(number, Request.decode(request.encode()), how and Exit.decode(how.encode()))
        for number, request, how in _select(at, query)
    ]


def _select(at: Place, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"{at.path}/records")) as connection:
        return connection.execute(query).fetchall()


def check_rows(at: Place) -> list[str]:
    """One success, the last one, and the key is given back."""
    attempts = rows(at)
    how = [row.exit is not None and (row.exit.status, row.exit.cause) for row in attempts]
    wrong = []
    if how.count((0, Cause.ITSELF)) != 1 or how[-1] != (0, Cause.ITSELF):
        wrong.append(f"not the last attempt alone is recorded as a success: {how}")
    if [row.number for row in attempts] != list(range(1, len(attempts) + 1)):
        wrong.append(f"attempts {[row.number for row in attempts]}")
    if (held := _select(at, "SELECT released FROM proctree_runs")) != [(1,)]:
        wrong.append(f"the key is held: {held}")
    return wrong


def check_same(at: Place) -> list[str]:
    """What is recorded there is what the warden has recorded here."""
    here = {attempt.request.tree_id: attempt.exit for attempt in recorded(at.store)}
    return [
        f"attempt {row.number}: {row.exit} there, {here.get(row.request.tree_id)} here"
        for row in rows(at)
        if row.exit is not None and here.get(row.request.tree_id) != row.exit
    ]


def check_alone(at: Place, effects: tuple[int, ...]) -> list[str]:
    wrong = [f"two at once: {line}" for line in at.lines("two")]
    done = at.lines("effects")
    if len(done) not in effects:
        wrong.append(f"side effects: {done}")
    if done and done[-1] != rows(at)[-1].request.tree_id:
        wrong.append(f"another attempt than the last one did it last: {done}")
    return wrong


def check(at: Place, *, said: bool) -> list[str]:
    """What is wrong when the key has succeeded on the machine where it was tried first."""
    del said  # it is all the same here
    attempts = recorded(at.store)
    wrong = check_alone(at, (1,))
    wrong += check_rows(at)
    wrong += check_same(at)
    if not succeeded(attempts[-1]):
        wrong.append(f"the last attempt here has not succeeded: {attempts[-1]}")
    wrong += check_stored(attempts, cut=False)
    wrong += check_delivered(at, attempts)
    wrong += check_files(at, attempts)
    return wrong


def check_both(at: Leased, *, said: bool) -> list[str]:
    """The same when it was tried again on another one. An attempt whose end was not recorded before
    its machine was lost counts as lost, whatever it has done; but not if its supervisor has said
    how it ended."""
    wrong = check_alone(at, (1,) if said else (1, 2))
    wrong += check_rows(at)
    for machine in (at, at.on("there", LONG)):
        with contextlib.suppress(FileNotFoundError):
            wrong += check_files(machine, recorded(machine.store))
    # An attempt that was not complete is removed by whoever makes the next one on that machine.
    wrong = [line for line in wrong if not line.endswith("/.1.new")]
    last = rows(at)[-1]
    if len(at.lines("effects")) > 1 and last.number == 1:
        wrong.append("it was done again although its end was recorded")
    return wrong


# -- One crash.


def crash(tracer: str, folder: str, name: str, nth: int) -> dict[str, Any]:
    """SIGKILL at the `nth` system call of a scenario's window, and a retry in a fresh process on
    the same machine. As `durable_parts.crash`."""

    def retry(at: Leased) -> Any:
        return forked((resume, complete)[nth % 2], at)

    return _crash(tracer, folder, name, nth, LONG, retry, check)


def crash_elsewhere(tracer: str, folder: str, name: str, nth: int) -> dict[str, Any]:
    """The same, and the retry is on another machine."""

    def retry(at: Leased) -> Any:
        return forked(resume_elsewhere, at.on("there", LONG))

    return _crash(tracer, folder, name, nth, SHORT, retry, check_both)


def _crash(
    tracer: str,
    folder: str,
    name: str,
    nth: int,
    lease: float,
    retry: Callable[[Leased], Any],
    verify: Callable[..., list[str]],
) -> dict[str, Any]:
    scenario = SCENARIOS[name]
    with place(folder, lease) as at:
        if scenario.before is not None:
            forked(scenario.before, at)
        done = traced(tracer, nth, scenario.body, at)
        said = not done.killed and done.ended.value() == 0
        # With a short lease a slow machine may end it.
        wrong = [] if done.killed or said or lease == SHORT else [f"it said {done.ended}"]
        if (code := retry(at)) != 0:
            wrong.append(f"the retry said {code}")
        wrong += settled()
        wrong += verify(at, said=said)
    return {
        "wrong": wrong,
        "calls": len(done.calls),
        "number": done.calls[-1].number if done.calls else None,
        "killed": done.killed,
    }


def learn(folder: str) -> None:
    """Imports what the scenarios import."""
    for name in SCENARIOS:
        crash_points.learn(_try_out, folder, name)
    settle()


def _try_out(folder: str, name: str) -> None:
    scenario = SCENARIOS[name]
    with place(folder, LONG) as at:
        if scenario.before is not None:
            forked(scenario.before, at)
        scenario.body(at)
