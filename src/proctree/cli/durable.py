"""`proctree run --durable` and `proctree attach`: see docs/durable.md."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from proctree import durable
from proctree.cli.statuses import (
    ENDING_SIGNALS,
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    EXIT_OURS,
    exit_status,
)
from proctree.durable import FileStore, runs
from proctree.durable.wish import to_wish
from proctree.errors import ProctreeError
from proctree.policy import KillPolicy
from proctree.records import Reason
from proctree.stdio import Stdio

if TYPE_CHECKING:
    from proctree.durable import Run
    from proctree.outcome import Outcome


class _Interrupted(BaseException):
    """A signal came before there was a run that it could be about."""


class _Signals:
    """What the signals do that ask us to end: they end the run if it is ours to end and not to be
    kept, and else let go of it."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._run: Run | None = None
        self.got = 0

    def install(self) -> None:
        for signo in ENDING_SIGNALS:
            # nohup(1) and shells that start a job in the background have them ignored.
            if signal.getsignal(signo) is not signal.SIG_IGN:
                signal.signal(signo, self._handle)

    def about(self, run: Run) -> None:
        self._run = run
        if self.got:  # and what was raised was lost in some __del__
            self._handle(self.got, None)

    def _handle(self, signo: int, _frame: object) -> None:
        first, self.got = not self.got, signo
        if self._run is None:
            if first:  # another one would come out of what is done about that
                raise _Interrupted
        elif self._keep or not self._run.owned:
            self._run.detach()
        else:
            self._run.kill(reason=f"proctree got {signal.Signals(signo).name}")


def _wait_for(
    begin: Callable[[Callable[[Run], None]], Run], keep: bool, who: str
) -> tuple[int, Outcome | None]:
    """The exit status, and how it ended.

    Args:
        begin: what it calls with the handle, if it does, is told before a signal can lose it.
    """
    signals = _Signals(keep)
    try:
        signals.install()
        run = begin(signals.about)
        signals.about(run)
        outcome = run.wait()
    except _Interrupted:
        return 128 + signals.got, None
    except FileNotFoundError as error:
        print(f"{who}: {error.filename}: not found", file=sys.stderr)
        return EXIT_NOT_FOUND, None
    except OSError as error:
        print(f"{who}: {error.filename or 'cannot start'}: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_EXECUTABLE if error.filename else EXIT_OURS, None
    except (TypeError, ValueError, ProctreeError) as error:
        print(f"{who}: {error}", file=sys.stderr)
        return EXIT_OURS, None
    assert outcome is not None
    for member in outcome.survivors:
        print(f"{who}: pid {member.pid} ({member.name}) {member.why}", file=sys.stderr)
    if outcome.reason is Reason.DETACHED:
        print(f"{who}: detached; it runs on (pid {run.pid})", file=sys.stderr)
        return 128 + signals.got, outcome
    return exit_status(outcome), outcome


def run(
    options: Namespace, command: list[str], special: dict[str, Any]
) -> tuple[int, Outcome | None]:
    """`proctree run --durable`; returns the exit status, and how it ended."""

    def begin(made: Callable[[Run], None]) -> Run:
        wish = to_wish(
            options.durable,
            command,
            allowed=options.allowed or (0,),
            lease=options.lease,
            same_target=not options.any_target,
            logs=Stdio.INHERIT,
            timeout=options.timeout,
            kill=KillPolicy.after(options.grace),
            containment=options.containment,
            leftovers=options.leftovers,
            name=options.name,
            **special,
        )
        return runs.begin(wish._replace(keep=options.keep, made=made), FileStore(options.store))

    return _wait_for(begin, options.keep, "proctree run")


def attach(arguments: Sequence[str]) -> int:
    """`proctree attach`; returns the exit status."""
    parser = ArgumentParser(
        prog="proctree attach",
        description="Goes on with the output of a durable run where the last reader stopped, and "
        "waits for its end. SIGINT, SIGTERM, SIGHUP and SIGQUIT only let go of it.",
        epilog="Exit status: that of the run, as of 'proctree run'; 128+N when signal N let go of "
        "it; 125 if there is nothing to attach to.",
    )
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("--store", metavar="DIR", help="where the records are")
    options = parser.parse_args(arguments)
    status, _outcome = _wait_for(
        lambda _made: durable.attach(options.key, logs=Stdio.INHERIT, store=options.store),
        True,
        "proctree attach",
    )
    return status
