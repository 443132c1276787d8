"""MAINPID: the process that a tree calls its main one, watched by its pidfd."""

from __future__ import annotations

from collections.abc import Callable

from proctree import events
from proctree.errors import errno_name
from proctree.loop import READ, Loop
from proctree.process import exit_status, fds, pid_namespaces, proof


class MainPid:
    """On the loop's thread.

    Args:
        loop: which watches it.
        log: for what is refused.
        is_member: whether a number is a process of the tree.
        gone: called when it has ended, with its wait status (`os.waitstatus_to_exitcode`), or with
            None where the kernel does not say.
    """

    def __init__(
        self,
        loop: Loop,
        log: events.Sparing,
        is_member: Callable[[int], bool],
        gone: Callable[[int | None], None],
    ) -> None:
        self._loop = loop
        self._log = log
        self._is_member = is_member
        self._gone: Callable[[int | None], None] | None = gone
        self._pidfd = -1
        self.pid: int | None = None
        """Our number of the one that is watched."""

    def tell(self, number: int, sender: int) -> int | None:
        """The process `sender`, which has not been reaped, calls this its main process. Returns our
        number for it; None: refused, and the one before stays.

        Raises:
            OSError: descriptors or memory are short, so that it cannot be said who that is.
        """
        why = ""
        pid: int | None = None
        try:
            pid = pid_namespaces.to_ours(number, sender)
        except OSError as error:
            proof.pass_shortage(error)
            why = f"the sender's PID namespace: {errno_name(error.errno or 0)}"
        if pid is not None and pid == self.pid and proof.holds_number(self._pidfd):
            return pid
        why = why or self._watch(pid, number, sender)
        if not why:
            return pid
        self._log.warning("notify.main_pid_refused", pid=number, sender=sender, why=why)
        return None

    def _watch(self, pid: int | None, number: int, sender: int) -> str:
        """Why not, or nothing."""
        with fds.making():
            pidfd = None if pid is None else proof.open_pidfd(pid)
            if pid is None or pidfd is None:
                return "there is no such process"
            fds.own(pidfd)
        try:
            why = self._trouble(pid, number, sender) or (
                "" if proof.holds_number(pidfd) else "it has ended"
            )
            if not why:
                self._loop.register(pidfd, READ, self._ended)
        except BaseException:
            fds.close(pidfd)
            raise
        if why:
            fds.close(pidfd)
            return why
        self._forget()
        self.pid, self._pidfd = pid, pidfd
        return ""

    def _trouble(self, pid: int, number: int, sender: int) -> str:
        """Behind the pidfd: only what is true now is about the process that it names."""
        stat = proof.read_stat(pid)
        if stat is None or stat.dead:
            return "it has ended"
        if not self._is_member(pid):
            return "it is no process of this tree"
        try:
            again = pid_namespaces.to_ours(number, sender)
        except OSError as error:
            proof.pass_shortage(error)
            again = None
        return "" if again == pid else "it has ended"

    def _ended(self, _mask: int) -> None:
        assert self.pid is not None
        status = exit_status.status_of(self.pid, self._pidfd)
        self._forget()
        if self._gone is not None:
            self._gone(status)

    def _forget(self) -> None:
        if self._pidfd >= 0:
            self._loop.unregister(self._pidfd)
            fds.close(self._pidfd)
            self._pidfd, self.pid = -1, None

    def close(self) -> None:
        """Nothing is called any more."""
        self._gone = None
        self._forget()
