"""Making system calls fail with strace(1)."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ATTACH_SECONDS = 30.0


class Fault(NamedTuple):
    """One system call that fails.

    Attributes:
        call: its name.
        error: the name of the errno.
        nth: which invocation, counted from 1 for each thread that is traced.
        onwards: whether all later ones fail too.
    """

    call: str
    error: str
    nth: int
    onwards: bool = False

    @property
    def expression(self) -> str:
        """For `strace -e inject=`."""
        return f"{self.call}:error={self.error}:when={self.nth}{'+' if self.onwards else ''}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """What `str` made."""
        match = re.fullmatch(r"(\w+)=(\w+)@(\d+)(\+?)", text)
        if match is None:
            raise ValueError(f"not a fault: {text!r}")
        return cls(match[1], match[2], int(match[3]), bool(match[4]))

    def __str__(self) -> str:
        return f"{self.call}={self.error}@{self.nth}{'+' if self.onwards else ''}"


class Delay(NamedTuple):
    """A system call that takes its time to come back, when it has done what it does.

    Attributes:
        call: its name.
        seconds: how long.
    """

    call: str
    seconds: float

    @property
    def expression(self) -> str:
        """For `strace -e inject=`."""
        return f"{self.call}:delay_exit={round(self.seconds * 1e6)}"


_ENTRY = re.compile(r"^(?:(\d+) +)?([a-z_0-9]+)(\(.*)", re.MULTILINE)


def invocations(log: Path) -> list[dict[str, list[str]]]:
    """For each thread that was traced, and each call, its invocations as strace shows them."""
    found: dict[str, dict[str, list[str]]] = {}
    for pid, call, line in _ENTRY.findall(log.read_text(errors="replace")):
        found.setdefault(pid, {}).setdefault(call, []).append(line)
    return list(found.values())


def injected(log: Path) -> list[str]:
    """The calls that were made to fail, as strace shows them."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return [line for line in text.splitlines() if "(INJECTED)" in line]


@contextlib.contextmanager
def attached(
    task: int | list[int],
    log: Path,
    calls: str,
    fault: Fault | Delay | None,
    *,
    follow: bool = False,
) -> Iterator[None]:
    """Traces one thread, or several; with `follow` its whole process, and what that forks."""
    tasks = [task] if isinstance(task, int) else task
    command = ["strace", "-y", "-o", str(log), "-e", f"trace={calls}"]
    command += [f"--attach={task}" for task in tasks]
    command += ["-f"] if follow else []
    command += ["-e", f"inject={fault.expression}"] if fault else []
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert strace.stderr is not None
    try:
        said = ""
        while said.count(" attached") < len(tasks):
            line = strace.stderr.readline()
            said += line
            assert line, f"strace did not attach: {said}"
        yield
    finally:
        # It detaches when it is asked to end; it may have ended with its tracee.
        strace.terminate()
        strace.stderr.close()
        strace.wait(ATTACH_SECONDS)
