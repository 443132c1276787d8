"""Trees in event loops: whatever becomes of the task, its tree has ended when the block is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest

import proctree
from integration.conftest import (
    DEADLINE,
    QUICK,
    Lifeline,
    eventually,
    is_alive,
    living,
    start_supervisor,
)
from integration.event_loops import (  # noqa: F401
    ASYNCIO,
    NAMES,
    TRIO,
    UVLOOP,
    interrupted,
    run_in,
    uvloop_is_set_up,
)
from proctree import KillPolicy, Reason, Stage, aio
from proctree.aio.reading import BLOCK
from proctree.output import PENDING_MAX
from proctree.transitions import TreeEnded, TreeStarted, TreeStarting, TreeStopping

MIB = 1024 * 1024
Main = Callable[..., Coroutine[Any, Any, Any]]
Run = Callable[..., Any]

DEAF = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1000; done"]
"""Ignores SIGTERM, and says when it does."""

PATIENT = KillPolicy((Stage(signal.SIGTERM, 1000.0),))
"""It takes somebody who is in a hurry to end a deaf tree."""


@pytest.fixture(params=NAMES)
def loop_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(loop_name: str) -> Run:
    """Runs a coroutine function in each kind of event loop, with a deadline."""

    async def bounded(main: Main, *args: object) -> Any:
        with anyio.fail_after(DEADLINE):
            return await main(*args)

    return lambda main, *args: run_in(loop_name, bounded, main, *args)


async def first_line(proc: aio.Process) -> str:
    async for line in proc.lines():
        return line
    raise AssertionError("no line")


# -- What comes of a tree


def test_lines_outcome_and_run(run: Run) -> None:
    async def main() -> None:
        async with aio.open_process(["sh", "-c", "echo one; echo two; exit 3"]) as proc:
            assert proc.pid is not None
            assert [line async for line in proc.lines()] == ["one", "two"]
            outcome = await proc.wait()
        assert (outcome.returncode, outcome.tree_id) == (3, proc.tree_id)
        assert await proc.wait() is proc.outcome is outcome
        captured = await aio.run(["echo", "x"], stdout=proctree.CAPTURE, check=True)
        assert captured.stdout == b"x\n"
        with pytest.raises(proctree.TreeFailed) as failed:
            await aio.run(["sh", "-c", "exit 5"], check=True)
        assert failed.value.outcome.returncode == 5

    run(main)


def test_a_callable_and_line_callbacks(run: Run) -> None:
    got: list[str] = []

    def work() -> None:
        os.write(1, b"from a callable\n")

    outcome = run(lambda: aio.run(work, stdout=proctree.Lines(got.append)))
    assert outcome.ok
    assert got == ["from a callable"]


def test_what_can_be_done_with_a_handle(run: Run, actors: str) -> None:
    async def main() -> None:
        async with aio.open_process([actors, "counter"], name="counts", kill=QUICK) as proc:
            lines = proc.lines()
            assert await anext(lines) is not None
            assert (proc.name, proc.state) == ("counts", proctree.State.RUNNING)
            assert [info.pid for info in await proc.processes()][:1] == [proc.pid]
            proc.signal(signal.SIGTERM)
            proc.freeze()
            proc.thaw()
            proc.signal(signal.SIGUSR1)
            assert await anext(lines) == "1"
            with pytest.raises(RuntimeError, match="no channel"):
                proc.notify("x")
            proc.kill(KillPolicy.now(), reason="enough")
            outcome = await proc.wait()
        assert (outcome.reason, outcome.detail) == (Reason.KILLED, "enough")

    run(main)


# -- What cannot be started


UNSTARTABLE: list[tuple[list[str], dict[str, Any], type[Exception]]] = [
    (["/nonexistent/program"], {}, FileNotFoundError),
    (["/etc"], {}, PermissionError),
    (["true"], {"cwd": "/nonexistent"}, FileNotFoundError),
    (["true"], {"stdout": Path("/nonexistent/out")}, FileNotFoundError),
    (["true"], {"bogus": 1}, TypeError),
    (["true"], {"timeout": -1}, ValueError),
    (["true"], {"containment": "bogus"}, ValueError),
    ([], {}, ValueError),
]


def test_what_cannot_be_started_raises_as_elsewhere(run: Run) -> None:
    async def main() -> None:
        for target, options, error in UNSTARTABLE:
            with pytest.raises(error) as ours:
                async with aio.open_process(target, **options):
                    raise AssertionError("it runs")
            with pytest.raises(error) as theirs:
                proctree.WatchedSubprocess.start(target, **options)
            assert type(ours.value) is type(theirs.value)
            assert str(ours.value) == str(theirs.value)
            assert not living()

    run(main)


def test_each_open_process_is_one_tree(run: Run) -> None:
    async def main() -> None:
        opening = aio.open_process(["true"])
        async with opening as proc:
            pass
        with pytest.raises(RuntimeError, match="entered before"):
            async with opening:
                pass
        assert proc.outcome is not None

    run(main)


# -- Cancellation, at every await there is


async def whole_life(seen: list[aio.Process]) -> proctree.Outcome:
    """With something that ignores SIGTERM, in a session of its own, so that the end takes time."""
    script = f"echo one; setsid sh -c '{DEAF[2].replace(chr(39), chr(34))}' & wait"
    quick = KillPolicy((Stage(signal.SIGTERM, 0.02), Stage(signal.SIGKILL, 10.0)))
    async with aio.open_process(["sh", "-c", script], kill=quick) as proc:
        seen.append(proc)
        lines = proc.lines()
        assert {await anext(lines), await anext(lines)} == {"one", "ready"}
        proc.signal(signal.SIGTERM, "main")
        return await proc.wait()


def expect_end(seen: list[aio.Process]) -> None:
    assert not living()
    assert all(proc.outcome is not None for proc in seen)


class Awaits:
    """The awaits of something, one after the other.

    How many there are differs: nobody waits for a line that has come already. So the last one is
    known by its being missed again and again.

    Args:
        fewest: up to which number it comes at least. Default: those of `whole_life`, which are
            the beginning, two lines and the end; asyncio has a checkpoint more.

    Attributes:
        number: of the next one, from 1.
    """

    MOST, MISSES = 40, 5

    def __init__(self, fewest: int = 4) -> None:
        self.number = 1
        self._fewest = fewest
        self._missed = 0

    def tried(self, *, reached: bool) -> None:
        self.number += reached
        self._missed = 0 if reached else self._missed + 1
        assert self.number < self.MOST

    def are_left(self) -> bool:
        if self._missed < self.MISSES:
            return True
        assert self.number >= self._fewest
        return False


def test_an_anyio_scope_is_cancelled_at_each_await(run: Run) -> None:
    async def cancelled_at(number: int) -> bool:
        seen: list[aio.Process] = []
        with anyio.CancelScope() as scope:
            _, awaits = await interrupted(whole_life(seen), {number}, scope.cancel)
        expect_end(seen)
        # Behind the last one, or at one that is shielded, it is not noticed.
        return scope.cancelled_caught or awaits >= number

    async def main() -> None:
        awaits = Awaits()
        while awaits.are_left():
            awaits.tried(reached=await cancelled_at(awaits.number))

    run(main)


@pytest.mark.parametrize("loop_name", [ASYNCIO, UVLOOP], indirect=True)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_task_of_asyncio_is_cancelled_at_each_await(run: Run, times: int) -> None:
    """Task.cancel(), which no shield of anyio's keeps off; also again and again."""

    async def cancelled_at(number: int) -> bool:
        seen: list[aio.Process] = []
        awaits = 0

        async def alone() -> None:
            nonlocal awaits
            task = asyncio.current_task()
            assert task is not None
            at = range(number, number + times)
            _, awaits = await interrupted(whole_life(seen), at, task.cancel)

        task = asyncio.ensure_future(alone())
        await asyncio.wait([task])
        expect_end(seen)
        assert task.cancelled() or task.exception() is None, task
        return task.cancelled() or awaits >= number

    async def main() -> None:
        awaits = Awaits()
        while awaits.are_left():
            awaits.tried(reached=await cancelled_at(awaits.number))

    run(main)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_each_await(loop_name: str, times: int) -> None:
    """asyncio's Runner cancels the task at the first and raises at the second; trio raises both."""
    kept: list[int] = []

    async def main(number: int, seen: list[aio.Process]) -> None:
        stepping: Any = interrupted
        if loop_name == TRIO:
            import trio

            # Else it would be raised here and not in the task.
            trio.lowlevel.enable_ki_protection(stepping)
        at = range(number, number + times)
        ctrl_c = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
        _, awaits = await stepping(whole_life(seen), at, ctrl_c)
        kept.append(awaits)

    awaits = Awaits()
    while awaits.are_left():
        seen: list[aio.Process] = []
        kept.clear()
        interrupt = None
        try:
            run_in(loop_name, main, awaits.number, seen)
        except KeyboardInterrupt as error:
            interrupt = error
        expect_end(seen)
        awaits.tried(reached=interrupt is not None or kept[0] >= awaits.number)


@pytest.mark.filterwarnings("error")
def test_ctrl_c_at_each_line_in_trio() -> None:
    """trio raises it between any two bytecodes of the main thread, where nothing protects them."""
    ours = os.path.dirname(aio.__file__)
    left = 0

    def trace(frame: types.FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(ours):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    async def main(seen: list[aio.Process]) -> None:
        opening = aio.open_process(["sleep", "1000"], kill=QUICK)
        sys.settrace(trace)
        try:
            async with opening as proc:
                seen.append(proc)
        finally:
            sys.settrace(None)

    number, most = 0, 400
    while left <= 0:
        number += 1
        assert number < most
        left = number
        seen: list[aio.Process] = []
        with contextlib.suppress(KeyboardInterrupt):
            run_in(TRIO, main, seen)
        expect_end(seen)
    assert number > 30


def test_a_second_ctrl_c_has_it_end_at_once(loop_name: str) -> None:
    """And not before it is proved: what is left when the supervisor exits was never ended."""
    code = """if True:
        import os, signal, sys
        from integration.event_loops import run_in
        from integration.test_aio import DEAF, PATIENT, first_line
        from proctree import TreeStopping, aio, subscribe

        async def main():
            async with aio.open_process(DEAF, kill=PATIENT) as proc:
                await first_line(proc)
                os.write(1, b"%d\\n" % proc.pid)
                await proc.wait()

        with subscribe(lambda event: os.write(1, b"stopping\\n"), TreeStopping):
            try:
                run_in(sys.argv[1], main)
            except KeyboardInterrupt:
                os.write(1, b"interrupted\\n")
    """
    supervisor = start_supervisor(code, loop_name, cwd=Path(__file__).parent.parent)
    with supervisor:
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.stdout.readline() == "stopping\n"
        assert is_alive(pid)
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.stdout.readline() == "interrupted\n"
        assert not is_alive(pid)
        supervisor.stdin.close()
        assert supervisor.wait(DEADLINE) == 0


# -- Exceptions and time limits


def test_an_exception_ends_the_tree_and_goes_on(run: Run) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with aio.open_process(DEAF, kill=QUICK) as proc:
                await first_line(proc)
                raise ZeroDivisionError
        outcome = proc.outcome
        assert outcome is not None
        assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM, signal.SIGKILL]
        assert not living()

    run(main)


def test_a_cancelled_scope_waits_for_what_ignores_sigterm(run: Run) -> None:
    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with aio.open_process(DEAF, kill=QUICK) as proc:
                await first_line(proc)
                scope.cancel()
                await proc.wait()
        outcome = proc.outcome
        assert outcome is not None
        assert (outcome.reason, outcome.detail) == (Reason.KILLED, "cancelled")
        first, second = outcome.stages
        assert (first.signal, second.signal) == (signal.SIGTERM, signal.SIGKILL)
        assert second.at - first.at >= 0.3
        assert not living()

    run(main)


@pytest.mark.parametrize("loop_name", [ASYNCIO, UVLOOP], indirect=True)
def test_the_time_limits_of_asyncio(run: Run) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await aio.run(["sleep", "1000"])
        assert not living()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(aio.run(["sleep", "1000"]), 0.1)
        assert not living()
        with pytest.raises(TimeoutError):
            # Comes while the end is waited for: the first interruption changes nothing.
            async with asyncio.timeout(0.1):
                async with aio.open_process(DEAF, kill=QUICK) as proc:
                    await first_line(proc)
        assert not living()
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run(main)


def test_move_on_after_and_the_tree_goes_on(run: Run) -> None:
    """To cancel the wait does nothing to the tree; to cancel `run` ends it."""

    async def main() -> None:
        async with aio.open_process(["cat"], stdin=proctree.DEVNULL, stdout=None) as proc:
            await proc.wait()
        async with aio.open_process(["sleep", "1000"], kill=QUICK) as proc:
            with anyio.move_on_after(0.05) as scope:
                await proc.wait()
            assert scope.cancelled_caught
            assert proc.pid is not None
            assert is_alive(proc.pid)
            assert proc.state is proctree.State.RUNNING
        with anyio.move_on_after(0.05) as scope:
            await aio.run(["sleep", "1000"])
        assert scope.cancelled_caught
        assert not living()

    run(main)


def test_what_has_left_its_session_is_gone_with_the_block(run: Run, lifeline: Lifeline) -> None:
    script = "setsid sh -c 'setsid sleep 1000 & echo away; wait' & wait"

    async def main() -> None:
        options: dict[str, Any] = {"pass_fds": [lifeline.writer], "kill": QUICK}
        async with aio.open_process(["sh", "-c", script], **options) as proc:
            lifeline.handed_over()
            await first_line(proc)
            assert not lifeline.cut(0)
        assert lifeline.cut(0)
        assert not living()

    run(main)


# -- Output


def test_lines_of_torn_characters(run: Run) -> None:
    """A byte at a time, so that every character comes in pieces."""
    text = "grün\n日本語\n\n\N{GRINNING FACE}"
    script = "import os, sys\nfor b in sys.stdin.buffer.read(): os.write(1, bytes([b]))"

    async def main() -> None:
        options: dict[str, Any] = {"stdin": text.encode()}
        async with aio.open_process([sys.executable, "-S", "-c", script], **options) as proc:
            assert [line async for line in proc.lines()] == text.split("\n")
        options = {"stdin": "aé\nbcdefg\n".encode("latin-1")}
        async with aio.open_process(["cat"], **options) as proc:
            lines = proc.lines(encoding="latin-1", max_length=4)
            assert [line async for line in lines] == ["aé", "bcde", "fg"]
            for wrong in ({"encoding": "utf-16"}, {"max_length": 0}):
                with pytest.raises(ValueError):
                    proc.lines(**wrong)  # type: ignore[arg-type]

    run(main)


def test_both_streams_apart_and_together(run: Run) -> None:
    script = ["sh", "-c", "echo out; echo err >&2"]

    async def main() -> None:
        async with aio.open_process(script, stderr=aio.PIPE) as proc:
            err = [line async for line in proc.lines("stderr")]
            out = [line async for line in proc.lines()]
        assert (out, err) == (["out"], ["err"])
        async with aio.open_process(script, stderr=proctree.STDOUT) as proc:
            assert [line async for line in proc.lines()] == ["out", "err"]
            with pytest.raises(ValueError, match=r"stderr=aio\.PIPE"):
                proc.lines("stderr")
            with pytest.raises(ValueError, match="stream"):
                proc.chunks("stdin")

    run(main)


def test_everything_is_there_after_the_end(run: Run) -> None:
    """More than waits for a reader while the tree lives: its end does not wait for one."""
    count = 100_000

    async def main() -> None:
        async with aio.open_process(["seq", str(count)]) as proc:
            assert (await proc.wait()).ok
        lines = [line async for line in proc.lines()]
        assert lines == [str(n) for n in range(1, count + 1)]
        assert [line async for line in proc.lines()] == []

    run(main)


def test_who_leaves_early_loses_nothing(run: Run) -> None:
    """Lines, then bytes, then lines again, with lines that are cut for their length, too."""
    count = 30_000
    text = "".join(f"{n}{'x' * (n % 13)}\n" for n in range(count)).encode()

    async def main() -> None:
        got = b""
        async with aio.open_process(["cat"], stdin=text) as proc:
            turn = 0
            while True:
                turn += 1
                before = len(got)
                if turn % 3:
                    number = 0
                    async for line in proc.lines(max_length=10):
                        # Which of the pieces of a line ends it only the text can say.
                        got += line.encode()
                        if text[len(got) : len(got) + 1] == b"\n":
                            got += b"\n"
                        number += 1
                        if number >= 2 ** (turn % 12):
                            break
                else:
                    async for chunk in proc.chunks():
                        got += chunk
                        break
                if len(got) == before:
                    break
        assert got == text

    run(main)


def test_a_cancelled_reader_loses_nothing(run: Run) -> None:
    """Interrupted at its nth await, over and over, it goes on where it was."""
    text = "".join(f"{n}\n" for n in range(50_000)).encode()
    wanted = text.decode().splitlines()

    async def main() -> None:
        got: list[str] = []

        async def read() -> None:
            async for line in proc.lines():
                got.append(line)

        async with aio.open_process(["cat"], stdin=text) as proc:
            caught = True
            number = 0
            while caught:
                number += 1
                with anyio.CancelScope() as scope:
                    await interrupted(read(), {number}, scope.cancel)
                caught = scope.cancelled_caught
                # And before it has even taken what the last one has left.
                with anyio.CancelScope() as scope:
                    await interrupted(read(), {1}, scope.cancel)
        assert got == wanted

    run(main)


def test_one_reader_at_a_time(run: Run) -> None:
    async def main() -> None:
        async with aio.open_process(["sh", "-c", "echo 1; echo 2; echo 3; cat"], stdin=b"") as proc:
            first = proc.lines()
            assert await anext(first) == "1"
            with pytest.raises(RuntimeError, match="stdout is being read already"):
                await anext(proc.chunks())
            assert await anext(first) == "2"
            await first.aclose()
            assert [line async for line in proc.lines()] == ["3"]
            with pytest.raises(StopAsyncIteration):
                await anext(first)

    run(main)


def test_one_task_at_a_time(run: Run) -> None:
    async def main() -> None:
        async with aio.open_process(["sleep", "1000"], kill=QUICK) as proc:
            lines = proc.lines()
            errors = []

            async def wait_for_line() -> None:
                try:
                    async for _ in lines:
                        raise AssertionError("no line")
                except RuntimeError as error:
                    errors.append(error)
                    proc.kill()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait_for_line)
                tasks.start_soon(wait_for_line)
            assert len(errors) == 1
            assert "two tasks" in str(errors[0])

    run(main)


def writer_blocked(pid: int | None) -> bool:
    try:
        return "pipe" in Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_a_flood_waits_for_its_reader(run: Run) -> None:
    """Nothing piles up: the writer waits in its pipe. And nothing is lost."""
    total = 64 * MIB
    flood = ["sh", "-c", f"exec head -c {total} /dev/zero"]

    async def main() -> None:
        async with aio.open_process(flood) as proc:
            sink = proc._sources["stdout"].sink
            chunks = proc.chunks()
            got = len(await anext(chunks))
            before = resident()
            await anyio.to_thread.run_sync(
                eventually, lambda: writer_blocked(proc.pid), "the writer waits"
            )
            assert sink.waiting <= PENDING_MAX + BLOCK
            most = 0
            async for chunk in chunks:
                got += len(chunk)
                most = max(most, sink.waiting)
                assert len(chunk) <= 2 * BLOCK
            assert got == total
            assert most <= PENDING_MAX + BLOCK + 3 * MIB
            assert resident() - before < 32 * MIB
            assert (await proc.wait()).ok

    run(main)


def test_nobody_reads_a_flood(run: Run) -> None:
    """The block is left, and that is the end: no time for the stream, and no thread that waits."""

    async def main() -> None:
        # A drain that is waited for would be noticed.
        options: dict[str, Any] = {"kill": QUICK, "drain_timeout": 1000.0}
        async with aio.open_process(["cat", "/dev/zero"], **options) as proc:
            await anyio.to_thread.run_sync(
                eventually, lambda: writer_blocked(proc.pid), "the writer waits"
            )
        assert not living()
        got = 0
        async for chunk in proc.chunks():
            got += len(chunk)
        assert 0 < got <= PENDING_MAX + BLOCK + 2 * MIB
        async with aio.open_process(["cat", "/dev/zero"], **options) as proc:
            async for _ in proc.chunks():
                break
        async with aio.open_process(["yes"], **options) as proc:
            async for _ in proc.lines():
                break
            proc.kill()
            await proc.wait()
            assert proc.outcome is not None

    run(main)


def test_a_reader_in_another_task_reaches_the_end(run: Run) -> None:
    """It waits while the block is left."""

    async def main() -> None:
        ended = []

        async def read(lines: aio.Process) -> None:
            ended.append([line async for line in lines.lines()])

        async with anyio.create_task_group() as tasks:
            async with aio.open_process(DEAF, kill=QUICK) as proc:
                tasks.start_soon(read, proc)
                await anyio.lowlevel.checkpoint()
        assert ended == [["ready"]] or ended == [[]]

    run(main)


def test_a_stream_that_stays_open_costs_the_drain_time(run: Run, tmp_path: Path) -> None:
    """The tree has let go of a process that holds it: what comes later is not read."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = f"echo said; cat {fifo} & exit 0"

    async def main() -> None:
        options: dict[str, Any] = {"leftovers": "leave", "containment": "warden"}
        async with aio.open_process(["sh", "-c", script], drain_timeout=0.1, **options) as proc:
            assert [line async for line in proc.lines()] == ["said"]
            outcome = await proc.wait()
        (left,) = outcome.leftovers
        assert is_alive(left.pid)
        with open(fifo, "w"):
            pass
        await anyio.to_thread.run_sync(
            eventually, lambda: not is_alive(left.pid), "it has read everything"
        )

    run(main)


# -- Groups


def test_a_group_waits_for_all(run: Run) -> None:
    async def main() -> None:
        async with aio.TreeGroup(check=True) as group:
            first = await group.start(["sh", "-c", "read x; exit 3"], stdin=b"\n", check=False)
            second = await group.start(["true"])
        assert first.outcome is not None
        assert first.outcome.returncode == 3
        assert second.outcome is not None
        assert second.outcome.ok

    run(main)


def test_one_that_fails_ends_the_rest(run: Run) -> None:
    async def main() -> None:
        with pytest.raises(ExceptionGroup) as group_error:
            async with aio.TreeGroup() as group:
                others = [await group.start(DEAF, kill=QUICK) for _ in range(2)]
                for other in others:
                    await first_line(other)
                await group.start(["sh", "-c", "exit 4"], check=True)
        (failed,) = group_error.value.exceptions
        assert isinstance(failed, proctree.TreeFailed)
        assert failed.outcome.returncode == 4
        for other in others:
            assert other.outcome is not None
            assert other.outcome.detail == "cancelled"
        assert not living()

    run(main)


def test_all_end_at_the_same_time(run: Run) -> None:
    """Every one is told before the first one has ended; nested ones, too."""

    async def main() -> None:
        heard: list[Any] = []
        kill = KillPolicy((Stage(signal.SIGTERM, 0.5), Stage(signal.SIGKILL, 10.0)))
        with proctree.subscribe(heard.append, TreeStopping, TreeEnded):
            with pytest.raises(ExceptionGroup) as group_error:
                async with aio.TreeGroup() as outer:
                    await first_line(await outer.start(DEAF, kill=kill))
                    async with aio.TreeGroup() as inner:
                        for _ in range(2):
                            await first_line(await inner.start(DEAF, kill=kill))
                        raise ZeroDivisionError
            assert group_error.group_contains(ZeroDivisionError)
            await anyio.to_thread.run_sync(eventually, lambda: len(heard) == 6, "all is told")
        # The inner group has ended when the outer one is told.
        kinds = [type(event) for event in heard]
        assert kinds == [TreeStopping] * 2 + [TreeEnded] * 2 + [TreeStopping, TreeEnded]
        assert not living()

    run(main)


def test_a_group_is_cancelled(run: Run) -> None:
    async def main() -> None:
        with anyio.move_on_after(DEADLINE) as scope:
            async with aio.TreeGroup() as group:
                procs = [await group.start(DEAF, kill=QUICK) for _ in range(3)]
                for proc in procs:
                    await first_line(proc)
                scope.cancel()
        assert all(proc.outcome is not None for proc in procs)
        assert not living()

    run(main)


def test_a_group_is_cancelled_at_each_await(run: Run) -> None:
    quick = KillPolicy((Stage(signal.SIGTERM, 0.02), Stage(signal.SIGKILL, 10.0)))

    async def life(seen: list[aio.Process]) -> None:
        async with aio.TreeGroup() as group:
            for _ in range(2):
                seen.append(await group.start(["sleep", "1000"], kill=quick))
            for proc in seen:
                proc.kill()

    async def cancelled_at(number: int) -> bool:
        seen: list[aio.Process] = []
        with anyio.CancelScope() as scope:
            _, awaits = await interrupted(life(seen), {number}, scope.cancel)
        expect_end(seen)
        return scope.cancelled_caught or awaits >= number

    async def main() -> None:
        awaits = Awaits(fewest=3)
        while awaits.are_left():
            awaits.tried(reached=await cancelled_at(awaits.number))

    run(main)


def test_one_that_cannot_start_leaves_the_others_alone(run: Run) -> None:
    async def main() -> None:
        async with aio.TreeGroup() as group:
            proc = await group.start(["cat"], stdin=b"x")
            with pytest.raises(FileNotFoundError):
                await group.start(["/nonexistent/program"])
        assert proc.outcome is not None
        assert proc.outcome.ok

    run(main)


# -- Events


def test_events(run: Run) -> None:
    async def main() -> None:
        kinds = (TreeStarting, TreeStarted, TreeEnded)
        async with aio.events(*kinds) as events:
            outcome = await aio.run(["true"])
            got = [await anext(events) for _ in kinds]
            assert tuple(type(event) for event in got) == kinds
            assert {event.tree_id for event in got} == {outcome.tree_id}
            with anyio.move_on_after(0) as scope:
                await anext(events)
            assert scope.cancelled_caught
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(aio.run, ["true"])
                async for event in events:
                    if isinstance(event, TreeEnded):
                        break
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        with pytest.raises(TypeError, match="kinds"):
            aio.events(int)

    run(main)


# -- Event loops that end too early, others, and threads


async def hold(started: list[aio.Process]) -> None:
    async with aio.open_process(DEAF, kill=QUICK) as proc:
        started.append(proc)
        async for _ in proc.lines():
            pass


def step_until_started(loop: asyncio.AbstractEventLoop, started: list[aio.Process]) -> Any:
    task = loop.create_task(hold(started))

    async def until() -> None:
        while not started:
            await asyncio.sleep(0)

    loop.run_until_complete(until())
    return task


def new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name == ASYNCIO:
        return asyncio.new_event_loop()
    return pytest.importorskip("uvloop").new_event_loop()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [ASYNCIO, UVLOOP])
@pytest.mark.filterwarnings("error")
def test_a_loop_is_closed_and_its_task_thrown_away(name: str) -> None:
    loop = new_loop(name)
    started: list[aio.Process] = []
    task = step_until_started(loop, started)
    loop.close()
    del task
    gc.collect()
    (proc,) = started
    outcome = proc._handle.wait(DEADLINE)
    assert outcome is not None
    # Whichever is noticed first: that the tree has started may be told when the loop is closed.
    assert outcome.detail in ("its task was thrown away", "its event loop has ended")
    assert not living()


@pytest.mark.parametrize("name", [ASYNCIO, UVLOOP])
@pytest.mark.filterwarnings("error")
def test_a_loop_is_closed_and_its_tree_has_something_to_say(name: str) -> None:
    """The task is kept, so that nothing but the refused wake-up tells."""
    loop = new_loop(name)
    started: list[aio.Process] = []

    reader, writer = os.pipe()
    options: dict[str, Any] = {"pass_fds": [reader], "kill": QUICK}
    script = f"echo ready; read x </dev/fd/{reader}; echo more; exec sleep 1000"

    async def listen() -> None:
        async with aio.open_process(["sh", "-c", script], **options) as proc:
            started.append(proc)
            async for _ in proc.lines():
                waits.append(True)

    waits: list[bool] = []
    task = loop.create_task(listen())

    async def until() -> None:
        while not waits:
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.run_until_complete(until())
    os.close(reader)
    loop.close()
    (proc,) = started
    assert proc.state is proctree.State.RUNNING
    os.write(writer, b"\n")
    outcome = proc._handle.wait(DEADLINE)
    os.close(writer)
    assert outcome is not None
    assert outcome.detail == "its event loop has ended"
    assert not living()
    del task


@pytest.mark.parametrize("name", [ASYNCIO, UVLOOP])
def test_an_exit_stack_that_is_never_closed(name: str) -> None:
    """Somebody entered by hand and has forgotten it."""
    handles = []

    async def forget() -> None:
        opening = aio.open_process(["sleep", "1000"], kill=QUICK)
        proc = await opening.__aenter__()
        handles.append(proc._handle)

    loop = new_loop(name)
    loop.run_until_complete(forget())
    loop.close()
    gc.collect()
    assert handles[0].wait(DEADLINE) is not None
    assert not living()


def test_a_program_ends_without_closing_its_loop() -> None:
    """At the latest it ends with the program, in every backend."""
    code = """if True:
        import asyncio, os, sys
        from proctree import aio

        async def main():
            opening = aio.open_process(["sleep", "1000"], containment=sys.argv[1])
            kept.append((opening, await opening.__aenter__()))
            os.write(1, b"%d\\n" % kept[0][1].pid)

        kept = []
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
    """
    for containment in ("warden", "group"):
        supervisor = start_supervisor(code, containment)
        out, _ = supervisor.communicate(timeout=DEADLINE)
        eventually(lambda out=out: not is_alive(int(out)), "the tree has ended")  # type: ignore[misc]
        assert supervisor.returncode == 0


def test_an_async_generator_is_closed(run: Run) -> None:
    """GeneratorExit with an event loop that runs: the end is waited for."""

    async def lines_of() -> Any:
        async with aio.open_process(DEAF, kill=QUICK) as proc:
            procs.append(proc)
            async for line in proc.lines():
                yield line

    procs: list[aio.Process] = []

    async def main() -> None:
        async with contextlib.aclosing(lines_of()) as lines:
            assert await anext(lines) == "ready"
        expect_end(procs)

    run(main)


def test_event_loops_in_threads(loop_name: str) -> None:
    """Several at once, none of them in the main thread."""
    results: list[object] = []

    async def main(number: int) -> None:
        for turn in range(5):
            async with aio.open_process(["sh", "-c", f"echo {number} {turn}; exit {turn}"]) as proc:
                line = await first_line(proc)
                outcome = await proc.wait()
            results.append((line, outcome.returncode))

    def in_thread(number: int) -> None:
        try:
            run_in(loop_name, main, number)
        except BaseException as error:
            results.append(error)

    if loop_name == UVLOOP:
        pytest.importorskip("uvloop")
    threads = [threading.Thread(target=in_thread, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(results) == [(f"{n} {t}", t) for n in range(4) for t in range(5)]  # type: ignore[type-var]


def test_another_event_loop_waits(run: Run) -> None:
    """And its end is nothing to the tree."""

    async def wait_a_little(proc: aio.Process) -> None:
        with anyio.move_on_after(0.02):
            await proc.wait()

    async def main() -> None:
        async with aio.open_process(["sleep", "1000"], kill=QUICK) as proc:
            await anyio.to_thread.run_sync(run_in, TRIO, wait_a_little, proc)
            assert proc.state is proctree.State.RUNNING
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, run_in, ASYNCIO, proc.wait)
                await anyio.lowlevel.checkpoint()
                proc.kill()
            assert proc.outcome is not None

    run(main)


def test_from_threads(loop_name: str) -> None:
    async def main() -> None:
        outcome = await anyio.to_thread.run_sync(
            lambda: anyio.from_thread.run(aio.run, ["sh", "-c", "exit 6"])
        )
        assert outcome.returncode == 6

    run_in(loop_name, main)
    if loop_name == UVLOOP:
        return
    with anyio.from_thread.start_blocking_portal(loop_name) as portal:
        with portal.wrap_async_context_manager(aio.open_process(DEAF, kill=QUICK)) as proc:
            assert portal.call(first_line, proc) == "ready"
    expect_end([proc])


def test_hundreds_at_once(run: Run) -> None:
    async def main() -> None:
        outcomes: list[int | None] = []

        async def one(number: int) -> None:
            outcome = await aio.run(["sh", "-c", f"exit {number}"])
            outcomes.append(outcome.returncode)

        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(one, number)
        assert sorted(outcomes) == list(range(100))  # type: ignore[type-var]

    run(main)


def test_without_anyio_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['anyio'] = None; import proctree; import proctree.aio"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: proctree.aio needs anyio" in done.stderr
    assert "proctree-supervisor[aio]" in done.stderr
