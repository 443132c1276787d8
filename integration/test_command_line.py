"""`proctree run` as a shell user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.conftest import eventually, living

PROCTREE = os.path.join(os.path.dirname(sys.executable), "proctree")


def begin(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PROCTREE, "run", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def finish(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    process.stdout.close()
    return process.wait()


def test_standard_streams_pass_through() -> None:
    done = subprocess.run(
        [PROCTREE, "run", "--", "sh", "-c", "cat; echo to stderr >&2; exit 3"],
        input="through",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "through", "to stderr\n")


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_tree_by_the_policy(
    actors: str, signo: signal.Signals, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    script = f"setsid {actors} ignore & {actors} pause & wait"
    process = begin("--grace", "0.3", "--json", str(report), "--", "sh", "-c", script)
    assert [read_line(process) for _ in range(2)] == ["ready\n", "ready\n"]
    process.send_signal(signo)
    # SIGTERM by the policy, whatever asked for it.
    assert finish(process) == 128 + signal.SIGTERM
    outcome = json.loads(report.read_text())
    assert (outcome["reason"], outcome["detail"]) == ("killed", f"proctree got {signo.name}")
    assert [stage["signal"] for stage in outcome["stages"]] == ["SIGTERM", "SIGKILL"]
    assert outcome["survivors"] == []
    assert not living()


def test_sigkill_of_the_command_itself(actors: str) -> None:
    process = begin("--grace", "0.3", "--", "sh", "-c", f"setsid {actors} ignore & wait")
    read_line(process)
    process.kill()
    finish(process)
    eventually(lambda: not living(), "the warden ends the tree")


def test_timeout_and_grace(actors: str) -> None:
    process = begin("--timeout", "0.3", "--grace", "0.2", "--", actors, "ignore")
    assert read_line(process) == "ready\n"
    assert finish(process) == 124
    assert not living()


def test_nohup_is_respected(actors: str) -> None:
    """A SIGHUP that was ignored when we started stays ignored, for us and for the command."""
    process = begin(
        "--",
        actors,
        "pause",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert read_line(process) == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM


@pytest.mark.parametrize("containment", ["warden", "group"])
def test_leftovers(actors: str, containment: str) -> None:
    process = begin(
        "--containment", containment, "--grace", "5", "--", "sh", "-c", f"{actors} pause & exit 4"
    )
    assert finish(process) == 4
    assert not living()


def test_a_signal_while_it_starts(actors: str) -> None:
    """At any moment of its own start too, nothing is left."""
    for _ in range(20):
        process = begin("--", actors, "pause")
        process.send_signal(signal.SIGTERM)
        assert finish(process) in (128 + signal.SIGTERM, -signal.SIGTERM, 125)
    eventually(lambda: not living(), "nothing is left")
