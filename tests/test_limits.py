"""Limits of a tree: bad ones are refused by name, good ones become what the kernel reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctree import ContainmentUnavailable, Limits, WatchedSubprocess
from proctree.process.cgroups import CONTROLLERS

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"memory_max": 0}, ValueError, "^memory_max: 0 is not positive"),
    ({"memory_max": -1}, ValueError, "^memory_max: -1 "),
    ({"memory_max": 1e9}, TypeError, "^memory_max: .*1000000000.0"),
    ({"memory_max": "1G"}, TypeError, "^memory_max: .*'1G'"),
    ({"memory_max": True}, TypeError, "^memory_max: .*True"),
    ({"memory_max": math.nan}, TypeError, "^memory_max: .*nan"),
    ({"pids_max": 0}, ValueError, "^pids_max: 0 is not positive"),
    ({"pids_max": -5}, ValueError, "^pids_max: -5 "),
    ({"pids_max": 1.0}, TypeError, r"^pids_max: .*1\.0"),
    ({"pids_max": "max"}, TypeError, "^pids_max: .*'max'"),
    ({"cpu_max": 0}, ValueError, "^cpu_max: 0 "),
    ({"cpu_max": 0.001}, ValueError, "^cpu_max: 0.001 "),
    ({"cpu_max": 0.0099}, ValueError, "^cpu_max: 0.0099 "),
    ({"cpu_max": -1.0}, ValueError, r"^cpu_max: -1\.0 "),
    ({"cpu_max": math.nan}, ValueError, "^cpu_max: nan "),
    ({"cpu_max": math.inf}, ValueError, "^cpu_max: inf "),
    ({"cpu_max": "50%"}, TypeError, "^cpu_max: .*'50%'"),
    ({"cpu_max": True}, TypeError, "^cpu_max: .*True"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_a_bad_one_is_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Limits(**arguments)


@pytest.mark.parametrize("bad", [{"pids_max": 5}, 5, True, "pids.max"])
def test_only_limits_are_limits(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^limits: Limits, not "):
        WatchedSubprocess(["true"], limits=bad)


def test_no_limits() -> None:
    assert Limits().files() == {}


def test_all_limits() -> None:
    limits = Limits(memory_max=2**30, pids_max=100, cpu_max=1.5)
    assert limits.files() == {
        "memory.max": "1073741824",
        "pids.max": "100",
        "cpu.max": "150000 100000",
    }
    assert limits.files().keys() == CONTROLLERS.keys()


@pytest.mark.parametrize(
    ("cpus", "text"), [(0.01, "1000 100000"), (1, "100000 100000"), (64, "6400000 100000")]
)
def test_cpus_are_a_quota_of_a_period(cpus: float, text: str) -> None:
    assert Limits(cpu_max=cpus).files() == {"cpu.max": text}


@given(st.floats(min_value=0.01, max_value=8192))
def test_every_quota_is_one_that_the_kernel_takes(cpus: float) -> None:
    """A whole number of microseconds, 1000 at least (tg_set_cfs_bandwidth() of the kernel)."""
    quota, period = map(int, Limits(cpu_max=cpus).files()["cpu.max"].split())
    assert quota >= 1000
    assert abs(quota / period - cpus) <= 0.00001


@pytest.mark.parametrize("containment", ["warden", "group", "pidns"])
def test_limits_need_a_cgroup(containment: str) -> None:
    with pytest.raises(ContainmentUnavailable, match=f"{containment}: "):
        WatchedSubprocess(["true"], limits=Limits(pids_max=5), containment=containment)
    if containment != "pidns":  # it may be that this machine has none at all
        with pytest.raises(ContainmentUnavailable, match="limits need containment 'cgroup'"):
            WatchedSubprocess(["true"], limits=Limits(pids_max=5), containment=containment)
