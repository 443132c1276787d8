"""What to start, checked: plain values, before anything is made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from proctree.attributes import SpawnAttributes
    from proctree.functions import ForkServer, Function

TREE_VARIABLE = "PROCTREE_TREE"
"""Environment variable that names the trees a process is in: the outermost first, slashes between.
It is how a tree can still be recognised when everything that held it is gone."""

CHANNEL_VARIABLE = "PROCTREE_CHANNEL"
"""Environment variable that says where a tree finds its channel: see channel/rendezvous.py."""

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Argv = Sequence[StrPath]
Target: TypeAlias = "Argv | Callable[[], object] | Function | str"


class Command(NamedTuple):
    """A target that has been checked.

    Attributes:
        argv: the encoded arguments, empty for a callable.
        function: the callable, or None.
        name: for people: in `ps`, in logs.
        cwd: the directory to start in, or None.
        env: the whole environment.
        pass_fds: descriptors above 2 that the tree gets, under the same numbers.
        attributes: what it is given besides, or None.
        terminal: whether its standard input becomes its controlling terminal.
        new_session: whether it leads a session of its own, or only a process group.
        payload: what a fresh interpreter, or a fork of the template, is to call; see
            process/fresh.py. None for anything else.
        template: what is to fork it, or None.
    """

    argv: tuple[bytes, ...]
    function: Callable[[], object] | None
    name: str
    cwd: bytes | None
    env: Mapping[bytes, bytes]
    pass_fds: tuple[int, ...] = ()
    attributes: SpawnAttributes | None = None
    terminal: bool = False
    new_session: bool = True
    payload: bytes | None = None
    template: ForkServer | None = None

    @property
    def is_forked(self) -> bool:
        """Whether its main process is forked by Python, and not executed."""
        return self.function is not None or self.template is not None

    def with_channel(self, fd: int, description: bytes) -> Command:
        """It gets the descriptor of a channel, and is told which one it is."""
        env = {**self.env, CHANNEL_VARIABLE.encode(): description}
        return self._replace(env=env, pass_fds=tuple(sorted({*self.pass_fds, fd})))

    def with_environment(self, changes: Mapping[bytes, bytes | None]) -> Command:
        """It gets these variables; it does not get those whose value is None."""
        env = {**self.env, **changes}
        return self._replace(env={name: value for name, value in env.items() if value is not None})

    def with_tree(self, tree_id: str) -> Command:
        """For another tree."""
        return self.with_environment(_mark(tree_id))

    def without_environment(self) -> Command:
        """What is kept of it once it was started: thousands of trees are thousands of copies."""
        return self._replace(env={})

    @property
    def program(self) -> str:
        return os.fsdecode(self.argv[0]) if self.argv else self.name


def _encode(value: Any, argument: str) -> bytes:
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"{argument}: str, bytes or a path, not {value!r}")
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument}: {value!r} cannot be encoded: {error.reason}") from None
    if b"\0" in encoded:
        raise ValueError(f"{argument}: embedded null byte")
    return encoded


def to_argv(target: Any) -> tuple[bytes, ...]:
    """Checked. Raises TypeError and ValueError, naming the argument."""
    if isinstance(target, (str, bytes, os.PathLike)):
        hint = ' (a function is "module:function")' if isinstance(target, str) else ""
        raise TypeError(f"argv: a sequence of arguments, not the single {target!r}{hint}")
    if not isinstance(target, Sequence):
        raise TypeError(f"argv: a sequence of arguments or a callable, not {target!r}")
    if not target:
        raise ValueError("argv: must not be empty")
    argv = tuple(_encode(value, f"argv[{index}]") for index, value in enumerate(target))
    if not argv[0]:
        raise ValueError("argv[0]: must not be empty")
    return argv


def _our_environment() -> dict[bytes, bytes]:
    # CPython keeps the encoded form. Going through the mapping's methods decodes and encodes every
    # entry, and takes a tenth of the time that starting a process takes.
    data = getattr(os.environb, "_data", None)
    return dict(data) if isinstance(data, dict) else dict(os.environb)


def _environment(env: Any) -> dict[bytes, bytes]:
    if env is None:
        return _our_environment()
    if not isinstance(env, Mapping):
        raise TypeError(f"env: a mapping of strings, not {env!r}")
    encoded = {}
    for key, value in env.items():
        name = _env_text(key, f"env: the name {key!r}")
        if not name or b"=" in name:
            raise ValueError(f"env: {key!r} is not a name: it must not be empty or contain '='")
        encoded[name] = _env_text(value, f"env[{key!r}]")
    return encoded


def _env_text(value: Any, argument: str) -> bytes:
    if not isinstance(value, (str, bytes)):
        raise TypeError(f"{argument}: must be str or bytes, not {value!r}")
    return _encode(value, argument)


def _name(name: Any, default: str) -> str:
    if name is None:
        return default
    if not isinstance(name, str):
        raise TypeError(f"name: a string, not {name!r}")
    _encode(name, "name")
    return name


def _pass_fds(fds: Any) -> tuple[int, ...]:
    if isinstance(fds, (str, bytes)) or not isinstance(fds, Iterable):
        raise TypeError(f"pass_fds: descriptor numbers, not {fds!r}")
    result = []
    for fd in fds:
        if isinstance(fd, bool) or not isinstance(fd, int):
            raise TypeError(f"pass_fds: a descriptor number, not {fd!r}")
        if fd <= 2:
            raise ValueError(f"pass_fds: {fd} is a standard stream: use stdin, stdout, stderr")
        try:
            os.fstat(fd)
        except (OSError, OverflowError) as error:
            raise ValueError(f"pass_fds: {fd} is not open: {error}") from None
        result.append(fd)
    return tuple(sorted(set(result)))


def _attributes(value: Any) -> SpawnAttributes | None:
    if value is None:
        return None
    from proctree.attributes import to_attributes

    return to_attributes(value)


def to_function(target: Any) -> Function | None:
    """From the value, or from its name as a text; None for what is neither."""
    if isinstance(target, str):
        if ":" not in target:
            return None
        from proctree.functions import Function, is_name

        return Function(target) if is_name(target) else None
    # Who holds one has imported its module, and nobody else has to.
    if "proctree.functions" not in sys.modules:
        return None
    from proctree.functions import Function

    return target if isinstance(target, Function) else None


def _mark(tree_id: str) -> dict[bytes, bytes]:
    # From our environment and not from the tree's: a nested tree is below this one whatever that
    # says.
    outer = os.environb.get(TREE_VARIABLE.encode())
    inner = tree_id.encode()
    return {TREE_VARIABLE.encode(): outer + b"/" + inner if outer else inner}


def to_flag(value: Any, argument: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: True or False, not {value!r}")
    return value


def check(
    target: Any,
    *,
    cwd: Any,
    env: Any,
    name: Any,
    pass_fds: Any,
    tree_id: str,
    attributes: Any = None,
    terminal: bool = False,
    new_session: Any = True,
) -> Command:
    """Checks what the user gave and completes it.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    by_name = to_function(target)
    payload, template = None, None
    function = target if by_name is None and callable(target) else None
    argv: tuple[bytes, ...] = ()
    if by_name is not None:
        payload, template = by_name.payload(), by_name.template
        argv = by_name.interpreter() if template is None else ()
    elif function is None:
        argv = to_argv(target)
    environment = _environment(env)
    environment |= _mark(tree_id)
    if by_name is not None:
        default = by_name.short_name
    elif argv:
        default = os.path.basename(os.fsdecode(argv[0]))
    else:
        default = getattr(function, "__qualname__", type(function).__name__)
    return Command(
        argv=argv,
        function=function,
        name=_name(name, default),
        cwd=None if cwd is None else _encode(cwd, "cwd"),
        env=environment,
        pass_fds=_pass_fds(pass_fds),
        attributes=_attributes(attributes),
        terminal=terminal,
        new_session=to_flag(new_session, "new_session"),
        payload=payload,
        template=template,
    )
