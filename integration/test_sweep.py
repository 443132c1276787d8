"""What a crash of everything that held a tree leaves behind, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import proctree
from integration.conftest import (
    DEADLINE,
    available,
    eventually,
    is_alive,
    living,
    start_supervisor,
)
from integration.test_endings import end, start
from proctree.command import TREE_VARIABLE
from proctree.process import cgroups, proof
from proctree.process.sweep import Search, resume

CODE = """
import os, signal, sys
import proctree

script = f"setsid {sys.argv[1]} ignore & {sys.argv[1]} daemonise; exec {sys.argv[1]} ignore"
handle = proctree.WatchedSubprocess.start(
    ["sh", "-c", script], containment=sys.argv[2], stdout=2, name="the crashed"
)
contained = handle._tree.contained
cgroup = getattr(contained, "cgroup", None)
os.write(1, f"{handle.tree_id} {contained.root()} {handle.pid} {cgroup}\\n".encode())
signal.pause()
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A registry of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "proctree"


class Crashed(NamedTuple):
    tree_id: str
    main: int
    cgroup: Path | None
    left: set[int]


def members(tree_id: str) -> set[int]:
    """Every living process with that mark, which nothing in these trees takes off."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit() and is_alive(int(name)):
            environ = proof.read_environ(int(name)) or b""
            if proof.in_environ(environ, TREE_VARIABLE.encode(), tree_id.encode()):
                found.add(int(name))
    return found


def state_of(pid: int) -> str | None:
    stat = proof.read_stat(pid)
    return None if stat is None else stat.state


def crash(actors: str, containment: str) -> Crashed:
    """Ends a supervisor and, where there is one, its warden, so that neither sees the other go."""
    available(containment)
    reader, writer = os.pipe()
    supervisor = start_supervisor(CODE, actors, containment, stderr=writer)
    os.close(writer)
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    with open(reader) as said:
        lines = [said.readline() for _ in range(3)]
    assert lines.count("ready\n") == 2, lines
    tree_id, root, main, cgroup = supervisor.stdout.readline().split()
    warden = None if containment == "group" else int(root)
    pids = [supervisor.pid] if warden is None else [supervisor.pid, warden]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: all(state_of(pid) == "T" for pid in pids), "they stop")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    supervisor.wait()
    supervisor.stdin.close()
    supervisor.stdout.close()
    # PR_SET_PDEATHSIG takes the main process along, and nothing else.
    eventually(lambda: not is_alive(int(main)), "main ends")
    left = members(tree_id)
    assert len(left) == 2
    return Crashed(tree_id, int(main), None if cgroup == "None" else Path(cgroup), left)


@contextlib.contextmanager
def witness(mark: str | None, program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    env = dict(os.environ)
    if mark is not None:
        env[TREE_VARIABLE] = mark
    with subprocess.Popen([program, *arguments], env=env, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["call", "command"])
@pytest.mark.parametrize("containment", ["warden", "cgroup", "group"])
def test_exactly_that_is_ended(actors: str, folder: Path, containment: str, how: str) -> None:
    """The same user, the same program, and marks that look like those of the tree."""
    crashed = crash(actors, containment)
    tree_id = crashed.tree_id
    # One digit other, one more, one less, in another case, and of another tree altogether.
    marks = [tree_id[:-1] + ("0" if tree_id[-1] != "0" else "1"), tree_id + "0", tree_id[:-1]]
    marks += ["0123456789abcdef", f"{tree_id}x/{tree_id}y"]
    if tree_id.upper() != tree_id:  # one of digits only has no other case
        marks.append(tree_id.upper() + "/x")
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(witness(mark, actors, "ignore")) for mark in marks]
        others.append(stack.enter_context(witness(None, actors, "ignore")))
        assert (folder / tree_id).exists()
        if how == "call":
            (swept,) = proctree.sweep()
            assert (swept.tree_id, swept.name) == (tree_id, "the crashed")
            assert {member.pid for member in swept.ended} == crashed.left
            assert swept.survivors == ()
        else:
            done = subprocess.run(
                [sys.executable, "-m", "proctree.cli", "sweep"],
                capture_output=True,
                text=True,
                timeout=100,
                check=True,
            )
            said = sorted(done.stdout.splitlines())
            prefix = f"the crashed (tree {tree_id}): ended pid "
            assert said == sorted(f"{prefix}{pid} actors" for pid in crashed.left)
        assert not any(is_alive(pid) for pid in crashed.left)
        assert not (folder / tree_id).exists()
        assert crashed.cgroup is None or not crashed.cgroup.exists()
        assert all(other.poll() is None for other in others)
    assert proctree.sweep() == []


def test_without_its_marks_it_is_still_in_its_cgroup(actors: str, folder: Path) -> None:
    """What took the mark off, left its session and lost its parents."""
    available("cgroup")
    script = f"env -i {actors} daemonise; env -i setsid {actors} ignore & exec {actors} ignore"
    code = CODE.replace('script = f"setsid', f'script = "{script}"; _ = f"setsid')
    reader, writer = os.pipe()
    supervisor = start_supervisor(code, actors, "cgroup", stderr=writer)
    os.close(writer)
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    with open(reader) as said:
        assert sum(said.readline() == "ready\n" for _ in range(3)) == 2
    tree_id, root, main, cgroup = supervisor.stdout.readline().split()
    for signo in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (supervisor.pid, int(root)):
            os.kill(pid, signo)
    supervisor.wait()
    supervisor.stdin.close()
    supervisor.stdout.close()
    eventually(lambda: not is_alive(int(main)), "main ends")
    assert members(tree_id) == set()
    left = set(cgroups.pids_in(cgroup))
    assert len(left) == 2
    (swept,) = proctree.sweep()
    assert {member.pid for member in swept.ended} == left
    assert not Path(cgroup).exists()
    assert not living()


def test_two_sweeps_at_once(actors: str) -> None:
    """Each tree is swept by one of them, and both return."""
    crashed = [crash(actors, "warden") for _ in range(3)]
    swept: list[proctree.Swept] = []
    barrier = threading.Barrier(2)

    def work() -> None:
        barrier.wait()
        swept.extend(proctree.sweep())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    proctree.sweep()  # what both had left to each other; there is no such thing
    assert sorted(tree.tree_id for tree in swept) == sorted(tree.tree_id for tree in crashed)
    assert {m.pid for tree in swept for m in tree.ended} == set().union(*(c.left for c in crashed))
    assert not living()


def test_trees_that_run_are_not_touched(actors: str, containment: str, folder: Path) -> None:
    script = f"setsid {actors} ignore & exec {actors} counter"
    handle, lines = start(["sh", "-c", script], containment)
    lines.wait_for(2)
    assert (folder / handle.tree_id).exists()
    for _ in range(3):
        assert proctree.sweep() == []
    assert (folder / handle.tree_id).exists()
    assert len(handle.processes()) == 2
    handle.signal(signal.SIGUSR1, scope="main")
    assert lines.wait_for(3)[2] == "0"  # it has had no signal before
    end(handle)
    assert not (folder / handle.tree_id).exists()


@pytest.mark.parametrize("containment", ["warden", "cgroup"])
def test_a_tree_whose_supervisor_is_gone_is_its_wardens(actors: str, containment: str) -> None:
    """However long it takes for that: no sweep cuts it short while the warden lives."""
    available(containment)
    reader, writer = os.pipe()
    supervisor = start_supervisor(CODE, actors, containment, stderr=writer)
    os.close(writer)
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    with open(reader) as said:
        assert sum(said.readline() == "ready\n" for _ in range(3)) == 2
        tree_id, root, main, _ = supervisor.stdout.readline().split()
        os.kill(int(root), signal.SIGSTOP)
        supervisor.kill()
        supervisor.wait()
        before = members(tree_id) - {int(root)}
        assert len(before) == 3
        assert proctree.sweep() == []
        assert members(tree_id) - {int(root)} == before
        os.kill(int(root), signal.SIGKILL)
    supervisor.stdin.close()
    supervisor.stdout.close()
    eventually(lambda: not is_alive(int(main)), "main ends with its warden")
    (swept,) = proctree.sweep()
    assert {member.pid for member in swept.ended} == before - {int(main)}
    assert not living()


def test_a_number_that_is_a_strangers_by_now(actors: str, folder: Path) -> None:
    """The entry says which process had it: another start time is another process."""
    crashed = crash(actors, "warden")
    file = folder / crashed.tree_id
    lines = file.read_text().split("\n")
    (main,) = (line for line in lines if line.startswith("main "))
    ticks = os.sysconf("SC_CLK_TCK")
    eventually(
        lambda: time.clock_gettime(time.CLOCK_BOOTTIME) * ticks > int(main.split()[2]) + 1,
        "whoever starts now has another start time",
    )
    with witness(None, "setsid", actors, "ignore") as stranger:
        stat = proof.read_stat(stranger.pid)
        assert stat is not None
        assert main.split()[2] != str(stat.start_time)
        assert main.split()[1] == str(crashed.main)
        reused = main.replace(f" {crashed.main} ", f" {stranger.pid} ")
        file.write_text("\n".join(reused if line == main else line for line in lines))
        (swept,) = proctree.sweep()
        assert {member.pid for member in swept.ended} == crashed.left
        assert stranger.poll() is None


def test_only_members_are_resumed(actors: str) -> None:
    """By their mark, or as one that is known and still the same."""
    tree_id = "0123456789abcdef"
    with (
        witness(tree_id, actors, "pause") as marked,
        witness(None, actors, "pause") as known,
        witness(None, actors, "pause") as other,
        witness("fedcba9876543210", actors, "pause") as stranger,
    ):
        everybody = (marked, known, other, stranger)
        for process in everybody:
            process.send_signal(signal.SIGSTOP)
            eventually(lambda pid=process.pid: state_of(pid) == "T", "it is stopped")
        starts = {process.pid: proof.read_stat(process.pid).start_time for process in everybody}
        search = Search(None, -1, None, min(starts.values()), tree_id)
        resume(search, {(known.pid, starts[known.pid]), (other.pid, starts[other.pid] - 1)})
        eventually(lambda: state_of(marked.pid) == state_of(known.pid) == "S", "they go on")
        assert state_of(other.pid) == state_of(stranger.pid) == "T"
