"""prctl(2) both ways. In forked children: what is set there is nobody else's."""

from __future__ import annotations

import signal
import sys
import types
from importlib.util import find_spec
from typing import Any

import pytest

from forks import in_child
from proctree.process import prctl
from proctree.process.prctl import LibcPrctl, PackagePrctl

WAYS = [
    LibcPrctl,
    pytest.param(
        PackagePrctl,
        marks=pytest.mark.skipif(find_spec("prctl") is None, reason="python-prctl is missing"),
    ),
]


@pytest.mark.parametrize("way", WAYS)
def test_pdeathsig(way):
    calls = way()

    def child() -> list[int]:
        seen = [calls.get_pdeathsig()]
        for signo in (signal.SIGTERM, signal.SIGKILL, 0):
            calls.set_pdeathsig(signo)
            seen.append(calls.get_pdeathsig())
        return seen

    assert in_child(child) == [0, signal.SIGTERM, signal.SIGKILL, 0]


@pytest.mark.parametrize("way", WAYS)
def test_child_subreaper(way):
    calls = way()

    def child() -> list[bool]:
        seen = [calls.get_child_subreaper()]
        for on in (True, False):
            calls.set_child_subreaper(on)
            seen.append(calls.get_child_subreaper())
        return seen

    ours = calls.get_child_subreaper()
    assert in_child(child) == [False, True, False]
    assert calls.get_child_subreaper() == ours


@pytest.mark.parametrize("setter", WAYS)
@pytest.mark.parametrize("getter", WAYS)
def test_both_make_the_same_call(setter, getter):
    one, other = setter(), getter()

    def child() -> list[Any]:
        one.set_pdeathsig(signal.SIGHUP)
        one.set_child_subreaper(True)
        return [other.get_pdeathsig(), other.get_child_subreaper()]

    assert in_child(child) == [signal.SIGHUP, True]


@pytest.mark.parametrize("way", WAYS)
def test_what_the_kernel_refuses_is_raised(way):
    with pytest.raises((OSError, ValueError)):
        way().set_pdeathsig(9999)


def module(**functions: Any) -> types.ModuleType:
    made = types.ModuleType("prctl")
    made.__dict__.update(functions)
    return made


CALLS = ("set_pdeathsig", "get_pdeathsig", "set_child_subreaper", "get_child_subreaper")


def test_the_package_is_preferred(monkeypatch):
    if find_spec("prctl") is None:
        monkeypatch.setitem(sys.modules, "prctl", module(**dict.fromkeys(CALLS, print)))
    assert type(prctl.load()) is PackagePrctl


def test_without_the_package_libc_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "prctl", None)
    assert type(prctl.load()) is LibcPrctl


def test_something_else_of_that_name_is_not_the_package(monkeypatch):
    """The host program may have a prctl.py of its own."""
    monkeypatch.setitem(sys.modules, "prctl", module(main=print))
    assert type(prctl.load()) is LibcPrctl
