"""Random commands to real trees, several at a time, held against a simple model.

Hypothesis chooses what is started and what happens to it: kills with any policy from any number of
threads, signals, stops, faults of the warden and of the main process, leftovers, output with every
kind of reader, time limits. The model (wards.py) says for each tree what that can explain:

* a state is never left for an earlier one, and nothing ends that nobody has ended;
* the outcome is published once, with a reason, an exit status and stages that the commands explain;
* when it is published nothing of the tree lives, unless `leave` says so, and no survivor is named;
* a call never waits for the loop, and once a tree has been killed `wait` returns.

The commands are drawn before the first of them is carried out: what real processes do is not the
same twice, and Hypothesis must not depend on it. For the same reason an example that fails may
succeed when it is tried again; what it did is in the notes of its exception either way.

`HYPOTHESIS_PROFILE=commands-long` runs some thousand longer examples.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import proctree
from integration.puppets import LIFELINE_FD, build, signal_warden
from integration.wards import (
    ENDS_ALL,
    SHORT,
    Options,
    Told,
    Ward,
    standing_loop,
    together,
    until_none,
)
from proctree import KillPolicy, Stage, containment, tree
from proctree.process import fds, proof

# No deadline: how long an example takes says nothing on a busy machine. No shrinking by default: it
# tries hundreds of variants of what may fail only now and then, each with its generous waits.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}
settings.register_profile("commands", max_examples=10, phases=[Phase.generate], **_COMMON)
settings.register_profile("commands-long", max_examples=3000, phases=[Phase.generate], **_COMMON)
settings.register_profile(
    "commands-shrink", max_examples=3000, phases=[Phase.generate, Phase.shrink], **_COMMON
)
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "commands")
SETTINGS = settings.get_profile(_PROFILE)
LONG = _PROFILE != "commands"

AT_ONCE = 6
"""How many trees there are at a time."""

HARMLESS = {signal.SIGCONT, signal.SIGWINCH}
SIGNALS = [
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGKILL,
    signal.SIGSTOP,
    *sorted(HARMLESS),
]
SCOPES = ["main", "group", "tree"]


# -- what is there


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    structlog.reset_defaults()


def descendants() -> set[tuple[int, int]]:
    """Living and dead, by number and start time. The suite is a subreaper: nothing hides."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        stat = proof.read_stat(process.pid)
        if stat is not None:
            found.add((stat.pid, stat.start_time))
    return found


def new_since(before: set[tuple[int, int]], *, dead: bool) -> list[proof.Stat]:
    stats = (proof.read_stat(pid) for pid, _ in descendants() - before)
    return [stat for stat in stats if stat is not None and stat.dead == dead]


def lifeline_of(pid: int) -> str:
    """What shows whose it is; for anything but a puppet, something that shows nothing."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{LIFELINE_FD}")
    return f"no puppet: {proof.read_stat(pid)}"


class Orphans:
    """Reaps them, all the time. They come to the suite since it is a subreaper; elsewhere they come
    to pid 1, which does this. A PID namespace cannot end before."""

    def __init__(self, before: set[tuple[int, int]]) -> None:
        self._before = before
        self._wards: list[Ward] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def but_for(self, ward: Ward) -> None:
        """What proctree has started for it is proctree's to reap."""
        self._wards.append(ward)

    def _run(self) -> None:
        # Nothing but waiting for every child tells of them, and that would tell of the others too.
        while not self._stop.wait(0.005):
            with fds.making():  # nobody is being started
                ours = {ward.started_pid for ward in self._wards}
                for stat in new_since(self._before, dead=True):
                    if stat.ppid == os.getpid() and stat.pid not in ours:
                        with contextlib.suppress(ChildProcessError):
                            os.waitpid(stat.pid, os.WNOHANG)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


# -- the commands


class World:
    """The trees of one example, and what can be done to them: each method is a command."""

    def __init__(self, name: str, program: str, folder: Path, told: Told) -> None:
        self.name = name
        self.program = program
        self.folder = folder
        self.told = told
        self.wards: list[Ward] = []
        self.closed: list[Ward] = []
        self.before = descendants()
        self.orphans = Orphans(self.before)
        self.owned = len(fds._owned)

    def do(self, command: Command) -> None:
        """Carries one out, on the tree that it hits, and looks at all of them."""
        if self.wards:
            ward = self.wards[command.which % len(self.wards)]
            getattr(self, command.name)(ward, **command.arguments)
        for ward in (*self.wards, *self.closed):
            ward.look()
        assert not self.told.defects

    def _add(self, options: Options) -> Ward:
        ward = Ward(options, self.name, self.program, self.folder)
        self.wards.append(ward)
        self.orphans.but_for(ward)
        return ward

    def make(self, _other: Ward | None, options: Options) -> None:
        if len(self.wards) >= AT_ONCE:
            return
        ward = self._add(options)
        with pytest.raises(RuntimeError, match="not launched"):
            ward.handle.wait()
        with pytest.raises(RuntimeError, match="not launched"):
            ward.handle.signal(signal.SIGTERM)
        assert ward.handle.wait(0.0) is None

    def start(self, _other: Ward | None, options: Options) -> None:
        if len(self.wards) < AT_ONCE:
            self._add(options).launch()

    def launch(self, ward: Ward) -> None:
        if ward.launched or ward.kills:
            with pytest.raises(proctree.ProctreeError):
                ward.handle.launch()
        else:
            ward.launch()

    def launch_and_kill(self, ward: Ward, policies: list[KillPolicy | None]) -> None:
        """At the same time."""
        if not ward.launched and not ward.kills:
            together(ward.launch, *ward.killers(policies))

    def kill(self, ward: Ward, policies: list[KillPolicy | None], standing: bool) -> None:
        ward.kill(policies, standing=standing)

    def send(self, ward: Ward, signo: signal.Signals, scope: str) -> None:
        if not ward.launched and not ward.kills:
            return
        if signo == signal.SIGSTOP:
            ward.stopped = True
        elif signo not in HARMLESS:
            ward.lethal.add(int(signo))
        together(lambda: ward.handle.signal(signo, scope))

    def freeze(self, ward: Ward, standing: bool) -> None:
        if not ward.launched and not ward.kills:
            return
        ward.stopped = True
        with standing_loop() if standing else contextlib.nullcontext():
            together(ward.handle.freeze)

    def thaw(self, ward: Ward) -> None:
        if not ward.launched and not ward.kills:
            return
        together(ward.handle.thaw)
        ward.stopped = False
        if ward.responds:
            ward.tell("")

    def freeze_and_thaw(self, ward: Ward) -> None:
        self.freeze(ward, standing=False)
        self.thaw(ward)

    def tell(self, ward: Ward, script: str) -> None:
        ward.tell(script)

    def tell_to_exit(self, ward: Ward, script: str) -> None:
        ward.tell_to_exit(script)

    def tell_to_hurt_itself(self, ward: Ward, letter: str) -> None:
        if letter == "k":
            ward.lethal.add(int(signal.SIGKILL))
        else:
            # Nobody knows when, and so whether a SIGCONT comes before or after.
            ward.uncertain = True
        ward.puppets.tell(letter)

    def shoot_main(self, ward: Ward, signo: signal.Signals) -> None:
        if ward.puppets.shoot_main(ward.handle.pid, signo):
            ward.lethal.add(int(signo))

    def hurt_warden(self, ward: Ward, fault: str) -> None:
        if fault == "kill":
            ward.warden_killed |= signal_warden(ward.handle, signal.SIGKILL)
        elif signal_warden(ward.handle, signal.SIGSTOP):
            ward.uncertain = True
            if fault == "blink":
                signal_warden(ward.handle, signal.SIGCONT)
            else:
                ward.warden_stopped = True

    def hold_stdout(self, ward: Ward) -> None:
        held = ward.puppets.hold_stdout(ward.handle.pid)
        if held is not None:
            ward.holds.append(held)

    def let_callback_go_on(self, ward: Ward) -> None:
        ward.go_on.set()

    def wait(self, ward: Ward, seconds: float) -> None:
        outcome = ward.handle.wait(seconds)
        assert outcome is None or outcome is ward.handle.outcome

    def look_inside(self, ward: Ward) -> None:
        assert ward.handle.name in repr(ward.handle)
        assert ward.launched or not ward.handle.processes()

    def settle(self, ward: Ward) -> None:
        if ward.must_end or ward.ends_by_itself:
            ward.settle()
            self.wards.remove(ward)
            self.closed.append(ward)

    # -- the end of the example

    def finish(self) -> None:
        for ward in self.wards:
            ward.go_on.set()
            if ward.ends_by_itself:
                continue
            ward.kill([SHORT if ward.warden_stopped else KillPolicy((ENDS_ALL,))])
        for ward in self.wards:
            ward.settle()
        self._look_for_leaks()

    def _look_for_leaks(self) -> None:
        wards = [*self.wards, *self.closed]
        for ward in wards:
            self.told.check_once(ward.handle.tree_id)
        left = {ward.puppets.path for ward in wards if ward.was_let_go}

        def strangers() -> list[str]:
            pids = (stat.pid for stat in new_since(self.before, dead=False))
            return [line for line in map(lifeline_of, pids) if line not in left]

        # A warden that lets its tree go has its own end before it.
        until_none(strangers, "processes that live and were not to be left")
        until_none(lambda: new_since(self.before, dead=True), "processes that are not reaped")
        until_none(lambda: tree._alive, "trees that are not closed")
        until_none(lambda: len(fds._owned) - self.owned, "descriptors that are not closed")

    def close(self) -> None:
        for ward in (*self.wards, *self.closed):
            with contextlib.suppress(Exception):
                ward.handle.kill(SHORT)
            ward.close()
        try:
            until_none(self._let_go, "processes that do not end by themselves")
        finally:
            self.orphans.stop()
        # A tree that lost its warden and took long to die has survivors, and so keeps its entry.
        proctree.sweep()

    def _let_go(self) -> list[proof.Stat]:
        """Nobody reads the lifelines any more, and so puppets end; one that is stopped or frozen
        does not see that. A warden that was killed before it let them go leaves them frozen."""
        if self.name == "cgroup":
            for ward in (*self.wards, *self.closed):
                with contextlib.suppress(OSError):
                    leaf = Path(str(ward.handle._tree.contained.cgroup))
                    (leaf / "cgroup.freeze").write_text("0")
        alive = new_since(self.before, dead=False)
        for stat in alive:
            pidfd = proof.open_pidfd(stat.pid)
            if pidfd is None:
                continue
            now = proof.read_stat(stat.pid)
            if now is not None and now.start_time == stat.start_time:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)
        return alive


# -- and how they are chosen


class Command(NamedTuple):
    """A method of `World`, which of its trees it hits, and its further arguments."""

    name: str
    which: int
    arguments: dict[str, Any]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({self.which}: {arguments})"


def _stages() -> st.SearchStrategy[Stage]:
    graces = st.sampled_from([0.0, 0.02, 0.1])
    return st.builds(Stage, st.sampled_from(SIGNALS), graces, st.sampled_from(SCOPES))


def _policies() -> st.SearchStrategy[KillPolicy]:
    return st.lists(_stages(), max_size=3).map(lambda first: KillPolicy([*first, ENDS_ALL]))


def _scripts() -> st.SearchStrategy[str]:
    return st.text("cCgztwW", max_size=4)


OPTIONS = st.builds(
    Options,
    target=st.sampled_from(["program"] * 10 + ["callable", "missing"]),
    script=_scripts(),
    leftovers=st.sampled_from(["kill", "wait", "leave"]),
    policy=_policies(),
    timeout=st.sampled_from([None] * 5 + [3600.0, 0.05, 0.0]),
    reader=st.sampled_from(["nobody", "capture", "collect", "raise", "kill", "block"]),
)


def _command(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Command]:
    return st.builds(Command, st.just(name), st.integers(0, 5), st.fixed_dictionaries(arguments))


_KILLS = st.lists(st.none() | _policies(), min_size=1, max_size=3)
_START = _command("start", options=OPTIONS)
_WEIGHTED: list[tuple[int, str, dict[str, st.SearchStrategy[Any]]]] = [
    (5, "start", {"options": OPTIONS}),
    (2, "make", {"options": OPTIONS}),
    (2, "launch", {}),
    (2, "launch_and_kill", {"policies": _KILLS}),
    (2, "kill", {"policies": _KILLS, "standing": st.booleans()}),
    (1, "send", {"signo": st.sampled_from(SIGNALS), "scope": st.sampled_from(SCOPES)}),
    (1, "freeze", {"standing": st.booleans()}),
    (2, "thaw", {}),
    (2, "freeze_and_thaw", {}),
    (5, "tell", {"script": _scripts()}),
    (5, "tell_to_exit", {"script": _scripts()}),
    (1, "tell_to_hurt_itself", {"letter": st.sampled_from("ks")}),
    (1, "shoot_main", {"signo": st.sampled_from([signal.SIGKILL, signal.SIGTERM])}),
    # A warden that stays stopped costs two seconds.
    (2, "hurt_warden", {"fault": st.sampled_from(["kill"] * 6 + ["blink"] * 5 + ["stop"])}),
    (1, "hold_stdout", {}),
    (1, "let_callback_go_on", {}),
    (2, "wait", {"seconds": st.sampled_from([0.0, 0.01, 0.1])}),
    (1, "look_inside", {}),
    (5, "settle", {}),
]
COMMANDS = st.sampled_from([entry for entry in _WEIGHTED for _ in range(entry[0])]).flatmap(
    lambda entry: _command(entry[1], **entry[2])
)
LENGTH = 60 if LONG else 40


def available(name: str) -> bool:
    try:
        containment.choose(name)
    except proctree.ContainmentUnavailable:
        return False
    return True


@pytest.mark.timeout(0 if LONG else 300)
@pytest.mark.parametrize("name", containment.NAMES)
def test_random_commands(name: str, told: Told, tmp_path: Path) -> None:
    if not available(name):
        pytest.skip(f"{name} cannot be had here")
    program = build(tmp_path)

    @SETTINGS
    @given(start=_START, commands=st.lists(COMMANDS, min_size=20, max_size=LENGTH))
    def examples(start: Command, commands: list[Command]) -> None:
        world = World(name, program, tmp_path, told)
        done: list[Command] = []
        try:
            world.start(None, **start.arguments)
            for command in commands:
                done.append(command)
                world.do(command)
            world.finish()
        except BaseException as error:
            error.add_note("\n".join(f"  {command!r}" for command in (start, *done)))
            raise
        finally:
            world.close()

    examples()
