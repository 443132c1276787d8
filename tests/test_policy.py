"""How a tree is ended, as the user may say it."""

from __future__ import annotations

import math
import signal

import pytest

from proctree import KillPolicy, Leftovers, Scope, Stage, policy

TERM, KILL = Stage(signal.SIGTERM), Stage(signal.SIGKILL)


def test_defaults():
    assert KillPolicy().stages == (TERM, KILL)
    assert (TERM.grace, TERM.scope) == (5.0, Scope.TREE)


def test_after_and_now():
    assert KillPolicy.after(0.25).stages == (Stage(signal.SIGTERM, 0.25), KILL)
    assert KillPolicy.now().stages == (KILL,)


@pytest.mark.parametrize(
    "stages",
    [
        (),
        (TERM,),
        [TERM],
        (KILL, TERM),
        (Stage(signal.SIGKILL, scope="main"),),
        (Stage(signal.SIGKILL, scope="group"),),
    ],
)
def test_what_would_not_end_everything_gets_a_last_stage(stages):
    assert KillPolicy(stages).stages == (*stages, KILL)


def test_what_ends_everything_stays_as_it_is():
    last = Stage(signal.SIGKILL, 0.5, "tree")
    assert KillPolicy((TERM, last)).stages == (TERM, last)


def test_duration_is_the_sum_of_the_graces():
    assert KillPolicy((Stage(signal.SIGINT, 1.0), Stage(signal.SIGTERM, 2.0))).duration == 8.0


def test_a_stage_is_normalized():
    stage = Stage(15, 1, "main")
    assert stage == (signal.SIGTERM, 1.0, Scope.MAIN)
    assert isinstance(stage.signal, signal.Signals)
    assert isinstance(stage.scope, Scope)
    assert isinstance(stage.grace, float)


def test_real_time_signals_are_signals():
    assert Stage(signal.SIGRTMIN).signal == signal.SIGRTMIN


def test_values_do_not_change():
    with pytest.raises(AttributeError):
        TERM.grace = 3.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        KillPolicy().stages = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"signal": 0}, ValueError, "^signal: .*0"),
        ({"signal": -9}, ValueError, "^signal: .*-9"),
        ({"signal": 1000}, ValueError, "^signal: .*1000"),
        ({"signal": "SIGTERM"}, TypeError, "^signal: .*'SIGTERM'"),
        ({"signal": True}, TypeError, "^signal: .*True"),
        ({"signal": 15.0}, TypeError, "^signal: .*15.0"),
        ({"signal": None}, TypeError, "^signal: .*None"),
        ({"grace": -0.1}, ValueError, "^grace: .*-0.1"),
        ({"grace": math.nan}, ValueError, "^grace: .*nan"),
        ({"grace": math.inf}, ValueError, "^grace: .*finite"),
        ({"grace": -math.inf}, ValueError, "^grace: .*-inf"),
        ({"grace": "5"}, TypeError, "^grace: .*'5'"),
        ({"grace": True}, TypeError, "^grace: .*True"),
        ({"grace": None}, TypeError, "^grace: .*None"),
        ({"scope": "cgroup"}, ValueError, "^scope: 'cgroup' .*main, group, tree"),
        ({"scope": None}, ValueError, "^scope: None"),
        ({"scope": []}, ValueError, r"^scope: \[\]"),
    ],
)
def test_a_bad_stage_is_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        Stage(**{"signal": signal.SIGTERM, **arguments})


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        (TERM, TypeError, "^stages: a tuple of Stage"),
        (None, TypeError, "^stages: .*None"),
        ("TERM", TypeError, "^stages: .*'TERM'"),
        ((TERM, signal.SIGKILL), TypeError, r"^stages\[1\]: a Stage"),
        ((TERM, (15, 5.0, "tree")), TypeError, r"^stages\[1\]: a Stage"),
        ((TERM,) * policy.MAX_STAGES, ValueError, "^stages: at most 8 .*not 9"),
    ],
)
def test_a_bad_policy_is_refused_by_name(stages, error, message):
    with pytest.raises(error, match=message):
        KillPolicy(stages)


def test_as_many_stages_as_a_warden_takes():
    stages = KillPolicy((TERM,) * (policy.MAX_STAGES - 1)).stages
    assert len(stages) == policy.MAX_STAGES


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_after_refuses_a_bad_grace(value):
    with pytest.raises(ValueError, match=r"^grace: "):
        KillPolicy.after(value)


@pytest.mark.parametrize("value", [None, "now", 5.0, (TERM, KILL), TERM])
def test_only_a_policy_is_a_policy(value):
    with pytest.raises(TypeError, match=r"^kill: a KillPolicy"):
        policy.to_policy(value, "kill")


def test_leftovers_by_name():
    assert [policy.to_leftovers(name) for name in ("kill", "wait", "leave")] == list(Leftovers)
    with pytest.raises(ValueError, match=r"^leftovers: 'eat' is none of kill, wait, leave"):
        policy.to_leftovers("eat")
