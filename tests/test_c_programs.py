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
    "channel": ["poll"],
    "numbers": [],
    "options": [],
    "processes": ["openat"],
    "requests": [],
    "trees": ["close", "openat"],
}
"""With the functions that each of them puts its own in front of."""

SKIPPED = 77

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module", params=BUILDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything of the warden is linked to the program, its main() under another name."""
    kind = str(request.param)
    if reason := wardens.unavailable(kind):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(kind)
    sources = wardens.sources()
    if kind == wardens.VALGRIND:
        sources.append(wardens.HERE / "valgrind.c")
    compile_ = ["cc", *FLAGS, *BUILDS[kind], "-Dmain=warden_main", "-c", *map(str, sources)]
    subprocess.run(compile_, cwd=folder, check=True)

    def build_and_run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        wrapped = [f"-Wl,--wrap={function}" for function in PROGRAMS[name]]
        program = folder / name
        command = ["cc", *FLAGS, *BUILDS[kind], *wrapped, "-pthread", "-o", str(program)]
        command += [str(HERE / f"{name}.c"), *map(str, folder.glob("*.o"))]
        subprocess.run(command, check=True)
        return subprocess.run(
            [*RUN[kind], str(program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return build_and_run


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(run: Run, name: str, tmp_path: Path) -> None:
    done = run(name, str(tmp_path))
    if done.returncode == SKIPPED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) > 0
