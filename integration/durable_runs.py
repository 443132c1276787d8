"""Durable runs that tests supervise, here and from other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from integration.conftest import DEADLINE, eventually
from proctree import KillPolicy
from proctree.durable import FileStore, Run

SLEEPER = ["sleep", "1000"]


class Job:
    """A command that says `one`, waits to be let go, says `two`, and leaves a line behind each time
    that it has run to its end. It fails if another one of its kind runs at the same time."""

    def __init__(self, folder: Path, status: int = 0) -> None:
        self.gate, self.effect, self.twice = folder / "gate", folder / "effect", folder / "twice"
        os.mkfifo(self.gate)
        alone = f"exec 9> {folder}/lock; flock -n 9 || {{ echo twice > {self.twice}; exit 9; }}"
        text = f"echo one; read x < {self.gate}; echo two; echo ran >> {self.effect}; exit {status}"
        self.command = ["sh", "-c", f"{alone}; {text}"]

    def let_go(self) -> None:
        """Waits until it is there."""
        with open(self.gate, "w", encoding="ascii") as file:
            file.write("go\n")

    @property
    def ran(self) -> int:
        assert not self.twice.exists(), "two at once"
        return len(self.effect.read_text().splitlines()) if self.effect.exists() else 0


SUPERVISOR = """
import json, os, sys
from proctree import durable, KillPolicy, Lines, Stage
from proctree.durable import FileStore

def say(**fields):
    os.write(1, (json.dumps(fields) + "\\n").encode())

path, url, lease, command, options = json.loads(sys.argv[1])
store = FileStore(path)
if url is not None:
    from proctree.durable.sql import SqlStore
    store = SqlStore(url, lease=lease, local=store)
elif lease is not None:
    options["lease"] = lease
policy = options.pop("policy", None)
if policy is not None:
    options["kill"] = KillPolicy(tuple(Stage(*stage) for stage in policy))
run = durable.start(
    "key", command, store=store, logs=Lines(lambda line: say(line=line)), **options
)
say(pid=run.pid, owned=run.owned, reconnected=run.reconnected, number=run.number)
for command in sys.stdin:
    exec(command)
"""

SAY_THE_END = "outcome = run.wait(); say(reason=outcome.reason, returncode=outcome.returncode)"


class Supervisor:
    """Another process that supervises the run `key`.

    Args:
        lease: seconds; of the database's `url`, if its records are in one, else of the run.
        options: for `durable.start`; `policy`: pairs of signal and seconds, for its `kill`.
    """

    def __init__(
        self,
        local: FileStore,
        command: list[str],
        *,
        url: str | None = None,
        lease: float | None = None,
        **options: Any,
    ) -> None:
        ask = json.dumps([local.path, url, lease, command, options])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, ask],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.said: dict[str, Any] = {}

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, "the supervisor has ended"
        said: dict[str, Any] = json.loads(text)
        if "line" in said:
            self.lines.append(said["line"])
        else:
            self.said.update(said)
        return said

    def hear_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.hear()

    def hear_of(self, name: str) -> Any:
        self.hear_until(lambda: name in self.said)
        return self.said[name]

    def started(self) -> Supervisor:
        self.hear_of("pid")
        return self

    def tell(self, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def end(run: Run) -> None:
    run.kill(KillPolicy.now())
    assert run.wait(DEADLINE) is not None


def disconnect(run: Run) -> None:
    """As if we had not read for too long: a warden closes the connection of one that talks nonsense
    as well. Returns when we have come back."""
    assert run._live is not None
    contained = run._live.contained
    before = contained._control
    assert before is not None
    before.send(b"nonsense")
    eventually(lambda: contained._control not in (before, None), "it has come back")
