"""start and start-2gb: from the call that starts /bin/true until it is known to have exited.

Ours is the containment `warden`, and `containments` compares the stronger ones with it. The peers:
`subprocess.Popen(...).wait()`, the same with a `preexec_fn` (which makes it fork, and
was the way to get a session of one's own), and processkit. All inherit the standard streams.

A fork copies the page tables of the supervisor, so for start-2gb this module runs as a program of
its own that holds 2 GB, and prints the medians as JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import processkit

import proctree
from benchmarks.table import Row, skipped, times_as_long, times_faster
from benchmarks.timing import Contender, Effort, medians, timed
from proctree.containment import choose

TRUE = ["/bin/true"]
BALLAST = 2 * 1024**3

OURS = "proctree.run"
WARDEN = "warden"
STRONGER = ("cgroup", "pidns")
POPEN = "Popen.wait"
PREEXEC = "Popen(preexec_fn)"
PROCESSKIT = "processkit"

_processkit = processkit.Command(TRUE[0]).inherit_stdin().stdout("inherit").stderr("inherit")

ours = timed(lambda: proctree.run(TRUE, containment="warden"))
popen = timed(lambda: subprocess.Popen(TRUE).wait())
preexec = timed(lambda: subprocess.Popen(TRUE, preexec_fn=os.setsid).wait())
kit = timed(lambda: _processkit.start().outcome())


def measure(effort: Effort) -> Iterator[Row]:
    """A small supervisor."""
    what = "start to exit of /bin/true"
    for peer, contender, limit in ((POPEN, popen, 1.7), (PROCESSKIT, kit, None)):
        results = medians({OURS: ours, peer: contender}, effort.rounds(500), warm_up=5)
        yield times_as_long(what, results[OURS], peer, results[peer], limit)


def measure_containments(effort: Effort) -> Iterator[Row]:
    """What stronger containment costs at the start and at the end of a tree."""
    what = "start to exit, in a {}"
    contenders = {WARDEN: ours}
    for name in STRONGER:
        try:
            choose(name)
        except proctree.ContainmentUnavailable as error:
            yield skipped(what.format(name), str(error))
        else:
            contenders[name] = timed(partial(proctree.run, TRUE, containment=name))
    results = medians(contenders, effort.rounds(300), warm_up=5)
    for name in contenders.keys() - {WARDEN}:
        yield times_as_long(what.format(name), results[name], WARDEN, results[WARDEN], 1.5)


def measure_big(effort: Effort) -> Iterator[Row]:
    """A supervisor with 2 GB resident."""
    what = "the same, 2 GB resident"
    available = _available()
    if available < BALLAST * 1.3:
        yield skipped(what, f"{available // 1024**2} MiB of memory available")
        return
    many, few = effort.rounds(150), effort.rounds(25)
    command = [sys.executable, "-m", "benchmarks.start", str(many), str(few)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True)
    small, forks = json.loads(done.stdout)
    yield times_as_long(what, small[OURS], POPEN, small[POPEN], 1.7)
    for peer in (PREEXEC, PROCESSKIT):
        yield times_faster(what, forks[OURS], peer, forks[peer], 40)


def _available() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _after_a_fork(contender: Contender) -> Contender:
    """A fork leaves all our pages to be copied when next written to. The contender that comes after
    it would pay for that, so it gets one turn that does not count."""

    def measure() -> float:
        contender()
        return contender()

    return measure


def _main(many: int, few: int) -> None:
    ballast = mmap.mmap(-1, BALLAST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Small pages, as Python's own heap has them: it does not ask for huge ones.
    ballast.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, BALLAST, mmap.PAGESIZE):
        ballast[offset] = 1
    small = medians({OURS: ours, POPEN: popen}, many, warm_up=5)
    forks = medians({OURS: _after_a_fork(ours), PREEXEC: preexec, PROCESSKIT: kit}, few)
    print(json.dumps([small, forks]))


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
