"""Every fault, in every backend, at every moment that makes sense: see fault_matrix.py.

What a test asserts follows from the promise of its cell in the table, so that the table cannot say
one thing and the suite another.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import proctree
from integration import fault_matrix
from integration.conftest import Lines, eventually, is_alive
from integration.fault_matrix import BACKENDS, FAULTS, Case, Moment, Promise
from integration.fault_tools import (
    INIT,
    MAIN_FIRST,
    NOW,
    NOW_SHORT,
    PATIENT,
    QUICK,
    SHORT,
    WARDEN,
    Freezer,
    HeldExec,
    Scene,
    Starting,
    delegated_cgroup,
    fifo,
    kill_together,
    open_and_close,
    state_of,
    warden_of,
)
from integration.test_other_users import (
    NOBODY,
    PACKAGES,
    as_nobody,
    copy_packages,
    interpreter,
    open_to_all,
)
from proctree import KillPolicy, Outcome, Reason, State, WatchedSubprocess
from proctree.containment import choose

# A sweep that fails is given up after a while, and looks like one that found nothing.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def missing(case: Case) -> str | None:
    """Why a case cannot be tried on this machine, or None."""
    if case.fault.name == "setuid" and os.geteuid() != 0:
        return "only root can make a set-uid program"
    try:
        choose(case.backend)
    except proctree.ContainmentUnavailable as error:
        return str(error)
    if case.moment is Moment.STARTING and (reason := HeldExec.unavailable()):
        return reason
    if needs_freezer(case) and (reason := Freezer.unavailable()):
        return reason
    return None


def needs_freezer(case: Case) -> bool:
    """Something has to survive SIGKILL for a moment that comes after it."""
    held = ("supervisor", "thread", "both")
    return case.fault.name == "frozen" or (case.moment is Moment.KILLED and case.fault.name in held)


def of_the_matrix(name: str) -> Callable[..., object]:
    return pytest.mark.parametrize("case", fault_matrix.cases(name), ids=str)


@pytest.fixture
def scene(
    case: Case, actors: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Scene]:
    if reason := missing(case):
        pytest.skip(reason)
    with Scene(case, actors, request.node.user_properties) as scene:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(scene.runtime))
        yield scene


# -- what is asserted


def ended(scene: Scene, outcome: Outcome) -> None:
    """At this very moment, and not soon."""
    assert outcome.survivors == ()
    if scene.case.fault.name == "warden":
        # An init waits for what the suite has to reap in the place of pid 1.
        assert scene.only_kernel_work_left(), scene.living()
        eventually(lambda: not scene.living(), "the init has ended")
    assert scene.living() == {}
    assert scene.leaves() == []


def clear_unmarked(scene: Scene) -> None:
    """Of the cast, the one without a mark may be left where marks are all that is known."""
    assert len(scene.living()) <= 1, scene.living()
    scene.saw(f"{scene.clear()} left of the tree")


def check(scene: Scene, main: int | None, outcome: Outcome) -> None:
    """The end of a tree that was killed, as far as its cell promises it."""
    if scene.case.promise is Promise.BEST_EFFORT:
        assert main is None or not is_alive(main)
        scene.saw(f"{len(scene.living())} left of the tree")
        scene.clear()
    else:
        ended(scene, outcome)
    scene.still_works()


def finish(
    handle: WatchedSubprocess, moment: Moment, running: KillPolicy = QUICK, later: KillPolicy = NOW
) -> Outcome:
    """Lets the escalation go on, or begin."""
    handle.kill(running if moment is Moment.RUNNING else later)
    outcome = handle.wait(timeout=100)
    assert outcome is not None, f"{handle} did not end"
    return outcome


def sent(outcome: Outcome) -> list[tuple[int, str]]:
    return [(int(stage.signal), str(stage.scope)) for stage in outcome.stages]


SENT = {
    Moment.RUNNING: [(15, "tree"), (9, "tree")],
    Moment.GRACE: [(15, "tree"), (9, "tree")],
    Moment.KILLED: [(9, "main"), (9, "tree")],
}
"""The stages that a test which brings its fault about by killing has carried out in the end."""


def enter(scene: Scene, handle: WatchedSubprocess, lines: Lines) -> None:
    """From a running tree to the moment. The main process says `term` when SIGTERM comes."""
    heard = len(lines.lines)
    if scene.case.moment is Moment.GRACE:
        handle.kill(PATIENT)
        lines.wait_for(heard + 1)
        assert "term" in lines.lines
    elif scene.case.moment is Moment.KILLED:
        handle.kill(MAIN_FIRST)
        assert handle.pid is not None
        eventually(lambda: not is_alive(handle.pid or 0), "the main process gets SIGKILL")


# -- the tree does it


@of_the_matrix("leaves")
def test_the_main_process_leaves_background_processes(scene: Scene, case: Case) -> None:
    """It ends by itself, by SIGTERM (which the others ignore), or by a SIGKILL of its own."""
    go = fifo(scene.folder / "go")
    # Opened for both it never comes to its end.
    redirection = "<" if case.moment is Moment.RUNNING else "<>"
    script = f"{scene.cast()} exec {scene.actor} exits {redirection}{go}"
    handle, lines = scene.start(["sh", "-c", script], 3)
    if case.moment is Moment.RUNNING:
        open_and_close(go)
    lines.wait_for(4)
    if case.moment is Moment.RUNNING:
        outcome = handle.wait(timeout=100)
        assert outcome is not None
    else:
        handle.kill(PATIENT if case.moment is Moment.GRACE else MAIN_FIRST)
        eventually(lambda: not is_alive(handle.pid or 0), "the main process exits")
        outcome = finish(handle, case.moment)
    assert outcome.returncode == (-9 if case.moment is Moment.KILLED else 7)
    exited = case.moment is Moment.RUNNING
    assert outcome.reason is (Reason.EXITED if exited else Reason.KILLED)
    assert sent(outcome) == SENT[case.moment]
    assert len(outcome.leftovers) >= (2 if case.backend == "group" else 3)
    if case.backend == "group":
        clear_unmarked(scene)
    ended(scene, outcome)
    scene.still_works()


@of_the_matrix("ignores")
def test_a_process_ignores_sigterm(scene: Scene, case: Case) -> None:
    script = f"setsid {scene.actor} ignore & exec {scene.actor} ignore"
    handle, _ = scene.start(["sh", "-c", script], 2)
    outcome = finish(handle, case.moment)
    assert (outcome.reason, outcome.returncode) == (Reason.KILLED, -9)
    assert sent(outcome) == SENT[case.moment]
    ended(scene, outcome)
    scene.still_works()


@of_the_matrix("stopped")
def test_a_process_is_stopped(scene: Scene, case: Case) -> None:
    actor = scene.actor
    if case.moment is Moment.STARTING:
        # Who starts it waits for its program to be executed, and that does not happen.
        starting = hold(scene, [actor, "pause"], kill=SHORT)
        os.kill(starting.child, signal.SIGSTOP)
        starting.handle.kill()
        starting.finished()
        outcome = starting.handle.wait(timeout=100)
        assert outcome is not None
        assert outcome.reason is Reason.KILLED
    elif case.moment is Moment.RUNNING:
        # SIGTERM is enough, for it comes with a SIGCONT.
        script = f"setsid {actor} stopped & exec {actor} stopped"
        handle, _ = scene.start(["sh", "-c", script], 2)
        eventually(lambda: states(scene) == ["T", "T"], "both stop")
        outcome = finish(handle, case.moment, running=PATIENT)
        assert (sent(outcome), outcome.returncode) == ([(15, "tree")], -15)
    else:
        # One stops itself when SIGTERM comes, or is stopped when the main process has SIGKILL.
        script = f"setsid {actor} stops-on-term & exec {actor} deaf"
        handle, lines = scene.start(["sh", "-c", script], 2)
        (child,) = set(scene.members()) - {handle.pid}
        enter(scene, handle, lines)
        if case.moment is Moment.KILLED:
            os.kill(child, signal.SIGSTOP)
        eventually(lambda: state_of(child) == "T", "it stops")
        outcome = finish(handle, case.moment)
        assert sent(outcome) == SENT[case.moment]
    ended(scene, outcome)
    scene.still_works()


def states(scene: Scene) -> list[str]:
    return [state_of(pid) for pid in scene.members()]


def doing(scene: Scene, *command: str) -> list[str]:
    """A main process in whose tree a command is executed at the moment of the case."""
    if scene.case.moment is Moment.GRACE:
        return [scene.actor, "when-term", *command]
    if scene.case.moment is Moment.KILLED:
        return [scene.actor, "when-orphaned", *command]
    return ["sh", "-c", f'{scene.actor} ignore & "$@" & exec {scene.actor} ignore', "sh", *command]


def provoke(scene: Scene, handle: WatchedSubprocess) -> None:
    if scene.case.moment is Moment.GRACE:
        handle.kill(PATIENT)
    elif scene.case.moment is Moment.KILLED:
        handle.kill(MAIN_FIRST)


@of_the_matrix("daemon")
def test_a_daemon_that_gets_rid_of_everything(scene: Scene, case: Case) -> None:
    """A session of its own, no parent, no descriptors, no environment."""
    argv = doing(scene, "env", "-i", scene.actor, "daemonise")
    running = case.moment is Moment.RUNNING
    handle, lines = scene.start(argv, 3 if running else 1)
    main = handle.pid
    provoke(scene, handle)
    if not running:
        lines.wait_for(2)
    outcome = finish(handle, case.moment)
    assert outcome.reason is Reason.KILLED
    if case.promise is Promise.ENDED:  # and not taken for empty before
        assert sent(outcome) == SENT[case.moment]
    check(scene, main, outcome)


@of_the_matrix("bomb")
def test_a_fork_bomb(scene: Scene, case: Case) -> None:
    """Every one in a session of its own. The one that nothing bounds is in test_namespaces.py."""
    argv = doing(scene, scene.actor, "bounded-bomb", "200")
    heard = Lines()
    handle = scene.handle(argv, heard)
    handle.launch()
    main = handle.pid
    if case.moment is not Moment.RUNNING:
        heard.wait_for(1)
    provoke(scene, handle)
    # In full flight: it may go on for as long as it is let.
    eventually(lambda: len(scene.members()) > 50, "it grows")
    outcome = finish(handle, case.moment)
    assert outcome.reason is Reason.KILLED
    assert sent(outcome) == SENT[case.moment]
    check(scene, main, outcome)


# -- the supervisor's side


class Held(Starting):
    """With the process that is held."""

    def __init__(self, handle: WatchedSubprocess, held: HeldExec) -> None:
        super().__init__(handle)
        self.held = held
        self.child = held.wait()


def hold(scene: Scene, argv: list[str], **options: object) -> Held:
    held = scene.hold_exec()
    return Held(scene.handle(argv, Lines(), **options), held)


class Supervised:
    """A tree below a supervisor that may be killed, at the moment of the case."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.moment = scene.case.moment
        self.held: HeldExec | None = None
        self.freezer: Freezer | None = None
        self.outsider = None
        if self.moment is Moment.STARTING:
            self.held = scene.hold_exec()
            self.supervisor = scene.supervise([scene.actor, "deaf"])
            self.main = self.held.wait()
        elif self.moment is Moment.DRAINING:
            self._drain()
        else:
            script = f"{scene.cast()} exec {scene.actor} deaf"
            self.supervisor = scene.supervise(["sh", "-c", script])
            self.supervisor.hear_lines(4)
            self.main = self.supervisor.hear("main")
        if self.moment is Moment.GRACE:
            self.supervisor.say("kill patient")
            self.supervisor.hear_lines(5)
        elif self.moment is Moment.KILLED:
            frozen = next(pid for pid in scene.members() if pid != self.main)
            self.freezer = scene.freeze(frozen)
            self.supervisor.say("kill now")
            eventually(lambda: not is_alive(self.main), "the others get SIGKILL")

    def _drain(self) -> None:
        """The callback does not return, so that not everything has been delivered."""
        go = fifo(self.scene.folder / "go")
        script = f"echo first; read _ <{go}; echo last"
        self.supervisor = self.scene.supervise(["sh", "-c", script])
        self.supervisor.hear_lines(1)
        self.main = self.supervisor.hear("main")
        self.outsider = self.scene.hold_output(self.main)
        open_and_close(go)
        self.supervisor.hear_lines(2)
        self.supervisor.say("state draining")
        self.supervisor.hear("state")

    def let_go(self) -> None:
        """What has kept the moment."""
        if self.held is not None:
            self.held.release()
        if self.freezer is not None:
            self.freezer.thaw()

    def check_outsider(self) -> None:
        if self.outsider is not None:
            assert self.outsider.is_alive(), "a stranger got a signal"


SWEEP = "import proctree; proctree.sweep()"


def sweep() -> None:
    """As the next start of the host program would."""
    subprocess.run([sys.executable, "-c", SWEEP], check=True, timeout=100)


def sweep_the_rest(scene: Scene) -> None:
    """Whatever bears a mark of the tree."""
    sweep()
    eventually(lambda: len(scene.living()) <= 1, "the rest is swept")
    clear_unmarked(scene)


@of_the_matrix("supervisor")
def test_the_supervisor_ends(scene: Scene, case: Case) -> None:
    tree = Supervised(scene)
    if case.variant == "exit":
        tree.supervisor.say("exit")
    else:
        tree.supervisor.process.kill()
    tree.supervisor.ended()
    if case.promise is Promise.MAIN_THEN_SWEEP:
        eventually(lambda: not is_alive(tree.main), "the main process goes too")
        tree.let_go()
        sweep_the_rest(scene)
    else:
        tree.let_go()
    eventually(lambda: not scene.living(), "everything is gone, the warden too")
    assert scene.leaves() == []
    tree.check_outsider()


@of_the_matrix("thread")
def test_the_thread_that_started_the_tree_ends(scene: Scene, case: Case) -> None:
    """PR_SET_PDEATHSIG fires at the end of a thread, and not of a process."""
    lines = Lines()
    release = threading.Event()
    outsider = None
    go = fifo(scene.folder / "go")

    def on_line(line: str) -> None:
        lines(line)
        if line == "last":
            release.wait()

    script = f"{scene.cast()} exec {scene.actor} deaf"
    if case.moment is Moment.DRAINING:
        script = f"echo first; read _ <{go}; echo last"
    handle = scene.handle(["sh", "-c", script], on_line)

    def starter() -> None:
        nonlocal outsider
        handle.launch()
        if case.moment is Moment.DRAINING:
            lines.wait_for(1)
            outsider = scene.hold_output(handle.pid or 0)
            open_and_close(go)
            eventually(lambda: handle.state is State.DRAINING, "the tree ends")
            return
        lines.wait_for(4)
        if case.moment is Moment.GRACE:
            enter(scene, handle, lines)
        elif case.moment is Moment.KILLED:
            scene.freeze(next(pid for pid in scene.members() if pid != handle.pid))
            handle.kill(NOW)
            eventually(lambda: not is_alive(handle.pid or 0), "the others get SIGKILL")

    thread = threading.Thread(target=starter)
    thread.start()
    tid = thread.native_id
    thread.join()
    eventually(lambda: not os.path.exists(f"/proc/self/task/{tid}"), "the kernel has noticed")
    state = {
        Moment.RUNNING: State.RUNNING,
        Moment.GRACE: State.STOPPING,
        Moment.KILLED: State.STOPPING,
        Moment.DRAINING: State.DRAINING,
    }
    assert handle.state is state[case.moment]
    if case.moment in (Moment.RUNNING, Moment.GRACE):
        assert len(scene.members()) == 4
        heard = len(lines.lines)
        handle.signal(signal.SIGTERM, scope="main")
        assert lines.wait_for(heard + 1)[heard] == "term"
        outcome = finish(handle, case.moment)
    else:
        scene.thaw()
        release.set()
        outcome = handle.wait(timeout=100)
        assert outcome is not None
    if case.backend == "group" and case.moment is not Moment.DRAINING:
        clear_unmarked(scene)
    ended(scene, outcome)
    if outsider is not None:
        assert outsider.is_alive(), "a stranger got a signal"
        assert outcome.reason is Reason.EXITED


@of_the_matrix("warden")
def test_the_warden_is_killed(scene: Scene, case: Case) -> None:
    """By a member, where one can reach it: with a PID namespace nobody in the tree sees it."""
    if case.moment is Moment.STARTING:
        starting = hold(scene, [scene.actor, "deaf"])
        os.kill(warden_of(os.getpid()), signal.SIGKILL)
        starting.finished()
        assert isinstance(starting.error, proctree.ContainmentUnavailable)
        outcome = starting.handle.wait(timeout=100)
        assert outcome is not None
        starting.held.release()
        ended(scene, outcome)
        scene.still_works()
        return
    outside = case.backend == "pidns"
    # The parent of whom? Of the main process, which is this shell itself, or this shell's parent.
    murder = "read -r _ _ _ parent _ </proc/$PPID/stat; kill -9 $parent"
    if case.moment is Moment.KILLED:
        murder = "kill -9 $PPID"
    main = "when-term" if case.moment is Moment.GRACE else "when-orphaned"
    if outside:
        argv = ["sh", "-c", f"{scene.cast()} exec {scene.actor} deaf"]
    elif case.moment is Moment.RUNNING:
        go = fifo(scene.folder / "go")
        script = f"{scene.cast()} read _ <{go}; kill -9 $PPID; exec {scene.actor} ignore"
        argv = ["sh", "-c", script]
    else:
        script = f'{scene.cast()} exec {scene.actor} {main} sh -c "$0"'
        argv = ["sh", "-c", script, murder]
    reader_lines = 3 if case.moment is Moment.RUNNING and not outside else 4
    handle, lines = scene.start(argv, reader_lines)
    main_pid = handle.pid or 0
    warden = warden_of(os.getpid())
    if outside:
        enter(scene, handle, lines)
        os.kill(warden, signal.SIGKILL)
    elif case.moment is Moment.RUNNING:
        open_and_close(go)
    else:
        provoke(scene, handle)
    outcome = handle.wait(timeout=100)
    assert outcome is not None, "it waits for a warden that is gone"
    lost = case.moment is Moment.RUNNING
    assert outcome.reason is (Reason.WARDEN_LOST if lost else Reason.KILLED)
    assert outcome.survivors == ()
    if case.promise is Promise.MAIN_THEN_SWEEP:
        assert not is_alive(main_pid)
        clear_unmarked(scene)
    ended(scene, outcome)
    scene.still_works()


@of_the_matrix("both")
def test_supervisor_and_warden_are_killed_together(scene: Scene, case: Case) -> None:
    tree = Supervised(scene)
    kill_together(tree.supervisor.pid, warden_of(tree.supervisor.pid))
    tree.supervisor.ended()
    if case.promise is Promise.MAIN_THEN_SWEEP:
        eventually(lambda: not is_alive(tree.main), "the main process goes at once")
    tree.let_go()
    if case.promise is Promise.BY_KERNEL:
        eventually(lambda: not scene.living(), "everything ends by itself")
    elif case.moment in (Moment.RUNNING, Moment.GRACE):
        assert scene.members(), "then it is not the sweep that ends them"
    if case.promise is Promise.MAIN_THEN_SWEEP:
        sweep_the_rest(scene)
    else:
        sweep()
    eventually(lambda: not scene.living(), "everything is gone")
    assert scene.leaves() == []


# -- what cannot be ended


@pytest.fixture(scope="session")
def site() -> Iterator[Path]:
    """What a supervisor without privileges imports, where it can read it."""
    folder = Path(tempfile.mkdtemp(prefix="proctree-site-"))
    copy_packages(PACKAGES[:4], folder)
    open_to_all(folder)
    yield folder
    shutil.rmtree(folder)


def may_make_namespaces() -> bool:
    command = as_nobody(["unshare", "--user", "--map-root-user", "--pid", "--fork", "true"])
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@of_the_matrix("setuid")
def test_a_set_uid_descendant(scene: Scene, case: Case, request: pytest.FixtureRequest) -> None:
    """The supervisor has no privileges."""
    setuid = scene.folder / "setuid"
    shutil.copy2(scene.actor, setuid)
    setuid.chmod(0o4755)
    os.chown(scene.runtime, NOBODY, NOBODY)
    prefix = as_nobody([])
    env = {"PYTHONPATH": str(request.getfixturevalue("site"))}
    if case.backend == "pidns" and not may_make_namespaces():
        pytest.skip("users without privileges may make no namespaces here")
    if case.backend == "cgroup":
        cgroup = request.getfixturevalue("delegated")
        if not (cgroup / "cgroup.kill").exists():
            pytest.skip("there is no cgroup.kill before Linux 5.14")
        prefix = ["sh", "-c", f'echo $$ >{cgroup}/cgroup.procs && exec "$@"', "sh", *prefix]
    argv = doing(scene, str(setuid), "set-uid")
    python = interpreter()
    supervisor = scene.supervise(argv, plan="short", prefix=prefix, python=python, env=env)
    who = "nobody" if case.backend == "pidns" else "root"
    if case.moment is not Moment.RUNNING:
        supervisor.hear_lines(1)
        supervisor.say("kill patient" if case.moment is Moment.GRACE else "kill main first")
    supervisor.hear_line(who)
    (privileged,) = (pid for pid in scene.members() if "setuid" in os.readlink(f"/proc/{pid}/exe"))
    supervisor.say("kill short" if case.moment is Moment.RUNNING else "kill now short")
    supervisor.say("wait")
    outcome = supervisor.hear("outcome")
    if case.promise is Promise.REPORTED:
        (survivor,) = outcome["survivors"]
        assert (survivor["pid"], survivor["error"]) == (privileged, errno.EPERM)
        assert outcome["why"] == ["may not be signalled (EPERM)"]
        assert scene.members() == [privileged]
    else:
        assert outcome["survivors"] == []
        assert scene.members() == []
        assert scene.leaves() == []
    supervisor.say("again")
    assert supervisor.hear("again")
    scene.clear()


@pytest.fixture
def delegated() -> Iterator[Path]:
    with delegated_cgroup(NOBODY) as folder:
        yield folder


def unendable(scene: Scene, seize: Callable[[list[int]], None]) -> tuple[Outcome, list[int]]:
    """A tree whose members are seized at the moment of the case, and what became of it while they
    were held."""
    case = scene.case
    if case.moment is Moment.STARTING:
        starting = hold(scene, [scene.actor, "deaf"], kill=SHORT)
        seize([starting.child])
        starting.handle.kill()
        starting.finished()
        outcome = starting.handle.wait(timeout=100)
        assert outcome is not None, "it waits for what cannot end"
        return outcome, [starting.child]
    script = f"setsid {scene.actor} ignore & exec {scene.actor} deaf"
    handle, lines = scene.start(["sh", "-c", script], 2)
    (child,) = set(scene.members()) - {handle.pid}
    enter(scene, handle, lines)
    main = handle.pid or 0
    seized = {"child": [child], "main": [main], "all": [child, main]}[case.variant]
    seize(seized)
    return finish(handle, case.moment, running=SHORT, later=NOW_SHORT), seized


def nothing_on_record(scene: Scene) -> None:
    """What had survivors when its warden was given up, too, is off the records with the next
    sweep."""
    if scene.case.moment is Moment.STARTING:
        proctree.sweep()
    assert scene.leaves() == []
    eventually(lambda: not os.listdir(scene.runtime / "proctree"), "the registry is empty")


@of_the_matrix("traced")
def test_a_traced_member(scene: Scene, case: Case) -> None:
    """It ends, and is a zombie that only its tracer can take away."""
    tracers = {}

    def seize(pids: list[int]) -> None:
        for pid in pids:
            tracers[pid] = scene.trace(pid)

    outcome, (traced,) = unendable(scene, seize)
    assert state_of(traced) == "Z"
    (survivor,) = outcome.survivors
    assert (survivor.pid, survivor.state) == (traced, "Z")
    assert str(tracers[traced].pid) in survivor.why
    assert not is_alive(outcome.pid or 0)
    scene.still_works()
    tracers[traced].close()
    eventually(lambda: not scene.living(), "everything ends when the tracer has let go")
    nothing_on_record(scene)


@of_the_matrix("frozen")
def test_uninterruptible_sleep(scene: Scene, case: Case) -> None:
    freezers = []

    def seize(pids: list[int]) -> None:
        freezers.append(scene.freeze(*pids))

    outcome, frozen = unendable(scene, seize)
    others = {pid: name for pid, name in scene.living().items() if pid not in frozen}
    assert all(is_alive(pid) for pid in frozen)
    assert all(name.startswith((WARDEN, INIT)) for name in others.values()), others
    survivors = [member for member in outcome.survivors if member.pid not in others]
    assert sorted(member.pid for member in survivors) == sorted(frozen)
    for survivor in survivors:
        assert (survivor.state, survivor.error) == ("D", 0)
        assert survivor.why == "in uninterruptible sleep (D)"
    scene.still_works()
    freezers[0].thaw()
    eventually(lambda: not scene.living(), "everything ends when it thaws")
    nothing_on_record(scene)


# -- the table


def test_every_row_is_tried() -> None:
    tried = {
        str(case.fault.name)
        for test in globals().values()
        for mark in getattr(test, "pytestmark", [])
        for case in mark.args[1]
    }
    assert tried == {fault.name for fault in FAULTS}


def test_every_cell_is_tried_in_the_default_run() -> None:
    for fault in FAULTS:
        run = fault_matrix.cases(fault.name)
        promised = {name for name in BACKENDS if fault.promise(name) is not Promise.ABSENT}
        assert {case.backend for case in run} == promised
        assert {case.moment for case in run} == set(fault.moments)
        assert {case.variant for case in run} == set(fault.variants)


def test_a_moment_is_tried_or_there_is_a_reason() -> None:
    for fault in FAULTS:
        for moment in Moment:
            variants = {name for name in fault.variants if (moment, name) in fault.senseless}
            assert bool(fault.variants_at(moment)) or moment in fault.senseless, (fault, moment)
            assert not variants or moment not in fault.senseless, (fault, moment)
        assert all(fault.senseless.values())


def test_the_document_shows_the_table() -> None:
    assert fault_matrix.documented() == fault_matrix.table()
