"""Supervisors in event loops."""

from __future__ import annotations

import asyncio
import gc
import signal
from typing import Any

import anyio
import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, eventually
from integration.event_loops import NAMES, interrupted, run_in, uvloop_is_set_up  # noqa: F401
from proctree import aio
from proctree.supervisor import (
    Backoff,
    ChildSpec,
    IntensityExceeded,
    Notified,
    OutputLine,
    StartFailed,
    Supervisor,
)

SLEEP = ["sleep", "1000"]


def sleeper(name: str, **options: Any) -> ChildSpec:
    return ChildSpec(name, SLEEP, **options)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_children_live_as_long_as_the_block(name: str) -> None:
    async def main() -> None:
        supervisor = Supervisor([sleeper("a")], auto_shutdown="never")
        async with aio.supervise(supervisor) as running:
            await running.add(sleeper("b"))
            await running.remove("a")
            (child,) = await running.children()
            assert (child.name, child.phase) == ("b", "up")
            with pytest.raises(proctree.ProctreeError, match="was started before"):
                async with aio.supervise(supervisor):
                    pass
        assert supervisor.wait(0)

    run_in(name, main)


def test_it_ends_by_itself(name: str) -> None:
    async def main() -> None:
        job = ChildSpec("job", ["true"], restart="never")
        async with aio.supervise(Supervisor([job])) as running:
            await running.wait()

    run_in(name, main)


def test_it_gives_up(name: str) -> None:
    async def main(waits: bool) -> None:
        bad = ChildSpec("bad", ["false"], backoff=Backoff(base=0.0))
        with pytest.raises(IntensityExceeded):
            async with aio.supervise(Supervisor([bad], restarts=1)) as running:
                if waits:
                    await running.wait()
                else:
                    await anyio.to_thread.run_sync(running.supervisor._running.closed.wait)

    run_in(name, main, True)
    run_in(name, main, False)


def test_it_cannot_start(name: str) -> None:
    async def main() -> None:
        with pytest.raises(StartFailed, match="nonexistent"):
            async with aio.supervise(Supervisor([sleeper("a"), ChildSpec("b", ["/nonexistent"])])):
                raise AssertionError("it has not begun")

    run_in(name, main)


def test_a_time_limit_while_it_starts(name: str) -> None:
    supervisor = Supervisor([sleeper("a"), sleeper("b", ready=Notified())])

    async def main() -> None:
        with anyio.move_on_after(0.2) as scope:
            async with aio.supervise(supervisor):
                raise AssertionError("it has not begun")
        assert scope.cancelled_caught

    run_in(name, main)
    assert supervisor.wait(0)


def test_a_scope_is_cancelled_at_each_await(name: str) -> None:
    """Until it goes through without having been cancelled."""

    async def life(supervisor: Supervisor) -> None:
        async with aio.supervise(supervisor):
            await anyio.lowlevel.checkpoint()

    async def main(at: int) -> bool:
        supervisor = Supervisor([sleeper("a", kill=QUICK)])
        with anyio.CancelScope() as scope:
            await interrupted(life(supervisor), [at], scope.cancel)
        await anyio.to_thread.run_sync(supervisor.stop)
        assert supervisor.wait(DEADLINE)
        return scope.cancelled_caught

    at = 1
    while run_in(name, main, at):
        at += 1
    assert at > 2


def test_an_exception_goes_on(name: str) -> None:
    supervisor = Supervisor([sleeper("a")])

    async def main() -> None:
        with pytest.raises(RuntimeError, match="mine"):
            async with aio.supervise(supervisor):
                raise RuntimeError("mine")

    run_in(name, main)
    assert supervisor.wait(0)


def test_a_second_interruption_has_it_end_at_once() -> None:
    """By a grace of a thousand seconds it would not end in this test."""
    deaf = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"]
    policy = proctree.KillPolicy.after(1000.0)
    spec = ChildSpec("deaf", deaf, kill=policy, ready=OutputLine("deaf"))
    supervisor = Supervisor([spec])

    async def main() -> None:
        started = asyncio.Event()

        async def block() -> None:
            async with aio.supervise(supervisor):
                started.set()
                await asyncio.sleep(1000)

        task = asyncio.create_task(block())
        await started.wait()
        task.cancel()
        while supervisor.children()[0].phase != "stopping":
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    outcome = supervisor.child("deaf").outcome
    assert outcome is not None
    assert outcome.stages[-1].signal is signal.SIGKILL


def test_its_event_loop_is_closed() -> None:
    supervisor = Supervisor([sleeper("a")])

    async def main() -> None:
        async with aio.supervise(supervisor):
            entered.append(True)
            await asyncio.sleep(1000)

    entered: list[bool] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    while not entered:
        loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task
    eventually(lambda: bool(gc.collect()) or supervisor.wait(0.01), "the end of the children")
    assert supervisor.wait(DEADLINE)


def test_something_else() -> None:
    with pytest.raises(TypeError, match=r"supervisor: a proctree\.supervisor\.Supervisor"):
        aio.supervise(sleeper("a"))  # type: ignore[arg-type]
