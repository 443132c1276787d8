"""Runs the examples of the pages, so that what a page shows is what happens.

A `python` block is a program of its own. When the next block is a `text` block, that is what it
has to print (standard output and standard error together). In a `console` block the lines that
begin with `$ ` are commands, those with `> ` go on with one, and the others are what they print.
`...` stands for anything. Blocks of other kinds, `sh` for one, are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 30.0
"""Seconds that one example may take."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """A program and what it prints; None: it is not said."""

    line: int
    kind: str
    program: str
    expected: str | None


def parse(text: str) -> Iterator[Example]:
    """The examples of one page, in order."""
    blocks = list(_FENCE.finditer(text))
    for block, after in zip_longest(blocks, blocks[1:]):
        line = text.count("\n", 0, block.start()) + 1
        kind, body = block.groups()
        if kind == "python":
            expected = after[2] if after is not None and after[1] == "text" else None
            yield Example(line, kind, body, expected)
        elif kind == "console":
            yield _console(line, body)


def _console(line: int, body: str) -> Example:
    commands, expected = [], []
    for text in body.splitlines():
        if text.startswith(("$ ", "> ")):
            commands.append(text[2:])
        else:
            expected.append(text + "\n")
    return Example(line, "console", "\n".join(commands), "".join(expected))


def _matches(expected: str, got: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, got.strip(), re.DOTALL) is not None


def _run(example: Example, folder: str) -> tuple[int, str]:
    paths = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    arguments = ["sh", "-c", example.program]
    if example.kind == "python":
        program = Path(folder, "example.py")
        program.write_text(example.program)
        arguments = [sys.executable, str(program)]
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=dict(os.environ) | {"PATH": paths, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, done.stdout


def failures(page: Path) -> Iterator[str]:
    """Runs the examples of a page; one text for each that does something else."""
    for example in parse(page.read_text()):
        where = f"{page.name}:{example.line}"
        with tempfile.TemporaryDirectory() as folder:
            try:
                status, got = _run(example, folder)
            except subprocess.TimeoutExpired:
                yield f"{where}: the example did not end within {TIMEOUT:g} s"
                continue
        if example.kind == "python" and status != 0:
            yield f"{where}: the example failed:\n{got}"
        elif example.expected is not None and not _matches(example.expected, got):
            yield f"{where}: the example printed:\n{got}\nand not:\n{example.expected}"


if __name__ == "__main__":
    here = Path(__file__).parent
    found = [
        failure
        for page in (here.parent / "README.md", *sorted(here.glob("*.md")))
        for failure in failures(page)
    ]
    print("\n".join(found) or "every example does what its page says")
    sys.exit(bool(found))
