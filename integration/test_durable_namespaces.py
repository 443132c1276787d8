"""Durable runs of which the tree is in one namespace and who comes for it in another: as on a host
and in its containers, with one directory for the records."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from integration.conftest import DEADLINE, QUICK, available, eventually
from integration.durable_runs import SLEEPER, Job, end
from proctree import Lines, durable
from proctree.process import pid_namespaces, proof

PIDS = ("unshare", "--pid", "--fork", "--kill-child")
OWN_PROC = (*PIDS, "--mount-proc")
PROC_OF_OTHERS = (*PIDS, "--mount")
OTHER_USERS = ("unshare", "--user", "--map-root-user")
EARLIER = ("unshare", "--time", "--boottime", "-50")
"""Where the same processes seem to have started earlier."""


def require(*command: str) -> None:
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture(autouse=True, scope="module")
def namespaces() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    require(*OWN_PROC)


INIT = """
import json, os, signal, sys, time
from pathlib import Path
import proctree, proctree.process.proof
from proctree import Lines, durable
from proctree.durable import StillRunning

def say(value):
    os.write(1, (json.dumps(value) + "\\n").encode())

def refused(call):
    try:
        call()
    except StillRunning as error:
        say(str(error))

def with_number(number, call):
    "In a child that has it."
    while True:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
        child = os.fork()
        if child == 0:
            if os.getpid() == number:
                call()
            os._exit(0)
        os.waitpid(child, 0)
        if child == number:
            return

say("ready")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            exec(json.loads(line), {**globals(), "store": sys.argv[1]})
        except BaseException as error:
            say(f"{type(error).__name__}: {error}")
        os._exit(0)
    while os.wait()[0] != child:
        pass
    say(None)
"""
"""For each piece of code a process of its own; it says when that has ended. The first process of a
new PID namespace."""


class Inside:
    """Where `command` leads: there code is run, on the records in `store`."""

    def __init__(self, store: Path, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [*command, sys.executable, "-c", INIT, str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._hear() == "ready"

    @property
    def pid(self) -> int:
        """Of its init."""
        children: list[psutil.Process] = psutil.Process(self._process.pid).children()
        return children[0].pid

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def run(self, code: str) -> list[Any]:
        """What the code says."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        said = []
        while (value := self._hear()) is not None:
            said.append(value)
        return said

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def inside(store: Path, command: Sequence[str] = OWN_PROC) -> Iterator[Inside]:
    there = Inside(store, command)
    try:
        yield there
    finally:
        there.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def starting(command: list[str], name: str = "start", **options: Any) -> str:
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"durable.{name}('key', {command!r}, store=store{given})"


def age(pid: int) -> float:
    """Seconds, as it can be said right now."""
    stat = proof.read_stat(pid)
    assert stat is not None
    ticks = os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start_time / ticks


def test_from_outside_it_is_reached_by_the_numbers_that_it_has_there(
    store: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path)
    lines: list[str] = []
    with inside(store) as there:
        (inner,) = there.run(f"say({starting(job.command)}.pid)")
        run = durable.start("key", job.command, store=store, logs=Lines(lines.append), timeout=3600)
        assert run.reconnected
        assert run.owned
        assert run.pid is not None
        assert run.pid != inner
        assert psutil.Process(run.pid).cmdline() == job.command
        assert run._live is not None
        warden = run._live.contained.root()
        assert warden is not None
        # Its timeout counts from its own start, and not from that of whoever has its number here.
        least, said, most = age(run.pid) - 0.02, run._live._age(), age(warden) + 0.02
        assert least <= said <= most
        assert run.pid in [process.pid for process in run.processes()]
        job.let_go()
        outcome = run.wait(DEADLINE)
        assert outcome is not None
        assert (outcome.reason, outcome.returncode, lines) == ("exited", 0, ["one", "two"])
        # And what has ended is known in there.
        said = there.run(
            f"run = {starting(job.command)}; say([run.reconnected, run.outcome.reason])"
        )
        assert said == [[True, "exited"]]
    assert job.ran == 1


def test_from_outside_it_is_ended(store: Path) -> None:
    with inside(store) as there:
        there.run(starting(SLEEPER))
        end(durable.start("key", SLEEPER, store=store))
        there.run(starting(SLEEPER))
        outcome = durable.cancel("key", store=store, timeout=DEADLINE)
        assert outcome is not None
        assert outcome.detail == "cancelled"


def test_from_inside_it_is_told_that_it_cannot_be_reached(store: Path) -> None:
    calls = [
        starting(SLEEPER),
        "durable.attach('key', store=store)",
        "durable.cancel('key', store=store)",
    ]
    with durable.start("key", SLEEPER, store=store, kill=QUICK) as run, inside(store) as there:
        for call in calls:
            (said,) = there.run(f"refused(lambda: {call})")
            assert "another PID namespace" in said
        (said,) = there.run("refused(lambda: durable.forget('key', store=store))")
        assert "cancel what runs" in said
        assert there.run("say([k.claimed for k in durable.list(store)])") == [[True]]
        assert there.run("say(len(proctree.sweep()))") == [0]
        assert run.owned
        assert run.outcome is None


LOSE = """
options = {{"lease": 60, "containment": {containment!r}}}
run = durable.start("key", ["sh", "-c", {command!r}], store=store, **options)
# Both of them are what they are to be: the main one may have to clear its mark before that.
comm = Path(f"/proc/{{run.pid}}/comm")
while not Path({there!r}).exists() or comm.read_text().strip() != "sleep":
    time.sleep(0.01)
say(run.pid)
os.kill(run._live.contained.root(), signal.SIGKILL)
os._exit(0)
"""


STRANGER = """
if os.fork() == 0:
    def stay():
        Path({there!r}).write_text("{number}")
        signal.pause()
    with_number({number}, stay)
    os._exit(0)
while not Path({there!r}).exists():
    time.sleep(0.01)
"""
"""Somebody with this number, outside of every tree."""

IN_SESSION = """
def lead():
    os.setsid()
    if os.fork() == 0:
        Path({there!r}).write_text(str(os.getpid()))
        signal.pause()
with_number({number}, lead)
while not Path({there!r}).exists():
    time.sleep(0.01)
"""
"""Somebody in the session of who had this number, and has ended."""

ALIVE = "say(not proctree.process.proof.has_ended(os.pidfd_open({number})))"


BARE = "env -i X=1 setpriv --pdeathsig clear"
"""Without a mark, and it does not end with the warden."""


class Lost:
    """A tree that has lost its supervisor and its warden, but for a member that has left its
    session; and for its main process where that is `BARE`."""

    def __init__(self, folder: Path, containment: str = "warden", main: str = "") -> None:
        self.containment = containment
        self.pidfile, self.fifo = folder / "member", folder / "fifo"
        member = f"setsid sh -c 'echo > {self.pidfile}; read x <&9'"
        self.command = f"mkfifo {self.fifo}; exec 9<> {self.fifo}; {member} & exec {main} sleep 99"

    @property
    def target(self) -> list[str]:
        return ["sh", "-c", self.command]

    @property
    def code(self) -> str:
        return LOSE.format(
            command=self.command, there=str(self.pidfile), containment=self.containment
        )

    def members(self) -> list[int]:
        """As numbers of ours: who has its FIFO open."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == str(self.fifo):
                        found.append(pid)
                        break
        return found


def test_what_was_lost_where_nobody_sees_it_is_not_replaced(store: Path, tmp_path: Path) -> None:
    lost = Lost(tmp_path, main=BARE)
    with inside(store) as there:
        there.run(lost.code)
        assert len(lost.members()) == 2
        with inside(store) as beside:
            (said,) = beside.run(f"refused(lambda: {starting(lost.target)})")
            assert re.search(r"attempt 1 has lost its warden.* PID namespace \d+.*output", said)
            assert len(lost.members()) == 2
        # From where it is seen it is ended.
        run = durable.start("key", ["true"], store=store, same_target=False)
        assert lost.members() == []
        assert run.number == 2
        assert run.wait(DEADLINE) is not None


def test_what_was_lost_with_its_namespace_is_replaced_where_that_is_seen(
    store: Path, tmp_path: Path
) -> None:
    if not pid_namespaces.is_seen(-1):
        pytest.skip("these tests run in a PID namespace themselves: others may be beside it")
    lost = Lost(tmp_path)
    with inside(store) as there:
        there.run(lost.code)
    eventually(lambda: not lost.members(), "it has ended with its namespace")
    run = durable.start("key", ["true"], store=store, same_target=False)
    assert run.number == 2
    assert run.wait(DEADLINE) is not None


def test_what_was_lost_with_its_container_is_replaced_in_the_next_one(
    store: Path, tmp_path: Path
) -> None:
    """Which is beside it and cannot see it: but nobody has the output open any more."""
    lost = Lost(tmp_path)
    with inside(store) as there:
        there.run(lost.code)
        assert lost.members()
    again = starting(["true"], same_target=False)
    with inside(store) as beside:
        assert beside.run(f"run = {again}; run.wait(); say(run.number)") == [2]


def test_where_it_cannot_be_said_whether_the_output_is_open_nothing_is_replaced(
    store: Path, tmp_path: Path
) -> None:
    lost = Lost(tmp_path)
    with inside(store) as there:
        there.run(lost.code)
    (log,) = store.glob("*/attempts/1/err.log")
    log.unlink()
    again = starting(["true"], same_target=False)
    with inside(store) as beside:
        (said,) = beside.run(f"refused(lambda: {starting(lost.target)})")
        assert "ENOENT keeps from us whether anybody can still write" in said
        log.touch()
        assert beside.run(f"run = {again}; run.wait(); say(run.number)") == [2]


WITHOUT_CGROUPS = ("sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh")


def test_what_was_lost_where_nobody_sees_it_is_ended_by_its_cgroup(
    store: Path, tmp_path: Path
) -> None:
    lost = Lost(tmp_path, available("cgroup"))
    with inside(store) as there:
        there.run(lost.code)
        assert lost.members()
        code = "durable.start('key', ['true'], store=store, same_target=False)"
        with inside(store, (*OWN_PROC, *WITHOUT_CGROUPS)) as beside:
            (said,) = beside.run(f"refused(lambda: {code})")
            assert "has lost its warden" in said
        with inside(store) as beside:
            assert beside.run(f"run = {code}; run.wait(); say(run.number)") == [2]
            assert lost.members() == []


def test_numbers_of_a_proc_that_is_not_ours_are_not_believed(store: Path, tmp_path: Path) -> None:
    """In a PID namespace with the /proc of the one above it a number there names somebody else
    here."""
    if not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        pytest.skip("no ns_last_pid: the kernel has no CHECKPOINT_RESTORE")
    lost = Lost(tmp_path)
    own = """
import ctypes
CLONE_NEWNS = 0x20000
assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
assert os.system("mount -t proc proc /proc") == 0
"""
    with inside(store, PROC_OF_OTHERS) as there:
        there.run(own + lost.code)
        (member, *_) = lost.members()
        there.run(STRANGER.format(number=member, there=str(tmp_path / "stranger")))
        (said,) = there.run("proctree.sweep()")
        assert "/proc belongs to another PID namespace" in said
        assert there.run(ALIVE.format(number=member)) == [True]
        assert lost.members()
        assert durable.start("key", ["true"], store=store, same_target=False).wait() is not None
        assert lost.members() == []


def test_whoever_has_the_number_of_the_main_process_here_is_left_alone(
    store: Path, tmp_path: Path
) -> None:
    if not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        pytest.skip("no ns_last_pid: the kernel has no CHECKPOINT_RESTORE")
    with inside(store) as above:
        with inside(store, ("nsenter", "-t", str(above.pid), "-p", "-m", *OWN_PROC)) as there:
            code = "Path('/proc/sys/kernel/ns_last_pid').write_text('400')"
            (number,) = there.run(f"{code}; say({starting(SLEEPER)}.pid)")
            stranger = tmp_path / "stranger"
            code = f"""
run = {starting(SLEEPER)}
say(run.owned)
{IN_SESSION.format(number=number, there=str(stranger))}
os.kill(run._live.contained.root(), signal.SIGKILL)
say(run.wait().reason)
"""
            assert above.run(code) == [True, "warden-lost"]
            assert above.run(ALIVE.format(number=stranger.read_text())) == [True]
            # From above, what is left there is seen.
            code = "durable.start('key', ['true'], store=store, same_target=False)"
            assert above.run(f"run = {code}; run.wait(); say(run.number)") == [2]


def test_who_has_other_clocks_knows_what_was_lost(store: Path, tmp_path: Path) -> None:
    require(*EARLIER)
    lost = Lost(tmp_path)
    with inside(store, ()) as here:
        here.run(lost.code)
        assert lost.members()
    with inside(store, EARLIER) as there:
        code = "durable.start('key', ['true'], store=store, same_target=False)"
        assert there.run(f"say({code}.number)") == [2]
        assert lost.members() == []


def test_who_may_not_look_at_what_was_lost_does_not_replace_it(store: Path, tmp_path: Path) -> None:
    require(*OTHER_USERS)
    lost = Lost(tmp_path)
    with inside(store, ()) as here:
        here.run(lost.code)
        assert lost.members()
    with inside(store, OTHER_USERS) as there:
        (said,) = there.run(f"refused(lambda: {starting(lost.target, containment='warden')})")
        assert "user namespace" in said
        assert lost.members()
    run = durable.start("key", ["true"], store=store, same_target=False)
    assert lost.members() == []
    assert run.wait(DEADLINE) is not None


ELSEWHERE = 'mkdir "$2" && mount --bind "$1" "$2" && shift 2 && exec "$@"'


def test_another_path_another_network_and_other_users_are_no_obstacle(
    store: Path, tmp_path: Path
) -> None:
    command = ("unshare", "--net", "--mount", "--user", "--map-root-user")
    require(*command)
    job = Job(tmp_path)
    other = tmp_path / "other"
    with durable.start("key", job.command, store=store, kill=QUICK) as run:
        run.detach()
        assert run.wait(DEADLINE) is not None
        move = ("sh", "-c", ELSEWHERE, "sh", str(store), str(other))
        with inside(other, (*command, *move)) as there:
            (said,) = there.run(
                f"""
lines = []
run = {starting(job.command)[:-1]}, logs=Lines(lines.append))
Path({str(job.gate)!r}).write_text("go\\n")
outcome = run.wait()
say([run.owned, run.pid, outcome.reason, lines])
"""
            )
    assert said == [True, run.pid, "exited", ["one", "two"]]


def test_without_proc_that_is_what_is_said(store: Path) -> None:
    command = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    require(*command)
    with durable.start("key", SLEEPER, store=store, kill=QUICK), inside(store, command) as there:
        for call in ("attach", "cancel"):
            (said,) = there.run(f"refused(lambda: durable.{call}('key', store=store))")
            assert "mount /proc" in said
