"""What brings faults about: held execs, freezers, tracers, bystanders, supervisors to be killed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

import proctree
from integration.conftest import DEADLINE, Lines, eventually, is_alive, relatives
from integration.fault_matrix import Case
from proctree import KillPolicy, Stage, WatchedSubprocess
from proctree.process import proof

QUICK = KillPolicy((Stage(15, 0.3), Stage(9, 30.0)))
SHORT = KillPolicy((Stage(15, 0.2), Stage(9, 0.2)))
"""For what cannot be ended."""
PATIENT = KillPolicy((Stage(15, 600.0), Stage(9, 30.0)))
"""The grace lasts until the test goes on."""
MAIN_FIRST = KillPolicy((Stage(9, 600.0, "main"), Stage(9, 30.0)))
NOW = KillPolicy((Stage(9, 30.0),))
NOW_SHORT = KillPolicy((Stage(9, 0.2),))
POLICIES = {
    "quick": QUICK,
    "short": SHORT,
    "patient": PATIENT,
    "main first": MAIN_FIRST,
    "now": NOW,
    "now short": NOW_SHORT,
}


def cgroup_mount(kind: str, option: str = "") -> Path | None:
    """Where a hierarchy is mounted: `cgroup2`, or `cgroup` with a controller."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, mounted, options, *_ = line.split()
        if mounted == kind and (not option or option in options.split(",")):
            return Path(where)
    return None


def leaves_of(tree_id: str) -> list[Path]:
    """The cgroup of a tree, wherever it is; but not in the depths of what others have made."""
    mount = cgroup_mount("cgroup2")
    found = []
    for folder, below, _files in os.walk(mount or "/nonexistent"):
        found += [Path(folder, name) for name in below if name == f"proctree-{tree_id}"]
        if len(Path(folder).relative_to(mount or "/").parts) >= 4:
            below.clear()
    return found


class HeldExec:
    """A program that nobody executes before it is released, as if it lay on a slow file system: the
    kernel asks us about each execve(2) of it (fanotify(7), FAN_OPEN_EXEC_PERM)."""

    _CLASS_CONTENT = 0x04
    _CLOEXEC = 0x01
    _MARK_ADD = 0x01
    _OPEN_EXEC_PERM = 0x40000
    _ALLOW = 0x01
    _AT_FDCWD = -100
    _EVENT = struct.Struct("=IBBHQii")
    _RESPONSE = struct.Struct("=iI")

    def __init__(self, program: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._group = libc.fanotify_init(self._CLASS_CONTENT | self._CLOEXEC, os.O_RDONLY)
        if self._group < 0:
            raise OSError(ctypes.get_errno(), "fanotify_init")
        self._asked: list[int] = []
        mask = ctypes.c_uint64(self._OPEN_EXEC_PERM)
        path = os.fsencode(program)
        if libc.fanotify_mark(self._group, self._MARK_ADD, mask, self._AT_FDCWD, path) < 0:
            error = ctypes.get_errno()
            self.close()
            raise OSError(error, "fanotify_mark")

    @classmethod
    def unavailable(cls) -> str | None:
        with tempfile.NamedTemporaryFile() as file:
            try:
                cls(file.name).close()
            except OSError as error:
                return f"an execve cannot be held here: {error}"
        return None

    def wait(self) -> int:
        """The process that is about to execute it."""
        ready, _, _ = select.select([self._group], [], [], DEADLINE)
        assert ready, "nobody executes it"
        *_, fd, pid = self._EVENT.unpack(os.read(self._group, self._EVENT.size))
        self._asked.append(fd)
        return int(pid)

    def release(self) -> None:
        """Closing the group allows what has not been answered and what still comes."""
        self.close()

    def close(self) -> None:
        while self._asked:
            os.close(self._asked.pop())
        if self._group >= 0:
            os.close(self._group)
            self._group = -1


class Freezer:
    """Uninterruptible sleep: what cgroup v1's freezer holds runs nothing, not even its own end."""

    def __init__(self, *pids: int) -> None:
        mount = cgroup_mount("cgroup", "freezer")
        assert mount is not None
        self._folder = Path(tempfile.mkdtemp(prefix="proctree-test-", dir=mount))
        self._frozen = True
        self._pids = pids
        try:
            for pid in pids:
                (self._folder / "cgroup.procs").write_text(str(pid))
            (self._folder / "freezer.state").write_text("FROZEN")
            eventually(lambda: self._state() == "FROZEN", "they freeze")
        except BaseException:
            self.close()
            raise

    @classmethod
    def unavailable(cls) -> str | None:
        mount = cgroup_mount("cgroup", "freezer")
        if mount is None or not os.access(mount, os.W_OK):
            return "there is no freezer (cgroup v1) that we may use"
        return None

    def _state(self) -> str:
        return (self._folder / "freezer.state").read_text().strip()

    def thaw(self) -> None:
        self._frozen = False
        (self._folder / "freezer.state").write_text("THAWED")

    def close(self) -> None:
        if not self._folder.exists():
            return
        if self._frozen:
            self.thaw()
        for pid in (self._folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (self._folder.parent / "cgroup.procs").write_text(pid)
        eventually(self._removed, "its processes leave it")

    def _removed(self) -> bool:
        try:
            self._folder.rmdir()
        except OSError:  # a process that is ending is still in it
            return False
        return True


class Helper:
    """A process of the test's own, outside every tree."""

    def __init__(self, argv: Sequence[str], said: bytes = b"", stdout: int | None = None) -> None:
        self.process = subprocess.Popen(argv, stdout=stdout or subprocess.PIPE)
        if said:
            assert self.process.stdout is not None
            assert self.process.stdout.readline() == said

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


# Commands come by lines on its stdin; what it hears and sees goes to its stdout, a JSON line each,
# written in one piece since several threads do it.
SUPERVISOR = """
import json, os, sys, threading
import proctree
from proctree import KillPolicy, Stage

ask = json.loads(sys.argv[1])
policies = {
    name: KillPolicy(tuple(Stage(*stage) for stage in stages))
    for name, stages in ask["policies"].items()
}
done = threading.Event()

def say(**what):
    os.write(1, json.dumps(what).encode() + b"\\n")

def on_line(line):
    say(line=line)
    if line == "last":
        done.wait()

handle = proctree.WatchedSubprocess(
    ask["argv"],
    containment=ask["containment"],
    stdout=proctree.Lines(on_line),
    kill=policies[ask["plan"]],
    drain_timeout=0.1,
)

def obey():
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "kill":
            handle.kill(policies[rest])
        elif word == "state":
            while handle.state.value != rest:
                pass
            say(state=rest)
        elif word == "exit":
            os._exit(3)
        elif word == "wait":
            outcome = handle.wait(timeout=60)
            assert outcome is not None, "it waits for what it cannot end"
            say(outcome=outcome.as_dict() | {"why": [m.why for m in outcome.survivors]})
        elif word == "again":
            say(again=proctree.run(["true"], containment=ask["containment"]).ok)
    done.set()

threading.Thread(target=obey, daemon=True).start()
say(tree_id=handle.tree_id)
handle.launch()
say(main=handle.pid)
done.wait()
"""


class Supervisor:
    """A Python that supervises one tree, and may be killed."""

    def __init__(
        self,
        argv: Sequence[str],
        containment: str,
        *,
        plan: str = "quick",
        prefix: Sequence[str] = (),
        python: str = sys.executable,
        env: dict[str, str] | None = None,
    ) -> None:
        ask = {
            "argv": list(argv),
            "containment": containment,
            "plan": plan,
            "policies": {name: policy.stages for name, policy in POLICIES.items()},
        }
        self.process = subprocess.Popen(
            [*prefix, python, "-c", SUPERVISOR, json.dumps(ask)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | (env or {}),
        )
        self.lines: list[str] = []
        self._heard: dict[str, list[Any]] = {}
        self.tree_id = str(self.hear("tree_id"))

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, "the supervisor has ended"
        for key, value in json.loads(text).items():
            if key == "line":
                self.lines.append(value)
            else:
                self._heard.setdefault(key, []).append(value)

    def hear(self, key: str) -> Any:
        """The next message of a kind."""
        while not self._heard.get(key):
            self._listen()
        return self._heard[key].pop(0)

    def hear_lines(self, count: int) -> None:
        """Until the tree has written so many in all."""
        while len(self.lines) < count:
            self._listen()

    def hear_line(self, line: str) -> None:
        while line not in self.lines:
            self._listen()

    def ended(self) -> None:
        """Waits for its end."""
        self.process.wait(timeout=DEADLINE)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Starting:
    """A tree of ours whose main process is held before it executes its program. Starting one waits
    for exactly that, so a thread does it."""

    def __init__(self, handle: WatchedSubprocess) -> None:
        self.handle = handle
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._launch)
        self._thread.start()

    def _launch(self) -> None:
        try:
            self.handle.launch()
        except BaseException as error:
            self.error = error

    def finished(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "the start does not come back"


WARDEN = "proctree-warden"
INIT = "proctree-init"


def warden_of(supervisor: int) -> int:
    """By what ps(1) shows and not by what the backend thinks."""
    stats = [proof.read_stat(child.pid) for child in psutil.Process(supervisor).children()]
    (warden,) = (stat.pid for stat in stats if stat is not None and stat.name == WARDEN)
    return warden


def state_of(pid: int) -> str:
    stat = proof.read_stat(pid)
    return "" if stat is None else stat.state


def kill_together(*pids: int) -> None:
    """None of them sees that another has ended. One in vfork(2) sees nothing anyway, and does not
    stop before that returns."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: all(state_of(pid) in "TD" for pid in pids), "all are stopped")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


class Scene:
    """One case on real processes.

    Every process of the tree executes a file that no other process executes, so that whatever it
    does to its name, its parents, its session and its environment, it is found and cleared away.
    """

    def __init__(self, case: Case, actors: str, seen: list[tuple[str, object]]) -> None:
        self.case = case
        self._actors = actors
        self._seen = seen
        self._helpers: list[int] = []
        self._freezers: list[Freezer] = []
        self.trees: list[str] = []
        self._handles: list[WatchedSubprocess] = []
        self._closing = contextlib.ExitStack()
        self.folder = Path(tempfile.mkdtemp(prefix="proctree-case-"))
        self._closing.callback(shutil.rmtree, self.folder)
        self.folder.chmod(0o755)
        self.actor = str(self.folder / "actor")
        shutil.copy2(actors, self.actor)
        self.runtime = self.folder / "runtime"
        self.runtime.mkdir(mode=0o700)
        self._closing.callback(self._clear)

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._closing.close()

    # -- who is there

    def members(self) -> list[int]:
        """Every living process that executes one of this case's files, wherever it is."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    program = os.readlink(f"/proc/{name}/exe")
                    if program.startswith(str(self.folder)) and is_alive(int(name)):
                        found.append(int(name))
        return found

    def living(self) -> dict[int, str]:
        """Every living process below us but the test's own, by number."""
        self._reap_orphans()
        return {
            stat.pid: f"{stat.name} (state {stat.state}, parent {stat.ppid})"
            for stat in relatives()
            if stat.pid not in self._helpers
        }

    def _reap_orphans(self) -> None:
        """What lost its parent has come to us, where in real life it comes to pid 1, which reaps
        it: the init of a PID namespace cannot end before that."""
        for process in psutil.Process().children():
            stat = proof.read_stat(process.pid)
            if stat is None or not stat.dead or stat.session == os.getsid(0):
                continue
            if all(stat.pid != handle._tree.contained.root() for handle in self._handles):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(stat.pid, os.WNOHANG)

    def leaves(self) -> list[Path]:
        """The cgroups of this case's trees."""
        if self.case.backend != "cgroup":
            return []
        return [path for tree in self.trees for path in leaves_of(tree)]

    def only_kernel_work_left(self) -> bool:
        """The init of a PID namespace is on its way out, which it has to itself."""
        return all(name.startswith(INIT) for name in self.living().values())

    def saw(self, what: str) -> None:
        """For what is not promised: what there was."""
        self._seen.append(("seen", what))

    def clear(self) -> int:
        """Ends what is left, where that is not promised; says how many it were."""
        left = self.members()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.living(), "everything ends")
        return len(left)

    def _clear(self) -> None:
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.members(), "everything ends")

    # -- what can be had for it; everything is given back at the end

    def cast(self) -> str:
        """Shell commands for three that outlive their parent: one in its group, one in a session of
        its own, one that bears no mark at all. Three lines come of it."""
        actor = self.actor
        return f"{actor} ignore & setsid {actor} ignore & env -i {actor} daemonise; "

    def handle(
        self, argv: Sequence[str], lines: Callable[[str], None], **options: Any
    ) -> WatchedSubprocess:
        options = {"kill": QUICK, "drain_timeout": 0.1} | options
        handle = WatchedSubprocess(
            argv, containment=self.case.backend, stdout=proctree.Lines(lines), **options
        )
        self._handles.append(handle)
        self.trees.append(handle.tree_id)
        self._closing.callback(self._end, handle)
        return handle

    def _end(self, handle: WatchedSubprocess) -> None:
        if handle.state is not proctree.State.NEW and handle.outcome is None:
            handle.kill(NOW_SHORT)
            handle.wait(timeout=DEADLINE)

    def start(
        self, argv: Sequence[str], lines: int, **options: Any
    ) -> tuple[WatchedSubprocess, Lines]:
        """A tree that has written so many lines."""
        heard = Lines()
        handle = self.handle(argv, heard, **options)
        handle.launch()
        heard.wait_for(lines)
        return handle, heard

    def hold_exec(self) -> HeldExec:
        held = HeldExec(self.actor)
        self._closing.callback(held.close)
        return held

    def freeze(self, *pids: int) -> Freezer:
        freezer = Freezer(*pids)
        self._freezers.append(freezer)
        self._closing.callback(freezer.close)
        return freezer

    def thaw(self) -> None:
        for freezer in self._freezers:
            freezer.thaw()

    def _helper(self, argv: Sequence[str], said: bytes = b"", stdout: int | None = None) -> Helper:
        helper = Helper(argv, said, stdout)
        self._helpers.append(helper.pid)
        self._closing.callback(helper.close)
        return helper

    def trace(self, pid: int) -> Helper:
        return self._helper([self._actors, "trace", str(pid)], b"tracing\n")

    def hold_output(self, pid: int) -> Helper:
        """A process outside the tree that has the write end of its output."""
        stolen = os.open(f"/proc/{pid}/fd/1", os.O_WRONLY)
        try:
            return self._helper(["sleep", "1000"], stdout=stolen)
        finally:
            os.close(stolen)

    def supervise(self, argv: Sequence[str], **options: Any) -> Supervisor:
        env = {"XDG_RUNTIME_DIR": str(self.runtime)} | options.pop("env", {})
        supervisor = Supervisor(argv, self.case.backend, env=env, **options)
        self._helpers.append(supervisor.pid)
        self.trees.append(supervisor.tree_id)
        self._closing.callback(supervisor.close)
        return supervisor

    def still_works(self) -> None:
        """The supervisor, with whatever it still has on its hands."""
        outcome = proctree.run(["true"], containment=self.case.backend)
        assert outcome.ok, outcome


def fifo(path: Path) -> str:
    os.mkfifo(path)
    path.chmod(0o666)
    return str(path)


def open_and_close(path: str) -> None:
    """Whoever reads the FIFO comes to its end."""
    os.close(os.open(path, os.O_WRONLY))


@contextlib.contextmanager
def delegated_cgroup(uid: int) -> Iterator[Path]:
    """A cgroup (v2) that belongs to a user, as a service manager delegates one."""
    mount = cgroup_mount("cgroup2")
    assert mount is not None
    folder = Path(tempfile.mkdtemp(prefix="proctree-test-", dir=mount))
    try:
        folder.chmod(0o755)
        for path in (folder, *(folder / name for name in DELEGATED)):
            os.chown(path, uid, uid)
        yield folder
    finally:
        for below in sorted(folder.glob("**/"), reverse=True):
            if (below / "cgroup.kill").exists():
                (below / "cgroup.kill").write_text("1")
        eventually(lambda: _removed(folder), "the delegated cgroup is empty")


DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
"""What cgroups(7) says to hand over."""


def _removed(folder: Path) -> bool:
    for below in sorted(folder.glob("**/"), reverse=True):
        try:
            below.rmdir()
        except OSError:
            return False
    return True
