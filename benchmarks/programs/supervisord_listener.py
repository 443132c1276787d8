"""An event listener of supervisord: notes when it is told that a program has exited.

It speaks the listener protocol with supervisord on its standard streams, and writes the times to a
FIFO (argument 1), one a line: CLOCK_MONOTONIC, nanoseconds. An empty line says that it listens.
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    told = os.open(sys.argv[1], os.O_WRONLY)
    os.write(1, b"READY\n")
    os.write(told, b"\n")
    while header := sys.stdin.readline():
        now = time.monotonic_ns()
        fields = dict(token.split(":") for token in header.split())
        sys.stdin.read(int(fields["len"]))
        os.write(told, b"%d\n" % now)
        os.write(1, b"RESULT 2\nOKREADY\n")


main()
