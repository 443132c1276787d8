"""The registry of running trees: what an entry says, where it is, and what a sweep makes of it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st

import proctree
from proctree import registry
from proctree.command import TREE_VARIABLE
from proctree.process import cgroups, proof
from proctree.registry import RegistryUnusable

DEADLINE = 30.0
TREE = f"{os.getpid():08x}feedbeef"
"""Others run these tests at the same time, and nobody may end what another one has started."""
OTHER = f"ff{os.getpid():08x}"
ODD = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=40)


@pytest.fixture(autouse=True)
def warnings_are_seen() -> Iterator[None]:
    structlog.reset_defaults()  # then they go to the logger `proctree`
    yield
    structlog.reset_defaults()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "registry"
    path.mkdir(mode=0o700)
    return path


# -- what an entry says


@given(name=ODD, cgroup=st.none() | ODD)
@example(name="a\nmain 1 1\n", cgroup="/sys\nmain 1 1")
@example(name="\u20ac\udcff \\n \\", cgroup="/a b\x0c\x85")
@example(name="", cgroup=None)
def test_what_is_written_is_read(name, cgroup):
    text = registry.record("0123456789abcdef", name, "warden", cgroup)
    entry = registry.parse(text)
    assert entry == registry.Entry(
        boot=registry.boot_id(),
        pid_namespace=registry.pid_namespace(),
        tree_id="0123456789abcdef",
        name=name,
        containment="warden",
        holder=None,
        main=None,
        cgroup=cgroup,
        time_namespace=proof.time_namespace(),
    )
    entry = registry.parse(text + "warden 12 345\nmain 678 901\n")
    assert (entry.holder, entry.main) == ((12, 345), (678, 901))


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
@example("proctree 1\n")
@example("\n")
def test_anything_else_is_a_value_error(text):
    with pytest.raises(ValueError):
        registry.parse(text)


@given(st.data())
def test_cut_off_anywhere(data):
    """The holder of a full disk, or one killed in the middle of a write."""
    text = registry.record("0123456789abcdef", "n", "cgroup", "/c/proctree-0123456789abcdef")
    text += "warden 12 345\nmain 678 901\n"
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    try:
        entry = registry.parse(cut)
    except ValueError:
        return
    # What is there is whole: no number that was cut.
    assert cut.endswith("\n")
    assert entry.holder in (None, (12, 345))
    assert entry.main is None
    assert entry.cgroup in (None, "/c/proctree-0123456789abcdef")


@pytest.mark.parametrize(
    "change",
    [
        ("proctree 1", "proctree 2"),
        ("proctree 1", "proctree x"),
        ("pidns ", "pidns x"),
        ("boot ", "bOOt "),
        ("tree ", "twig "),
        ("name n", "name \\x"),
        ("warden 12 345", "warden 12"),
        ("warden 12 345", "warden 12 345 6"),
        ("main 678 901", "main 678 x"),
        ("main 678 901", "main"),
    ],
)
def test_mistakes_in_it(change):
    text = (
        registry.record("0123456789abcdef", "n", "warden", None) + "warden 12 345\nmain 678 901\n"
    )
    assert change[0] in text
    with pytest.raises(ValueError):
        registry.parse(text.replace(*change))


def test_a_long_name_costs_the_tree_nothing(monkeypatch, tmp_path):
    """One that fits into an argument of the warden's, and no longer does when it is escaped."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    name = "\u20ac" * 30_000
    assert len(registry.parse(registry.record(TREE, name, "warden", None)).name) == 256
    for containment in ("warden", "group"):
        assert proctree.run(["true"], name=name, containment=containment).ok


# -- where


def test_the_runtime_directory(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert registry.default_directory() == "/run/user/7/proctree"


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_without_one(monkeypatch, value):
    """A relative one is to be ignored: XDG Base Directory Specification."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    uid = os.geteuid()
    if uid == 0:
        assert registry.default_directory() == "/run/proctree"
        assert as_user(65534, registry.default_directory).endswith("/proctree-65534")
    else:
        assert registry.default_directory().endswith(f"/proctree-{uid}")


def as_user(uid: int, function: Callable[[], str]) -> str:
    """What it returns in a process of that user."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.write(writer, function().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def test_it_is_made_for_us_alone(tmp_path):
    path = tmp_path / "new"
    before = os.umask(0)
    try:
        assert registry.make_directory(str(path)) == str(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o700
    assert registry.make_directory(str(path)) == str(path)


def unusable(path: Path) -> str:
    """Both those who would write there and those who would sweep say the same."""
    with pytest.raises(RegistryUnusable) as making:
        registry.make_directory(str(path))
    with pytest.raises(RegistryUnusable) as sweeping:
        proctree.sweep(path)
    assert str(making.value) == str(sweeping.value)
    assert str(path) in str(making.value)
    return str(making.value)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o710, 0o704, 0o720])
def test_one_that_is_open_to_others(folder, mode):
    folder.chmod(mode)
    assert "chmod it" in unusable(folder)


def test_one_of_somebody_else(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give something away")
    os.chown(folder, 65534, 65534)
    text = unusable(folder)
    assert "belongs to uid 65534" in text
    assert "remove it" in text


def test_a_symbolic_link(folder, tmp_path):
    """To a directory that is ours: who made the link may change it tomorrow."""
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert "is not a directory: remove it" in unusable(link)


def test_a_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "is not a directory: remove it" in unusable(file)


def test_one_that_cannot_be_made(tmp_path):
    with pytest.raises(RegistryUnusable, match="ENOENT"):
        registry.make_directory(str(tmp_path / "missing" / "proctree"))
    assert proctree.sweep(tmp_path / "missing" / "proctree") == []  # nothing to sweep


def test_a_tree_can_do_without(monkeypatch, tmp_path, caplog):
    """It is said once, and the tree runs."""
    (tmp_path / "proctree").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING, "proctree"):
        for _ in range(2):
            for containment in ("warden", "group"):
                assert proctree.run(["true"], containment=containment).ok
    said = [r.getMessage() for r in caplog.records if "registry" in r.getMessage()]
    assert len(said) == 1
    assert "registry.unusable" in said[0]
    assert "is not a directory" in said[0]
    assert (tmp_path / "proctree").read_bytes() == b""


# -- what a sweep makes of an entry

Member = subprocess.Popen[bytes]


@contextlib.contextmanager
def member(value: str) -> Iterator[Member]:
    """A process with that mark of a tree: whether it lives says what a sweep has done."""
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, env={**os.environ, TREE_VARIABLE: value}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def text_of(tree_id: str, **changes: Any) -> str:
    """An entry as a warden leaves it, that is dead."""
    text = registry.record(tree_id, "night\nwatch", "warden", changes.pop("cgroup", None))
    for key, value in changes.items():
        (line,) = (line for line in text.split("\n") if line.startswith(key + " "))
        text = text.replace(line, f"{key} {value}")
    return text


def test_what_bears_the_mark_is_ended_and_the_entry_removed(folder):
    file = folder / TREE
    file.write_text(text_of(TREE))
    with member(TREE) as one, member(f"abc/{TREE}/def") as two:
        (swept,) = proctree.sweep(folder)
        assert (one.wait(DEADLINE), two.wait(DEADLINE)) == (-9, -9)
        assert (swept.tree_id, swept.name) == (TREE, "night\nwatch")
        assert {ended.pid for ended in swept.ended} == {one.pid, two.pid}
        assert swept.survivors == ()
    assert not file.exists()
    assert proctree.sweep(folder) == []


def test_similar_marks_are_others(folder):
    (folder / TREE).write_text(text_of(TREE))
    with contextlib.ExitStack() as stack:
        similar = (f"{TREE}0", TREE[:-1], TREE.upper(), f"a{TREE}", f"{TREE}x/abc", "")
        others = [stack.enter_context(member(value)) for value in similar]
        with member(TREE) as ours:
            (swept,) = proctree.sweep(folder)
            assert [ended.pid for ended in swept.ended] == [ours.pid]
        assert all(other.poll() is None for other in others)


def test_an_entry_that_is_held_is_not_touched(folder):
    file = folder / TREE
    file.write_text(text_of(TREE))
    with member(TREE) as process:
        with open(file) as holder:
            fcntl.flock(holder, fcntl.LOCK_EX)
            assert proctree.sweep(folder) == []
            assert process.poll() is None
            assert file.exists()
        (swept,) = proctree.sweep(folder)
        assert process.wait(DEADLINE) == -9
        assert [ended.pid for ended in swept.ended] == [process.pid]


def test_one_of_another_boot_is_removed(folder):
    file = folder / TREE
    file.write_text(text_of(TREE, boot="01234567-89ab-cdef-0123-456789abcdef"))
    with member(TREE) as process:
        assert proctree.sweep(folder) == []
        assert process.poll() is None
    assert not file.exists()


def test_one_of_another_pid_namespace_is_left_alone(folder):
    file = folder / TREE
    file.write_text(text_of(TREE, pidns=4026531835))
    with member(TREE) as process:
        assert proctree.sweep(folder) == []
        assert process.poll() is None
    assert file.exists()


def test_an_entry_of_nothing_is_removed_without_a_word(folder):
    (folder / TREE).write_text(text_of(TREE))
    assert proctree.sweep(folder) == []
    assert list(folder.iterdir()) == []


def garbage(file: Path, kind: str) -> None:
    whole = text_of(TREE).encode()
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.write_bytes(
            {
                "empty": b"",
                "cut": whole[:-1],
                "another version": whole.replace(b"proctree 1", b"proctree 2"),
                "no tree": whole.replace(b"tree ", b"twig "),
                "bytes": bytes(range(256)),
                "not ASCII": whole.replace(b"night", b"\xff"),
                "too long": whole + b"warden 1 " + b"1" * 100_000 + b"\n",
            }[kind]
        )


@pytest.mark.parametrize(
    "kind",
    ["empty", "cut", "another version", "no tree", "bytes", "not ASCII", "too long"]
    + ["directory", "fifo"],
)
def test_garbage_is_kept_and_reported_and_nobody_is_signalled(folder, caplog, kind):
    """And what comes after it is swept."""
    file = folder / TREE
    garbage(file, kind)
    (folder / OTHER).write_text(text_of(OTHER))
    with member(TREE) as process, member(OTHER) as other:
        with caplog.at_level(logging.WARNING, "proctree"):
            (swept,) = proctree.sweep(folder)
        assert swept.tree_id == OTHER
        assert other.wait(DEADLINE) == -9
        assert process.poll() is None
    assert os.path.lexists(file)
    (said,) = (r.getMessage() for r in caplog.records if "unreadable" in r.getMessage())
    assert str(file) in said


def test_a_symbolic_link_is_not_followed(folder, tmp_path):
    (tmp_path / "elsewhere").write_text(text_of(TREE))
    (folder / TREE).symlink_to(tmp_path / "elsewhere")
    with member(TREE) as process:
        assert proctree.sweep(folder) == []
        assert process.poll() is None
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("old", [True, False])
def test_the_beginning_of_an_entry(folder, old):
    """Its holder has not started anything yet, and may be about to give it its name."""
    file = folder / f"{TREE}~"
    file.write_text(text_of(TREE))
    if old:
        then = time.time() - 2 * registry.STALE_SECONDS
        os.utime(file, (then, then))
    with member(TREE) as process:
        assert proctree.sweep(folder) == []
        assert process.poll() is None
    assert file.exists() is not old


def test_a_main_number_that_is_somebody_elses_by_now(folder):
    """A living stranger has it, in a session that it leads: neither it nor its session is meant."""
    with subprocess.Popen(
        ["sh", "-c", "sleep 1000 & echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as stranger:
        try:
            assert stranger.stdout is not None
            assert stranger.stdout.readline() == b"\n"
            stat = proof.read_stat(stranger.pid)
            assert stat is not None
            text = text_of(TREE) + f"warden 2 {stat.start_time - 1}\n"
            (folder / TREE).write_text(text + f"main {stranger.pid} {stat.start_time - 1}\n")
            with member(TREE) as process:
                (swept,) = proctree.sweep(folder)
                assert [ended.pid for ended in swept.ended] == [process.pid]
            assert stranger.poll() is None
            # With its own start time it is the main process, and its session goes with it.
            (folder / TREE).write_text(text + f"main {stranger.pid} {stat.start_time}\n")
            (swept,) = proctree.sweep(folder)
            assert stranger.wait(DEADLINE) == -9
            assert len(swept.ended) == 2
        finally:
            stranger.kill()


def test_what_is_older_than_the_holder_is_no_member(folder):
    """However it came by the mark."""
    with member(TREE) as process:
        stat = proof.read_stat(process.pid)
        assert stat is not None
        file = folder / TREE
        file.write_text(text_of(TREE) + f"warden 2 {stat.start_time + 1}\n")
        assert proctree.sweep(folder) == []
        assert process.poll() is None


def test_a_cgroup_that_is_not_the_trees(folder):
    """Its name says whose it is."""
    try:
        home = cgroups.find_home(cgroups.own_path())
    except proctree.ContainmentUnavailable as error:
        pytest.skip(str(error))
    if cgroups.trouble(home) is not None:
        pytest.skip("our own cgroup is not writable")
    ours = Path(home.path, cgroups.LEAF_PREFIX + TREE)
    other = Path(home.path, f"other-{TREE}")
    try:
        for path, ended in ((other, False), (ours, True)):
            path.mkdir()
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
                (path / "cgroup.procs").write_text(str(process.pid))
                (folder / TREE).write_text(text_of(TREE, cgroup=str(path)))
                assert [len(swept.ended) for swept in proctree.sweep(folder)] == [1] * ended
                assert (process.wait(DEADLINE) == -9) if ended else (process.poll() is None)
                process.kill()
            assert path.exists() is not ended
            assert not (folder / TREE).exists()
    finally:
        for path in (ours, other):
            assert cgroups.end(str(path), 10.0)


def test_an_unlocked_entry_that_vanishes_meanwhile(folder, monkeypatch):
    """Between the listing and the opening."""
    (folder / TREE).write_text(text_of(TREE))
    listdir = os.listdir

    def listing(path: str) -> list[str]:
        names = listdir(path)
        if path == str(folder):
            (folder / TREE).unlink(missing_ok=True)
        return names

    monkeypatch.setattr(os, "listdir", listing)
    assert proctree.sweep(folder) == []
