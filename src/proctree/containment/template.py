"""What holds a template: a warden that spares the wardens which the template forks.

They are its descendants, so they keep it from being empty for as long as their trees last, and it
is there to reap them when the template is gone. But they and what is below them are no members:
nothing here signals them, names them as survivors, or sweeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from proctree.command import Command
from proctree.containment.base import NOBODY
from proctree.containment.warden import WardenContained
from proctree.lifecycle import Event
from proctree.protocol import Message, Type


class TemplateContained(WardenContained):
    """See the module.

    Args:
        when_ended: called on the loop's thread when the template's process is known to have ended,
            with its wait status, and with None when the whole tree is closed.
    """

    def __init__(self, tree_id: str, when_ended: Callable[[int | None], None]) -> None:
        super().__init__(tree_id)
        self._when_ended = when_ended

    def _arguments(self, command: Command, control: int) -> list[bytes]:
        return [*super()._arguments(command, control), b"spare=1"]

    def _take_exited(self, message: Message) -> None:
        super()._take_exited(message)
        self._when_ended(message.values[0])

    def _take_members(self, message: Message) -> None:
        """Nothing to be seen is the end, here: what is hidden are the wardens of other trees."""
        asked = message.serial != 0 and message.serial == self._survey_serial
        if asked and not self._members and not message.members:
            self._owner.happened(Event.EMPTY)
        else:
            super()._take_members(message)

    _TAKE: ClassVar[dict[Type, Callable[[Any, Message], None]]] = {
        **WardenContained._TAKE,
        Type.EXITED: _take_exited,
        Type.MEMBERS: _take_members,
    }

    def _root_of_sweep(self) -> int | None:
        """Not everything below our warden is ours; what is bears our mark."""
        return None

    def _lose(self, detail: str) -> None:
        super()._lose(detail)
        if self._owner is NOBODY:
            super().close()

    def close(self) -> None:
        stays = self._main_exited and self._control is not None
        if stays and not self._lost and not self._said_empty:
            # It says so, or just ends, when the last tree has ended that the template started.
            self._owner = NOBODY
        else:
            super().close()
        self._when_ended(None)
