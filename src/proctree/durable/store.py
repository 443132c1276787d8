"""What a place for records has to be able to do, whether it is a directory or a database."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import NamedTuple

from proctree.durable.recording import Exit, Request


class Attempt(NamedTuple):
    """One attempt of a key, as it is recorded.

    Attributes:
        number: counted from 1.
        request: what was asked for; None when it is unreadable.
        handle: what `submit` of a job answered; None before that, and for a tree.
        exit: how it ended; None when that is not recorded.
        trouble: why something of it is unreadable, or "".
        place: where its output is: the directory with out.log and err.log, or "".
        cancelled: of a job: somebody wants it to be cancelled (`Store.ask_cancel`).
    """

    number: int
    request: Request | None
    handle: str | None = None
    exit: Exit | None = None
    trouble: str = ""
    place: str = ""
    cancelled: bool = False


def attempt_of(attempts: Iterable[Attempt], tree_id: str) -> Attempt | None:
    """The one that has made this tree. Not by its number: when a key is forgotten, they begin at 1
    again."""
    for attempt in attempts:
        if attempt.request is not None and attempt.request.tree_id == tree_id:
            return attempt
    return None


class Claim(abc.ABC):
    """The right to be the only one who starts, submits and records something for a key. It is given
    back by `release`, and by the end of the process."""

    @abc.abstractmethod
    def attempts(self) -> list[Attempt]:
        """All that are recorded, oldest first. Unreadable ones have been kept aside and reported in
        the log (`durable.unreadable`); they are listed with their trouble."""

    @abc.abstractmethod
    def begin(self, request: Request) -> Attempt:
        """Records the intent, so that it is there after any crash once this has returned.

        Raises:
            StoreUnusable: it could not be recorded.
            LeaseLost: somebody else has taken over.
        """

    @abc.abstractmethod
    def submitted(self, attempt: Attempt, handle: str) -> None:
        """Records what `submit` answered. Raises as `begin`."""

    @abc.abstractmethod
    def finish(self, attempt: Attempt, how: Exit) -> None:
        """Records how it ended. Raises as `begin`."""

    @abc.abstractmethod
    def release(self) -> None:
        """Gives it back. Twice is allowed."""


class Store(abc.ABC):
    """A place for records."""

    @abc.abstractmethod
    def claim(self, key: str) -> Claim | None:
        """Takes the key, or None when somebody else has it at this moment. Does not wait for them.

        Raises:
            StoreUnusable: the store cannot be used.
        """

    @abc.abstractmethod
    def attempts(self, key: str) -> list[Attempt]:
        """What is recorded of a key, oldest first; read without claiming it."""

    @abc.abstractmethod
    def ask_cancel(self, key: str, number: int) -> None:
        """Writes down that an attempt of a job is to be cancelled, for whoever has the key now or
        later: needs no claim, and is allowed twice.

        Raises:
            UnknownKey: there is no such attempt.
            StoreUnusable: it could not be recorded.
        """

    @abc.abstractmethod
    def claimed(self, key: str) -> bool:
        """Whether somebody has the key at this moment."""

    @abc.abstractmethod
    def keys(self) -> list[str]:
        """Of which something is recorded, sorted."""

    @abc.abstractmethod
    def forget(self, key: str) -> None:
        """Removes everything that is recorded of a key.

        Raises:
            UnknownKey: there is nothing.
            StillRunning: somebody has it at this moment.
            StoreUnusable: it could not be removed.
        """
