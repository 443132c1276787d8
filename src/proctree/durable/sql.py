"""Records in a database, for supervisors on several machines: SQLite and PostgreSQL, by SQLAlchemy.

A database has no lock that ends with its holder, so a key is held by a lease. No clock is compared
with another machine's. The holder counts a counter up; who wants the key and has seen token and
counter unchanged for the length of the lease, by its own clock, takes over by compare-and-set. The
holder, which counts from before it sent its last renewal, has stopped acting by then. And should it
not know (it was suspended), the token is another one since, and its writes have no effect.

The clock is CLOCK_BOOTTIME, which does not stand still while the machine is suspended
(clock_gettime(2)): others do not wait for us to wake up.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
import os
import random
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from proctree import events
from proctree.durable.directory import FileStore
from proctree.durable.errors import LeaseLost, StillRunning, StoreUnusable, UnknownKey
from proctree.durable.here import Here
from proctree.durable.keys import check_key
from proctree.durable.recording import Exit, Request, Unreadable, escape, unescape
from proctree.durable.store import Attempt, Claim, Store
from proctree.durable.untorn import untorn
from proctree.errors import errno_name
from proctree.process import proof

if TYPE_CHECKING:
    from proctree.command import StrPath

try:
    import sqlalchemy as sa
    from sqlalchemy import exc, pool
except ImportError as error:
    raise ImportError(
        "SqlStore needs SQLAlchemy: pip install 'proctree-supervisor[sql]'", name="sqlalchemy"
    ) from error

_T = TypeVar("_T")

LEASE = 60.0
LEAST_LEASE = 0.5
RENEWALS = 3
"""How often a lease is renewed while it lasts."""
MARGIN = 0.05
"""The part of a lease by which its holder stops earlier than others may take over."""
OBSERVED_MAX = 65536
"""How many held keys an observer remembers; the one that it asked for longest ago is forgotten."""
CONFLICT_SECONDS = 15.0
"""How long a transaction is tried again that others get in the way of."""
MAKING_MAX = 5
BUSY_SECONDS = 10.0
"""How long SQLite waits for another writer."""
CLOSING_SECONDS = 5.0
"""How long `release` waits for a renewal that is under way."""

# A forked child that inherits a connection keeps it open when its parent dies in the middle of a
# transaction; and a holder may be stopped there. Their locks must not hold up others for ever.
_PATIENCE_SQL = (
    "SELECT set_config('lock_timeout', '3s', true),"
    " set_config('idle_in_transaction_session_timeout', '5s', true)"
)

_CONFLICTS = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available: lock_timeout
        "25P03",  # idle_in_transaction_session_timeout: we were stopped, and it was undone
    }
)

_metadata = sa.MetaData()

_runs = sa.Table(
    "proctree_runs",
    _metadata,
    # Of the key: PostgreSQL's index takes no text of any length.
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("counter", sa.BigInteger, nullable=False),
    sa.Column("released", sa.Boolean, nullable=False),
    sa.Column("lease", sa.Float, nullable=False),
    sa.Column("holder", sa.BigInteger, nullable=False),
    sa.Column("holder_start", sa.BigInteger, nullable=False),
    sa.Column("boot", sa.String(64), nullable=False),
    sa.Column("pid_namespace", sa.BigInteger, nullable=False),
    sa.Column("time_namespace", sa.BigInteger, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("changed", sa.String(32), nullable=False),
)

_attempts = sa.Table(
    "proctree_attempts",
    _metadata,
    sa.Column("run", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("tree_id", sa.String(64), nullable=False),
    sa.Column("token", sa.BigInteger, nullable=False),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("handle", sa.Text),
    sa.Column("exit", sa.Text),
    sa.Column("cancelled", sa.Boolean, nullable=False),
    sa.Column("changed", sa.String(32), nullable=False),
)


def boottime() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _stamp() -> str:
    """For people: nothing is decided by it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _identifier(key: str) -> str:
    check_key(key)
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _holder_is_dead(row: Any) -> bool:
    """Whether the process that holds it has certainly ended: only what ran here can be told."""
    there = (row.boot, row.pid_namespace, row.time_namespace)
    try:
        here = Here.now()
        if there != (here.boot, here.pid_namespace, here.time_namespace):
            return False
        stat = proof.read_stat(row.holder)
        if stat is not None:
            # 0: it could not read its own, for want of a /proc.
            return stat.dead or row.holder_start not in (0, stat.start_time)
        # With hidepid (proc(5)) those of others cannot be seen in /proc, but they are there.
        pidfd = proof.open_pidfd(row.holder)
    except OSError:
        return False
    if pidfd is None:
        return True
    os.close(pidfd)
    return False


class _Observed(NamedTuple):
    token: int
    counter: int
    since: float


class SqlStore(Store):
    """Records in a database that several machines share.

    Args:
        url: of SQLAlchemy, as "postgresql+psycopg://user:password@host/database" or
            "sqlite:////path/of/file"; or an `Engine`.
        lease: seconds after which a key may be taken over whose holder is not heard of. The same
            for all is best; a holder's own counts.
        local: where the trees of this host have their directories: a path or a `FileStore`.
            Default None: where `FileStore()` has its own.

    Raises:
        TypeError, ValueError: by the name of the argument.
        StoreUnusable: the driver that the URL names is not installed.
    """

    def __init__(
        self,
        url: str | sa.URL | sa.Engine,
        *,
        lease: float = LEASE,
        local: StrPath | FileStore | None = None,
    ) -> None:
        if isinstance(lease, bool) or not isinstance(lease, (int, float)):
            raise TypeError(f"lease: seconds, not {lease!r}")
        if not math.isfinite(lease) or lease < LEAST_LEASE:
            raise ValueError(f"lease: {lease!r} is not a number of seconds from {LEAST_LEASE} up")
        if isinstance(local, (str, bytes, os.PathLike)):
            local = FileStore(local)
        elif local is not None and not isinstance(local, FileStore):
            raise TypeError(f"local: a path or a FileStore, not {local!r}")
        self.lease = float(lease)
        self.local = local
        self._engine = _engine(url, self.lease)
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._pid = os.getpid()
        self._made = False
        self._observed: collections.OrderedDict[str, _Observed] = collections.OrderedDict()
        self._reported: set[tuple[str, int]] = set()
        """Of the unreadable ones, so that each is in the log once."""

    def __repr__(self) -> str:
        return f"SqlStore({self.name!r}, lease={self.lease})"

    @property
    def name(self) -> str:
        """The URL without what is secret in it."""
        return _public(self._engine.url)

    def claim(self, key: str, *, dead: Callable[[], bool] | None = None) -> SqlClaim | None:
        """Takes the key, or None when somebody else has it at this moment. Does not wait: who wants
        to take over from a holder that is not heard of any more calls it again and again.

        Args:
            key: the key.
            dead: whether what the holder held has certainly ended, so that it need not be waited
                for; called when the key is held. In any case it need not when the holder was a
                process of this machine that has ended, and held nothing or a job. (A tree may
                outlive whoever started it.)

        Raises:
            TypeError, ValueError: it is not a key.
            StoreUnusable: the database cannot be used.
        """
        run, here, token = _identifier(key), self._here(), 0
        self._make_tables()
        sent = boottime()
        row = self._read_run(run)
        if row is None:
            token = self._insert(run, key, here)
        elif row.released or self._may_take(run, row, dead):
            sent = boottime()
            token = self._take(run, row, here)
        if not token:
            return None
        self._observed.pop(run, None)
        claim = SqlClaim(self, key, token, sent)
        try:
            claim.begin_renewing()
        except RuntimeError as error:
            # Else it were ours, and free only when the lease has run out.
            claim.release()
            raise StoreUnusable(
                f"store {self.name}: cannot start the threads that renew the lease: {error} "
                "(EAGAIN): raise the limits on processes (RLIMIT_NPROC, getrlimit(2); pids.max)"
            ) from error
        return claim

    def _here(self) -> Here:
        """Raises StoreUnusable."""
        try:
            return Here.now()
        except OSError as error:
            raise StoreUnusable(
                f"store {self.name}: cannot tell who wants the key: {error.strerror} "
                f"({errno_name(error.errno or 0)})"
            ) from error

    def attempts(self, key: str) -> list[Attempt]:
        self._make_tables()
        return self._read_attempts(key)

    def ask_cancel(self, key: str, number: int) -> None:
        self._make_tables()
        run = _identifier(key)

        def ask(connection: sa.Connection) -> int:
            this = (_attempts.c.run == run) & (_attempts.c.number == number)
            return connection.execute(
                sa.update(_attempts).where(this).values(cancelled=True)
            ).rowcount

        if not self._transact("ask for a cancellation", ask):
            raise UnknownKey(f"key {key!r}: there is no attempt {number}")

    def claimed(self, key: str) -> bool:
        """Whether somebody has the key, as far as is known: that a holder on another machine is not
        there any more shows only in time."""
        self._make_tables()
        row = self._read_run(_identifier(key))
        return row is not None and not row.released and not _holder_is_dead(row)

    def holder_is_dead(self, key: str) -> bool:
        """Whether whoever held the key last was a process of this machine, and has ended."""
        self._make_tables()
        row = self._read_run(_identifier(key))
        return row is not None and _holder_is_dead(row)

    def keys(self) -> list[str]:
        self._make_tables()
        query = sa.select(_runs.c.key).where(_runs.c.id.in_(sa.select(_attempts.c.run)))
        rows = self._transact("list the keys", lambda connection: connection.scalars(query).all())
        return sorted(unescape(key) for key in rows)

    def forget(self, key: str) -> None:
        run = _identifier(key)
        claim = self.claim(key)
        if claim is None:
            raise StillRunning(f"key {key!r}: held by {self._describe(run)}")
        try:
            claim.forget()
        finally:
            claim.release()

    # -- what claims need

    def _read_run(self, run: str) -> Any:
        # Of what has ended nothing is held any more.
        runs = sa.case((_attempts.c.exit.is_(None), _attempts.c.kind))
        last = (
            sa.select(runs)
            .where(_attempts.c.run == run)
            .order_by(_attempts.c.number.desc())
            .limit(1)
            .scalar_subquery()
        )
        query = sa.select(_runs, last.label("kind")).where(_runs.c.id == run)
        return self._transact(
            "read the holder", lambda connection: connection.execute(query).first()
        )

    def _describe(self, run: str) -> str:
        row = self._read_run(run)
        if row is None:
            return "a process that has just given it back"
        return f"process {row.holder} on {row.host} (since or renewed {row.changed})"

    def _may_take(self, run: str, row: Any, dead: Callable[[], bool] | None) -> bool:
        """Whether a held key may be taken over."""
        now = boottime()  # behind the read: what it has shown was sent before
        if dead is not None and dead():
            return True
        if row.kind in (None, "job") and _holder_is_dead(row):
            return True
        seen = self._observed.get(run)
        if seen is None or (seen.token, seen.counter) != (row.token, row.counter):
            seen = _Observed(row.token, row.counter, now)
        self._observed[run] = seen
        self._observed.move_to_end(run)
        while len(self._observed) > OBSERVED_MAX:
            self._observed.popitem(last=False)
        return bool(now - seen.since >= row.lease)

    def _values(self, token: int, here: Here) -> dict[str, Any]:
        return {
            "token": token,
            "counter": 0,
            "released": False,
            "lease": self.lease,
            "changed": _stamp(),
            **here._asdict(),
        }

    def _insert(self, run: str, key: str, here: Here) -> int:
        # Not from 1 again when a key was forgotten: an earlier holder of that number might live.
        token = secrets.randbits(52) + 1
        values = {"id": run, "key": escape(key), **self._values(token, here)}

        def insert(connection: sa.Connection) -> int:
            connection.execute(sa.insert(_runs).values(values))
            return token

        try:
            return self._transact("insert the key", insert)
        except exc.IntegrityError:
            return 0  # somebody else was faster

    def _take(self, run: str, row: Any, here: Here) -> int:
        token = int(row.token) + 1
        unchanged = (
            (_runs.c.id == run)
            & (_runs.c.token == row.token)
            & (_runs.c.counter == row.counter)
            & (_runs.c.released == row.released)
        )
        update = sa.update(_runs).where(unchanged).values(self._values(token, here))
        taken = self._transact(
            "take the key", lambda connection: connection.execute(update).rowcount
        )
        return token if taken else 0

    def _read_attempts(self, key: str, *, report: bool = False) -> list[Attempt]:
        run = _identifier(key)
        query = sa.select(_attempts).where(_attempts.c.run == run).order_by(_attempts.c.number)
        rows = self._transact(
            "read the attempts", lambda connection: connection.execute(query).all()
        )
        found = [_attempt(row) for row in rows]
        for attempt in found if report else ():
            if attempt.trouble and (run, attempt.number) not in self._reported:
                self._reported.add((run, attempt.number))
                events.warning(
                    "durable.unreadable",
                    key=key,
                    attempt=attempt.number,
                    kept=self.name,
                    error=attempt.trouble,
                )
        return found

    # -- the database

    def _make_tables(self) -> None:
        """On first use. Two that make them at once get in each other's way, even by CREATE TABLE
        IF NOT EXISTS (PostgreSQL: a unique violation in pg_type)."""
        if self._made:
            return
        for left in reversed(range(MAKING_MAX)):
            try:
                self._transact("create the tables", _metadata.create_all)
                break
            except (exc.IntegrityError, StoreUnusable) as error:
                cause = error.__cause__ if isinstance(error, StoreUnusable) else error
                raced = isinstance(cause, (exc.IntegrityError, exc.ProgrammingError))
                if raced and left:
                    continue
                if isinstance(error, StoreUnusable):
                    raise
                raise self._unusable("create the tables", error) from error
        self._made = True

    def _transact(self, step: str, work: Callable[[sa.Connection], _T]) -> _T:
        """One transaction; again when others got in its way.

        Raises:
            StoreUnusable: it failed for another reason, or too often.
            IntegrityError: a row was there already.
        """
        return untorn(lambda: self._try(step, work))

    def _try(self, step: str, work: Callable[[sa.Connection], _T]) -> _T:
        deadline = time.monotonic() + CONFLICT_SECONDS
        while True:
            try:
                with self._begin() as connection:
                    return work(connection)
            except exc.IntegrityError:
                raise
            except exc.SQLAlchemyError as error:
                if not _is_conflict(error) or time.monotonic() >= deadline:
                    raise self._unusable(step, error) from error
            except (OSError, MemoryError) as error:
                # Not every driver makes one of its own of what its system calls say.
                raise self._unusable(step, error) from error
            # Not both again at the same moment.
            time.sleep(random.uniform(0.001, 0.05))  # noqa: S311

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        if self._pid != os.getpid():
            # Connections that a forked child inherits are its parent's: they are left alone, and
            # not closed, which would end the parent's sessions.
            self._engine.dispose(close=False)
            self._pid = os.getpid()
        with self._engine.connect() as connection, connection.begin():
            if not self._sqlite:
                connection.exec_driver_sql(_PATIENCE_SQL)
            elif not getattr(connection.connection.dbapi_connection, "in_transaction", False):
                # A transaction that reads first and then wants to write fails at once when somebody
                # else wrote in between, whatever the busy timeout (sqlite.org/lang_transaction).
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    def _unusable(self, step: str, error: Exception) -> StoreUnusable:
        _let_go_of_frames(error)
        orig = getattr(error, "orig", None)
        cause = str(orig or error).strip() or repr(error)
        # SQLite says "disk I/O error" of a dozen calls, and only by this name of which.
        if code := getattr(orig, "sqlite_errorname", None):
            cause += f" ({code})"
        what = "file and its directory can be written" if self._sqlite else "server can be reached"
        return StoreUnusable(
            f"store {self.name}: cannot {step}: {cause}: see that the {what}, and that the tables "
            f"{_runs.name} and {_attempts.name} may be made and written"
        )


def _engine(url: str | sa.URL | sa.Engine, lease: float) -> sa.Engine:
    engine = url if isinstance(url, sa.Engine) else _new_engine(url, lease)
    if engine.dialect.name not in ("sqlite", "postgresql"):
        raise ValueError(f"url: {engine.dialect.name} is not supported: use PostgreSQL or SQLite")
    if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        raise ValueError("url: a database in memory is gone with its process: name a file")
    if engine.dialect.name == "postgresql":
        # Whatever the engine is set to otherwise: with AUTOCOMMIT no guard would guard anything.
        return engine.execution_options(isolation_level="READ COMMITTED")
    return engine


def _new_engine(url: str | sa.URL, lease: float) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        # Without what it says: the text may hold a password.
        raise ValueError("url: not a URL of SQLAlchemy, as sqlite:////path/of/file") from None
    options: dict[str, Any] = {}
    if parsed.get_backend_name() == "sqlite":
        options["timeout"] = BUSY_SECONDS
    elif parsed.get_backend_name() == "postgresql" and parsed.get_driver_name().startswith("psyc"):
        # Parameters of libpq. Without them a server that has vanished is waited for by the hour.
        wanted = {
            "connect_timeout": int(min(10, max(2, lease / RENEWALS))),
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        }
        options = {name: value for name, value in wanted.items() if name not in parsed.query}
    try:
        # A connection for each transaction: none is inherited by a fork between them, and none is
        # found to be dead when the server has been restarted.
        return sa.create_engine(parsed, poolclass=pool.NullPool, connect_args=options)
    except ImportError as error:
        raise StoreUnusable(
            f"store {_public(parsed)}: {error}: install the driver, as psycopg[binary] for "
            "postgresql+psycopg://"
        ) from error
    except exc.NoSuchModuleError as error:
        raise ValueError(f"url: {error}") from None


def _public(url: sa.URL) -> str:
    hidden = {name: "***" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def _let_go_of_frames(error: BaseException | None) -> None:
    """SQLAlchemy has references to an error in frames of its traceback: what the driver had opened
    would stay open until that cycle is collected, and descriptors may be what is short."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _is_conflict(error: Exception) -> bool:
    orig = getattr(error, "orig", None)
    state = getattr(orig, "sqlstate", None) or getattr(orig, "pgcode", None)
    busy = getattr(orig, "sqlite_errorname", None) or ""
    return state in _CONFLICTS or busy.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _attempt(row: Any) -> Attempt:
    trouble = []
    request = handle = how = None
    try:
        request = Request.decode(row.request.encode("ascii", "replace"))
    except Unreadable as error:
        trouble.append(f"request: {error}")
    try:
        handle = None if row.handle is None else unescape(row.handle)
    except ValueError as error:
        trouble.append(f"handle: {error}")
    try:
        how = None if row.exit is None else Exit.decode(row.exit.encode("ascii", "replace"))
    except Unreadable as error:
        trouble.append(f"exit: {error}")
    return Attempt(
        number=row.number,
        request=request,
        handle=handle,
        exit=how,
        trouble="; ".join(trouble),
        cancelled=row.cancelled,
    )


def _repeat(
    step: Callable[[SqlClaim], float | None],
    known: weakref.ref[SqlClaim],
    closing: threading.Event,
    pause: float,
) -> None:
    """A thread of a claim's: after each pause a step, which answers the next one. It ends when that
    answers None, when the claim is given back, and when nobody has it any more."""
    left: float | None = pause
    while left is not None and not closing.wait(left):
        claim = known()
        left = None if claim is None else step(claim)
        del claim


class SqlClaim(Claim):
    """A key, held by a lease that a thread renews.

    Attributes:
        key, token: the key, and the fencing token.
        expires: seconds of CLOCK_BOOTTIME at which it must be taken for lost: counted from before
            the last renewal that succeeded was sent.
        when_lost: called once when it is lost, without arguments.
        when_renewed: called after each renewal with the seconds that are left.

    The functions in both lists are called on a thread of the claim's; what they raise is logged. In
    a forked child a claim is lost from the start: it stays its parent's.
    """

    def __init__(self, store: SqlStore, key: str, token: int, sent: float) -> None:
        self._store = store
        self.key = key
        self.token = token
        self._run = _identifier(key)
        self._pid = os.getpid()
        self._length = store.lease * (1 - MARGIN)
        self.expires = sent + self._length
        self.when_lost: list[Callable[[], object]] = []
        self.when_renewed: list[Callable[[float], object]] = []
        self._lock = threading.Lock()
        self._why = ""
        self._closing = threading.Event()
        self._renewer = self._thread(SqlClaim._renew, store.lease / RENEWALS)
        # One that only looks at the clock: the other one may hang in the network for as long as
        # that likes to.
        self._sentinel = self._thread(SqlClaim._watch, 0.0)

    def _thread(self, step: Callable[[SqlClaim], float | None], pause: float) -> threading.Thread:
        # It does not keep the claim alive: what nobody has any more, since a signal handler has
        # raised on its way to them, is not renewed for ever.
        claim = weakref.ref(self)
        return threading.Thread(
            target=_repeat,
            args=(step, claim, self._closing, pause),
            name="proctree-lease",
            daemon=True,
        )

    def begin_renewing(self) -> None:
        """Raises RuntimeError: there can be no thread for it."""
        self._renewer.start()
        self._sentinel.start()

    @property
    def lost(self) -> bool:
        """Whether it is, or must be taken for, somebody else's."""
        return bool(self._why) or self._pid != os.getpid() or boottime() >= self.expires

    def attempts(self) -> list[Attempt]:
        """As in `Claim`. Raises LeaseLost as well."""
        self._check("read the attempts")
        return self._store._read_attempts(self.key, report=True)

    def begin(self, request: Request) -> Attempt:
        def insert(connection: sa.Connection) -> int:
            # A transaction whose answer was lost is tried again: it is the same attempt.
            query = sa.select(_attempts.c.number, _attempts.c.tree_id)
            query = query.where(_attempts.c.run == self._run).order_by(_attempts.c.number.desc())
            last = connection.execute(query.limit(1)).first()
            if last is not None and last.tree_id == request.tree_id:
                return int(last.number)
            number = 1 if last is None else int(last.number) + 1
            values = {
                "run": self._run,
                "number": number,
                "kind": request.kind,
                "tree_id": request.tree_id,
                "token": self.token,
                "request": request.encode().decode("ascii"),
                "cancelled": False,
                "changed": _stamp(),
            }
            connection.execute(sa.insert(_attempts).values(values))
            return number

        return Attempt(self._write("begin an attempt", insert), request)

    def submitted(self, attempt: Attempt, handle: str) -> None:
        self._update("record the handle", attempt, handle=escape(handle))

    def finish(self, attempt: Attempt, how: Exit) -> None:
        self._update("record the end", attempt, exit=how.encode().decode("ascii"))

    def forget(self) -> None:
        """Removes everything that is recorded of the key, and gives it back.

        Raises:
            UnknownKey: there is nothing.
            StoreUnusable, LeaseLost: as `begin`.
        """

        def remove(connection: sa.Connection) -> int:
            gone = connection.execute(sa.delete(_attempts).where(_attempts.c.run == self._run))
            connection.execute(sa.delete(_runs).where(_runs.c.id == self._run))
            return gone.rowcount

        if not self._write("forget the key", remove):
            raise UnknownKey(f"key {self.key!r}: nothing is recorded")

    def release(self) -> None:
        if self._pid != os.getpid() or self._closing.is_set():
            return
        self._closing.set()
        for thread in (self._sentinel, self._renewer):
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(CLOSING_SECONDS)
        try:
            self._store._transact("give the key back", self._give_back)
        except (StoreUnusable, exc.IntegrityError) as error:
            # It is free when its lease has run out.
            events.warning("durable.not_released", key=self.key, error=str(error))

    def abandon(self) -> None:
        """Does not renew it any more, and does not give it back: it is free when its lease has run
        out. For what runs on without us."""
        self._closing.set()

    def _give_back(self, connection: sa.Connection) -> None:
        mine = self._mine()
        used = sa.exists().where(_attempts.c.run == self._run)
        connection.execute(sa.delete(_runs).where(mine & ~used))
        connection.execute(sa.update(_runs).where(mine).values(released=True, changed=_stamp()))

    # -- the guard

    def _mine(self) -> Any:
        return (
            (_runs.c.id == self._run)
            & (_runs.c.token == self.token)
            & (_runs.c.released == sa.false())
        )

    def _count_up(self, connection: sa.Connection) -> bool:
        """Whether it is still ours. The row is locked by that until the transaction ends."""
        values = {"counter": _runs.c.counter + 1, "changed": _stamp()}
        return connection.execute(sa.update(_runs).where(self._mine()).values(values)).rowcount == 1

    def _check(self, step: str) -> None:
        if self._closing.is_set():
            raise LeaseLost(f"key {self.key!r}: cannot {step}: the key was given back")
        if self.lost:
            raise LeaseLost(f"key {self.key!r}: cannot {step}: {self._reason()}")

    def _reason(self) -> str:
        if self._pid != os.getpid():
            return f"the key is held by process {self._pid}, of which this one is a fork"
        return self._why or "the lease was not renewed in time"

    def _write(self, step: str, work: Callable[[sa.Connection], _T]) -> _T:
        self._check(step)

        def guarded(connection: sa.Connection) -> tuple[bool, _T | None]:
            if not self._count_up(connection):
                return False, None
            return True, work(connection)

        try:
            mine, result = self._store._transact(step, guarded)
        except exc.IntegrityError as error:
            raise self._store._unusable(step, error) from error
        if not mine:
            self._lose("another supervisor has taken over")
            raise LeaseLost(f"key {self.key!r}: cannot {step}: {self._reason()}")
        return result  # type: ignore[return-value]

    def _update(self, step: str, attempt: Attempt, **values: str) -> None:
        this = (_attempts.c.run == self._run) & (_attempts.c.number == attempt.number)
        update = sa.update(_attempts).where(this).values(changed=_stamp(), **values)
        if self._write(step, lambda connection: connection.execute(update).rowcount) != 1:
            raise StoreUnusable(
                f"store {self._store.name}: cannot {step}: key {self.key!r} has no attempt "
                f"{attempt.number}: was it removed by hand?"
            )

    # -- the lease

    def _renew(self) -> float | None:
        """Seconds to the next renewal: on errors they come more often, for as long as it lasts."""
        if self.lost:
            return None
        sent = boottime()
        try:
            mine = self._store._transact("renew the lease", self._count_up)
        except (StoreUnusable, exc.IntegrityError) as error:
            events.warning("durable.not_renewed", key=self.key, error=str(error))
            return self._store.lease / (10 * RENEWALS)
        if not mine:
            self._lose("another supervisor has taken over")
            return None
        return self._store.lease / RENEWALS if self._prolong(sent + self._length) else None

    def _prolong(self, expires: float) -> bool:
        """False when it was lost before the answer came: it is not taken back."""
        with self._lock:
            if self.lost:
                return False
            self.expires = expires
        left = expires - boottime()
        for function in list(self.when_renewed):
            self._call(function, left)
        return True

    def _watch(self) -> float | None:
        """Seconds to the next look."""
        left = self.expires - boottime()
        if self._why or left <= 0:
            self._lose("the lease was not renewed in time")
            return None
        # In small pieces: what waits here stands still while the machine is suspended, and the
        # lease does not.
        return min(left, max(self._store.lease / 20, 0.05))

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._why or self._closing.is_set():
                return
            self._why = why
        events.warning("durable.lease_lost", key=self.key, error=why)
        for function in list(self.when_lost):
            self._call(function)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        try:
            function(*args)
        except Exception as error:
            events.error("durable.callback_failed", key=self.key, error=repr(error), exc_info=True)
