"""What can become of a request besides its answer."""

from __future__ import annotations

from typing import Any

from proctree.errors import ProctreeError


class ChannelError(ProctreeError):
    """The root of the channel's exceptions."""


class ChannelUnavailable(ChannelError):
    """There is no channel for this process; the message says why."""


class ChannelClosed(ChannelError):
    """One of the two sides is gone: there will be no answer. What was asked may have been done."""


class ForkedChannel(ChannelError):
    """This process is a fork of the one that connected: the channel is not its own."""


class FrameTooLarge(ChannelError, ValueError):
    """A request or an answer is over `max_frame`. Nothing of it was sent, or kept."""


class UndecodableAnswer(ChannelError, ValueError):
    """The answer is not what it should be; the message says where."""


class ChannelFull(ChannelError):
    """As many notifications as may be are waiting for the tree to read them."""


class RemoteError(ChannelError):
    """The other side's answer is an error. A handler raises it to choose what the caller gets.

    Attributes:
        type: for programs: a class name, or what the two sides agreed on.
        message: for people.
        detail: anything that msgpack can hold, or None.
    """

    def __init__(self, type: str, message: str = "", detail: Any = None) -> None:  # noqa: A002
        super().__init__(type, message, detail)
        self.type = type
        self.message = message
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.type}: {self.message}" if self.message else self.type

    def to_wire(self) -> dict[str, Any]:
        """The third element of the answer."""
        return {"type": self.type, "message": self.message, "detail": self.detail}

    @classmethod
    def from_wire(cls, error: Any) -> RemoteError:
        """From whatever the other side sent."""
        if not isinstance(error, dict):
            return cls("Error", "", error)
        kind, message = error.get("type"), error.get("message")
        return cls(
            kind if isinstance(kind, str) else "Error",
            message if isinstance(message, str) else "",
            error.get("detail"),
        )


UNDECODABLE = "Undecodable"
UNKNOWN_TYPE = "UnknownType"
INVALID_BODY = "InvalidBody"
FRAME_TOO_LARGE = "FrameTooLarge"
ANSWER_TOO_LARGE = "AnswerTooLarge"
UNENCODABLE_ANSWER = "UnencodableAnswer"
"""Types of the error answers that the server gives by itself."""
