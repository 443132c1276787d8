"""A process that takes a key and does with it what it is told, line by line."""

from __future__ import annotations

import os
import sys
import time

from proctree.durable.errors import LeaseLost, StoreUnusable
from proctree.durable.recording import Exit, Request
from proctree.durable.sql import SqlClaim, SqlStore
from proctree.durable.store import Attempt


def say(*words: object) -> None:
    os.write(1, (" ".join(str(word) for word in words) + "\n").encode())


def request(key: str, kind: str, tree_id: str) -> Request:
    return Request(key, "target", "fingerprint", tree_id, kind, "boot", 1, "host", os.getpid(), 1)


class Holder:
    def __init__(self, url: str, key: str, lease: float) -> None:
        self.store = SqlStore(url, lease=lease)
        self.key = key
        self.claim: SqlClaim | None = None
        self.attempt: Attempt | None = None

    def do(self, word: str, *args: str) -> object:
        return getattr(self, f"do_{word}")(*args)

    def do_claim(self) -> object:
        self.claim = self.store.claim(self.key)
        if self.claim is None:
            return "none"
        self.claim.when_lost.append(lambda: say("lost"))
        return "claimed"

    def do_contend(self) -> object:
        """Until it is had."""
        while self.do_claim() == "none":
            time.sleep(0.02)
        return "claimed"

    def do_begin(self, kind: str, tree_id: str) -> object:
        assert self.claim is not None
        self.attempt = self.claim.begin(request(self.key, kind, tree_id))
        return f"begun {self.attempt.number}"

    def do_finish(self, status: str) -> object:
        assert self.claim is not None
        assert self.attempt is not None
        self.claim.finish(self.attempt, Exit(int(status) << 8))
        return "finished"

    def do_release(self) -> object:
        assert self.claim is not None
        self.claim.release()
        return "released"

    def do_clock(self) -> object:
        return round(time.clock_gettime(time.CLOCK_BOOTTIME))


def main() -> None:
    url, key, lease = sys.argv[1:]
    holder = Holder(url, key, float(lease))
    say("ready")
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            say(holder.do(*line.split()))
        except LeaseLost:
            say("LeaseLost")
        except StoreUnusable as error:
            say("StoreUnusable", error)


if __name__ == "__main__":
    main()
