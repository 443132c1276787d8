"""`proctree run`: a command under supervision, with the exit statuses of timeout(1)."""

from __future__ import annotations

import contextlib
import signal
import sys
from argparse import REMAINDER, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from proctree.cli.statuses import (
    ENDING_SIGNALS,
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    EXIT_OURS,
    exit_status,
)
from proctree.containment import NAMES
from proctree.errors import ProctreeError
from proctree.policy import KillPolicy, Leftovers
from proctree.records import Ending, Reason
from proctree.watched import WatchedSubprocess

if TYPE_CHECKING:
    from proctree.outcome import Outcome

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _bytes(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 0)
    return int(text[:-1]) * unit if unit else int(text)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse exits with 2, which could be the command's own.
        self.print_usage(sys.stderr)
        print(f"proctree run: {message}", file=sys.stderr)
        sys.exit(EXIT_OURS)


def _parser() -> ArgumentParser:
    parser = _Parser(
        # With a width of its own: to find the terminal's, argparse imports half of the library.
        formatter_class=lambda prog: HelpFormatter(prog, width=100),
        prog="proctree run",
        usage="proctree run [OPTIONS] -- COMMAND [ARGUMENT...]",
        description="Runs a command and ends its whole process tree with it.",
        epilog="Exit status: the command's own; 128+N if signal N ended it; 124 after a time-out; "
        "125 if proctree failed; 126 if the command cannot be executed; 127 if it is not found.",
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="end the tree after S seconds")
    parser.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds between SIGTERM and SIGKILL (default: 5)",
    )
    parser.add_argument(
        "--containment", default="auto", metavar="NAME", help="auto, " + ", ".join(NAMES)
    )
    parser.add_argument(
        "--leftovers",
        default="kill",
        choices=[str(policy) for policy in Leftovers],
        help="what becomes of processes that the command leaves behind (default: kill)",
    )
    parser.add_argument(
        "--pty", action="store_true", help="give the command a terminal of its own, under ours"
    )
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="run it as a job of this shell's session, with this terminal",
    )
    parser.add_argument("--memory-max", type=_bytes, metavar="BYTES", help="limit, K, M, G allowed")
    parser.add_argument("--pids-max", type=int, metavar="N", help="limit of processes and threads")
    parser.add_argument("--cpu-max", type=float, metavar="CPUS", help="limit of CPU time, as 1.5")
    parser.add_argument("--name", help="for ps and logs (default: the command's name)")
    parser.add_argument("--json", metavar="FILE", help="write how it ended to FILE")
    _add_durable(parser)
    # Everything from the command on is the command's, whatever it looks like.
    parser.add_argument("command", nargs=REMAINDER, metavar="COMMAND")
    return parser


def _add_durable(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--durable",
        metavar="KEY",
        help="a durable run: it outlives us, and who runs the same KEY again reconnects to it",
    )
    durable = parser.add_argument_group("with --durable")
    durable.add_argument(
        "--lease",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that it lives on without us (default: 60)",
    )
    durable.add_argument("--store", metavar="DIR", help="where its records are")
    durable.add_argument(
        "--allowed",
        type=int,
        action="append",
        metavar="N",
        help="an exit status that counts as finished; may be repeated (default: 0)",
    )
    durable.add_argument(
        "--keep",
        action="store_true",
        help="a signal that ends us leaves it running instead of ending it",
    )
    durable.add_argument(
        "--any-target", action="store_true", help="reconnect even if KEY had another command"
    )


def _write_json(path: str, outcome: Outcome) -> None:
    import json

    with open(path, "w", encoding="utf-8") as file:
        json.dump(outcome.as_dict(), file, indent=2)
        file.write("\n")


def _complain(text: str) -> None:
    print(f"proctree run: {text}", file=sys.stderr)


def _options(options: Namespace) -> dict[str, Any]:
    """What is imported only for those who ask for it."""
    special: dict[str, Any] = {}
    limits = {
        name: value
        for name in ("memory_max", "pids_max", "cpu_max")
        if (value := getattr(options, name)) is not None
    }
    if limits:
        from proctree.limits import Limits

        special["limits"] = Limits(**limits)
    if options.pty:
        from proctree.cli.terminal import write_out
        from proctree.sinks import Chunks

        special |= {"pty": True, "stdout": Chunks(write_out)}
    if options.foreground:
        special["new_session"] = False
    return special


@contextlib.contextmanager
def _terminal(handle: WatchedSubprocess, options: Namespace) -> Iterator[Callable[[], None]]:
    """Gives what is to be called when the command runs."""
    if options.foreground:
        from proctree.cli.terminal import Job

        Job(handle)
    if not options.pty:
        yield lambda: None
        return
    from proctree.cli.terminal import Relay

    relay = Relay()
    try:
        relay.prepare()
        yield lambda: relay.begin(handle)
    finally:
        relay.end()


def _supervise(handle: WatchedSubprocess, launched: Callable[[], None]) -> Ending:
    def end(signo: int, _frame: object) -> None:
        name = signal.Signals(signo).name
        handle.kill(reason=f"proctree got {name}")

    for signo in ENDING_SIGNALS:
        # nohup(1) and shells that start a job in the background have them ignored: so it stays.
        if signal.getsignal(signo) is not signal.SIG_IGN:
            signal.signal(signo, end)
    handle.launch()
    launched()
    # Not `wait`: its Outcome is not needed unless somebody wants the JSON, and importing what it is
    # made of would take longer than everything else here.
    tree = handle._tree
    tree.closed.wait()
    assert tree.ending is not None
    return tree.ending


def _durable(parser: ArgumentParser, options: Namespace, command: list[str]) -> int:
    for name in ("pty", "foreground"):
        if getattr(options, name):
            parser.error(f"--{name}: a durable run outlives our terminal")
    from proctree.cli import durable

    status, outcome = durable.run(options, command, _options(options))
    return _report(options, status, outcome)


def _report(options: Namespace, status: int, outcome: Outcome | None) -> int:
    if options.json and outcome is not None:
        try:
            _write_json(options.json, outcome)
        except OSError as error:
            _complain(f"--json {options.json}: {error.strerror}")
            return EXIT_OURS
    return status


def main(arguments: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command was given")
    if options.durable is not None:
        return _durable(parser, options, command)
    try:
        handle = WatchedSubprocess(
            command,
            timeout=options.timeout,
            kill=KillPolicy.after(options.grace),
            containment=options.containment,
            leftovers=options.leftovers,
            name=options.name,
            **_options(options),
        )
    except (TypeError, ValueError, ProctreeError) as error:
        _complain(str(error))
        return EXIT_OURS
    status = EXIT_OURS
    try:
        with _terminal(handle, options) as launched:
            ending = _supervise(handle, launched)
        status = exit_status(ending)
        for member in ending.survivors:
            _complain(f"pid {member.pid} ({member.name}) {member.why}")
    except FileNotFoundError as error:
        _complain(f"{error.filename}: not found")
        status = EXIT_NOT_FOUND
    except OSError as error:
        # Without a file name it is not the command's fault: out of descriptors, or of processes.
        _complain(f"{error.filename or 'cannot start'}: {error.strerror}")
        status = EXIT_NOT_EXECUTABLE if error.filename else EXIT_OURS
    except ProctreeError as error:
        ended = handle._tree.ending
        if ended is None or ended.reason is not Reason.KILLED:
            _complain(str(error))
    # Its Outcome is not even made unless somebody wants it.
    return _report(options, status, handle.outcome if options.json else None)
