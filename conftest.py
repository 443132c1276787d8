"""What holds for the whole suite: a test leaves no process, no descriptor, no cgroup and no entry
in the registry behind.

The test process makes itself a child subreaper, so that whatever gets away from its parent in a
test lands here and not under pid 1: nothing can hide, whatever it does to its session, its parents
or its environment. It lives in a cgroup of its own where it may make one, and has a registry of its
own, so that what it finds there is its own and not somebody else's.

With pytest-xdist each worker is such a process, and its cgroup is beside those of the others: below
the controller's, which has a process of its own, it could not be given a limit. The controller runs
no test, and so does none of this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from proctree import loop
from proctree.channel import server, tasks
from proctree.containment.warden import WardenContained
from proctree.errors import ContainmentUnavailable
from proctree.process import cgroups, prctl, proof
from proctree.supervisor import notify_directory

LEAVE_SECONDS = 10.0
"""How long something that is ending may take to be gone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--warden",
        choices=("installed", "sanitized", "valgrind"),
        help="run every test in integration/ with this build of the warden, and with no other",
    )


class Place:
    """The cgroup and the registry of the suite."""

    cgroup: str | None = None
    before: str | None = None
    runtime: str | None = None


def _move_to(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as file:
        file.write("0")


def _enter_place() -> None:
    Place.runtime = os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="proctree-suite-")
    with contextlib.suppress(ContainmentUnavailable, OSError):
        home = cgroups.find_home(cgroups.own_path()).path
        cgroup = f"{home.rstrip('/')}/proctree-suite-{os.getpid()}"
        # A run that was killed leaves its own behind, and process numbers come again.
        with contextlib.suppress(FileExistsError):
            os.mkdir(cgroup)
        Place.cgroup, Place.before = cgroup, home
        _move_to(cgroup)


def _leave_place() -> None:
    if Place.runtime is not None:
        shutil.rmtree(Place.runtime)
    if Place.cgroup is not None and Place.before is not None:
        _move_to(Place.before)
        assert cgroups.end(Place.cgroup, LEAVE_SECONDS)


def _leaves_and_entries() -> list[str]:
    """What trees have in the file system."""
    found = []
    if Place.cgroup is not None:
        found += [f"cgroup {entry.name}" for entry in os.scandir(Place.cgroup) if entry.is_dir()]
    with contextlib.suppress(FileNotFoundError):
        found += [f"entry {name}" for name in os.listdir(f"{Place.runtime}/proctree")]
    return sorted(found)


def _clear_place() -> None:
    """So that the next test is not blamed for this one."""
    if Place.cgroup is not None:
        for entry in os.scandir(Place.cgroup):
            if entry.is_dir():
                cgroups.end(entry.path, LEAVE_SECONDS)
    shutil.rmtree(f"{Place.runtime}/proctree", ignore_errors=True)


def pytest_unconfigure() -> None:
    _leave_place()


def _hear_every_signal() -> None:
    """nohup(1), and shells that start a job in the background, have some ignored: that is handed on
    to every process of the suite, and `proctree run` rightly leaves it so."""
    for signo in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(signo) is signal.SIG_IGN:
            signal.signal(signo, signal.SIG_DFL)


@pytest.hookimpl(trylast=True)  # behind the one by which pytest-xdist registers its session
def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("dsession"):
        return  # the workers run the tests, each with what follows for itself
    _hear_every_signal()
    prctl.LibcPrctl().set_child_subreaper(True)
    _enter_place()
    _note_own_wardens()
    # Their descriptors belong to the process and not to the first test.
    loop.get()
    server._channel_loop()
    tasks.loop()
    for reachable in (False, True):
        notify_directory.get(reachable=reachable)


_own_wardens: set[tuple[int, int]] = set()
"""Those that this process started itself: it must reap them, and nobody does it for it."""


def _note_own_wardens() -> None:
    spawn = WardenContained.spawn

    def noting(self: WardenContained, *args: Any, **kwargs: Any) -> None:
        spawn(self, *args, **kwargs)
        stat = proof.read_stat(self._warden)
        if stat is not None:
            _own_wardens.add((stat.pid, stat.start_time))

    WardenContained.spawn = noting  # type: ignore[method-assign]


def _has_children() -> bool:
    """One system call, where a list of them takes one for each process that there is. Who has none
    has no descendants: orphans come to us."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _descendants() -> dict[tuple[int, float], str]:
    """Living and dead ones: a zombie that nobody reaps is a leak too."""
    found: dict[tuple[int, float], str] = {}
    if not _has_children():
        return found
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid, process.create_time()] = f"{process.pid} {process.name()}"
    return found


def _reap_orphans(before: dict[tuple[int, float], str]) -> None:
    """Zombies that were re-parented to us are nobody's but ours to reap: that they came here is the
    work of the subreaper flag above, in real life pid 1 does it."""
    if not _has_children():
        return
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            known = (process.pid, process.create_time()) in before
            stat = proof.read_stat(process.pid)
            if known or stat is None or not stat.dead or stat.session == os.getsid(0):
                continue
            if (stat.pid, stat.start_time) not in _own_wardens:
                os.waitpid(process.pid, os.WNOHANG)


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _new(before: dict[object, str], after: dict[object, str]) -> list[str]:
    return sorted(str(value) for key, value in after.items() if key not in before)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the test that leaks, by the name of what it leaked."""
    processes, descriptors = _descendants(), _descriptors()
    yield
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        _reap_orphans(processes)
        left = _new(processes, _descendants())  # type: ignore[arg-type]
        opened = _new(descriptors, _descriptors())  # type: ignore[arg-type]
        kept = _leaves_and_entries()
        if not left and not opened and not kept:
            return
        if time.monotonic() > deadline:
            break
        # Nothing tells us when a stranger's process has been reaped, or when the loop's thread has
        # closed what belongs to a tree that has just ended.
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if (process.pid, process.create_time()) not in processes:
                process.kill()
    _clear_place()
    pytest.fail(f"left behind: processes {left}, descriptors {opened}, files {kept}")
