"""A command that cannot be started raises what subprocess raises, and a note says at which step."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
from typing import Any

import pytest

import proctree
from proctree import Outcome, ProctreeError, Reason, TreeFailed, errors


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOENT, FileNotFoundError),
        (errno.EACCES, PermissionError),
        (errno.EPERM, PermissionError),
        (errno.ENOTDIR, NotADirectoryError),
        (errno.ENOEXEC, OSError),
        (errno.E2BIG, OSError),
        (errno.ELOOP, OSError),
    ],
)
def test_the_class_is_that_of_the_errno(number, expected):
    error = errors.start_error(number, "exec", "prog", None)
    assert type(error) is expected
    assert (error.errno, error.filename) == (number, "prog")
    assert str(error) == f"[Errno {number}] {os.strerror(number)}: 'prog'"
    assert not isinstance(error, ProctreeError)


@pytest.mark.parametrize(
    ("step", "cwd", "culprit", "argument"),
    [
        ("exec", None, "prog", "argv[0]"),
        ("exec", "/somewhere", "prog", "argv[0]"),
        ("chdir", "/somewhere", "/somewhere", "cwd"),
    ],
)
def test_the_note_names_argument_errno_and_step(step, cwd, culprit, argument):
    error = errors.start_error(errno.EACCES, step, "prog", cwd)
    assert error.filename == culprit
    assert error.__notes__ == [f"proctree: {argument}: EACCES at step '{step}'"]


def test_errno_name():
    assert errors.errno_name(errno.EPERM) == "EPERM"
    assert errors.errno_name(12345) == "errno 12345"


def raised(function: Any, *arguments: Any, **options: Any) -> OSError:
    with pytest.raises(OSError) as caught:
        function(*arguments, **options)
    return caught.value


@pytest.fixture
def plain_file(tmp_path):
    path = tmp_path / "plain"
    path.write_text("not a program")
    return path


@pytest.mark.parametrize("containment", ["warden", "group"])
@pytest.mark.parametrize("case", ["missing", "not executable", "folder", "no format", "bad cwd"])
def test_the_same_as_subprocess(case, containment, tmp_path, plain_file):
    argv, cwd = [str(plain_file)], None
    if case == "missing":
        argv = [str(tmp_path / "missing")]
    elif case == "folder":
        argv = [str(tmp_path)]
    elif case == "no format":
        plain_file.write_bytes(b"\0\1\2\3")
        plain_file.chmod(0o755)
    elif case == "bad cwd":
        argv, cwd = ["true"], str(plain_file)
    theirs = raised(subprocess.run, argv, cwd=cwd)
    ours = raised(proctree.run, argv, cwd=cwd, containment=containment)
    assert (type(ours), ours.errno) == (type(theirs), theirs.errno)
    assert ours.filename == theirs.filename
    assert ("cwd" if case == "bad cwd" else "argv[0]") in ours.__notes__[0]


def test_tree_failed_tells_how_it_ended():
    outcome = Outcome(returncode=3, reason=Reason.EXITED, tree_id="abc", pid=7)
    error = TreeFailed(outcome)
    assert error.outcome is outcome
    assert str(error) == outcome.describe() == "tree abc (pid 7): exited, exit status 3"
    assert isinstance(error, ProctreeError)


def test_tree_failed_can_be_pickled():
    """As multiprocessing and concurrent.futures do with what their workers raise."""
    error = TreeFailed(Outcome(returncode=3, reason=Reason.EXITED))
    assert pickle.loads(pickle.dumps(error)).outcome == error.outcome


def test_check_raises_it():
    with pytest.raises(TreeFailed, match="exit status 7") as caught:
        proctree.run(["sh", "-c", "exit 7"], check=True)
    assert caught.value.outcome.returncode == 7
