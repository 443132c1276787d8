"""Our own cgroup in the cgroup2 hierarchy, and what may be made below it.

cgroups(7) and Documentation/admin-guide/cgroup-v2.rst of the kernel say what the files mean;
systemd's "Control Group APIs and Delegation" says whose they are: a cgroup that a manager owns has
one writer, the manager, unless it has delegated it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

from proctree.errors import ContainmentUnavailable, errno_name

LEAF_PREFIX = "proctree-"

CONTROLLERS = {"memory.max": "memory", "pids.max": "pids", "cpu.max": "cpu"}
"""Which controller a limit's file belongs to."""

_UNITS = (".service", ".scope", ".slice", ".socket", ".mount", ".swap")
_MARKS = ("user.delegate", "trusted.delegate")
_SYSTEMD = "/run/systemd/system"
"""sd_booted(3): this directory is there when systemd is the manager of the machine."""


class Mount(NamedTuple):
    """A mounted cgroup2 hierarchy: the cgroup that is its root, and where it is mounted."""

    root: str
    point: str


def _unescape(field: str) -> str:
    """mountinfo writes blank, tab, newline and backslash in octal: proc_pid_mountinfo(5)."""
    return field.encode("latin-1", "backslashreplace").decode("unicode_escape")


def _lines(text: str) -> list[str]:
    """A path may hold what else str.splitlines() takes for the end of a line."""
    return text.split("\n")


def parse_mounts(mountinfo: str) -> list[Mount]:
    """The cgroup2 mounts in the text of /proc/self/mountinfo, in their order."""
    mounts = []
    for line in _lines(mountinfo):
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if separator and len(fields) >= 6 and after.split(" ")[0] == "cgroup2":
            mounts.append(Mount(_unescape(fields[3]), _unescape(fields[4])))
    return mounts


def parse_own(text: str) -> str | None:
    """Our path in the cgroup2 hierarchy, from the text of /proc/self/cgroup; None without one."""
    for line in _lines(text):
        if line.startswith("0::"):
            return line[3:]
    return None


def parse_v1_controllers(text: str) -> set[str]:
    """The controllers that the hierarchies of cgroup v1 hold, from /proc/self/cgroup."""
    held: set[str] = set()
    for line in _lines(text):
        number, _, rest = line.partition(":")
        if rest and number != "0":
            held.update(rest.partition(":")[0].split(","))
    return held


def resolve(mounts: list[Mount], own: str) -> tuple[str, str] | None:
    """Where our own cgroup is in the file system, and the mount point above it. A cgroup namespace
    shows what is outside of it as /.., and that cannot be reached."""
    for root, point in mounts:
        prefix = root.rstrip("/")
        if ".." not in own.split("/") and (own == prefix or own.startswith(prefix + "/")):
            return (point.rstrip("/") + own[len(prefix) :]).rstrip("/") or "/", point
    return None


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class Home(NamedTuple):
    """Our own cgroup: its directory, and the mount point that it is under."""

    path: str
    mount: str


def _read_proc(path: str) -> str:
    try:
        return _read(path)
    except OSError as error:
        text = f"{path} is not readable ({errno_name(error.errno or 0)})"
        raise ContainmentUnavailable(text) from None


def own_path() -> str | None:
    """Our own cgroup in the hierarchy, as the kernel calls it; None without cgroup2.

    Raises:
        ContainmentUnavailable: it cannot be read.
    """
    return parse_own(_read_proc("/proc/self/cgroup"))


def find_home(own: str | None) -> Home:
    """The cgroup `own` (see `own_path`) in the file system.

    Raises:
        ContainmentUnavailable: there is none that can be reached; says why.
    """
    mounts = parse_mounts(_read_proc("/proc/self/mountinfo"))
    if own is None or not mounts:
        raise ContainmentUnavailable("no cgroup2 hierarchy is mounted")
    found = resolve(mounts, own)
    if found is None:
        raise ContainmentUnavailable(f"our own cgroup {own} is outside of what is mounted here")
    return Home(*found)


def trouble(home: Home) -> str | None:
    """Why no tree can be held below `home`, or None."""
    kind = "domain"
    with contextlib.suppress(OSError):  # the root has no such file, and is a domain
        kind = _read(f"{home.path}/cgroup.type").strip()
    if kind != "domain":
        return f"the cgroup {home.path} is of the type '{kind}', which holds no processes below it"
    for path in (home.path, f"{home.path}/cgroup.procs"):
        # For processes to move below it, the common ancestor must be writable too: cgroup-v2.rst,
        # "Delegation Containment".
        if not os.access(path, os.W_OK):
            return f"{path} is not writable for us"
    return None


def _marked(path: str) -> bool:
    for name in _MARKS:
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def delegated(home: Home, *, managed: bool | None = None) -> bool:
    """Whether the manager of this machine leaves our own cgroup to us: it bears the mark, or is
    below one that does with no unit of systemd in between; or nobody manages anything here.

    Args:
        managed: whether systemd is in charge; default: look.
    """
    if managed is None:
        managed = os.path.isdir(_SYSTEMD)
    path = home.path
    while not _marked(path):
        if path == home.mount:
            return not managed
        if path.endswith(_UNITS):
            return False
        path = os.path.dirname(path)
    return True


# -- limits


def _words(path: str) -> set[str]:
    try:
        return set(_read(path).split())
    except OSError:
        return set()


def _missing(home: str, controller: str) -> str:
    if controller in parse_v1_controllers(_read("/proc/self/cgroup")):
        return (
            f"the controller {controller!r} is held by a cgroup v1 hierarchy: boot with "
            f"cgroup_no_v1={controller}, or with cgroup v2 alone"
        )
    return (
        f"the controller {controller!r} is not delegated to {home}: put Delegate=yes into the "
        f"unit, or write +{controller} into the cgroup.subtree_control of the cgroups above it"
    )


def _enable(path: str, wanted: set[str]) -> None:
    missing = wanted - _words(f"{path}/cgroup.subtree_control")
    if missing:
        _write(f"{path}/cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(missing)))


def home_for(home: Home, wanted: set[str]) -> str:
    """The cgroup below which a leaf with these controllers can be made: our own, or the one above
    it when that is delegated to us too, since a cgroup with processes of its own cannot give
    controllers to those below it (cgroup-v2.rst, "No Internal Process Constraint").

    Raises:
        ContainmentUnavailable: names the controller, and says how to delegate it.
    """
    for controller in sorted(wanted):
        if controller not in _words(f"{home.path}/cgroup.controllers"):
            raise ContainmentUnavailable(f"limits: {_missing(home.path, controller)}")
    candidates = [home.path]
    above = os.path.dirname(home.path)
    if home.path != home.mount and delegated(Home(above, home.mount)):
        candidates.append(above)
    busy = ""
    for path in candidates:
        try:
            _enable(path, wanted)
        except OSError as error:
            busy = f"{path}/cgroup.subtree_control: {errno_name(error.errno or 0)}"
        else:
            return path
    raise ContainmentUnavailable(
        f"limits: the controllers {', '.join(sorted(wanted))} cannot be enabled ({busy}): "
        f"{home.path} has processes of its own, this one among them. Start the supervisor in a "
        "cgroup below the delegated one (systemd: DelegateSubgroup=supervisor)"
    )


# -- what is left of a tree when nothing else holds it


def _populated(events_fd: int) -> bool:
    return b"populated 1" in os.pread(events_fd, 256, 0)


def _members(path: str) -> Iterator[int]:
    # Not os.walk, which recurses up to Python 3.11: a tree may nest a thousand cgroups.
    left = [path]
    while left:
        folder = left.pop()
        for word in _words(f"{folder}/cgroup.procs"):
            yield int(word)
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            left += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _kill_members(path: str) -> None:
    """For kernels without cgroup.kill (before 5.14): by pidfd, and only who is in there still."""
    for pid in _members(path):
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if pid in _members(path):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def _wait_unpopulated(events_fd: int, seconds: float) -> bool:
    """cgroup.events reports a change by POLLPRI to those who have read it."""
    end = time.monotonic() + seconds
    poller = select.poll()
    poller.register(events_fd, select.POLLPRI)
    while _populated(events_fd):
        left = end - time.monotonic()
        if left <= 0:
            return False
        poller.poll(left * 1000)
    return True


def pids_in(path: str) -> list[int]:
    """The processes in a cgroup and below it; none when it is gone."""
    return list(_members(path))


def holds(path: str, pid: int) -> bool:
    """Whether the process is in the cgroup `path`, or below it."""
    try:
        own = parse_own(_read(f"/proc/{pid}/cgroup"))
        found = None if own is None else resolve(parse_mounts(_read("/proc/self/mountinfo")), own)
    except OSError:
        return False
    return found is not None and (found[0] == path or found[0].startswith(path + "/"))


_GONE = (errno.ENOENT, errno.ENODEV)
AGAIN_SECONDS = 0.02
"""After which what failed for want of descriptors or memory is tried again."""


def end(path: str, seconds: float) -> bool:
    """SIGKILL to all that is in the cgroup `path` and below it, and its removal. Returns whether it
    is gone; after `seconds` it is given up."""
    limit = time.monotonic() + seconds
    while True:
        try:
            if _end(path, limit):
                return True
        except OSError as error:
            if error.errno in _GONE:
                return True
        if time.monotonic() >= limit:
            return False
        time.sleep(AGAIN_SECONDS)


def _end(path: str, limit: float) -> bool:
    events_fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _write(f"{path}/cgroup.kill", "1")
        except OSError:
            _kill_members(path)
        if not _wait_unpopulated(events_fd, min(0.2, max(0.0, limit - time.monotonic()))):
            return False
    finally:
        os.close(events_fd)
    return remove(path)


def evacuate(path: str, seconds: float) -> bool:
    """Lets go of what is in the cgroup `path` and below it, into the cgroup above, where it would
    be without us, and removes it; what was frozen goes on. Returns whether the kernel is one that
    freezes cgroups.

    Raises:
        OSError: somebody may not be moved, and stays there.
        TimeoutError: somebody is still there after so many seconds.
    """
    freezes = _thaw(path)
    limit = time.monotonic() + seconds
    while not _evacuated(path):
        if time.monotonic() >= limit:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path)
    return freezes


def _thaw(path: str) -> bool:
    """Before anybody is moved: what cannot be moved shall not stay frozen."""
    try:
        _write(f"{path}/cgroup.freeze", "0")
    except OSError:
        # One that is gone was left before, and so thawed; before Linux 5.2 there is no such file.
        return not os.path.isdir(path)
    return True


def _evacuated(path: str) -> bool:
    """One round of it."""
    above = f"{os.path.dirname(path)}/cgroup.procs"
    for pid in _members(path):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            _write(above, str(pid))
    try:
        events_fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE:
            return True
        raise
    try:
        gone = _wait_unpopulated(events_fd, AGAIN_SECONDS)
    except OSError as error:
        gone = error.errno in _GONE
    finally:
        os.close(events_fd)
    return gone and remove(path)


def _folders(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _remove_below(top: int) -> None:
    """By descriptors, and with one of them open: a nest may be deeper than a path may be long.
    What cannot be removed is somebody's home again, and stays."""
    at = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=top)
    left: list[str] = []  # the names on the way down
    try:
        while True:
            for name in _folders(at):
                try:
                    os.rmdir(name, dir_fd=at)
                except OSError:
                    left.append(name)
                    break
            else:
                if not left:
                    return
                name = ".."
            below = os.open(
                name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at
            )
            os.close(at)
            at = below
            if name == "..":
                os.rmdir(left.pop(), dir_fd=at)
    finally:
        os.close(at)


def remove(path: str) -> bool:
    """Removes an empty cgroup and those below it."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                _remove_below(fd)
        finally:
            os.close(fd)
        os.rmdir(path)
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    return False
