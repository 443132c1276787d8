"""Jobs on a cluster: whoever is killed when, one submission takes effect."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.conftest import DEADLINE, HERE, eventually
from integration.databases import Server
from integration.job_cluster import Client
from integration.job_supervisor import DEATHS, open_store
from integration.nursery import Forked, Nursery
from proctree.durable.errors import UnknownKey
from proctree.durable.jobs import cancel_job, run_job
from proctree.durable.sql import SqlStore
from proctree.records import Reason

KEY = "nightly"

Submissions = Callable[[], list[str]]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    log = tmp_path_factory.mktemp("cluster") / "submissions"
    process = subprocess.Popen(
        [sys.executable, "-m", "integration.job_cluster", str(log)],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield int(process.stdout.readline()), log
    process.kill()
    process.communicate()


@pytest.fixture
def client(cluster: tuple[int, Path]) -> Client:
    return Client(cluster[0], uuid.uuid4().hex)


@pytest.fixture
def submissions(cluster: tuple[int, Path], client: Client) -> Submissions:
    """The idempotency keys of the submissions that took effect."""

    def read() -> list[str]:
        lines = cluster[1].read_text().splitlines()
        return [line.split()[1] for line in lines if line.startswith(client.tenant)]

    return read


@pytest.fixture(params=["files", "sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, server: Server | None, tmp_path: Path) -> str:
    """A path for a FileStore, or the URL of an empty database."""
    if request.param == "files":
        return str(tmp_path / "records")
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/records"
    if server is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return server.new_url()


Start = Callable[..., Forked]


@pytest.fixture
def start(place: str, client: Client, nursery: Nursery) -> Iterator[Start]:
    """Starts supervisors (job_supervisor.py), that wait for a line before they begin."""
    started: list[Forked] = []

    def one(death: str = "never") -> Forked:
        args = (place, KEY, str(client.port), client.tenant, death)
        started.append(nursery.start("integration.job_supervisor", *args))
        assert started[-1].hear() == "ready"
        return started[-1]

    yield one
    for supervisor in started:
        supervisor.end()


@pytest.mark.parametrize("death", DEATHS)
def test_a_supervisor_is_killed(
    place: str, client: Client, submissions: Submissions, start: Start, death: str
) -> None:
    """At every step; and the next one gets the outcome of the one job."""
    if death in ("before finish", "after finish", "never"):
        client.end()
    first = start(death)
    first.tell()
    if death == "during submit":
        eventually(lambda: len(submissions()) == 1, "it took effect")
        first.kill()
    elif death == "never":
        assert first.hear().startswith("0 exited")
    status = first.wait()
    assert status == (0 if death == "never" else -signal.SIGKILL)
    before = submissions()
    assert len(before) == (0 if death in ("before begin", "before submit") else 1)

    client.end()
    store = open_store(place, lease=600.0)
    outcome = run_job(KEY, client.job(), store=store, patience=DEADLINE)
    assert outcome.ok
    (attempt,) = store.attempts(KEY)
    assert attempt.request is not None
    assert submissions() == [attempt.request.tree_id] == [outcome.tree_id]
    assert before in ([], [outcome.tree_id])


@pytest.mark.timeout(240)
def test_eight_supervisors(client: Client, submissions: Submissions, start: Start) -> None:
    """At once, and one after the other of them killed until two are left."""
    supervisors = [start() for _ in range(8)]
    for supervisor in supervisors:
        supervisor.tell()
    eventually(lambda: len(submissions()) == 1, "one has submitted")
    for supervisor in supervisors[:6]:
        supervisor.kill()
        supervisor.wait()
    client.end()
    heard = [supervisor.hear() for supervisor in supervisors[6:]]
    assert heard == [f"0 exited {submissions()[0]}"] * 2


def test_a_failure_is_tried_again_by_the_next(
    place: str, client: Client, submissions: Submissions, start: Start
) -> None:
    client.end(3)
    first = start()
    first.tell()
    assert first.hear().startswith("3 exited")
    client.end(0)
    assert run_job(KEY, client.job(), store=open_store(place, 600.0)).ok
    assert len(set(submissions())) == 2


def test_cancelled_from_another_process(
    place: str, client: Client, submissions: Submissions, start: Start
) -> None:
    supervisor = start()
    supervisor.tell()
    store = open_store(place, 600.0)
    eventually(lambda: bool(store.attempts(KEY)), "it is begun")
    with pytest.raises(UnknownKey, match="no attempt 2"):
        store.ask_cancel(KEY, 2)
    outcome = cancel_job(KEY, client.job(), store=store, timeout=DEADLINE)
    assert outcome.reason is Reason.KILLED
    assert [attempt.cancelled for attempt in store.attempts(KEY)] == [True]
    status = "-15" if submissions() else "None"
    assert supervisor.hear() == f"{status} killed {outcome.tree_id}"
    assert len(submissions()) <= 1


def test_a_supervisor_that_is_stopped_is_replaced(
    tmp_path: Path, client: Client, submissions: Submissions
) -> None:
    """For longer than its lease, while it polls: it gets the outcome that the other one has
    recorded, and records nothing itself."""
    url = f"sqlite:///{tmp_path}/records"
    reached, released = threading.Event(), threading.Event()
    late = SqlStore(url, lease=1.0)

    def poll(handle: str) -> int:
        reached.set()
        assert released.wait(DEADLINE)
        return 9

    outcomes = []
    slow = Client(client.port, client.tenant)
    slow.poll = poll  # type: ignore[method-assign]

    def supervise() -> None:
        outcomes.append(run_job(KEY, slow.job(), store=late))

    # Its lease is taken from it, as it would be while its process is stopped.
    thread = threading.Thread(target=supervise)
    thread.start()
    assert reached.wait(DEADLINE)
    taken = SqlStore(url).claim(KEY, dead=lambda: True)
    assert taken is not None
    taken.release()
    client.end(0)
    outcome = run_job(KEY, client.job(), store=SqlStore(url))
    released.set()
    thread.join(DEADLINE)
    assert outcomes == [outcome]
    assert outcome.ok
    assert len(submissions()) == 1
