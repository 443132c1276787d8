"""`scripts/analyze`, a part of `make lint`, fails when an analyzer finds something."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ANALYZE = Path(__file__).resolve().parent.parent / "scripts" / "analyze"

CLEAN = "int twice(int value);\nint twice(int value) { return 2 * value; }\n"

USE_AFTER_FREE = """
#include <stdlib.h>
int last(int value);
int last(int value)
{
    int *copy = malloc(sizeof *copy);
    if (!copy)
        return 0;
    *copy = value;
    free(copy);
    return *copy;
}
"""

CONVERSION = "char small(long value);\nchar small(long value) { return value; }\n"


@pytest.mark.parametrize(
    ("tool", "source", "finding"),
    [
        ("gcc", USE_AFTER_FREE, "use-after-free"),
        ("gcc", CONVERSION, "conversion"),
        ("gcc", CLEAN, ""),
        ("clang", USE_AFTER_FREE, "unix.Malloc"),
        ("clang", CLEAN, ""),
    ],
    ids=["gcc-analyzer", "gcc-warning", "gcc-clean", "clang-analyzer", "clang-clean"],
)
def test_each_analyzer_finds_it(tool: str, source: str, finding: str, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "dirname", "getconf", "find", "sort", "xargs", tool):
        (tools / name).symlink_to(str(shutil.which(name)))
    code = tmp_path / "code"
    code.mkdir()
    (code / "clean.c").write_text(CLEAN)
    (code / "other.c").write_text(source)
    done = subprocess.run(
        [ANALYZE, code], capture_output=True, text=True, check=False, env={"PATH": str(tools)}
    )
    assert (done.returncode != 0) == bool(finding), done.stderr
    assert finding in done.stderr
    other = "no clang" if tool == "gcc" else "no gcc"
    # Only one that has found nothing is followed by the next.
    assert (other in done.stderr) == (tool == "clang" or not finding)
