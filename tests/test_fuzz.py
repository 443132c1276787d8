"""The parsers of the warden and the channel's server, given what nobody would think of. `make fuzz`
does it for longer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import fuzzing
import proctree
from helper_sources import WARDEN

RUNS = {"children": 5_000, "options": 8_000, "request": 50_000, "stat": 12_000, "texts": 50_000}

C_TARGETS = sorted(set(fuzzing.SEEDS) - set(fuzzing.PYTHON_SEEDS))


@pytest.fixture(scope="module")
def libfuzzer() -> None:
    if reason := fuzzing.libfuzzer():
        pytest.skip(reason)


def fuzz(
    target: str, folder: Path, runs: int, warden: Path = WARDEN
) -> subprocess.CompletedProcess[str]:
    """The same inputs each time: what is found here is not a matter of luck."""
    program, corpus = folder / target, folder / "corpus"
    fuzzing.build(target, program, fuzzer=True, warden=warden)
    fuzzing.write_seeds(target, corpus)
    return subprocess.run(
        fuzzing.command(target, program, corpus, folder, f"-runs={runs}", "-seed=1"),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        start_new_session=True,  # its symbolizer outlives it, and in its own session nobody minds
    )


@pytest.mark.parametrize("target", C_TARGETS)
def test_nothing_breaks_it(libfuzzer: None, target: str, tmp_path: Path) -> None:
    done = fuzz(target, tmp_path, RUNS[target])
    found = {path.name: path.read_bytes() for path in tmp_path.glob(f"{target}-*")}
    assert done.returncode == 0, f"{found}\n{done.stderr[-5000:]}"
    assert f"Done {RUNS[target]} runs" in done.stderr


@pytest.mark.parametrize("target", C_TARGETS if fuzzing.libfuzzer() else ["children"])
def test_the_seeds_by_any_compiler(target: str, tmp_path: Path) -> None:
    """All of them where there is no libFuzzer, which begins with them."""
    fuzzing.build(target, tmp_path / target, fuzzer=False)
    seeds = fuzzing.write_seeds(target, tmp_path / "corpus")
    done = subprocess.run(
        [tmp_path / target, *seeds], capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(seeds)


MISTAKES = {
    "children": ("tree.c", "text + held, sizeof text - held", "text + held, sizeof text"),
    "options": ("options.c", "i < room", "i <= room"),
    "request": ("request.c", "stage_count > PROTOCOL_STAGES_MAX", "stage_count > 9"),
    "stat": ("proc.c", "close + 3 > end", "close + 1 > end"),
    "texts": ("proc.c", "(size_t)(end - at) > size && ", ""),
}
"""One for each target: a file, what stands in it, and what somebody could have written instead."""


@pytest.mark.parametrize("target", MISTAKES)
def test_a_mistake_is_found(libfuzzer: None, target: str, tmp_path: Path) -> None:
    name, right, wrong = MISTAKES[target]
    folder = tmp_path / "src" / "warden"
    shutil.copytree(WARDEN, folder)
    text = (folder / name).read_text()
    assert text.count(right) == 1
    (folder / name).write_text(text.replace(right, wrong))
    done = fuzz(target, tmp_path, RUNS[target], folder)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr or "does not hold" in done.stderr


# -- The same in Python.

PYTHON_RUNS = {"channel_frames": 8_000, "channel_served": 1_200, "notification": 3_000}


@pytest.fixture(scope="module")
def atheris() -> None:
    if reason := fuzzing.atheris():
        pytest.skip(reason)


MISTAKE_TIMES = 20
"""How many times as many runs a mistake may take: what threads do is no seed's to say, and it is
over when the mistake is found."""


def fuzz_python(
    target: str, folder: Path, package: Path | None = None
) -> subprocess.CompletedProcess[str]:
    fuzzing.write_seeds(target, folder / "corpus")
    times = 1 if package is None else MISTAKE_TIMES
    how = f"-runs={times * PYTHON_RUNS[target]}", "-seed=1"
    return subprocess.run(
        fuzzing.command(target, Path(), folder / "corpus", folder, *how),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | ({} if package is None else {"PYTHONPATH": str(package)}),
        timeout=100,
        start_new_session=True,
    )


@pytest.mark.parametrize("target", fuzzing.PYTHON_SEEDS)
def test_nothing_breaks_what_is_in_python(atheris: None, target: str, tmp_path: Path) -> None:
    done = fuzz_python(target, tmp_path)
    found = {path.name: path.read_bytes() for path in tmp_path.glob(f"{target}-*")}
    assert done.returncode == 0, f"{found}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    assert f"Done {PYTHON_RUNS[target]} runs" in done.stderr


PYTHON_MISTAKES = {
    "channel_frames": (
        "channel/frames.py",
        "kept = min(length, HEAD) if length > max_frame else",
        "kept =",
    ),
    "channel_served": (
        "channel/frames.py",
        "(msgspec.DecodeError, UnicodeDecodeError, ",
        "(msgspec.DecodeError, ",
    ),
    "notification": (
        "supervisor/notification.py",
        '.decode("ascii", "replace")',
        '.decode("ascii")',
    ),
}


@pytest.mark.parametrize("target", PYTHON_MISTAKES)
def test_a_mistake_in_python_is_found(atheris: None, target: str, tmp_path: Path) -> None:
    name, right, wrong = PYTHON_MISTAKES[target]
    shutil.copytree(Path(proctree.__file__).parent, tmp_path / "package" / "proctree")
    source = tmp_path / "package" / "proctree" / name
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    done = fuzz_python(target, tmp_path, tmp_path / "package")
    assert done.returncode != 0
    assert "Uncaught Python exception" in done.stdout + done.stderr
