"""command: wall time of `proctree run -- true`, from outside.

Beside it: an interpreter that does nothing, one that imports what proctree depends on, and
processkit's command.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.table import Row, milliseconds, times_as_long
from benchmarks.timing import Effort, medians, timed

LIMIT = 0.060
OURS = "proctree run -- true"
PYTHON = "python -c pass"
IMPORTS = "python importing our dependencies"
PROCESSKIT = "processkit run -- true"


def measure(effort: Effort) -> Iterator[Row]:
    scripts = Path(sys.executable).parent
    commands = {
        OURS: [str(scripts / "proctree"), "run", "--", "true"],
        PYTHON: [sys.executable, "-c", "pass"],
        IMPORTS: [sys.executable, "-c", "import psutil, attrs, structlog"],
        PROCESSKIT: [str(scripts / "processkit"), "run", "--", "true"],
    }

    def run(argv: list[str]) -> None:
        subprocess.run(argv, check=True)

    contenders = {name: timed(lambda argv=argv: run(argv)) for name, argv in commands.items()}
    results = medians(contenders, effort.rounds(30), warm_up=2)
    ours = results[OURS]
    yield Row(OURS, milliseconds(ours), target=f"<= {milliseconds(LIMIT)}", met=ours <= LIMIT)
    for peer in (PYTHON, IMPORTS, PROCESSKIT):
        yield times_as_long(OURS, ours, peer, results[peer], None)
