"""`proctree run`: a command under supervision, with the exit statuses of timeout(1)."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import NoReturn

from proctree.containment import NAMES
from proctree.errors import ProctreeError
from proctree.outcome import Outcome, Reason
from proctree.policy import KillPolicy, Leftovers
from proctree.watched import WatchedSubprocess

EXIT_TIMEOUT = 124
EXIT_OURS = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse exits with 2, which could be the command's own.
        self.print_usage(sys.stderr)
        print(f"proctree run: {message}", file=sys.stderr)
        sys.exit(EXIT_OURS)


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="proctree run",
        usage="proctree run [OPTIONS] -- COMMAND [ARGUMENT...]",
        description="Runs a command and ends its whole process tree with it.",
        epilog="Exit status: the command's own; 128+N if signal N ended it; 124 after a time-out; "
        "125 if proctree failed; 126 if the command could not be executed; 127 if it was not found.",
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="end the tree after S seconds")
    parser.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds between SIGTERM and SIGKILL (default: 5)",
    )
    parser.add_argument("--containment", default="auto", metavar="NAME", help="auto, " + ", ".join(NAMES))
    parser.add_argument(
        "--leftovers",
        default="kill",
        choices=[str(policy) for policy in Leftovers],
        help="what becomes of processes that the command leaves behind (default: kill)",
    )
    parser.add_argument("--name", help="for ps and logs (default: the command's name)")
    parser.add_argument("--json", metavar="FILE", help="write how it ended to FILE")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    return parser


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Everything behind the first `--` is the command's, whatever it looks like."""
    if "--" not in arguments:
        return list(arguments), []
    at = list(arguments).index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


def exit_status(outcome: Outcome) -> int:
    """As timeout(1) has it."""
    if outcome.reason is Reason.TIMEOUT:
        return EXIT_TIMEOUT
    if outcome.reason is Reason.WARDEN_LOST or outcome.returncode is None:
        return EXIT_OURS
    if outcome.returncode < 0:
        return 128 - outcome.returncode
    return outcome.returncode


def _write_json(path: str, outcome: Outcome) -> None:
    import json

    with open(path, "w", encoding="utf-8") as file:
        json.dump(outcome.as_dict(), file, indent=2)
        file.write("\n")


def _complain(text: str) -> None:
    print(f"proctree run: {text}", file=sys.stderr)


def _supervise(handle: WatchedSubprocess) -> Outcome | None:
    def end(signo: int, _frame: object) -> None:
        name = signal.Signals(signo).name
        handle.kill(reason=f"proctree got {name}")

    for signo in ENDING_SIGNALS:
        # nohup(1) and shells that start a job in the background have them ignored: so it stays.
        if signal.getsignal(signo) is not signal.SIG_IGN:
            signal.signal(signo, end)
    handle.launch()
    return handle.wait()


def main(arguments: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit status."""
    ours, command = _split(arguments)
    parser = _parser()
    options = parser.parse_args(ours)
    command = options.command + command
    if not command:
        parser.error("no command was given")
    try:
        handle = WatchedSubprocess(
            command,
            timeout=options.timeout,
            kill=KillPolicy.after(options.grace),
            containment=options.containment,
            leftovers=options.leftovers,
            name=options.name,
        )
    except (TypeError, ValueError, ProctreeError) as error:
        _complain(str(error))
        return EXIT_OURS
    status = EXIT_OURS
    try:
        outcome = _supervise(handle)
        assert outcome is not None
        status = exit_status(outcome)
        for member in outcome.survivors:
            _complain(f"pid {member.pid} ({member.name}) {member.why}")
    except FileNotFoundError as error:
        _complain(f"{error.filename}: not found")
        status = EXIT_NOT_FOUND
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}")
        status = EXIT_NOT_EXECUTABLE
    except ProctreeError as error:
        if handle.outcome is None or handle.outcome.reason is not Reason.KILLED:
            _complain(str(error))
    if options.json and handle.outcome is not None:
        try:
            _write_json(options.json, handle.outcome)
        except OSError as error:
            _complain(f"--json {options.json}: {error.strerror}")
            return EXIT_OURS
    return status
