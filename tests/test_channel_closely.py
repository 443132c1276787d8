"""Looking without a sleep: as long as it pays, and never alone in a loop."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable

import pytest
from tests.channel_ends import DEADLINE, Ends

from proctree.channel import Channel, Server, closely
from proctree.channel.closely import MOST_FAILURES, Closely


class Asked:
    def __init__(self) -> None:
        self.answer: object = None


class Counting(selectors.EpollSelector):
    """Counts how often a loop looks at timers and descriptors, and so whose turn it is."""

    looks = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.looks += 1
        return super().select(timeout)


class Looks:
    """Counts how often it is looked for something that comes with the look of a number."""

    def __init__(self, comes: Callable[[], object]) -> None:
        self.count = 0
        self._comes = comes
        self.closely = Closely(self._advance)
        self.asked = Asked()

    def _advance(self) -> None:
        self.count += 1
        self.asked.answer = self._comes()

    def look(self) -> tuple[bool, bool]:
        """Whether it was looked for, and whether it was found."""
        before, self.asked.answer = self.count, None
        found = self.closely.look(self.asked)
        return self.count > before, found


def test_what_comes_is_found_at_once() -> None:
    looks = Looks(lambda: "answer")
    assert [looks.look() for _ in range(3)] == [(True, True)] * 3
    assert looks.count == 3


def test_what_does_not_pay_is_done_ever_less_often() -> None:
    looks = Looks(lambda: None)
    looked = [number for number in range(2100) if looks.look()[0]]
    assert looked[:5] == [0, 3, 8, 17, 34]
    gaps = [after - before - 1 for before, after in itertools.pairwise(looked)]
    assert gaps == [1 << number for number in range(1, len(gaps) + 1)]
    assert gaps[-1] <= 1 << MOST_FAILURES


def test_when_it_pays_again_it_is_done_each_time_again() -> None:
    answers: list[object] = [None]
    looks = Looks(lambda: answers[0])
    for _ in range(9):  # at the number 8 it is looked for the third time
        looks.look()
    answers[0] = "answer"
    looked = [looks.look() for _ in range(12)]
    assert looked == [(False, False)] * 8 + [(True, True)] * 4


def test_a_task_that_is_answered_at_once_is_not_alone_in_its_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server()
    server.handle("Echo", lambda request, _caller: request["key"], inline=True)
    monkeypatch.setattr(closely, "SECONDS", DEADLINE)  # so that it always comes meanwhile
    requests = 300
    selector = Counting()

    async def ask() -> None:
        with Channel.connect() as channel:
            for number in range(requests):
                body = {"type": "Echo", "key": f"k{number}"}
                assert await channel.arequest(body, timeout=DEADLINE) == f"k{number}"

    with Ends(server) as ends:
        inode = ends.variable.partition(b":")[2].decode()
        monkeypatch.setenv("PROCTREE_CHANNEL", f"{ends.door.fileno()}:{inode}")
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            runner.run(ask())
    assert selector.looks >= requests
