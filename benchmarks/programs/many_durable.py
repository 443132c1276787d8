"""So many durable runs kept by one supervisor, in a process of its own: its memory, CPU and
descriptors are theirs.

    many_durable.py PROGRAM STORE --runs N --steady SECONDS [--follow]

Prints one line of JSON: `{"start", "cpu", "memory", "descriptors"}`: the seconds that a start took
in the middle, the share of one processor that we used while they rested, and the growth of our
resident memory (bytes) and of our open files for each run. Fails if anything is left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

from proctree import KillPolicy, Lines, durable

DEADLINE = 120.0


def _resident() -> int:
    gc.collect()
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _end(runs: list[durable.Run]) -> None:
    for run in runs:
        run.kill(KillPolicy.now())
    for run in runs:
        if run.wait(DEADLINE) is None:
            sys.exit(f"{run!r} has not ended within {DEADLINE:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program")
    parser.add_argument("store")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--steady", type=float, default=30.0)
    parser.add_argument("--follow", action="store_true", help="with a callback for its lines")
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    store = durable.FileStore(arguments.store)
    logs = Lines(lambda _line: None) if arguments.follow else None

    def start(number: int) -> durable.Run:
        key = f"{os.getpid()}-{number}"
        return durable.start(key, [arguments.program], store=store, logs=logs, containment="warden")

    _end([start(0)])  # what is imported and made once is not a run's
    descriptors, resident = _descriptors(), _resident()

    runs: list[durable.Run] = []
    seconds = []
    try:
        for number in range(1, arguments.runs + 1):
            before = time.perf_counter()
            runs.append(start(number))
            seconds.append(time.perf_counter() - before)
        memory = (_resident() - resident) / arguments.runs
        each = (_descriptors() - descriptors) / arguments.runs

        used = time.process_time()
        time.sleep(arguments.steady)
        cpu = (time.process_time() - used) / arguments.steady
    finally:
        _end(runs)
    if (left := _descriptors() - descriptors) > 0:
        sys.exit(f"{left} descriptors are left")
    print(
        json.dumps(
            {
                "start": statistics.median(seconds),
                "cpu": cpu,
                "memory": memory,
                "descriptors": each,
            }
        )
    )


if __name__ == "__main__":
    main()
