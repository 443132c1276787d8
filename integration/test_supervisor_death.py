"""The supervisor is killed by SIGKILL, and nothing of its tree remains."""

from __future__ import annotations

import os
import signal

import pytest

import proctree
from integration.conftest import Lifeline, eventually, is_alive, living, start_supervisor

pytestmark = pytest.mark.wardens("sanitized")

# The tree holds the lifeline; what closed it or cleared its environment is caught by the suite's
# own check, which is a subreaper above everything here.
BODY = """
import os, signal, sys, threading
import proctree
from proctree import KillPolicy, Stage

actors, containment, lifeline = sys.argv[1], sys.argv[2], int(sys.argv[3])
policy = KillPolicy(stages=(Stage(15, float(sys.argv[4])), Stage(9, 20.0)))
script = f"{actors} ignore & setsid {actors} ignore & {actors} daemonise & wait; wait"
handle = proctree.WatchedSubprocess(
    ["bash", "-c", script], containment=containment, pass_fds=[lifeline], kill=policy
)
"""

RUNNING = (
    BODY
    + """
handle.launch()
signal.pause()
"""
)

KILLING = (
    BODY
    + """
handle.launch()
sys.stdin.readline()
handle.kill()
while handle.state is not proctree.State.STOPPING:
    pass
os.write(1, b"killing\\n")
signal.pause()
"""
)

# Killed at an unknown moment of the start: some of these come before STARTED.
STARTING = (
    BODY
    + """
os.write(1, b"go\\n")
handle.launch()
signal.pause()
"""
)

EXITING = (
    BODY
    + """
handle.launch()
sys.stdin.readline()
os._exit(3)
"""
)

FORKED_HELPER = (
    BODY
    + """
handle.launch()
if os.fork() == 0:
    # A helper of the host program that was forked while the tree runs holds copies of everything
    # that was not closed in it.
    signal.pause()
    os._exit(0)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
)

CALLABLE = (
    BODY
    + """
def target():
    import subprocess
    subprocess.Popen(["bash", "-c", script], pass_fds=[lifeline]).wait()

handle = proctree.WatchedSubprocess.start(
    target, containment=containment, pass_fds=[lifeline], kill=policy
)
signal.pause()
"""
)


def supervise(code: str, actors: str, lifeline: Lifeline, containment: str, grace: float = 0.3):  # type: ignore[no-untyped-def]
    supervisor = start_supervisor(
        code,
        actors,
        containment,
        str(lifeline.writer),
        str(grace),
        pass_fds=[lifeline.writer],
    )
    lifeline.handed_over()
    return supervisor


def read_lines(supervisor, count: int) -> None:  # type: ignore[no-untyped-def]
    for _ in range(count):
        assert supervisor.stdout.readline(), "the supervisor ended too early"


def finish(supervisor) -> None:  # type: ignore[no-untyped-def]
    supervisor.stdin.close()
    supervisor.stdout.close()
    supervisor.wait()


@pytest.mark.wardens("valgrind")
def test_while_running(actors: str, lifeline: Lifeline) -> None:
    supervisor = supervise(RUNNING, actors, lifeline, "warden")
    read_lines(supervisor, 3)
    supervisor.kill()
    finish(supervisor)
    assert lifeline.cut()
    eventually(lambda: not living(), "everything is gone, the warden too")


def test_while_killing(actors: str, lifeline: Lifeline) -> None:
    """During the grace after SIGTERM: the orphan plan begins anew and reaches SIGKILL."""
    supervisor = supervise(KILLING, actors, lifeline, "warden", grace=1.0)
    read_lines(supervisor, 3)
    supervisor.stdin.write("\n")
    supervisor.stdin.flush()
    read_lines(supervisor, 1)
    supervisor.kill()
    finish(supervisor)
    assert lifeline.cut()
    eventually(lambda: not living(), "everything is gone, the warden too")


@pytest.mark.parametrize("spins", [0, 2_000, 20_000, 50_000, 100_000, 200_000])
def test_before_started(actors: str, spins: int) -> None:
    for _ in range(5):
        line = Lifeline()
        supervisor = supervise(STARTING, actors, line, "warden")
        read_lines(supervisor, 1)
        for _ in range(spins):  # no event tells that the warden is half way: try many moments
            pass
        supervisor.kill()
        finish(supervisor)
        assert line.cut()
        line.close()
    eventually(lambda: not living(), "everything is gone, the warden too")


def test_by_os_exit(actors: str, lifeline: Lifeline) -> None:
    supervisor = supervise(EXITING, actors, lifeline, "warden")
    read_lines(supervisor, 3)
    supervisor.stdin.write("\n")
    finish(supervisor)
    assert lifeline.cut()
    eventually(lambda: not living(), "everything is gone, the warden too")


def test_while_a_forked_helper_lives_on(actors: str, lifeline: Lifeline) -> None:
    """The helper holds copies of the supervisor's descriptors, so only the pidfd tells."""
    supervisor = supervise(FORKED_HELPER, actors, lifeline, "warden")
    read_lines(supervisor, 3)
    supervisor.stdin.write("\n")
    finish(supervisor)
    eventually(lambda: len(living()) == 1, "only the helper is left")
    (helper,) = (int(name.split()[0]) for name in living())
    os.kill(helper, signal.SIGKILL)
    assert lifeline.cut()


def test_with_a_callable(actors: str, lifeline: Lifeline) -> None:
    supervisor = supervise(CALLABLE, actors, lifeline, "warden")
    read_lines(supervisor, 3)
    supervisor.kill()
    finish(supervisor)
    assert lifeline.cut()
    eventually(lambda: not living(), "everything is gone, the warden too")


def test_group_takes_the_main_process_along(actors: str) -> None:
    """What the group backend promises here: the main process, by PR_SET_PDEATHSIG."""
    code = f"""
import os, signal, proctree
handle = proctree.WatchedSubprocess.start([{actors!r}, "ignore"], containment="group")
os.write(1, b"%d\\n" % handle.pid)  # in one piece: the child writes to the same pipe
signal.pause()
"""
    supervisor = start_supervisor(code)
    pids = sorted(supervisor.stdout.readline().strip() for _ in range(2))  # type: ignore[union-attr]
    main = next(int(text) for text in pids if text.isdigit())
    assert is_alive(main)
    supervisor.kill()
    finish(supervisor)
    eventually(lambda: not is_alive(main), "the main process goes too")
    assert proctree.sweep() == []  # nothing to end, but its entry goes


def test_group_ends_its_trees_when_the_interpreter_exits(actors: str, lifeline: Lifeline) -> None:
    code = (
        BODY
        + """
handle.launch()
sys.stdin.readline()
"""
    )
    supervisor = supervise(code, actors, lifeline, "group")
    read_lines(supervisor, 3)
    supervisor.stdin.write("\n")
    finish(supervisor)
    assert supervisor.returncode == 0
    assert lifeline.cut()
    eventually(lambda: not living(), "everything is gone")


def test_a_nested_supervisor(actors: str, lifeline: Lifeline) -> None:
    """A tree in a tree: the outer supervisor dies, and both end."""
    outer = (
        BODY
        + """
import textwrap
inner = textwrap.dedent('''
    import sys, proctree
    proctree.run(["bash", "-c", sys.argv[1]], pass_fds=[int(sys.argv[2])], containment=sys.argv[3])
''')
proctree.WatchedSubprocess.start(
    [sys.executable, "-c", inner, script, str(lifeline), containment],
    containment=containment, pass_fds=[lifeline], kill=policy,
)
signal.pause()
"""
    )
    supervisor = supervise(outer, actors, lifeline, "warden")
    read_lines(supervisor, 3)
    supervisor.kill()
    finish(supervisor)
    assert lifeline.cut()
    eventually(lambda: not living(), "everything is gone, both wardens too")
    # The outer warden kills the inner one, which cannot clear away its entry then.
    assert proctree.sweep() == []
