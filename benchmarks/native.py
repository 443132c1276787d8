"""The small C programs that are measured, compiled when they are first needed.

Python would be too slow for what some of them do (1000 forks, gigabytes a second), and too
imprecise for the others.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent / "programs"


@functools.cache
def scratch() -> Path:
    """A temporary directory; it is removed when the interpreter exits."""
    return Path(_directory().name)


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="proctree-benchmarks-")


@functools.cache
def program(name: str) -> str:
    """The path of the compiled program."""
    path = str(scratch() / name)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    subprocess.run([*compiler, "-O2", "-o", path, str(_SOURCES / f"{name}.c")], check=True)
    return path
