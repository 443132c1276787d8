"""Durable runs where the machine was restarted, the disk is full or read-only, or a record is not
what it was: a clear error and nothing started, or another attempt, and never two at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.crash_points import Forked, Zygote, children, forked, settle
from integration.durable_parts import (
    KEY,
    LINES,
    Place,
    check,
    complete,
    leave,
    place,
    recorded,
    resume,
)
from proctree import durable
from proctree.command import TREE_VARIABLE
from proctree.durable import starting
from proctree.durable.recording import Request
from proctree.durable.wish import to_wish
from proctree.process.namespaces import CLONE_NEWNS

FLIPS = 20
"""Bytes of a record that are changed, one at a time."""


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    runtime = tmp_path_factory.mktemp("runtime")
    made = Zygote(__name__, XDG_RUNTIME_DIR=str(runtime))
    yield made
    made.close()


needs_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="a mount namespace needs CAP_SYS_ADMIN",
)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def keep_mounts_private() -> None:
    """What this process mounts from now on is seen by it and its children only."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount("--make-rprivate", "/")


# -- A restarted machine


def lose(at: Place) -> None:
    """A tree that runs, and then neither its supervisor nor its warden does."""
    forked(leave, at)
    for pid in children(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    settle()


def resume_after_restart(at: Place) -> list[Any]:
    keep_mounts_private()
    other = "11111111-2222-3333-4444-555555555555"
    Path(at.path, "boot_id").write_text(f"{other}\n")
    mount("--bind", f"{at.path}/boot_id", "/proc/sys/kernel/random/boot_id")
    return [resume(at), other]


def restart(folder: str) -> list[str]:
    with place(folder, "warden") as at:
        lose(at)
        (first,) = recorded(at.store)
        # The runtime directory does not outlast a restart.
        shutil.rmtree(f"{os.environ['XDG_RUNTIME_DIR']}/proctree")
        # Marks of another boot say nothing: this one is a stranger.
        marked = {**os.environ, TREE_VARIABLE: first.request.tree_id}
        stranger = subprocess.Popen(["sleep", "600"], env=marked)
        try:
            code, boot = forked(resume_after_restart, at)
            wrong = [] if stranger.poll() is None else ["a stranger was ended"]
        finally:
            stranger.kill()
            stranger.wait()
        settle()
        wrong += check(at, (1,), cut=True)
        boots = [attempt.request.boot for attempt in recorded(at.store)]
        if [code, boots] != [0, [first.request.boot, boot]]:
            wrong.append(f"said {code}, attempts of the boots {boots}")
        (listed,) = durable.list(at.store)
        if [attempt.number for attempt in listed.attempts] != [1, 2] or listed.claimed:
            wrong.append(f"listed as {listed}")
    return wrong


@needs_mounts
def test_after_a_restart_there_is_another_attempt_and_the_lost_one_is_kept(
    zygote: Zygote, tmp_path: Path
) -> None:
    assert zygote.call(restart, str(tmp_path)) == []


# -- Disks


def fill(path: str) -> None:
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def refused(at: Place) -> str:
    """What a run says that must not start anything."""
    try:
        durable.run(KEY, at.target, **at.options)
    except durable.StoreUnusable as error:
        if left := children(os.getpid()):
            raise AssertionError(f"left: {left}") from error
        return str(error)
    raise AssertionError("it was not refused")


def small_disk(at: Place, options: str) -> None:
    keep_mounts_private()
    os.mkdir(at.store, 0o700)
    mount("-t", "tmpfs", "-o", f"mode=0700,{options}", "none", at.store)


def on_a_full_disk(at: Place, what: str) -> list[Any]:
    """What it says on a full disk, what was done then, and how it ends when there is room."""
    if what == "blocks":
        small_disk(at, "size=64k")
        fill(f"{at.store}/filling")
    else:
        small_disk(at, "nr_inodes=2")
        Path(at.store, "filling").touch()
    text = refused(at)
    before = at.lines("effects")
    if what == "blocks":
        os.unlink(f"{at.store}/filling")
    else:
        mount("-o", "remount,nr_inodes=1000", at.store)
        os.unlink(f"{at.store}/filling")
    code = complete(at)
    return [text, before, code, check(at, (1,))]


def full(folder: str, what: str) -> list[Any]:
    with place(folder, "warden") as at:
        got: list[Any] = forked(on_a_full_disk, at, what)
        settle()
        return [*got, at.store]


@needs_mounts
@pytest.mark.parametrize("what", ["blocks", "inodes"])
def test_on_a_full_disk_nothing_is_started(zygote: Zygote, tmp_path: Path, what: str) -> None:
    text, before, code, wrong, store = zygote.call(full, str(tmp_path), what)
    assert store in text
    assert "ENOSPC" in text
    assert [before, code, wrong] == [[], 0, []]


FLOOD = """
echo x >> "$1/effects"
i=0
while echo "$PROCTREE_TREE $i" 2> /dev/null; do i=$((i + 1)); done
exit 7
"""
"""Writes until the disk is full."""


def flood(at: Place) -> list[Any]:
    small_disk(at, "size=128k")
    target = ["sh", "-c", FLOOD, "sh", at.path]
    said = [durable.run(KEY, target, allowed=[7], **at.options).returncode for _ in range(2)]
    (attempt,) = recorded(at.store)
    assert attempt.exit is not None
    lines = (attempt.folder / "out.log").read_bytes().splitlines()
    (_, out), *_ = sorted(
        (name, at.lines(f"delivered/{name}"))
        for name in os.listdir(f"{at.path}/delivered")
        if name.endswith(".out")
    )
    # The last one may have been cut off by the end of the disk.
    same = [line.decode() for line in lines[:-1]] == out[: len(lines) - 1]
    return [said, attempt.exit.returncode, len(lines) > LINES, same]


def flooded(folder: str) -> list[Any]:
    with place(folder, "warden") as at:
        got: list[Any] = forked(flood, at)
        settle()
        return [*got, at.lines("effects")]


@needs_mounts
def test_the_result_is_recorded_on_a_disk_that_the_tree_has_filled(
    zygote: Zygote, tmp_path: Path
) -> None:
    """Its room was taken before the start. The second time it is read, and nothing started."""
    assert zygote.call(flooded, str(tmp_path)) == [[7, 7], 7, True, True, ["x"]]


def on_a_read_only_disk(at: Place) -> str:
    small_disk(at, "size=1m")
    mount("-o", "remount,ro", at.store)
    return refused(at)


def read_only(folder: str) -> list[Any]:
    with place(folder, "warden") as at:
        text = forked(on_a_read_only_disk, at)
        settle()
        return [text, at.store, at.lines("effects")]


@needs_mounts
def test_on_a_read_only_disk_nothing_is_started(zygote: Zygote, tmp_path: Path) -> None:
    text, store, effects = zygote.call(read_only, str(tmp_path))
    assert store in text
    assert "EROFS" in text
    assert effects == []


def in_foreign_folder(folder: str) -> list[Any]:
    with place(folder, "warden") as at:
        os.mkdir(at.store, 0o700)
        os.chown(at.store, 65534, 65534)
        text = forked(refused, at)
        settle()
        return [text, at.store, at.lines("effects"), os.listdir(at.store)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_in_a_folder_of_somebody_else_nothing_is_started(zygote: Zygote, tmp_path: Path) -> None:
    text, store, effects, entries = zygote.call(in_foreign_folder, str(tmp_path))
    assert store in text
    assert "65534" in text
    assert [effects, entries] == [[], []]


# -- Records


def flip(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1 << index % 7  # what was ASCII stays so: the checksum has to notice
    path.write_bytes(data)


def damage(folder: str, name: str) -> list[str]:
    """One byte after the other of the last attempt's record; each time another attempt is made."""
    wrong = []
    with place(folder, "warden") as at:
        forked(complete, at)
        for count in range(1, FLIPS + 1):
            last = recorded(at.store)[-1]
            path = last.folder / name
            index = (path.stat().st_size - 1) * (count - 1) // (FLIPS - 1)
            flip(path, index)
            if (code := forked(complete, at)) != 0:
                wrong.append(f"byte {index}: it said {code}")
            attempts = recorded(at.store)
            if attempts[-1].number <= last.number or len(at.lines("effects")) != count + 1:
                wrong.append(f"byte {index} was believed: {attempts}")
            (listed,) = durable.list(at.store)
            if [bool(a.trouble) for a in listed.attempts] != [True] * count + [False]:
                wrong.append(f"byte {index}: listed as {listed}")
        settle()
    return wrong


@pytest.mark.parametrize("name", ["request", "exit"])
def test_a_changed_record_is_never_believed(zygote: Zygote, tmp_path: Path, name: str) -> None:
    """It is kept aside, listed with its trouble, and the work is done again."""
    assert zygote.call(damage, str(tmp_path), name) == []


def damage_running(folder: str) -> list[Any]:
    with place(folder, "warden") as at:
        forked(leave, at)
        (attempt,) = recorded(at.store)
        flip(attempt.folder / "request", 40)
        retry = Forked(complete, at)
        ended = retry.wait()
        settle()
        return [ended.status, ended.trouble[-2000:], at.lines("two")]


def test_beside_a_tree_whose_record_is_changed_nothing_is_started(
    zygote: Zygote, tmp_path: Path
) -> None:
    """The lock alone says that it runs: whatever comes of the retry, it waits for that."""
    status, trouble, two = zygote.call(damage_running, str(tmp_path))
    assert two == []
    assert status == 0, trouble


@pytest.mark.parametrize("with_file", [False, True], ids=["gone", "a file in its place"])
def test_a_failure_to_record_does_not_hide_why_nothing_was_started(
    tmp_path: Path, with_file: bool
) -> None:
    """The output cannot be opened, and then the attempt's end cannot be recorded either."""
    store = durable.FileStore(tmp_path / "store")
    claim = store.claim(KEY)
    assert claim is not None
    attempts = Path(claim.place.attempts)

    def lose_attempts(_request: Request) -> float:
        attempts.rename(tmp_path / "attempts")
        if with_file:
            attempts.touch()
        return time.clock_gettime(time.CLOCK_BOOTTIME) + 60.0

    try:
        with pytest.raises(OSError, match=r"out\.log"):
            starting.start(claim, to_wish(KEY, ["true"]), store, lose_attempts)
    finally:
        claim.release()
    assert not store.claimed(KEY)


UNDER_UMASK = """
import os, sys
from proctree import CAPTURE, durable

os.umask(0o777)
store = sys.argv[1]
options = {"store": store, "logs": (CAPTURE, None), "containment": "warden"}
first = durable.start("one", ["sleep", "600"], store=store, containment="warden")
second = durable.attach("one", store=store)
first.kill()
reasons = [str(run.wait().reason) for run in (first, second)]
again = [durable.run("two", ["sh", "-c", "echo x"], **options) for _ in range(2)]
same = again[0].tree_id == again[1].tree_id
durable.forget("one", store=store)
durable.forget("two", store=store)
os.write(1, f"{reasons} {again[0].stdout} {again[1].stdout} {same}".encode())
"""


def test_a_umask_that_takes_our_own_rights_does_not_keep_us_from_the_records(
    tmp_path: Path,
) -> None:
    # Root has the rights nevertheless, unless it is deprived of that.
    powers = "-dac_override,-dac_read_search"
    deprived = ["setpriv", f"--bounding-set={powers}"] if os.geteuid() == 0 else []
    runtime = tmp_path / "runtime"
    runtime.mkdir(0o700)
    done = subprocess.run(
        [*deprived, sys.executable, "-c", UNDER_UMASK, f"{tmp_path}/above/store"],
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['killed', 'killed'] b'x\\n' b'x\\n' True", done.stderr
    assert done.stderr == ""
