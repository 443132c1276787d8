"""The directory of durable runs: who has a key, what is refused, and many who use it at once."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from integration.conftest import DEADLINE, in_thread
from integration.dying import Child, children
from proctree.containment import meeting
from proctree.durable import directory, files, folders
from proctree.durable.directory import FileStore
from proctree.durable.errors import StillRunning, StoreUnusable, UnknownKey
from proctree.durable.recording import Exit, Request
from proctree.process import fds

Say = Callable[[str], None]


@pytest.fixture(autouse=True)
def warnings_are_seen() -> Iterator[None]:
    structlog.reset_defaults()  # then they go to the logger `proctree`
    yield
    structlog.reset_defaults()


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="proctree-durable-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def store(folder: Path) -> FileStore:
    return FileStore(folder / "store")


def request(key: str = "k", number: int = 1) -> Request:
    return Request(key, f"target {number}", "f", "0" * 16, "tree", "boot", 1, "host", 1, number)


def claimed(store: FileStore, key: str = "k") -> directory.FileClaim:
    claim = store.claim(key)
    assert claim is not None
    return claim


# -- who has a key


def test_one_at_a_time(store):
    claim = claimed(store)
    assert store.claim("k") is None
    assert store.claimed("k")
    assert not store.claimed("other")
    claimed(store, "other").release()
    claim.release()
    claim.release()
    assert not store.claimed("k")
    claimed(store).release()


def test_what_is_only_asked_makes_nothing(store):
    assert store.at("k").path.startswith(store.path)
    assert (store.attempts("k"), store.keys(), store.claimed("k")) == ([], [], False)
    with pytest.raises(UnknownKey, match="'k'"):
        store.forget("k")
    assert not os.path.exists(store.path)


def test_a_claim_without_an_attempt_records_nothing(store):
    claimed(store).release()
    assert (store.attempts("k"), store.keys()) == ([], [])
    with pytest.raises(UnknownKey):
        store.forget("k")
    assert os.listdir(store.path) == []


def test_whoever_inherits_the_lock_holds_the_claim_on(store):
    """As a warden does, whose supervisor then goes."""
    claim = claimed(store)
    assert not os.get_inheritable(claim.lock)
    holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[claim.lock])
    claim.release()
    assert store.claimed("k")
    assert store.claim("k") is None
    with pytest.raises(StillRunning, match="lock"):
        store.forget("k")
    assert holder.stdin is not None
    holder.stdin.close()
    holder.wait()
    assert not store.claimed("k")
    claimed(store).release()


def test_a_fork_has_no_part_in_the_claim(store):
    claim = claimed(store)
    reader, writer = os.pipe()

    def live_on(say: Say) -> None:
        claim.release()  # its number is that of another file by now
        say("alive")
        os.close(writer)
        os.read(reader, 1)

    child = Child(live_on)
    try:
        assert child.hear() == "alive"
        assert store.claimed("k")
        claim.release()
        assert not store.claimed("k")
    finally:
        os.close(writer)
        assert child.end()[0] == 0
        os.close(reader)


def test_after_it_is_given_back_nothing_can_be_recorded(store):
    claim = claimed(store)
    attempt = claim.begin(request())
    claim.release()
    for act in (
        claim.attempts,
        lambda: claim.begin(request()),
        lambda: claim.submitted(attempt, "h"),
        lambda: claim.finish(attempt, Exit(0)),
    ):
        with pytest.raises(ValueError, match="given back"):
            act()


def test_who_waits_with_the_lock_of_a_forgotten_key_notices(store, monkeypatch):
    """It was forgotten after the file was opened and before it was locked."""
    earlier = claimed(store)
    earlier.begin(request())
    earlier.release()
    take = directory._take
    locks = []

    def too_late(fd: int) -> bool:
        locks.append(fd)
        if len(locks) == 1:
            store.forget("k")
        return take(fd)

    monkeypatch.setattr(directory, "_take", too_late)
    claim = claimed(store)
    try:
        assert len(locks) == 3  # ours, that of `forget`, and ours again
        assert os.path.samestat(os.fstat(claim.lock), os.stat(store.at("k").lock))
        assert store.claim("k") is None
        assert claim.begin(request()).number == 1
    finally:
        claim.release()


def probe(path: str, started: Say) -> None:
    store = FileStore(path)
    started("probing")
    parent = os.getppid()
    while not os.path.exists(os.path.join(os.path.dirname(path), "stop")):
        store.claimed("k")
        assert os.getppid() == parent


def test_who_looks_is_in_nobodys_way(store, folder):
    """The lock cannot be asked: who looks has it for a moment."""
    claimed(store).release()
    probes = [lambda say: probe(store.path, say)] * 3
    with children(probes) as started:
        try:
            for child in started:
                assert child.hear() == "probing"
            for _ in range(300):
                claim = store.claim("k")
                assert claim is not None
                assert store.claimed("k")
                claim.release()
        finally:
            (folder / "stop").touch()


SECONDS = 2.0


def compete(store: FileStore, inside: Path, index: int, say: Say) -> None:
    """Claims as often as it can. A file says that somebody is inside."""
    due = time.monotonic() + SECONDS
    had = 0
    while time.monotonic() < due or not had:
        claim = store.claim("k")
        if claim is None:
            with contextlib.suppress(StillRunning, UnknownKey):
                store.forget("k")
            continue
        had += 1
        fd = os.open(inside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        before = claim.attempts()
        assert [a.number for a in before] == list(range(1, len(before) + 1)), before
        assert all(a.exit is not None and not a.trouble for a in before), before
        attempt = claim.begin(request(number=index))
        assert attempt.number == len(before) + 1
        claim.finish(attempt, Exit(0))
        os.close(fd)
        os.unlink(inside)
        claim.release()
    say(str(had))


def watch(store: FileStore, say: Say) -> None:
    """Without a lock: only the last one may be without its end, and none is in trouble."""
    due = time.monotonic() + SECONDS
    most = 0
    while time.monotonic() < due:
        found = store.attempts("k")
        assert [a.number for a in found] == list(range(1, len(found) + 1)), found
        assert all(a.request is not None and not a.trouble for a in found), found
        assert all(a.exit is not None for a in found[:-1]), found
        assert store.keys() in ([], ["k"])
        store.claimed("k")
        most = max(most, len(found))
    say(str(most))


def test_many_at_once(store, folder):
    functions = [
        lambda say, index=index: compete(store, folder / "inside", index, say) for index in range(6)
    ]
    with children([*functions, *[lambda say: watch(store, say)] * 2]) as started:
        assert all(int(child.hear()) > 0 for child in started)


# -- what is changed while somebody reads


def just_before(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, nth: int, act: Callable[[], object]
) -> None:
    """Acts right before the nth call of this function."""
    function = getattr(module, name)
    calls = 0

    def called(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == nth:
            act()
        return function(*args)

    monkeypatch.setattr(module, name, called)


def test_an_end_gets_its_name_while_it_is_looked_for(store, monkeypatch):
    with contextlib.closing(Released(claimed(store))) as closing:
        attempt = closing.claim.begin(request())
        # First the request is read, then `exit`, which is not there, and then `exit~`.
        finish = lambda: closing.claim.finish(attempt, Exit(7))  # noqa: E731
        just_before(monkeypatch, files, "read", 3, finish)
        assert store.attempts("k") == [attempt._replace(exit=Exit(7))]


def test_a_key_is_forgotten_while_it_is_read(store, monkeypatch):
    """What was read before that is not all that there was."""
    claim = claimed(store)
    for number in (1, 2):
        claim.finish(claim.begin(request(number=number)), Exit(0))
    claim.release()
    just_before(monkeypatch, folders, "read_attempt", 2, lambda: store.forget("k"))
    assert store.attempts("k") == []


def test_a_key_is_forgotten_and_begun_again_while_it_is_read(store, monkeypatch):
    claim = claimed(store)
    for number in (1, 2):
        claim.finish(claim.begin(request(number=number)), Exit(0))
    claim.release()

    def anew() -> None:
        store.forget("k")
        claim = claimed(store)
        claim.begin(request(number=9))
        claim.release()

    just_before(monkeypatch, folders, "read_attempt", 2, anew)
    (attempt,) = store.attempts("k")
    assert (attempt.number, attempt.request) == (1, request(number=9))


def test_an_attempt_is_kept_aside_while_it_is_read(store, monkeypatch):
    with contextlib.closing(Released(claimed(store))) as closing:
        attempt = closing.claim.begin(request())
        Path(attempt.place, "request").write_bytes(b"")
        just_before(monkeypatch, folders, "read_attempt", 1, closing.claim.attempts)
        (found,) = store.attempts("k")
        assert found.number == 1
        assert "/unreadable/" in found.place
        assert "cut off" in found.trouble


# -- what is kept aside


def test_what_cannot_be_read_is_kept_aside_and_its_number_not_given_again(store, caplog):
    with contextlib.closing(Released(claimed(store))) as closing:
        claim = closing.claim
        for number in (1, 2, 3):
            claim.finish(claim.begin(request(number=number)), Exit(0))
        places = [store.at("k").attempt(number) for number in (1, 2, 3)]
        Path(places[1], "exit").write_bytes(b"proctree exit 1\n")
        Path(places[2], "request").unlink()
        assert [bool(a.trouble) for a in store.attempts("k")] == [False, True, True]
        assert not caplog.records
        found = claim.attempts()
        again = claim.attempts()
        assert found == again == store.attempts("k")
        assert [record.getMessage().split()[0] for record in caplog.records] == [
            "durable.unreadable",
            "durable.unreadable",
        ]
        assert (found[1].request, found[1].exit) == (request(number=2), None)
        assert (found[2].request, found[2].exit) == (None, Exit(0))
        assert "exit: cut off" in found[1].trouble
        assert "request: there is none" in found[2].trouble
        assert [os.path.exists(place) for place in places] == [True, False, False]
        assert all(os.path.isdir(a.place) for a in found)
        assert claim.begin(request()).number == 4
    assert store.keys() == ["k"]
    store.forget("k")
    assert os.listdir(store.path) == []


class Released:
    """A claim that is released at the end, whatever happens."""

    def __init__(self, claim: directory.FileClaim) -> None:
        self.claim = claim

    def close(self) -> None:
        self.claim.release()


def test_an_unreadable_handle_is_looked_for_and_not_submitted_again(store, caplog):
    with contextlib.closing(Released(claimed(store))) as closing:
        claim = closing.claim
        attempt = claim.begin(request())
        claim.submitted(attempt, "h\n\udcff")
        assert claim.attempts()[0].handle == "h\n\udcff"
        Path(attempt.place, "handle").write_bytes(b"h")
        for _ in range(2):
            (found,) = claim.attempts()
            assert (found.handle, found.trouble, found.request) == (None, "", request())
        assert [record.getMessage().split()[0] for record in caplog.records] == [
            "durable.unreadable"
        ]
        claim.submitted(attempt, "new")
        assert claim.attempts()[0].handle == "new"


@pytest.mark.parametrize("record", ["fifo", "folder", "link", "endless"])
def test_what_is_no_file_holds_up_nobody(record, store):
    with contextlib.closing(Released(claimed(store))) as closing:
        attempt = closing.claim.begin(request())
        path = Path(attempt.place, "exit")
        if record == "fifo":
            os.mkfifo(path)
        elif record == "folder":
            path.mkdir()
        elif record == "link":
            path.symlink_to("/dev/zero")
        else:
            path.touch()
            os.truncate(path, 1 << 40)
        (found,) = closing.claim.attempts()
        assert found.trouble.startswith("exit: ")
        assert found.request == request()


def test_a_record_that_never_got_its_name_counts(store):
    """Its writer was killed before it could rename it, or before it cut off the room behind it."""
    with contextlib.closing(Released(claimed(store))) as closing:
        attempt = closing.claim.begin(request())
        path = Path(attempt.place, "exit~")
        assert path.stat().st_size == 4096
        assert path.stat().st_blocks * 512 >= 4096
        whole = Exit(9, duration=1.5).encode()
        for length in (0, 1, len(whole) - 1):
            path.write_bytes(whole[:length] + bytes(4096 - length))
            assert closing.claim.attempts() == [attempt]
        for data in (whole + bytes(4096 - len(whole)), whole):
            path.write_bytes(data)
            assert store.attempts("k")[0].exit == Exit(9, duration=1.5)
            assert path.exists(), "who only reads changes nothing"
            assert closing.claim.attempts()[0].exit == Exit(9, duration=1.5)
            # Now it has its name, and no crash of the machine takes it away.
            path.with_name("exit").rename(path)


def test_what_was_begun_before_is_written_over(store):
    """By somebody who was killed in the middle of a longer record."""
    with contextlib.closing(Released(claimed(store))) as closing:
        attempt = closing.claim.begin(request())
        for name in ("exit~", "handle~"):
            Path(attempt.place, name).write_bytes(b"x" * 5000)
        closing.claim.submitted(attempt, "h")
        closing.claim.finish(attempt, Exit(0))
        assert closing.claim.attempts() == [attempt._replace(handle="h", exit=Exit(0))]


def test_what_is_not_ours_is_left_alone(store, caplog):
    with contextlib.closing(Released(claimed(store))) as closing:
        claim = closing.claim
        attempts = Path(store.at("k").attempts)
        for name in ("007", "x", ".9.old", "1.5"):
            (attempts / name).mkdir()
        (attempts / "7").touch()
        (attempts / "8").symlink_to("/")
        assert claim.attempts() == []
        said = " ".join(record.getMessage() for record in caplog.records)
        assert said.count("durable.foreign") == 6
        assert said.count("not a directory") == 2
        assert claim.begin(request()).number == 9
        assert len(list(attempts.iterdir())) == 7


# -- what is made


def test_only_we_may_look(store):
    old = os.umask(0)
    try:
        with contextlib.closing(Released(claimed(store, "x" * 300))) as closing:
            closing.claim.prepare(request("x" * 300)).close()
            attempt = closing.claim.begin(request("x" * 300))
            closing.claim.submitted(attempt, "h")
            closing.claim.finish(attempt, Exit(0))
    finally:
        os.umask(old)
    for path in [Path(store.path), *Path(store.path).rglob("*")]:
        mode = path.lstat().st_mode
        if not stat.S_ISSOCK(mode):
            assert stat.S_IMODE(mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, "/s/proctree/durable"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/proctree/durable"),
        ({"HOME": "/h"}, "/h/.local/state/proctree/durable"),
    ],
)
def test_where_it_is(environment, expected, monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert FileStore().path == expected


def test_without_a_home(monkeypatch):
    import pwd

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    home = pwd.getpwuid(os.geteuid()).pw_dir
    assert FileStore().path == f"{home}/.local/state/proctree/durable"


# -- the socket


def test_a_warden_is_found_below_any_path(folder):
    deep = folder / ("d" * 200)
    store = FileStore(deep / "store")
    with contextlib.closing(Released(claimed(store))) as closing:
        prepared = closing.claim.prepare(request())
        with contextlib.closing(prepared):
            place = prepared.attempt.place
            assert len(place) > 200
            assert os.path.samestat(os.fstat(prepared.run), os.stat(place))
            assert all(os.stat(f"{place}/{name}").st_size == 0 for name in ("out.log", "err.log"))
            for fd in (prepared.run, prepared.listen):
                assert fd > 2
                assert not os.get_inheritable(fd)
            with pytest.raises(ConnectionRefusedError):
                meeting.connect(place, DEADLINE)
            listener = socket.socket(fileno=os.dup(prepared.listen))
            with listener:
                listener.listen(0)
                sock = meeting.connect(place, DEADLINE)
                assert not sock.getblocking()
                select.select([listener], [], [], DEADLINE)
                peer, _ = listener.accept()
                with peer:
                    sock.send(b"hello")
                    peer.setblocking(True)
                    assert peer.recv(10) == b"hello"
                fds.close(sock.detach())
        prepared.close()
        with pytest.raises(ConnectionRefusedError):
            meeting.connect(place, DEADLINE)
        other = closing.claim.begin(request())
        with pytest.raises(FileNotFoundError):
            meeting.connect(other.place, DEADLINE)


def test_a_warden_that_is_busy_is_waited_for(store, monkeypatch):
    with contextlib.closing(Released(claimed(store))) as closing:
        with contextlib.closing(closing.claim.prepare(request())) as prepared:
            place = prepared.attempt.place
            with socket.socket(fileno=os.dup(prepared.listen)) as listener:
                listener.listen(0)
                first = meeting.connect(place, DEADLINE)  # unix(7): one more than the backlog
                with pytest.raises(TimeoutError, match="did not accept"):
                    meeting.connect(place, 0.01)
                again = threading.Event()
                just_before(monkeypatch, meeting, "_address", 2, again.set)
                waiting = in_thread(lambda: meeting.connect(place, DEADLINE))
                assert again.wait(DEADLINE)
                listener.accept()[0].close()
                second = waiting.get(timeout=DEADLINE)
                assert isinstance(second, socket.socket), second
                for sock in (first, second):
                    fds.close(sock.detach())


# -- what is refused


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(StoreUnusable) as raised:
        act()
    return str(raised.value)


@pytest.mark.parametrize("kind", ["file", "link", "open"])
def test_a_place_that_is_not_ours_alone(kind, store, folder):
    path = Path(store.path)
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to(folder)
    else:
        path.mkdir()
        path.chmod(0o755)
    for act in (
        *(lambda: store.claim("k"), lambda: store.attempts("k"), lambda: store.claimed("k")),
        *(store.keys, lambda: store.forget("k")),
    ):
        text = refused(act)
        assert store.path in text
        assert ("0700" if kind == "open" else "not a directory") in text


def test_below_a_file(folder):
    (folder / "file").touch()
    text = refused(lambda: FileStore(folder / "file" / "store").claim("k"))
    assert "ENOTDIR at step 'make'" in text
    assert "remove" in text


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to others")


@needs_root
def test_a_place_of_somebody_else(store, caplog):
    claim = claimed(store)
    attempt = claim.begin(request())
    os.chown(attempt.place, 65534, 65534)
    try:
        assert claim.attempts() == []
        assert "belongs to uid 65534" in caplog.text
        assert claim.begin(request()).number == 2
    finally:
        claim.release()
    os.chown(store.path, 65534, 65534)
    assert "belongs to uid 65534" in refused(lambda: store.claim("k"))
    assert "belongs to uid 65534" in refused(lambda: store.attempts("k"))


@needs_root
def test_a_place_where_we_may_not_write(store, folder):
    folder.chmod(0o755)

    def as_nobody(say: Say) -> None:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        say(refused(lambda: store.claim("k")))

    child = Child(as_nobody)
    text = child.hear()
    assert child.end()[0] == 0
    assert f"{store.path}: EACCES at step 'make'" in text
    assert "chmod" in text


def in_mount_namespace(script: str, folder: Path) -> None:
    command = ["unshare", *([] if os.geteuid() == 0 else ["-U", "-r"]), "-m"]
    command += ["--propagation", "private", sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


can_mount = pytest.mark.skipif(
    subprocess.run(
        ["unshare", "-U", "-r", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    ).returncode
    != 0,
    reason="nothing can be mounted here",
)

SMALL_DISK = """
import os, subprocess, sys
from proctree.durable.directory import FileStore
from proctree.durable.errors import StoreUnusable
from proctree.durable.recording import Exit, Request
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=True)
store = FileStore(folder + "/store")
request = Request("k", "t", "f", "0" * 16, "tree", "boot", 1, "host", 1, 1)

def refused(act):
    try:
        act()
    except StoreUnusable as error:
        return str(error)
    raise AssertionError("it was not refused")
"""

FULL = """
claim = store.claim("k")
prepared = claim.prepare(request)
first = prepared.attempt
def fill():
    with open(folder + "/full", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == 28, error

fill()
text = refused(lambda: claim.begin(request))
assert "ENOSPC at step 'begin'" in text and "make room" in text, text
text = refused(lambda: claim.submitted(first, "h" * 5000))
assert "ENOSPC at step 'write'" in text, text
assert os.listdir(store.at("k").attempts) == ["1"], os.listdir(store.at("k").attempts)
assert claim.attempts() == [first]
pwrite = os.pwrite

def after_somebody_else(*args):
    fill()
    return pwrite(*args)

os.pwrite = after_somebody_else
claim.finish(first, Exit(0, note="n" * 236))  # its room was taken before, and never given back
os.pwrite = pwrite
assert claim.attempts()[0].exit == Exit(0, note="n" * 236)
text = refused(lambda: store.claim("x" * 300))
assert "ENOSPC" in text, text
assert store.keys() == ["k"]
os.unlink(folder + "/full")
assert claim.begin(request).number == 2
store.claim("x" * 300).release()
"""

READ_ONLY = """
claim = store.claim("k")
claim.finish(claim.begin(request), Exit(3))
claim.release()
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
text = refused(lambda: store.claim("k"))
assert "EROFS at step 'lock'" in text and "writable" in text, text
assert "EROFS" in refused(lambda: store.claim("other"))
assert "EROFS" in refused(lambda: store.forget("k"))
assert [a.exit.status for a in store.attempts("k")] == [3]
assert store.keys() == ["k"]
assert not store.claimed("k")
"""


@can_mount
@pytest.mark.parametrize("script", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing(script, folder):
    in_mount_namespace(SMALL_DISK + script, folder)


def test_without_descriptors_nothing_is_taken_for_unreadable(store):
    """What we lack says nothing about the record."""
    with contextlib.closing(Released(claimed(store))) as closing:
        attempt = closing.claim.begin(request())

        def starve(say: Say) -> None:
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            with contextlib.suppress(OSError):
                while True:
                    os.open("/", os.O_RDONLY)
            for spare in range(3):
                text = refused(lambda: store.attempts("k"))
                assert "EMFILE" in text
                assert "RLIMIT_NOFILE" in text
                os.close(63 - spare)
            assert store.attempts("k") == [attempt]
            say("read")

        child = Child(starve)
        assert child.hear() == "read"
        assert child.end()[0] == 0
