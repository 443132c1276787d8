"""Calls a function by its name: the program of a fresh interpreter, and in a fork of a template.

It is run by its path, and imports nothing but the standard library: what it calls need not know of
proctree, and where proctree lies is known when `sys.path` is.
"""

from __future__ import annotations

import marshal
import os
import sys


def read(fd: int) -> bytes:
    """All of a file, whatever its offset is, which other processes share; and closes it."""
    size, pieces = 0, []
    while piece := os.pread(fd, 1 << 20, size):
        pieces.append(piece)
        size += len(piece)
    os.close(fd)
    return b"".join(pieces)


def invoke(payload: bytes) -> None:
    """As `functions.Function.payload` made it."""
    path, argv, name, call = marshal.loads(payload)  # noqa: S302 - from our own supervisor
    sys.path[:] = path
    sys.argv[:] = argv
    # Behind that: at first the directory of this very file leads the path.
    import importlib
    import pickle

    module, _, attributes = name.partition(":")
    function = importlib.import_module(module)
    for attribute in attributes.split("."):
        function = getattr(function, attribute)
    args, kwargs = pickle.loads(call)  # noqa: S301 - from our own supervisor
    function(*args, **kwargs)  # type: ignore[operator]


if __name__ == "__main__":
    invoke(read(int(sys.argv[1])))
