"""So many trees in one supervisor, in a process of its own: its memory and CPU are theirs.

    many_trees.py PROGRAM --trees N --steady SECONDS --tail BYTES [--now]

Prints one line of JSON: `{"start", "cpu", "end", "memory"}`: seconds until all trees were ready,
the share of one processor that we used while they rested, the seconds until all had ended and were
proved to have, and the growth of our resident memory for each tree in bytes. Fails if anything is
left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import select
import sys
import time
from pathlib import Path

from proctree.supervisor import ChildSpec, Supervisor

DEADLINE = 300.0


def _resident() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _our_children() -> list[str]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [pid for task in tasks for pid in task.read_text(encoding="ascii").split()]


def _check_gone(pidfds: list[int]) -> None:
    poller = select.poll()
    for pidfd in pidfds:
        poller.register(pidfd, select.POLLIN)
    ended = {pidfd for pidfd, _ in poller.poll(0)}
    for pidfd in pidfds:
        os.close(pidfd)
    if len(ended) < len(pidfds):
        sys.exit(f"{len(pidfds) - len(ended)} main processes are left")
    if left := _our_children():
        sys.exit(f"{len(left)} of our children are left: {left[:5]}")


def _warm_up(program: str, tail: int) -> None:
    """What is imported and made once is not a tree's."""
    with Supervisor([ChildSpec("first", [program], tail=tail)]):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("--trees", type=int, default=2000)
    parser.add_argument("--steady", type=float, default=60.0)
    parser.add_argument("--tail", type=int, default=4096)
    parser.add_argument("--now", action="store_true", help="stop_now() instead of stop()")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    _warm_up(arguments.program, arguments.tail)
    descriptors, resident = _descriptors(), _resident()

    began = time.monotonic()
    supervisor = Supervisor(
        [
            ChildSpec(f"tree-{number}", [arguments.program], tail=arguments.tail)
            for number in range(arguments.trees)
        ],
        stop_timeout=DEADLINE,
    )
    try:
        supervisor.start()
        start = time.monotonic() - began

        memory = (_resident() - resident) / arguments.trees
        pids = [child.pid for child in supervisor.children()]
        pidfds = [os.pidfd_open(pid) for pid in pids if pid is not None]
        if len(set(pids)) < arguments.trees or len(pidfds) < arguments.trees:
            sys.exit("not every tree has a main process")

        used = time.process_time()
        time.sleep(arguments.steady)
        cpu = (time.process_time() - used) / arguments.steady

        began = time.monotonic()
        if arguments.now:
            supervisor.stop_now()
        else:
            supervisor.stop()
        if not supervisor.wait(DEADLINE):
            sys.exit(f"not ended within {DEADLINE:g} s")
        end = time.monotonic() - began
    finally:
        supervisor.stop_now()
        supervisor.wait(DEADLINE)
    _check_gone(pidfds)
    if (left := _descriptors() - descriptors) > 0:
        sys.exit(f"{left} descriptors are left")
    print(json.dumps({"start": start, "cpu": cpu, "end": end, "memory": memory}))


if __name__ == "__main__":
    main()
