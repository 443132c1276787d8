"""The short form of the soak; the long one is `make soak`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TREES = 60


@pytest.mark.timeout(300)
def test_many_trees_with_random_faults(containment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "integration.soak", "--trees", str(TREES)]
        + ["--containment", containment],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-3000:]
    assert f", {TREES} trees," in done.stdout
    assert "explanations): 0" in done.stdout
