"""`proctree sweep`: what a crash of supervisor and helper left behind is ended."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from proctree.errors import ProctreeError
from proctree.registry import default_directory, sweep

EXIT_SURVIVORS = 1
EXIT_OURS = 125


def main(arguments: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit status."""
    parser = ArgumentParser(
        prog="proctree sweep",
        description="Ends (SIGKILL) the trees of this user that lost their supervisor and their "
        "helper at once, and only those.",
        epilog="Exit status: 0; 1 if something survived; 125 if the registry is unusable.",
    )
    parser.add_argument(
        "--directory", metavar="DIR", help=f"the registry (default: {default_directory()})"
    )
    options = parser.parse_args(arguments)
    try:
        swept = sweep(options.directory)
    except ProctreeError as error:
        print(f"proctree sweep: {error}", file=sys.stderr)
        return EXIT_OURS
    for tree in swept:
        for member in tree.ended:
            print(f"{tree.name} (tree {tree.tree_id}): ended pid {member.pid} {member.name}")
        for member in tree.survivors:
            print(f"{tree.name} (tree {tree.tree_id}): pid {member.pid} {member.name} {member.why}")
    return EXIT_SURVIVORS if any(tree.survivors for tree in swept) else 0
