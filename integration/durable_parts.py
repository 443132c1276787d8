"""What the tests of crashes in durable runs have in common: a tree, its supervisors one after the
other, and what must hold when the last of them has the result.

Everything here runs in a zygote or in what it forks: see crash_points.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from integration import crash_points
from integration.crash_points import children, forked, settle, settled, traced, window
from proctree import KillPolicy, Lines, Stage, durable
from proctree.durable.recording import Cause, Exit, Request, Unreadable

KEY = "nightly / report"
QUICK = KillPolicy((Stage(15, 0.05), Stage(9, 30.0)))
LINES = 20
"""That the tree writes to each of its streams, half of them before the gate."""

TREE = r"""
exec 9>> "$1/alone"
flock -n 9 || echo "$PROCTREE_TREE" >> "$1/two"
if [ -e "$1/family" ]; then
    setsid sh -c 'trap "" TERM; : < "$0/never"' "$1" &
fi
i=0
while [ $i -lt 20 ]; do
    [ $i -ne 10 ] || : < "$1/gate"
    echo "$PROCTREE_TREE $i"
    echo "$PROCTREE_TREE $i" >&2
    i=$((i + 1))
done
if [ -e "$1/failing" ]; then
    rm "$1/failing"
    exit 3
fi
echo "$PROCTREE_TREE" >> "$1/effects"
"""
"""Its last act is the side effect. Two of them at once are told by a lock that every member holds,
and that the kernel drops with the last one."""


class Place(NamedTuple):
    """The folder of one key and all that its trees and supervisors do.

    Attributes:
        path: the folder.
        containment: of the trees.
    """

    path: str
    containment: str

    @property
    def store(self) -> str:
        return f"{self.path}/store"

    @property
    def target(self) -> list[str]:
        return ["sh", "-c", TREE, "sh", self.path]

    @property
    def options(self) -> dict[str, Any]:
        """For `durable.start` and `durable.run`."""
        return {
            "store": self.store,
            "containment": self.containment,
            "kill": QUICK,
            "logs": self._readers(),
        }

    def _readers(self) -> tuple[Lines, Lines]:
        """Two that write down what they were given; the names sort as the supervisors came."""
        name = f"{time.monotonic_ns():020}.{os.getpid()}"
        return self._reader(f"{name}.out"), self._reader(f"{name}.err")

    def _reader(self, name: str) -> Lines:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(f"{self.path}/delivered/{name}", flags, 0o600)
        return Lines(lambda line: os.write(fd, f"{line}\n".encode()))

    def open_gate(self) -> int:
        """The gate is open for as long as somebody has it open for writing, fifo(7)."""
        return os.open(f"{self.path}/gate", os.O_RDWR | os.O_CLOEXEC)

    def lines(self, name: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return Path(self.path, name).read_text().splitlines()
        return []


@contextlib.contextmanager
def place(folder: str, containment: str, *marks: str) -> Iterator[Place]:
    """A new one, below `folder`; with files called as `marks`, which say what the tree does."""
    path = tempfile.mkdtemp(dir=folder)
    try:
        os.mkdir(f"{path}/delivered")
        for name in ("gate", "never"):
            os.mkfifo(f"{path}/{name}")
        for name in marks:
            Path(path, name).touch()
        yield Place(path, containment)
    finally:
        shutil.rmtree(path)


# -- Supervisors. What they do in their window is what is interrupted.


def leave(at: Place) -> None:
    """Starts it, and is gone: the tree waits at its gate."""
    durable.start(KEY, at.target, **at.options)


def complete(at: Place, retries: int = 0) -> int | None:
    gate = at.open_gate()
    outcome = durable.run(KEY, at.target, retries=retries, **at.options)
    os.close(gate)
    return outcome.returncode


def _finish(at: Place, run: Any) -> int | None:
    gate = at.open_gate()
    outcome = run.wait()
    os.close(gate)
    return outcome.returncode  # type: ignore[no-any-return]


def resume(at: Place) -> int | None:
    """As `complete`, but the gate is closed until it is connected."""
    return _finish(at, durable.start(KEY, at.target, **at.options))


def start(at: Place) -> int | None:
    options = at.options
    with window():
        run = durable.start(KEY, at.target, **options)
    return _finish(at, run)


def reconnect(at: Place) -> int | None:
    options = at.options
    with window():
        run = durable.start(KEY, at.target, **options)
    assert run.reconnected
    return _finish(at, run)


def finish(at: Place) -> int | None:
    run = durable.start(KEY, at.target, **at.options)
    with window():
        return _finish(at, run)


def whole(at: Place) -> int | None:
    options = at.options
    gate = at.open_gate()
    with window():
        outcome = durable.run(KEY, at.target, **options)
    os.close(gate)
    return outcome.returncode


def failing(at: Place) -> int | None:
    """Its first attempt fails."""
    options = at.options
    gate = at.open_gate()
    with window():
        outcome = durable.run(KEY, at.target, retries=1, **options)
    os.close(gate)
    return outcome.returncode


class Scenario(NamedTuple):
    """What is interrupted.

    Attributes:
        body: the supervisor with the window.
        before: the one before it, which has ended.
        marks: what the tree does.
    """

    body: Callable[[Place], int | None]
    before: Callable[[Place], object] | None = None
    marks: tuple[str, ...] = ()


SCENARIOS = {
    "start": Scenario(start),
    "run": Scenario(whole),
    "finish": Scenario(finish),
    "reconnect": Scenario(reconnect, leave),
    "reconnect while it finishes": Scenario(whole, leave),
    "reconnect after it finished": Scenario(whole, complete),
    "failing attempt, then retry": Scenario(failing, None, ("failing",)),
}


# -- What must hold.


class Recorded(NamedTuple):
    """One attempt in the store, read without the help of what is tested."""

    folder: Path
    number: int
    request: Request
    exit: Exit | None


def _exit_of(folder: Path) -> Exit | None:
    """Its record counts from the last byte on: the warden may have been killed before the name."""
    if (folder / "exit").exists():
        return Exit.decode((folder / "exit").read_bytes())
    with contextlib.suppress(FileNotFoundError, Unreadable):
        return Exit.decode((folder / "exit~").read_bytes())
    return None


def recorded(store: str, pattern: str = "*/attempts") -> list[Recorded]:
    """All attempts below; with "attempts" of one key."""
    found = []
    for folder in Path(store).glob(f"{pattern}/[0-9]*"):
        request = Request.decode((folder / "request").read_bytes())
        found.append(Recorded(folder, int(folder.name), request, _exit_of(folder)))
    return sorted(found, key=lambda attempt: attempt.number)


def succeeded(attempt: Recorded) -> bool:
    return attempt.exit is not None and (attempt.exit.status, attempt.exit.cause) == (
        0,
        Cause.ITSELF,
    )


def _numbers(lines: list[str], tree_id: str) -> list[int]:
    return [int(number) for tree, number in map(str.split, lines) if tree == tree_id]


def check_stored(attempts: list[Recorded], *, cut: bool) -> list[str]:
    """What the trees wrote is in the store: all of it, or of one that never ran nothing. With `cut`
    any beginning of it, since the tree was ended."""
    wrong = []
    for attempt in attempts:
        for name in ("out.log", "err.log"):
            lines = (attempt.folder / name).read_text().splitlines()
            got = _numbers(lines, attempt.request.tree_id)
            right = got == list(range(len(got))) and len(got) == len(lines)
            if attempt.exit is not None:
                right = right and len(got) == LINES
            elif not cut:
                right = right and not got
            if not right:
                wrong.append(f"attempt {attempt.number}, {name}: {lines}")
    return wrong


def check_delivered(at: Place, attempts: list[Recorded]) -> list[str]:
    """Over all readers nothing is missing, and nothing is repeated but at the seams. Of an attempt
    that did not succeed only the beginning need have been delivered: nobody asked for the rest."""
    wrong = []
    for stream in ("out", "err"):
        names = sorted(os.listdir(f"{at.path}/delivered"))
        readers = [at.lines(f"delivered/{name}") for name in names if name.endswith(f".{stream}")]
        for attempt in attempts:
            following = 0
            for lines in readers:
                got = _numbers(lines, attempt.request.tree_id)
                if got and (got[0] > following or got != list(range(got[0], got[-1] + 1))):
                    wrong.append(f"attempt {attempt.number}, std{stream}: {got} after {following}")
                following = max([following, *(number + 1 for number in got)])
            if succeeded(attempt) and following != LINES:
                wrong.append(f"attempt {attempt.number}, std{stream}: {following} of {LINES} lines")
    return wrong


def check_delivered_once(at: Place) -> list[str]:
    """The first reader had everything and was not killed: there is nothing left for the others."""
    first, *others = sorted(
        {name.rpartition(".")[0] for name in os.listdir(f"{at.path}/delivered")}
    )
    again = [at.lines(f"delivered/{name}.{stream}") for name in others for stream in ("out", "err")]
    return [f"delivered again, behind {first}: {again}"] if any(again) else []


_ATTEMPT = {"request", "out.log", "err.log", "cursor"}


def check_files(at: Place, attempts: list[Recorded]) -> list[str]:
    """No lock, no leftover."""
    wrong = []
    for folder in Path(at.store).iterdir():
        odd = set(os.listdir(folder)) - {"lock", "attempts", "unreadable"}
        odd |= {entry for entry in os.listdir(folder / "attempts") if not entry.isdigit()}
        wrong += [f"leftover {folder.name}/{name}" for name in odd]
        with open(folder / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wrong.append("the lock is held")
    for attempt in attempts:
        named = (attempt.folder / "exit").exists()
        may = _ATTEMPT | ({"exit"} if named else {"exit~", "control"})
        odd = set(os.listdir(attempt.folder)) - may
        wrong += [f"leftover {attempt.number}/{name}" for name in odd]
    with contextlib.suppress(FileNotFoundError):
        entries = os.listdir(f"{os.environ['XDG_RUNTIME_DIR']}/proctree")
        wrong += [f"leftover in the registry: {name}" for name in entries]
    return wrong


def check(at: Place, effects: tuple[int, ...], *, cut: bool = False) -> list[str]:
    """What is wrong when the key has succeeded and everything has ended."""
    attempts = recorded(at.store)
    wrong = [f"two at once: {line}" for line in at.lines("two")]
    done = at.lines("effects")
    if len(done) not in effects:
        wrong.append(f"side effects: {done}")
    if [succeeded(attempt) for attempt in attempts].count(True) != 1 or not succeeded(attempts[-1]):
        wrong.append(f"not the last attempt alone succeeded: {attempts}")
    elif done[-1] != attempts[-1].request.tree_id:
        wrong.append(f"another attempt than the last one did it: {done}, {attempts}")
    wrong += check_stored(attempts, cut=cut)
    wrong += check_delivered(at, attempts)
    wrong += check_files(at, attempts)
    return wrong


# -- One crash.


def _retry(at: Place, scenario: Scenario, nth: int) -> int | None:
    """In a fresh process: alternately one that finds the tree at its gate, and one that may find it
    at its end."""
    if scenario.body is failing:
        return forked(complete, at, 1)  # type: ignore[no-any-return]
    return forked((resume, complete)[nth % 2], at)  # type: ignore[no-any-return]


def crash(tracer: str, folder: str, name: str, nth: int) -> dict[str, Any]:
    """SIGKILL at the `nth` system call of a scenario's window, and a retry in a fresh process.

    Returns:
        `wrong`: what is wrong; `calls`: how many were counted, and `number` of the last one;
        `killed`: whether it was.
    """
    scenario = SCENARIOS[name]
    with place(folder, "warden", *scenario.marks) as at:
        if scenario.before is not None:
            forked(scenario.before, at)
        done = traced(tracer, nth, scenario.body, at)
        wrong = [] if done.killed or done.ended.value() == 0 else [f"it said {done.ended}"]
        if (code := _retry(at, scenario, nth)) != 0:
            wrong.append(f"the retry said {code}")
        wrong += settled()
        wrong += check(at, (1,))
        if scenario.before is complete:
            wrong += check_delivered_once(at)
    return {
        "wrong": wrong,
        "calls": len(done.calls),
        "number": done.calls[-1].number if done.calls else None,
        "killed": done.killed,
    }


def crash_both(tracer: str, folder: str, containment: str, name: str, nth: int) -> dict[str, Any]:
    """The same, and SIGKILL to the warden behind it. As `crash`."""
    with place(folder, containment, "family") as at:
        done = traced(tracer, nth, SCENARIOS[name].body, at)
        # The zygote is a subreaper: what a supervisor leaves are its wardens.
        for pid in children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        code = forked(resume, at)
        wrong = [] if code == 0 else [f"the retry said {code}"]
        wrong += settled()
        # At its end the tree may have done its work, and nobody could record that.
        effects = (1, 2) if name == "finish" else (1,)
        wrong += check(at, effects, cut=True)
        attempts = len(recorded(at.store))
    return {
        "wrong": wrong,
        "calls": len(done.calls),
        "killed": done.killed,
        "attempts": attempts,
    }


def learn(folder: str) -> None:
    """Imports what the scenarios import."""
    for name in SCENARIOS:
        crash_points.learn(_try_out, folder, name)
    settle()


def _try_out(folder: str, name: str) -> None:
    scenario = SCENARIOS[name]
    with place(folder, "warden", *scenario.marks) as at:
        if scenario.before is not None:
            forked(scenario.before, at)
        scenario.body(at)
