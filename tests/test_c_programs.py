"""The functions of the warden one by one, by programs in C: each with the sanitizers and once more
under valgrind.

They cover what only C can: a process that ends between two system calls, walks over real trees,
messages and options at their limits.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from integration import wardens

from helper_sources import SANITIZE, WARDEN

HERE = Path(__file__).parent / "c"

FLAGS = ["-std=gnu99", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(WARDEN)]
BUILDS = {wardens.SANITIZED: [*SANITIZE], wardens.VALGRIND: ["-Wl,--wrap=syscall"]}
RUN = {
    wardens.SANITIZED: [],
    wardens.VALGRIND: ["valgrind", "--quiet", "--vgdb=no", "--error-exitcode=99"],
}

PROGRAMS: dict[str, list[str]] = {
    "attributes": [],
    "cgroup": ["write_text"],
    "channel": ["clock_gettime", "poll"],
    "numbers": [],
    "options": [],
    "processes": ["openat"],
    "requests": [],
    "trees": ["close", "openat"],
}
"""With the functions that each of them puts its own in front of."""

CALLS_ONLY = {"attributes", "cgroup"}
"""They are about what the kernel answers, and valgrind would find nothing in them."""

SKIPPED = 77

Program = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Everything of the warden is linked to the program, its main() under another name."""
    folders: dict[str, Path] = {}

    def compiled(kind: str) -> Path:
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        sources = wardens.sources()
        if kind == wardens.VALGRIND:
            sources.append(wardens.HERE / "valgrind.c")
        command = ["cc", *FLAGS, *BUILDS[kind], "-Dmain=warden_main", "-c", *map(str, sources)]
        subprocess.run(command, cwd=folder, check=True)
        return folder

    def linked(kind: str, name: str) -> Path:
        folder = folders[kind] if kind in folders else compiled(kind)
        wrapped = [f"-Wl,--wrap={function}" for function in PROGRAMS[name]]
        command = ["cc", *FLAGS, *BUILDS[kind], *wrapped, "-pthread", "-o", str(folder / name)]
        command += [str(HERE / f"{name}.c"), *map(str, folder.glob("*.o"))]
        subprocess.run(command, check=True)
        return folder / name

    return linked


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in BUILDS
        for name in PROGRAMS
        if kind == wardens.SANITIZED or name not in CALLS_ONLY
    ],
)
def test_program(kind: str, name: str, program: Program, tmp_path: Path) -> None:
    if reason := wardens.unavailable(kind):
        pytest.skip(reason)
    done = subprocess.run(
        [*RUN[kind], str(program(kind, name)), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) > 0
