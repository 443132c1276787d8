"""Inside a PID namespace of its own: numbers that are reused all the time, and a fork bomb that
nothing but a resource limit bounds."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import available
from integration.test_other_users import (
    PACKAGES,
    copy_packages,
    interpreter,
    open_to_all,
)
from proctree.containment import NAMES
from proctree.process import cgroups

pytestmark = pytest.mark.skipif(
    subprocess.run(
        ["unshare", "-r", "-p", "-f", "--mount-proc", "true"], capture_output=True, check=False
    ).returncode
    != 0,
    reason="PID namespaces cannot be made here",
)


def inside(script: str, *arguments: str, init: str = "", timeout: float = 200) -> str:
    """Runs `script` in a new PID namespace, below an init that reaps as pid 1 should.

    All of it shares what others leave of the processors (SCHED_IDLE, sched(7)): four hundred
    processes that fork without end have stopped the other tests for nine seconds.
    """
    init_script = f"""
import os, subprocess, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
{init}
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
while True:
    pid, status = os.wait()
    if pid == child.pid:
        sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run(
        ["unshare", *([] if os.geteuid() == 0 else ["-U", "-r"])]
        + ["-p", "-f", "-m", "--mount-proc", "--kill-child"]
        + [sys.executable, "-c", init_script, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


PID_REUSE = """
import subprocess, sys, threading, select, os
import proctree
from proctree import KillPolicy, Stage

actors, containment, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
witness = subprocess.Popen([actors, "witness"], stdout=subprocess.PIPE)
assert witness.stdout.readline() == b"ready\\n"
policy = KillPolicy(stages=(Stage(15, 0.01, "tree"), Stage(9, 20.0)))
highest = 0
for round_ in range(rounds):
    script = f"{actors} churn & setsid {actors} churn & {actors} sessions 10 & exec {actors} churn"
    ready = threading.Semaphore(0)
    handle = proctree.WatchedSubprocess.start(
        ["sh", "-c", script],
        containment=containment,
        stdout=proctree.Lines(lambda line: ready.release()),
        kill=policy,
    )
    for _ in range(4):
        assert ready.acquire(timeout=30)
    handle.signal(19, scope="tree")
    handle.signal(18, scope="tree")
    handle.signal(10 if round_ % 2 else 15, scope="tree")
    handle.kill()
    outcome = handle.wait(timeout=60)
    assert outcome is not None and not outcome.survivors, outcome
    highest = max(highest, handle.pid)
assert witness.poll() is None
ready, _, _ = select.select([witness.stdout], [], [], 0)
assert not ready, witness.stdout.readline()
witness.kill()
witness.wait()
print("highest", highest)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("containment", "rounds"), [("warden", 100), ("group", 15)])
def test_pid_reuse(actors: str, containment: str, rounds: int) -> None:
    """Thousands of processes come and go on 400 numbers, in the tree and beside it. Those beside it
    are never signalled."""
    limit = Path("/proc/sys/kernel/pid_max")
    if not limit.exists():
        pytest.skip("no pid_max")
    init = "open('/proc/sys/kernel/pid_max', 'w').write('400')"
    before = limit.read_text()
    kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if kernel < (6, 14):
        pytest.skip("pid_max is not per namespace before Linux 6.14")
    out = inside(PID_REUSE, actors, containment, str(rounds), init=init)
    assert limit.read_text() == before
    assert int(out.split()[-1]) < 400


BOMB = """
import os, resource, sys
import proctree
from proctree import KillPolicy, Stage

def processes():
    return {name for name in os.listdir("/proc") if name.isdigit()}

resource.setrlimit(resource.RLIMIT_NPROC, (400, 400))
before = processes()
outcome = proctree.run(
    [sys.argv[1], "bomb"],
    timeout=1.0,
    containment=sys.argv[2],
    kill=KillPolicy(stages=(Stage(15, 0.1), Stage(9, 60.0))),
)
assert outcome.reason is proctree.Reason.TIMEOUT, outcome
assert not outcome.survivors, outcome
assert processes() == before
print("ended", [stage.signal.name for stage in outcome.stages])
"""

BOMBER = 60000 + os.getpid() % 5000
"""RLIMIT_NPROC counts all processes of a user: this is one whom nobody else is likely to be."""


@contextlib.contextmanager
def delegated_cgroup(uid: int) -> Iterator[str]:
    """A cgroup below our own that belongs to a user: what systemd makes of Delegate=yes."""
    home = cgroups.find_home(cgroups.own_path()).path
    path = f"{home.rstrip('/')}/delegated-{uid}"
    os.mkdir(path)
    try:
        for file in (path, f"{path}/cgroup.procs", f"{path}/cgroup.subtree_control"):
            os.chown(file, uid, -1)
        yield path
    finally:
        assert cgroups.end(path, 30.0)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "group"])
def test_an_unbounded_fork_bomb(actors: str, name: str) -> None:
    """RLIMIT_NPROC binds nobody who is root: the bomb belongs to another user, and so does its
    supervisor, which cannot start anything either as long as it lasts."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    available(name)
    python = interpreter()
    folder = Path(tempfile.mkdtemp(prefix="proctree-bomb-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        copy_packages(PACKAGES[:4], folder)
        open_to_all(folder)
        runtime = folder / "runtime"
        runtime.mkdir()
        os.chown(runtime, BOMBER, BOMBER)
        init = f"""
os.environ["PYTHONPATH"] = {str(folder)!r}
os.environ["XDG_RUNTIME_DIR"] = {str(runtime)!r}
os.setgroups([])
os.setgid({BOMBER})
os.setuid({BOMBER})
sys.executable = {python!r}
"""
        if name == "cgroup":
            cgroup = stack.enter_context(delegated_cgroup(BOMBER))
            init = f"open('{cgroup}/cgroup.procs', 'w').write('0')\n{init}"
        out = inside(BOMB, actors, name, init=init, timeout=150)
        assert out == "ended ['SIGTERM', 'SIGKILL']\n"


def test_without_its_own_proc_the_warden_says_no() -> None:
    """A PID namespace whose /proc is still the old one: numbers there mean other processes."""
    script = """
import proctree
try:
    proctree.run(["true"], containment="warden")
except proctree.ContainmentUnavailable as error:
    print(error)
"""
    done = subprocess.run(
        ["unshare", "-r", "-p", "-f", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "/proc belongs to another PID namespace" in done.stdout
