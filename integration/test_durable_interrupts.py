"""An exception from a signal handler, or a signal, at any bytecode on the way to the handle of a
durable run: see durable_interrupts.py. The run ends with it, or is let go of, as it is to be; the
key is free; and nobody hangs.

By default one of a few bytecodes is tried; with the environment variable PROCTREE_CRASH_POINTS=all
it is every one, which takes three minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.conftest import HERE

STRIDE = 1 if os.environ.get("PROCTREE_CRASH_POINTS") == "all" else 11
LEASED = 3
"""As many times fewer with a database: its transactions take their time."""


@pytest.mark.parametrize("mode", ["kill", "detach", "start", "reconnect", "signal", "keep"])
def test_interrupted_before_there_is_a_handle(tmp_path: Path, mode: str) -> None:
    # Had the way got shorter than that, nothing much would have been interrupted.
    assert interrupt(tmp_path, mode, STRIDE) > 900 // STRIDE


def test_interrupted_with_a_database(tmp_path: Path) -> None:
    assert interrupt(tmp_path, "leased", STRIDE * LEASED) > 2000 // (STRIDE * LEASED)


def interrupt(tmp_path: Path, mode: str, stride: int) -> int:
    """How many times it was."""
    done = subprocess.run(
        [sys.executable, "-m", "integration.durable_interrupts", tmp_path / "store", mode]
        + [str(stride)],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["wrong"] == []
    return int(said["reached"])
