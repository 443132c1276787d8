"""A template: a process that has imported what functions need, and forks them.

To start a Python program is mostly to import its modules. A template does that once. It is a small
process with one thread, so that a fork of it is quick and safe, however large its supervisor is and
however many threads that has.

The template is a tree of its own (containment/template.py), and what runs in it is
containment/forkserver.py. Here is the supervisor's side: all of it on the loop's thread, which
never waits for a template, except what says otherwise.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import pickle
import socket
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from proctree import command as _command
from proctree import events
from proctree import loop as _loop
from proctree.command import StrPath
from proctree.containment.base import Child, Request
from proctree.containment.forkserver import (
    DESCRIPTORS_MOST,
    HEADER,
    OTHERS,
    TEXT_MOST,
    Kind,
    Order,
)
from proctree.containment.template import TemplateContained
from proctree.errors import ProctreeError, TemplateFailed, start_error
from proctree.functions import ForkServer, Function
from proctree.latch import Latch
from proctree.loop import READ, Loop
from proctree.policy import KillPolicy, Leftovers, Stage
from proctree.process import fds
from proctree.records import Reason
from proctree.stdio import Stdio, Streams
from proctree.tree import Tree

PASSED_MOST = DESCRIPTORS_MOST - 1 - OTHERS - 3

SEND_AGAIN_SECONDS = 0.02
"""How often a request is sent again for which the kernel had no room. Nothing tells when it has:
how many descriptors may be under way is counted for each user (unix(7), ETOOMANYREFS)."""

_NO_ROOM = (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)

_ORPHANED = KillPolicy((Stage(9, 1.0, "main"), Stage(9, 5.0)))
"""The template has nothing to finish: what it forked has wardens of its own."""

_CLOSING = KillPolicy((Stage(18, 5.0, "main"), Stage(9, 1.0, "main"), Stage(9, 5.0)))
"""It ends by itself when it has read what it was asked before: SIGCONT, should it be stopped."""


class _Process:
    """One process of a template, from its start to its end."""

    def __init__(self, template: Template, loop: Loop) -> None:
        self._template = template
        self._name = template.name
        self._loop = loop
        with fds.making():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            self._sock: socket.socket | None = ours
            fds.own(ours.fileno())
            self._theirs = fds.own(fds.above_stdio(theirs.detach()))
        self._serial = 0
        self._asked: dict[int, Child] = {}
        self._forked: dict[int, Child] = {}
        self._unsent: deque[tuple[int, bytes, list[int]]] = deque()
        self._tree: Tree | None = None
        self._why = ""
        self._over = False
        self._closing = False
        self._deaf = False
        self.error: Exception | None = None
        """Why it has ended, once `settled` is set."""
        self.settled = Latch()
        """It has imported everything, or has ended."""
        self.over = Latch()
        """It has ended."""
        self.closed = Latch()
        """It has ended, and with it all that its modules had started."""
        loop.register(ours.fileno(), READ, self._readable)
        loop.post(self._launch)

    @property
    def pid(self) -> int | None:
        return None if self._tree is None or self._over else self._tree.pid

    # -- its beginning

    def _launch(self) -> None:
        try:
            tree = self._tree = self._make_tree()
        except Exception as error:
            self._close_theirs()
            self._end(error)
            self.closed.set()
            return
        tree.launch(self._loop)
        self._loop.post(self._launched)

    def _make_tree(self) -> Tree:
        tree_id = os.urandom(8).hex()
        template = self._template
        main = "proctree.containment.forkserver:serve"
        command = _command.check(
            Function(main, (self._theirs, template.preload)),
            cwd=template.cwd,
            env=template.env,
            name=f"template {template.name}",
            pass_fds=[self._theirs],
            tree_id=tree_id,
        )
        contained = TemplateContained(tree_id, self._ended)
        streams = Streams(Stdio.DEVNULL, None, None)
        return Tree(
            tree_id, command, contained, streams, _ORPHANED, Leftovers.KILL, None, 0.5, None
        )

    def _launched(self) -> None:
        self._close_theirs()
        assert self._tree is not None
        if self._tree.start_error is not None:
            self._ended(None)
        elif self._closing:
            self.close()

    def _close_theirs(self) -> None:
        if self._theirs >= 0:
            fds.close(self._theirs)
            self._theirs = -1

    # -- its end

    def _ended(self, status: int | None) -> None:
        """Its process has ended (`status`), or its tree is closed (None), whichever comes first;
        and then the other one."""
        if not self._over:
            while self._read_once():
                pass  # what it said last comes before its end
            self._end(self._reason(status))
        if status is None:
            self.closed.set()
        elif self._tree is not None:
            # What its modules have started has no reason any more.
            self._tree.kill(self._loop, Reason.KILLED, "the template has ended", KillPolicy.now())

    def _reason(self, status: int | None) -> Exception:
        tree = self._tree
        if self._why:
            text = self._why
        elif status is not None:
            code = os.waitstatus_to_exitcode(status)
            text = f"it was ended by signal {-code}" if code < 0 else f"it exited with {code}"
        elif tree is not None and tree.start_error is not None:
            text = f"it could not be started: {tree.start_error}"
        else:
            text = "its warden was lost"
        return TemplateFailed(f"template {self._name!r}: {text}")

    def _end(self, error: Exception) -> None:
        self._over = True
        self._template.without(self)
        self._template.processes.discard(self)
        self._drop_socket()
        self.error = error
        self.settled.set()
        asked, self._asked = self._asked, {}
        for _, _, passed in self._unsent:
            _close_all(passed)
        self._unsent.clear()
        for child in asked.values():
            child.stillborn(TemplateFailed(str(error)))
        for child in tuple(self._forked.values()):
            child.reaper_lost()
        self.over.set()

    def _drop_socket(self) -> None:
        if self._sock is not None:
            self._loop.unregister(self._sock.fileno())
            fds.close(self._sock.detach())
            self._sock = None

    def _lost_touch(self) -> None:
        """It has closed its socket, and is about to end if it has not. Who asks from now on asks
        another one."""
        if self._deaf:
            return
        self._deaf = True
        self._template.without(self)
        if self._sock is not None:
            self._loop.unregister(self._sock.fileno())
        if self._tree is not None and not self._over:
            detail = "the template has closed its socket"
            self._tree.kill(self._loop, Reason.KILLED, detail, _ORPHANED)

    def close(self) -> None:
        """It does what it was asked before, and ends."""
        self._closing = True
        self._template.without(self)
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        if self._tree is not None and not self._over:
            # Nobody can say when, or whether, an import comes back.
            policy = _CLOSING if self.settled.is_set() else _ORPHANED
            self._tree.kill(self._loop, Reason.KILLED, "the template was closed", policy)
            self._why = self._why or "it was closed"

    @property
    def has_trees(self) -> bool:
        return bool(self._forked)

    def forget_in_fork(self) -> None:
        """The descriptor is closed, and its number may be somebody else's."""
        if self._sock is not None:
            self._sock.detach()
            self._sock = None

    # -- asking it

    def ask(self, request: Request, child: Child) -> None:
        """As `Source.ask`."""
        descriptors, made = _descriptors(request, self._template.watch())
        try:
            serial = self._serial + 1
            header = HEADER.pack(Kind.FORK, serial, len(descriptors))
            if self._unsent or not self._send(header, descriptors):
                self._put_off(serial, header, descriptors)
            self._serial = serial
            self._asked[serial] = child
        finally:
            _close_all(made)

    def _send(self, header: bytes, descriptors: list[int]) -> bool:
        """False: there is no room now.

        Raises:
            BrokenPipeError, ConnectionResetError: it has gone.
        """
        if self._sock is None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        try:
            # Not socket.send_fds: it takes flags and drops them.
            rights = array.array("i", descriptors)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            self._sock.sendmsg([header], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return False
        return True

    def _put_off(self, serial: int, header: bytes, descriptors: list[int]) -> None:
        copies: list[int] = []
        try:
            for fd in descriptors:
                copies.append(fds.own(fds.above_stdio(os.dup(fd))))
        except OSError:
            _close_all(copies)
            raise
        self._unsent.append((serial, header, copies))
        if len(self._unsent) == 1:
            self._loop.call_later(SEND_AGAIN_SECONDS, self._send_again)

    def _send_again(self) -> None:
        while self._unsent:
            serial, header, descriptors = self._unsent[0]
            try:
                if serial in self._asked and not self._send(header, descriptors):
                    self._loop.call_later(SEND_AGAIN_SECONDS, self._send_again)
                    return
            except (BrokenPipeError, ConnectionResetError):
                return  # its end is on its way, and tells everybody
            _close_all(self._unsent.popleft()[2])

    def forget(self, child: Child) -> None:
        """As `Source.forget`."""
        for serial, waiting in tuple(self._asked.items()):
            if waiting is child:
                del self._asked[serial]

    # -- what it says

    def _readable(self, _mask: int) -> None:
        for _ in range(64):
            if not self._read_once():
                return

    def _read_once(self) -> bool:
        if self._sock is None:
            return False
        room = socket.CMSG_SPACE(array.array("i").itemsize)
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        try:
            with fds.making():
                data, ancillary, _, _ = self._sock.recvmsg(HEADER.size + TEXT_MOST, room, flags)
                received = [fd for _, _, piece in ancillary for fd in array.array("i", piece)]
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True  # told once, and ahead of what it had said
        if not data:
            self._lost_touch()
            return False
        kind, serial, number = HEADER.unpack_from(data)
        if kind == Kind.BORN:
            self._take_born(serial, number, received)
        elif kind == Kind.UNBORN and (child := self._asked.pop(serial, None)) is not None:
            child.stillborn(start_error(number, "fork", f"template {self._name!r}", None))
        elif kind == Kind.REAPED and (child := self._forked.pop(serial, None)) is not None:
            child.reaped()
        elif kind == Kind.READY:
            if number > 1:
                events.warning("template.threads", template=self._name, threads=number)
            self.settled.set()
        elif kind == Kind.FAILED:
            self._why = data[HEADER.size :].decode("utf-8", "replace")
        return True

    def _take_born(self, serial: int, pid: int, received: list[int]) -> None:
        child = self._asked.pop(serial, None)
        if child is None:
            _close_all(received)  # given up meanwhile: it finds nobody, and ends
        elif not received:
            # We have no descriptor left for it.
            child.stillborn(start_error(errno.EMFILE, "pidfd", f"template {self._name!r}", None))
        else:
            self._forked[serial] = child
            child.born(pid, received[0])


def _close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        fds.close(fd)


def _descriptors(request: Request, watch: int) -> tuple[list[int], list[int]]:
    """Those to send, as `Order` says, and those of them that were made for it.

    Raises:
        OSError: there is no room for them.
    """
    others: list[int] = []
    stdio: list[int | None] = []
    for target, wanted in enumerate(request.stdio):
        fd = target if wanted is None else wanted
        stdio.append(OTHERS + len(others) if _is_open(fd) else None)
        others += [fd] if stdio[-1] is not None else []
    first = OTHERS + len(others)
    passed = request.command.pass_fds
    order = Order(
        request.command._replace(template=None),
        request.birth,
        request.warden,
        request.arguments,
        (stdio[0], stdio[1], stdio[2]),
        tuple((first + index, number) for index, number in enumerate(passed)),
    )
    made: list[int] = []
    try:
        made.append(fds.memory(pickle.dumps(order)))
        made.append(fds.above_stdio(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)))
    except OSError:
        _close_all(made)
        raise
    return [made[0], request.control, watch, made[1], *others, *passed], made


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Template(ForkServer):
    """A process that has imported `preload`, from which a `Function` is forked.

    It is started at its first use, or by `start`, and started again at the next use when it has
    ended. Trees and threads without number may use it. What they start are trees like any other,
    with a warden each; how the template ends does not concern them.

    Every method may be called from any thread, but not in a signal handler.

    Args:
        preload: names of modules to import. None of them needs to be that of the function.
        env: its whole environment; default is ours. That of a tree is what the tree was given.
        cwd: the directory to import them in; default is ours.
        name: for `ps` and logs. Default: the modules.

    Raises:
        TypeError, ValueError: a bad argument, by name. Nothing was started.
    """

    def __init__(
        self,
        preload: Iterable[str] = (),
        *,
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        cwd: StrPath | None = None,
        name: str | None = None,
    ) -> None:
        self.preload = _to_preload(preload)
        self.env = env
        self.cwd = cwd
        # What is wrong is said now, and not at the first use.
        checked = _command.check(["template"], cwd=cwd, env=env, name=name, pass_fds=(), tree_id="")
        self.name = checked.name if name is not None else ", ".join(self.preload) or "template"
        self._process: _Process | None = None
        self.processes: set[_Process] = set()
        self._closed = False
        self._watch = -1
        _templates.add(self)

    @property
    def pid(self) -> int | None:
        """Of its process; None when there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Starts it if it does not run, and returns when it has imported its modules.

        Raises:
            TemplateFailed: it could not; says why.
            ProctreeError: it is closed.
            OSError: there are no descriptors for it.
        """
        loop = _loop.get()
        begun = Latch()
        result: list[_Process | Exception] = []

        def begin() -> None:
            try:
                result.append(self._running(loop))
            except Exception as error:
                result.append(error)
            begun.set()

        loop.post(begin)
        begun.wait()
        process = result[0]
        if isinstance(process, Exception):
            raise process
        process.settled.wait()
        if process.error is not None:
            raise TemplateFailed(str(process.error))

    def close(self) -> None:
        """Ends its process, and what its modules have started. The trees that it started live on;
        those that it is asked for already are started, unless it is still importing. It cannot be
        used any more. Returns when the process has ended."""
        self._closed = True
        if not _loop.exists():
            return
        loop = _loop.get()
        asked = Latch()
        found: list[_Process] = []

        def end() -> None:
            process = self._process
            if process is not None:
                found.append(process)
                process.close()
            if self._watch >= 0:
                fds.close(self._watch)
                self._watch = -1
            asked.set()

        loop.post(end)
        asked.wait()
        for process in found:
            process.over.wait()
            if not process.has_trees:
                process.closed.wait()

    def __enter__(self) -> Template:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Template {self.name!r} pid {self.pid}>"

    # -- on the loop

    def _running(self, loop: Loop) -> _Process:
        if self._closed:
            raise ProctreeError(f"template {self.name!r} is closed")
        if self._process is None:
            self._process = _Process(self, loop)
            self.processes.add(self._process)
            self.watch()
        return self._process

    def watch(self) -> int:
        """A pidfd of ourselves, for the wardens that are not our children."""
        if self._watch < 0:
            self._watch = fds.own(fds.above_stdio(os.pidfd_open(os.getpid())))
        return self._watch

    def ask(self, request: Request, child: Child) -> None:
        """As `Source.ask`."""
        if len(request.command.pass_fds) > PASSED_MOST:
            raise ValueError(f"pass_fds: at most {PASSED_MOST} with a template")
        loop = _loop.get()
        try:
            self._running(loop).ask(request, child)
        except (BrokenPipeError, ConnectionResetError):
            # It has died, and we have not heard of it yet.
            self._process = None
            self._running(loop).ask(request, child)

    def forget(self, child: Child) -> None:
        """As `Source.forget`."""
        for process in tuple(self.processes):
            process.forget(child)

    def without(self, process: _Process) -> None:
        """Whoever asks from now on asks another one."""
        if self._process is process:
            self._process = None

    def forget_in_fork(self) -> None:
        """In a forked child: it is its parent's."""
        for process in self.processes:
            process.forget_in_fork()
        self.processes.clear()
        self._process = None
        self._watch = -1


def _to_preload(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"preload: names of modules, not {value!r}")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"preload: the name of a module, not {name!r}")
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"preload: {name!r} is not the name of a module")
        if name == "__main__":
            raise ValueError("preload: another interpreter cannot import __main__")
    return names


_templates: weakref.WeakSet[Template] = weakref.WeakSet()


def _forget() -> None:
    for template in tuple(_templates):
        template.forget_in_fork()


fds.in_forked_child(_forget)
