"""Functions by name: in a fresh interpreter, and from a template."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog

import proctree
from integration.called import Adder, Double
from integration.conftest import (
    DEADLINE,
    QUICK,
    Lifeline,
    Lines,
    available,
    eventually,
    is_alive,
    living,
    start_supervisor,
)
from proctree import Function, KillPolicy, Reason, SpawnAttributes, Template, WatchedSubprocess
from proctree.channel import Server
from proctree.process import proof, sweep
from proctree.supervisor import Backoff, ChildSpec, Supervisor

CALLED = "integration.called"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    """One for all tests that do it no harm. What it consists of was there before each of them, and
    its entry is in another registry than theirs, where nothing may be left."""
    folder = tmp_path_factory.mktemp("registry")
    with Template([CALLED]) as template:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("XDG_RUNTIME_DIR", str(folder))
            template.start()
        yield template


SOURCES = [
    ("fresh", "warden"),
    ("fresh", "group"),
    ("template", "warden"),
    ("template", "cgroup"),
    ("template", "pidns"),
]
"""A fresh interpreter is a command like any other, but for the descriptor that it is handed: by a
warden, or by Python."""


@pytest.fixture(params=SOURCES, ids=lambda pair: "-".join(pair))
def options(request: pytest.FixtureRequest, shared: Template) -> dict[str, object]:
    """Where a function comes from, and what holds it."""
    source, containment = request.param
    template = shared if source == "template" else None
    return {"template": template, "containment": available(containment)}


@pytest.fixture(params=[("fresh", "warden"), ("template", "warden")], ids=lambda pair: pair[0])
def by_warden(request: pytest.FixtureRequest, shared: Template) -> dict[str, object]:
    """Where what holds it makes no difference."""
    source, containment = request.param
    return {"template": shared if source == "template" else None, "containment": containment}


@pytest.fixture(params=["fresh", "template"])
def template(request: pytest.FixtureRequest, shared: Template) -> Template | None:
    return shared if request.param == "template" else None


def call(name: str, *args: object, template: Template | None = None, **options: object):  # type: ignore[no-untyped-def]
    options.setdefault("stdout", proctree.CAPTURE)
    options.setdefault("kill", QUICK)
    options.setdefault("timeout", DEADLINE)
    return proctree.run(Function(f"{CALLED}:{name}", args, template=template), **options)  # type: ignore[arg-type]


def said(outcome: proctree.Outcome) -> str:
    assert outcome.ok, outcome
    assert (outcome.survivors, outcome.leftovers) == ((), ())
    return (outcome.stdout or b"").decode().removesuffix("\n")


SHARED: list[str] = []


@pytest.fixture(autouse=True)
def known(shared: Template) -> None:
    """What the shared template consists of is not what a test has started."""
    SHARED[:] = living()


def others() -> list[str]:
    return [line for line in living() if line not in SHARED]


def wardens() -> list[int]:
    return [int(line.split()[0]) for line in living() if "proctree-warden" in line]


# -- what is called, and how it ends


def test_arguments(options: dict[str, object]) -> None:
    before = wardens()
    outcome = call("arguments", 1, "two", [3], **options)
    assert said(outcome) == "(1, 'two', [3]) {}"
    assert outcome.reason is Reason.EXITED
    assert outcome.containment == options["containment"]
    assert wardens() == before, "its warden is gone when it is reported to be"


def test_keywords_methods_and_large_arguments(template: Template | None) -> None:
    function = Function(f"{CALLED}:arguments", kwargs={"a": 1}, template=template)
    assert said(proctree.run(function, stdout=proctree.CAPTURE)) == "() {'a': 1}"
    method = Function(f"{CALLED}:Adder.add", (1, 2, 4), template=template)
    assert said(proctree.run(method, stdout=proctree.CAPTURE)) == "7"
    # More than a pipe, an argument, or one read takes.
    assert said(call("lengths", bytes(3_000_000), b"", template=template)) == "[3000000, 0]"
    assert said(call("number_of", Adder(5), template=template)) == "5"


def test_a_text_is_a_function() -> None:
    with WatchedSubprocess.start(f"{CALLED}:Adder.add", stdout=proctree.CAPTURE) as handle:
        assert handle.name == "Adder.add"
        outcome = handle.wait(DEADLINE)
    assert outcome is not None
    assert said(outcome) == "0"


STATUSES = [("text", 1), (3, 3), (None, 0), (0, 0), (255, 255), (256, 0)]


def test_system_exit(template: Template | None) -> None:
    # In a fresh interpreter it is Python's own affair.
    for code, status in STATUSES if template else STATUSES[:2]:
        outcome = call("leave", code, template=template, stderr=proctree.CAPTURE)
        assert outcome.returncode == status, code
        assert outcome.stderr == (b"text\n" if code == "text" else b"")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fail", "ValueError: as it should"),
        ("nothing", "AttributeError: module 'integration.called' has no attribute 'nothing'"),
        ("leave", "TypeError: leave() missing 1 required positional argument"),
    ],
)
def test_an_exception(shared: Template, name: str, error: str) -> None:
    outcome = call(name, template=shared, stderr=proctree.CAPTURE)
    assert outcome.returncode == 1
    text = (outcome.stderr or b"").decode()
    assert text.startswith("Traceback")
    assert error in text


def test_a_module_that_is_not_there(template: Template | None) -> None:
    function = Function("integration.nowhere:f", template=template)
    outcome = proctree.run(function, stderr=proctree.CAPTURE)
    assert outcome.returncode == 1
    assert b"No module named 'integration.nowhere'" in (outcome.stderr or b"")


def test_a_signal(by_warden: dict[str, object]) -> None:
    lines = Lines()
    function = Function(f"{CALLED}:rest", template=by_warden["template"])  # type: ignore[arg-type]
    containment = str(by_warden["containment"])
    with WatchedSubprocess.start(
        function, stdout=proctree.Lines(lines), containment=containment, kill=QUICK
    ) as handle:
        lines.wait_for(1)
        handle.signal(signal.SIGKILL, "main")
        outcome = handle.wait(DEADLINE)
    assert outcome is not None
    assert (outcome.returncode, outcome.reason) == (-9, Reason.SIGNALED)


# -- what it is given


def test_surroundings(
    template: Template | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the supervisor now, and not when the template was started."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["one", "two"])
    root = os.getcwd()
    monkeypatch.syspath_prepend(root)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    lines = said(call("surroundings", template=template)).splitlines()
    assert lines[0] == str(tmp_path)
    assert lines[2] == f"True {root} two"
    lines = said(call("surroundings", template=template, cwd="below")).splitlines()
    assert lines[0] == str(tmp_path / "below")


def test_environment(options: dict[str, object]) -> None:
    lines = said(
        call("surroundings", env={"ONLY_HERE": "x", "LC_ALL": "C"}, **options)
    ).splitlines()
    names = ["LC_ALL", "ONLY_HERE", "PROCTREE_TREE"]
    assert lines[1] == f"x {names}"
    assert lines[2].startswith("True ")


def test_attributes(options: dict[str, object]) -> None:
    attributes = SpawnAttributes(nice=7, umask=0o027, rlimits={"nofile": 99})
    assert said(call("given", attributes=attributes, **options)) == "7 0o27 (99, 99)"


def test_a_terminal(by_warden: dict[str, object]) -> None:
    assert said(call("terminal", pty=True, **by_warden)).strip() == "[True, True, True] True"


def test_descriptors_under_their_numbers(options: dict[str, object]) -> None:
    """Also under those that something else has in between; and nothing else arrives."""
    with contextlib.ExitStack() as stack:
        readers, writers = {}, []
        for _ in range(20):
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            readers[writer] = reader
            writers.append(writer)
        high = os.dup2(writers[0], 300)
        readers[high] = readers[writers[0]]
        try:
            passed = [*writers[1:], high]
            outcome = call("write_numbers", passed, pass_fds=passed, **options)
        finally:
            for writer in (*writers, high):
                os.close(writer)
        for writer in passed:
            assert os.read(readers[writer], 100) == str(writer).encode()
            assert os.read(readers[writer], 100) == b""
    there = eval(said(outcome))
    assert len(there) == 3 + len(passed) + 1, "the directory that is listed is one more"
    assert {0, 1, 2, *passed} < set(there)


def test_a_descriptor_under_the_number_of_one_of_the_templates_own() -> None:
    with Template([CALLED]) as template, contextlib.ExitStack() as stack:
        template.start()
        folder = f"/proc/{template.pid}/fd"
        own = [n for n in os.listdir(folder) if os.readlink(f"{folder}/{n}").startswith("socket:")]
        number = int(own[0])
        pair = os.pipe()
        reader, writer = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 300) for fd in pair)
        stack.callback(os.close, reader)
        for fd in pair:
            os.close(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
        os.dup2(writer, number)
        os.close(writer)
        outcome = call("write_numbers", [number], pass_fds=[number], template=template)
        os.close(number)
        assert said(outcome)
        assert os.read(reader, 100) == str(number).encode()


def test_input_and_output_apart(template: Template | None, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    outcome = call("leave", "why", template=template, stdin=b"x", stderr=errors)
    assert (outcome.stdout, errors.read_text()) == (b"", "why\n")


def test_a_channel(by_warden: dict[str, object]) -> None:
    server = Server()

    @server.handler
    def double(request: Double, caller: object) -> int:
        return 2 * request.number

    assert said(call("ask", 21, channel=server, **by_warden)) == "42"


def test_a_tree_in_it(template: Template | None) -> None:
    assert said(call("nested", template=template)) == "5"


# -- the end of what it has started


def test_what_it_has_scattered_is_ended(options: dict[str, object], lifeline: Lifeline) -> None:
    outcome = call("scatter", lifeline.writer, pass_fds=[lifeline.writer], **options)
    lifeline.handed_over()
    assert lifeline.cut()
    assert outcome.returncode == 0
    assert len(outcome.leftovers) >= 2 or options["containment"] == "pidns"
    assert outcome.survivors == ()


def test_leftovers_are_waited_for(shared: Template) -> None:
    outcome = call("arguments", template=shared, leftovers="wait")
    assert said(outcome) == "() {}"


def test_a_timeout(shared: Template) -> None:
    outcome = call("rest", timeout=1.0, template=shared)
    assert (outcome.reason, outcome.returncode) == (Reason.TIMEOUT, -15)


# -- the template's own life


def resting(template: Template, **options: object) -> tuple[WatchedSubprocess, Lines]:
    lines = Lines()
    handle = WatchedSubprocess.start(
        Function(f"{CALLED}:rest", template=template),
        stdout=proctree.Lines(lines),
        containment="warden",
        kill=QUICK,
        **options,
    )
    lines.wait_for(1)
    return handle, lines


def test_trees_live_on_when_it_is_killed() -> None:
    with Template([CALLED]) as template:
        handles = [resting(template)[0] for _ in range(3)]
        first = template.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        eventually(lambda: template.pid != first, "it is known to have ended")
        assert said(call("arguments", template=template)) == "() {}"
        assert template.pid not in (None, first)
        for number, handle in enumerate(handles):
            assert handle.state is proctree.State.RUNNING
            assert is_alive(handle.pid)  # type: ignore[arg-type]
            if number == 0:
                os.kill(handle.pid, signal.SIGUSR1)  # type: ignore[arg-type]
            else:
                handle.kill()
            outcome = handle.wait(DEADLINE)
            assert outcome is not None
            assert outcome.returncode == (-10 if number == 0 else -15)
            assert outcome.survivors == ()
    eventually(lambda: not others(), "and then nothing is left")


def test_trees_live_on_when_it_is_closed() -> None:
    template = Template([CALLED])
    handle, _ = resting(template)
    template.close()
    assert template.pid is None
    assert is_alive(handle.pid)  # type: ignore[arg-type]
    with pytest.raises(proctree.ProctreeError, match="is closed"):
        call("arguments", template=template)
    with pytest.raises(proctree.ProctreeError, match="is closed"):
        template.start()
    with handle:
        assert handle.state is proctree.State.RUNNING
    eventually(lambda: not others(), "and then nothing is left")


def test_trees_live_on_when_its_warden_is_killed() -> None:
    """Then the template goes by PR_SET_PDEATHSIG, and is swept; its trees are not."""
    with Template([CALLED]) as template:
        handle, _ = resting(template)
        with handle:
            pid = template.pid
            stat = proof.read_stat(pid)  # type: ignore[arg-type]
            assert stat is not None
            os.kill(stat.ppid, signal.SIGKILL)
            eventually(lambda: not is_alive(pid), "the template goes")  # type: ignore[arg-type]
            eventually(lambda: template.pid is None, "which is heard of")
            assert said(call("arguments", template=template)) == "() {}"
            assert is_alive(handle.pid)  # type: ignore[arg-type]
            assert handle.state is proctree.State.RUNNING
    eventually(lambda: not others(), "and then nothing is left")


def test_a_search_for_what_is_a_templates_spares_its_trees() -> None:
    """Its warden may be lost while the template is still there, and with it their descent."""
    with Template([CALLED, "integration.preload_process"]) as template:
        handle, _ = resting(template)
        with handle:
            process = template._process
            assert process is not None
            tree, main = process._tree, proof.read_stat(template.pid)  # type: ignore[arg-type]
            assert tree is not None
            assert main is not None
            search = sweep.Search(None, -1, main.pid, main.start_time, tree.tree_id)
            found = sweep.find(search)
            for pidfd, _stat in found:
                os.close(pidfd)
            pids = {stat.pid for _, stat in found}
            helper = int(said(call("preloaded", template=template)).split()[0])
            assert {template.pid, helper} < pids
            warden = proof.read_stat(handle.pid).ppid  # type: ignore[arg-type, union-attr]
            assert not {handle.pid, warden} & pids


def test_a_supervisor_starts_it_again(shared: Template) -> None:
    """A child of a Supervisor, forked from the same template each time."""
    lines = Lines()
    function = Function(f"{CALLED}:rest", template=shared)
    child = ChildSpec(
        "resting",
        function,
        backoff=Backoff(base=0.0),
        stdout=proctree.Lines(lines),
        containment="warden",
        kill=QUICK,
    )
    before = shared.pid
    with Supervisor([child]):
        for starts in (1, 2, 3):
            heard = lines.wait_for(starts)
            pid = int(heard[-1].split()[1])
            assert is_alive(pid)
            if starts < 3:
                os.kill(pid, signal.SIGKILL)
    assert not is_alive(pid)
    assert shared.pid == before


SUPERVISOR = """
import os, signal, sys
import proctree
from proctree import Function, KillPolicy, Stage, Template
sys.path.insert(0, sys.argv[1])
template = Template(["integration.called", "integration.preload_process"])
said = proctree.run(
    Function("integration.called:preloaded", template=template), stdout=proctree.CAPTURE
).stdout
helper = int(said.split()[0])
policy = KillPolicy((Stage(15, 60.0), Stage(9, 10.0)))
handle = proctree.WatchedSubprocess.start(
    Function("integration.called:outlast", (helper,), template=template), kill=policy
)
os.write(1, b"template %d\\n" % template.pid)
signal.pause()
"""


def test_the_death_of_the_supervisor() -> None:
    """The template and what its modules started goes at once, even what ignores SIGTERM. A tree
    has the grace of its own policy, beyond that: the end of its grace is in our hands, and the
    template's warden has signalled all that it ever does when what its modules started is gone."""
    supervisor = start_supervisor(SUPERVISOR, os.getcwd())
    assert supervisor.stdout is not None
    said_by = dict(supervisor.stdout.readline().split() for _ in range(2))
    template, function = int(said_by["template"]), int(said_by["ready"])
    supervisor.kill()
    supervisor.wait()
    assert supervisor.stdout.readline() == "outlasted\n"
    assert not is_alive(template)
    os.kill(function, signal.SIGUSR1)
    assert supervisor.stdout.readline() == "done\n"
    eventually(lambda: not others(), "and then nothing is left")
    assert supervisor.stdin is not None
    supervisor.stdin.close()
    supervisor.stdout.close()
    assert proctree.sweep() == []


def test_what_its_modules_have_started_goes_with_it() -> None:
    with Template(["integration.preload_process"]) as template:
        helper, inside = said(call("preloaded", template=template)).split()
        assert inside == "False", "imported once, in the template"
        assert is_alive(int(helper))
        os.kill(template.pid, signal.SIGKILL)  # type: ignore[arg-type]
        eventually(lambda: not is_alive(int(helper)), "it goes with the template")
        helper, _ = said(call("preloaded", template=template)).split()
    assert not is_alive(int(helper))


def test_a_thread_is_warned_of() -> None:
    try:
        warning = warning_of_threads()
    finally:
        structlog.reset_defaults()  # from here on it is silent again
    assert (warning["threads"], warning["template"]) == (2, "integration.preload_thread")


def warning_of_threads() -> MutableMapping[str, Any]:
    with structlog.testing.capture_logs() as logs, Template(["integration.preload_thread"]) as used:
        used.start()
        assert said(call("arguments", template=used)) == "() {}"
    (warning,) = [entry for entry in logs if entry["event"] == "template.threads"]
    return warning


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("integration.nowhere", "ModuleNotFoundError: No module named 'integration.nowhere'"),
        ("integration.preload_raises", "SystemExit: no such luck"),
    ],
)
def test_what_cannot_be_preloaded(module: str, text: str, capfd: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    with Template([CALLED, module], name="broken") as template:
        for _ in range(2):  # it is tried anew at each use
            with pytest.raises(proctree.TemplateFailed) as caught:
                call("arguments", template=template)
            assert f"template 'broken': {module!r} cannot be imported: {text}" in str(caught.value)
        with pytest.raises(proctree.TemplateFailed, match="cannot be imported"):
            template.start()
    assert template.pid is None


def hanging(tmp_path: Path) -> Template:
    path = tmp_path / "hangs"
    return Template(["integration.preload_hangs"], env={**os.environ, "HANGING": str(path)})


def test_an_import_that_hangs(tmp_path: Path) -> None:
    """It holds up nobody's kill, nobody's time limit, and no other tree."""
    with hanging(tmp_path) as template, contextlib.ExitStack() as stack:
        function = Function(f"{CALLED}:rest", template=template)
        policy = KillPolicy((proctree.Stage(15, 0.1), proctree.Stage(9, 0.1)))
        handle = WatchedSubprocess(function, kill=policy)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        launched = pool.submit(handle.launch)
        eventually((tmp_path / "hangs").exists, "it hangs")
        assert proctree.run(["true"]).ok
        assert handle.state is proctree.State.STARTING
        handle.kill()
        outcome = handle.wait(DEADLINE)
        assert outcome is not None
        assert (outcome.reason, outcome.pid) == (Reason.KILLED, None)
        with pytest.raises(proctree.ProctreeError, match="killed before it had started"):
            launched.result(DEADLINE)
        outcome = proctree.run(function, timeout=0.1, kill=policy)
        assert (outcome.reason, outcome.pid) == (Reason.TIMEOUT, None)
    assert not others()


def test_closing_while_it_imports(tmp_path: Path) -> None:
    template = hanging(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        started = pool.submit(template.start)
        asked = pool.submit(call, "arguments", template=template)
        eventually((tmp_path / "hangs").exists, "it hangs")
        template.close()
        for future in (started, asked):
            with pytest.raises(proctree.ProctreeError, match=r"closed"):
                future.result(DEADLINE)


def test_one_that_is_killed_while_it_imports(tmp_path: Path) -> None:
    with hanging(tmp_path) as template, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(call, "arguments", template=template)
        path = tmp_path / "hangs"
        eventually(lambda: path.exists() and bool(path.read_text()), "it hangs")
        os.kill(int(path.read_text()), signal.SIGKILL)
        with pytest.raises(proctree.TemplateFailed, match="ended by signal 9"):
            asked.result(DEADLINE)


def test_one_that_is_stopped() -> None:
    """What it was asked and nobody waits for any more is not started when it goes on."""
    with Template([CALLED]) as template:
        template.start()
        os.kill(template.pid, signal.SIGSTOP)  # type: ignore[arg-type]
        policy = KillPolicy((proctree.Stage(9, 0.1),))
        outcome = call("rest", template=template, timeout=0.1, kill=policy)
        assert (outcome.reason, outcome.pid) == (Reason.TIMEOUT, None)
        os.kill(template.pid, signal.SIGCONT)  # type: ignore[arg-type]
        assert said(call("arguments", template=template)) == "() {}"
        eventually(lambda: len(others()) == 2, "the template and its warden")


def test_many_at_once() -> None:
    with Template([CALLED]) as template, ThreadPoolExecutor(8) as pool:

        def one(number: int) -> str:
            return said(call("arguments", number, template=template, containment="warden"))

        texts = list(pool.map(one, range(50)))
        pid = template.pid
        assert texts == [f"({number},) {{}}" for number in range(50)]
        assert template.pid == pid


def test_more_than_the_kernel_takes_at_once() -> None:
    """While it is stopped, requests fill its socket, and are sent again when there is room."""
    with Template([CALLED]) as template:
        template.start()
        assert template._process is not None
        assert template._process._sock is not None
        template._process._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        os.kill(template.pid, signal.SIGSTOP)  # type: ignore[arg-type]
        with ThreadPoolExecutor(40) as pool:
            asked = [
                pool.submit(call, "arguments", number, template=template) for number in range(40)
            ]
            process = template._process
            assert process is not None
            eventually(lambda: len(process._asked) == 40, "all have asked")
            assert process._unsent, "some of them have to wait for room"
            os.kill(template.pid, signal.SIGCONT)  # type: ignore[arg-type]
            for number, future in enumerate(asked):
                assert said(future.result(DEADLINE)) == f"({number},) {{}}"


def test_a_fork_of_the_supervisor_has_one_of_its_own(shared: Template) -> None:
    def child() -> None:
        before = shared.pid
        assert before is None
        with shared:
            text = said(call("arguments", 1, template=shared))
        os.write(1, f"{text}\n".encode())

    outcome = proctree.run(child, stdout=proctree.CAPTURE, timeout=DEADLINE)
    # What is logged goes to the same place.
    assert "(1,) {}" in said(outcome).splitlines()
    assert said(call("arguments", 2, template=shared)) == "(2,) {}"


# -- what cannot be had


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"containment": "group"}, proctree.ContainmentUnavailable, "a template forks wardens"),
        ({"leftovers": "leave"}, ValueError, "^leftovers: 'leave' is impossible"),
        ({"new_session": False}, ValueError, "^new_session: "),
    ],
)
def test_what_a_template_cannot_give(
    shared: Template, options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call("arguments", template=shared, **options)


def test_what_the_kernel_refuses_is_named(shared: Template) -> None:
    with pytest.raises(OSError, match="affinity"):
        call("arguments", template=shared, attributes=SpawnAttributes(affinity=[8191]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call("arguments", template=shared, cwd="/nowhere")
