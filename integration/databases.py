"""A PostgreSQL server of our own: in a temporary directory, on a Unix socket, and gone with us."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator

START_SECONDS = 60.0

SETTINGS = {
    "listen_addresses": "",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "autovacuum": "off",  # its workers come and go, and would look like processes of a test
    "max_wal_senders": "0",
    "wal_level": "minimal",
    "fsync": "off",  # it is the processes that crash here, and not the machine
}


def find_programs() -> str | None:
    """The directory with initdb and postgres: Debian keeps it out of the path."""
    found = shutil.which("postgres")
    candidates = [os.path.dirname(os.path.realpath(found))] if found else []
    candidates += sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    for folder in candidates:
        if all(os.access(f"{folder}/{name}", os.X_OK) for name in ("initdb", "postgres")):
            return folder
    return None


def _unprivileged() -> tuple[int, int] | None:
    """As whom it runs: it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise RuntimeError("there is neither a user postgres nor nobody")


class Server:
    """A server that can be ended and started again."""

    def __init__(self, programs: str, folder: str) -> None:
        self._programs = programs
        self._folder = folder
        self._user = _unprivileged()
        self._process: subprocess.Popen[bytes] | None = None
        if self._user is not None:
            os.chown(folder, *self._user)
        self._call(
            "initdb", "-U", "proctree", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"
        )

    def url(self) -> str:
        return f"postgresql+psycopg://proctree@/postgres?host={self._folder}"

    def _argv(self, program: str, *args: str) -> list[str]:
        argv = [f"{self._programs}/{program}", "-D", f"{self._folder}/data", *args]
        if self._user is None:
            return argv
        uid, gid = self._user
        # Set behind the change of user, which clears it (PR_SET_PDEATHSIG(2const)).
        drop = [f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--pdeathsig=QUIT"]
        return ["setpriv", *drop, "--", *argv]

    def _call(self, program: str, *args: str) -> None:
        done = subprocess.run(
            self._argv(program, *args), cwd=self._folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = [f"--{name}={value}" for name, value in SETTINGS.items()]
        with open(f"{self._folder}/log", "ab") as log:
            self._process = subprocess.Popen(
                self._argv("postgres", "-k", self._folder, *options),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, self._log()
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.02)

    def _answers(self) -> bool:
        import psycopg

        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(
            f"host={self._folder} user=proctree dbname=postgres", autocommit=True
        ) as connection:
            connection.execute(statement)  # type: ignore[arg-type]

    def new_url(self) -> str:
        """Of an empty schema: as good as a database, and made in no time."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE SCHEMA {name}")
        return self.url() + f"&options=-csearch_path%3D{name}"

    def crash(self) -> None:
        """As `pg_ctl stop -m immediate`: nobody is told, and the next start recovers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(START_SECONDS)
            self._process = None

    def _log(self) -> str:
        with open(f"{self._folder}/log", encoding="utf-8", errors="replace") as file:
            return file.read()[-3000:]


@contextlib.contextmanager
def postgresql() -> Iterator[Server | None]:
    """A running server, or None when it is not installed."""
    programs = find_programs()
    if programs is None:
        yield None
        return
    folder = tempfile.mkdtemp(prefix="proctree-pg-")
    try:
        server = Server(programs, folder)
        try:
            server.start()
            yield server
        finally:
            server.crash()
    finally:
        shutil.rmtree(folder)
