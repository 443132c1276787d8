"""Wardens that watch themselves: the same sources, built so that a mistake in memory or arithmetic
is reported, wherever the tests happen to come upon it.

* ``sanitized``: with AddressSanitizer and UndefinedBehaviorSanitizer, which end the process;
* ``valgrind``: under memcheck, which also knows what was never written. It turns the vfork of the
  main process into a fork, so that the failure of an execve(2) is not reported.

Both use the libc: neither tool can look into a program without one.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "src" / "warden"
"""Not there where only the tests have been copied to."""

INSTALLED, SANITIZED, VALGRIND = "installed", "sanitized", "valgrind"
NAMES = (INSTALLED, SANITIZED, VALGRIND)

FLAGS = ("-std=gnu99", "-g", "-O1", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
STATIC = ("-static-libasan", "-static-libubsan")
"""For gcc, whose libraries are shared otherwise, and then libubsan writes to stderr whatever it is
told: nobody reads that. With clang they are always static."""

SCRIPT = """#!/bin/sh
exec {valgrind} --quiet --vgdb=no --error-exitcode=99 --log-file={reports}/valgrind.%p {warden} "$@"
"""


@dataclass(frozen=True)
class Build:
    folder: Path

    @property
    def path(self) -> str:
        """For the variable PROCTREE_WARDEN."""
        return str(self.folder / "warden")

    @property
    def reports(self) -> Path:
        return self.folder / "reports"

    def take_reports(self) -> str:
        """What has been reported since the last time. Under valgrind each process makes a file."""
        texts = []
        for file in sorted(self.reports.iterdir()):
            texts.append(file.read_text(errors="replace"))
            file.unlink()
        return "\n".join(filter(None, texts))

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def compiler() -> str:
    return next((name for name in ("gcc", "clang") if shutil.which(name)), "")


def unavailable(name: str) -> str:
    """Why it cannot be built here, or nothing."""
    if name == INSTALLED:
        return ""
    missing = [] if compiler() else ["gcc or clang"]
    if name == VALGRIND and shutil.which("valgrind") is None:
        missing.append("valgrind")
    if name == VALGRIND and platform.machine() != "x86_64":
        missing.append("x86-64 processor")  # valgrind.c is written for it
    if not SOURCES.is_dir():
        missing.append(str(SOURCES))
    return f"there is no {', '.join(missing)}" if missing else ""


def sources(folder: Path = SOURCES) -> list[Path]:
    """All but the one that takes the place of a libc."""
    return [path for path in sorted(folder.glob("*.c")) if path.name != "freestanding.c"]


def build(name: str, source: Path = SOURCES) -> Build:
    folder = Path(tempfile.mkdtemp(prefix=f"proctree-{name}-"))
    made = Build(folder)
    # A warden may belong to anybody, and report as anybody.
    folder.chmod(0o755)
    made.reports.mkdir()
    made.reports.chmod(0o1777)
    try:
        if name == SANITIZED:
            extra = [HERE / "sanitizers.c", f'-DREPORTS="{made.reports}"', *SANITIZE]
            extra += ["-Wl,--wrap=sigprocmask", *(STATIC if compiler() == "gcc" else ())]
            _compile(source, folder / "warden", extra)
        else:
            extra = [HERE / "valgrind.c", "-Wl,--wrap=syscall"]
            _compile(source, folder / "watched", extra)
            script = SCRIPT.format(
                valgrind=shutil.which("valgrind"), reports=made.reports, warden=folder / "watched"
            )
            (folder / "warden").write_text(script)
            (folder / "warden").chmod(0o755)
    except BaseException:
        made.remove()
        raise
    return made


def _compile(source: Path, program: Path, extra: Sequence[str | Path]) -> None:
    command = [compiler(), *FLAGS, "-I", source, *sources(source), *extra, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{os.fspath(program)} cannot be built:\n{done.stderr}")
