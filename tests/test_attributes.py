"""Spawn attributes: every bad one is refused by name, and what is left out is filled in or left."""

from __future__ import annotations

import grp
import math
import os
import pwd
import resource
import subprocess
import sys
from typing import Any

import pytest

import proctree
from proctree import SpawnAttributes, WatchedSubprocess

NO_LIMIT = 2**64 - 1
NO_SUCH_NAME = "no-such-name-anywhere"


def unknown_uid() -> int:
    taken = {user.pw_uid for user in pwd.getpwall()}
    return next(uid for uid in range(40000, 60000) if uid not in taken)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rlimits": {"nofiles": 1}}, ValueError, "^rlimits: 'nofiles' is none of .*nofile"),
    ({"rlimits": {"RLIMIT_NOFILE": 1}}, ValueError, "^rlimits: 'RLIMIT_NOFILE' is none of"),
    ({"rlimits": {16: 1}}, ValueError, "^rlimits: 16 "),
    ({"rlimits": {-1: 1}}, ValueError, "^rlimits: -1 "),
    ({"rlimits": {None: 1}}, TypeError, "^rlimits: .*None"),
    ({"rlimits": {True: 1}}, TypeError, "^rlimits: .*True"),
    ({"rlimits": [("nofile", 1)]}, TypeError, "^rlimits: a mapping"),
    ({"rlimits": "nofile"}, TypeError, "^rlimits: a mapping"),
    ({"rlimits": {"nofile": (2, 1)}}, ValueError, r"^rlimits\['nofile'\]: .* 2 .* 1$"),
    ({"rlimits": {"nofile": (None, 1)}}, ValueError, r"^rlimits\['nofile'\]: the soft"),
    ({"rlimits": {"nofile": (1, 2, 3)}}, ValueError, r"^rlimits\['nofile'\]: .*\(1, 2, 3\)"),
    ({"rlimits": {"nofile": ()}}, ValueError, r"^rlimits\['nofile'\]: "),
    ({"rlimits": {"nofile": -2}}, ValueError, r"^rlimits\['nofile'\]: -2 "),
    ({"rlimits": {"nofile": 2**64}}, ValueError, r"^rlimits\['nofile'\]: "),
    ({"rlimits": {"nofile": 1.0}}, TypeError, r"^rlimits\['nofile'\]: .*1\.0"),
    ({"rlimits": {"nofile": math.nan}}, TypeError, r"^rlimits\['nofile'\]: .*nan"),
    ({"rlimits": {"nofile": True}}, TypeError, r"^rlimits\['nofile'\]: .*True"),
    ({"rlimits": {"nofile": "5"}}, TypeError, r"^rlimits\['nofile'\]: .*'5'"),
    ({"oom_score_adj": 1001}, ValueError, "^oom_score_adj: 1001 "),
    ({"oom_score_adj": -1001}, ValueError, "^oom_score_adj: -1001 "),
    ({"oom_score_adj": 1.5}, TypeError, r"^oom_score_adj: .*1\.5"),
    ({"nice": 20}, ValueError, "^nice: 20 "),
    ({"nice": -21}, ValueError, "^nice: -21 "),
    ({"nice": "5"}, TypeError, "^nice: .*'5'"),
    ({"nice": False}, TypeError, "^nice: .*False"),
    ({"ionice": "besteffort"}, ValueError, "^ionice: 'besteffort' .*best-effort"),
    ({"ionice": ("idle",)}, TypeError, "^ionice: "),
    ({"ionice": 3}, TypeError, "^ionice: .*3"),
    ({"ionice": (3, 0)}, ValueError, "^ionice: 3 "),
    ({"ionice": ("best-effort", 8)}, ValueError, "^ionice: 8 "),
    ({"ionice": ("best-effort", -1)}, ValueError, "^ionice: -1 "),
    ({"ionice": ("best-effort", "7")}, TypeError, "^ionice: .*'7'"),
    ({"affinity": []}, ValueError, "^affinity: at least one"),
    ({"affinity": "0"}, TypeError, "^affinity: .*'0'"),
    ({"affinity": b"0"}, TypeError, "^affinity: "),
    ({"affinity": 0}, TypeError, "^affinity: .*0"),
    ({"affinity": [-1]}, ValueError, "^affinity: -1 "),
    ({"affinity": [8192]}, ValueError, "^affinity: 8192 "),
    ({"affinity": ["0"]}, TypeError, "^affinity: .*'0'"),
    ({"umask": 0o1000}, ValueError, "^umask: 512 "),
    ({"umask": -1}, ValueError, "^umask: -1 "),
    ({"umask": "022"}, TypeError, "^umask: .*'022'"),
    ({"uid": NO_SUCH_NAME}, ValueError, f"^uid: there is no user '{NO_SUCH_NAME}'"),
    ({"uid": -1}, ValueError, "^uid: -1 "),
    ({"uid": 2**32 - 1}, ValueError, "^uid: 4294967295 "),  # setresuid(2): "unchanged"
    ({"uid": 1.0}, TypeError, r"^uid: .*1\.0"),
    ({"uid": unknown_uid()}, ValueError, f"^gid: must be given, .* {unknown_uid()}$"),
    ({"gid": NO_SUCH_NAME}, ValueError, f"^gid: there is no group '{NO_SUCH_NAME}'"),
    ({"gid": 2**32 - 1}, ValueError, "^gid: 4294967295 "),
    ({"gid": True}, TypeError, "^gid: .*True"),
    ({"groups": [NO_SUCH_NAME]}, ValueError, f"^groups: there is no group '{NO_SUCH_NAME}'"),
    ({"groups": "root"}, TypeError, "^groups: .*'root'"),
    ({"groups": 0}, TypeError, "^groups: .*0"),
    ({"groups": [2**32 - 1]}, ValueError, "^groups: 4294967295 "),
    ({"groups": [0] * 1025}, ValueError, "^groups: at most 1024, not 1025"),
    ({"no_new_privs": 1}, TypeError, "no_new_privs"),
    ({"no_new_privs": None}, TypeError, "no_new_privs"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=[str(bad[0])[:50] for bad in BAD])
def test_a_bad_one_is_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        SpawnAttributes(**arguments)


@pytest.mark.parametrize("bad", [{"nice": 5}, 5, "nice", True])
def test_only_spawn_attributes_are_attributes(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^attributes: SpawnAttributes, not "):
        WatchedSubprocess(["true"], attributes=bad)


@pytest.mark.parametrize("bad", [0, 1, None, "no"])
def test_new_session_is_a_flag(bad: Any) -> None:
    with pytest.raises(TypeError, match=f"^new_session: True or False, not {bad!r}"):
        WatchedSubprocess(["true"], new_session=bad)


def test_nothing_is_asked_for_by_default() -> None:
    empty = SpawnAttributes()
    assert empty == SpawnAttributes(rlimits={})
    assert empty.rlimits == ()
    for name in ("oom_score_adj", "nice", "ionice", "affinity", "umask", "uid", "gid", "groups"):
        assert getattr(empty, name) is None
    assert empty.ionice_value is None
    assert empty.no_new_privs is False


def test_rlimits() -> None:
    given = {"nofile": 64, "core": (0, None), "AS": None, resource.RLIMIT_CPU: (1, -1)}
    assert SpawnAttributes(rlimits=given).rlimits == tuple(
        sorted(
            [
                (resource.RLIMIT_NOFILE, 64, 64),
                (resource.RLIMIT_CORE, 0, NO_LIMIT),
                (resource.RLIMIT_AS, NO_LIMIT, NO_LIMIT),
                (resource.RLIMIT_CPU, 1, NO_LIMIT),
            ]
        )
    )


@pytest.mark.parametrize(
    ("given", "kept", "value"),
    [
        ("idle", ("idle", 0), 3 << 13),
        ("best-effort", ("best-effort", 4), 2 << 13 | 4),
        (("best-effort", 0), ("best-effort", 0), 2 << 13),
        (["realtime", 7], ("realtime", 7), 1 << 13 | 7),
    ],
)
def test_ionice(given: Any, kept: tuple[str, int], value: int) -> None:
    attributes = SpawnAttributes(ionice=given)
    assert (attributes.ionice, attributes.ionice_value) == (kept, value)


def test_affinity_is_a_set_of_cpus() -> None:
    assert SpawnAttributes(affinity=(n for n in (3, 0, 3))).affinity == (0, 3)


# -- user and groups


def member_of_more() -> pwd.struct_passwd:
    """A user other than ours, who is in the most groups that anybody is in."""
    others = [user for user in pwd.getpwall() if user.pw_uid != os.geteuid()]
    return max(others, key=lambda user: len(os.getgrouplist(user.pw_name, user.pw_gid)))


def test_a_user_brings_the_groups_of_the_user() -> None:
    user = member_of_more()
    for uid in (user.pw_name, user.pw_uid):
        attributes = SpawnAttributes(uid=uid)
        assert (attributes.uid, attributes.gid) == (user.pw_uid, user.pw_gid)
        assert attributes.groups is not None
        expected = os.getgrouplist(pwd.getpwuid(user.pw_uid).pw_name, user.pw_gid)
        assert sorted(attributes.groups) == sorted(expected)


def test_what_is_given_with_a_user_stands() -> None:
    user = member_of_more()
    attributes = SpawnAttributes(uid=user.pw_uid, gid=12345, groups=[])
    assert (attributes.gid, attributes.groups) == (12345, ())
    assert SpawnAttributes(uid=user.pw_uid, gid=12345).groups is not None
    assert 12345 in (SpawnAttributes(uid=user.pw_uid, gid=12345).groups or ())


def test_the_group_root_is_not_taken_for_no_group() -> None:
    """gid 0 is false, and a default must not take its place."""
    user = member_of_more()
    attributes = SpawnAttributes(uid=user.pw_uid, gid=0)
    assert attributes.gid == 0
    assert attributes.groups is not None
    assert sorted(attributes.groups) == sorted(os.getgrouplist(user.pw_name, 0))


def test_a_user_that_nobody_knows_keeps_none_of_our_groups() -> None:
    attributes = SpawnAttributes(uid=unknown_uid(), gid=7)
    assert (attributes.gid, attributes.groups) == (7, ())


def test_ourselves_need_no_privilege() -> None:
    """setgroups(2) takes CAP_SETGID even for the groups that one has."""
    attributes = SpawnAttributes(uid=os.geteuid())
    assert attributes.groups is None
    assert attributes.gid == pwd.getpwuid(os.geteuid()).pw_gid


def test_groups_by_name_and_number() -> None:
    first, second = grp.getgrall()[:2]
    attributes = SpawnAttributes(gid=first.gr_name, groups=[second.gr_name, 4711])
    assert (attributes.gid, attributes.groups) == (first.gr_gid, (second.gr_gid, 4711))


def test_attributes_do_not_change() -> None:
    attributes: Any = SpawnAttributes(nice=1)
    with pytest.raises(AttributeError):
        attributes.nice = 2
    assert attributes == SpawnAttributes(nice=1)
    assert hash(attributes) == hash(SpawnAttributes(nice=1))


LAZY = {"attr", "attrs", "pwd", "grp", "proctree.attributes", "proctree.limits"}


def imported(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import proctree"],
        ["-m", "proctree.cli", "run", "--", "true"],
        ["-m", "proctree.cli", "run", "--foreground", "--", "true"],
    ],
    ids=["import", "run", "foreground"],
)
def test_nobody_pays_for_what_is_not_asked_for(arguments: list[str]) -> None:
    modules = imported(*arguments)
    assert "proctree.watched" in modules
    assert modules & LAZY == set()


def test_they_are_imported_when_they_are_asked_for() -> None:
    # By what they import: what import_module() itself imports is not in that list.
    for name in ("SpawnAttributes", "Limits"):
        assert name in proctree.__all__
        assert "attrs" in imported("-c", f"import proctree; proctree.{name}")
