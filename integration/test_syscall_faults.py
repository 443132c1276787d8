"""System calls that fail, one by one, in the warden and in the supervisor.

Whatever fails, one of two things holds. There is an error that names the step: an `OSError` with a
note, a `ContainmentUnavailable`, an `Outcome` that says so. Or the tree ends as it should have,
because the fault was harmless or tried again. In both cases nobody is left behind, nothing hangs,
the supervisor keeps no descriptor and no zombie, and its next tree runs as if nothing had been.

How it is done: a first run counts the system calls of a scenario. Then the scenario runs again for
each fault, with strace(1) to make the N-th invocation of a call fail, or that and all later ones.
A sample of the invocations is taken. The environment variable PROCTREE_FAULTS=all takes them all,
each with every errno, which takes more than an hour; PROCTREE_FAULTS=openat=EMFILE@3 (faults as a
failure names them, commas between) tries these and no others.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil
import pytest

from integration import strace
from integration.conftest import eventually, living
from integration.strace import Fault
from proctree import Stage, containment, protocol
from proctree.containment.warden import warden_path
from proctree.process import cgroups, proof
from proctree.protocol import Type

pytestmark = [
    pytest.mark.not_with(
        "sanitized", "the sanitizer makes system calls of its own, and may not fail"
    ),
    pytest.mark.not_with("valgrind", "valgrind makes system calls of its own, and may not fail"),
]

HERE = Path(__file__).parent
SCENARIO_SECONDS = 40.0
"""How long a scenario may take: several times what the slowest way of its ending well takes."""

ERRNOS = ("EMFILE", "ENOMEM", "EAGAIN", "EPERM", "EINTR", "ENOSYS")

# Why a call is not made to fail with an errno.
NO_FD = "makes no descriptor"
NO_MEMORY = "asks for no memory that could be short"
NO_WAIT = "does not wait, so that no signal can interrupt it"
AGAIN = "starts again by itself after a signal"
DEVICE = "only for devices that may keep one waiting"
NO_LIMIT = "has no limit that could be reached for a while"
NO_RIGHT = "needs no right"
OLD = "every kernel has it, and nothing runs in a sandbox that has not"
FOR_GOOD = "means that the process is hidden from us, and then it always is"

SANDBOX = {"EPERM", "ENOSYS"}
"""What a sandbox or an old kernel says from the first time on."""


class Call(NamedTuple):
    """What a call is made to fail with.

    Attributes:
        once: errnos that may come and go.
        lasting: errnos that may stay: a limit is reached, or somebody forbids the call.
        left_out: the others of `ERRNOS`, and why not.
        at: what strace shows of those invocations that can fail with `once` at all.
    """

    once: tuple[str, ...]
    lasting: tuple[str, ...]
    left_out: dict[str, str]
    at: str


def call(*once: str, lasting: tuple[str, ...] = (), at: str = "", **left_out: str) -> Call:
    return Call(once, lasting, left_out, at)


def simple(*once: str, lasting: tuple[str, ...] = (), at: str = "") -> Call:
    """A call that waits for nobody, needs no right, and is as old as Linux."""
    why = {
        "EMFILE": NO_FD,
        "ENOMEM": NO_MEMORY,
        "EAGAIN": NO_LIMIT,
        "EPERM": NO_RIGHT,
        "EINTR": NO_WAIT,
        "ENOSYS": OLD,
    }
    return Call(once, lasting, {k: why[k] for k in why if k not in once + lasting}, at)


BLOCKING_WAIT = call(
    "EINTR",
    at="^(?!.*WNOHANG)",
    EMFILE=NO_FD,
    ENOMEM=NO_MEMORY,
    EAGAIN=NO_LIMIT,
    EPERM=NO_RIGHT,
    ENOSYS=OLD,
)

# fork(2) and vfork(2) are not here because nobody calls them: the libc forks by clone, and starts
# threads and programs by clone3; the warden uses clone, and clone3 for a child in a cgroup.
CALLS = {
    "clone": call(
        "EAGAIN",
        "ENOMEM",
        lasting=("EAGAIN",),
        EMFILE=NO_FD,
        EPERM="only with namespaces",
        EINTR=AGAIN,
        ENOSYS=OLD,
    ),
    # Sandboxes forbid this one because they cannot see its arguments: some with ENOSYS, so that the
    # libc takes clone, and some with EPERM.
    "clone3": call(
        "EAGAIN", "ENOMEM", lasting=("EAGAIN", "EPERM", "ENOSYS"), EMFILE=NO_FD, EINTR=AGAIN
    ),
    "execve": call("EMFILE", "ENOMEM", "EAGAIN", lasting=("EPERM",), EINTR=NO_WAIT, ENOSYS=OLD),
    "setsid": simple("EPERM"),
    "prctl": simple(lasting=("EPERM",)),
    "unshare": simple("ENOMEM", lasting=("EPERM",)),
    "mount": simple("ENOMEM", lasting=("EPERM",)),
    "pidfd_open": simple("EMFILE", "ENOMEM", lasting=("EMFILE", "EPERM", "ENOSYS")),
    # EPERM once: one of them has become somebody else.
    "pidfd_send_signal": simple("EPERM", lasting=("EPERM", "ENOSYS")),
    "kill": simple("EPERM"),
    "openat": call(
        "EMFILE",
        "ENOMEM",
        lasting=("EMFILE",),
        EAGAIN=NO_LIMIT,
        EPERM=FOR_GOOD,
        EINTR=DEVICE,
        ENOSYS=OLD,
    ),
    "newfstatat": simple("ENOMEM"),
    "readlinkat": simple("ENOMEM"),
    "mkdir": simple("ENOMEM", lasting=("EPERM",)),
    "mkdirat": simple("ENOMEM", lasting=("EPERM",)),
    # Only what makes its text when it is read needs memory for it: pipes and sockets have theirs.
    "read": simple("ENOMEM", at="</(proc|sys)/"),
    "pread64": simple("ENOMEM"),
    "readv": call(
        "EINTR",
        EMFILE=NO_FD,
        ENOMEM=NO_MEMORY,
        EAGAIN="epoll has just said otherwise",
        EPERM=NO_RIGHT,
        ENOSYS=OLD,
    ),
    "getdents64": simple("ENOMEM"),
    "signalfd4": simple("EMFILE", "ENOMEM", lasting=("EMFILE",)),
    "mmap": simple("ENOMEM", "EAGAIN"),
    "socketpair": simple("EMFILE", "ENOMEM", lasting=("EMFILE", "EPERM")),
    "pipe2": simple("EMFILE", "ENOMEM", lasting=("EMFILE",)),
    # EPERM: F_SETPIPE_SZ.
    "fcntl": simple("EMFILE", "EPERM", lasting=("EMFILE", "EPERM")),
    "dup2": call("EMFILE", "EINTR", ENOMEM=NO_MEMORY, EAGAIN=NO_LIMIT, EPERM=NO_RIGHT, ENOSYS=OLD),
    "chdir": simple("ENOMEM", lasting=("EPERM",)),
    "close_range": call(
        "ENOMEM",
        lasting=("EPERM", "ENOSYS"),
        EMFILE="not without CLOSE_RANGE_UNSHARE",
        EAGAIN=NO_LIMIT,
        EINTR=NO_WAIT,
    ),
    "eventfd2": simple("EMFILE", "ENOMEM", lasting=("EMFILE",)),
    "epoll_create1": simple("EMFILE", "ENOMEM", lasting=("EMFILE",)),
    # ENOSPC: /proc/sys/fs/epoll/max_user_watches.
    "epoll_ctl": simple("ENOMEM", "ENOSPC", lasting=("ENOSPC",), at="EPOLL_CTL_ADD"),
    "epoll_wait": call(
        "EINTR", EMFILE=NO_FD, ENOMEM=NO_MEMORY, EAGAIN=NO_LIMIT, EPERM=NO_RIGHT, ENOSYS=OLD
    ),
    "poll": call("ENOMEM", "EINTR", EMFILE=NO_FD, EAGAIN=NO_LIMIT, EPERM=NO_RIGHT, ENOSYS=OLD),
    "waitid": BLOCKING_WAIT,
    "wait4": BLOCKING_WAIT,
    "sendto": call(
        "ENOMEM", "ENOBUFS", "EAGAIN", EMFILE=NO_FD, EPERM=NO_RIGHT, EINTR=NO_WAIT, ENOSYS=OLD
    ),
    "recvfrom": call("ENOMEM", "EAGAIN", EMFILE=NO_FD, EPERM=NO_RIGHT, EINTR=NO_WAIT, ENOSYS=OLD),
}


def test_no_errno_is_forgotten() -> None:
    for name, (once, lasting, left_out, _at) in CALLS.items():
        assert set(ERRNOS) <= {*once, *lasting, *left_out}, name
        assert not {*once, *lasting} & set(left_out), name


# -- where the calls are made to fail


class Place(NamedTuple):
    """Whose calls, in which scenario, and which of them."""

    where: str
    containment: str
    kind: str

    def __str__(self) -> str:
        return "-".join(self)


class Agent:
    """A supervisor below an init of its own in a PID namespace, so that the only processes that it
    can see are its own."""

    def __init__(self, *arguments: str, script: str = "faulty_supervisor.py") -> None:
        self._script = str(HERE / script)
        self._runtime = tempfile.mkdtemp(prefix="proctree-runtime-")
        # dash reaps what is re-parented to it, as pid 1 should.
        self._init = subprocess.Popen(
            ["unshare", *([] if os.geteuid() == 0 else ["-U", "-r"])]
            + ["-p", "-f", "-m", "--mount-proc", "--kill-child"]
            + ["sh", "-c", '"$@"; exit $?', "sh"]
            + [sys.executable, self._script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=HERE.parent,
            env={**os.environ, "XDG_RUNTIME_DIR": self._runtime},
        )
        self._buffer = b""
        self._leaf: str | None = None
        self.pid = 0
        self.others: set[int] = set()

    def tell(self, message: dict[str, Any]) -> None:
        assert self._init.stdin is not None
        self._init.stdin.write(json.dumps(message).encode() + b"\n")
        self._init.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Raises `TimeoutError` when nothing comes: a hang."""
        assert self._init.stdout is not None
        fd = self._init.stdout.fileno()
        deadline = time.monotonic() + SCENARIO_SECONDS
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(fd, 65536)
            if not data:
                raise EOFError("the supervisor died")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        self._leaf = answer.get("leaf")
        return answer

    def find(self) -> int:
        if not self.pid:
            for process in psutil.Process(self._init.pid).children(recursive=True):
                if process.cmdline()[1:2] == [self._script]:
                    self.pid = process.pid
                    break  # what comes later are its children
        return self.pid

    def numbers(self, inner: int) -> set[int]:
        """The number here of a process that has the number `inner` in the namespace."""
        found = set()
        for process in psutil.Process(self._init.pid).children(recursive=True):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # a warden that has just gone
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:"))
            if int(numbers.split()[-1]) == inner:
                found.add(process.pid)
        return found

    def thread(self, inner: int) -> int:
        """The number here of a thread that has the number `inner` in the namespace."""
        pid = self.find()
        for tid in os.listdir(f"/proc/{pid}/task"):
            status = Path(f"/proc/{pid}/task/{tid}/status").read_text()
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:"))
            if int(numbers.split()[-1]) == inner:
                return int(tid)
        raise LookupError(inner)

    def orphans(self) -> list[str]:
        """Who is there but the supervisor, its init, and the others that belong there."""
        found = []
        known = {self._init.pid, self.find(), *self.others}
        for process in psutil.Process(self._init.pid).children(recursive=True):
            stat = proof.read_stat(process.pid)
            if process.pid in known or stat is None or stat.dead:
                continue
            if stat.ppid == self._init.pid or stat.name == "strace":
                continue
            found.append(f"{stat.pid} {stat.name}")
        return found

    def close(self) -> None:
        assert self._init.stdin is not None
        assert self._init.stdout is not None
        # The namespace goes with its init, and unshare(1), which waits for that, after it.
        for process in psutil.Process(self._init.pid).children():
            process.kill()
        self._init.wait()
        self._init.stdin.close()
        self._init.stdout.close()
        shutil.rmtree(self._runtime)
        if self._leaf is not None:
            cgroups.end(self._leaf, 5.0)


Candidates = dict[str, list[list[int]]]

PLACES = {
    # The thread that does nearly everything, alone.
    "loop": ("tree", tuple(CALLS)),
    # All that is forked too. What follows is traced as well, so only what few others do.
    "child": (
        "tree",
        ("execve", "setsid", "prctl", "dup2", "close_range", "mkdir", "unshare", "mount"),
    ),
    # All threads, after the test has killed what holds the tree.
    "lost": ("lost", tuple(name for name in CALLS if name != "kill")),
    # The first tree of a process.
    "cold": ("tree", ("epoll_create1", "eventfd2", "clone3")),
    # strace does not count its own execve of the warden.
    "warden": ("tree", tuple(name for name in CALLS if name != "execve")),
}


def candidates(
    log: Path, calls: Sequence[str], table: Mapping[str, Call] = MappingProxyType(CALLS)
) -> Candidates:
    """Which invocations of a run without faults may fail, thread by thread."""
    threads = strace.invocations(log)
    found: Candidates = {}
    for name in calls:
        at = re.compile(table[name].at)
        for thread in threads:
            lines = thread.get(name, [])
            nths = [nth for nth, line in enumerate(lines, 1) if at.search(line)]
            if nths:
                found.setdefault(name, []).append(nths)
    return found


class Bench:
    """One place, and a supervisor for it."""

    def __init__(self, place: Place, actors: str, traced_warden: str, folder: Path) -> None:
        self.place = place
        self._arguments = actors, place.containment, place.kind
        self._traced_warden = traced_warden
        self._log = folder / "strace"
        self._agent: Agent | None = None

    def _supervisor(self) -> Agent:
        if self._agent is None:
            mode = ("cold",) if self.place.where == "cold" else ()
            self._agent = Agent(*self._arguments, *mode)
        return self._agent

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def _run(self, calls: str, fault: Fault | None) -> dict[str, Any]:
        agent = self._supervisor()
        where = self.place.where
        environment = {}
        if where == "warden":
            environment = {
                "PROCTREE_WARDEN": self._traced_warden,
                "TRACED_WARDEN": warden_path(),
                "TRACED_LOG": str(self._log),
                "TRACED_CALL": calls,
                "TRACED_FAULT": fault.expression if fault else "",
            }
        self._log.unlink(missing_ok=True)
        do, _ = PLACES[where]
        agent.tell({"do": do, "environment": environment, "pause": where != "warden"})
        if where == "warden":
            return agent.hear()
        task = agent.hear()["loop"]
        traced = agent.thread(task) if where == "loop" else agent.find()
        follow = where in ("child", "lost", "cold")
        with strace.attached(traced, self._log, calls, fault, follow=follow):
            agent.tell({})
            return agent.hear()

    def count(self) -> Candidates:
        """For each call, thread by thread, which of its invocations there are to choose from."""
        answer = self._run("all", None)
        assert "outcome" in answer, answer
        checked = self._check()
        assert checked["opened"] == checked["children"] == checked["files"] == [], checked
        assert not any("defect" in event for event in checked["events"]), checked
        if self.place.where == "cold":
            self.close()
        return candidates(self._log, PLACES[self.place.where][1])

    def _check(self) -> dict[str, Any]:
        agent = self._supervisor()
        agent.tell({})
        return agent.hear()

    def attempt(self, fault: Fault) -> tuple[list[str], bool]:
        """What is wrong with what came of it, and whether the call was made at all."""
        wrong, orphans, answer = [], [], {}
        try:
            answer = self._run(f"{fault.call}", fault)
            checked = self._check()
            orphans = self._supervisor().orphans()
            wrong = judge(fault, answer, checked, orphans)
        except TimeoutError:
            wrong = ["hangs"]
        except EOFError:
            wrong = ["the supervisor died"]
        if wrong or orphans or unknown(answer) or self.place.where == "cold":
            self.close()
        made = strace.injected(self._log)
        if not fault.onwards and not any(re.search(CALLS[fault.call].at, line) for line in made):
            return [], False  # this one could not have failed with that errno
        return wrong, bool(made)


# What has to be tried again, or done without: the tree ends as if nothing had been.
HARMLESS = {
    "poll": ("ENOMEM", "EINTR"),
    "waitid": ("EINTR",),
    "wait4": ("EINTR",),
    "epoll_wait": ("EINTR",),
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "readv": ("EINTR",),
    "recvfrom": ("EAGAIN",),
    "close_range": ("ENOMEM",),
    "kill": ("EPERM",),
}


def unknown(answer: dict[str, Any]) -> bool:
    """The outcome says that nobody knows whether something is left."""
    return "something may be left" in answer.get("outcome", {}).get("detail", "")


def judge(
    fault: Fault,
    answer: dict[str, Any],
    checked: dict[str, Any],
    orphans: list[str],
) -> list[str]:
    wrong = []
    said = json.dumps(answer) + "".join(f"\n    {event}" for event in checked["events"])
    if "error" in answer:
        error = answer["error"]
        if fault.error in HARMLESS.get(fault.call, ()):
            wrong.append(f"an error for what is harmless: {said}")
        note = any("proctree: " in note and "at step" in note for note in error["notes"])
        unavailable = error["type"] in ("ContainmentUnavailable", "WardenLost")
        if not unavailable and not (error["is_os_error"] and note):
            wrong.append(f"an error that names no step: {said}")
        if fault.error not in said and error["errno"] != getattr(errno, fault.error):
            wrong.append(f"an error that names another cause: {said}")
        survivors = []
    else:
        wrong += [f"{text}: {said}" for text in judge_outcome(fault, answer)]
        survivors = answer["outcome"]["survivors"]
    if fault.onwards and (survivors or unknown(answer)):
        return wrong  # it is said, and what lives is still held
    if len(survivors) != len(orphans):
        wrong.append(f"orphans {orphans}: {said}")
    for what in ("opened", "children", "files"):
        if checked[what]:
            wrong.append(f"leaves {what} {checked[what]}: {said}")
    if checked["next"]:
        wrong.append(f"the next tree: {checked['next']}: {said}")
    return wrong


def judge_outcome(fault: Fault, answer: dict[str, Any]) -> list[str]:
    outcome = answer["outcome"]
    wrong = []
    if not answer["ready"] and fault.error in HARMLESS.get(fault.call, ()):
        wrong.append("ended by what is harmless")
    if not answer["ready"]:
        # It never came so far: a callable says why on its standard error.
        if outcome["reason"] not in ("exited", "warden-lost") and not answer["lines"]:
            wrong.append("ended before it had begun, and does not say why")
        return wrong
    if outcome["reason"] not in ("killed", "warden-lost"):
        wrong.append("ended by what nobody asked for")
    if outcome["stdout"] != "out\n" or answer["lines"] != ["err"]:
        wrong.append("output is missing")
    if unknown(answer) and not fault.onwards:
        wrong.append("gives up after a single fault")
    # EPERM: one that may not be signalled is to be reported.
    if outcome["survivors"] and not fault.onwards and fault.error != "EPERM":
        wrong.append("survivors of a single fault")
    return wrong


EVERYTHING = os.environ.get("PROCTREE_FAULTS", "")

DENSE = {
    Place("loop", "warden", "command"),
    Place("loop", "group", "command"),
    Place("warden", "warden", "command"),
}
"""The other places share most of what they do with one of these."""


def spread(place: Place) -> tuple[float, ...]:
    """Which parts of a tree's life are sampled; a callable differs in how it starts."""
    if place in DENSE:
        return (0.0, 0.6) if place.containment == "group" else (0.0, 0.5, 1.0)
    if place.where == "cold":
        return 0.0, 1.0
    if place.where in ("child", "lost"):
        return 0.0, 0.5
    if place.kind == "callable":
        return (0.0,)
    return (0.25,) if place.containment == "cgroup" else (0.75,)


def wanted(bench: Bench) -> list[Fault]:
    if EVERYTHING not in ("", "all"):
        return [Fault.parse(text) for text in EVERYTHING.split(",")]
    found = bench.count()
    return [*single_faults(found, spread(bench.place)), *lasting_faults(found, bench.place)]


FEW = 5
"""Where two parts of a life are sampled, every invocation of a call that is not made more often."""


def positions(nths: list[int], parts: Sequence[float]) -> set[int]:
    if len(parts) > 1 and len(nths) <= FEW:
        return set(nths)
    return {nths[round(part * (len(nths) - 1))] for part in parts}


def single_faults(found: Candidates, parts: Sequence[float]) -> Iterator[Fault]:
    """In every thread, with the errnos in turn."""
    for name, threads in found.items():
        errors = CALLS[name].once
        if EVERYTHING == "all":
            for nth in sorted({nth for nths in threads for nth in nths}):
                yield from (Fault(name, error, nth) for error in errors)
        elif errors:
            picked = set().union(*(positions(nths, parts) for nths in threads))
            for turn, nth in enumerate(sorted(picked)):
                yield Fault(name, errors[turn % len(errors)], nth)


def lasting_faults(found: Candidates, place: Place) -> Iterator[Fault]:
    """From the first invocation on, and from the one in the middle on. That one costs the group
    backend, and after the loss of a warden any, all the time that it gives itself to look for what
    is left."""
    thorough = EVERYTHING == "all"
    if not thorough and place not in DENSE and place.where != "child":
        return
    slow = place.where == "lost" or place.containment == "group"
    for name, threads in found.items():
        longest = max(threads, key=len)
        errors = CALLS[name].lasting
        for error in errors[:1] if slow and not thorough else errors:
            if place.where != "lost" or error not in SANDBOX:
                yield Fault(name, error, 1, onwards=True)
            if error not in SANDBOX and len(longest) > 2 and (thorough or not slow):
                yield Fault(name, error, longest[len(longest) // 2], onwards=True)


@pytest.fixture(scope="session")
def traced_warden() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "traced-warden")
        source = str(HERE / "traced_warden.c")
        command = ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", path, source]
        subprocess.run(command, check=True)
        yield path


def places() -> Iterator[Place]:
    for name in containment.NAMES:
        for kind in ("command", "callable"):
            yield Place("loop", name, kind)
            yield Place("child", name, kind)
            # strace would be born into the namespace of the callable's warden.
            if name != "group" and (name, kind) != ("pidns", "callable"):
                yield Place("warden", name, kind)
        if name != "group":
            yield Place("lost", name, "command")
    yield Place("cold", "warden", "command")


@pytest.mark.timeout(0 if EVERYTHING == "all" else 120)
@pytest.mark.parametrize("place", [*places()], ids=str)
def test_every_call_may_fail(place: Place, actors: str, traced_warden: str, tmp_path: Path) -> None:
    bench = Bench(place, actors, traced_warden, tmp_path)
    with contextlib.closing(bench):
        try_each(place, wanted(bench), bench.attempt)


def try_each(
    place: object, faults: Iterable[Fault], attempt: Callable[[Fault], tuple[list[str], bool]]
) -> None:
    """`attempt` says what is wrong with what came of a fault, and whether the call was made."""
    failures, made, missed = [], 0, []
    for fault in faults:
        wrong, happened = attempt(fault)
        made += happened
        if not happened:
            missed.append(str(fault))
        failures += [f"{fault}: {text}" for text in wrong]
        if wrong:
            print(f"{place} {fault}: {wrong}", flush=True)
    print(f"{place}: {made} faults, {len(missed)} missed: {missed}")
    assert not failures, "\n".join(failures)
    assert made


# -- a warden alone


class Alone:
    """A warden of ours, with the family as its tree, under strace from just before its START on."""

    def __init__(self, actors: str, *options: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._reader, writer = os.pipe()
        self._socket = ours
        self._socket.settimeout(SCENARIO_SECONDS)
        null = os.open(os.devnull, os.O_RDWR)
        self.pid = os.posix_spawn(
            warden_path(),
            ["proctree-warden: alone", f"control={theirs.fileno()}", f"supervisor={os.getpid()}"]
            + [f"pass={writer}", *options, "--", actors, "family", str(writer)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
            + [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (theirs.fileno(), writer)],
        )
        for fd in (null, writer, theirs.detach()):
            os.close(fd)
        # The last that it makes before it waits for START.
        eventually(lambda: any("pidfd" in name for name in self._descriptors()), "it is prepared")

    def _descriptors(self) -> list[str]:
        found = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{self.pid}/fd/{fd}"))
        return found

    def ask(self, request: bytes, *answers: Type) -> list[protocol.Message]:
        """What it says up to one of the answers, or to its end."""
        heard = []
        with contextlib.suppress(ConnectionError):
            self._socket.send(request)
            while data := self._socket.recv(protocol.MAX_MESSAGE):
                heard.append(protocol.decode(data))
                if heard[-1].type in answers:
                    break
        return heard

    def live(self) -> None:
        """All that it can be asked for, up to the loss of its supervisor."""
        stages = (Stage(15, 0.05), Stage(9, 10.0))
        self.ask(protocol.encode_start(stages), Type.STARTED)
        ready, _, _ = select.select([self._reader], [], [], SCENARIO_SECONDS)
        assert ready, "the family neither begins nor ends"
        self.ask(protocol.encode_plain(Type.LIST, 1), Type.MEMBERS)
        self.ask(protocol.encode_plain(Type.FREEZE, 2), Type.SIGNALLED)
        self.ask(protocol.encode_plain(Type.THAW, 3), Type.SIGNALLED)
        self._socket.close()

    def end(self) -> int | None:
        """Its exit status; None when it does not end."""
        self._socket.close()
        os.close(self._reader)
        pidfd = os.pidfd_open(self.pid)
        try:
            if not select.select([pidfd], [], [], SCENARIO_SECONDS)[0]:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
        finally:
            os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("clone=EAGAIN@1", "fork"),
        ("clone=ENOMEM@1+", "fork"),
        ("setsid=EPERM@1", "setsid"),
        ("chdir=ENOMEM@1", "chdir"),
        ("prctl=EPERM@1", "pdeathsig"),
        ("fcntl=EPERM@1", "descriptors"),
        ("execve=EMFILE@1", "exec"),
        ("execve=EAGAIN@1", "exec"),
        ("execve=ENOMEM@1+", "exec"),
    ],
)
def test_what_comes_before_the_command_is_named(
    fault: str, step: str, actors: str, tmp_path: Path
) -> None:
    warden = Alone(actors, "cwd=/")
    injected = Fault.parse(fault)
    log = tmp_path / "strace"
    with strace.attached(warden.pid, log, injected.call, injected, follow=True):
        heard = warden.ask(protocol.encode_start((Stage(9, 10.0),)))
    number = getattr(errno, injected.error)
    assert [(message.type, message.values) for message in heard] == [
        (Type.EXEC_FAILED, (number, next(k for k, v in protocol.STEPS.items() if v == step)))
    ]
    assert warden.end() == 1
    assert not living()


@pytest.mark.timeout(0 if EVERYTHING == "all" else 120)
@pytest.mark.parametrize("mode", ["children", "scan"])
def test_the_orphan_plan_is_carried_out(mode: str, actors: str, tmp_path: Path) -> None:
    """Nobody but the warden can do it then, so here it must succeed and not just say that it did
    not: no single fault leaves anybody behind."""
    log = tmp_path / "strace"
    options = ("scan=1",) if mode == "scan" else ()
    calls = ("getdents64", "openat", "read") if mode == "scan" else tuple(CALLS)

    def attempt(traced: str, fault: Fault | None) -> list[str]:
        warden = Alone(actors, *options)
        wrong = []
        try:
            with strace.attached(warden.pid, log, traced, fault):
                warden.live()
                if warden.end() is None:
                    wrong.append(f"{fault}: the warden does not end")
        except TimeoutError:
            wrong.append(f"{fault}: the warden does not answer")
            warden.end()
        with contextlib.suppress(AssertionError):
            eventually(lambda: not living(), "the tree ends")
        wrong += [f"{fault}: leaves {left}" for left in living()]
        for process in psutil.Process().children(recursive=True):
            if wrong:
                process.kill()
        return wrong

    assert attempt("all", None) == []
    found = candidates(log, calls)
    failures = []
    for fault in single_faults(found, (0.0, 0.3, 0.6, 1.0) if mode == "children" else (0.5,)):
        failures += attempt(fault.call, fault)
    assert not failures, "\\n".join(failures)
