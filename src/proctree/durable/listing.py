"""What is recorded, for people."""

from __future__ import annotations

import os
from typing import NamedTuple

from proctree.durable.directory import FileStore
from proctree.durable.store import Attempt, Store


class Listed(NamedTuple):
    """One key.

    Attributes:
        key: the key.
        claimed: whether something of it runs, is about to, or is ending.
        attempts: what is recorded of it, oldest first.
    """

    key: str
    claimed: bool
    attempts: tuple[Attempt, ...]


def list_(store: str | os.PathLike[str] | Store | None = None) -> list[Listed]:
    """All keys of which something is recorded, sorted.

    Args:
        store: as for `start`.

    Raises:
        StoreUnusable: the records cannot be read.
    """
    where = store if isinstance(store, Store) else FileStore(store)
    found = []
    for key in where.keys():  # noqa: SIM118 - it is not a mapping
        claimed = where.claimed(key)
        attempts = tuple(where.attempts(key))
        if attempts or claimed:  # else it was forgotten meanwhile
            found.append(Listed(key, claimed, attempts))
    return found
