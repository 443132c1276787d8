"""Keys in a database: who has one, and for how long. On SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from integration.conftest import DEADLINE, HERE, eventually, is_alive
from integration.databases import Server, postgresql
from integration.nursery import Forked, Nursery
from integration.sql_holder import request
from proctree.durable import sql
from proctree.durable.directory import FileStore
from proctree.durable.errors import LeaseLost, StillRunning, StoreUnusable, UnknownKey
from proctree.durable.recording import Cause, Exit
from proctree.durable.sql import SqlClaim, SqlStore, boottime

LONG = 600.0
"""A lease that does not run out in a test."""
SHORT = 4.0
KEPT = 8.0
"""One that is renewed, on a machine that is busy with other tests."""

ID = "0123456789abcdef"


Start = Callable[..., Forked]


@pytest.fixture
def start(url: str, nursery: Nursery) -> Iterator[Start]:
    """Starts holders (sql_holder.py), that are ready when it returns them."""
    started: list[Forked] = []

    def one(key: str, lease: float = LONG) -> Forked:
        started.append(nursery.start("integration.sql_holder", url, key, str(lease)))
        assert started[-1].hear() == "ready"
        return started[-1]

    yield one
    for process in started:
        process.end()


@contextlib.contextmanager
def claimed(store: SqlStore, key: str) -> Iterator[SqlClaim]:
    claim = store.claim(key)
    assert claim is not None
    try:
        yield claim
    finally:
        claim.release()


def contend(store: SqlStore, key: str) -> SqlClaim:
    deadline = time.monotonic() + DEADLINE
    while (claim := store.claim(key)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return claim


# -- what is recorded


def test_what_is_recorded_is_read_again(url: str) -> None:
    store, key = SqlStore(url), "odd \n key \udcff ü " + "x" * 4000
    asked = request(key, "job", ID)
    with claimed(store, key) as claim:
        assert claim.attempts() == []
        assert store.keys() == []
        attempt = claim.begin(asked)
        assert claim.begin(asked) == attempt  # its answer was lost, say
        claim.submitted(attempt, "handle \n \0 ü")
        claim.finish(attempt, Exit(3 << 8, note="so so"))
        second = claim.begin(request(key, "job", ID[::-1]))
        assert (attempt.number, second.number) == (1, 2)
        assert store.claimed(key)
    assert not store.claimed(key)
    first, second = SqlStore(url).attempts(key)
    assert first.request == asked
    assert first.handle == "handle \n \0 ü"
    assert first.exit == Exit(3 << 8, note="so so")
    assert (second.handle, second.exit, second.cancelled) == (None, None, False)
    store.ask_cancel(key, 2)
    assert [attempt.cancelled for attempt in store.attempts(key)] == [False, True]
    with pytest.raises(UnknownKey, match="no attempt 3"):
        store.ask_cancel(key, 3)
    assert store.keys() == [key]


def test_what_is_forgotten(url: str) -> None:
    store = SqlStore(url)
    with pytest.raises(UnknownKey):
        store.forget("k")
    with claimed(store, "k") as claim:
        claim.begin(request("k", "job", ID))
        with pytest.raises(StillRunning, match=f"process {os.getpid()} on"):
            store.forget("k")
    store.forget("k")
    assert store.keys() == []
    assert store.attempts("k") == []
    with claimed(store, "k") as again:
        assert again.begin(request("k", "job", ID)).number == 1


def test_a_key_that_was_forgotten_fences_its_earlier_holder(url: str) -> None:
    """Its token must not be given out a second time."""
    store = SqlStore(url)
    with claimed(store, "k") as earlier:
        earlier.begin(request("k", "job", ID))
        other = SqlStore(url)
        taken = other.claim("k", dead=lambda: True)
        assert taken is not None
        taken.forget()
        taken.release()
        with claimed(other, "k"), pytest.raises(LeaseLost, match="taken over"):
            earlier.begin(request("k", "job", ID[::-1]))
    assert store.attempts("k") == []


def test_what_is_unreadable_is_listed(url: str) -> None:
    store = SqlStore(url)
    with claimed(store, "k") as claim:
        attempt = claim.begin(request("k", "job", ID))
        claim.finish(attempt, Exit(0))
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE proctree_attempts SET request = 'torn', exit = 'x'")
        (torn,) = claim.attempts()
    assert (torn.request, torn.exit) == (None, None)
    assert "request: cut off" in torn.trouble
    assert "exit: cut off" in torn.trouble


# -- who has it


@pytest.mark.timeout(240)
def test_eight_contend(url: str, start: Start) -> None:
    """Each of them gets it, one at a time: had two it at once, their attempts would be fenced or
    have the same number. The tables are made by all of them at once."""
    processes = [start("k") for _ in range(8)]
    for process in processes:
        process.tell("contend")
    numbers = []
    waiting = set(processes)
    while waiting:
        ready, _, _ = select.select(waiting, [], [], DEADLINE)
        assert len(ready) == 1, "none, or two at once"
        (process,) = ready
        waiting.remove(process)
        assert process.hear() == "claimed"
        assert process.ask("begin", "tree", f"{process.pid:016x}").startswith("begun")
        numbers.append(SqlStore(url).attempts("k")[-1].number)
        assert process.ask("finish", 0) == "finished"
        assert process.ask("release") == "released"
    assert numbers == list(range(1, 9))


def test_many_threads_take_it_once(url: str) -> None:
    """Of all that try at the same moment one has it, whatever it was before: new, or given back."""
    for _ in range(3):
        gate, claims = threading.Barrier(8), []

        def one(gate: threading.Barrier = gate, claims: list[SqlClaim | None] = claims) -> None:
            store = SqlStore(url)
            gate.wait(DEADLINE)
            claims.append(store.claim("k"))

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert len(claims) == 8
        (had,) = [claim for claim in claims if claim is not None]
        with contextlib.suppress(StoreUnusable):
            had.begin(request("k", "job", uuid.uuid4().hex[:16]))
        had.release()
    assert len(SqlStore(url).attempts("k")) == 3


def test_a_holder_that_was_heard_of_meanwhile(url: str) -> None:
    """Between the look at the key and the try to take it over: renewed, or taken by another."""
    store, other = SqlStore(url, lease=LONG), SqlStore(url, lease=LONG)
    with claimed(store, "k") as claim:

        def renewed() -> bool:
            claim.begin(request("k", "tree", ID))
            return True

        assert other.claim("k", dead=renewed) is None
        assert claim.begin(request("k", "tree", ID[::-1])).number == 2
    third: list[SqlClaim | None] = []
    with claimed(store, "fresh"):

        def taken() -> bool:
            third.append(store.claim("fresh", dead=lambda: True))
            return True

        assert other.claim("fresh", dead=taken) is None
        assert third[0] is not None
        assert third[0].begin(request("fresh", "tree", ID)).number == 1
        third[0].release()


def test_a_holder_that_was_killed(url: str, start: Start) -> None:
    """Held nothing, or a job: it may be taken at once. A tree may have outlived it."""
    store = SqlStore(url, lease=LONG)
    for kind, free in ((None, True), ("job", True), ("tree", False)):
        key = str(kind)
        holder = start(key)
        assert holder.ask("claim") == "claimed"
        if kind is not None:
            assert holder.ask("begin", kind, ID) == "begun 1"
        assert store.claim(key) is None
        assert store.claimed(key)
        holder.kill()
        holder.wait()
        assert not store.claimed(key)
        claim = store.claim(key)
        assert (claim is not None) is free, kind
        if claim is None:
            assert store.claim(key, dead=lambda: False) is None
            claim = store.claim(key, dead=lambda: True)
        assert claim is not None
        claim.release()


def test_a_holder_that_is_a_zombie_is_dead(url: str, start: Start) -> None:
    holder = start("k")
    assert holder.ask("claim") == "claimed"
    holder.kill()
    assert holder.hear() == ""  # and nobody has waited for it
    eventually(lambda: not is_alive(holder.pid), "it is a zombie")
    with claimed(SqlStore(url), "k"):
        pass


def change(url: str, assignment: str) -> None:
    """What is recorded of who holds a key."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE proctree_runs SET {assignment}")


def test_its_number_belongs_to_another_process(url: str, start: Start) -> None:
    """One that lives, and started at another time than the holder."""
    holder = start("k")
    assert holder.ask("claim") == "claimed"
    change(url, "holder_start = holder_start - 1")
    with claimed(SqlStore(url), "k"):
        pass


def test_who_did_not_know_when_it_had_started_may_live(url: str, start: Start) -> None:
    """It had no /proc."""
    holder = start("k")
    assert holder.ask("claim") == "claimed"
    change(url, "holder_start = 0")
    assert SqlStore(url).claim("k") is None
    holder.kill()
    holder.wait()
    with claimed(SqlStore(url), "k"):
        pass


@pytest.mark.parametrize("column", ["boot", "pid_namespace", "time_namespace"])
def test_a_number_from_elsewhere_says_nothing(url: str, start: Start, column: str) -> None:
    holder = start("k")
    assert holder.ask("claim") == "claimed"
    change(url, f"{column} = '4711'")
    holder.kill()
    holder.wait()
    assert SqlStore(url).claim("k") is None


def test_a_key_for_whose_lease_there_is_no_thread(url: str) -> None:
    """It is given back, and not held for a lease that nobody renews."""
    store = SqlStore(url, lease=LONG)
    before = threading.stack_size(1 << 47)  # all that a process can address
    try:
        with pytest.raises(StoreUnusable, match=r"threads that renew the lease: .*\(EAGAIN\)"):
            store.claim("key")
    finally:
        threading.stack_size(before)
    with claimed(store, "key"):
        pass


# -- for how long


def test_a_lease_is_renewed(url: str) -> None:
    """For longer than it lasts, with somebody who would take it; and who gives it back has it no
    more."""
    store, other = SqlStore(url, lease=KEPT), SqlStore(url)
    lefts: list[float] = []
    with claimed(store, "k") as claim:
        claim.when_renewed.append(lefts.append)
        until = boottime() + 1.3 * KEPT
        while boottime() < until:
            assert other.claim("k", dead=lambda: False) is None
            time.sleep(0.02)
        assert not claim.lost
        assert claim.expires > until
        claim.begin(request("k", "tree", ID))
    assert lefts
    assert all(0 < left <= KEPT for left in lefts)
    with pytest.raises(LeaseLost, match="given back"):
        claim.begin(request("k", "tree", ID))
    with claimed(other, "k"):
        pass


def test_a_holder_that_was_stopped(url: str, start: Start) -> None:
    """Its lease runs out while it is; and when it goes on, what it writes has no effect."""
    holder = start("k", SHORT)
    assert holder.ask("claim") == "claimed"
    assert holder.ask("begin", "tree", ID) == "begun 1"
    holder.signal(signal.SIGSTOP)
    stopped = boottime()
    store = SqlStore(url)
    claim = contend(store, "k")
    # By its own lease and not by ours; and we saw nothing of it before it was stopped.
    assert boottime() - stopped >= SHORT
    try:
        holder.signal(signal.SIGCONT)
        holder.tell("finish", 0)
        assert sorted((holder.hear(), holder.hear())) == ["LeaseLost", "lost"]
        assert holder.ask("begin", "tree", ID[::-1]) == "LeaseLost"
        assert holder.ask("release") == "released"
        (attempt,) = store.attempts("k")
        assert attempt.exit is None
        assert store.claimed("k")
        assert claim.begin(request("k", "tree", "f" * 16)).number == 2
    finally:
        claim.release()


def test_the_guard_is_in_the_database(url: str) -> None:
    """Taken over while the holder believes in its lease, which it must not be by any clock."""
    store = SqlStore(url, lease=LONG)
    lost = threading.Event()
    with claimed(store, "k") as claim:
        claim.when_lost.append(lost.set)
        attempt = claim.begin(request("k", "tree", ID))
        other = SqlStore(url).claim("k", dead=lambda: True)
        assert other is not None
        try:
            assert not claim.lost
            with pytest.raises(LeaseLost, match="taken over"):
                claim.finish(attempt, Exit(0))
            assert lost.wait(DEADLINE)
            assert claim.lost
            claim.release()
            assert store.claimed("k")
            assert store.attempts("k")[0].exit is None
            other.finish(attempt, Exit(None, Cause.CANCELLED))
        finally:
            other.release()


def test_a_renewal_finds_out(url: str) -> None:
    lost = threading.Event()
    with claimed(SqlStore(url, lease=SHORT), "k") as claim:
        claim.when_lost.append(lost.set)
        other = SqlStore(url).claim("k", dead=lambda: True)
        assert other is not None
        assert lost.wait(DEADLINE)
        other.release()


SHIFT = 1_000_000


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A holder whose clocks are days ahead."""
    url = f"sqlite:///{tmp_path}/records"
    shift = ["unshare", "-T", "--boottime", str(SHIFT), "--monotonic", str(SHIFT)]
    check = subprocess.run([*shift, "true"], capture_output=True, text=True)
    if check.returncode != 0:
        pytest.skip(f"no time namespaces: {check.stderr.strip()}")
    holder = [sys.executable, "-m", "integration.sql_holder", url, "k", str(SHORT)]
    process = subprocess.Popen(
        [*shift, *holder],
        cwd=HERE.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    # unshare(1) executes the program itself, or waits for it as its child.
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()


def test_clocks_are_not_compared(tmp_path: Path, elsewhere: subprocess.Popen[str]) -> None:
    """The holder is neither taken for dead because its start time looks different from here, nor
    kept longer than its lease."""

    def ask(word: str) -> str:
        assert elsewhere.stdin is not None
        assert elsewhere.stdout is not None
        elsewhere.stdin.write(f"{word}\n")
        elsewhere.stdin.flush()
        return elsewhere.stdout.readline().strip()

    assert ask("") == "ready"
    assert elsewhere.stdout is not None
    assert abs(int(ask("clock")) - boottime()) > SHIFT / 2
    assert ask("claim") == "claimed"
    store = SqlStore(f"sqlite:///{tmp_path}/records")
    until = boottime() + 1.5 * SHORT
    while boottime() < until:
        assert store.claim("k") is None
        time.sleep(0.05)
    (child,) = psutil.Process(elsewhere.pid).children() or [psutil.Process(elsewhere.pid)]
    child.suspend()
    contend(store, "k").release()
    child.resume()
    assert elsewhere.stdout.readline().strip() == "lost"


def test_a_fork_has_no_claim(url: str) -> None:
    """And leaves its parent's alone, at its end too."""
    store = SqlStore(url)
    with claimed(store, "k") as claim:
        pid = os.fork()
        if pid == 0:
            try:
                claim.release()
                claim.begin(request("k", "tree", ID))
            except LeaseLost as error:
                os._exit(7 if claim.lost and "is a fork" in str(error) else 8)
            finally:
                os._exit(9)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert claim.begin(request("k", "tree", ID)).number == 1


def test_a_pool_is_not_shared_with_a_fork(url: str) -> None:
    """An engine of the user's keeps connections: a child must neither use nor close them."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1, max_overflow=0)
    try:
        store = SqlStore(engine)
        store.keys()
        mine = _connection(store)
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(1 if mine and _connection(store) == mine else len(store.keys()))
            finally:
                os._exit(9)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        with claimed(store, "k") as claim:
            claim.begin(request("k", "tree", ID))
            with pytest.raises(StoreUnusable):
                claim._write("fail", _fail_half_way)
        assert store.keys() == ["k"]
        assert store.attempts("k")[0].handle is None  # whatever the engine's isolation level
    finally:
        engine.dispose()


def _connection(store: SqlStore) -> int:
    """The server's process for it, or 0 where there is none."""
    if store.name.startswith("sqlite"):
        return 0
    query = "SELECT pg_backend_pid()"
    return int(store._transact("ask", lambda one: one.exec_driver_sql(query).scalar_one()))


def _fail_half_way(connection: sa.Connection) -> None:
    connection.exec_driver_sql("UPDATE proctree_attempts SET handle = 'x'")
    connection.exec_driver_sql("SELECT * FROM missing")


# -- a database that fails


@pytest.fixture
def own_server() -> Iterator[Server]:
    with postgresql() as running:
        if running is None:
            pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
        yield running


def test_the_server_crashes(own_server: Server) -> None:
    """And is back before the lease is over: the claim goes on, and what was recorded is there. When
    it is away for longer the claim is lost, by our own clock."""
    store = SqlStore(own_server.url(), lease=12.0)
    renewed, lost = threading.Event(), threading.Event()
    brief = SqlStore(own_server.url(), lease=2.0)
    with claimed(store, "k") as claim, claimed(brief, "b") as short:
        attempt = claim.begin(request("k", "tree", ID))
        short.when_lost.append(lost.set)
        own_server.crash()
        with pytest.raises(StoreUnusable, match="cannot record the end"):
            claim.finish(attempt, Exit(0))
        assert lost.wait(DEADLINE)
        assert short.lost
        claim.when_renewed.append(lambda _left: renewed.set())
        own_server.start()
        assert renewed.wait(DEADLINE)
        assert not claim.lost
        claim.finish(attempt, Exit(0))
        with pytest.raises(LeaseLost, match="not renewed in time"):
            short.begin(request("b", "tree", ID))
        with claimed(store, "third"):
            pass
    (recorded,) = store.attempts("k")
    assert recorded.exit == Exit(0)


def test_a_holder_is_stopped_in_a_transaction(url: str, server: Server | None) -> None:
    """It holds a lock then, which must not hold up others for ever."""
    if server is None or not url.startswith("postgresql"):
        pytest.skip("of SQLite it would be, until somebody ends it")
    store = SqlStore(url)
    with claimed(store, "k") as claim:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.connect() as stuck, stuck.begin() as transaction:
            stuck.exec_driver_sql(sql._PATIENCE_SQL)
            stuck.exec_driver_sql("UPDATE proctree_runs SET counter = counter + 1")
            claim.begin(request("k", "tree", ID))
            with contextlib.suppress(sa.exc.DBAPIError):
                transaction.commit()
    assert len(store.attempts("k")) == 1


def test_what_cannot_be_reached(tmp_path: Path) -> None:
    away = f"postgresql+psycopg://me:s3cret@/x?host={tmp_path}&passfile=s3cret"
    store = SqlStore(away)
    with pytest.raises(StoreUnusable) as caught:
        store.claim("k")
    text = str(caught.value)
    assert "cannot create the tables" in text
    assert str(tmp_path) in text.replace("%2F", "/")
    assert "server can be reached" in text
    assert "s3cret" not in text + repr(store)
    with pytest.raises(
        StoreUnusable, match=r"missing/x: cannot create .* directory can be written"
    ):
        SqlStore(f"sqlite:///{tmp_path}/missing/x").keys()


def test_sqlite_names_what_has_failed(tmp_path: Path) -> None:
    Path(tmp_path, "records").write_bytes(b"not a database" * 400)
    with pytest.raises(StoreUnusable, match=r"cannot create the tables: .* \(SQLITE_NOTADB\): "):
        SqlStore(f"sqlite:///{tmp_path}/records").keys()


SHORT_OF_MEMORY = """
import sqlite3, sys
from proctree.durable import StoreUnusable
from proctree.durable.sql import SqlStore

store, left = SqlStore(sys.argv[1]), sqlite3.connect(":memory:")
store.keys()
try:
    for limit in range(1 << 20, 0, -4096):
        left.execute(f"PRAGMA hard_heap_limit = {limit}")
        store.keys()
except StoreUnusable as error:
    print(error)
"""


class Descriptor:
    """Something that a driver has opened."""


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), sqlite3.OperationalError("not reached")],
    ids=["system call", "driver"],
)
def test_what_a_driver_has_opened_when_it_fails_is_closed_at_once(
    tmp_path: Path, failure: Exception
) -> None:
    opened: list[weakref.ref[Descriptor]] = []

    def connect() -> None:
        ours = Descriptor()
        opened.append(weakref.ref(ours))
        raise failure

    store = SqlStore(sa.create_engine(f"sqlite:///{tmp_path}/records", creator=connect))
    gc.disable()
    try:
        with pytest.raises(StoreUnusable, match=r"Too many open files|not reached") as raised:
            store.keys()
        assert raised.value.__cause__ is not raised.value
        (ours,) = opened
        assert ours() is None
    finally:
        gc.enable()


def test_who_is_short_of_memory_cannot_use_it(tmp_path: Path) -> None:
    """Of that no driver makes an error of its own."""
    script = [sys.executable, "-c", SHORT_OF_MEMORY, f"sqlite:///{tmp_path}/records"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert "cannot list the keys: MemoryError()" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("mysql://host/db", "not installed|not supported|No module"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("nonsense with s3cret", "not a URL"),
        ("unknown://host/db", "unknown"),
    ],
)
def test_urls_are_checked(wrong: str, text: str) -> None:
    with pytest.raises((ValueError, StoreUnusable), match=text) as caught:
        SqlStore(wrong)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("lease", [0, 0.1, float("nan"), float("inf"), -1.0])
def test_leases_are_checked(tmp_path: Path, lease: float) -> None:
    with pytest.raises(ValueError, match="lease"):
        SqlStore(f"sqlite:///{tmp_path}/x", lease=lease)


def test_where_local_directories_are(tmp_path: Path) -> None:
    url, place = f"sqlite:///{tmp_path}/x", tmp_path / "local"
    for given in (place, str(place), FileStore(place)):
        local = SqlStore(url, local=given).local
        assert isinstance(local, FileStore)
        assert local.path == str(place)
    with pytest.raises(TypeError, match="local: a path or a FileStore, not 7"):
        SqlStore(url, local=7)  # type: ignore[arg-type]


def test_without_sqlalchemy() -> None:
    code = "import sys; sys.modules['sqlalchemy'] = None; import proctree.durable.sql"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'proctree-supervisor[sql]'" in done.stderr
