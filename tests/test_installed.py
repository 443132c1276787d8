"""What is installed is what is promised."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from pathlib import Path

import proctree

PACKAGE = Path(proctree.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "proctree-supervisor"


def test_the_version_is_the_same_everywhere():
    versions = {
        importlib.metadata.version(DISTRIBUTION),
        *re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M),
        *re.findall(r"^  version: '(.+)'", (ROOT / "meson.build").read_text(), re.M),
    }
    assert versions == {proctree.__version__}


def test_what_is_required():
    """The package with the system's bindings is never needed, only welcome."""
    required = importlib.metadata.requires(DISTRIBUTION) or []
    always = {re.split(r"\W", line)[0] for line in required if "extra ==" not in line}
    assert always == {"attrs", "msgspec", "psutil", "structlog"}


def test_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_helper_is_beside_the_package():
    helper = PACKAGE / "proctree-warden"
    assert os.access(helper, os.X_OK)
    assert helper.read_bytes()[:4] == b"\x7fELF"


def test_the_helper_refuses_to_run_by_itself():
    """It is installed where nobody looks for commands, but somebody may find it."""
    done = subprocess.run([PACKAGE / "proctree-warden"], capture_output=True)
    assert done.returncode != 0


def test_everything_that_is_promised_is_there():
    assert set(proctree.__all__) <= set(dir(proctree)) | set(proctree._LAZY)
    for name in proctree.__all__:
        assert getattr(proctree, name) is not None
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="proctree")
    assert callable(command.load())
