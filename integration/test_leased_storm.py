"""Many supervisors on two machines compete for many keys in one database; they are killed, and
stopped for longer than a lease: one tree a key, one success on record.

The environment variable PROCTREE_STORM_SECONDS says how long the storms take in all; default 8.
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

from integration import leased_parts
from integration.crash_points import Forked, Zygote, settled
from integration.durable_parts import recorded
from integration.leased_parts import QUICK
from integration.test_durable_storm import note, read
from proctree import durable
from proctree.durable import FileStore
from proctree.durable.recording import Cause
from proctree.durable.sql import SqlStore
from proctree.durable.store import Attempt

SECONDS = float(os.environ.get("PROCTREE_STORM_SECONDS", "8"))
KEYS = 20
MACHINES = ("here", "there")
COMPETITORS = 6 if SECONDS > 30 else 3
"""On each machine."""
LEASE = 1.5
PAUSE = 0.12
"""Seconds between two blows, on average."""
STOPPED_MAX = 4
TRIES = 20
"""When it is calm, how often a key may fail that was not killed."""

TREE = r"""
exec 9>> "$1/alone/$2"
flock -n 9 || echo "$2 $PROCTREE_TREE" >> "$1/two"
sleep "$3"
read failures < "$1/failures/$2"
if [ "${failures:-0}" -gt 0 ] && [ ! -e "$1/calm" ]; then
    echo $((failures - 1)) > "$1/failures/$2"
    exit 3
fi
echo "$PROCTREE_TREE" >> "$1/effects/$2"
"""
"""As in test_durable_storm.py; when it is calm, it does not fail any more. Some take longer than a
lease, and can be caught by its end."""


def name_of(number: int) -> str:
    return f"key {number}"


def store(place: str, url: str, machine: str) -> SqlStore:
    return SqlStore(url, lease=LEASE, local=FileStore(f"{place}/{machine}"))


def run(place: str, url: str, machine: str, number: int) -> int | None:
    key, seconds = name_of(number), "2" if number % 5 == 0 else "0.2"
    outcome = durable.run(
        key,
        ["sh", "-c", TREE, "sh", place, key, seconds],
        store=store(place, url, machine),
        containment="warden",
        kill=QUICK,
    )
    return outcome.returncode


def compete(place: str, url: str, machine: str, seed: int) -> None:
    """Runs one key after the other, until it is killed."""
    chance = random.Random(seed)
    while True:
        number = chance.randrange(KEYS)
        try:
            note(place, "results", str(run(place, url, machine, number)))
        except (durable.StillRunning, durable.StoreUnusable) as error:
            # Allowed where others are stopped with the key, or the database, in their hands.
            note(place, "busy", f"{name_of(number)}: {error}")
        except BaseException:
            note(place, "errors", f"{name_of(number)}: {traceback.format_exc()}")


def is_recorded(place: str, url: str, machine: str, number: int) -> bool:
    """On a busy machine the lease may be over before that is done: then it is the next one's."""
    return store(place, url, machine).attempts(name_of(number))[-1].exit is not None


def finish(place: str, url: str, machine: str, numbers: list[int]) -> list[str]:
    """Runs each of them until it has succeeded, and answers those that do not."""
    wrong = []
    for number in numbers:
        for _ in range(TRIES):
            # A busy machine may answer no connection in time: it is asked again.
            with contextlib.suppress(durable.StoreUnusable):
                if run(place, url, machine, number) == 0 and is_recorded(
                    place, url, machine, number
                ):
                    break
        else:
            wrong.append(f"{name_of(number)} never succeeds")
    return wrong


class Storm:
    """Who competes, and who of them is stopped until when."""

    def __init__(self, place: str, url: str, seed: int) -> None:
        self._place, self._url = place, url
        self._chance = random.Random(seed)
        self._stopped: dict[int, float] = {}
        self.blows: Counter[str] = Counter()
        self._competitors = [self._start(machine) for machine in MACHINES * COMPETITORS]

    def _start(self, machine: str) -> tuple[str, Forked]:
        seed = self._chance.randrange(1 << 30)
        return machine, Forked(compete, self._place, self._url, machine, seed)

    def rage(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self._chance.expovariate(1 / PAUSE))
            self._wake()
            index = self._chance.randrange(len(self._competitors))
            if self._chance.random() < 0.4 and len(self._stopped) < STOPPED_MAX:
                self._stop(index)
            else:
                self._kill(index)
        while self._competitors:
            _, competitor = self._competitors.pop()
            os.kill(competitor.pid, signal.SIGKILL)
            competitor.wait()

    def _wake(self) -> None:
        now = time.monotonic()
        for index in [index for index, until in self._stopped.items() if until <= now]:
            del self._stopped[index]
            os.kill(self._competitors[index][1].pid, signal.SIGCONT)
            self.blows["woken"] += 1

    def _stop(self, index: int) -> None:
        if index not in self._stopped:
            os.kill(self._competitors[index][1].pid, signal.SIGSTOP)
            self._stopped[index] = time.monotonic() + LEASE * self._chance.uniform(1.1, 1.6)

    def _kill(self, index: int) -> None:
        if index in self._stopped:
            return  # it shall wake up, and find out
        machine, competitor = self._competitors[index]
        os.kill(competitor.pid, signal.SIGKILL)
        competitor.wait()
        self.blows["killed"] += 1
        self._competitors[index] = self._start(machine)


def prepare(place: str, seconds: float, seed: int) -> None:
    chance = random.Random(seed)
    for name in ("alone", "effects", "failures"):
        os.mkdir(f"{place}/{name}")
    for number in range(KEYS):
        failures = chance.randrange(1 + int(seconds * 2))
        Path(place, "failures", name_of(number)).write_text(f"{failures}\n")


def check_key(place: str, key: str, attempts: list[Attempt], ended: dict[str, Any]) -> list[str]:
    """One success on record, the last one, whatever those said who woke up behind their lease; and
    what is on record is what the warden says."""
    wrong = []
    how = [attempt.exit and (attempt.exit.status, attempt.exit.cause) for attempt in attempts]
    if how.count((0, Cause.ITSELF)) != 1 or how[-1] != (0, Cause.ITSELF):
        wrong.append(f"{key}: not the last attempt alone succeeded: {how}")
    for attempt in attempts:
        assert attempt.request is not None
        if attempt.exit is not None and ended.get(attempt.request.tree_id) != attempt.exit:
            wrong.append(f"{key}: attempt {attempt.number} has another end here: {attempt}")
    # One that was ended may have been at its last line.
    lost = sum(one is None or one[1] is not Cause.ITSELF for one in how)
    effects = read(place, f"effects/{key}")
    if not 1 <= len(effects) <= 1 + lost:
        wrong.append(f"{key}: side effects {effects}, attempts {how}")
    return wrong


def check(place: str, url: str) -> list[str]:
    wrong = [f"two at once: {line}" for line in read(place, "two")]
    wrong += [f"raised: {line}" for line in read(place, "errors")]
    ended = {
        attempt.request.tree_id: attempt.exit
        for machine in MACHINES
        for attempt in recorded(f"{place}/{machine}")
    }
    records = store(place, url, MACHINES[0])
    for number in range(KEYS):
        key = name_of(number)
        wrong += check_key(place, key, records.attempts(key), ended)
        if records.claimed(key):
            wrong.append(f"{key} is held")
    return wrong


def storm(place: str, url: str, seconds: float, seed: int) -> dict[str, Any]:
    """In the zygote."""
    prepare(place, seconds, seed)
    raging = Storm(place, url, seed)
    raging.rage(seconds)
    during = Counter(read(place, "results"))
    Path(place, "calm").touch()
    finishing = [
        Forked(finish, place, url, MACHINES[index % 2], list(range(index, KEYS, COMPETITORS)))
        for index in range(COMPETITORS)
    ]
    wrong = [line for one in finishing for line in one.wait().value()]
    wrong += settled()
    wrong += check(place, url)
    attempts = [a for n in range(KEYS) for a in store(place, url, "here").attempts(name_of(n))]
    return {
        "wrong": wrong,
        "busy": read(place, "busy"),
        "results": dict(during),
        "attempts": len(attempts),
        "lost": sum(attempt.exit is None for attempt in attempts),
        **raging.blows,
    }


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "learning").mkdir()
    made = Zygote(__name__, "psycopg", XDG_RUNTIME_DIR=str(tmp_path / "runtime"))
    try:
        made.call(leased_parts.learn, str(tmp_path / "learning"))
        yield made
    finally:
        made.close()


@pytest.mark.timeout(300 + SECONDS * 4)
def test_storm(zygote: Zygote, url: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    seconds = SECONDS / 2
    got = zygote.call(storm, str(tmp_path), url, seconds, seed)
    sys.stdout.write(f"seed {seed}: {got}\n")
    assert not got["wrong"], "\n".join([f"seed {seed}", *got["wrong"]])
    # That there was a storm at all: supervisors died or woke up, and others had results meanwhile.
    assert got["killed"] > seconds
    assert got["woken"] > 0
    assert sum(got["results"].values()) > 0
