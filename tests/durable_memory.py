"""A store that is gone with its process: what is decided about a key does not depend on where it is
recorded."""

from __future__ import annotations

import threading

from proctree.durable.errors import LeaseLost, StillRunning, StoreUnusable, UnknownKey
from proctree.durable.recording import Exit, Request
from proctree.durable.store import Attempt, Claim, Store


class MemoryStore(Store):
    """Attributes:
    troubles: how many of the next accesses fail.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.recorded: dict[str, list[Attempt]] = {}
        self.holder: dict[str, MemoryClaim] = {}
        self.troubles = 0

    def access(self) -> None:
        with self.lock:
            if self.troubles:
                self.troubles -= 1
                raise StoreUnusable("the store is away")

    def claim(self, key: str) -> MemoryClaim | None:
        self.access()
        with self.lock:
            if key in self.holder:
                return None
            self.holder[key] = MemoryClaim(self, key)
            return self.holder[key]

    def take_away(self, key: str) -> None:
        """As if the lease had run out."""
        with self.lock:
            del self.holder[key]

    def attempts(self, key: str) -> list[Attempt]:
        self.access()
        with self.lock:
            return list(self.recorded.get(key, []))

    def ask_cancel(self, key: str, number: int) -> None:
        self.access()
        with self.lock:
            if not 0 < number <= len(self.recorded.get(key, [])):
                raise UnknownKey(key)
            attempt = self.recorded[key][number - 1]
            self.recorded[key][number - 1] = attempt._replace(cancelled=True)

    def claimed(self, key: str) -> bool:
        with self.lock:
            return key in self.holder

    def keys(self) -> list[str]:
        with self.lock:
            return sorted(self.recorded)

    def forget(self, key: str) -> None:
        with self.lock:
            if key in self.holder:
                raise StillRunning(key)
            if self.recorded.pop(key, None) is None:
                raise UnknownKey(key)


class MemoryClaim(Claim):
    def __init__(self, store: MemoryStore, key: str) -> None:
        self.store, self.key = store, key

    def _check(self) -> None:
        self.store.access()
        if self.store.holder.get(self.key) is not self:
            raise LeaseLost(self.key)

    def attempts(self) -> list[Attempt]:
        with self.store.lock:
            self._check()
            return self.store.attempts(self.key)

    def begin(self, request: Request) -> Attempt:
        with self.store.lock:
            self._check()
            attempts = self.store.recorded.setdefault(self.key, [])
            attempts.append(Attempt(len(attempts) + 1, request))
            return attempts[-1]

    def submitted(self, attempt: Attempt, handle: str) -> None:
        self._change(attempt, handle=handle)

    def finish(self, attempt: Attempt, how: Exit) -> None:
        self._change(attempt, exit=how)

    def _change(self, attempt: Attempt, **fields: object) -> None:
        with self.store.lock:
            self._check()
            attempts = self.store.recorded[self.key]
            attempts[attempt.number - 1] = attempts[attempt.number - 1]._replace(**fields)  # type: ignore[arg-type]

    def release(self) -> None:
        with self.store.lock:
            if self.store.holder.get(self.key) is self:
                del self.store.holder[self.key]
