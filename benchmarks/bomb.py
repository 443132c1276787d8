"""bomb: from the kill of a fork bomb until it is proved that nothing of it is left.

Every process of it forks without end, and nothing but RLIMIT_NPROC bounds it: when the clock starts
there are as many as may be, and wherever one is killed there is room for the next. The slowest of
all rounds counts: a bomb that ends only as a rule is not ended.

All of it happens in a PID namespace, with an init that ends everything should this benchmark be
interrupted. RLIMIT_NPROC does not bind root: where we are root the bomb belongs to another user,
elsewhere everything is in a user namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import proctree
from benchmarks.native import program, scratch
from benchmarks.table import Row, below, skipped
from benchmarks.timing import Effort
from proctree.containment import choose
from proctree.errors import ContainmentUnavailable
from proctree.process import cgroups

LIMIT = 500
SECONDS = 2.0
CONTAINMENTS = ("warden", "cgroup", "pidns")
"""Without `group`, which promises nothing here."""

PATIENCE = 60.0


def measure(effort: Effort) -> Iterator[Row]:
    what = f"end a fork bomb of {LIMIT}, {{}} (slowest)"
    bomb = program("bomb")
    scratch().chmod(0o755)  # another user is to execute it
    for name in CONTAINMENTS:
        try:
            choose(name)
            slowest = max(_in_namespace(bomb, name, effort.rounds(15)))
        except (ContainmentUnavailable, _Unavailable) as error:
            yield skipped(what.format(name), str(error))
        else:
            yield below(what.format(name), slowest, SECONDS)


class _Unavailable(Exception):
    """There is no PID namespace to be had; it says why."""


def _in_namespace(bomb: str, name: str, rounds: int) -> list[float]:
    namespaces = ["unshare", *([] if os.geteuid() == 0 else ["-U", "-r"]), "-p", "-f", "-m"]
    namespaces += ["--mount-proc", "--kill-child"]
    trial = subprocess.run([*namespaces, "true"], capture_output=True, text=True)
    if trial.returncode != 0:
        raise _Unavailable(trial.stderr.strip())
    # Ids that nobody is likely to have, since RLIMIT_NPROC counts all processes of a user.
    uid = 60000 + os.getpid() % 5000 if os.geteuid() == 0 else 0
    command = [sys.executable, "-m", "benchmarks.bomb", bomb, name, str(uid), str(rounds)]
    root = Path(__file__).parent.parent
    with _cgroup():
        done = subprocess.run([*namespaces, *command], cwd=root, stdout=subprocess.PIPE, check=True)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


@contextlib.contextmanager
def _cgroup() -> Iterator[None]:
    """A cgroup of our own around it, where there is one: with it the last leaf goes too."""
    try:
        home = cgroups.find_home(cgroups.own_path()).path
        path = f"{home.rstrip('/')}/proctree-bomb-{os.getpid()}"
        os.mkdir(path)
    except (ContainmentUnavailable, OSError):
        yield
        return
    try:
        _move_to(path)
        yield
    finally:
        _move_to(home)
        cgroups.end(path, PATIENCE)


def _move_to(cgroup: str) -> None:
    Path(cgroup, "cgroup.procs").write_text("0")


# -- inside


def _processes() -> int:
    return sum(name.isdigit() for name in os.listdir("/proc"))


def _until(count: int, *, at_least: bool) -> None:
    deadline = time.monotonic() + PATIENCE
    while (_processes() < count) if at_least else (_processes() > count):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{_processes()} processes, and not {count}")
        time.sleep(0.01)  # nothing reports it


def _end_one(bomb: str, name: str, attributes: proctree.SpawnAttributes) -> float:
    before = _processes()
    handle = proctree.WatchedSubprocess.start(
        [bomb],
        containment=name,
        attributes=attributes,
        stdin=proctree.DEVNULL,
        stdout=proctree.DEVNULL,
        stderr=proctree.DEVNULL,
    )
    _until(LIMIT, at_least=True)
    policy = proctree.KillPolicy((proctree.Stage(9, PATIENCE),))
    began = time.perf_counter()
    handle.kill(policy)
    outcome = handle.wait()
    seconds = time.perf_counter() - began
    assert outcome is not None
    assert not outcome.survivors
    assert _processes() == before
    return seconds


def _main(bomb: str, name: str, uid: int, rounds: int) -> None:
    user = {"uid": uid, "gid": uid, "groups": ()} if uid else {}
    attributes = proctree.SpawnAttributes(rlimits={"nproc": LIMIT}, **user)
    print(json.dumps([_end_one(bomb, name, attributes) for _ in range(rounds)]))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
