"""The output of a durable tree: files that it writes, and readers that come and go."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import proctree
from integration.conftest import DEADLINE, HERE, QUICK, Lines, eventually
from proctree import command, containment, loop, records
from proctree.containment.base import Wanted
from proctree.durable import following
from proctree.durable.cursor import stored
from proctree.durable.following import Followed
from proctree.output import PENDING_MAX
from proctree.policy import Leftovers
from proctree.tree import Tree

NOTHING = (None, None)


class Run:
    """A tree whose output goes to files, as a durable run makes it."""

    def __init__(self, target: Any, place: Path, logs: Any, *, stdin: Any, **options: Any) -> None:
        tree_id = os.urandom(8).hex()
        checked = command.check(
            target,
            cwd=None,
            env=None,
            name=None,
            pass_fds=(),
            tree_id=tree_id,
            attributes=None,
            terminal=False,
            new_session=True,
        )
        self.streams = Followed(stdin, logs, str(place), writes=True, **options)
        contained = containment.choose("auto", Wanted())(tree_id, Wanted())
        leftovers, streams = Leftovers.KILL, self.streams
        self.tree = Tree(tree_id, checked, contained, streams, QUICK, leftovers, None, 0.5)

    def start(self) -> Run:
        self.tree.launch(loop.get())
        assert self.tree.started.wait(DEADLINE)
        assert self.tree.start_error is None, self.tree.start_error
        return self

    def wait(self) -> records.Ending:
        assert self.tree.closed.wait(DEADLINE)
        assert self.tree.ending is not None
        return self.tree.ending

    def kill(self) -> None:
        self.tree.kill(loop.get(), records.Reason.KILLED, "test", None)
        self.wait()


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def start(
        target: Any,
        logs: Any,
        *,
        place: Path = tmp_path,
        stdin: Any = proctree.DEVNULL,
        tap: Callable[[str, bytes], None] | None = None,
        **more: Any,
    ) -> Run:
        runs.append(Run(target, place, logs, stdin=stdin, **more))
        if tap is not None:
            runs[-1].tree.tap(tap)
        return runs[-1].start()

    yield start
    for run in runs:
        run.kill()


def python(code: str, *args: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, args)]


def rest(place: Path, **options: Any) -> list[str]:
    """What the next reader of stdout would get."""
    lines = Lines()
    following.deliver(str(place), (proctree.Lines(lines), None), tree_id="0" * 16, **options)
    return lines.lines


def cursor(place: Path) -> dict[str, int]:
    return stored(str(place))


def fifo(place: Path, name: str = "fifo") -> Path:
    """To be read once: who opens it again before its writer has closed it reads an end of file."""
    os.mkfifo(place / name)
    return place / name


# -- what is delivered


def test_lines_of_both_streams_and_the_files(start: Start, tmp_path: Path) -> None:
    out, err = Lines(), Lines()
    logs = (proctree.Lines(out), proctree.Lines(err))
    ending = start(["sh", "-c", "echo one; echo two >&2; printf three"], logs).wait()
    assert ending.returncode == 0
    assert (out.lines, err.lines) == (["one", "three"], ["two"])
    assert (tmp_path / "out.log").read_bytes() == b"one\nthree"
    assert (tmp_path / "err.log").read_bytes() == b"two\n"
    assert (tmp_path / "out.log").stat().st_mode & 0o777 == 0o600
    assert cursor(tmp_path) == {"stdout": 9, "stderr": 4}
    again = Lines()
    assert following.deliver(str(tmp_path), proctree.Lines(again), tree_id="x") == (NOTHING,) * 2
    assert again.lines == []


def test_what_is_captured_is_captured_from_the_beginning_and_moves_no_cursor(
    start: Start, tmp_path: Path
) -> None:
    ending = start(["sh", "-c", "echo one; echo two >&2"], proctree.CAPTURE).wait()
    assert (ending.stdout, ending.stderr) == (b"one\n", b"two\n")
    assert not (tmp_path / "cursor").exists()
    assert rest(tmp_path) == ["one"]
    both = following.deliver(str(tmp_path), proctree.CAPTURE, tree_id="x")
    assert both == ((b"one\n", None), (b"two\n", None))
    cut = following.deliver(str(tmp_path), (proctree.Capture(limit=2), None), tree_id="x")
    assert cut == ((b"o\n", records.Cut(1, 2)), NOTHING)
    assert cursor(tmp_path) == {"stdout": 4, "stderr": 0}


def test_without_a_reader_there_are_the_files_alone(start: Start, tmp_path: Path) -> None:
    run = start(["sh", "-c", "echo one"], None)
    assert run.streams.outputs == 0
    assert run.wait().stdout is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["err.log", "out.log"]
    assert rest(tmp_path) == ["one"]


def test_merged_both_are_in_one_file(start: Start, tmp_path: Path) -> None:
    lines = Lines()
    start(["sh", "-c", "echo 1; echo 2 >&2; echo 3"], proctree.Lines(lines), merged=True).wait()
    assert lines.lines == ["1", "2", "3"]
    assert not (tmp_path / "err.log").exists()


def test_what_a_tree_writes_is_delivered_while_it_runs(start: Start, tmp_path: Path) -> None:
    lines, gate = Lines(), fifo(tmp_path)
    run = start(["sh", "-c", f"echo one; read x < {gate}; echo $x"], proctree.Lines(lines))
    assert lines.wait_for(1) == ["one"]
    gate.write_text("two\n")
    assert lines.wait_for(2) == ["one", "two"]
    assert run.wait().returncode == 0


def test_binary_data_is_delivered_verbatim(start: Start) -> None:
    code = """
import hashlib, os, random, sys
data = random.Random(7).randbytes(3_000_000)
at = 0
while at < len(data):
    at += os.write(1, data[at : at + random.randint(1, 100_000)])
"""
    pieces: list[bytes] = []
    start(python(code), (proctree.Chunks(pieces.append), None)).wait()
    expected = hashlib.sha256(random.Random(7).randbytes(3_000_000)).hexdigest()
    assert hashlib.sha256(b"".join(pieces)).hexdigest() == expected


def test_a_byte_at_a_time(start: Start, tmp_path: Path) -> None:
    code = """
import os
for byte in b"".join(b"line %d\\n" % n for n in range(500)):
    os.write(1, bytes([byte]))
"""
    lines = Lines()
    start(python(code), (proctree.Lines(lines), None)).wait()
    assert lines.lines == [f"line {n}" for n in range(500)]
    assert rest(tmp_path) == []


def test_a_callback_that_raises_is_counted_and_the_cursor_goes_on(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []

    def refuse(line: str) -> None:
        seen.append(line)
        raise ValueError(line)

    ending = start(["sh", "-c", "echo 1; echo 2; echo 3"], (proctree.Lines(refuse), None)).wait()
    assert seen == ["1", "2", "3"]
    assert ending.callback_errors == 3
    assert cursor(tmp_path)["stdout"] == 6
    assert [record.message for record in caplog.records if "callback.failed" in record.message]


def test_taps_see_what_is_delivered(start: Start) -> None:
    seen: list[tuple[str, bytes]] = []
    tap = lambda name, data: seen.append((name, data))  # noqa: E731
    start(["sh", "-c", "echo 1"], proctree.Lines(print), tap=tap).wait()
    assert seen == [("stdout", b"1\n")]


STDIN = "import sys; sys.stdout.write(sys.stdin.read())"


def test_standard_input_needs_nobody_to_feed_it(start: Start, tmp_path: Path) -> None:
    text = "x" * 1_000_000
    assert (
        start(python(STDIN), proctree.CAPTURE, stdin=text.encode()).wait().stdout == text.encode()
    )
    file = tmp_path / "input"
    file.write_text("from a file")
    (tmp_path / "more").mkdir()
    more = {"logs": proctree.CAPTURE, "place": tmp_path / "more"}
    assert start(python(STDIN), stdin=file, **more).wait().stdout == b"from a file"
    with file.open() as opened:
        again = start(python(STDIN), stdin=opened.fileno(), **more).wait()
    assert again.stdout == b"from a filefrom a file"  # O_APPEND: nothing is written over
    nothing = start(python("import os; print(os.read(0, 1))"), **more).wait()
    assert nothing.stdout == b"from a filefrom a fileb''\n"


INHERITING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import proctree
from integration.test_following import Run
run = Run(["sh", "-c", "echo out; echo err >&2"], Path(sys.argv[1]), proctree.INHERIT,
          stdin=proctree.DEVNULL)
run.start().wait()
"""


def test_inherited_streams_are_copied_to_our_own(tmp_path: Path) -> None:
    argv = python(INHERITING, tmp_path, HERE.parent)
    done = subprocess.run(argv, capture_output=True, timeout=DEADLINE, check=True)
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")
    assert cursor(tmp_path) == {"stdout": 4, "stderr": 4}


def test_what_is_logged_names_the_main_process(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[dict[str, Any]] = []

    class Logger:
        def info(self, event: str, **fields: Any) -> None:
            said.append({"event": event, **fields})

    run = start(["sh", "-c", "echo 1"], (proctree.Log(logger=Logger()), None))
    run.wait()
    tree = {"pid": run.tree.pid, "tree_id": run.tree.tree_id}
    assert said == [{"event": "process.output", "line": "1", "stream": "stdout", **tree}]


# -- readers that are killed

WRITER = """
import os, random, sys
chance = random.Random(sys.argv[1])
number, held = 0, b""
for order in sys.stdin:
    held += b"".join(b"%d\\n" % n for n in range(number, number + int(order)))
    number += int(order)
    keep = chance.randint(1, 5)
    while len(held) > keep:
        size = min(chance.randint(1, 4000), len(held) - keep)
        held = held[os.write(1, held[:size]) :]
os.write(1, held)
"""
"""Writes as many numbered lines as it is told, in pieces that end anywhere; never all of the last
line before it is told to end."""

SEAM = "seam"


def test_readers_that_are_killed_at_any_moment_leave_no_gap(start: Start, tmp_path: Path) -> None:
    chance = random.Random(20)
    results = tmp_path / "results"
    results.touch()
    reader_end, writer_end = os.pipe()
    run = start(python(WRITER, 21), None, stdin=reader_end)
    os.close(reader_end)
    total = 0
    with open(writer_end, "w") as tell:
        for _ in range(8):
            reader = subprocess.Popen(
                [sys.executable, "-m", "integration.follower", str(tmp_path), str(results)],
                stdin=subprocess.PIPE,
                cwd=HERE.parent,
            )
            try:
                before = results.stat().st_size
                count = chance.randint(1, 20_000)
                total += count
                print(count, file=tell, flush=True)
                more = chance.randint(1, 5 * count)
                enough = functools.partial(has_grown, results, before + min(more, 3 * count))
                eventually(enough, f"{more} bytes of {count} lines")
            finally:
                reader.kill()
                reader.wait()
                reader.stdin.close()  # type: ignore[union-attr]
            with results.open("a") as file:
                print(SEAM, file=file)
    assert run.wait().returncode == 0
    with results.open("a") as file:
        file.writelines(f"{line}\n" for line in rest(tmp_path))
    assert_no_gap(results.read_text().splitlines(), total)
    assert rest(tmp_path) == []


def has_grown(path: Path, size: int) -> bool:
    return path.stat().st_size >= size


def assert_no_gap(lines: list[str], total: int) -> None:
    """Whole lines in order; only behind a seam some are repeated: no more than one piece."""
    due, seam, repeated = 0, False, 0
    for line in lines:
        if line == SEAM:
            seam = True
            continue
        number = int(line)
        if seam and number < due:
            repeated = sum(len(f"{n}\n") for n in range(number, due))
            assert repeated <= 2 * 64 * 1024, f"{repeated} bytes repeated"
            due = number
        seam = False
        assert number == due, f"{number} where {due} was due"
        due += 1
    assert due == total


# -- readers that are slow


def test_a_slow_callback_costs_no_memory(start: Start, tmp_path: Path) -> None:
    """The tree is not held up by it either: it ends while nothing of its 200 MB is taken."""
    size = 200 * 1024 * 1024
    goes_on, began = threading.Event(), threading.Event()
    taken = 0

    def slow(data: bytes) -> None:
        nonlocal taken
        taken += len(data)
        began.set()
        goes_on.wait()

    before = psutil.Process().memory_info().rss
    run = start(["head", "-c", str(size), "/dev/zero"], (proctree.Chunks(slow), None))
    try:
        assert began.wait(DEADLINE)
        eventually(lambda: has_grown(tmp_path / "out.log", size), "everything is written")
        # Everything else is over: only the callback is waited for.
        eventually(lambda: run.tree.life.state is proctree.State.DRAINING, "the tree is empty")
        assert psutil.Process().memory_info().rss - before < 20 * PENDING_MAX
        assert not run.tree.closed.is_set()
    finally:
        goes_on.set()
    run.wait()
    assert taken == size


def test_what_a_killed_tree_has_written_is_there_for_the_next_reader(
    start: Start, tmp_path: Path
) -> None:
    """A callback that never returns does not hold up the end that somebody asked for."""
    goes_on, lines = threading.Event(), Lines()

    def slow(line: str) -> None:
        lines(line)
        goes_on.wait()

    gate = fifo(tmp_path)
    script = f"echo 1; read x < {gate}; echo 2; echo 3; exec sleep 60"
    run = start(["sh", "-c", script], (proctree.Lines(slow), None))
    try:
        lines.wait_for(1)
        gate.write_text("\n")
        eventually(lambda: has_grown(tmp_path / "out.log", 6), "the rest is written")
        run.kill()
        assert lines.lines == ["1"]
    finally:
        goes_on.set()
    # It was busy with the first line still: that is repeated, or the cursor is behind it by now.
    assert rest(tmp_path)[-2:] == ["2", "3"]
    assert lines.lines == ["1"]


# -- files that are not only written to


def test_a_tree_that_truncates_its_output(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was begun of a line is a line of its own then."""
    lines, gate, second = Lines(), fifo(tmp_path), fifo(tmp_path, "second")
    script = f"""
        echo a long line; printf begun
        read x < {gate}
        : > /dev/stdout
        read x < {second}
        echo new; echo more
    """
    logs, read = (proctree.Lines(lines), None), Lines()
    run = start(["sh", "-c", script], logs, tap=lambda _name, data: list(map(read, data)))
    read.wait_for(len("a long line\nbegun"))
    gate.write_text("\n")
    assert lines.wait_for(2) == ["a long line", "begun"]
    second.write_text("\n")
    run.wait()
    assert lines.lines == ["a long line", "begun", "new", "more"]
    assert (tmp_path / "out.log").read_bytes() == b"new\nmore\n"
    assert cursor(tmp_path)["stdout"] == 9
    assert any("durable.truncated" in record.message for record in caplog.records)


def test_a_file_that_was_truncated_between_two_readers(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(["sh", "-c", "echo a long line"], (proctree.Lines(print), None)).wait()
    (tmp_path / "out.log").write_text("short\n")
    assert rest(tmp_path) == ["short"]
    assert cursor(tmp_path)["stdout"] == 6
    assert any("durable.truncated" in record.message for record in caplog.records)


def test_a_file_that_was_replaced_is_followed_where_the_tree_writes(
    start: Start, tmp_path: Path
) -> None:
    lines, gate = Lines(), fifo(tmp_path)
    run = start(["sh", "-c", f"echo 1; read x < {gate}; echo 2"], (proctree.Lines(lines), None))
    lines.wait_for(1)
    (tmp_path / "out.log").rename(tmp_path / "old")
    (tmp_path / "out.log").write_text("somebody else's\n")
    gate.write_text("\n")
    run.wait()
    assert lines.lines == ["1", "2"]


# -- inotify is short

SHORT = """
import os, sys, logging
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import proctree
from integration.conftest import Lines, eventually
from integration.test_following import Run
from proctree import loop
from proctree.durable import watching
place, limit = Path(sys.argv[1]), Path("/proc/sys/user", sys.argv[3])
logging.basicConfig(format="%(message)s")
allowed = limit.read_text()
limit.write_text("0")
gate, second = place / "gate", place / "second"
os.mkfifo(gate)
os.mkfifo(second)
out, err = Lines(), Lines()
script = f"echo 1; echo 2 >&2; read x < {gate}; echo 3; read x < {second}; echo 4"
run = Run(["sh", "-c", script], place, (proctree.Lines(out), proctree.Lines(err)),
          stdin=proctree.DEVNULL).start()
assert out.wait_for(1) == ["1"]
assert err.wait_for(1) == ["2"]
watches = watching.of(loop.get())
assert len(watches._unwatched) == 2, watches._unwatched
gate.write_text("\\n")
assert out.wait_for(2) == ["1", "3"]
limit.write_text(allowed)
eventually(lambda: not watches._unwatched, "they are watched when there is room again")
second.write_text("\\n")
assert out.wait_for(3) == ["1", "3", "4"]
assert run.wait().returncode == 0
"""


@pytest.mark.parametrize(
    ("limit", "error"),
    [("max_inotify_instances", "EMFILE"), ("max_inotify_watches", "ENOSPC")],
)
def test_where_inotify_cannot_be_had_files_are_looked_at(
    tmp_path: Path, limit: str, error: str
) -> None:
    """In a user namespace of our own, whose limits concern nobody else: namespaces(7)."""
    if subprocess.run(["unshare", "-U", "-r", "true"], capture_output=True).returncode != 0:
        pytest.skip("no user namespaces here")
    argv = ["unshare", "-U", "-r", *python(SHORT, tmp_path, HERE.parent, limit)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=4 * DEADLINE)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("durable.unwatched")]
    assert len(said) == 1, done.stderr
    assert f"errno='{error}'" in said[0]


# -- a fork of the host


def test_a_fork_of_the_host_has_nothing_of_ours_and_disturbs_nobody(
    start: Start, tmp_path: Path
) -> None:
    lines, gate = Lines(), fifo(tmp_path)
    run = start(["sh", "-c", f"echo 1; read x < {gate}; echo 2"], (proctree.Lines(lines), None))
    lines.wait_for(1)
    kept = [os.path.realpath(tmp_path / name) for name in ("out.log", "err.log", "cursor")]
    ours = {kept[0], kept[2], INOTIFY}
    eventually(lambda: set(descriptors()) & {*kept, INOTIFY} == ours, "the cursor is open")
    pid = os.fork()
    if pid == 0:
        os._exit(len(set(descriptors()) & {*kept, INOTIFY}))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate.write_text("\n")
    assert lines.wait_for(2) == ["1", "2"]
    run.wait()


INOTIFY = "anon_inode:inotify"


def descriptors() -> list[str]:
    """What the open ones are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found
