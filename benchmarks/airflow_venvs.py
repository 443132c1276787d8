"""Airflow, each version in a virtual environment of its own, which is made when it is first needed.

They are kept under `build/`: installing one takes a minute or two.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

CURRENT = "3.3.2"
"""Its triggerer's channel was rebuilt around one task that reads."""
OLD = "3.2.1"
"""The version of the bug reports."""

_PLACE = Path(__file__).parents[1] / "build"


@functools.cache
def python(version: str) -> str:
    """The interpreter of an environment with this version of Airflow.

    Raises:
        subprocess.CalledProcessError: it cannot be installed here.
    """
    place = _PLACE / f"airflow-{version}"
    interpreter = place / "bin" / "python"
    if not (place / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [interpreter, "-m", "pip", "install", "--quiet"]
        packages = [f"apache-airflow=={version}", "asgiref", "greenback", "msgspec"]
        subprocess.run([*pip, *packages], check=True, stdout=subprocess.DEVNULL)
        (place / ".installed").touch()
    return str(interpreter)
