"""How far the output of an attempt has been delivered, so that the next reader goes on from there.

The file `cursor` beside the output: an offset in out.log, one in err.log, and a checksum. It is
written in one piece after each delivery, and not synced: it has to outlive its writer, and not the
machine, after whose crash the tree is gone as well. Who is killed between a delivery and the
writing has the next reader repeat that delivery: everything is delivered at least once.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection, Mapping

from proctree import events
from proctree.errors import errno_name
from proctree.process import fds, private

NAME = "cursor"
STREAMS: tuple[str, str] = ("stdout", "stderr")

_FIELDS = struct.Struct("<8sQQ")
_CHECK = struct.Struct("<I")
_MAGIC = b"pcursor1"
SIZE = _FIELDS.size + _CHECK.size
"""Bytes: within a page, so that not even SIGKILL comes in the middle of it."""


def encode(offsets: Mapping[str, int]) -> bytes:
    """The whole file."""
    body = _FIELDS.pack(_MAGIC, *(offsets[name] for name in STREAMS))
    return body + _CHECK.pack(zlib.crc32(body))


def decode(data: bytes) -> dict[str, int]:
    """The offsets, by the name of the stream.

    Raises:
        ValueError: that is no cursor, or a damaged one; it says why.
    """
    if len(data) != SIZE:
        raise ValueError(f"not {SIZE} bytes")
    body = data[: _FIELDS.size]
    if data[_FIELDS.size :] != _CHECK.pack(zlib.crc32(body)):
        raise ValueError("the checksum is wrong")
    magic, *offsets = _FIELDS.unpack(body)
    if magic != _MAGIC:
        raise ValueError("not a cursor of this version")
    return dict(zip(STREAMS, offsets, strict=True))


def stored(place: str) -> dict[str, int]:
    """Where the last reader stopped; the beginning if nobody has read, and (which is said in the
    log) if that cannot be known."""
    path = os.path.join(place, NAME)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = os.read(fd, SIZE)  # more than that no cursor has
        finally:
            os.close(fd)
        return decode(data) if data else dict.fromkeys(STREAMS, 0)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        events.warning("durable.cursor_unreadable", path=path, error=str(error))
    return dict.fromkeys(STREAMS, 0)


class Cursor:
    """The cursor of one reader. Everything but `offsets` and making one belongs to one thread, the
    tree's worker.

    Args:
        place: the directory of the attempt.
        moving: the streams whose delivery moves it; of the others it keeps what the file says.
        writes: whether the file is written. Only the owner of a run does that.
    """

    def __init__(self, place: str, moving: Collection[str], writes: bool) -> None:
        self._place = place
        self._moving = frozenset(moving)
        self._writes = writes
        self._fd = -1
        self._closed = False
        self._failed = False
        self.offsets: dict[str, int] = stored(place) if moving else dict.fromkeys(STREAMS, 0)

    def move(self, name: str, offset: int) -> None:
        """Everything of stream `name` before `offset` has been delivered."""
        self.offsets[name] = offset
        if self._writes:
            self._write()

    def take_over(self) -> None:
        """From now on the file is written; what another reader has written there is replaced by
        what was delivered here."""
        if self._writes or not self._moving:
            return
        theirs = stored(self._place)
        self.offsets.update({name: theirs[name] for name in STREAMS if name not in self._moving})
        self._writes = True
        self._write()

    def leave(self) -> None:
        """From now on the file is another one's to write."""
        self._writes = False

    def _write(self) -> None:
        if self._closed:
            return
        try:
            if self._fd < 0:
                self._open()
            os.pwrite(self._fd, encode(self.offsets), 0)
        except OSError as error:
            # Delivering goes on, and the next reader will repeat more than it has to.
            if not self._failed:
                self._failed = True
                path = os.path.join(self._place, NAME)
                why = errno_name(error.errno or 0)
                events.warning("durable.cursor_unwritable", path=path, errno=why)

    def _open(self) -> None:
        path = os.path.join(self._place, NAME)
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK
        with fds.making():
            self._fd = fds.own(fds.above_stdio(private.create(path, flags)))

    def close(self) -> None:
        """Gives back the descriptor. Whatever moves it later is not written."""
        self._closed = True
        if self._fd >= 0:
            fds.close(self._fd)
            self._fd = -1
