"""What the tests on real trees have in common."""

from __future__ import annotations

import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import proctree
from integration import databases, wardens
from integration import nursery as nurseries
from proctree.containment import NAMES, choose
from proctree.containment.warden import WARDEN_VARIABLE
from proctree.process import proof

HERE = Path(__file__).parent
DEADLINE = 30.0
"""Seconds that an event may take before a test says that it will not come."""

QUICK = proctree.KillPolicy(stages=(proctree.Stage(15, 0.3), proctree.Stage(9, 10.0)))
"""A short grace for what ignores SIGTERM, a long one behind SIGKILL."""


# -- Which warden: the installed one, and for marked tests those that report their own errors too.


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "warden_build" not in metafunc.fixturenames:
        return
    only = metafunc.config.getoption("--warden")
    if only is not None:
        names = [only]
    else:
        more = {name for mark in metafunc.definition.iter_markers("wardens") for name in mark.args}
        # Where these tests have been copied to without the sources, they are about something else.
        possible = more if wardens.SOURCES.is_dir() else set()
        names = [name for name in wardens.NAMES if name in possible or name == wardens.INSTALLED]
    if names != [wardens.INSTALLED]:
        metafunc.parametrize("warden_build", names, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The group backend has no warden: once is enough. Under valgrind a start takes half a second,
    so that one backend has to do when nothing else was asked for."""

    def needless(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec is not None else {}
        build = params.get("warden_build", wardens.INSTALLED)
        containment = params.get("containment", "warden")
        if build == wardens.VALGRIND and not item.config.getoption("--warden"):
            return containment != "warden"
        return build != wardens.INSTALLED and containment == "group"

    items[:] = [item for item in items if not needless(item)]


BUILDS = pytest.StashKey[dict[str, wardens.Build]]()
WATCHED = pytest.StashKey[wardens.Build]()


def build_once(config: pytest.Config, name: str) -> wardens.Build:
    builds = config.stash.setdefault(BUILDS, {})
    if name not in builds:
        builds[name] = wardens.build(name)
        # Behind the last teardown, and so not by a fixture: that still looks for reports.
        config.add_cleanup(builds[name].remove)
    return builds[name]


@pytest.fixture(autouse=True)
def warden_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the build that this test runs with."""
    name = getattr(request, "param", wardens.INSTALLED)
    if name == wardens.INSTALLED:
        return wardens.INSTALLED
    if reason := wardens.unavailable(name):
        pytest.skip(reason)
    for mark in request.node.iter_markers("not_with"):
        if mark.args[0] == name:
            pytest.skip(mark.args[1])
    build = build_once(request.config, name)
    request.node.stash[WATCHED] = build
    monkeypatch.setenv(WARDEN_VARIABLE, build.path)
    return str(name)


def fail_on_reports(item: pytest.Item) -> None:
    build = item.stash.get(WATCHED, None)
    if build is not None and (reports := build.take_reports()):
        pytest.fail(f"the warden reported:\n{reports}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """A report fails the test that caused it, whatever else came of it. Looked for behind all
    fixtures: one of them waits until every process that the test has started is gone."""
    try:
        return (yield)
    finally:
        fail_on_reports(item)


@pytest.fixture(scope="session")
def actors() -> Iterator[str]:
    """The path of the program in actors.c; in a folder that every user may enter."""
    folder = tempfile.mkdtemp(prefix="proctree-actors-")
    os.chmod(folder, 0o755)
    path = os.path.join(folder, "actors")
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", path, str(HERE / "actors.c")], check=True
    )
    yield path
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server() -> Iterator[databases.Server | None]:
    """A PostgreSQL server, or None where it is not installed."""
    with databases.postgresql() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, server: databases.Server | None, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/records"
    if server is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return server.new_url()


@pytest.fixture(scope="session")
def nursery() -> Iterator[nurseries.Nursery]:
    """Where Python processes come from."""
    with nurseries.running() as running:
        yield running


def available(containment: str) -> str:
    """The name, or the test is skipped because it cannot be had on this machine."""
    try:
        choose(containment)
    except proctree.ContainmentUnavailable as error:
        pytest.skip(str(error))
    return containment


@pytest.fixture(params=NAMES)
def containment(request: pytest.FixtureRequest) -> str:
    """For what every backend promises."""
    return available(str(request.param))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What became of the processes of which nothing is promised: see test_fault_matrix.py."""
    seen = [
        f"{report.nodeid}: {what}"
        for report in terminalreporter.stats.get("passed", [])
        for key, what in report.user_properties
        if key == "seen"
    ]
    if seen:
        terminalreporter.section("seen where less is promised")
        for line in seen:
            terminalreporter.line(line)


class Lines:
    """A line callback, and somebody who waits for lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._changed:
            self.lines.append(line)
            self._changed.notify_all()

    def wait_for(self, count: int = 1) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.lines) >= count, DEADLINE), self.lines
            return list(self.lines)


def eventually(condition: Callable[[], bool], what: str) -> None:
    """For what nothing reports: states in /proc."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


class Stopwatch:
    """For the few tests of how long something takes: what the machine owes everybody meanwhile, as
    beside somebody's fork bomb, does not count."""

    _TICK = 0.01

    def __init__(self) -> None:
        self._late = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sleep, daemon=True)
        self._began = time.monotonic()
        self._thread.start()

    def _sleep(self) -> None:
        while not self._done.is_set():
            began = time.monotonic()
            self._done.wait(self._TICK)
            self._late += max(0.0, time.monotonic() - began - self._TICK)

    def stop(self) -> float:
        """The seconds since it was made, without those by which a mere sleeper was late."""
        took = time.monotonic() - self._began
        self._done.set()
        self._thread.join()
        return took - self._late


def in_thread(function: Callable[[], Any], name: str | None = None) -> queue.Queue[Any]:
    """Gets what it returns, or the exception that it raises, when it does."""
    results: queue.Queue[Any] = queue.Queue()

    def call() -> None:
        try:
            results.put(function())
        except Exception as error:
            results.put(error)

    threading.Thread(target=call, name=name, daemon=True).start()
    return results


_before: set[int] = set()
"""Processes that several tests share, as a database server: they were there when this one began."""


@pytest.fixture(autouse=True)
def known_processes() -> None:
    """Fixtures of a wider scope come before this one."""
    _before.clear()
    _before.update(process.pid for process in psutil.Process().children())


def relatives() -> Iterator[proof.Stat]:
    """Every living process below this one that was not there when the test began. The suite is a
    subreaper: nothing hides."""
    known = set(_before)
    # Parents come before their children.
    for process in psutil.Process().children(recursive=True):
        stat = proof.read_stat(process.pid)
        if stat is None:
            continue
        if stat.pid in known or stat.ppid in known:
            known.add(stat.pid)
        elif not stat.dead:
            yield stat


def living() -> list[str]:
    """The same, by name."""
    return [f"{stat.pid} {stat.name} (parent {stat.ppid})" for stat in relatives()]


def outer_pid(handle: proctree.WatchedSubprocess, inner: int) -> int:
    """Our number for a member that tells us its own: NSpid, proc_pid_status(5)."""
    if handle.containment != "pidns":
        return inner
    for info in handle.processes():
        for line in Path(f"/proc/{info.pid}/status").read_text().splitlines():
            if line.startswith("NSpid:") and int(line.split()[-1]) == inner:
                return info.pid
    raise AssertionError(f"no member calls itself {inner}")


def is_alive(pid: int) -> bool:
    stat = proof.read_stat(pid)
    return stat is not None and not stat.dead


class Lifeline:
    """A pipe whose write end a tree inherits: it ends when the last process that has it does."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_inheritable(self.writer, True)

    def handed_over(self) -> None:
        os.close(self.writer)

    def cut(self, timeout: float = DEADLINE) -> bool:
        ready, _, _ = select.select([self.reader], [], [], timeout)
        return bool(ready) and os.read(self.reader, 1) == b""

    def close(self) -> None:
        os.close(self.reader)


@pytest.fixture
def lifeline() -> Iterator[Lifeline]:
    line = Lifeline()
    yield line
    line.close()


def start_supervisor(code: str, *args: str, **options: object) -> subprocess.Popen[str]:
    """A Python that supervises: `code` runs in it, and talks to us by lines on its stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )
