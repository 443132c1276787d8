"""A supervisor of a job that is killed at a certain step: see DEATHS."""

from __future__ import annotations

import os
import signal
import sys

from integration.job_cluster import Client
from proctree.durable.directory import FileStore
from proctree.durable.jobs import Job, Polled, run_job
from proctree.durable.recording import Exit, Request
from proctree.durable.sql import SqlStore
from proctree.durable.store import Attempt, Claim, Store

DEATHS = [
    "before begin",
    "before submit",  # the intent is recorded
    "during submit",  # it took effect, and the answer has not come: killed by the test
    "after submit",  # the handle is known and not recorded
    "before poll",  # it is recorded
    "after poll",
    "before finish",
    "after finish",
    "never",
]


def open_store(url: str, lease: float) -> Store:
    return FileStore(url) if url.startswith("/") else SqlStore(url, lease=lease)


class Mortal(Claim):
    """A claim whose holder dies at a step."""

    def __init__(self, claim: Claim, death: str) -> None:
        self.claim, self.death = claim, death

    def _at(self, step: str) -> None:
        if step == self.death:
            os.kill(os.getpid(), signal.SIGKILL)

    def attempts(self) -> list[Attempt]:
        return self.claim.attempts()

    def begin(self, request: Request) -> Attempt:
        self._at("before begin")
        attempt = self.claim.begin(request)
        self._at("before submit")
        return attempt

    def submitted(self, attempt: Attempt, handle: str) -> None:
        self._at("after submit")
        self.claim.submitted(attempt, handle)
        self._at("before poll")

    def finish(self, attempt: Attempt, how: Exit) -> None:
        self._at("before finish")
        self.claim.finish(attempt, how)
        self._at("after finish")

    def release(self) -> None:
        self.claim.release()


def mortal(store: Store, death: str) -> Store:
    """The store, whose claims are mortal."""
    claim = store.claim

    def claim_mortal(key: str) -> Claim | None:
        claimed = claim(key)
        return None if claimed is None else Mortal(claimed, death)

    store.claim = claim_mortal  # type: ignore[method-assign]
    return store


def main() -> None:
    url, key, port, tenant, death = sys.argv[1:]
    client = Client(int(port), tenant)
    client.hold = death == "during submit"

    def poll(handle: str) -> Polled:
        polled = client.poll(handle)
        if death == "after poll":
            os.kill(os.getpid(), signal.SIGKILL)
        return polled

    job = Job(client.submit, client.find, poll, client.cancel, name="remote", every=0.05)
    store = mortal(open_store(url, lease=600.0), death)
    os.write(1, b"ready\n")
    sys.stdin.readline()
    outcome = run_job(key, job, store=store)
    os.write(1, f"{outcome.returncode} {outcome.reason} {outcome.tree_id}\n".encode())


if __name__ == "__main__":
    main()
