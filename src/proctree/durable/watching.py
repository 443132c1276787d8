"""Who is told, on the loop, that a file has been written to.

One inotify(7) instance for each loop, made when the first file is watched and closed with the last.
A file is looked at as soon as it is watched: what was written before that is seen then, and
whatever is written later is an event. What is written through a mapping of a file (mmap(2)) is no
event to inotify; it is seen with the next write, and at the end.

Where there is no instance or no watch to be had, files are looked at now and then instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from proctree import events, worker
from proctree.errors import errno_name
from proctree.loop import READ, Loop
from proctree.process import fds, inotify

LOOK_SECONDS = 0.1
"""How often a file is looked at that cannot be watched."""

EVENTS_SIZE = 64 * 1024
"""Bytes of events that are read at once: 4096 events."""


class Watched:
    """A file that somebody wants to know about.

    Args:
        fd: the file; open until `Watches.remove`.
        look: called on the loop when something may have happened to it.
    """

    __slots__ = ("fd", "look", "watch")

    def __init__(self, fd: int, look: Callable[[], None]) -> None:
        self.fd = fd
        self.look = look
        self.watch: int | None = None


class Watches:
    """The files that are watched on one loop; everything on its thread."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._instance = -1
        self._by_watch: dict[int, list[Watched]] = {}
        self._unwatched: dict[Watched, None] = {}
        self._looking = False

    def add(self, file: Watched) -> None:
        """From now on `file.look` is called; the first time by whoever calls this."""
        try:
            self._watch(file)
        except OSError as error:
            _tell_once(error)
            self._unwatched[file] = None
            self._look_later()

    def _watch(self, file: Watched) -> None:
        if self._instance < 0:
            self._instance = inotify.make()
            self._loop.register(self._instance, READ, self._readable)
        file.watch = inotify.add_watch(self._instance, file.fd)
        self._by_watch.setdefault(file.watch, []).append(file)

    def remove(self, file: Watched) -> None:
        """It is not called any more; nothing if it was not added."""
        if file.watch is not None:
            # The same file may be followed twice in one process, and has one watch then.
            sharers = self._by_watch[file.watch]
            sharers.remove(file)
            if not sharers:
                del self._by_watch[file.watch]
                with contextlib.suppress(OSError):
                    inotify.remove_watch(self._instance, file.watch)
            file.watch = None
        else:
            self._unwatched.pop(file, None)
        if not self._by_watch:
            self._close_instance()
            if not self._unwatched:
                _watches.pop(self._loop, None)

    def _close_instance(self) -> None:
        instance, self._instance = self._instance, -1
        if instance < 0:
            return
        self._loop.unregister(instance)
        # The kernel waits there for those that are just looking at its watches
        # (fsnotify_destroy_group()): some milliseconds, in which the loop serves others.
        try:
            worker.run(lambda: fds.close(instance))
        except RuntimeError:
            fds.close(instance)

    def _readable(self, _mask: int) -> None:
        """Of any number of events about a file one look is enough."""
        changed = inotify.read(self._instance, EVENTS_SIZE)
        if any(event.mask & inotify.IN_Q_OVERFLOW for event in changed):
            watches = tuple(self._by_watch)
        else:
            watches = tuple(dict.fromkeys(event.watch for event in changed))
        for watch in watches:
            for file in tuple(self._by_watch.get(watch, ())):
                if file.watch == watch:  # else it was removed by the look of another one
                    file.look()

    def _look_later(self) -> None:
        if not self._looking:
            self._looking = True
            self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._looking = False
        files = tuple(self._unwatched)
        with contextlib.suppress(OSError):  # none for the others either, then
            for file in files:
                self._watch(file)
                del self._unwatched[file]
        for file in files:
            if file.watch is not None or file in self._unwatched:  # else removed by another one
                file.look()
        if self._unwatched:
            self._look_later()


_watches: dict[Loop, Watches] = {}
_told = False


def of(loop: Loop) -> Watches:
    """On the loop's thread."""
    watches = _watches.get(loop)
    if watches is None:
        watches = _watches[loop] = Watches(loop)
    return watches


def _tell_once(error: OSError) -> None:
    """It holds for every file alike."""
    global _told
    if not _told:
        _told = True
        events.warning("durable.unwatched", errno=errno_name(error.errno or 0), error=str(error))


def _forget() -> None:
    """A forked child has none of our descriptors."""
    _watches.clear()


fds.in_forked_child(_forget)
