"""Limits of a whole tree, by the controllers of its cgroup."""

from __future__ import annotations

import math
from typing import Any

import attrs

CPU_PERIOD = 100_000
"""Microseconds; the kernel's default for cpu.max."""

_LEAST_QUOTA = 1000
"""Microseconds: less is EINVAL (tg_set_cfs_bandwidth() of the kernel)."""


def _positive(_instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{attribute.name}: an integer, not {value!r}")
    if value <= 0:
        raise ValueError(f"{attribute.name}: {value} is not positive")


def _cpus(_instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{attribute.name}: a number of CPUs, not {value!r}")
    if math.isnan(value) or math.isinf(value) or value * CPU_PERIOD < _LEAST_QUOTA:
        raise ValueError(f"{attribute.name}: {value!r} is not a number of CPUs from 0.01 up")


@attrs.frozen
class Limits:
    """What a tree may use in all, whoever in it uses it. Needs containment `cgroup` and the
    controllers named here; None is no limit of its own.

    Args:
        memory_max: bytes (controller `memory`, memory.max). A tree that needs more has a process
            killed by the kernel: `Usage.oom_kills` counts them.
        pids_max: processes and threads (controller `pids`, pids.max). More cannot be forked.
        cpu_max: CPUs' worth of time, 0.5 or 2.0 (controller `cpu`, cpu.max).

    Raises:
        TypeError, ValueError: by the name of the argument.
    """

    memory_max: int | None = attrs.field(default=None, validator=_positive)
    pids_max: int | None = attrs.field(default=None, validator=_positive)
    cpu_max: float | None = attrs.field(default=None, validator=_cpus)

    def files(self) -> dict[str, str]:
        """What is to be written into which file of the cgroup (cgroup-v2.rst)."""
        files = {}
        if self.memory_max is not None:
            files["memory.max"] = str(self.memory_max)
        if self.pids_max is not None:
            files["pids.max"] = str(self.pids_max)
        if self.cpu_max is not None:
            files["cpu.max"] = f"{round(self.cpu_max * CPU_PERIOD)} {CPU_PERIOD}"
        return files


def to_limits(value: object) -> Limits | None:
    if value is not None and not isinstance(value, Limits):
        raise TypeError(f"limits: Limits, not {value!r}")
    return value
