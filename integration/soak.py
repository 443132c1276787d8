"""Many trees, from many threads, on a busy machine, with random faults; and afterwards nothing.

    python -m integration.soak --trees 10000 --threads 8 --containment warden

Two processes. The outer one is a child subreaper, as pid 1 of a container would be: whatever gets
away from its tree, whatever it does to its session, its parents or its environment, becomes its
child and is found. Beside it two puppets use up the processors at the lowest priority. The inner
one supervises: each thread starts a tree of puppets, something happens to it (`KINDS`), often at a
random moment and from another thread, and the model of wards.py says whether its end is explained.
When the outcome is there nothing of the tree may live.

Now and then all threads pause, and then there must be nothing at all: no process below the outer
one, no zombie, no descriptor more than in the beginning, no thread more, nothing in the tables of
proctree, and no more memory than there was after the warm-up.

What a tree does follows from the seed and its number alone, so that it can be tried again:
`--seed S --first NUMBER --trees 1`. Exit status 1: something was violated, and is told.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

import proctree
from integration.puppets import Puppets, build, signal_warden
from integration.wards import ENDS_ALL, SHORT, Options, Told, Ward, until_none
from proctree import KillPolicy, Outcome, Reason, Stage, containment, loop, tree, worker
from proctree.process import cgroups, fds, prctl, proof

BUSY = 2
"""How many puppets use up the processors."""

GENTLE = KillPolicy((Stage(signal.SIGTERM, 0.03), ENDS_ALL))
POLICIES = [
    GENTLE,
    KillPolicy((ENDS_ALL,)),
    KillPolicy((Stage(signal.SIGINT, 0.01, "main"), Stage(signal.SIGTERM, 0.02), ENDS_ALL)),
    KillPolicy((Stage(signal.SIGHUP, 0.0, "group"), Stage(signal.SIGKILL, 0.01, "main"), ENDS_ALL)),
]
READERS = ["nobody", "nobody", "capture", "collect"]
MOMENTS = 0.02
"""Seconds in which a fault comes: from before the start to well after it."""

GROWTH_MEMORY = 8 * 1024 * 1024
GROWTH_BLOCKS = 3000
"""How much more resident memory, and how many more blocks of Python's allocator, there may be at
the end than after the warm-up. One object that stays for each tree would be thousands."""

VIOLATIONS_MAX = 10

DAY, WEEK = 86400.0, 7 * 86400.0


class Plan(NamedTuple):
    """One soak."""

    trees: int
    threads: int
    seed: int
    first: int
    containment: str


# -- what happens to a tree


class Hazard:
    """A thread that does something at a random moment.

    One for each supervising thread: what it does comes in the middle of whatever that one and the
    loop are doing.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[float, Callable[[], object], threading.Event] | None]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="soak-hazard", daemon=True)
        self._thread.start()
        self.errors: list[BaseException] = []

    def soon(self, delay: float, job: Callable[[], object]) -> threading.Event:
        done = threading.Event()
        self._jobs.put((delay, job, done))
        return done

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            delay, job, done = item
            time.sleep(delay)  # no event: any moment is as good as another
            try:
                job()
            except BaseException as error:
                self.errors.append(error)
            done.set()


class Life:
    """One tree, from its making to its end."""

    def __init__(self, plan: Plan, number: int, program: str, folder: Path) -> None:
        self.random = random.Random(f"{plan.seed}:{number}")
        self.plan = plan
        self.program = program
        self.folder = folder
        self.kind = self.random.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        self.ward: Ward | None = None
        self.hazards: list[threading.Event] = []

    def run(self, hazard: Hazard) -> tuple[str, Reason]:
        """Lives it; returns its id, and why it ended."""
        self.hazard = hazard
        try:
            outcome = KINDS[self.kind][1](self)
            return outcome.tree_id, outcome.reason
        finally:
            for done in self.hazards:
                done.wait()
            if hazard.errors:
                raise hazard.errors.pop()
            if self.ward is not None:
                self.ward.close()

    def _make(self, script: str, **options: object) -> Ward:
        defaults = {
            "target": "callable" if self.random.random() < 0.1 else "program",
            "script": script,
            "leftovers": "kill",
            "policy": self.random.choice(POLICIES),
            # Its timer is in the loop's table, and has to be out of it with the tree.
            "timeout": self.random.choice([None, WEEK]),
            "reader": self.random.choice(READERS),
        }
        chosen = Options(**{**defaults, **options})  # type: ignore[arg-type]
        self.ward = Ward(chosen, self.plan.containment, self.program, self.folder)
        return self.ward

    def _soon(self, job: Callable[[], object]) -> None:
        self.hazards.append(self.hazard.soon(self.random.uniform(0.0, MOMENTS), job))

    def _finish(self, ward: Ward) -> Outcome:
        ward.settle()
        assert ward.outcome is not None
        return ward.outcome

    def _script(self, letters: str, longest: int) -> str:
        return "".join(self.random.choices(letters, k=self.random.randint(0, longest)))

    # The kinds.

    def exits(self) -> Outcome:
        ward = self._make(self._script("wz", 3) + "q")
        ward.launch()
        return self._finish(ward)

    def killed(self) -> Outcome:
        ward = self._make(self._script("cCgzt", 3))
        ward.launch()
        ward.kill([self.random.choice(POLICIES)])
        return self._finish(ward)

    def killed_at_any_moment(self) -> Outcome:
        ward = self._make(self._script("cCgztw", 3))
        for call in ward.killers(self.random.choices([None, *POLICIES], k=2)):
            self._soon(call)
        ward.launch()
        return self._finish(ward)

    def ignores_sigterm(self) -> Outcome:
        ward = self._make("tCg", policy=GENTLE)
        ward.launch()
        ward.kill([None])
        return self._finish(ward)

    def leaves_daemons(self) -> Outcome:
        ward = self._make(self._script("cCgz", 3) + "gq", policy=GENTLE)
        ward.launch()
        return self._finish(ward)

    def lets_leftovers_go(self) -> Outcome:
        refused = self.plan.containment == "pidns"
        ward = self._make("q" if refused else "cgq", leftovers="leave", reader="nobody")
        ward.launch()
        return self._finish(ward)

    def times_out(self) -> Outcome:
        ward = self._make(self._script("cgt", 2), timeout=self.random.uniform(0.0, 0.05))
        ward.launch()
        return self._finish(ward)

    def main_is_shot(self) -> Outcome:
        ward = self._make(self._script("cCgw", 3))
        # Said before it is done: the end may be known at once.
        ward.lethal.add(int(signal.SIGKILL))
        ward.launch()

        def shoot() -> None:
            if not ward.puppets.shoot_main(ward.handle.pid, signal.SIGKILL):
                ward.kill([None])  # it is no puppet yet

        self._soon(shoot)
        # It has to end, but the model does not rely on a shot.
        for done in self.hazards:
            done.wait()
        return self._finish(ward)

    def warden_is_killed(self) -> Outcome:
        ward = self._make(self._script("cCgw", 3))
        ward.warden_killed = True

        def kill() -> None:
            if not signal_warden(ward.handle, signal.SIGKILL):
                ward.kill([None])  # there is no warden (yet)

        self._soon(kill)
        ward.launch()
        return self._finish(ward)

    def warden_is_stopped(self) -> Outcome:
        ward = self._make(self._script("cCgw", 3))
        ward.warden_stopped = True
        ward.uncertain = True
        (kill,) = ward.killers([SHORT])

        def stop() -> None:
            signal_warden(ward.handle, signal.SIGSTOP)
            kill()

        self._soon(stop)
        ward.launch()
        return self._finish(ward)

    def floods(self) -> Outcome:
        reader = self.random.choice(["nobody", "head and tail"])
        ward = self._make("f", target="program", reader=reader)
        self._soon(ward.killers([self.random.choice(POLICIES)])[0])
        ward.launch()
        return self._finish(ward)

    def cannot_be_executed(self) -> Outcome:
        ward = self._make("", target="missing")
        ward.launch()
        return self._finish(ward)

    def callback_raises(self) -> Outcome:
        ward = self._make("wwwq", reader="raise")
        ward.launch()
        return self._finish(ward)

    def callback_kills(self) -> Outcome:
        ward = self._make("Cw", reader="kill")
        ward.launch()
        return self._finish(ward)

    def callable_ends(self) -> Outcome:
        """Python code as the main process; one of them leaves a child."""
        puppets = Puppets(self.program, self.folder)

        def leaves() -> None:
            if os.fork() == 0:
                argv = puppets.argv("t")
                os.execv(argv[0], argv)

        def exits() -> None:
            sys.exit(7)

        def raises() -> None:
            raise ValueError("a callable that raises")

        def prints() -> None:
            print("from the callable")

        function, status = self.random.choice([(leaves, 0), (exits, 7), (raises, 1), (prints, 0)])
        try:
            outcome = proctree.run(
                function,
                stdout=proctree.CAPTURE,
                stderr=proctree.DEVNULL,
                containment=self.plan.containment,
                kill=GENTLE,
            )
            assert not puppets.live(), outcome
        finally:
            puppets.close()
        assert (outcome.reason, outcome.returncode) == (Reason.EXITED, status), outcome
        assert not outcome.survivors, outcome
        assert outcome.stdout == (b"from the callable\n" if function is prints else b"")
        assert len(outcome.leftovers) == (function is leaves), outcome
        return outcome


KINDS: dict[str, tuple[float, Callable[[Life], Outcome]]] = {
    "exits": (18, Life.exits),
    "killed": (14, Life.killed),
    "killed at any moment": (18, Life.killed_at_any_moment),
    "ignores SIGTERM": (8, Life.ignores_sigterm),
    "leaves daemons": (8, Life.leaves_daemons),
    "lets leftovers go": (3, Life.lets_leftovers_go),
    "times out": (5, Life.times_out),
    "main is shot": (5, Life.main_is_shot),
    "warden is killed": (6, Life.warden_is_killed),
    "warden is stopped": (1, Life.warden_is_stopped),
    "floods": (3, Life.floods),
    "cannot be executed": (3, Life.cannot_be_executed),
    "callback raises": (3, Life.callback_raises),
    "callback kills": (3, Life.callback_kills),
    "callable ends": (5, Life.callable_ends),
}
"""Each with its weight. Where there is no warden, the faults of one are kills."""


# -- the inner process


class Place(NamedTuple):
    """Where trees have something in the file system."""

    registry: Path
    cgroup: Path | None

    def kept(self) -> list[str]:
        leaves = (
            [] if self.cgroup is None else [p.name for p in self.cgroup.iterdir() if p.is_dir()]
        )
        return leaves + (os.listdir(self.registry) if self.registry.exists() else [])


class Tables(NamedTuple):
    """What must be the same whenever no tree runs."""

    processes: frozenset[str] = frozenset()
    cgroups_and_entries: frozenset[str] = frozenset()
    alive_trees: frozenset[object] = frozenset()
    owned_descriptors: frozenset[int] = frozenset()
    handlers: frozenset[int] = frozenset()


class Sizes(NamedTuple):
    """What must not grow."""

    memory: int
    blocks: int
    descriptors: int
    threads: int


class Soak:
    """The supervising process."""

    def __init__(self, plan: Plan, program: str, folder: Path, place: Place) -> None:
        self.plan = plan
        self.program = program
        self.folder = folder
        self.place = place
        self.violations: list[str] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.told = Told()
        self.before = Tables()
        self._numbers: Iterator[int] = iter(())
        self._taking = threading.Lock()
        self._libc = ctypes.CDLL(None)

    def run(self) -> int:
        began = time.monotonic()
        sizes: list[Sizes] = []
        loop.get()  # its descriptors belong to the process
        with self._bystander() as bystander:
            for numbers in self._rounds():
                self._live_through(numbers)
                clean = not self.violations
                sizes.append(self._pause())
                self._look_at(bystander)
                if len(self.violations) >= VIOLATIONS_MAX or (clean and self.violations):
                    break  # what is left now would be left in every pause to come
        self._pause()
        if not self.violations:
            self._compare(sizes)
        self._print(sizes, time.monotonic() - began)
        return 1 if self.violations else 0

    def _rounds(self) -> list[range]:
        numbers = range(self.plan.first, self.plan.first + self.plan.trees)
        warm_up = max(self.plan.trees // 10, min(self.plan.trees, 2 * self.plan.threads))
        return [numbers[:warm_up], *_pieces(numbers[warm_up:], 10)]

    @contextlib.contextmanager
    def _bystander(self) -> Iterator[Ward]:
        """A tree that lives through all of it, and that nobody signals. Its time limit comes before
        those of the others: what they leave in the table of timers would stay behind it."""
        options = Options("program", "tcg", "kill", GENTLE, DAY, "capture")
        ward = Ward(options, self.plan.containment, self.program, self.folder)
        empty = self.before = self._tables()
        try:
            ward.launch()
            self.told.forget(ward)
            self.before = self._tables()
            yield ward
            ward.kill([None])
            ward.settle()
        finally:
            self.before = empty
            ward.handle.kill(KillPolicy.now())
            ward.handle.wait()
            self.told.forget(ward)
            ward.close()

    def _look_at(self, bystander: Ward) -> None:
        try:
            bystander.look()
            bystander.tell("")
        except AssertionError as error:
            self._violated("the bystander", error)

    # Living.

    def _live_through(self, numbers: range) -> None:
        self._numbers = iter(numbers)
        threads = [threading.Thread(target=self._work) for _ in range(self.plan.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _next(self) -> int | None:
        with self._taking:
            return next(self._numbers, None)

    def _work(self) -> None:
        hazard = Hazard()
        while (number := self._next()) is not None and len(self.violations) < VIOLATIONS_MAX:
            life = Life(self.plan, number, self.program, self.folder)
            try:
                tree_id, reason = life.run(hazard)
                self.told.check_once(tree_id)
                self.counts[life.kind, reason] += 1
            except BaseException as error:
                self.counts[life.kind, "VIOLATION"] += 1
                self.told.forget(life.ward)
                self._violated(f"tree {number}, {life.kind!r}, {life.ward}", error)
        hazard.stop()

    def _violated(self, what: str, error: BaseException | None = None) -> None:
        text = "" if error is None else "".join(traceback.format_exception(error))
        self.violations.append(f"{what}\n{text}")

    # Looking around, while no thread has a tree.

    def _tables(self) -> Tables:
        return Tables(
            frozenset(self._processes()),
            frozenset(self.place.kept()),
            frozenset(tree._alive),
            frozenset(fds._owned),
            frozenset(loop.get()._handlers),
        )

    def _surplus(self) -> list[str]:
        """What there is more or less than before the first tree."""
        now = self._tables()
        pairs = zip(Tables._fields, now, self.before, strict=True)
        return [f"{name}: {a ^ b}" for name, a, b in pairs if a != b]

    def _pause(self) -> Sizes:
        checks: list[tuple[Callable[[], object], str]] = [
            (self._surplus, "a difference"),
            (lambda: len(loop.get()._inbox), "jobs in the loop's inbox"),
            (lambda: len(worker._threads._jobs), "jobs for callback threads"),
            (lambda: [*self.told.started, *self.told.ended], "events of trees"),
            (lambda: self.told.defects, "defects that were logged"),
            (self._surplus_threads, "threads"),
        ]
        for left, what in checks:
            try:
                until_none(left, what)
            except AssertionError as error:
                self._violated(f"while nothing runs: {error}")
        # A timer that was cancelled may stay in the heap for a while, but not for each tree.
        timers = len(loop.get()._timers)
        if timers > 8 * self.plan.threads + 64:
            self._violated(f"left while nothing runs: {timers} timers in the loop")
        gc.collect()
        self._libc.malloc_trim(0)
        memory = psutil.Process().memory_info().rss
        descriptors = len(os.listdir("/proc/self/fd"))
        return Sizes(memory, sys.getallocatedblocks(), descriptors, threading.active_count())

    def _processes(self) -> list[str]:
        """Everything below the outer process, living or dead."""
        found = []
        for process in psutil.Process(os.getppid()).children(recursive=True):
            stat = proof.read_stat(process.pid)
            if stat is not None:
                dead = " (dead)" if stat.dead else ""
                found.append(f"{stat.pid} {stat.name}{dead} below {stat.ppid}")
        return found

    def _surplus_threads(self) -> list[str]:
        """But for the callback threads, which are kept for a while: as many as there were trees at
        a time, and their sweeps."""
        names = [thread.name for thread in threading.enumerate()]
        callbacks = [name for name in names if name == "proctree-callbacks"]
        others = [name for name in names if name not in callbacks]
        surplus = set(others) - {"MainThread", "proctree-loop"}
        return [*surplus, *callbacks[2 * self.plan.threads :]]

    def _compare(self, sizes: list[Sizes]) -> None:
        before, after = sizes[0], sizes[-1]
        if after.memory - before.memory > GROWTH_MEMORY:
            self._violated(f"memory grew by {after.memory - before.memory} bytes")
        if after.blocks - before.blocks > GROWTH_BLOCKS:
            self._violated(f"{after.blocks - before.blocks} more blocks of Python's memory")
        if after.descriptors != before.descriptors:
            self._violated(f"descriptors: {before.descriptors}, then {after.descriptors}")

    # Telling.

    def _print(self, sizes: list[Sizes], seconds: float) -> None:
        plan = self.plan
        lived = sum(self.counts.values())
        print(
            f"containment {plan.containment}, seed {plan.seed}, {lived} trees, "
            f"{plan.threads} threads, {seconds:.0f} s, {lived / seconds:.0f} trees/s\n"
        )
        for kind in KINDS:
            reasons = {why: n for (name, why), n in sorted(self.counts.items()) if name == kind}
            told = ", ".join(f"{n} {why}" for why, n in reasons.items())
            print(f"  {kind:<22}{sum(reasons.values()):>6}  {told}")
        first, last = sizes[0], sizes[-1]
        mib = 1024 * 1024
        print(f"\n  {'':<22}{'after warm-up':>14}{'at the end':>12}{'highest':>10}")
        highest = Sizes(*map(max, zip(*sizes, strict=True)))
        rows: list[tuple[str, Callable[[Sizes], str]]] = [
            ("resident MiB", lambda size: f"{size.memory / mib:.1f}"),
            ("Python's blocks", lambda size: str(size.blocks)),
            ("descriptors", lambda size: str(size.descriptors)),
            ("threads", lambda size: str(size.threads)),
        ]
        for name, show in rows:
            print(f"  {name:<22}{show(first):>14}{show(last):>12}{show(highest):>10}")
        print(
            f"\n  violations (orphans, zombies, descriptors, threads, tables, explanations): "
            f"{len(self.violations)}"
        )
        for violation in self.violations:
            print(f"\nVIOLATION: {violation}")
        sys.stdout.flush()


def _pieces(numbers: range, count: int) -> list[range]:
    size = max(1, -(-len(numbers) // count))
    return [numbers[at : at + size] for at in range(0, len(numbers), size)]


# -- the outer process


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="proctree-soak-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _own_place(folder: Path) -> Iterator[Place]:
    """A registry, and where one can be made a cgroup, that are nobody else's."""
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    registry = folder / "proctree"
    try:
        home = cgroups.find_home(cgroups.own_path()).path
        cgroup = f"{home.rstrip('/')}/proctree-soak-{os.getpid()}"
        os.mkdir(cgroup)
    except (proctree.ContainmentUnavailable, OSError):
        yield Place(registry, None)
        return
    try:
        _move_to(cgroup)
        yield Place(registry, Path(cgroup))
    finally:
        _move_to(home)
        cgroups.end(cgroup, 10.0)


def _move_to(cgroup: str) -> None:
    Path(cgroup, "cgroup.procs").write_text("0")


@contextlib.contextmanager
def _busy_machine(program: str, folder: Path) -> Iterator[set[int]]:
    """The pids of what makes it so."""
    puppets = Puppets(program, folder)
    argv = puppets.argv("b")
    pids = {os.posix_spawn(argv[0], argv, os.environ) for _ in range(BUSY)}
    try:
        yield pids
    finally:
        puppets.close()  # they end by that
        for pid in pids:
            os.waitpid(pid, 0)


def _inner(plan: Plan, program: str, folder: Path, place: Place) -> None:
    status = 1
    try:
        faulthandler.register(signal.SIGUSR1)  # where everybody is, for when it hangs
        prctl.load().set_pdeathsig(signal.SIGKILL)  # and then every warden ends its tree
        status = Soak(plan, program, folder, place).run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap_until(child: int, allowed: set[int]) -> int:
    """What pid 1 does: waits for everybody, and here until `child` has ended."""
    while True:
        # Without taking it: whose status it is is known before.
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        assert info is not None
        if info.si_pid in allowed:
            raise RuntimeError("what keeps the machine busy has ended")
        _, status = os.waitpid(info.si_pid, 0)
        if info.si_pid == child:
            return os.waitstatus_to_exitcode(status)


def _left_over(allowed: set[int]) -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [process for process in children if process.pid not in allowed]


def soak(plan: Plan) -> int:
    prctl.load().set_child_subreaper(True)
    with _scratch() as folder:
        program = build(folder)
        with _own_place(folder) as place, _busy_machine(program, folder) as busy:
            child = os.fork()
            if child == 0:
                _inner(plan, program, folder, place)
            try:
                status = _reap_until(child, busy)
            except BaseException:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise
            left = _left_over(busy)
            for process in left:
                print(f"VIOLATION: left behind: {process}")
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    return 1 if left else status


def _arguments(arguments: list[str] | None) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m integration.soak")
    parser.add_argument("--trees", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    parser.add_argument("--first", type=int, default=0, help="the number of the first tree")
    parser.add_argument("--containment", default="warden", choices=containment.NAMES)
    plan = parser.parse_args(arguments)
    seed = int.from_bytes(os.urandom(3), "big") if plan.seed is None else plan.seed
    return Plan(plan.trees, plan.threads, seed, plan.first, plan.containment)


def _terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    # As an exception, so that everything is cleared away.
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(soak(_arguments(None)))
