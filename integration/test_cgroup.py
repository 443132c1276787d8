"""Trees in a cgroup of their own: who is in it, how it ends, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import proctree
from integration.conftest import (
    QUICK,
    available,
    eventually,
    is_alive,
    living,
    start_supervisor,
)
from integration.test_endings import end, start
from integration.test_hidden import SETUID
from integration.test_other_users import (
    NOBODY,
    PACKAGES,
    as_nobody,
    copy_packages,
    interpreter,
    open_to_all,
)
from integration.test_warden_faults import warden_of
from proctree import KillPolicy, Reason, WatchedSubprocess
from proctree.containment.warden import WARDEN_VARIABLE, warden_path
from proctree.process import cgroups, proof


@pytest.fixture(autouse=True)
def ground(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Our own cgroup, in which no test leaves a leaf, and a registry of the test's own."""
    available("cgroup")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made: list[str] = []
    init = WatchedSubprocess.__init__

    def noting(self: WatchedSubprocess, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(f"{home}/proctree-{self.tree_id}")

    home = Path(cgroups.find_home(cgroups.own_path()).path)
    monkeypatch.setattr(WatchedSubprocess, "__init__", noting)
    yield home
    left = [path for path in made if os.path.isdir(path)]
    for path in left:
        cgroups.end(path, 10.0)
    assert not left
    assert list(tmp_path.glob("proctree/*")) == []


@contextlib.contextmanager
def cgroup_of_our_own(ground: Path, name: str) -> Iterator[Path]:
    path = ground / f"{os.getpid()}-{name}"
    path.mkdir()
    try:
        yield path
    finally:
        assert cgroups.end(str(path), 10.0)


def leaf_of(handle: WatchedSubprocess) -> Path:
    leaf = getattr(handle._tree.contained, "cgroup", None)
    assert leaf is not None
    return Path(leaf)


def cgroup_of(pid: int | str = "self") -> str | None:
    return cgroups.parse_own(Path(f"/proc/{pid}/cgroup").read_text())


OWN = 'while read -r line; do echo "$line"; done </proc/$$/cgroup; '


def leaves(text: str) -> list[str]:
    return [line.rpartition("/")[2] for line in text.split("\n") if line.startswith("0::")]


# -- who is in it


def test_main_and_what_it_forks_are_born_in_the_leaf(ground: Path) -> None:
    """The first thing that it does, and the first thing that it forks."""
    handle = WatchedSubprocess.start(
        ["sh", "-c", OWN + "cat /proc/self/cgroup"], containment="cgroup", stdout=proctree.CAPTURE
    )
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.containment == "cgroup"
    leaf = f"proctree-{handle.tree_id}"
    assert leaf_of(handle) == ground / leaf
    assert leaves((outcome.stdout or b"").decode()) == [leaf, leaf]


def test_a_callable_is_in_the_leaf() -> None:
    def target() -> None:
        os.write(1, Path("/proc/self/cgroup").read_bytes())

    handle = WatchedSubprocess.start(target, containment="cgroup", stdout=proctree.CAPTURE)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert leaves((outcome.stdout or b"").decode()) == [f"proctree-{handle.tree_id}"]


def test_the_warden_is_not_in_it(actors: str) -> None:
    """Or the kernel would end it with its tree."""
    handle, lines = start([actors, "pause"], "cgroup")
    lines.wait_for()
    assert cgroup_of(warden_of(handle)) == cgroup_of()
    assert cgroups.pids_in(str(leaf_of(handle))) == [handle.pid]
    end(handle)


def test_auto_takes_it() -> None:
    if not cgroups.delegated(cgroups.find_home(cgroups.own_path())):
        pytest.skip("our own cgroup is not delegated")
    handle = WatchedSubprocess.start(["true"])
    assert handle.containment == "cgroup"
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.containment == "cgroup"


def test_auto_leaves_alone_what_is_a_managers(ground: Path) -> None:
    """A unit without the mark has one writer, and that is not us; unless we are told to."""
    code = """
import proctree
print(proctree.run(["true"]).containment, proctree.run(["true"], containment="cgroup").containment)
"""

    def run(unit: Path) -> str:
        return subprocess.run(
            ["sh", "-c", f"echo $$ >{unit}/cgroup.procs && exec \"$0\" -c '{code}'"]
            + [sys.executable],
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout

    with cgroup_of_our_own(ground, "test.service") as unit:
        assert run(unit) == "warden cgroup\n"
        try:
            os.setxattr(unit, "user.delegate", b"1")
        except OSError:
            pytest.skip("no extended attributes on cgroups before Linux 5.7")
        assert run(unit) == "cgroup cgroup\n"


# -- how it ends


def test_nothing_of_it_stays_after_a_normal_end() -> None:
    handle = WatchedSubprocess.start(["sh", "-c", "sleep 1000 & true"], containment="cgroup")
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert (outcome.reason, len(outcome.leftovers)) == (Reason.EXITED, 1)
    assert not leaf_of(handle).exists()


def test_nothing_of_it_stays_after_a_kill(actors: str) -> None:
    handle, lines = start(["sh", "-c", f"setsid {actors} ignore & exec {actors} ignore"], "cgroup")
    lines.wait_for(2)
    assert leaf_of(handle).exists()
    outcome = end(handle)
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM, signal.SIGKILL]
    assert [stage.reached for stage in outcome.stages] == [2, 2]
    assert not leaf_of(handle).exists()
    assert not living()


def test_nothing_of_it_stays_after_a_timeout() -> None:
    handle = WatchedSubprocess.start(
        ["sleep", "1000"], containment="cgroup", timeout=0.1, kill=QUICK
    )
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.reason is Reason.TIMEOUT
    assert not leaf_of(handle).exists()


@pytest.mark.parametrize("target", [["/nonexistent/program"], lambda: None], ids=["exec", "chdir"])
def test_nothing_of_it_stays_when_the_start_fails(target: object) -> None:
    cwd = "/nonexistent" if callable(target) else None
    handle = WatchedSubprocess(target, containment="cgroup", cwd=cwd)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        handle.launch()
    assert not leaf_of(handle).exists()
    assert not living()


@pytest.mark.parametrize("how", ["returns", "is killed"])
def test_nothing_of_it_stays_after_a_callable(how: str) -> None:
    def target() -> None:
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        if how == "is killed":
            signal.pause()

    handle = WatchedSubprocess.start(target, containment="cgroup", kill=QUICK)
    outcome = handle.wait(timeout=60) if how == "returns" else end(handle)
    assert outcome is not None
    assert not leaf_of(handle).exists()
    assert not living()


@pytest.mark.parametrize("what", ["command", "callable"])
def test_nothing_of_it_stays_without_a_supervisor(actors: str, what: str) -> None:
    code = """
import os, signal, sys
import proctree
argv = ["sh", "-c", f"env -i setsid {sys.argv[1]} ignore & exec {sys.argv[1]} ignore"]
handle = proctree.WatchedSubprocess.start(
    argv if sys.argv[2] == "command" else lambda: os.execvp(argv[0], argv),
    containment="cgroup", kill=proctree.KillPolicy.after(0.2), stdout=2,
)
os.write(1, handle._tree.contained.cgroup.encode() + b"\\n")
signal.pause()
"""
    reader, writer = os.pipe()
    supervisor = start_supervisor(code, actors, what, stderr=writer)
    os.close(writer)
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    leaf = Path(supervisor.stdout.readline().strip())
    with open(reader) as said:
        assert said.readline() + said.readline() == "ready\nready\n"
        assert len(cgroups.pids_in(str(leaf))) == 2
        supervisor.kill()
        supervisor.wait()
        assert said.read() == ""  # held open by the tree
    supervisor.stdin.close()
    supervisor.stdout.close()
    eventually(lambda: not leaf.exists(), "the warden removes the leaf")
    eventually(lambda: not living(), "everything is gone, the warden too")


def test_nothing_of_it_stays_without_a_warden(actors: str) -> None:
    """What has none of the marks by which a tree is found otherwise is in its cgroup still."""
    script = f"env -i {actors} daemonise; env -i setsid {actors} ignore & exec {actors} ignore"
    handle, lines = start(["sh", "-c", script], "cgroup")
    lines.wait_for(3)
    os.makedirs(leaf_of(handle) / "a" / "b")
    os.kill(warden_of(handle), signal.SIGKILL)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.reason is Reason.WARDEN_LOST
    assert outcome.survivors == ()
    assert not leaf_of(handle).exists()
    eventually(lambda: not living(), "everything is gone")


# -- cgroups that the tree makes


def make_nest(leaf: Path, depth: int) -> None:
    """Deeper than any path may be long."""
    at = os.open(leaf, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("n" * 200, dir_fd=at)
        next_ = os.open("n" * 200, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = next_
    os.close(at)


def make_wide(leaf: Path) -> None:
    for name in ("a/1/x", "a/2", "b/1/y", "b/1/z", "c/1", "d"):
        os.makedirs(leaf / name)


def make_odd(leaf: Path) -> None:
    for name in ("..a", " ", "-rf", "\\", "\u20ac\udcff", "a\rb", "..."):
        os.makedirs(leaf / name / name)


@pytest.mark.parametrize("lost", [False, True], ids=["warden", "warden lost"])
@pytest.mark.parametrize("shape", ["deep", "wide", "odd"])
def test_cgroups_below_the_leaf_go_with_it(actors: str, shape: str, lost: bool) -> None:
    handle, lines = start([actors, "pause"], "cgroup")
    lines.wait_for()
    leaf = leaf_of(handle)
    {"deep": lambda leaf: make_nest(leaf, 40), "wide": make_wide, "odd": make_odd}[shape](leaf)
    if lost:
        os.kill(warden_of(handle), signal.SIGKILL)
        assert handle.wait(timeout=60) is not None
    else:
        end(handle)
    assert not leaf.exists()


def test_members_in_cgroups_below_are_members(actors: str) -> None:
    """The tree moves some of itself there."""
    handle, lines = start(["sh", "-c", f"setsid {actors} ignore & wait"], "cgroup")
    lines.wait_for()
    sub = leaf_of(handle) / "a" / "b"
    os.makedirs(sub)
    (member,) = [pid for pid in cgroups.pids_in(str(leaf_of(handle))) if pid != handle.pid]
    (sub / "cgroup.procs").write_text(str(member))
    end(handle, KillPolicy.now())
    assert not leaf_of(handle).exists()
    assert not living()


# -- in and out of it


def test_one_that_moved_itself_out_is_ended_all_the_same(actors: str, ground: Path) -> None:
    script = f"echo $$ >{ground}/cgroup.procs && exec {actors} ignore"
    handle, lines = start(["sh", "-c", f"setsid sh -c '{script}' & exec {actors} ignore"], "cgroup")
    lines.wait_for(2)
    (escaped,) = [p.pid for p in handle.processes() if p.pid != handle.pid]
    assert cgroup_of(escaped) == cgroup_of()
    outcome = end(handle)
    assert outcome.survivors == ()
    assert not living()


def test_one_that_moved_itself_out_is_waited_for(actors: str, ground: Path) -> None:
    """The leaf is empty, and the tree is not."""
    script = f"echo $$ >{ground}/cgroup.procs && exec {actors} ignore"
    handle, lines = start(["setsid", "-f", "sh", "-c", script], "cgroup", leftovers="wait")
    lines.wait_for()
    leaf = leaf_of(handle)
    eventually(lambda: not cgroups.pids_in(str(leaf)), "the leaf is empty")
    assert handle.pid is not None
    eventually(lambda: proof.read_stat(handle.pid or 0) is None, "main has been reaped")
    assert handle.wait(timeout=0.3) is None
    end(handle)
    assert not living()


def test_a_stranger_in_the_leaf_is_waited_for(actors: str) -> None:
    """Its cgroup is what the kernel would end, so a tree is not empty while somebody is in it."""
    handle, lines = start([actors, "pause"], "cgroup", leftovers="wait")
    lines.wait_for()
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        (leaf_of(handle) / "cgroup.procs").write_text(str(stranger.pid))
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGTERM)
        eventually(lambda: proof.read_stat(handle.pid or 0) is None, "main has been reaped")
        assert handle.wait(timeout=0.3) is None
        stranger.kill()
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.stages == ()
    assert not leaf_of(handle).exists()


@pytest.mark.parametrize("policy", [KillPolicy.now(), QUICK], ids=["at once", "in stages"])
def test_a_stranger_in_the_leaf_is_ended_by_the_kill(actors: str, policy: KillPolicy) -> None:
    handle, lines = start([actors, "pause"], "cgroup")
    lines.wait_for()
    with subprocess.Popen(["sleep", "1000"]) as stranger, subprocess.Popen(["cat"], stdin=-1) as by:
        (leaf_of(handle) / "cgroup.procs").write_text(str(stranger.pid))
        outcome = end(handle, policy)
        assert outcome.survivors == ()
        assert stranger.wait(60) == -9
        assert by.poll() is None
        by.kill()
    assert not leaf_of(handle).exists()


@pytest.mark.parametrize("below", [False, True], ids=["leaf", "below"])
def test_what_is_left_alone_goes_to_our_own_cgroup(actors: str, below: bool) -> None:
    handle, lines = start(
        ["sh", "-c", f"setsid {actors} ignore & read _; exit 0"],
        "cgroup",
        leftovers="leave",
        stdin=(pipe := os.pipe())[0],
    )
    os.close(pipe[0])
    lines.wait_for()
    (left,) = [p.pid for p in handle.processes() if p.pid != handle.pid]
    if below:
        sub = leaf_of(handle) / "a"
        sub.mkdir()
        (sub / "cgroup.procs").write_text(str(left))
    os.write(pipe[1], b"\n")
    os.close(pipe[1])
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert [member.pid for member in outcome.leftovers] == [left]
    try:
        assert is_alive(left)
        assert cgroup_of(left) == cgroup_of()
        assert not leaf_of(handle).exists()
    finally:
        os.kill(left, signal.SIGKILL)


# -- freezing


def frozen(leaf: Path) -> bool:
    return "frozen 1" in (leaf / "cgroup.events").read_text().split("\n")


def test_freezing_is_the_kernels(actors: str) -> None:
    """It shows nothing to the tree: nobody is stopped by a signal."""
    handle, lines = start(
        ["sh", "-c", f"setsid {actors} counter & exec {actors} counter"], "cgroup"
    )
    lines.wait_for(2)
    leaf = leaf_of(handle)
    handle.freeze()
    eventually(lambda: frozen(leaf), "it is frozen")
    stats = [proof.read_stat(pid) for pid in cgroups.pids_in(str(leaf))]
    states = [stat.state for stat in stats if stat is not None]
    assert len(states) == 2
    assert "T" not in states
    handle.thaw()
    eventually(lambda: not frozen(leaf), "it goes on")
    end(handle)


def test_a_frozen_tree_sees_sigterm(actors: str) -> None:
    handle, lines = start([actors, "pause"], "cgroup")
    lines.wait_for()
    handle.freeze()
    eventually(lambda: frozen(leaf_of(handle)), "it is frozen")
    outcome = end(handle, KillPolicy.after(30.0))
    assert outcome.returncode == -15
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM]


# -- kernels that can do less


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the warden one for which a system call fails; returns what strace(1) says of that."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("there is no strace")
    said = tmp_path / "strace"

    def make(*options: str) -> Path:
        wrapper = tmp_path / "wrapper"
        # -DDD: the warden stays our child, and strace is in a session of its own; not an orphan
        # of the warden, which becomes a subreaper after that.
        command = [strace, "-DDD", "-qq", "-o", str(said), *options, warden_path()]
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv(WARDEN_VARIABLE, str(wrapper))
        return said

    return make


def test_without_cgroup_kill(actors: str, older: Callable[..., Path]) -> None:
    """Linux before 5.14."""
    said = older("-P", "cgroup.kill", "-e", "trace=openat", "-e", "inject=openat:error=ENOENT")
    script = f"setsid {actors} ignore & {actors} daemonise; exec {actors} ignore"
    handle, lines = start(["sh", "-c", script], "cgroup")
    lines.wait_for(3)
    assert len(cgroups.pids_in(str(leaf_of(handle)))) == 3
    outcome = end(handle)
    assert outcome.survivors == ()
    assert outcome.returncode == -9
    assert not leaf_of(handle).exists()
    eventually(lambda: not living(), "everything is gone, strace too")
    assert "cgroup.kill" in said.read_text()
    assert "INJECTED" in said.read_text()


@pytest.mark.parametrize("error", ["ENOSYS", "EINVAL", "EPERM"])
def test_without_clone_into_cgroup(older: Callable[..., Path], error: str) -> None:
    """Linux before 5.3 and 5.7, and filters that forbid clone3: the child moves itself."""
    said = older("-e", "trace=clone3", "-e", f"inject=clone3:error={error}")
    handle = WatchedSubprocess.start(
        ["sh", "-c", OWN + "cat /proc/self/cgroup"], containment="cgroup", stdout=proctree.CAPTURE
    )
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    leaf = f"proctree-{handle.tree_id}"
    assert leaves((outcome.stdout or b"").decode()) == [leaf, leaf]
    eventually(lambda: not living(), "everything is gone, strace too")
    if os.uname().machine == "x86_64":
        assert "INJECTED" in said.read_text()


# -- in one another, and for other users


NESTED = """
import os, signal, sys
import proctree
argv = ["sh", "-c", f"env -i setsid {sys.argv[1]} ignore & exec {sys.argv[1]} ignore"]
handle = proctree.WatchedSubprocess.start(argv, containment="cgroup")
os.write(1, handle._tree.contained.cgroup.encode() + b"\\n")
handle.wait()
"""


def test_a_supervisor_in_a_tree(actors: str) -> None:
    """Its trees are below its own leaf, and end with it: its wardens are members too."""
    handle, lines = start([sys.executable, "-c", NESTED, actors], "cgroup")
    said = lines.wait_for(3)
    (inner,) = (Path(line) for line in said if line.startswith("/"))
    assert inner.parent == leaf_of(handle)
    assert len(cgroups.pids_in(str(inner))) == 2
    assert len(cgroups.pids_in(str(leaf_of(handle)))) == 4
    end(handle, KillPolicy.now())
    assert not leaf_of(handle).exists()
    assert not living()
    assert list(Path(os.environ["XDG_RUNTIME_DIR"], "proctree").iterdir()) != []
    proctree.sweep()  # of the inner tree: its warden was ended as a member


UNPRIVILEGED = """
import os, sys, threading
import proctree
from proctree import KillPolicy, Stage

ready = threading.Event()
handle = proctree.WatchedSubprocess.start(
    ["sh", "-c", '"$0" "$1" & wait', sys.argv[1], sys.argv[2]],
    stdout=proctree.Lines(lambda line: ready.set()),
    kill=KillPolicy(stages=(Stage(15, 0.2), Stage(9, 20.0))),
)
assert ready.wait(30)
handle.kill()
outcome = handle.wait(timeout=60)
assert outcome is not None
print(outcome.containment, outcome.survivors, os.path.isdir(handle._tree.contained.cgroup))
"""


def test_set_uid_descendants_are_ended(ground: Path) -> None:
    """We may not signal them, and need not: they are in a cgroup of ours."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a set-uid program")
    folder = Path(tempfile.mkdtemp(prefix="proctree-setuid-"))
    try:
        with cgroup_of_our_own(ground, "delegated") as ours:
            for name in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
                os.chown(ours / name, NOBODY, NOBODY)
            (folder / "setuid.c").write_text(SETUID)
            program, fifo = folder / "setuid", folder / "fifo"
            subprocess.run(["cc", "-o", str(program), str(folder / "setuid.c")], check=True)
            os.mkfifo(fifo)
            copy_packages(PACKAGES[:4], folder / "site")
            (folder / "run").mkdir()
            open_to_all(folder)
            (folder / "run").chmod(0o777)
            program.chmod(0o4755)
            join = f'echo $$ >{ours}/cgroup.procs && exec "$@"'
            done = subprocess.run(
                ["sh", "-c", join, "sh"]
                + as_nobody([interpreter(), "-c", UNPRIVILEGED, str(program), str(fifo)]),
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(folder / "site"),
                    "XDG_RUNTIME_DIR": str(folder / "run"),
                },
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert done.stdout == "cgroup () False\n", done.stderr
            assert list((folder / "run" / "proctree").iterdir()) == []
    finally:
        shutil.rmtree(folder)
