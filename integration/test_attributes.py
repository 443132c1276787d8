"""Spawn attributes on real processes: they are there in the main process and in what it starts, in
nobody else, and what the kernel refuses is an error of the start, the same from every backend."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import proctree
from integration.conftest import (
    DEADLINE,
    QUICK,
    Lines,
    eventually,
    is_alive,
    living,
    start_supervisor,
)
from proctree import SpawnAttributes, WatchedSubprocess
from proctree.command import Target
from proctree.errors import errno_name

NOBODY = 65534
GROUP = 4711
CPU = max(os.sched_getaffinity(0))

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes privileges")


def fork_twice() -> None:
    """A callable that starts a process which starts a process."""
    for _ in range(2):
        if os.fork() != 0:
            break
    else:
        os.write(1, b"ready\n")
    signal.pause()


TARGETS: dict[str, Target] = {
    "command": ["sh", "-c", "sh -c 'sleep 1000 & echo ready; wait'; exit 0"],
    "callable": fork_twice,
}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[str(request.param)]


def _limits(pid: int) -> dict[str, tuple[str, str]]:
    text = Path(f"/proc/{pid}/limits").read_text()
    found = re.findall(r"^(Max [a-z ]+?)  +(\S+) +(\S+)", text, re.MULTILINE)
    return {name: (soft, hard) for name, soft, hard in found}


def state_of(pid: int) -> dict[str, Any]:
    """What the kernel says about a process."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    kind, level = psutil.Process(pid).ionice()
    return {
        "oom_score_adj": int(Path(f"/proc/{pid}/oom_score_adj").read_text()),
        "nice": os.getpriority(os.PRIO_PROCESS, pid),
        "ionice": (int(kind), level),
        "affinity": os.sched_getaffinity(pid),
        "umask": status["Umask"],
        "uid": set(status["Uid"].split()),
        "gid": set(status["Gid"].split()),
        "groups": status["Groups"].split(),
        "no_new_privs": status["NoNewPrivs"],
        **_limits(pid),
    }


def ids(number: int) -> set[str]:
    """Real, effective, saved, and that of the file system."""
    return {str(number)}


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"rlimits": {"nofile": (64, 100), "core": 0, "fsize": 12345}},
        {
            "Max open files": ("64", "100"),
            "Max core file size": ("0", "0"),
            "Max file size": ("12345", "12345"),
        },
    ),
    ({"rlimits": {"cpu": (100, None)}}, {"Max cpu time": ("100", "unlimited")}),
    # Above what a signed number holds, and yet not "no limit".
    ({"rlimits": {"as": 2**63}}, {"Max address space": (str(2**63), str(2**63))}),
    ({"oom_score_adj": 500}, {"oom_score_adj": 500}),
    ({"nice": 7}, {"nice": 7}),
    ({"nice": 3, "ionice": ("best-effort", 7)}, {"nice": 3, "ionice": (2, 7)}),
    ({"ionice": "idle"}, {"ionice": (3, 0)}),
    ({"ionice": "best-effort"}, {"ionice": (2, 4)}),
    ({"affinity": [CPU]}, {"affinity": {CPU}}),
    ({"umask": 0o137}, {"umask": "0137"}),
    ({"umask": 0}, {"umask": "0000"}),
    ({"no_new_privs": True}, {"no_new_privs": "1"}),
]

PRIVILEGED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"nice": -3}, {"nice": -3}),
    ({"gid": GROUP}, {"gid": ids(GROUP)}),
    ({"groups": [GROUP, 5]}, {"groups": ["5", str(GROUP)]}),
    ({"groups": []}, {"groups": []}),
    (
        {"uid": NOBODY, "gid": GROUP, "groups": [GROUP]},
        {"uid": ids(NOBODY), "gid": ids(GROUP), "groups": [str(GROUP)]},
    ),
]

# What takes privileges is done before they are given up.
EVERYTHING: tuple[dict[str, Any], dict[str, Any]] = (
    {"uid": "nobody", "gid": GROUP, "groups": [], "nice": -2, "rlimits": {"nofile": 50}}
    | {"umask": 0o77, "oom_score_adj": 1000, "affinity": [CPU], "ionice": "idle"}
    | {"no_new_privs": True},
    {"uid": ids(NOBODY), "gid": ids(GROUP), "groups": [], "nice": -2, "umask": "0077"}
    | {"oom_score_adj": 1000, "Max open files": ("50", "50"), "no_new_privs": "1"}
    | {"affinity": {CPU}, "ionice": (3, 0)},
)


def _named(case: tuple[dict[str, Any], dict[str, Any]]) -> str:
    return "+".join(f"{name}={value}" for name, value in case[0].items()).replace(" ", "")[:60]


def holds(pid: int, expected: dict[str, Any]) -> None:
    state = state_of(pid)
    if "ionice" not in expected:
        # Some kernels say what would follow from the nice value, others that nobody has asked.
        expected = {**expected, "ionice": state["ionice"]}
    assert state == expected


def check(case: tuple[dict[str, Any], dict[str, Any]], target: Target, containment: str) -> None:
    given, expected = case
    ours = state_of(os.getpid())
    del ours["ionice"]
    lines = Lines()
    with WatchedSubprocess.start(
        target,
        attributes=SpawnAttributes(**given),
        containment=containment,
        stdout=proctree.Lines(lines),
        kill=QUICK,
    ) as handle:
        lines.wait_for()
        assert handle.pid is not None
        below = psutil.Process(handle.pid).children(recursive=True)
        assert len(below) == 2
        for pid in (handle.pid, *(process.pid for process in below)):
            holds(pid, ours | expected)
        holder = handle._tree.contained.root()
        if holder is not None and holder != handle.pid:
            # It shares its memory with the child that is given them, and nothing else.
            holds(holder, ours)
    holds(os.getpid(), ours)
    assert not living()


@pytest.mark.parametrize("containment", ["warden", "group"])
@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=as_root) for case in PRIVILEGED)],
    ids=[_named(case) for case in (*CASES, *PRIVILEGED)],
)
def test_each_arrives_in_the_whole_tree_and_nowhere_else(
    case: tuple[dict[str, Any], dict[str, Any]], containment: str
) -> None:
    """By the two that there are to apply them: the warden's C, and Python between fork and exec."""
    check(case, TARGETS["command"], containment)


@as_root
def test_all_together_everywhere(target: Target, containment: str) -> None:
    check(EVERYTHING, target, containment)


@as_root
def test_a_user_by_name_brings_the_groups(containment: str) -> None:
    outcome = proctree.run(
        ["sh", "-c", "id -u; id -g; id -G"],
        attributes=SpawnAttributes(uid="nobody"),
        containment=containment,
        stdout=proctree.CAPTURE,
    )
    by_id = subprocess.run(
        ["sh", "-c", "id -u nobody; id -g nobody; id -G nobody"], capture_output=True, check=True
    )
    assert outcome.stdout == by_id.stdout


def test_the_default_changes_nothing(target: Target, containment: str) -> None:
    check(({}, {}), target, containment)


# -- what a limit of open files must not hide


def test_what_is_open_above_the_limit_does_not_reach_the_command(containment: str) -> None:
    """Some other part of the host program let a descriptor leak."""
    reader, leaked = os.pipe()
    high = 200
    os.dup2(leaked, high)
    try:
        outcome = proctree.run(
            ["ls", "/proc/self/fd"],
            attributes=SpawnAttributes(rlimits={"nofile": 64}),
            containment=containment,
            stdout=proctree.CAPTURE,
        )
        assert outcome.ok
        # The last one is that of ls itself.
        assert (outcome.stdout or b"").split() == [b"0", b"1", b"2", b"3"]
    finally:
        for fd in (reader, leaked, high):
            os.close(fd)


def test_what_is_passed_above_the_limit_does(containment: str) -> None:
    reader, writer = os.pipe()
    high = 200
    os.dup2(writer, high, inheritable=False)
    try:
        outcome = proctree.run(
            ["sh", "-c", "echo passed >/proc/self/fd/200"],
            attributes=SpawnAttributes(rlimits={"nofile": 64}),
            pass_fds=[high],
            containment=containment,
        )
        assert outcome.ok
        assert os.read(reader, 100) == b"passed\n"
    finally:
        for fd in (reader, writer, high):
            os.close(fd)


# -- privileges


@pytest.fixture
def setuid_cat() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="proctree-setuid-")
    try:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "cat")
        shutil.copy(shutil.which("cat") or "/bin/cat", path)
        os.chmod(path, 0o4755)
        yield path
    finally:
        shutil.rmtree(folder)


def uids_of(path: str, containment: str, *, no_new_privs: bool) -> list[bytes]:
    """Those that a program has when NOBODY starts it: real, effective, saved, file system."""
    outcome = proctree.run(
        ["sh", "-c", f"{path} /proc/self/status; exit 0"],
        attributes=SpawnAttributes(uid=NOBODY, gid=NOBODY, groups=[], no_new_privs=no_new_privs),
        containment=containment,
        stdout=proctree.CAPTURE,
    )
    (line,) = re.findall(rb"^Uid:(.*)$", outcome.stdout or b"", re.MULTILINE)
    return line.split()


@as_root
def test_set_uid_gains_nothing_without_new_privileges(setuid_cat: str, containment: str) -> None:
    nobody = str(NOBODY).encode()
    assert uids_of(setuid_cat, containment, no_new_privs=True) == [nobody] * 4
    assert uids_of(setuid_cat, containment, no_new_privs=False) == [nobody, b"0", b"0", b"0"]


# -- who dies with whom

SUPERVISOR = """
import signal, sys, proctree
from proctree import SpawnAttributes, WatchedSubprocess
containment, kind, uid = sys.argv[1:]
handle = WatchedSubprocess.start(
    ["sleep", "1000"] if kind == "command" else signal.pause,
    attributes=SpawnAttributes(uid=int(uid), gid=int(uid), groups=[]),
    containment=containment,
)
print(handle._tree.contained.root(), handle.pid, flush=True)
handle.wait()
"""


def uid_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0]


@as_root
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("containment", ["cgroup", "warden", "group"], indirect=True)
def test_another_user_dies_with_who_started_it_all_the_same(containment: str, kind: str) -> None:
    """The kernel forgets PR_SET_PDEATHSIG when the credentials change (prctl(2)). The supervisor
    is stopped, so that it cannot sweep up what its warden left."""
    with start_supervisor(SUPERVISOR, containment, kind, str(NOBODY)) as supervisor:
        assert supervisor.stdout is not None
        holder, main = (int(word) for word in supervisor.stdout.readline().split())
        try:
            assert uid_of(main) == str(NOBODY)
            if containment == "group":
                supervisor.kill()
            else:
                supervisor.send_signal(signal.SIGSTOP)
                os.kill(holder, signal.SIGKILL)
            eventually(lambda: not is_alive(main), "the main process dies")
        finally:
            supervisor.kill()
    eventually(lambda: not living(), "nothing is left")
    # What a warden that was killed could not take away any more.
    proctree.sweep()


# -- what is refused


def refusal(target: Target, containment: str, attributes: SpawnAttributes) -> tuple[str, str, str]:
    """The exception, its error and the note, and that nothing is left."""
    handle = WatchedSubprocess(target, attributes=attributes, containment=containment)
    with pytest.raises(OSError) as info:
        handle.launch()
    assert handle.outcome is not None
    assert handle.outcome.reason is proctree.Reason.EXEC_FAILED
    assert not living()
    leaf = getattr(handle._tree.contained, "cgroup", None)
    assert leaf is None or not os.path.exists(leaf)
    assert info.value.filename is None
    (note,) = info.value.__notes__
    return type(info.value).__name__, info.value.strerror or "", note


def expected_refusal(name: str, number: int) -> tuple[str, str, str]:
    return (
        type(OSError(number, "")).__name__,
        f"{os.strerror(number)} (attributes: {name})",
        f"proctree: attributes.{name}: {errno_name(number)} at step '{name}'",
    )


def may_lower_oom_score() -> bool:
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    return bool(effective >> 24 & 1)  # CAP_SYS_RESOURCE


TARGETS_THAT_END: dict[str, Target] = {"command": ["true"], "callable": lambda: None}


@pytest.fixture(params=TARGETS_THAT_END)
def short(request: pytest.FixtureRequest) -> Target:
    return TARGETS_THAT_END[str(request.param)]


def test_an_affinity_to_no_cpu_that_there_is(short: Target, containment: str) -> None:
    refused = refusal(short, containment, SpawnAttributes(affinity=[8191]))
    assert refused == expected_refusal("affinity", errno.EINVAL)


def test_more_open_files_than_the_kernel_allows_anybody(short: Target, containment: str) -> None:
    beyond = int(Path("/proc/sys/fs/nr_open").read_text()) + 1
    attributes = SpawnAttributes(rlimits={"core": 0, "nofile": (10, beyond)})
    refused = refusal(short, containment, attributes)
    assert refused == expected_refusal("rlimits", errno.EPERM)


@pytest.mark.skipif(may_lower_oom_score(), reason="we have CAP_SYS_RESOURCE")
def test_a_lower_oom_score(short: Target, containment: str) -> None:
    lower = state_of(os.getpid())["oom_score_adj"] - 1
    refused = refusal(short, containment, SpawnAttributes(oom_score_adj=lower))
    assert refused == expected_refusal("oom_score_adj", errno.EACCES)


@pytest.mark.skipif(may_lower_oom_score(), reason="we have CAP_SYS_RESOURCE")
def test_a_higher_hard_limit(short: Target, containment: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is nothing above no limit")
    attributes = SpawnAttributes(rlimits={"memlock": (max(soft, 0), hard + 4096)})
    refused = refusal(short, containment, attributes)
    assert refused == expected_refusal("rlimits", errno.EPERM)


WITHOUT_CAPABILITIES = """
import json, sys, proctree
from proctree import SpawnAttributes, WatchedSubprocess
for containment in sys.argv[2:]:
    for kind, target in (("command", ["true"]), ("callable", lambda: None)):
        for arguments in json.loads(sys.argv[1]):
            try:
                options = {"attributes": SpawnAttributes(**arguments), "containment": containment}
                WatchedSubprocess.start(target, **options)
                answer = "started"
            except OSError as error:
                answer = [type(error).__name__, error.strerror, *error.__notes__]
            print(json.dumps([containment, kind, arguments, answer]), flush=True)
"""

REFUSED = [
    ("all", {"nice": -5}, "nice", errno.EACCES),
    ("all", {"ionice": "realtime"}, "ionice", errno.EPERM),
    ("all", {"groups": [5]}, "groups", errno.EPERM),
    ("all", {"gid": 5}, "gid", errno.EPERM),
    ("all", {"uid": NOBODY}, "groups", errno.EPERM),
    ("setuid", {"uid": NOBODY}, "uid", errno.EPERM),
]


@as_root
@pytest.mark.parametrize("lost", ["all", "setuid"])
def test_who_has_no_capability_gets_an_error(lost: str) -> None:
    """At its step, the same from the C of the warden and from the Python of the others."""
    backends = ["warden", "group"]
    cases = [case for case in REFUSED if case[0] == lost]
    arguments = json.dumps([case[1] for case in cases])
    done = subprocess.run(
        ["setpriv", f"--bounding-set=-{lost}", sys.executable, "-c", WITHOUT_CAPABILITIES]
        + [arguments, *backends],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [
        [containment, kind, given, [*expected_refusal(name, number)]]
        for containment in backends
        for kind in ("command", "callable")
        for _, given, name, number in cases
    ]


def test_the_steps_before_and_after_are_told_apart(tmp_path: Path, containment: str) -> None:
    """chdir is done with our rights, exec with those of the user: as su(1) and systemd do it."""
    good = SpawnAttributes(umask=0o77)
    with pytest.raises(FileNotFoundError) as info:
        proctree.run(["true"], cwd=tmp_path / "no", attributes=good, containment=containment)
    assert info.value.filename == str(tmp_path / "no")
    with pytest.raises(FileNotFoundError) as info:
        proctree.run(["no-such-command"], attributes=good, containment=containment)
    assert info.value.filename == "no-such-command"


@as_root
def test_the_program_must_be_the_users_to_execute(containment: str) -> None:
    folder = tempfile.mkdtemp(prefix="proctree-closed-")
    try:
        os.chmod(folder, 0o700)
        program = shutil.copy(shutil.which("true") or "/bin/true", folder)
        options: dict[str, Any] = {"cwd": folder, "containment": containment}
        with pytest.raises(PermissionError) as info:
            proctree.run([program], attributes=SpawnAttributes(uid=NOBODY), **options)
        assert info.value.filename == program
        assert "at step 'exec'" in info.value.__notes__[0]
        assert proctree.run([program], **options).ok
    finally:
        shutil.rmtree(folder)


def test_a_refused_callable_never_runs(containment: str, tmp_path: Path) -> None:
    """Many times, since how far its warden has come meanwhile is a matter of chance."""
    mark = tmp_path / "ran"
    touch: Callable[[], object] = mark.touch
    for _ in range(10):
        refused = refusal(touch, containment, SpawnAttributes(affinity=[8191]))
        assert refused == expected_refusal("affinity", errno.EINVAL)
    assert not mark.exists()
