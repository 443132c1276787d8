"""idle: what a tree costs that runs and does nothing.

Context switches are counted by the kernel: a process or thread that is not woken up has none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import proctree
from benchmarks.table import Row
from benchmarks.timing import Effort


def _fields(path: str) -> dict[str, str]:
    """A /proc file of `name: value` lines."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return {
        name: value.strip() for name, colon, value in (x.partition(":") for x in lines) if colon
    }


def _switches(status: str) -> int:
    fields = _fields(status)
    return int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])


def _loop_thread() -> int:
    (thread,) = (t for t in threading.enumerate() if t.name == "proctree-loop")
    assert thread.native_id is not None
    return thread.native_id


def measure(effort: Effort) -> Iterator[Row]:
    seconds = 2 if effort.quick else 5
    with proctree.WatchedSubprocess.start(["sleep", "600"]) as handle:
        warden = handle._tree.contained.root()
        statuses = {
            "warden": f"/proc/{warden}/status",
            "supervisor's loop thread": f"/proc/self/task/{_loop_thread()}/status",
        }
        time.sleep(0.5)  # the start itself is not idle
        before = {name: _switches(status) for name, status in statuses.items()}
        time.sleep(seconds)
        after = {name: _switches(status) for name, status in statuses.items()}
        memory = _fields(f"/proc/{warden}/smaps_rollup")

    for name in statuses:
        count = after[name] - before[name]
        what = f"wake-ups in {seconds} s: {name}"
        yield Row(what, str(count), target="0", met=count == 0)
    for name, limit in (("Private_Dirty", 100), ("Rss", 1000)):
        size = int(memory[name].split()[0])
        yield Row(f"idle warden: {name}", f"{size} kB", target=f"< {limit} kB", met=size < limit)
