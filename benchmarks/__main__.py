"""`python -m benchmarks`: runs them and prints the table. Exit status 1: a target was missed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator

from benchmarks import (
    aio,
    bomb,
    capture,
    channel,
    command,
    detection,
    durable,
    exiting,
    functions,
    idle,
    isolation,
    killing,
    lines,
    many,
    start,
    table,
)
from benchmarks.timing import Effort

BENCHMARKS: dict[str, Callable[[Effort], Iterator[table.Row]]] = {
    "start": start.measure,
    "start-2gb": start.measure_big,
    "functions": functions.measure,
    "containments": start.measure_containments,
    "kill-1000": killing.measure,
    "bomb": bomb.measure,
    "capture": capture.measure,
    "lines": lines.measure,
    "exit": exiting.measure,
    "detection": detection.measure,
    "command": command.measure,
    "idle": idle.measure,
    "channel": channel.measure,
    "aio": aio.measure,
    "many": many.measure,
    "isolation": isolation.measure,
    "durable": durable.measure,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=list(BENCHMARKS), metavar="NAME", help="run just this"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rougher numbers")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    # As an exception, so that temporary files and cgroups are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    effort = Effort(arguments.quick)
    missed = 0
    print(table.heading(), flush=True)
    for name in arguments.only or BENCHMARKS:
        for row in BENCHMARKS[name](effort):
            print(table.line(row), flush=True)
            missed += row.met is False
    if missed:
        print(f"\n{missed} missed", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
