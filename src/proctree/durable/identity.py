"""What a target is, so that it is known again by another process, after a crash. Pure.

Pickles cannot be compared for that: equal values make different ones, since they say which objects
are the same one, and write sets in the order of their hashes. So the values are taken apart as
the pickle module would take them apart (`object.__reduce_ex__`), into what makes them equal.
"""

from __future__ import annotations

import copyreg
import functools
import os
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from proctree.command import to_argv, to_function

if TYPE_CHECKING:
    from proctree.command import StrPath

TEXT_MAX = 1000
"""Characters of a target's text: it is for people."""


class Fingerprint(NamedTuple):
    """What a target is.

    Attributes:
        text: for people: the command line, or the name of the function.
        digest: 64 hexadecimal digits, the same for the same target.
    """

    text: str
    digest: str


def fingerprint(target: Any, cwd: StrPath | None = None) -> Fingerprint:
    """What a target of `run` is.

    Of a command the arguments count and `cwd`, as they are given; of a `Function` or its name the
    name, the arguments as they are now, and `cwd`; of another callable its name alone, and what
    functools.partial binds. The environment does not count, and what the function does neither.

    Args:
        target: as for `run`.
        cwd: as for `run`. Default None: whatever it happens to be.

    Raises:
        TypeError, ValueError: it is no target; or an argument of the function cannot be pickled.
    """
    where = None if cwd is None else os.fsencode(cwd)
    by_name = to_function(target)
    if by_name is not None:
        return _of("function", by_name.name, (by_name.name, by_name.args, by_name.kwargs, where))
    if callable(target):
        name, bound = _without_partials(target)
        return _of("callable", name, (name, bound, where))
    argv = to_argv(target)
    import shlex  # slow, and not always needed

    text = shlex.join(os.fsdecode(argument) for argument in argv)
    return _of("command", text, (argv, where))


def _of(kind: str, text: str, what: tuple[Any, ...]) -> Fingerprint:
    shown = text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 3] + "..."
    try:
        return Fingerprint(shown, _Digests().of((kind, *what)).hex())
    except RecursionError:
        raise ValueError(f"args, kwargs of {shown}: nested too deeply") from None


def _without_partials(function: Any) -> tuple[str, list[Any]]:
    """The name of what is called in the end, and what is bound to it."""
    bound = []
    while isinstance(function, functools.partial):
        bound.append((function.args, function.keywords))
        function = function.func
    return _name(function), bound


def _name(value: Any) -> str:
    """Of a function or class; of what is another callable that of its class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


_NUMBERS = (int, float, complex, bool, type(None))


class _Digests:
    """The digests of values: equal for equal ones.

    What is met again inside itself is a step back, by how far. What is met again elsewhere has the
    same digest there, so that values which share much do not take long.
    """

    def __init__(self) -> None:
        import hashlib  # slow

        self._sha256 = hashlib.sha256
        self._known: dict[int, tuple[Any, bytes]] = {}  # with the value: its id stays its own
        self._above: list[int] = []

    def of(self, value: Any) -> bytes:
        if type(value) in _NUMBERS:
            number = hex(value) if type(value) is int else repr(value)
            return self._join(type(value).__name__, [number.encode()])
        if type(value) is str:
            return self._join("str", [value.encode("utf-8", "surrogatepass")])
        if type(value) in (bytes, bytearray):
            return self._join(type(value).__name__, [value])
        return self._of_composite(value)

    def _join(self, kind: str, parts: Iterable[bytes]) -> bytes:
        """Of a kind and parts that cannot be mistaken for one another: one of any length, or
        several digests."""
        whole = self._sha256(kind.encode() + b"\0")
        for part in parts:
            whole.update(part)
        return whole.digest()

    def _of_composite(self, value: Any) -> bytes:
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._above:
            distance = len(self._above) - self._above.index(id(value))
            return self._join("above", [str(distance).encode()])
        self._above.append(id(value))
        try:
            kind, parts = self._taken_apart(value)
            digest = self._join(kind, parts)
        finally:
            self._above.pop()
        self._known[id(value)] = (value, digest)
        return digest

    def _taken_apart(self, value: Any) -> tuple[str, Iterable[bytes]]:
        if type(value) in (tuple, list):
            return type(value).__name__, (self.of(item) for item in value)
        if type(value) is dict:
            return "dict", self._pairs(value.items())
        if isinstance(value, (set, frozenset)):
            return f"set {_name(type(value))}", sorted(self.of(item) for item in value)
        if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            return "name", [_name(value).encode("utf-8", "surrogatepass")]
        return self._reduced(value)

    def _pairs(self, items: Iterable[tuple[Any, Any]]) -> Iterator[bytes]:
        for key, value in sorted((self.of(key), self.of(value)) for key, value in items):
            yield key
            yield value

    def _reduced(self, value: Any) -> tuple[str, Iterable[bytes]]:
        special: Callable[[Any], Any] | None = copyreg.dispatch_table.get(type(value))
        reduced = special(value) if special is not None else value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return "name", [f"{_name(type(value))}.{reduced}".encode()]
        known: list[Any] = list(reduced[:5])
        function, args, state, items, pairs = known + [None] * (5 - len(known))
        return "object", [
            self.of(function),
            self.of(args),
            self.of(state),
            self.of(None if items is None else list(items)),
            self.of(None if pairs is None else list(pairs)),
        ]
