"""Bad arguments: each is refused by name, before anything is started or opened. (That nothing is
left open is what the suite checks after every test.)"""

from __future__ import annotations

import io
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

import proctree
from proctree import Capture, Chunks, KillPolicy, Lines, Log, State, WatchedSubprocess, command
from proctree.command import TREE_VARIABLE

NEVER_OPEN = 2**20 + 1
"""The lowest free number is taken for a new descriptor, so nobody gets this one."""


def closed_file() -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.close()
    return file


class Silent:
    """Not a stream, not a path, not a callback."""

    def __repr__(self) -> str:
        return "Silent"


BAD_TARGETS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "^argv: must not be empty"),
    ((), ValueError, "^argv: must not be empty"),
    ("ls -l", TypeError, "^argv: .*'ls -l'"),
    (b"ls", TypeError, "^argv: .*b'ls'"),
    (pathlib.Path("/bin/true"), TypeError, "^argv: .*/bin/true"),
    (None, TypeError, "^argv: .*None"),
    (5, TypeError, "^argv: .*5"),
    ({"true"}, TypeError, "^argv: .*true"),
    ([""], ValueError, r"^argv\[0\]: must not be empty"),
    (["true", None], TypeError, r"^argv\[1\]: .*None"),
    (["true", 1], TypeError, r"^argv\[1\]: .*1"),
    (["true", "a\0b"], ValueError, r"^argv\[1\]: .*null"),
    ([b"true\0"], ValueError, r"^argv\[0\]: .*null"),
    (["true", "\ud800"], ValueError, r"^argv\[1\]: "),
]

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"env": [("A", "b")]}, TypeError, "^env: .*mapping"),
    ({"env": "A=b"}, TypeError, "^env: .*mapping"),
    ({"env": {"A": 1}}, TypeError, r"^env\['A'\]: .*1"),
    ({"env": {"A": None}}, TypeError, r"^env\['A'\]: .*None"),
    ({"env": {1: "b"}}, TypeError, "^env: .*1"),
    ({"env": {"A=B": "c"}}, ValueError, "^env: 'A=B' .*'='"),
    ({"env": {"": "c"}}, ValueError, "^env: '' .*empty"),
    ({"env": {"A\0": "c"}}, ValueError, "^env: .*null"),
    ({"env": {"A": "c\0"}}, ValueError, r"^env\['A'\]: .*null"),
    ({"env": {"A": "\ud800"}}, ValueError, r"^env\['A'\]: "),
    ({"cwd": 5}, TypeError, "^cwd: .*5"),
    ({"cwd": "a\0b"}, ValueError, "^cwd: .*null"),
    ({"cwd": "\ud800"}, ValueError, "^cwd: "),
    ({"name": 5}, TypeError, "^name: .*5"),
    ({"name": b"x"}, TypeError, "^name: .*b'x'"),
    ({"name": "a\0b"}, ValueError, "^name: .*null"),
    ({"name": "\ud800"}, ValueError, "^name: "),
    ({"timeout": -1}, ValueError, "^timeout: -1"),
    ({"timeout": math.nan}, ValueError, "^timeout: nan"),
    ({"timeout": "5"}, TypeError, "^timeout: .*'5'"),
    ({"timeout": True}, TypeError, "^timeout: .*True"),
    ({"drain_timeout": -0.5}, ValueError, "^drain_timeout: -0.5"),
    ({"drain_timeout": math.nan}, ValueError, "^drain_timeout: nan"),
    ({"drain_timeout": None}, TypeError, "^drain_timeout: .*None"),
    ({"kill": 5.0}, TypeError, "^kill: a KillPolicy, not 5.0"),
    ({"kill": None}, TypeError, "^kill: a KillPolicy, not None"),
    (
        {"containment": "docker"},
        ValueError,
        "^containment: 'docker' .*auto, pidns, cgroup",
    ),
    ({"containment": None}, ValueError, "^containment: None"),
    ({"leftovers": "eat"}, ValueError, "^leftovers: 'eat'"),
    ({"leftovers": None}, ValueError, "^leftovers: None"),
    ({"pass_fds": 5}, TypeError, "^pass_fds: "),
    ({"pass_fds": None}, TypeError, "^pass_fds: "),
    ({"pass_fds": ["5"]}, TypeError, "^pass_fds: .*'5'"),
    ({"pass_fds": [True]}, TypeError, "^pass_fds: .*True"),
    ({"pass_fds": [2]}, ValueError, "^pass_fds: 2 "),
    ({"pass_fds": [-1]}, ValueError, "^pass_fds: -1 "),
    ({"pass_fds": [10**12]}, ValueError, "^pass_fds: "),
    ({"pass_fds": [NEVER_OPEN]}, ValueError, "^pass_fds: .*not open"),
    ({"stdin": "text"}, TypeError, "^stdin: .*'text'"),
    ({"stdin": 0.5}, TypeError, "^stdin: .*0.5"),
    ({"stdin": True}, TypeError, "^stdin: .*True"),
    ({"stdin": Silent()}, TypeError, "^stdin: .*Silent"),
    ({"stdin": proctree.CAPTURE}, ValueError, "^stdin: "),
    ({"stdin": subprocess.PIPE}, ValueError, "^stdin: "),
    ({"stdin": proctree.STDOUT}, ValueError, "^stdin: "),
    ({"stdin": Lines(print)}, TypeError, "^stdin: "),
    ({"stdin": -7}, ValueError, "^stdin: -7"),
    ({"stdin": NEVER_OPEN}, ValueError, "^stdin: .*not open"),
    ({"stdin": closed_file()}, ValueError, "^stdin: "),
    ({"stdin": io.BytesIO(b"text")}, ValueError, "^stdin: .*no descriptor"),
    ({"stdout": proctree.STDOUT}, ValueError, "^stdout: STDOUT is for stderr"),
    ({"stdout": "log.txt"}, TypeError, "^stdout: .*'log.txt'"),
    ({"stderr": "log.txt"}, TypeError, "^stderr: .*'log.txt'"),
    ({"stdout": b"x"}, TypeError, "^stdout: .*b'x'"),
    ({"stdout": print}, TypeError, "^stdout: .*Lines.*Chunks"),
    ({"stderr": print}, TypeError, "^stderr: .*Lines.*Chunks"),
    ({"stdout": Lines}, TypeError, "^stdout: "),
    ({"stderr": False}, TypeError, "^stderr: .*False"),
    ({"stdout": -7}, ValueError, "^stdout: -7"),
    ({"stderr": NEVER_OPEN}, ValueError, "^stderr: .*not open"),
    ({"stderr": 10**12}, ValueError, "^stderr: "),
    ({"stdout": closed_file()}, ValueError, "^stdout: "),
    ({"stdout": io.StringIO()}, ValueError, "^stdout: .*no descriptor"),
]


@pytest.fixture
def nothing_started() -> Iterator[None]:
    """Not even for a moment: a process that has come and gone has left us CPU time."""
    before = psutil.Process().cpu_times()
    yield
    after = psutil.Process().cpu_times()
    assert (after.children_user, after.children_system) == (
        before.children_user,
        before.children_system,
    )
    assert psutil.Process().children() == []


@pytest.mark.usefixtures("nothing_started")
@pytest.mark.parametrize(("target", "error", "message"), BAD_TARGETS)
@pytest.mark.parametrize("start", [proctree.run, WatchedSubprocess.start, WatchedSubprocess])
def test_a_bad_target(start, target, error, message):
    with pytest.raises(error, match=message):
        start(target)


@pytest.mark.usefixtures("nothing_started")
@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
@pytest.mark.parametrize("start", [proctree.run, WatchedSubprocess.start, WatchedSubprocess])
def test_a_bad_option(start, options, error, message):
    with pytest.raises(error, match=message):
        start(["true"], **options)


@pytest.mark.usefixtures("nothing_started")
def test_an_unknown_option():
    with pytest.raises(TypeError, match="shell"):
        proctree.run(["true"], shell=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Capture(0), ValueError, "^limit: .*0"),
        (lambda: Capture(-1), ValueError, "^limit: .*-1"),
        (lambda: Capture(1.5), TypeError, "^limit: .*1.5"),
        (lambda: Capture(True), TypeError, "^limit: .*True"),
        (lambda: Lines("print"), TypeError, "^callback: .*'print'"),
        (lambda: Chunks(None), TypeError, "^callback: .*None"),
        (lambda: Lines(print, max_length=0), ValueError, "^max_length: .*0"),
        (lambda: Lines(print, encoding="no-such"), LookupError, "encoding"),
        (lambda: Lines(print, encoding="utf-16"), ValueError, "^encoding: .*newline"),
        (lambda: Lines(print, encoding="cp500"), ValueError, "^encoding: .*newline"),
        (lambda: Log(max_length=-5), ValueError, "^max_length: .*-5"),
    ],
)
def test_a_bad_sink(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("log", ["logger=object()", "level='nonsense'", "logger=print"])
def test_a_logger_that_is_none_starts_nothing(log):
    """In a process of its own: nobody could end a start that does not return."""
    code = (
        "import os, sys, proctree\n"
        "try:\n"
        f"    proctree.run(['sleep', '1000'], stdout=proctree.Log({log}))\n"
        "except (AttributeError, TypeError, ValueError) as error:\n"
        "    print(type(error).__name__)\n"
        "try:\n"
        "    os.waitpid(-1, os.WNOHANG)\n"
        "except ChildProcessError:\n"
        "    print('no child')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=20)
    error, child = done.stdout.decode().splitlines()
    assert error.endswith("Error")
    assert child == "no child"


# -- what a handle that never ran says


@pytest.fixture
def new() -> Iterator[WatchedSubprocess]:
    handle = WatchedSubprocess(["true"])
    yield handle
    handle.kill()
    assert handle.wait(60) is not None


def test_a_new_handle(new):
    assert (new.state, new.pid, new.outcome) == (State.NEW, None, None)
    assert new.processes() == []


@pytest.mark.parametrize("sig", [0, 1000, -1])
def test_signal_refuses_an_unknown_signal(new, sig):
    with pytest.raises(ValueError, match=f"^sig: .*{sig}"):
        new.signal(sig)


def test_signal_refuses_an_unknown_scope(new):
    with pytest.raises(ValueError, match=r"^scope: 'all'"):
        new.signal(15, scope="all")


@pytest.mark.parametrize("policy", ["now", 5, KillPolicy])
def test_kill_refuses_what_is_no_policy(new, policy):
    with pytest.raises(TypeError, match=r"^policy: a KillPolicy"):
        new.kill(policy)
    assert new.state is State.NEW


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), ("1", TypeError)])
def test_wait_refuses_a_bad_timeout(new, timeout, error):
    with pytest.raises(error, match=r"^timeout: "):
        new.wait(timeout)


def test_what_needs_a_launch_says_so(new):
    for method in (new.wait, new.freeze, new.thaw, lambda: new.signal(15)):
        with pytest.raises(RuntimeError, match="not launched"):
            method()


# -- what is accepted


def check(target: Any = ("true",), **options: Any) -> command.Command:
    defaults = {"cwd": None, "env": None, "name": None, "pass_fds": (), "tree_id": "id"}
    return command.check(target, **{**defaults, **options})


def test_arguments_are_encoded_as_the_system_has_them():
    odd = os.fsdecode(b"\xff")
    assert check(["true", odd, b"\xfe", pathlib.Path("a/b")]).argv == (
        b"true",
        b"\xff",
        b"\xfe",
        b"a/b",
    )


def test_the_default_name_is_the_program_or_the_callable():
    assert check(["/usr/bin/env"]).name == "env"
    assert check(closed_file).name == "closed_file"
    assert check(Silent().__repr__).name == "Silent.__repr__"
    assert check(["/usr/bin/env"], name="other").name == "other"


def test_the_default_environment_is_ours_and_the_id_of_the_tree(monkeypatch):
    monkeypatch.delenv(TREE_VARIABLE, raising=False)
    monkeypatch.setenv("ODD", os.fsdecode(b"\xff"))
    env = dict(check().env)
    assert env.pop(TREE_VARIABLE.encode()) == b"id"
    assert env == dict(os.environb)
    assert TREE_VARIABLE not in os.environ


def test_a_nested_tree_names_all_that_it_is_in(monkeypatch):
    monkeypatch.setenv(TREE_VARIABLE, "outer/middle")
    assert check().env[TREE_VARIABLE.encode()] == b"outer/middle/id"
    assert check(env={TREE_VARIABLE: "lie"}).env[TREE_VARIABLE.encode()] == b"outer/middle/id"


def test_an_environment_is_not_changed_but_copied(monkeypatch):
    monkeypatch.delenv(TREE_VARIABLE, raising=False)
    given = {"A": "b", "C": os.fsdecode(b"\xff")}
    assert check(env=given).env == {
        b"A": b"b",
        b"C": b"\xff",
        TREE_VARIABLE.encode(): b"id",
    }
    assert set(given) == {"A", "C"}


def test_pass_fds_are_sorted_and_unique():
    reader, writer = os.pipe()
    try:
        assert check(pass_fds=[writer, reader, writer]).pass_fds == tuple(sorted((reader, writer)))
    finally:
        os.close(reader)
        os.close(writer)
