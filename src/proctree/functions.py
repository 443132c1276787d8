"""A function by its name: what another interpreter can call.

A callable can only be run by a fork of this process. A name can be looked up anywhere, so that the
process that runs it need not be a copy of this one.
"""

from __future__ import annotations

import io
import keyword
import marshal
import os
import pickle
import sys
import types
from collections.abc import Mapping
from typing import Any

import attrs

from proctree.errors import ProctreeError

_FRESH = os.path.join(os.path.dirname(__file__), "process", "fresh.py")


class ForkServer:
    """What a function can be forked from: see `proctree.template.Template`."""

    name: str


def is_name(text: str) -> bool:
    """Whether it is `module:attribute`, both possibly with dots."""
    module, colon, attribute = text.partition(":")
    parts = (*module.split("."), *attribute.split("."))
    return bool(colon) and all(p.isidentifier() and not keyword.iskeyword(p) for p in parts)


class _Pickler(pickle.Pickler):
    """Refuses what is pickled by a name in `__main__`: there it is another module."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, (type, types.FunctionType)) and value.__module__ == "__main__":
            raise pickle.PicklingError(
                f"{value.__qualname__} is of __main__, which is another module in every "
                "interpreter: move it to a module that can be imported"
            )
        return NotImplemented


def _pickled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    try:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump((args, kwargs))
    except Exception as error:  # what a __reduce__ of the user's raises
        raise TypeError(f"args, kwargs: cannot be pickled: {error}") from error
    return file.getvalue()


def _check_name(_instance: Function, _attribute: object, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"name: 'module:function', not {value!r}")
    if not is_name(value):
        raise ValueError(f"name: {value!r} is not of the form 'module:function'")
    if value.partition(":")[0] == "__main__":
        raise ValueError(
            f"name: {value!r}: another interpreter cannot import __main__; move the function to a "
            "module that can be imported, or give the function itself, which is then run in a "
            "fork of this process"
        )


def _check_template(_instance: Function, _attribute: object, value: Any) -> None:
    if value is not None and not isinstance(value, ForkServer):
        raise TypeError(f"template: a proctree.Template, not {value!r}")


def _to_args(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"args: a tuple of arguments, not {value!r}")
    return tuple(value)


def _to_kwargs(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"kwargs: a mapping with names as its keys, not {value!r}")
    return dict(value)


@attrs.frozen(eq=False)
class Function:
    """A function that another interpreter imports and calls: a `target` for `run` and
    `WatchedSubprocess`.

    It runs in a fresh interpreter with our options (-X, -W, ...), or in a fork of a template. Our
    `sys.path` and working directory hold for the import. Its exit status is 0 when it returns, 1
    with a traceback when it raises or cannot be imported, and as `SystemExit` says.

    Args:
        name: `"module:function"`, or `"module:Class.method"`. Not of `__main__`.
        args, kwargs: what it is called with. They are pickled now, so what becomes of them later
            changes nothing. They are not seen in `ps`, and their size is limited by memory alone.
        template: a `Template` to fork it from. Default None: a fresh interpreter.

    Raises:
        ValueError: the name has another form, or is of `__main__`.
        TypeError: something of another type, or the arguments cannot be pickled.
    """

    name: str = attrs.field(validator=_check_name)
    args: tuple[Any, ...] = attrs.field(default=(), converter=_to_args)
    kwargs: dict[str, Any] = attrs.field(factory=dict, converter=_to_kwargs)
    template: ForkServer | None = attrs.field(default=None, validator=_check_template)
    _call: bytes = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_call", _pickled(self.args, self.kwargs))

    @property
    def short_name(self) -> str:
        """Without its module."""
        return self.name.partition(":")[2]

    def payload(self) -> bytes:
        """For process/fresh.py, with our `sys.path` and `sys.argv` as they are now."""
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        return marshal.dumps((path, sys.argv, self.name, self._call))

    def interpreter(self) -> tuple[bytes, ...]:
        """The command of a fresh interpreter, which lacks only the number of the descriptor that
        holds the payload.

        Raises:
            ProctreeError: we do not know our interpreter, as when Python is embedded.
        """
        # Only this knows every option, and what becomes of it.
        from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]

        if not sys.executable:
            raise ProctreeError("sys.executable is empty: there is no interpreter to be started")
        argv = (sys.executable, *_args_from_interpreter_flags(), _FRESH)
        return tuple(os.fsencode(argument) for argument in argv)
