"""A key as the name of a directory, and back. Pure.

Percent-encoded, so that any text makes one name, and two keys never the same: `.` at the beginning
and `~` are encoded too, which leaves them to us. A name that would be too long (NAME_MAX,
pathconf(3)) is cut and told apart by the digest of the whole key; then it does not say all of the
key any more.
"""

from __future__ import annotations

import re

KEY_MAX = 4096
"""Characters that a key may have."""

_NAME_MAX = 200
_PREFIX_MAX = 150

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
_ESCAPE = re.compile(rb"%([0-9A-F]{2})")


def check_key(key: object) -> str:
    """The key, if it is one.

    Raises:
        TypeError: it is not a str.
        ValueError: it is empty, too long, or contains a null character.
    """
    if not isinstance(key, str):
        raise TypeError(f"key: a str, not {key!r}")
    if not key:
        raise ValueError("key: must not be empty")
    if len(key) > KEY_MAX:
        raise ValueError(f"key: {len(key)} characters are more than {KEY_MAX}")
    if "\0" in key:
        raise ValueError(f"key: {key!r} contains a null character")
    return key


def _encode(data: bytes) -> str:
    text = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in data)
    return "%2E" + text[1:] if text.startswith(".") else text


def to_name(key: str) -> str:
    """The name of its directory."""
    data = key.encode("utf-8", "surrogatepass")
    name = _encode(data)
    if len(name) <= _NAME_MAX:
        return name
    import hashlib  # slow, and rarely needed

    prefix = re.sub(r"%.?$", "", name[:_PREFIX_MAX])
    return f"{prefix}~{hashlib.sha256(data).hexdigest()}"


def says_all(name: str) -> bool:
    """Whether the key can be told from the name."""
    return "~" not in name


def from_name(name: str) -> str | None:
    """The key of a name that says all; None when it is the name of no key."""
    try:
        data = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), name.encode("ascii"))
        key = data.decode("utf-8", "surrogatepass")
        return key if to_name(check_key(key)) == name else None
    except ValueError:
        return None
