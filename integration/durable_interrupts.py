"""A durable run whose supervisor is interrupted at each single bytecode on its way to the handle.

    python -m integration.durable_interrupts PLACE MODE [STRIDE]

MODE is what is interrupted, and what is to become of the run: `kill` and `detach` are those of
`durable.run`, with an exception that a handler raises; so is `reconnect`, to a run that goes on;
and `leased`, with the records in a database. `start` is `durable.start`, with such an exception.
`signal` and `keep` are `proctree run` without and with `--keep`, which gets SIGTERM. See
interrupting.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import time
from pathlib import Path

import sqlalchemy.engine.base as engine
import sqlalchemy.pool.base as pool

from integration.conftest import DEADLINE
from integration.interrupting import SIGNAL, Interrupt, Tracer
from proctree import KillPolicy, Stage, cli, durable, latch, loop, tree
from proctree.cli import durable as command_line
from proctree.durable import FileStore, running
from proctree.durable.sql import SqlStore

FOLDER = Path(running.__file__).parent
NAMES = ("__init__", "reconnecting", "running", "runs", "starting", "directory", "leased", "sql")
FILES = {str(FOLDER / f"{name}.py") for name in NAMES} | {
    command_line.__file__,
    latch.__file__,
    loop.__file__,
    tree.__file__,
    # Where nothing is interrupted any more; but it was, when all of it was done on this thread.
    engine.__file__,
    pool.__file__,
}
Place = FileStore | SqlStore
LEASE = 8.0
AT_ONCE = KillPolicy((Stage(signal.SIGKILL, LEASE / 4),))
ENDING = LEASE / 2
"""Seconds that an ending may take which a slow machine did not get done in the time of that policy;
less than it takes the lease to end it."""
BEYOND = 40
"""Opcodes behind those of a start: there its end is waited for."""

LASTS = ["sleep", "60"]
"""Longer than all of it takes."""


def on_signal(_signo: int, _frame: object) -> None:
    raise Interrupt


def by_exception(tracer: Tracer, key: str, store: Place, mode: str) -> None:
    with contextlib.suppress(Interrupt), tracer:
        durable.run(key, LASTS, store=store, interrupted=mode, kill=AT_ONCE)


def before_the_handle(tracer: Tracer, key: str, store: Place) -> None:
    run = None
    with contextlib.suppress(Interrupt), tracer:
        run = durable.start(key, LASTS, store=store, kill=AT_ONCE)
    if run is not None:
        run.kill()
        run.wait()


def by_signal(tracer: Tracer, key: str, store: FileStore, mode: str) -> None:
    options = ["--durable", key, "--store", store.path] + ["--keep"] * (mode == "keep")
    signal.signal(signal.SIGTERM, on_signal)  # it has not got its own handler from the start on
    with contextlib.suppress(Interrupt), contextlib.redirect_stderr(io.StringIO()), tracer:
        status = cli.main(["run", *options, "--", *LASTS])
        if tracer.reached and status != 128 + signal.SIGTERM:
            raise AssertionError(f"exit status {status}")


def still_leased(keys: set[str], store: SqlStore) -> set[str]:
    """A claim that was lost on its way is not renewed, and so free when its lease is over. All are
    waited for at once."""
    due = time.monotonic() + DEADLINE
    while keys and time.monotonic() < due:
        for key in sorted(keys):
            if (claim := store.claim(key)) is not None:
                claim.release()
                keys = keys - {key}
        time.sleep(0.01)
    return keys


def check(key: str, store: FileStore, *, kept: bool) -> str:
    """What is wrong."""
    attempts = store.attempts(key)
    due = time.monotonic() + (0 if kept else ENDING)
    while (claimed := store.claimed(key)) and time.monotonic() < due:
        time.sleep(0.01)
    if not claimed:
        # It was not started, or it was ended.
        ended = [attempt for attempt in attempts if attempt.exit is not None]
        return "it was ended" if kept and ended else ""
    if not kept:
        return "it runs on, or our lock does"
    outcome = durable.cancel(key, store=store, timeout=30.0)
    return "" if outcome is not None else "our lock is left, and nothing that runs"


def check_free(key: str, store: FileStore) -> str:
    """What is wrong with a run that goes on, and that nobody is to be attached to."""
    run = durable.attach(key, store=store)
    due = time.monotonic() + DEADLINE
    while not run.owned:
        if time.monotonic() > due:
            return "we are still attached"
        time.sleep(0.001)
    run.detach()
    run.wait()
    return ""


def count(key: str, store: Place) -> int:
    """The opcodes of a start, or of reconnecting."""
    with (tracer := Tracer(-1, FILES)):
        run = durable.start(key, LASTS, store=store, kill=AT_ONCE)
    run.detach()
    run.wait()
    return tracer.count


def main(place: str, mode: str, stride: int = 1) -> None:
    signal.signal(SIGNAL, on_signal)
    local = FileStore(place)
    leased = SqlStore(f"sqlite:///{place}.records", lease=LEASE, local=local)
    store: Place = leased if mode == "leased" else local
    durable.run("imports", ["true"], store=store, kill=AT_ONCE)
    opcodes = count("counted", store)
    if mode == "reconnect":
        opcodes = count("counted", store)
    by_command = mode in ("signal", "keep")
    tried: dict[str, str] = {}
    reached, wrong = 0, []
    for at in range(0, opcodes + BEYOND, stride):
        tracer = Tracer(at, FILES, signo=signal.SIGTERM if by_command else SIGNAL)
        key = "counted" if mode == "reconnect" else f"key {at}"
        if by_command:
            by_signal(tracer, key, local, mode)
        elif mode == "start":
            before_the_handle(tracer, key, store)
        else:
            by_exception(tracer, key, store, "kill" if mode in ("kill", "leased") else "detach")
        reached += tracer.reached
        tried[key] = tracer.where
        if mode == "reconnect":
            complaint = check_free(key, local)
        else:
            complaint = check(key, local, kept=mode in ("detach", "keep"))
        if complaint:
            wrong.append(f"{complaint}: interrupted at {tracer.where}")
    if mode == "leased":
        left = still_leased(set(tried), leased)
        wrong += [f"its lease is renewed for ever: interrupted at {tried[key]}" for key in left]
    durable.cancel("counted", store=local)
    print(json.dumps({"opcodes": opcodes, "reached": reached, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
