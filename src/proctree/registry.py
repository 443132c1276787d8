"""The registry of running trees, and the ending of what a crash left behind.

Every tree has an entry: a file in a directory that is ours alone, locked (flock(2)) for as long as
what holds the tree lives. The warden holds the lock, and for the group backend the supervisor does.
The kernel drops a lock when its holder ends, however it ends: so an entry that can be locked is one
of a dead holder, and nothing has to be guessed from times or numbers.

A tree is identified by the machine's boot, the PID namespace, the number and start time of its main
process, its id in the environment of its members, and its cgroup where it has one. `sweep` ends
what bears these marks and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from proctree import events
from proctree.errors import ProctreeError, errno_name, step
from proctree.process import cgroups, fds, pid_namespaces, private, proof
from proctree.process import sweep as _sweep
from proctree.process.private import NotPrivate
from proctree.process.sweep import Search
from proctree.records import Member

VERSION = 1
CGROUP_SECONDS = 5.0
NAME_LENGTH = 256
"""How much of a tree's name an entry keeps: it is for people, and the entry one argument of the
warden's, whose length the kernel bounds (MAX_ARG_STRLEN, execve(2))."""
STALE_SECONDS = 3600.0
"""After which the beginnings of an entry, which name no tree, are cleared away."""

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class RegistryUnusable(ProctreeError):
    """The registry's directory is not ours alone, or cannot be made; the message says why."""


class Unseen(RegistryUnusable):
    """Whether anything of a tree is left cannot be seen from here; the message says why."""


class Entry(NamedTuple):
    """What an entry says of its tree.

    Attributes:
        boot: the boot of the machine (/proc/sys/kernel/random/boot_id).
        pid_namespace: the inode of the PID namespace in which the numbers are meant.
        tree_id, name, containment: as on the handle.
        holder: (pid, start time in clock ticks) of the process that holds the lock.
        main: the same of the main process; None as long as it had not started.
        cgroup: the directory of its cgroup, or None.
        time_namespace: of the holder, whose clock the start times are of; 0: it is not known.
    """

    boot: str
    pid_namespace: int
    tree_id: str
    name: str
    containment: str
    holder: tuple[int, int] | None
    main: tuple[int, int] | None
    cgroup: str | None
    time_namespace: int = 0


class Swept(NamedTuple):
    """One tree that a crash had left behind.

    Attributes:
        tree_id, name: which one it was.
        ended: the processes that were ended.
        survivors: those that could not be.
    """

    tree_id: str
    name: str
    ended: tuple[Member, ...]
    survivors: tuple[Member, ...]


# -- where


def default_directory() -> str:
    """`$XDG_RUNTIME_DIR/proctree`, else `/run/proctree` for root, else a directory of our own in
    the one for temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return os.path.join(runtime, "proctree")
    if os.geteuid() == 0 and os.path.isdir("/run"):
        return "/run/proctree"
    import tempfile  # slow, and rarely needed

    return os.path.join(tempfile.gettempdir(), f"proctree-{os.geteuid()}")


def make_directory(path: str) -> str:
    """Makes it if need be, and checks that it is ours alone.

    Raises:
        RegistryUnusable: it is not, or cannot be made.
    """
    try:
        private.make(path)
    except NotPrivate as error:
        raise RegistryUnusable(str(error)) from None
    except OSError as error:
        raise RegistryUnusable(f"{path}: {errno_name(error.errno or 0)}") from None
    return path


_known: dict[tuple[int, str], str | None] = {}
"""(our uid, wanted directory) -> the directory, or None when it cannot be used."""


def directory() -> str | None:
    """The directory for new entries, or None when there cannot be one: said once in the log, since
    a tree can do without."""
    wanted = default_directory()
    key = (os.geteuid(), wanted)
    if key not in _known or not os.path.isdir(wanted):
        try:
            _known[key] = make_directory(wanted)
        except RegistryUnusable as error:
            if key not in _known:
                events.warning("registry.unusable", error=str(error))
            _known[key] = None
    return _known[key]


# -- what an entry says


def _escape(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def _unescape(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape")


def boot_id() -> str:
    with step("boot-id"), open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def pid_namespace() -> int:
    """Numbers mean something in their own PID namespace only (pid_namespaces(7))."""
    with step("pid-namespace"):
        return os.stat("/proc/self/ns/pid").st_ino


def user_namespace() -> int:
    """It decides whose environments we may read: user_namespaces(7), ptrace(2)."""
    with step("user-namespace"):
        return os.stat("/proc/self/ns/user").st_ino


_here: dict[int, tuple[str, int]] = {}
"""By our pid, which a fork changes."""


def this_machine() -> tuple[str, int]:
    """`boot_id` and `pid_namespace`, which do not change while a process lives."""
    here = _here.get(os.getpid())
    if here is None:
        _here.clear()
        here = _here[os.getpid()] = (boot_id(), pid_namespace())
    return here


def record(tree_id: str, name: str, containment: str, cgroup: str | None) -> str:
    """The first lines of an entry: what is known before there is a process."""
    boot, namespace = this_machine()
    with step("time-namespace"):
        clock = proof.time_namespace("self/ns/time_for_children")
    lines = [
        f"proctree {VERSION}",
        f"boot {boot}",
        f"pidns {namespace}",
        f"timens {clock}",
        f"tree {tree_id}",
        f"containment {containment}",
        f"name {_escape(name[:NAME_LENGTH])}",
    ]
    if cgroup is not None:
        lines.append(f"cgroup {_escape(cgroup)}")
    return "\n".join(lines) + "\n"


def _process(value: str) -> tuple[int, int]:
    pid, start_time = value.split(" ")
    return int(pid), int(start_time)


def parse(text: str) -> Entry:
    """Reads an entry.

    Raises:
        ValueError: it is not one.
    """
    if not text.endswith("\n"):
        raise ValueError("the last line is cut off")
    fields = dict(line.split(" ", 1) for line in text.splitlines())
    try:
        if int(fields["proctree"]) != VERSION:
            raise ValueError(f"version {fields['proctree']}")
        return Entry(
            boot=fields["boot"],
            pid_namespace=int(fields["pidns"]),
            tree_id=fields["tree"],
            name=_unescape(fields["name"]),
            containment=fields["containment"],
            holder=_process(fields["warden"]) if "warden" in fields else None,
            main=_process(fields["main"]) if "main" in fields else None,
            cgroup=_unescape(fields["cgroup"]) if "cgroup" in fields else None,
            time_namespace=int(fields.get("timens", 0)),
        )
    except KeyError as error:
        raise ValueError(f"no line {error}") from None


class Held:
    """An entry that this process holds itself, as the group backend does."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def enter(cls, path: str, text: str, main: tuple[int, int]) -> Held | None:
        """None when it cannot be made, which is said in the log."""
        temporary = path + "~"
        me = proof.read_stat(os.getpid())
        holder = f"warden {os.getpid()} {me.start_time if me else 0}\nmain {main[0]} {main[1]}\n"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fds.own(fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(fd, (text + holder).encode())
                os.rename(temporary, path)
            except OSError:
                fds.close(fd)
                os.unlink(temporary)
                raise
        except OSError as error:
            events.warning("registry.failed", file=path, errno=errno_name(error.errno or 0))
            return None
        return cls(path, fd)

    def leave(self) -> None:
        forget(self._path)
        fds.close(self._fd)


def path_of(folder: str, tree_id: str) -> str:
    return os.path.join(folder, tree_id)


def is_entered(tree_id: str) -> bool:
    """Whether there is an entry of this tree, whoever holds it."""
    folder = directory()
    return folder is not None and os.path.lexists(path_of(folder, tree_id))


def forget(path: str) -> None:
    """Removes the entry of a tree that is known to have ended, or the beginnings of one: a warden
    may be killed while it makes it."""
    for file in (path, path + "~"):
        with contextlib.suppress(OSError):
            os.unlink(file)


# -- sweeping


@contextlib.contextmanager
def _locked(path: str) -> Iterator[str | None]:
    """The text of an entry whose holder is dead, under its lock; None for one whose holder lives,
    or that is gone."""
    try:
        # O_NONBLOCK: the opening of a FIFO would wait for somebody who writes.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another sweep may have finished with it between our open and our lock.
            there = os.stat(path, follow_symlinks=False).st_ino == os.fstat(fd).st_ino
        except OSError:
            there = False
        yield _text(fd) if there else None
    finally:
        os.close(fd)


def _text(fd: int) -> str:
    """Empty, which no entry is, for what is not a file."""
    try:
        return os.read(fd, 65536).decode("ascii", "replace")
    except OSError:
        return ""


def _same_process(process: tuple[int, int] | None) -> bool:
    if process is None:
        return False
    now = proof.read_stat(process[0])
    return now is not None and now.start_time == process[1]


def _main(entry: Entry) -> tuple[int, int] | None:
    """Our number for it, and its start time, while it is certainly the same process."""
    if entry.main is None or entry.time_namespace not in (0, proof.time_namespace()):
        return None
    number, start_time = entry.main
    if entry.pid_namespace != this_machine()[1]:
        found = pid_namespaces.search(entry.pid_namespace, number)
        if found is None:
            return None
        number = found
    return (number, start_time) if _same_process((number, start_time)) else None


def _oldest(entry: Entry) -> int:
    """Nothing of the tree is older than its holder, as far as that can be said with our clock."""
    if entry.time_namespace not in (0, proof.time_namespace()):
        return 0
    return min((p[1] for p in (entry.main, entry.holder) if p is not None), default=0)


def _search(entry: Entry) -> Search:
    """The main process is dead, as a rule, and its number may be somebody else's by now: it names a
    session only while it is the same process."""
    main = _main(entry)
    return Search(
        root=None,
        root_pidfd=-1,
        main=None if main is None else main[0],
        main_start=_oldest(entry) if main is None else main[1],
        tree_id=entry.tree_id,
    )


def _end(entry: Entry) -> tuple[tuple[Member, ...], tuple[Member, ...]]:
    """What was ended, and what survived."""
    ended: dict[tuple[int, int], Member] = {}
    survivors: list[Member] = []
    leaf = cgroups.LEAF_PREFIX + entry.tree_id
    if entry.cgroup is not None and os.path.basename(entry.cgroup) == leaf:
        killed, left = _sweep.end_cgroup(entry.cgroup, CGROUP_SECONDS)
        ended = {(member.pid, member.start_time): member for member in killed}
        survivors = list(left)
    killed, left = _sweep.sweep(_search(entry))
    ended.update(((m.pid, m.start_time), m) for m in killed)
    survivors += [m for m in left if all(m.pid != other.pid for other in survivors)]
    for member in survivors:
        ended.pop((member.pid, member.start_time), None)
    return tuple(ended.values()), tuple(survivors)


def end_unheld(
    *,
    boot: str,
    pid_namespace: int,
    started_by: int,
    tree_id: str,
    name: str,
    containment: str,
    cgroup: str | None,
    seems_empty: Callable[[], bool],
) -> tuple[Member, ...]:
    """Ends what is left of one tree whose warden is known to be dead. Returns what survives that.

    Args:
        boot, pid_namespace, tree_id, name, containment, cgroup: as of an `Entry`.
        started_by: the user namespace of who started it; 0: it is not known.
        seems_empty: asked where its processes cannot be seen and its cgroup cannot be reached:
            whether something else says that there are none.

    Raises:
        Unseen: whether anything is left cannot be seen from here.
        OSError: descriptors or memory are short, so that it cannot be said who is there.
    """
    if boot != this_machine()[0]:
        return ()  # nothing outlives a boot
    entry = Entry(boot, pid_namespace, tree_id, name, containment, None, None, cgroup)
    folder = directory()
    file = None if folder is None else path_of(folder, tree_id)
    if file is not None:
        # It knows the main process as well, and so its session.
        with (
            contextlib.suppress(OSError, ValueError),
            open(file, encoding="ascii", errors="replace") as known,
        ):
            entry = parse(known.read())
    _require_proc()
    if not pid_namespaces.is_seen(pid_namespace):
        _end_unseen(entry, seems_empty)
        if file is not None:
            forget(file)
        return ()
    _require_readable(started_by)
    return _sweep_tree(entry, file).survivors


def _require_proc() -> None:
    """Raises Unseen: there is none, or it is about others."""
    try:
        proof.check_proc()
    except OSError as error:
        proof.pass_shortage(error)
        raise Unseen(f"{error.strerror}: mount one that shows ours") from None


def _require_readable(namespace: int) -> None:
    """That what was started in this user namespace has no environment that is closed to us: from
    within another one those outside of it are (ptrace(2)). Raises Unseen."""
    if namespace in (0, user_namespace()):
        return
    hidden = _sweep.unreadable()
    if hidden:
        raise Unseen(
            f"it ran in user namespace {namespace}, and what runs as our user there may not "
            f"be looked at from here, in {user_namespace()} (process {hidden[0]}, for one)"
        )


def _end_unseen(entry: Entry, seems_empty: Callable[[], bool]) -> None:
    """By its cgroup, which is the same one for everybody who can reach it. That there is none where
    it was says nothing: other things may be mounted here than there. Raises Unseen."""
    path = entry.cgroup or ""
    named = os.path.basename(path) == cgroups.LEAF_PREFIX + entry.tree_id
    if named and os.path.isdir(path) and cgroups.end(path, CGROUP_SECONDS):
        return
    if not seems_empty():
        raise Unseen(
            f"it ran in PID namespace {entry.pid_namespace}, whose processes cannot be seen from "
            f"here, in {this_machine()[1]} (ls -l /proc/self/ns/pid), and somebody there still has "
            "its output open"
        )


def _sweep_tree(entry: Entry, file: str | None) -> Swept:
    ended, survivors = _end(entry)
    if file is not None and not survivors:
        forget(file)
    if ended or survivors:
        events.warning(
            "registry.swept",
            tree_id=entry.tree_id,
            name=entry.name,
            ended=len(ended),
            survivors=len(survivors),
        )
    return Swept(entry.tree_id, entry.name, ended, survivors)


def _sweep_entry(path: str) -> Swept | None:
    with _locked(path) as text:
        if text is None:
            return None
        try:
            entry = parse(text)
        except ValueError as error:
            events.warning("registry.unreadable", file=path, error=str(error))
            return None
        boot, namespace = this_machine()
        if entry.boot == boot and entry.pid_namespace != namespace:
            return None  # its numbers mean nothing here: it is swept by who lives where it did
        if entry.boot != boot:
            forget(path)  # nothing outlives a boot
            return None
        _require_proc()
        swept = _sweep_tree(entry, path)
    return swept if swept.ended or swept.survivors else None


def _clear_beginning(path: str) -> None:
    """An entry gets its name when it is locked and complete: its holder died before that, and so
    before it started anything."""
    with contextlib.suppress(OSError):
        if time.time() - os.lstat(path).st_mtime > STALE_SECONDS:
            os.unlink(path)


def sweep(directory: str | os.PathLike[str] | None = None) -> list[Swept]:
    """Ends the trees that lost their supervisor and their warden at once, and only those: a tree
    whose warden lives is ended by its warden.

    Args:
        directory: the registry; default is that of this user: `$XDG_RUNTIME_DIR/proctree`, else
            `/run/proctree` for root, else `proctree-UID` in the directory for temporary files.

    Returns:
        The trees of which something was left, with what was ended (SIGKILL) and what could not be.

    Raises:
        RegistryUnusable: the directory is not ours alone; or /proc is about others than those of
            our PID namespace.
    """
    path = os.fspath(directory) if directory is not None else default_directory()
    try:
        private.check(path)
        names = sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except NotPrivate as error:
        raise RegistryUnusable(str(error)) from None
    except OSError as error:
        raise RegistryUnusable(f"{path}: {errno_name(error.errno or 0)}") from None
    swept = []
    for name in names:
        file = os.path.join(path, name)
        if name.endswith("~"):
            _clear_beginning(file)
            continue
        result = _sweep_entry(file)
        if result is not None:
            swept.append(result)
    return swept
