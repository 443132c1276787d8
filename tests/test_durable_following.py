"""Files that are followed on the loop, without a tree: the cursor, the watches, and what may lie
where the output should."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from on_loop import LONG, Heard, on_loop
from proctree import loop
from proctree.durable import following, watching
from proctree.durable.cursor import SIZE, Cursor, decode, encode, stored
from proctree.durable.following import Followed, to_logs
from proctree.loop import BUFFER_SIZE
from proctree.output import PENDING_MAX, CallbackErrors
from proctree.process import fds, inotify
from proctree.stdio import Stdio
from proctree.streams import CALLBACK_CHUNK, CAPTURES_PER_TURN
from proctree.worker import Worker

TREE = "0" * 16


class Owner:
    """What streams want of their tree, of which nobody knows whether it has ended."""

    def __init__(self) -> None:
        self.tree_id = TREE
        self.pid: int | None = None
        self.worker = Worker()
        self.callback_errors = CallbackErrors(TREE)
        self.ended = Heard()

    def stream_ended(self) -> None:
        self.ended("ended")


class Follower:
    """The streams of a tree that somebody else runs."""

    def __init__(self, place: Path, logs: Any, **options: Any) -> None:
        self.owner = Owner()
        self.streams = Followed(None, logs, str(place), writes=False, **options)

    def attach(self) -> None:
        with fds.making():
            self.streams.attach(loop.get(), self.owner)

    def start(self) -> Follower:
        on_loop(lambda: (self.attach(), self.streams.start()))
        return self

    def drain(self) -> None:
        """Returns when every stream has reported its end."""
        on_loop(self.streams.drain)
        self.owner.ended.wait_for(self.streams.outputs)

    def close(self) -> None:
        on_loop(self.streams.close)

    def delivered(self) -> None:
        """Returns when the worker has done what it was given, which includes the cursor."""
        on_loop(lambda: None)
        done = threading.Event()
        self.owner.worker.post(done.set)
        assert done.wait(LONG)


Follow = Callable[..., Follower]


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Follow]:
    followers: list[Follower] = []

    def follow(logs: Any, place: Path = tmp_path, **options: Any) -> Follower:
        followers.append(Follower(place, logs, **options))
        return followers[-1].start()

    yield follow
    for each in followers:
        each.close()


def write(place: Path, data: bytes, name: str = "out.log") -> None:
    with (place / name).open("ab") as file:
        file.write(data)


def lines(heard: Heard) -> proctree.Lines:
    return proctree.Lines(heard)


def rest(place: Path, **options: Any) -> list[str]:
    """What the next reader gets."""
    heard = Heard()
    following.deliver(str(place), (lines(heard), None), tree_id=TREE, **options)
    return list(heard.all)


def events_of(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if name in record.getMessage()]


# -- what may be asked for


@pytest.mark.parametrize(
    ("logs", "error", "says"),
    [
        (print, TypeError, "Lines"),
        (7, TypeError, "not 7"),
        (True, TypeError, "True"),
        ("elsewhere", TypeError, "elsewhere"),
        (Path("x"), TypeError, "x"),
        (proctree.DEVNULL, ValueError, "None is for the files"),
        (proctree.STDOUT, ValueError, "STDOUT"),
        ((None, None, None), ValueError, "3 values"),
        ((None, 7), TypeError, "not 7"),
    ],
)
def test_what_cannot_be_done_with_output_is_refused(
    logs: Any, error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"^logs: .*{says}"):
        Followed(proctree.DEVNULL, logs, str(tmp_path), writes=True)
    with pytest.raises(error, match=r"^logs: "):
        following.deliver(str(tmp_path), logs, tree_id=TREE)
    assert os.listdir(tmp_path) == []


def test_one_is_for_both_streams_and_a_pair_is_a_pair() -> None:
    heard = lines(Heard())
    assert to_logs(None) == to_logs((None, None)) == {}
    assert to_logs(heard) == {"stdout": heard, "stderr": heard}
    assert to_logs([heard, None]) == to_logs(heard, merged=True) == {"stdout": heard}
    assert to_logs("capture") == {"stdout": Stdio.CAPTURE, "stderr": Stdio.CAPTURE}
    with pytest.raises(ValueError, match=r"^logs: stderr"):
        to_logs((heard, heard), merged=True)


@pytest.mark.parametrize("stdin", [None, "inherit", "capture", 3.5])
def test_what_cannot_be_standard_input_is_refused(stdin: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^stdin: "):
        Followed(stdin, None, str(tmp_path), writes=True)


def test_what_is_opened_for_the_child_is_closed_again(tmp_path: Path) -> None:
    """And is above the standard streams, appends, and is for nobody else to read."""
    streams = Followed(b"input", None, str(tmp_path), writes=True)
    opened: Any = streams.open()
    stdin, stdout, stderr = opened
    assert None not in (stdin, stdout, stderr)
    assert os.read(stdin, 10) == b"input"
    for fd, name in ((stdout, "out.log"), (stderr, "err.log")):
        write(tmp_path, b"earlier ", name)
        os.write(fd, b"later")
        assert (tmp_path / name).read_bytes() == b"earlier later"
        assert not os.get_inheritable(fd)
    streams.close_child_ends()
    for fd in (stdin, stdout, stderr):
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


# -- the cursor


def test_a_cursor_is_what_was_written() -> None:
    offsets = {"stdout": 2**40, "stderr": 7}
    data = encode(offsets)
    assert len(data) == SIZE
    assert decode(data) == offsets


@pytest.mark.parametrize("at", range(SIZE))
def test_a_damaged_cursor_is_known_for_one(at: int) -> None:
    data = bytearray(encode({"stdout": 5, "stderr": 6}))
    data[at] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        decode(bytes(data))


@pytest.mark.parametrize("data", [b"x", b"x" * SIZE, b"x" * (SIZE + 1)])
def test_an_unreadable_cursor_is_the_beginning_and_is_said(
    data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, b"1\n2\n")
    (tmp_path / "cursor").write_bytes(data)
    assert rest(tmp_path) == ["1", "2"]
    assert len(events_of(caplog, "durable.cursor_unreadable")) == 1
    assert rest(tmp_path) == []


def test_no_cursor_and_an_empty_one_are_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert stored(str(tmp_path)) == {"stdout": 0, "stderr": 0}
    (tmp_path / "cursor").touch()
    assert stored(str(tmp_path)) == {"stdout": 0, "stderr": 0}
    assert not caplog.records


def test_a_cursor_that_cannot_be_written_holds_up_nobody(
    tmp_path: Path, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cursor").mkdir()
    write(tmp_path, b"1\n2\n")
    heard = Heard()
    follower = follow((lines(heard), None))
    assert heard.wait_for(2) == ["1", "2"]
    write(tmp_path, b"3\n")
    assert heard.wait_for(3) == ["1", "2", "3"]
    follower.drain()
    assert len(events_of(caplog, "durable.cursor_unwritable")) == 1


def test_the_cursor_of_lines_stands_behind_the_last_whole_one(
    tmp_path: Path, follow: Follow
) -> None:
    (tmp_path / "out.log").touch()
    follower = follow((lines(Heard()), None))
    for data, behind in ((b"one\ntw", 4), (b"o", 4), (b"\nthree", 8)):
        write(tmp_path, data)
        seen_by_the_loop(follower, os.stat(tmp_path / "out.log").st_size)
        follower.delivered()
        assert stored(str(tmp_path))["stdout"] == behind
    follower.close()
    assert rest(tmp_path) == ["three"]


def seen_by_the_loop(follower: Follower, offset: int) -> None:
    """Returns when the loop has read so far."""
    changed = threading.Event()
    while on_loop(lambda: follower.streams._files["stdout"]._offset) < offset:
        changed.wait(0.001)


def test_a_line_that_is_too_long_is_cut_where_the_first_reader_would_have(tmp_path: Path) -> None:
    write(tmp_path, b"a" * 25)
    (tmp_path / "err.log").touch()
    heard = Heard()
    first = Follower(tmp_path, (proctree.Lines(heard, max_length=10), None)).start()
    assert heard.wait_for(2) == ["a" * 10] * 2
    first.delivered()
    first.close()
    write(tmp_path, b"b" * 7 + b"\n")
    again = Heard()
    following.deliver(str(tmp_path), (proctree.Lines(again, max_length=10), None), tree_id=TREE)
    assert again.all == ["aaaaabbbbb", "bb"]


def test_a_watcher_leaves_the_cursor_alone_until_it_owns_the_run(
    tmp_path: Path, follow: Follow
) -> None:
    """What the streams that it does not deliver were delivered to others is kept then."""
    for name in ("out.log", "err.log"):
        write(tmp_path, b"1\n2\n", name)
    owner = Cursor(str(tmp_path), ("stdout", "stderr"), writes=True)
    owner.move("stdout", 2)
    heard = Heard()
    watcher = follow((lines(heard), None), cursor=False)
    assert heard.wait_for(1) == ["2"]
    watcher.delivered()
    owner.move("stderr", 4)
    owner.close()
    assert stored(str(tmp_path)) == {"stdout": 2, "stderr": 4}
    on_loop(watcher.streams.take_cursor)
    watcher.delivered()
    assert stored(str(tmp_path)) == {"stdout": 4, "stderr": 4}
    write(tmp_path, b"3\n")
    assert heard.wait_for(2) == ["2", "3"]
    watcher.delivered()
    assert stored(str(tmp_path)) == {"stdout": 6, "stderr": 4}


@pytest.mark.parametrize("logs", [None, proctree.CAPTURE])
def test_who_delivers_nothing_makes_no_cursor(logs: Any, tmp_path: Path, follow: Follow) -> None:
    write(tmp_path, b"1\n")
    follower = follow(logs, cursor=False)
    on_loop(follower.streams.take_cursor)
    follower.drain()
    follower.delivered()
    assert not (tmp_path / "cursor").exists()
    following.deliver(str(tmp_path), logs, tree_id=TREE)
    assert not (tmp_path / "cursor").exists()


def test_delivering_without_the_cursor(tmp_path: Path) -> None:
    write(tmp_path, b"1\n")
    assert rest(tmp_path, cursor=False) == rest(tmp_path) == ["1"]
    assert rest(tmp_path) == []


# -- what is watched


def test_what_is_written_while_the_watch_is_made_is_seen(
    tmp_path: Path, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    write(tmp_path, b"1\n")
    add = inotify.add_watch

    def late(instance: int, fd: int) -> int:
        write(tmp_path, b"2\n")
        return add(instance, fd)

    monkeypatch.setattr(inotify, "add_watch", late)
    follow((lines(heard), None))
    assert heard.wait_for(2) == ["1", "2"]


def test_the_file_is_watched_and_not_its_name(tmp_path: Path) -> None:
    write(tmp_path, b"1\n")
    heard = Heard()
    follower = Follower(tmp_path, (lines(heard), None))
    on_loop(follower.attach)
    with (tmp_path / "out.log").open("ab", buffering=0) as file:
        (tmp_path / "out.log").unlink()
        on_loop(follower.streams.start)
        assert not on_loop(lambda: watching.of(loop.get())._unwatched)
        file.write(b"2\n")
        assert heard.wait_for(2) == ["1", "2"]
    follower.close()


def test_when_events_were_lost_every_file_is_looked_at(tmp_path: Path, follow: Follow) -> None:
    """inotify(7) keeps max_queued_events of them; two files in turns, since events that are alike
    become one."""
    places, heard = [], Heard()
    for name in "abc":
        place = tmp_path / name
        place.mkdir()
        (place / "out.log").touch()
        places.append(place)
        follow((lines(heard.named(name)), None), place)
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    busy, goes_on = threading.Event(), threading.Event()
    loop.get().post(lambda: (busy.set(), goes_on.wait(LONG)))  # type: ignore[arg-type]
    assert busy.wait(LONG)
    try:
        with contextlib.ExitStack() as stack:
            first, second = (
                stack.enter_context((place / "out.log").open("ab", buffering=0))
                for place in places[:2]
            )
            for _ in range(most // 2 + 1):
                first.write(b".")
                second.write(b".")
        write(places[2], b"missed\n")
    finally:
        goes_on.set()
    assert heard.wait_for(1) == [("c", "missed")]


def test_a_file_that_is_followed_twice(tmp_path: Path, follow: Follow) -> None:
    """It has one watch for both, which stays until both have left."""
    one, two = Heard(), Heard()
    write(tmp_path, b"1\n")
    first, second = (follow((lines(heard), None), cursor=False) for heard in (one, two))
    for heard in (one, two):
        assert heard.wait_for(1) == ["1"]
    first.close()
    write(tmp_path, b"2\n")
    assert two.wait_for(2) == ["1", "2"]
    second.close()
    assert one.all == ["1"]
    assert watching._watches == {}


def turns() -> int:
    """How often the loop has slept."""
    return on_loop(lambda: resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw)


def test_500_files_that_nobody_writes_to_cost_nothing(tmp_path: Path, follow: Follow) -> None:
    """One instance of inotify does for all, and the loop does not wake up."""
    heard = Heard()
    places = [tmp_path / str(number) for number in range(250)]
    for place in places:
        place.mkdir()
        write(place, b"1\n")
        write(place, b"2\n", "err.log")
        follow(lines(heard), place)
    heard.wait_for(500)
    # The suite's own loop has nothing else to do; what is counted here would be 10 at the least if
    # files were looked at now and then.
    before = turns()
    assert not threading.Event().wait(1.0)
    assert turns() - before < 6
    instances = [name for name in descriptors() if name == "anon_inode:inotify"]
    assert len(instances) == 1
    write(places[123], b"more\n")
    assert heard.wait_for(501)[-1] == "more"


def descriptors() -> list[str]:
    """What the open ones are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def test_events_are_taken_apart() -> None:
    plain = (7).to_bytes(4, "little") + inotify.IN_MODIFY.to_bytes(4, "little") + bytes(8)
    named = (8).to_bytes(4, "little") + bytes(8) + (16).to_bytes(4, "little") + b"x" * 16
    found = inotify.parse(plain + named + plain)
    assert found == [(7, inotify.IN_MODIFY), (8, 0), (7, inotify.IN_MODIFY)]


# -- reading


def test_a_flood_does_not_keep_the_loop_from_others(tmp_path: Path, follow: Follow) -> None:
    """A capture takes whatever there is; a job that is posted meanwhile has its turn before that
    has come to its end."""
    with (tmp_path / "out.log").open("wb") as file:
        file.truncate(512 * 1024 * 1024)
    follower = Follower(tmp_path, (proctree.Capture(limit=1000), None))
    offsets: list[int] = []

    def offset() -> None:
        offsets.append(follower.streams._files["stdout"]._offset)

    def begin() -> None:
        follower.attach()
        follower.streams.start()
        loop.get().post(offset)

    on_loop(begin)
    on_loop(lambda: None)
    assert 0 < offsets[0] < 512 * 1024 * 1024
    follower.close()


def test_reading_stops_at_the_limit_and_goes_on(tmp_path: Path, follow: Follow) -> None:
    size = 4 * PENDING_MAX
    goes_on = threading.Event()
    taken = Heard()

    def slow(data: bytes) -> None:
        taken(len(data))
        goes_on.wait(LONG)

    write(tmp_path, bytes(size))
    follower = follow((proctree.Chunks(slow), None))
    try:
        taken.wait_for(1)
        offset = functools.partial(getattr, follower.streams._files["stdout"], "_offset")
        seen_by_the_loop(follower, PENDING_MAX)
        write(tmp_path, b"more")
        for _ in range(10):
            assert on_loop(offset) == PENDING_MAX
        on_loop(follower.streams.drain)
        write(tmp_path, b"too late")
    finally:
        goes_on.set()
    follower.drain()
    assert sum(taken.all) == size + 4
    assert max(taken.all) <= CALLBACK_CHUNK


def test_the_end_is_what_the_file_holds_then(tmp_path: Path, follow: Follow) -> None:
    """Whoever else writes to it cannot make it longer for ever."""
    heard = Heard()
    write(tmp_path, b"1\n")
    follower = follow((lines(heard), None))
    heard.wait_for(1)

    def drain_and_write() -> None:
        write(tmp_path, b"2\n")
        follower.streams.drain()
        write(tmp_path, b"3\n")
        follower.streams.drain()

    on_loop(drain_and_write)
    follower.owner.ended.wait_for(1)
    assert heard.all == ["1", "2"]
    assert rest(tmp_path) == ["3"]
    on_loop(lambda: None)
    assert len(follower.owner.ended.all) == 1


def test_nothing_is_captured_behind_the_end(tmp_path: Path) -> None:
    """Though there is room for it in the buffer that the end is read into."""
    turn = CAPTURES_PER_TURN * BUFFER_SIZE
    write(tmp_path, bytes(turn) + b"end")
    follower = Follower(tmp_path, (proctree.Capture(2 * turn), None))

    def end_and_write() -> None:
        follower.attach()
        follower.streams.start()  # which reads as much as it may in one turn
        follower.streams.drain()
        write(tmp_path, b"too late")

    on_loop(end_and_write)
    follower.owner.ended.wait_for(1)
    (captured, cut), _ = on_loop(follower.streams.captured)
    follower.close()
    assert (len(captured or b""), (captured or b"")[-3:], cut) == (turn + 3, b"end", None)


def test_an_unreadable_file_has_its_end_once(
    tmp_path: Path, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """And the descriptor that was given back for it is not asked for its size."""
    write(tmp_path, b"1\n")
    heard = Heard()
    follower = follow((lines(heard), None))
    heard.wait_for(1)

    def spoil() -> None:
        """From now on reading fails, with EISDIR."""
        file = follower.streams._files["stdout"]
        directory = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(directory, file._fd, inheritable=False)
        os.close(directory)

    on_loop(spoil)
    write(tmp_path, b"2\n")
    follower.owner.ended.wait_for(1)
    on_loop(follower.streams.drain)
    follower.delivered()
    assert heard.all == ["1"]
    assert len(follower.owner.ended.all) == 1
    (said,) = events_of(caplog, "durable.unreadable_output")
    assert "EISDIR" in said


def test_what_begins_again_is_not_delivered_to_one_that_has_given_up(tmp_path: Path) -> None:
    """Nor the line that was not complete before."""
    goes_on, heard = threading.Event(), Heard()

    def slow(line: str) -> None:
        heard(line)
        goes_on.wait(LONG)

    write(tmp_path, b"1\nhalf")
    follower = Follower(tmp_path, (proctree.Lines(slow), None)).start()
    try:
        heard.wait_for(1)
        os.truncate(tmp_path / "out.log", 0)
        offset = functools.partial(getattr, follower.streams._files["stdout"], "_offset")
        while on_loop(offset) != 0:
            goes_on.wait(0.001)
        follower.close()
    finally:
        goes_on.set()
    follower.delivered()
    assert heard.all == ["1"]


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_a_file_that_is_truncated_at_the_very_end(
    size: int, tmp_path: Path, follow: Follow
) -> None:
    """Between what fstat(2) says and the last read: what there is is read, and that is the end."""
    goes_on, heard = threading.Event(), Heard()

    def slow(data: bytes) -> None:
        heard(data)
        goes_on.wait(LONG)

    chunk = bytes(CALLBACK_CHUNK)
    write(tmp_path, chunk * (PENDING_MAX // CALLBACK_CHUNK) + b"end")
    follower = follow((proctree.Chunks(slow), None))
    try:
        seen_by_the_loop(follower, PENDING_MAX)
        on_loop(follower.streams.drain)
        os.truncate(tmp_path / "out.log", {0: 0, 1: 1, 3: PENDING_MAX, 4: PENDING_MAX + 1}[size])
    finally:
        goes_on.set()
    follower.owner.ended.wait_for(1)
    last = {0: chunk, 1: b"\0", 3: chunk, 4: b"e"}[size]
    assert heard.all[-1] == last


def test_a_missing_file_and_one_that_is_none(
    tmp_path: Path, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """A FIFO that nobody writes to must not hold up the loop. Where stderr has no file it went
    where stdout went."""
    os.mkfifo(tmp_path / "out.log")
    heard = Heard()
    follower = follow(lines(heard))
    follower.drain()
    assert len(follower.owner.ended.all) == 2
    assert rest(tmp_path) == heard.all == []
    (tmp_path / "out.log").unlink()
    assert rest(tmp_path) == []
    said = events_of(caplog, "durable.unreadable_output")
    assert ["not a regular" in each for each in said] == [True, True, False]
    assert "ENOENT" in said[2]


def test_what_is_not_delivered_after_the_end_leaves_nothing_open(tmp_path: Path) -> None:
    """Attached, and then there was no tree after all."""
    write(tmp_path, b"1\n")
    heard = Heard()
    follower = Follower(tmp_path, lines(heard))
    on_loop(follower.attach)
    follower.close()
    follower.delivered()
    assert heard.all == []
    assert str(tmp_path / "out.log") not in descriptors()
