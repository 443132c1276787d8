"""System calls that fail, one by one, in a supervisor of durable runs.

Whatever fails, one of two things holds. There is an error that names the step and the errno:
`StoreUnusable`, `StillRunning`, `ContainmentUnavailable`, an `OSError` with a note. Or it works as
if nothing had been. In both cases a supervisor whose calls do not fail can end what is left, finds
the key's lock free then and its next call works, two trees of the key never run at once, and the
one that was harmed keeps no descriptor and no zombie.

Of a database they are SQLite's or libpq's calls too, and those of the threads that hold its lease.
There two trees never run at once either when the next call is made on another machine, the threads
end, and what was said to have finished is found as that by who comes next.

How it is done: as in test_syscall_faults.py, thread by thread; PROCTREE_FAULTS works as there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration import strace
from integration.conftest import eventually
from integration.databases import Server
from integration.strace import Fault
from integration.test_syscall_faults import (
    CALLS,
    EVERYTHING,
    Agent,
    Call,
    candidates,
    simple,
    try_each,
)

pytestmark = [
    pytest.mark.not_with(
        "sanitized", "the sanitizer makes system calls of its own, and may not fail"
    ),
    pytest.mark.not_with("valgrind", "valgrind makes system calls of its own, and may not fail"),
]

STORE = "/store"
"""What strace shows of paths below it."""

# What goes wrong with the files of a store.
FILES: dict[str, Call] = {
    "openat": simple("EMFILE", "ENOMEM", "EIO", lasting=("EMFILE",)),
    "open": simple("EMFILE", "ENOMEM", "EIO", lasting=("EMFILE",)),
    "read": simple("EIO", "ENOMEM", at=f"</proc/|</sys/|{STORE}"),
    "pread64": simple("EIO"),
    "preadv": simple("EIO"),
    "pwrite64": simple("ENOSPC", "EIO", lasting=("ENOSPC", "EROFS")),
    "mkdir": simple("ENOSPC", "EMFILE", lasting=("EROFS", "EPERM")),
    "mkdirat": simple("ENOSPC", lasting=("EROFS", "EPERM")),
    "rename": simple("EIO", "ENOSPC", lasting=("EROFS",)),
    "renameat": simple("EIO", "ENOSPC", lasting=("EROFS",)),
    "unlink": simple("EIO", lasting=("EROFS",)),
    "unlinkat": simple("EIO", lasting=("EROFS",)),
    "rmdir": simple("EIO", lasting=("EROFS",)),
    "fsync": simple("EIO", "ENOSPC", lasting=("EIO",)),
    "ftruncate": simple("EIO", lasting=("EIO",)),
    "fallocate": simple("ENOSPC", "EOPNOTSUPP", "EINTR", lasting=("ENOSPC", "EOPNOTSUPP")),
    "flock": simple("ENOLCK", "EINTR", lasting=("ENOLCK",)),
    "fstat": simple("ENOMEM"),
    "stat": simple("ENOMEM", "EIO"),
    "lstat": simple("ENOMEM", "EIO"),
    "newfstatat": simple("ENOMEM", "EIO"),
    "fchmod": simple("EIO", lasting=("EROFS",)),
    # The attempt's socket. EPERM: a security module.
    "socket": simple("EMFILE", "ENOMEM", lasting=("EMFILE", "EPERM")),
    "bind": simple("ENOSPC", "ENOMEM", lasting=("EPERM", "EROFS")),
    "connect": simple("EAGAIN", "ECONNREFUSED", "EINTR", lasting=("EPERM", "ECONNREFUSED")),
    "getsockopt": simple("ENOMEM", lasting=("EPERM",)),
    "inotify_init1": simple("EMFILE", "ENOMEM", lasting=("EMFILE",)),
    "inotify_add_watch": simple("ENOSPC", "ENOMEM", lasting=("ENOSPC",)),
    "memfd_create": simple("EMFILE", "ENOMEM", lasting=("EMFILE",)),
}

DATABASE: dict[str, Call] = {
    # EAGAIN: somebody else has the lock. ENOLCK: nobody can have one.
    "fcntl": simple(
        "EAGAIN", "ENOLCK", "EIO", lasting=("ENOLCK", "EIO"), at="F_SETLK.*F_(RD|WR)LCK"
    ),
    "pread64": simple("EIO", lasting=("EIO",)),
    "fdatasync": simple("EIO", "ENOSPC", lasting=("EIO",)),
    "access": simple("EIO", "ENOMEM", lasting=("EIO",)),
    "fchown": simple("EPERM", lasting=("EPERM",)),
}
"""What else can go wrong with those of SQLite."""

SERVER: dict[str, Call] = {
    # libpq's. What cannot be sent it learns by reading, and from a server that lives, and has got
    # nothing, nothing comes: a failure here and not there is one that the kernel does not make.
    "sendto": simple("EAGAIN", "EINTR"),
    "recvfrom": simple("ENOMEM", "ECONNRESET", "EAGAIN", "EINTR", lasting=("ECONNRESET",)),
    "poll": simple("ENOMEM", "EINTR", lasting=("ENOMEM",)),
}
"""What else can go wrong on the way to a server."""

TABLES = {
    "directory": {**CALLS, **FILES},
    "database": {**CALLS, **FILES, **DATABASE},
    "server": {**CALLS, **FILES, **SERVER},
}

LEFT_OUT = {
    "main": {
        "mmap": "memory of the interpreter's: a MemoryError, wherever it may be",
        "readv": "how it is told what to do",
    },
    "loop": {},
    "workers": {},
    "tender": {"mmap": "memory of the interpreter's"},
    "lease": {"mmap": "memory of the interpreter's"},
}
"""Why a call of a thread is not made to fail."""


class Place(NamedTuple):
    """What is done, which thread's calls fail, and where the records are."""

    what: str
    thread: str
    store: str = "directory"

    @property
    def has_lease(self) -> bool:
        return self.store != "directory"

    @property
    def lease(self) -> float:
        """Of a database, seconds: it is waited for where a tree is left, and a third of it where it
        is to be renewed."""
        return 1.5 if self.what == "keep" else 4.0

    def __str__(self) -> str:
        return "-".join(self)


PLACES = [
    Place(what, thread)
    for what in ("start", "reconnect", "attach", "result", "cancel", "comeback")
    for thread in ("main", "loop", "workers")
    # It does nothing then.
    if (what, thread) not in {("result", "loop"), ("result", "workers"), ("cancel", "workers")}
]
PLACES = [place._replace(store=store) for store in TABLES for place in PLACES]
PLACES += [
    Place(what, thread, store)
    for store in ("database", "server")
    for what, thread in (
        ("keep", "lease"),
        ("keep", "tender"),
        ("succeed", "tender"),
        ("watch", "tender"),
    )
]

SAMPLES = {
    Place("start", "main", "database"): (
        *("clone3=EAGAIN@1", "clone3=EAGAIN@2", "clone3=EAGAIN@3", "newfstatat=ENOMEM@1"),
        *("fdatasync=EIO@2", "fcntl=EAGAIN@1", "pwrite64=ENOSPC@9"),
    ),
    Place("succeed", "tender", "database"): ("openat=EMFILE@1", "fcntl=ENOLCK@1"),
    Place("result", "main", "server"): ("epoll_create1=EMFILE@1", "recvfrom=ECONNRESET@5"),
}
"""What is tried of databases without PROCTREE_FAULTS: each fault waits for several transactions."""


def places(*stores: str) -> list[Place]:
    found = [place for place in PLACES if place.store in stores]
    if EVERYTHING:
        return found
    return [place for place in found if place.store == "directory" or place in SAMPLES]


class Bench:
    def __init__(self, place: Place, server: Server | None = None) -> None:
        self._place = place
        self._server = server
        self._table = TABLES[place.store]
        self._folder = tempfile.mkdtemp(prefix="proctree-faults-")
        self._log = Path(self._folder, "strace")
        self._agent: Agent | None = None

    def close(self) -> None:
        self._drop()
        shutil.rmtree(self._folder)

    def _drop(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _supervisor(self) -> Agent:
        if self._agent is None:
            place = self._place
            arguments = "warden", place.store, str(place.lease)
            self._agent = Agent(*arguments, script="faulty_durable.py")
            # Its first run makes what is made once.
            for what in ("start", self._place.what):
                answer = self._live(self._agent, what, None, None)
                assert not wrong_in(what, answer), answer
        return self._agent

    def _live(
        self, agent: Agent, what: str, calls: str | None, fault: Fault | None
    ) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            there = self._place.has_lease and fault is not None and fault.nth % 2 == 0
            settle = "settle there" if there else "settle"
            lasting = fault is not None and fault.onwards
            url = self._server.new_url() if self._server is not None else ""
            task = {"do": what, "folder": folder, "url": url}
            agent.tell({**task, "settle": settle, "lasting": lasting})
            told = agent.hear()
            agent.others = agent.numbers(told["unharmed"])
            if calls is None:
                agent.tell({})
                answer = agent.hear()
            else:
                self._log.unlink(missing_ok=True)
                with strace.attached(self._threads(agent, told), self._log, calls, fault):
                    agent.tell({})
                    answer = agent.hear()
            agent.tell({})
            return {"before": told.get("tree"), **answer, **agent.hear()}

    def _threads(self, agent: Agent, told: dict[str, Any]) -> list[int]:
        if self._place.thread == "main":
            return [agent.find()]
        return [agent.thread(number) for number in told["threads"][self._place.thread]]

    def faults(self) -> Iterator[Fault]:
        answer = self._live(self._supervisor(), self._place.what, "all", None)
        assert not wrong_in(self._place.what, answer), answer
        calls = [name for name in self._table if name not in LEFT_OUT[self._place.thread]]
        for name, (nths, *_) in candidates(self._log, calls, self._table).items():
            yield from chosen(name, nths, self._table[name])

    def attempt(self, fault: Fault) -> tuple[list[str], bool]:
        """What is wrong with what came of it, and whether the call was made at all."""
        wrong: list[str] = []
        answer: dict[str, Any] = {}
        try:
            agent = self._supervisor()
            answer = self._live(agent, self._place.what, fault.call, fault)
            wrong = judge(fault, self._place, answer)
            if left := lasting_orphans(agent):
                wrong.append(f"orphans {left}")
        except TimeoutError:
            wrong = ["hangs"]
        except EOFError:
            wrong = ["the supervisor died"]
        if wrong:
            self._drop()
            wrong.append(json.dumps(answer))
        made = strace.injected(self._log)
        if not fault.onwards and not any(
            re.search(self._table[fault.call].at, line) for line in made
        ):
            return [], False  # this one could not have failed with that errno
        return wrong, bool(made)


def lasting_orphans(agent: Agent) -> list[str]:
    """A warden is there for a moment when everybody knows that its tree has ended."""
    try:
        eventually(lambda: not agent.orphans(), "nobody is left")
    except AssertionError:
        return agent.orphans()
    return []


# -- what is tried


def chosen(name: str, nths: list[int], call: Call) -> Iterator[Fault]:
    """All of them, or a sample: three invocations of each call, and one errno that lasts."""
    once, lasting, _left_out, _at = call
    if EVERYTHING == "all":
        for nth in nths:
            yield from (Fault(name, error, nth) for error in once)
        yield from (Fault(name, error, 1, onwards=True) for error in lasting)
        yield from (Fault(name, error, nths[len(nths) // 2], onwards=True) for error in lasting)
        return
    if once:
        for turn, nth in enumerate(sorted({nths[0], nths[len(nths) // 2], nths[-1]})):
            yield Fault(name, once[turn % len(once)], nth)
    if lasting:
        yield Fault(name, lasting[0], 1, onwards=True)


# -- what must hold

STEP = re.compile(r"at step '|^step '|^store \S+: cannot [a-z ]+: ")
LIBPQ = re.compile(r"cannot [a-z ]+: .*(server|connection|SSL|SYSCALL)", re.DOTALL)
DEFECT = re.compile(r"defect|durable\.callback_failed")
ENDED_BY_ITSELF = {"start", "result", "keep", "succeed"}
REASONS = {**dict.fromkeys(ENDED_BY_ITSELF, "exited"), "attach": "detached"}


def wrong_in(what: str, answer: dict[str, Any]) -> list[str]:
    """What is wrong with it if everything is to work."""
    wrong = [*answer.get("wrong", ())]
    wrong += [
        f"leaves {name} {answer[name]}"
        for name in ("opened", "children", "files", "threads")
        if answer.get(name)
    ]
    if "error" in answer:
        return wrong
    outcome = answer["outcome"]
    if outcome is None:
        return [*wrong, "it says that nothing ran"]
    # Where a record could not be read, another attempt is made.
    again = any("durable.unreadable" in event for event in answer["events"])
    if outcome["reason"] != REASONS.get(what, "killed") and not again:
        wrong.append(f"ended by what nobody asked for: {outcome['reason']}")
    if what in ENDED_BY_ITSELF and outcome["returncode"] != 0:
        wrong.append(f"exit status {outcome['returncode']}")
    unrecorded = any("durable.unrecorded" in event for event in answer["events"])
    if outcome["returncode"] == 0 and answer["following"] != outcome["tree_id"] and not unrecorded:
        wrong.append("its result was lost")
    if answer["before"] not in (None, outcome["tree_id"]) and not again:
        wrong.append("another tree was started")
    if what not in ("cancel", "attach") and not unread(answer) and outcome["stdout"] != "out\n":
        wrong.append(f"output is missing: {outcome['stdout']!r}")
    return wrong


def unread(answer: dict[str, Any]) -> bool:
    """It was said that the output could not be read."""
    return any("durable.unreadable_output" in event for event in answer["events"])


def lease_over(fault: Fault, place: Place, answer: dict[str, Any]) -> bool:
    """Nobody could renew it: for good, or in time on a machine that has much else to do."""
    outcome = answer.get("outcome")
    lost = outcome is not None and outcome["reason"] == "supervisor-lost"
    return lost and (fault.onwards or answer["seconds"] > place.lease / 2)


def judge(fault: Fault, place: Place, answer: dict[str, Any]) -> list[str]:
    what = place.what
    wrong = wrong_in(what, answer)
    if place.has_lease and lease_over(fault, place, answer):
        wrong = [each for each in wrong if not each.startswith(("ended by what", "exit status"))]
    if what == "comeback" and fault.onwards:
        # Where it never can, it says so, and the tree is left to its lease.
        cannot = any("durable.disconnected" in event for event in answer["events"])
        wrong = [each for each in wrong if not (cannot and each.endswith(": detached"))]
    wrong += [f"a defect: {event}" for event in answer["events"] if DEFECT.search(event)]
    if "error" not in answer:
        return wrong
    error = answer["error"]
    said = json.dumps(error)
    note = any("proctree: " in note and "at step" in note for note in error["notes"])
    named = {
        "StoreUnusable": STEP.search(error["text"]) is not None,
        "ContainmentUnavailable": True,
        "WardenLost": True,
        "StillRunning": True,
    }
    if not named.get(error["type"], error["is_os_error"] and note):
        wrong.append(f"an error that names no step: {said}")
    named_errno = fault.error in said or error["errno"] == getattr(errno, fault.error)
    # SQLite hands no errno on: it has result codes of its own.
    # And pthread_create(3) knows none but EAGAIN.
    named_errno |= fault.call == "clone3" and "EAGAIN" in said
    named_errno |= place.store == "database" and "SQLITE_" in error["text"]
    # Nor does libpq: it says what the errno means, or what it makes of it.
    named_errno |= place.store == "server" and LIBPQ.search(error["text"]) is not None
    # Out of patience it cannot know why nobody has answered.
    if not named_errno and error["type"] != "StillRunning":
        wrong.append(f"an error that names another cause: {said}")
    return wrong


def try_all(place: Place, server: Server | None = None) -> None:
    with contextlib.closing(Bench(place, server)) as bench:
        named = EVERYTHING.split(",") if EVERYTHING else SAMPLES.get(place, ("all",))
        faults = bench.faults() if "all" in named else map(Fault.parse, named)
        try_each(place, [*faults], bench.attempt)


@pytest.mark.timeout(0 if EVERYTHING else 120)
@pytest.mark.parametrize("place", places("directory", "database"), ids=str)
def test_every_call_of_a_durable_run_may_fail(place: Place) -> None:
    try_all(place)


@pytest.mark.timeout(0 if EVERYTHING else 120)
@pytest.mark.parametrize("place", places("server"), ids=str)
def test_every_call_on_the_way_to_a_server_may_fail(place: Place, server: Server | None) -> None:
    if server is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    try_all(place, server)
