"""The front door: `WatchedSubprocess` and `run`."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from proctree import command as _command
from proctree import containment as _containment
from proctree import loop as _loop
from proctree import tree as _tree
from proctree.command import Command, StrPath, Target
from proctree.containment.base import Wanted
from proctree.errors import ProctreeError, TreeFailed
from proctree.lifecycle import State
from proctree.policy import (
    KillPolicy,
    Leftovers,
    Stage,
    to_leftovers,
    to_policy,
    to_scope,
    to_seconds,
    to_signal,
)
from proctree.records import Reason
from proctree.stdio import Streams

if TYPE_CHECKING:
    from proctree.attributes import SpawnAttributes
    from proctree.channel.served import Served
    from proctree.channel.server import Server
    from proctree.containment.base import Source
    from proctree.limits import Limits
    from proctree.outcome import Outcome
    from proctree.process.snapshot import ProcessInfo
    from proctree.terminal import Terminal

DEFAULT_POLICY = KillPolicy()
DRAIN_TIMEOUT = 0.5
"""Seconds that an output stream which never ends may cost after the end of its tree."""


def _serve(channel: object, tree_id: str, name: str) -> Served | None:
    if channel is None:
        return None
    from proctree.channel.server import Server

    if not isinstance(channel, Server):
        raise TypeError(f"channel: a proctree.channel.Server, not {channel!r}")
    return channel.serve(tree_id, name)


def _limits(value: object) -> Limits | None:
    if value is None:
        return None
    from proctree.limits import to_limits

    return to_limits(value)


def _check_template(command: Command, leftovers: Leftovers) -> None:
    """What cannot be had of a template: its trees are below its own warden."""
    if not command.new_session:
        raise ValueError(
            "new_session: what a template forks is not in our session, so it cannot be a "
            "foreground job; use a function without a template"
        )
    if leftovers is Leftovers.LEAVE:
        raise ValueError(
            "leftovers: 'leave' is impossible with a template, whose warden would be left with "
            "them and end them; use a function without a template"
        )


class WatchedSubprocess:
    """A process tree that ends.

    `start` makes one; a handle made by the constructor alone is `NEW` until its `launch`, so that
    it can be handed to whoever may want to kill it before it runs.

    Every method may be called from any thread, from output callbacks and from signal handlers,
    except where it says otherwise.

    Args:
        target: the arguments of a command (the program is looked up in the PATH of `env`), or a
            callable without arguments, which runs in a forked child: it exits with status 0 when
            it returns, 1 with a traceback when it raises, and as `SystemExit` says. Or a
            `Function`, or its name as "module:function": that runs in a fresh interpreter or in a
            fork of a `Template`, with the same exit statuses.
        timeout: seconds after which the tree is ended with reason `timeout`. Default None: never.
        kill: how it is ended. Default: SIGTERM to the tree, 5 s, SIGKILL to the tree.
        cwd: the directory to start in.
        env: the whole environment; default is ours. The variable PROCTREE_TREE is added.
        stdin: None (ours), `DEVNULL`, bytes to feed, a descriptor, a file, or a path.
        stdout, stderr: None (ours), `DEVNULL`, `CAPTURE` or `Capture(...)`, `Lines(...)`,
            `Chunks(...)`, `Log(...)`, a descriptor, a file, or a path; `STDOUT` for stderr.
        containment: `"auto"`, `"pidns"`, `"cgroup"`, `"warden"` or `"group"`; docs/guarantees.md
            says what each promises. Default `"auto"`: the strongest that costs no behaviour.
        name: for `ps` and logs. Default: the name of the program or callable.
        leftovers: what becomes of processes that the main process leaves behind: `"kill"`
            (default), `"wait"` or `"leave"`.
        pass_fds: descriptors that the tree gets under the same numbers.
        drain_timeout: seconds that an output stream which something outside the tree keeps open
            may cost after the tree's end. Default 0.5.
        attributes: `SpawnAttributes`: resource limits, priorities, user and groups, umask...
        limits: `Limits` of the whole tree; needs containment `"cgroup"` and its controllers.
        pty: True, or (rows, columns): the tree gets a pseudo-terminal as its standard streams and
            as the controlling terminal of its session. `stdout` says what becomes of its output,
            bytes for `stdin` are typed into it, and `terminal` is our end.
        channel: a `proctree.channel.Server` that answers the tree's requests.
        new_session: False starts a foreground job: the main process stays in our session, in a
            process group of its own, which has our terminal while it runs if we have it. Default
            True: a session of its own.

    Raises:
        TypeError, ValueError: a bad argument, by name. Nothing was started.
        ContainmentUnavailable: the containment cannot be had here.
    """

    def __init__(
        self,
        target: Target,
        *,
        timeout: float | None = None,
        kill: KillPolicy = DEFAULT_POLICY,
        cwd: StrPath | None = None,
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        containment: str = "auto",
        name: str | None = None,
        leftovers: str = "kill",
        pass_fds: Sequence[int] = (),
        drain_timeout: float = DRAIN_TIMEOUT,
        attributes: SpawnAttributes | None = None,
        limits: Limits | None = None,
        pty: bool | tuple[int, int] = False,
        new_session: bool = True,
        channel: Server | None = None,
    ) -> None:
        tree_id = os.urandom(8).hex()
        streams = Streams(stdin, stdout, stderr, pty)
        command = _command.check(
            target,
            cwd=cwd,
            env=env,
            name=name,
            pass_fds=pass_fds,
            tree_id=tree_id,
            attributes=attributes,
            terminal=streams.has_terminal,
            new_session=new_session,
        )
        if command.terminal and not command.new_session:
            raise ValueError("new_session: a pty is the terminal of a session of its own")
        leftover_policy = to_leftovers(leftovers)
        if command.template is not None:
            _check_template(command, leftover_policy)
        wanted = Wanted(
            leave=leftover_policy is Leftovers.LEAVE,
            new_session=command.new_session,
            limits=_limits(limits),
            template=cast("Source | None", command.template),
        )
        self._served = _serve(channel, tree_id, command.name)
        self._tree = _tree.Tree(
            tree_id,
            command,
            _containment.choose(containment, wanted)(tree_id, wanted),
            streams,
            to_policy(kill, "kill"),
            leftover_policy,
            None if timeout is None else to_seconds(timeout, "timeout"),
            to_seconds(drain_timeout, "drain_timeout"),
            self._served,
        )

    @classmethod
    def start(cls, target: Target, **options: Any) -> WatchedSubprocess:
        """Starts a tree and returns when its main process runs. Takes what the class takes.

        Raises:
            FileNotFoundError, PermissionError, NotADirectoryError, OSError: it could not be
                started; as `subprocess` raises them. Nothing is left behind.
            TypeError, ValueError, ContainmentUnavailable: as the class.
        """
        handle = cls(target, **options)
        handle.launch()
        return handle

    def launch(self) -> None:
        """Starts a NEW tree and returns when its main process runs. As `start`.

        Raises:
            ProctreeError: it was launched before, or killed before it was launched.
        """
        tree = self._tree
        loop = _loop.get()
        try:
            tree.launch(loop)
            tree.started.wait()
        except ProctreeError:
            raise
        except BaseException:
            # A KeyboardInterrupt here would leave a tree that nobody has a handle to.
            self._end_quietly()
            raise
        error = self._start_error()
        if error is not None:
            # What there was of it is being cleared away.
            self._wait_out()
            raise error

    def _start_error(self) -> Exception | None:
        """Why no main process runs, when it should."""
        if self._tree.start_error is None and self._tree.contained.pid is None:
            # Killed first, or given up.
            return ProctreeError(f"tree {self.tree_id} was killed before it had started")
        return self._tree.start_error

    # -- what is known

    @property
    def tree_id(self) -> str:
        """16 hexadecimal digits; also a part of PROCTREE_TREE in the tree's environment."""
        return self._tree.tree_id

    @property
    def pid(self) -> int | None:
        """The main process, or None before it has started. It leads its session and group."""
        return self._tree.contained.pid

    @property
    def name(self) -> str:
        return self._tree.command.name

    @property
    def state(self) -> State:
        """Where the tree is in its life."""
        return self._tree.life.state

    @property
    def containment(self) -> str:
        """The backend that holds the tree: `"pidns"`, `"cgroup"`, `"warden"` or `"group"`."""
        return self._tree.contained.name

    @property
    def terminal(self) -> Terminal | None:
        """Our end of the tree's pseudo-terminal: None without `pty`, and before the start."""
        return self._tree.terminal

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None as long as it has not."""
        return self._tree.outcome

    def processes(self) -> list[ProcessInfo]:
        """A snapshot of the living processes of the tree, main process first, by psutil."""
        return self._tree.processes()

    # -- what can be done

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Waits for the end of the tree.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            The outcome; None when the time ran out first, and then nothing was done to the tree.

        Raises:
            RuntimeError: called without a timeout in an output callback of this very tree, which
                cannot end before the callback returns; or before the tree was launched.
            ProctreeError: called in a forked child.
        """
        _tree.require_owner(self._tree)
        if timeout is not None:
            timeout = to_seconds(timeout, "timeout")
        elif self._tree.worker.is_current_thread():
            raise RuntimeError(
                "wait() in an output callback of the same tree would wait for itself; "
                "kill() may be called there"
            )
        elif not self._tree.asked:
            raise RuntimeError(
                f"tree {self.tree_id} was not launched: there is nothing to wait for"
            )
        self._tree.closed.wait(timeout)
        return self._tree.outcome

    def kill(self, policy: KillPolicy | None = None, reason: str = "") -> None:
        """Asks for the end of the tree and returns at once; `wait` waits for it.

        A tree that was never launched is closed. On a tree that is ending already, a policy that
        would end it sooner takes over and everything else changes nothing.

        Args:
            policy: default is the one that the tree was made with.
            reason: for people; it becomes `Outcome.detail`.

        Raises:
            TypeError: not a KillPolicy.
            ProctreeError: called in a forked child.
        """
        if policy is not None:
            to_policy(policy, "policy")
        _tree.require_owner(self._tree)
        self._tree.kill(_loop.get(), Reason.KILLED, reason, policy)

    def signal(self, sig: int, scope: str = "group") -> None:
        """Sends one signal, once, and changes nothing else. After the end it does nothing.

        Args:
            sig: a number or `signal.Signals`.
            scope: `"main"`, `"group"` (default) or `"tree"`.

        Raises:
            ValueError, TypeError: unknown signal or scope.
            RuntimeError: the tree was not launched.
            ProctreeError: called in a forked child.
        """
        stage = Stage(to_signal(sig, "sig"), 0.0, to_scope(scope, "scope"))
        self._require_launched()
        self._tree.signal(stage)

    def freeze(self) -> None:
        """Stops every process of the tree (SIGSTOP, to a fixed point)."""
        self._require_launched()
        self._tree.set_frozen(True)

    def thaw(self) -> None:
        """Lets a frozen tree go on (SIGCONT)."""
        self._require_launched()
        self._tree.set_frozen(False)

    def notify(self, body: Any) -> None:
        """Tells the tree something unasked, over its channel: every process that is connected, or
        the first that connects. Never blocks, and may be called in a signal handler.

        Args:
            body: a message, or anything that msgpack can hold.

        Raises:
            RuntimeError: the tree has no channel.
            ChannelClosed: it has ended.
            ChannelFull: it does not read, and 1024 notifications wait for it.
            FrameTooLarge, TypeError: the body is too large, or cannot be encoded.
            ProctreeError: called in a forked child.
        """
        _tree.require_owner(self._tree)
        if self._served is None:
            raise RuntimeError(f"tree {self.tree_id} has no channel: give it channel=Server(...)")
        self._served.notify(body)

    def _require_launched(self) -> None:
        _tree.require_owner(self._tree)
        if not self._tree.asked:
            raise RuntimeError(f"tree {self.tree_id} was not launched")

    # -- leaving

    def __enter__(self) -> WatchedSubprocess:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Ends the tree and waits for the proof."""
        self.kill(reason="left the with block")
        self._wait_out()

    def _wait_out(self) -> None:
        """Waits for the end; an impatient interrupt makes it come at once, and then goes on."""
        try:
            self._tree.closed.wait()
        except BaseException:
            self.kill(KillPolicy.now())
            self._tree.closed.wait()
            raise

    def _end_quietly(self) -> None:
        self.kill(reason="interrupted")
        with contextlib.suppress(BaseException):
            self._wait_out()

    def __repr__(self) -> str:
        known = f"{self.name!r} tree {self.tree_id} pid {self.pid}"
        return f"<WatchedSubprocess {known} {self.state.value}>"


def run(argv: Target, *, check: bool = False, **options: Any) -> Outcome:
    """Runs a command, or a callable, and returns when its whole tree has ended.

    Takes what `WatchedSubprocess` takes. An exception that comes while it waits (KeyboardInterrupt,
    or what a signal handler raises) ends the tree first and then goes on.

    Args:
        check: raise `TreeFailed` unless the main process exited with status 0 by itself.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, OSError: it could not be started.
        TypeError, ValueError, ContainmentUnavailable: as `WatchedSubprocess`.
        TreeFailed: with `check`.
    """
    handle = WatchedSubprocess(argv, **options)
    tree = handle._tree
    loop = _loop.get()
    try:
        tree.launch(loop)
        tree.closed.wait()
    except BaseException:
        handle._end_quietly()
        raise
    if tree.start_error is not None:
        raise tree.start_error
    outcome = tree.outcome
    assert outcome is not None
    if check and not outcome.ok:
        raise TreeFailed(outcome)
    return outcome


def _at_exit() -> None:
    if _loop.exists():
        _tree.end_all(_loop.get())


atexit.register(_at_exit)
