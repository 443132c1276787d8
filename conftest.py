"""What holds for the whole suite: a test leaves no process and no descriptor behind.

The test process makes itself a child subreaper, so that whatever gets away from its parent in a
test lands here and not under pid 1: nothing can hide, whatever it does to its session, its parents
or its environment.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from proctree import loop
from proctree.containment.warden import WardenContained
from proctree.process import prctl, proof

LEAVE_SECONDS = 10.0
"""How long something that is ending may take to be gone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--warden",
        choices=("installed", "sanitized", "valgrind"),
        help="run every test in integration/ with this build of the warden, and with no other",
    )


def pytest_configure(config: pytest.Config) -> None:
    prctl.LibcPrctl().set_child_subreaper(True)
    _note_own_wardens()
    loop.get()  # its two descriptors belong to the process and not to the first test


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


def _descendants() -> dict[tuple[int, float], str]:
    """Living and dead ones: a zombie that nobody reaps is a leak too."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid, process.create_time()] = f"{process.pid} {process.name()}"
    return found


def _reap_orphans(before: dict[tuple[int, float], str]) -> None:
    """Zombies that were re-parented to us are nobody's but ours to reap: that they came here is the
    work of the subreaper flag above, in real life pid 1 does it."""
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
        if not left and not opened:
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
    pytest.fail(f"left behind: processes {left}, descriptors {opened}")
