"""A supervisor that is run so that its system calls can be made to fail: test_syscall_faults.py.

It is told what to do by lines of JSON on its standard input and answers each by one on its standard
output. Between the two lines, and only there, strace(1) may be attached to it. What it needs for
talking it does by readv(2) and writev(2), which are no part of what is tested.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import proctree
from harmed import children as list_children
from harmed import descriptors, entries, failure, hear, listen, say
from proctree import KillPolicy, Stage, WatchedSubprocess
from proctree.containment import group, warden

ACTORS, CONTAINMENT, KIND = sys.argv[1:4]
POLICY = KillPolicy((Stage(15, 0.05), Stage(9, 2.0)))
LEAVE_SECONDS = 15.0
"""How long something that is ending may take to be gone."""

events: list[str] = []


class Scenario:
    """What can be prepared without proctree is made before strace is attached."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reader, self.writer = os.pipe()
        os.set_inheritable(self.writer, True)
        self.handle: WatchedSubprocess | None = None
        self.ready = False

    def _family(self) -> list[str]:
        return [ACTORS, "family", str(self.writer)]

    def _call(self) -> None:
        argv = self._family()
        os.posix_spawn(argv[0], argv, os.environ)
        signal.pause()

    def start(self) -> None:
        target = self._family() if KIND == "command" else self._call
        self.handle = WatchedSubprocess(
            target,
            containment=CONTAINMENT,
            stdout=proctree.CAPTURE,
            stderr=proctree.Lines(self.lines.append),
            stdin=b"in\n",
            pass_fds=[self.writer],
            kill=POLICY,
        )
        self.handle.launch()
        os.close(self.writer)
        self.writer = -1
        # End of file: the tree has ended before it had begun.
        self.ready = os.readv(self.reader, [bytearray(6)]) > 0

    def finish(self) -> dict[str, Any]:
        assert self.handle is not None
        outcome = self.handle.wait()
        assert outcome is not None
        fields = outcome.as_dict()
        return {"outcome": fields, "ready": self.ready, "lines": self.lines}

    def leaf(self) -> str | None:
        """The directory of the tree's cgroup."""
        contained = None if self.handle is None else self.handle._tree.contained
        return getattr(contained, "cgroup", None)

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)


def run_tree(scenario: Scenario) -> dict[str, Any]:
    """A whole life: all that can be asked of a tree."""
    scenario.start()
    handle = scenario.handle
    assert handle is not None
    handle.signal(signal.SIGWINCH, "tree")
    handle.signal(signal.SIGWINCH, "main")
    handle.freeze()
    handle.thaw()
    handle.kill(reason="enough")
    return scenario.finish()


def run_lost(scenario: Scenario) -> dict[str, Any]:
    """What holds the tree is killed."""
    handle = scenario.handle
    assert handle is not None
    root = handle._tree.contained.root()
    assert root is not None
    os.kill(root, signal.SIGKILL)
    return scenario.finish()


def _files(leaf: str | None) -> list[str]:
    """Entries in the registry, which is ours alone here, and the cgroup of the tree."""
    return entries() + ([leaf] if leaf is not None and os.path.isdir(leaf) else [])


def _opened(before: dict[str, str]) -> list[str]:
    found = {fd: name for fd, name in descriptors().items() if fd not in before}
    # The loop's own, which come with the first tree and stay.
    for own in ("anon_inode:[eventpoll]", "anon_inode:[eventfd]"):
        if own not in before.values():
            fd = next((fd for fd, name in found.items() if name == own), None)
            found.pop(fd or "", None)
    return [f"{fd} {name}" for fd, name in found.items()]


def check(before: dict[str, str], leaf: str | None, *, known: bool) -> dict[str, Any]:
    """What was left behind, and whether a next tree is any worse for it. With `known` the outcome
    has said that something is left, and then nobody waits for it to go."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        opened, children, files = _opened(before), list_children(), _files(leaf)
        if not (opened or children or files) or known or time.monotonic() > deadline:
            break
        time.sleep(0.005)  # the loop closes what is late, and tells nobody
    outcome = proctree.run(
        ["/bin/echo", "next"], stdout=proctree.CAPTURE, containment=CONTAINMENT, timeout=30
    )
    return {
        "opened": opened,
        "children": children,
        "files": files,
        "next": "" if outcome.ok and outcome.stdout == b"next\n" else repr(outcome),
    }


def main() -> None:
    # Whatever strace traces ends like this, and there is no second to lose on each.
    warden.TRACER_PAUSE = group.TRACER_PAUSE_FIRST = 0.01
    listen(events)
    warm = "cold" not in sys.argv
    if warm:
        # What is imported and made once is not what is tested here.
        proctree.run(["true"], containment=CONTAINMENT)
        scenario = Scenario()
        run_tree(scenario)
        scenario.close()
        from proctree.process import sweep  # noqa: F401

    before = descriptors()
    while True:
        task = hear()
        os.environ.update(task["environment"])
        events.clear()
        scenario = Scenario()
        answer: dict[str, Any] = {}
        if task["do"] == "lost":
            scenario.start()
        if task["pause"]:
            say({"loop": _loop_thread()})
            hear()
        try:
            answer = run_lost(scenario) if task["do"] == "lost" else run_tree(scenario)
        except (OSError, RuntimeError, MemoryError, proctree.ProctreeError) as error:
            answer = {"error": failure(error)}
        finally:
            scenario.close()
        say(answer)
        hear()
        for name in task["environment"]:
            del os.environ[name]
        outcome = answer.get("outcome", {})
        left = outcome.get("survivors") or "something may be left" in outcome.get("detail", "")
        leaf = scenario.leaf()
        say({**check(before, leaf, known=bool(left)), "leaf": leaf, "events": list(events)})


def _loop_thread() -> int | None:
    from proctree import loop

    return loop.get()._thread.native_id if loop.exists() else None


if __name__ == "__main__":
    main()
