"""What the main process of a tree is given before it runs, and hands on to all that it starts.

The name is POSIX's: posix_spawnattr_t holds the spawn attributes of posix_spawn(3).
"""

from __future__ import annotations

import grp
import os
import pwd
import resource
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

IONICE_CLASSES = {"realtime": 1, "best-effort": 2, "idle": 3}
"""ioprio_set(2)."""

IONICE_LEVELS = 8
CPUS_MAX = 8192
GROUPS_MAX = 1024
ID_MAX = 2**32 - 2
"""The highest uid or gid: the one above it means "unchanged" (setresuid(2))."""

_NO_LIMIT = 2**64 - 1


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: an integer, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is not between {low} and {high}")
    return value


def _optional(low: int, high: int) -> Any:
    def check(_instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value is not None:
            _integer(value, attribute.name, low, high)

    return check


def _resource(key: Any) -> int:
    if isinstance(key, str):
        number = getattr(resource, f"RLIMIT_{key.upper()}", None)
        if number is None:
            names = sorted(n[7:].lower() for n in dir(resource) if n.startswith("RLIMIT_"))
            raise ValueError(f"rlimits: {key!r} is none of {', '.join(names)}")
        return int(number)
    return _integer(key, "rlimits", 0, 15)


def _limit(value: Any, key: Any) -> int:
    if value is None or value == resource.RLIM_INFINITY:
        return _NO_LIMIT
    return _integer(value, f"rlimits[{key!r}]", 0, _NO_LIMIT)


def _rlimits(value: Any) -> tuple[tuple[int, int, int], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise TypeError(f"rlimits: a mapping of names to limits, not {value!r}")
    result = {}
    for key, limits in value.items():
        pair = limits if isinstance(limits, (tuple, list)) else (limits, limits)
        if len(pair) != 2:
            raise ValueError(f"rlimits[{key!r}]: one limit, or (soft, hard), not {limits!r}")
        soft, hard = (_limit(part, key) for part in pair)
        if soft > hard:
            raise ValueError(
                f"rlimits[{key!r}]: the soft limit {soft} is above the hard one {hard}"
            )
        result[_resource(key)] = (soft, hard)
    return tuple((number, *pair) for number, pair in sorted(result.items()))


def _ionice(value: Any) -> tuple[str, int] | None:
    if value is None:
        return None
    kind, level = (value, 0) if isinstance(value, str) else _pair(value)
    if kind not in IONICE_CLASSES:
        raise ValueError(f"ionice: {kind!r} is none of {', '.join(IONICE_CLASSES)}")
    level = _integer(level, "ionice", 0, IONICE_LEVELS - 1)
    if isinstance(value, str) and kind == "best-effort":
        level = 4  # ioprio_set(2): the level of who has never asked for another
    return kind, level


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"ionice: a class, or (class, level), not {value!r}")
    return value[0], value[1]


def _affinity(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"affinity: numbers of CPUs, not {value!r}")
    cpus = tuple(sorted({_integer(cpu, "affinity", 0, CPUS_MAX - 1) for cpu in value}))
    if not cpus:
        raise ValueError("affinity: at least one CPU")
    return cpus


def _uid(value: Any) -> int | None:
    if value is None or not isinstance(value, str):
        return None if value is None else _integer(value, "uid", 0, ID_MAX)
    try:
        return pwd.getpwnam(value).pw_uid
    except KeyError:
        raise ValueError(f"uid: there is no user {value!r}") from None


def _gid(value: Any, name: str = "gid") -> int | None:
    if value is None or not isinstance(value, str):
        return None if value is None else _integer(value, name, 0, ID_MAX)
    try:
        return grp.getgrnam(value).gr_gid
    except KeyError:
        raise ValueError(f"{name}: there is no group {value!r}") from None


def _groups(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"groups: groups, not {value!r}")
    groups = tuple(gid for gid in (_gid(group, "groups") for group in value) if gid is not None)
    if len(groups) > GROUPS_MAX:
        raise ValueError(f"groups: at most {GROUPS_MAX}, not {len(groups)}")
    return groups


@attrs.frozen
class SpawnAttributes:
    """What the main process is given before it runs. Whatever is None stays as it is here.

    A step that fails (permissions, mostly) is an error of the start, by the name of the argument.

    Args:
        rlimits: resource limits by name as in `resource` (`"nofile"`, `"as"`, `"nproc"`...): one
            number for both, or (soft, hard); None is no limit. In the units of setrlimit(2).
        oom_score_adj: -1000 to 1000: who the kernel kills first when memory is short
            (proc_pid_oom_score_adj(5)). Lowering it takes CAP_SYS_RESOURCE.
        nice: -20 (first) to 19 (last), see nice(2). Absolute, and not added to ours.
        ionice: `"realtime"`, `"best-effort"` or `"idle"`, or with a level: `("best-effort", 7)`
            (0 is first, 7 is last); ioprio_set(2).
        affinity: the numbers of the CPUs that it may run on; sched_setaffinity(2).
        umask: the mask for the permissions of new files; umask(2).
        uid: a user, by name or number: real, effective and saved. With it, `gid` and `groups`
            default to those that the user database has for the user.
        gid: a group, by name or number: real, effective and saved.
        groups: the supplementary groups, by name or number, and no others.
        no_new_privs: no program that it starts gains privileges by set-uid, set-gid or file
            capabilities (PR_SET_NO_NEW_PRIVS, prctl(2)). Default False.

    Raises:
        TypeError, ValueError: by the name of the argument.
    """

    rlimits: tuple[tuple[int, int, int], ...] = attrs.field(default=None, converter=_rlimits)
    oom_score_adj: int | None = attrs.field(default=None, validator=_optional(-1000, 1000))
    nice: int | None = attrs.field(default=None, validator=_optional(-20, 19))
    ionice: tuple[str, int] | None = attrs.field(default=None, converter=_ionice)
    affinity: tuple[int, ...] | None = attrs.field(default=None, converter=_affinity)
    umask: int | None = attrs.field(default=None, validator=_optional(0, 0o777))
    uid: int | None = attrs.field(default=None, converter=_uid)
    gid: int | None = attrs.field(default=None, converter=_gid)
    groups: tuple[int, ...] | None = attrs.field(default=None, converter=_groups)
    no_new_privs: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))

    def __attrs_post_init__(self) -> None:
        """A user without the user's groups would keep ours: root's, where it matters most."""
        if self.uid is None or (self.gid is not None and self.groups is not None):
            return
        gid = self.gid
        try:
            user = pwd.getpwuid(self.uid)
        except KeyError:
            if gid is None:
                raise ValueError(
                    f"gid: must be given, since the user database does not know uid {self.uid}"
                ) from None
            names = []
        else:
            gid = user.pw_gid if gid is None else gid
            names = [user.pw_name]
        object.__setattr__(self, "gid", gid)
        if self.groups is None and self.uid != os.geteuid():
            groups = [group for name in names for group in os.getgrouplist(name, gid)]
            object.__setattr__(self, "groups", tuple(groups))

    @property
    def ionice_value(self) -> int | None:
        """As ioprio_set(2) takes it."""
        if self.ionice is None:
            return None
        return IONICE_CLASSES[self.ionice[0]] << 13 | self.ionice[1]


def to_attributes(value: object) -> SpawnAttributes | None:
    if value is not None and not isinstance(value, SpawnAttributes):
        raise TypeError(f"attributes: SpawnAttributes, not {value!r}")
    return value
