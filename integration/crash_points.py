"""Processes that are killed at a chosen system call, and proof that nothing of them is left.

A `Zygote` is a process that has imported everything and has no thread: what is tried is a fork of
it, so that a try costs milliseconds. It is a child subreaper: whatever a supervisor leaves behind
becomes its child, and waitpid(2) answering ECHILD proves that nothing is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import glob
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from proctree.process.prctl import LibcPrctl

HERE = Path(__file__).parent
DEADLINE = 40.0
"""Seconds that a forked process may take before it says where it hangs and is ended."""

MARK = 0x7070
"""As in crash_points.c."""

PIPE_SIZE = 1 << 20

_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


class Trouble(AssertionError):
    """What is wrong, as the forked process says it."""


def build(folder: str) -> str:
    """Compiles the tracer, and answers its path."""
    path = os.path.join(folder, "crash_points")
    source = str(HERE / "crash_points.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", path, source], check=True)
    return path


def unavailable(tracer: str) -> str | None:
    """Why nothing can be traced here, or None."""
    with subprocess.Popen(["sleep", "60"]) as child:
        command = [tracer, "0", os.devnull, str(child.pid)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as tracing:
            assert tracing.stdout is not None
            seized = tracing.stdout.readline() == "seized\n"
            child.kill()
            _, said = tracing.communicate()
    return None if seized else said.strip()


def names() -> dict[int, str]:
    """The names of the system calls of this machine by their numbers."""
    done = subprocess.run(
        ["cc", "-dM", "-E", "-include", "sys/syscall.h", "-x", "c", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"^#define __NR_(\w+) (\d+)$", done.stdout, re.MULTILINE)
    return {int(number): name for name, number in found}


# -- In the zygote, and in what it forks.


@contextlib.contextmanager
def window() -> Iterator[None]:
    """System calls count inside it only."""
    for last in (False, True):
        with contextlib.suppress(ProcessLookupError):
            os.getpriority(os.PRIO_USER, MARK)
        if not last:
            yield


class Ended(NamedTuple):
    """How a forked process ended.

    Attributes:
        status: as `os.waitstatus_to_exitcode`.
        result: what its function returned; None when it was killed.
        trouble: the traceback of what it raised, or "".
    """

    status: int
    result: Any
    trouble: str

    def value(self) -> Any:
        if self.status != 0:
            raise Trouble(f"status {self.status}\n{self.trouble}")
        return self.result


class Forked:
    """A function that runs in a fork of this process.

    Its result, which JSON must be able to say, and what it raises come back through a pipe; both
    are short enough for one of this size.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reader)
            self._run(writer, function, args)
        os.close(writer)

    @staticmethod
    def _run(writer: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        status = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            # And not dump_traceback_later: its thread is missing in what is forked from here.
            faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
            signal.setitimer(signal.ITIMER_REAL, DEADLINE)
            said = json.dumps(function(*args))
            status = 0
        except BaseException:
            said = json.dumps(traceback.format_exc())
        os.write(writer, said.encode())
        os._exit(status)

    def wait(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        os.set_blocking(self._reader, False)
        said = b""
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._reader, PIPE_SIZE)
        os.close(self._reader)
        value = json.loads(said) if said else None
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, value, "") if code == 0 else Ended(code, None, str(value))


def forked(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns in a process of its own.

    Raises:
        Trouble: it raised, or was killed.
    """
    return Forked(function, *args).wait().value()


class Call(NamedTuple):
    """A system call in a window.

    Attributes:
        nth: counted from 1 over all threads.
        thread: of the process, counted from 0 in the order of their first calls.
        number: which call; `names` knows.
    """

    nth: int
    thread: int
    number: int


class Traced(NamedTuple):
    """How a traced process ended.

    Attributes:
        ended: how it ended.
        calls: what it called in its window, the one that was not executed last.
        killed: whether it was killed at a call; else it made fewer than that.
    """

    ended: Ended
    calls: list[Call]
    killed: bool


def _read_listing(text: str) -> tuple[list[Call], bool]:
    lines = [line.split() for line in text.splitlines()]
    threads: dict[str, int] = {}
    calls = [
        Call(int(nth), threads.setdefault(thread, len(threads)), int(number))
        for nth, thread, number, *_ in lines
    ]
    return calls, bool(lines) and lines[-1][-1] == "killed"


def traced(tracer: str, nth: int, function: Callable[..., Any], *args: Any) -> Traced:
    """Runs `function` in a process of its own, which is killed by SIGKILL at the entry of the
    `nth` system call of its window; 0: it is not."""
    go_reader, go_writer = os.pipe()

    def follow() -> Any:
        os.close(go_writer)
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        os.write(ready_writer, b".")
        os.read(go_reader, 1)
        return function(*args)

    ready_reader, ready_writer = os.pipe()
    child = Forked(follow)
    os.close(go_reader)
    os.read(ready_reader, 1)
    with tempfile.NamedTemporaryFile("r") as listing:
        command = [tracer, str(nth), listing.name, str(child.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tracing:
            assert tracing.stdout is not None
            assert tracing.stdout.readline() == "seized\n"
            os.write(go_writer, b".")
            assert tracing.wait() == 0
        calls, killed = _read_listing(listing.read())
    for fd in (go_writer, ready_reader, ready_writer):
        os.close(fd)
    ended = child.wait()
    assert killed == (ended.status == -signal.SIGKILL), ended
    return Traced(ended, calls, killed)


def learn(function: Callable[..., Any], *args: Any) -> None:
    """Imports here what `function` imports when it runs for the first time, so that what is forked
    from now on does not do it again."""

    def imported() -> list[str]:
        function(*args)
        return [name for name in sys.modules if name not in known]

    known = set(sys.modules)
    for name in forked(imported):
        importlib.import_module(name)


def settle() -> None:
    """Returns when every process below this one has ended and was reaped.

    Raises:
        Trouble: that does not come; with what is left.
    """

    left: list[str] = []

    def late(*_: object) -> None:
        left[:] = left or [_family()]
        # It goes on without them, and again should they be replaced.
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE, 1.0)
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if left:
        raise Trouble(f"left behind:\n{left[0]}")


def settled() -> list[str]:
    """The same for who has more to say: what is left, if there is something."""
    try:
        settle()
    except Trouble as trouble:
        return [str(trouble)]
    return []


def children(pid: int) -> list[int]:
    """The living and dead ones of a process; none when it is gone. The kernel lists them for each
    thread that has made some, proc(5)."""
    found = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in Path(path).read_text().split()]
    return found


def descendants() -> list[int]:
    found = children(os.getpid())
    for pid in found:
        found += children(pid)
    return found


def _family() -> str:
    pids = ",".join(map(str, descendants()))
    command = ["ps", "-o", "pid,ppid,stat,wchan:20,args", "-p", pids]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def serve() -> None:
    """The life of a zygote: function after function, each a line of JSON."""
    LibcPrctl().set_child_subreaper(True)
    # What is forked here may write to its standard output: it must not be taken for an answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        module, name, args = json.loads(line)
        try:
            function = getattr(importlib.import_module(module), name)
            said = {"result": function(*args)}
        except Exception:
            said = {"trouble": traceback.format_exc()}
        os.write(answers, json.dumps(said).encode() + b"\n")


# -- In the test.


class Zygote:
    """See the module. Its `call` may be used by one thread at a time.

    Args:
        *modules: what it imports before anything is forked.
    """

    def __init__(self, *modules: str, **variables: str) -> None:
        imports = ", ".join((__name__, *modules))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {imports}; {__name__}.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
            env={**os.environ, **variables},
        )
        self._lock = threading.Lock()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function`, a function of a module, returns in the zygote itself.

        Raises:
            Trouble: it raised.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            request = [function.__module__, function.__name__, args]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise Trouble(f"the zygote has ended: {self._process.wait()}")
        answer = json.loads(line)
        if "trouble" in answer:
            raise Trouble(answer["trouble"])
        return answer["result"]

    def close(self) -> None:
        for file in (self._process.stdin, self._process.stdout):
            assert file is not None
            file.close()
        self._process.wait()


ZYGOTES = 2
"""Each tries one point at a time."""

LEAST = 0.5
"""Of the points how many have to be reached: how often the threads of a supervisor meet, and so how
many calls they make, differs from run to run."""


@contextlib.contextmanager
def zygotes(parts: ModuleType, folder: Path) -> Iterator[list[Zygote]]:
    """Some that know what the scenarios of a module need, as its `learn` says."""
    made: list[Zygote] = []
    try:
        for number in range(ZYGOTES):
            runtime = folder / str(number)
            runtime.mkdir()
            made.append(Zygote(parts.__name__, XDG_RUNTIME_DIR=str(runtime)))
            made[-1].call(parts.learn, str(runtime))
        yield made
    finally:
        for zygote in made:
            zygote.close()


def each(
    zygotes: list[Zygote], function: Callable[..., Any], points: list[tuple[Any, ...]]
) -> list[Any]:
    """`function` for each point, in as many zygotes as there are."""
    waiting = list(reversed(points))
    done: list[Any] = []

    def work(zygote: Zygote) -> None:
        while waiting:
            point = waiting.pop()
            try:
                done.append((point, zygote.call(function, *point)))
            except Trouble as trouble:
                done.append((point, {"wrong": [str(trouble)], "calls": 0, "killed": True}))

    with ThreadPoolExecutor(len(zygotes)) as threads:
        list(threads.map(work, zygotes))
    return sorted(done, key=lambda point: point[0])


def spread(count: int, sample: int) -> list[int]:
    """That many numbers from 1 to `count`, the ends among them; 0: all."""
    if sample == 0 or sample >= count or os.environ.get("PROCTREE_CRASH_POINTS") == "all":
        return list(range(1, count + 1))
    return sorted({1 + index * (count - 1) // (sample - 1) for index in range(sample)})


def failures(tried: list[Any]) -> str:
    known = names()
    return "\n".join(
        f"{point[2:]} ({known.get(got.get('number'), 'no call')} of {got['calls']}): {wrong}"
        for point, got in tried
        for wrong in got["wrong"]
    )
