"""Many supervisors compete for many keys, and are killed at random: one tree a key, one success.

The environment variable PROCTREE_STORM_SECONDS says how long the storms take in all; default 6.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration import durable_parts
from integration.crash_points import Forked, Zygote, children, settled
from integration.durable_parts import QUICK, recorded, succeeded
from proctree import durable
from proctree.process import proof

SECONDS = float(os.environ.get("PROCTREE_STORM_SECONDS", "6"))
KEYS = 100
COMPETITORS = 8
PAUSE = 0.04
"""Seconds between two kills, on average."""

TREE = r"""
exec 9>> "$1/alone/$2"
flock -n 9 || echo "$2 $PROCTREE_TREE" >> "$1/two"
[ ! -e "$1/family" ] || sleep 600 &
sleep 0.1
read failures < "$1/failures/$2"
if [ "${failures:-0}" -gt 0 ]; then
    echo $((failures - 1)) > "$1/failures/$2"
    exit 3
fi
echo "$PROCTREE_TREE" >> "$1/effects/$2"
"""
"""It fails so many times before it does its work, so that there is something to be started for as
long as the storm goes on. The lock is held by all of its processes."""


def run(place: str, key: str) -> int | None:
    outcome = durable.run(
        key,
        ["sh", "-c", TREE, "sh", place, key],
        store=f"{place}/store",
        containment="warden",
        kill=QUICK,
    )
    return outcome.returncode


def note(place: str, name: str, text: str) -> None:
    fd = os.open(f"{place}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def compete(place: str, seed: int) -> None:
    """Runs one key after the other, until it is killed."""
    chance = random.Random(seed)
    while True:
        key = f"key {chance.randrange(KEYS)}"
        try:
            note(place, "results", str(run(place, key)))
        except durable.StillRunning as error:
            # Allowed when a warden takes long to begin or to end; seen in the report.
            note(place, "busy", f"{key}: {error}")
        except BaseException:
            note(place, "errors", f"{key}: {traceback.format_exc()}")


def finish(place: str, keys: list[str]) -> list[str]:
    """Runs each of them until it has succeeded, and answers those that do not."""
    wrong = []
    for key in keys:
        for _ in range(int(SECONDS) * 2 + 20):
            if run(place, key) == 0:
                break
        else:
            wrong.append(f"{key} never succeeds")
    return wrong


def wardens_of(competitors: list[int]) -> list[int]:
    """The children of the living supervisors, and what the dead ones have left to us."""
    found = [pid for pid in children(os.getpid()) if pid not in competitors]
    return found + [child for pid in competitors for child in children(pid)]


def kill_warden(pid: int, parents: list[int]) -> bool:
    """Whether it still was one of ours. Its supervisor may reap it at any moment: a pidfd is of
    this process and no other, whoever has its number by then."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        stat = proof.read_stat(pid)
        if stat is None or stat.ppid not in parents or stat.name != "proctree-warden":
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)


def rage(place: str, seconds: float, seed: int, wardens: bool) -> dict[str, int]:
    """The storm; answers who was killed how often."""
    chance = random.Random(seed)
    killed = {"supervisors": 0, "wardens": 0}
    competitors = [Forked(compete, place, seed + index) for index in range(COMPETITORS)]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(chance.expovariate(1 / PAUSE))
        if wardens and chance.random() < 0.3:
            pids = [competitor.pid for competitor in competitors]
            if candidates := wardens_of(pids):
                killed["wardens"] += kill_warden(chance.choice(candidates), [os.getpid(), *pids])
            continue
        index = chance.randrange(COMPETITORS)
        os.kill(competitors[index].pid, signal.SIGKILL)
        competitors[index].wait()
        killed["supervisors"] += 1
        competitors[index] = Forked(compete, place, chance.randrange(1 << 30))
    for competitor in competitors:
        os.kill(competitor.pid, signal.SIGKILL)
        competitor.wait()
    return killed


def prepare(place: str, seconds: float, seed: int, wardens: bool) -> list[str]:
    chance = random.Random(seed)
    keys = [f"key {number}" for number in range(KEYS)]
    for name in ("alone", "effects", "failures"):
        os.mkdir(f"{place}/{name}")
    for key in keys:
        Path(place, "failures", key).write_text(f"{chance.randrange(1 + int(seconds))}\n")
    if wardens:
        Path(place, "family").touch()
    return keys


def check(place: str, keys: list[str], wardens: bool) -> list[str]:
    wrong = [f"two at once: {line}" for line in read(place, "two")]
    wrong += [f"raised: {line}" for line in read(place, "errors")]
    attempts = {
        attempts[0].request.key: attempts
        for folder in Path(place, "store").iterdir()
        if (attempts := recorded(str(folder), "attempts"))
    }
    for key in keys:
        how = [succeeded(attempt) for attempt in attempts.get(key, [])]
        if how.count(True) != 1 or not how[-1]:
            wrong.append(f"{key}: not the last attempt alone succeeded: {how}")
        effects = read(place, f"effects/{key}")
        if not effects or (len(effects) > 1 and not wardens):
            wrong.append(f"{key}: side effects {effects}")
    return wrong


def read(place: str, name: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return Path(place, name).read_text().splitlines()
    return []


def storm(place: str, seconds: float, seed: int, wardens: bool) -> dict[str, Any]:
    """In the zygote."""
    keys = prepare(place, seconds, seed, wardens)
    killed = rage(place, seconds, seed, wardens)
    during = Counter(read(place, "results"))
    finishing = [Forked(finish, place, keys[index::COMPETITORS]) for index in range(COMPETITORS)]
    wrong = [line for one in finishing for line in one.wait().value()]
    wrong += settled()
    return {
        "wrong": wrong + check(place, keys, wardens),
        "busy": read(place, "busy"),
        "results": dict(during),
        **killed,
    }


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "learning").mkdir()
    made = Zygote(__name__, XDG_RUNTIME_DIR=str(tmp_path / "runtime"))
    try:
        made.call(durable_parts.learn, str(tmp_path / "learning"))
        yield made
    finally:
        made.close()


@pytest.mark.timeout(300 + SECONDS * 4)
@pytest.mark.parametrize("wardens", [False, True], ids=["supervisors", "supervisors and wardens"])
def test_storm(zygote: Zygote, tmp_path: Path, wardens: bool) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    seconds = SECONDS / 2
    got = zygote.call(storm, str(tmp_path), seconds, seed, wardens)
    sys.stdout.write(f"seed {seed}: {got}\n")
    assert not got["wrong"], "\n".join([f"seed {seed}", *got["wrong"]])
    # That there was a storm at all: supervisors died, and others had results meanwhile.
    assert got["supervisors"] > seconds
    assert got["wardens"] > 0 or not wardens
    assert sum(got["results"].values()) > seconds
