"""What several of these tests need: a C compiler for those that hold the helper's sources against
something, and the settings of hypothesis."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from helper_sources import WARDEN

# No deadline: how long an example takes says nothing on a busy machine. No database: what is found
# belongs into an @example, where everybody has it.
settings.register_profile("proctree", deadline=None, database=None)
settings.load_profile("proctree")

Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`compile_c(source, *more)`: the path of a program made of the C text and of more sources,
    objects or options."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")

    def compile_(source: str, *more: str | Path) -> Path:
        folder = tmp_path_factory.mktemp("c")
        text, program = folder / "main.c", folder / "main"
        text.write_text(source)
        command = [compiler, "-std=gnu99", "-Wall", "-Wextra", "-Werror", "-g", "-I", str(WARDEN)]
        command += [str(text), *map(str, more), "-o", str(program)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return program

    return compile_
