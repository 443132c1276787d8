"""Trees in a PID namespace of their own: what is seen inside and outside, and who ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import proctree
from integration.conftest import (
    QUICK,
    Lifeline,
    available,
    eventually,
    is_alive,
    living,
    outer_pid,
    start_supervisor,
)
from integration.test_endings import end, start
from integration.test_other_users import (
    PACKAGES,
    as_nobody,
    copy_packages,
    interpreter,
    open_to_all,
)
from integration.test_sweep import state_of
from integration.test_warden_faults import warden_of
from proctree import KillPolicy, Reason, WatchedSubprocess
from proctree.process import proof


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A registry of the test's own."""
    available("pidns")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "proctree"


def init_of(warden: int) -> int:
    """The first process of the namespace is a child of the warden, and so is main."""
    children = Path(f"/proc/{warden}/task/{warden}/children").read_text().split()
    (init,) = (int(pid) for pid in children if name_of(int(pid)) == "proctree-init")
    return init


def name_of(pid: int) -> str | None:
    stat = proof.read_stat(pid)
    return None if stat is None else stat.name


def captured(argv: list[str] | object, **options: object) -> str:
    outcome = proctree.run(
        argv,  # type: ignore[arg-type]
        containment="pidns",
        stdout=proctree.CAPTURE,
        stderr=proctree.CAPTURE,
        kill=QUICK,
        **options,
    )
    assert outcome.ok, outcome
    assert not living()
    return (outcome.stdout or b"").decode()


# -- inside

SEEN = r"""
import os
pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
names = [open(f"/proc/{pid}/comm").read().strip() for pid in pids]
print(os.getpid() == pids[1], os.readlink("/proc/self") == str(os.getpid()), os.getppid())
print(len(pids), names[0], pids[0])
"""


def test_proc_shows_the_tree_and_nothing_else() -> None:
    """Its init, and itself; its parent is outside and has no number."""
    said = captured([sys.executable, "-c", SEEN]).splitlines()
    assert said == ["True True 0", "2 proctree-init 1"]


def test_a_callable_sees_the_same() -> None:
    def target() -> None:
        exec(SEEN, {})  # what the command does, in a fork of ours

    assert captured(target).splitlines() == ["True True 0", "2 proctree-init 1"]


def test_numbers_are_small() -> None:
    number = int(captured(["sh", "-c", "echo $$"]))
    assert 1 < number < 10


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", -9), ("kill $$", -15)])
def test_how_main_ended(script: str, code: int) -> None:
    outcome = proctree.run(["sh", "-c", script], containment="pidns")
    assert outcome.returncode == code
    assert outcome.reason is (Reason.EXITED if code >= 0 else Reason.SIGNALED)
    assert (outcome.leftovers, outcome.survivors) == ((), ())
    assert not living()


def test_orphans_are_reaped_inside() -> None:
    """By the init: a number that was an orphan's is free again."""
    script = "(sh -c 'echo $$ >&3; exit 0' & ) 3>&1 | { read -r pid; " + (
        "while [ -e /proc/$pid ]; do sleep 0.01; done; echo reaped; }"
    )
    assert captured(["sh", "-c", script], timeout=60) == "reaped\n"


def test_kill_everybody_is_everybody_inside(actors: str) -> None:
    with subprocess.Popen([actors, "counter"], stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"ready\n"
        script = f"setsid {actors} ignore & read -r _; kill -9 -1; sleep 1000"
        reader, writer = os.pipe()
        handle, lines = start(["bash", "-c", script], "pidns", stdin=reader)
        os.close(reader)
        lines.wait_for()
        warden = warden_of(handle)
        (ignoring,) = [p.pid for p in handle.processes() if p.pid != handle.pid]
        os.write(writer, b"\n")
        os.close(writer)
        eventually(lambda: not is_alive(ignoring), "what it may signal is ended")
        # kill(2): it does not signal itself, nor the init; and who is outside has no number.
        assert is_alive(init_of(warden))
        assert is_alive(warden)
        end(handle)
        assert stranger.poll() is None
        stranger.send_signal(signal.SIGUSR1)
        assert stranger.stdout.readline() == b"0\n"
        stranger.kill()
    assert not living()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_what_is_mounted_inside_stays_inside(tmp_path: Path) -> None:
    script = f"mount -t tmpfs proctree {tmp_path} && touch {tmp_path}/inside && cat /proc/mounts"
    said = captured(["sh", "-c", script])
    assert f"proctree {tmp_path} tmpfs" in said
    assert not (tmp_path / "inside").exists()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


# -- outside


def test_the_init_is_no_member(actors: str) -> None:
    handle, lines = start(["sh", "-c", f"setsid {actors} ignore & exec {actors} ignore"], "pidns")
    lines.wait_for(2)
    init = init_of(warden_of(handle))
    processes = handle.processes()
    assert {p.name for p in processes} == {"actors"}
    assert len(processes) == 2
    assert init not in {p.pid for p in processes}
    outcome = end(handle)
    assert [stage.reached for stage in outcome.stages] == [2, 2]
    assert outcome.survivors == ()
    assert init not in {member.pid for member in outcome.leftovers}
    assert not living()


def test_what_is_left_is_named_by_our_numbers(actors: str) -> None:
    reader, writer = os.pipe()
    handle, lines = start(
        ["sh", "-c", f"setsid {actors} ignore & {actors} daemonise; read -r _; exit 3"],
        "pidns",
        stdin=reader,
    )
    os.close(reader)
    said = lines.wait_for(2)
    daemon = outer_pid(handle, next(int(line) for line in said if line.isdigit()))
    others: set[int | None] = set()

    def two_others() -> bool:
        others.clear()
        others.update(p.pid for p in handle.processes() if p.pid != handle.pid)
        return len(others) == 2

    eventually(two_others, "those in between the shell and the daemon are gone")
    assert daemon in others
    os.write(writer, b"\n")
    os.close(writer)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.returncode == 3
    assert {member.pid for member in outcome.leftovers} == others
    assert len(others) == 2
    assert not living()


def test_an_exec_failure_leaves_nothing(folder: Path) -> None:
    for target, options in ((["/nonexistent"], {}), (lambda: None, {"cwd": "/nonexistent"})):
        with pytest.raises(FileNotFoundError):
            proctree.run(target, containment="pidns", **options)  # type: ignore[arg-type]
        assert not living()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("how", ["returns", "is killed"])
def test_callables(how: str) -> None:
    def target() -> None:
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        if how == "is killed":
            signal.pause()

    handle = WatchedSubprocess.start(target, containment="pidns", kill=QUICK)
    outcome = handle.wait(timeout=60) if how == "returns" else end(handle)
    assert outcome is not None
    assert outcome.returncode == (0 if how == "returns" else -15)
    assert not living()


# -- when something of it is killed


def gone(main: int) -> bool:
    """An init ends when everything in its namespace has been reaped. With the warden main has lost
    its parent outside, and it is the suite that is a subreaper here and not pid 1."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(main, os.WNOHANG)
    return not living()


CODE = """
import os, signal, sys
import proctree
argv = ["sh", "-c", f"env -i {sys.argv[1]} daemonise; env -i setsid {sys.argv[1]} ignore & exec "
        f"{sys.argv[1]} ignore"]
handle = proctree.WatchedSubprocess.start(
    argv if sys.argv[2] == "command" else lambda: os.execvp(argv[0], argv),
    containment="pidns", stdout=2, pass_fds=[int(sys.argv[3])],
)
os.write(1, f"{handle._tree.contained.root()} {handle.pid}\\n".encode())
signal.pause()
"""


WITHOUT_PROC = pytest.mark.not_with("sanitized", "its runtime warns on stderr that it has no /proc")


@pytest.mark.parametrize("what", ["command", pytest.param("callable", marks=WITHOUT_PROC)])
def test_supervisor_and_warden_killed_at_once(actors: str, lifeline: Lifeline, what: str) -> None:
    """What no other backend can: the kernel ends it with its init, and nobody has to sweep."""
    reader, writer = os.pipe()
    supervisor = start_supervisor(
        CODE, actors, what, str(lifeline.writer), stderr=writer, pass_fds=[lifeline.writer]
    )
    os.close(writer)
    lifeline.handed_over()
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    with open(reader) as said:
        assert [said.readline() == "ready\n" for _ in range(3)].count(True) == 2
    warden, main = map(int, supervisor.stdout.readline().split())
    for pid in (supervisor.pid, warden):
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(supervisor.pid) == state_of(warden) == "T", "they stop")
    for pid in (supervisor.pid, warden):
        os.kill(pid, signal.SIGKILL)
    supervisor.wait()
    supervisor.stdin.close()
    supervisor.stdout.close()
    assert lifeline.cut()
    eventually(lambda: gone(main), "everything is gone")
    assert proctree.sweep() == []


def test_a_killed_warden(actors: str) -> None:
    script = f"env -i {actors} daemonise; env -i setsid {actors} ignore & exec {actors} ignore"
    handle, lines = start(["sh", "-c", script], "pidns")
    lines.wait_for(3)
    os.kill(warden_of(handle), signal.SIGKILL)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.reason is Reason.WARDEN_LOST
    assert outcome.survivors == ()
    eventually(lambda: gone(outcome.pid or 0), "everything is gone")


def test_a_killed_init(actors: str) -> None:
    """The kernel ends all that is in the namespace, main too: by a signal, and not by us."""
    script = f"setsid {actors} ignore & exec {actors} ignore"
    handle, lines = start(["sh", "-c", script], "pidns", leftovers="wait")
    lines.wait_for(2)
    os.kill(init_of(warden_of(handle)), signal.SIGKILL)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert (outcome.returncode, outcome.reason) == (-9, Reason.SIGNALED)
    assert outcome.stages == ()
    assert outcome.survivors == ()
    assert not living()


def test_a_kill_in_one_step(actors: str) -> None:
    handle, lines = start([actors, "sessions", "50"], "pidns")
    lines.wait_for()
    outcome = end(handle, KillPolicy.now())
    assert outcome.returncode == -9
    assert outcome.stages[0].reached == 51
    assert not living()


# -- without privileges


def test_through_a_user_namespace() -> None:
    """The same file, by a user without any."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    folder = Path(tempfile.mkdtemp(prefix="proctree-pidns-"))
    here = Path(__file__).parent
    try:
        copy_packages(PACKAGES, folder / "site")
        tree = folder / "tree"
        shutil.copytree(here, tree / "integration", ignore=shutil.ignore_patterns("__py*"))
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy2(here.parent / name, tree)
        open_to_all(folder)
        home = folder / "home"
        home.mkdir()
        home.chmod(0o777)
        done = subprocess.run(
            as_nobody(
                [interpreter(), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
                + [f"--basetemp={home}/tmp", "integration/test_pidns.py"]
            ),
            cwd=tree,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(folder / "site"),
                "PYTHONDONTWRITEBYTECODE": "1",
                "HOME": str(home),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    if "CAP_SYS_ADMIN is missing" in done.stdout:
        pytest.skip("user namespaces are forbidden here")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("only root" in line for line in skipped), skipped
