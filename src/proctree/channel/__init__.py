"""Requests from a tree to its supervisor that cannot get crossed.

In the supervisor:

    from proctree.channel import Message, Server

    class GetVariable(Message):
        key: str

    class Variable(Message):
        key: str
        value: str | None

    server = Server()

    @server.handler
    def get_variable(request: GetVariable, caller) -> Variable:
        return Variable(request.key, variables.get(request.key))

    WatchedSubprocess.start(argv, channel=server)

In the tree:

    with Channel.connect(types=[Variable]) as channel:
        channel.request(GetVariable("a"))           # from any thread
        await channel.arequest(GetVariable("b"))    # from any event loop
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from proctree.channel.errors import (
    ChannelClosed,
    ChannelError,
    ChannelFull,
    ChannelUnavailable,
    ForkedChannel,
    FrameTooLarge,
    RemoteError,
    UndecodableAnswer,
)
from proctree.channel.frames import MAX_FRAME
from proctree.channel.types import Message

if TYPE_CHECKING:
    from proctree.channel.client import Channel
    from proctree.channel.handlers import Answer
    from proctree.channel.rendezvous import handle
    from proctree.channel.served import Caller
    from proctree.channel.server import Server

__all__ = [
    "MAX_FRAME",
    "Answer",
    "Caller",
    "Channel",
    "ChannelClosed",
    "ChannelError",
    "ChannelFull",
    "ChannelUnavailable",
    "ForkedChannel",
    "FrameTooLarge",
    "Message",
    "RemoteError",
    "Server",
    "UndecodableAnswer",
    "handle",
]

# A tree needs the one side, and a supervisor the other.
_LAZY = {
    "Answer": "proctree.channel.handlers",
    "Caller": "proctree.channel.served",
    "Channel": "proctree.channel.client",
    "Server": "proctree.channel.server",
    "handle": "proctree.channel.rendezvous",
}


def __getattr__(name: str) -> Any:
    """PEP 562."""
    try:
        module = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module 'proctree.channel' has no attribute {name!r}") from None
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value
