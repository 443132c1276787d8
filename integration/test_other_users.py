"""The same results for a user without any privilege."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOBODY = 65534

PACKAGES = ["proctree-supervisor", "attrs", "msgspec", "psutil", "structlog"]
PACKAGES += ["pytest", "pytest-timeout", "pluggy", "iniconfig", "packaging", "pygments"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def as_nobody(argv: list[str]) -> list[str]:
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", *argv]


def interpreter() -> str:
    """One that this user can run: ours may lie under a home that is closed to others."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        # json and select: what is frozen into the interpreter proves nothing about its library.
        code = "import json, select, sys; sys.exit(sys.version_info < (3, 11))"
        # Through a shell: setpriv itself still has root's privileges when it executes a program.
        check = as_nobody(["sh", "-c", 'exec "$0" -c "$1"', candidate, code])
        if subprocess.run(check, capture_output=True, check=False).returncode == 0:
            return candidate
    pytest.skip("no Python >= 3.11 that an unprivileged user can run")


def copy_packages(packages: list[str], site: Path) -> None:
    """Installed packages, to where everybody can read them."""
    for package in packages:
        for file in importlib.metadata.files(package) or []:
            source = Path(str(file.locate()))
            if ".." not in file.parts and source.is_file():
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, site / file)


def open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """Everything that the tests need."""
    folder = Path(tempfile.mkdtemp(prefix="proctree-nobody-"))
    copy_packages(PACKAGES, folder / "site")
    shutil.copytree(HERE, folder / "tree" / "integration", ignore=shutil.ignore_patterns("__py*"))
    shutil.copy2(HERE.parent / "conftest.py", folder / "tree")
    shutil.copy2(HERE.parent / "pyproject.toml", folder / "tree")
    open_to_all(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["endings", "supervisor_death", "warden_faults"])
def test_the_same_results(copy: Path, name: str) -> None:
    home = copy / f"home-{name}"
    home.mkdir()
    home.chmod(0o777)
    done = subprocess.run(
        as_nobody(
            [interpreter(), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
            + [f"--basetemp={home}/tmp", f"integration/test_{name}.py"]
        ),
        cwd=copy / "tree",
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(copy / "site"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(home),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("is not writable for us" in line for line in skipped), skipped
