"""The `proctree` command.

Imports are lazy on purpose: `proctree run` is put before other commands and must not be felt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """\
usage: proctree run [OPTIONS] -- COMMAND [ARGUMENT...]
       proctree attach KEY
       proctree sweep
       proctree --version

run     runs a command and ends its whole process tree with it; 'proctree run --help'
attach  goes on with the output of a durable run, and waits for its end
sweep   ends the trees that an earlier crash of supervisor and helper left behind
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] == "run":
        from proctree.cli import run

        return run.main(arguments[1:])
    if arguments[:1] == ["attach"]:
        from proctree.cli import durable

        return durable.attach(arguments[1:])
    if arguments[:1] == ["sweep"]:
        from proctree.cli import sweep

        return sweep.main(arguments[1:])
    if arguments == ["--version"]:
        from proctree import __version__

        print(f"proctree {__version__}")
        return 0
    if arguments in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    print(USAGE, end="", file=sys.stderr)
    return 125
