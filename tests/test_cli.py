"""The command: exit statuses, what it writes, and what it must not import."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import proctree


def cli(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proctree.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


def shell(script: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return cli("run", *options, "--", "sh", "-c", script)


# -- exit statuses


@pytest.mark.parametrize("status", [0, 1, 3, 124, 127, 255])
def test_the_command_has_its_own_status(status):
    done = shell(f"exit {status}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_128_and_its_number(signo):
    assert shell(f"kill -{signo:d} $$").returncode == 128 + signo


@pytest.mark.parametrize("script", ["sleep 1000", "sleep 1000 & wait"])
def test_124_after_a_timeout(script):
    assert shell(script, "--timeout", "0.1").returncode == 124


def test_124_also_for_what_ignores_the_signal():
    done = shell("trap '' TERM; while :; do sleep 1000; done", "--timeout=0.3", "--grace=0.1")
    assert done.returncode == 124


def test_124_not_for_what_is_done_in_time():
    assert shell("exit 5", "--timeout", "1000").returncode == 5


def test_126_cannot_be_executed(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    done = cli("run", "--", plain)
    assert (done.returncode, done.stdout) == (126, "")
    assert done.stderr == f"proctree run: {plain}: Permission denied\n"


def test_126_no_known_format(tmp_path):
    odd = tmp_path / "odd"
    odd.write_bytes(b"\0\1\2")
    odd.chmod(0o755)
    assert cli("run", "--", odd).returncode == 126


@pytest.mark.parametrize("command", ["no-such-command-anywhere", "/no/such/command"])
def test_127_not_found(command):
    done = cli("run", "--", command)
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == f"proctree run: {command}: not found\n"


USAGE_ERRORS = [
    [],
    ["walk"],
    ["run"],
    ["run", "--"],
    ["run", "--no-such-option", "--", "true"],
    ["run", "--timeout", "--", "true"],
    ["run", "--timeout", "soon", "--", "true"],
    ["run", "--timeout", "-1", "--", "true"],
    ["run", "--timeout", "nan", "--", "true"],
    ["run", "--grace", "-1", "--", "true"],
    ["run", "--grace", "inf", "--", "true"],
    ["run", "--containment", "jail", "--", "true"],
    ["run", "--leftovers", "eat", "--", "true"],
    ["run", "--", ""],
]


@pytest.mark.parametrize("arguments", USAGE_ERRORS, ids=" ".join)
def test_125_for_a_mistake_in_the_usage(arguments):
    """Never argparse's own 2, which could be the command's."""
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (125, "")
    assert "proctree" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--timeout", "-1"], "timeout"),
        (["--grace", "nan"], "grace"),
        (["--containment", "jail"], "containment"),
        (["--leftovers", "eat"], "leftovers"),
    ],
)
def test_the_mistake_is_named(arguments, named):
    assert named in cli("run", *arguments, "--", "true").stderr


def test_125_when_the_helper_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PROCTREE_WARDEN", str(tmp_path / "missing"))
    done = cli("run", "--containment", "warden", "--", "true")
    assert done.returncode == 125
    assert str(tmp_path / "missing") in done.stderr


# -- arguments


def test_what_follows_the_dashes_is_the_commands():
    done = cli("run", "--", "printf", "%s|", "--timeout", "--help", "--", "-x", "")
    assert (done.returncode, done.stdout) == (0, "--timeout|--help|--|-x||")


def test_a_command_that_looks_like_an_option_is_a_command():
    assert cli("run", "--", "--timeout").returncode == 127


def test_the_dashes_may_be_left_out_before_a_plain_command():
    assert cli("run", "--timeout", "1000", "printf", "hello").stdout == "hello"


def test_dashes_of_the_command_are_not_lost():
    """Whoever leaves ours out may still have some of the command's own."""
    done = cli("run", "printf", "%s|", "a", "--", "b")
    assert (done.returncode, done.stdout) in ((0, "a|--|b|"), (125, ""))


def test_standard_streams_are_passed_through():
    done = subprocess.run(
        [sys.executable, "-m", "proctree.cli", "run", "--", "sh", "-c", "cat; echo err >&2"],
        input=b"in\xff",
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"in\xff", b"err\n")


def test_help_and_version():
    assert cli("--version").stdout == f"proctree {proctree.__version__}\n"
    for arguments in (["--help"], ["-h"], ["run", "--help"]):
        done = cli(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "proctree run [OPTIONS] -- COMMAND" in done.stdout


def test_the_installed_command():
    script = Path(sys.executable).parent / "proctree"
    assert subprocess.run([script, "run", "--", "sh", "-c", "exit 9"]).returncode == 9


# -- leftovers


def test_what_the_command_leaves_behind_is_ended():
    done = shell("sleep 1000 & echo $!")
    assert done.returncode == 0
    assert not Path(f"/proc/{int(done.stdout)}").exists()


# -- json


def test_json(tmp_path):
    file = tmp_path / "how.json"
    done = shell("exit 3", "--json", file, "--name", "three")
    assert (done.returncode, done.stdout) == (3, "")
    how = json.loads(file.read_text())
    assert (how["returncode"], how["reason"], how["survivors"]) == (3, "exited", [])
    assert re.fullmatch("[0-9a-f]{16}", how["tree_id"])
    assert how["pid"] > 0
    assert how["duration"] > 0
    assert set(how["usage"]) == set(proctree.Usage._fields)
    assert set(how) == set(proctree.Outcome.__annotations__)


def test_json_of_a_timeout(tmp_path):
    file = tmp_path / "how.json"
    shell("sleep 1000", "--json", file, "--timeout", "0.1")
    how = json.loads(file.read_text())
    assert (how["reason"], how["returncode"]) == ("timeout", -signal.SIGTERM)
    assert [(stage["signal"], stage["scope"]) for stage in how["stages"]] == [("SIGTERM", "tree")]


def test_json_of_what_never_ran(tmp_path):
    file = tmp_path / "how.json"
    assert cli("run", "--json", file, "--", "no-such-command-anywhere").returncode == 127
    how = json.loads(file.read_text())
    assert (how["reason"], how["returncode"], how["pid"]) == ("exec-failed", None, None)


def test_json_that_cannot_be_written(tmp_path):
    done = shell("exit 0", "--json", tmp_path / "missing" / "how.json")
    assert done.returncode == 125
    assert "--json" in done.stderr
    assert "No such file or directory" in done.stderr


# -- imports


def test_running_a_command_imports_nothing_slow():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "proctree.cli", "run", "--", "true"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "proctree.containment.warden" in imported
    slow = {"attr", "attrs", "ctypes", "json", "logging", "msgspec", "psutil", "structlog"}
    slow |= {"opentelemetry", "subprocess"}
    assert imported & slow == set()


def test_importing_the_package_starts_nothing():
    code = "import threading, proctree\nprint(threading.active_count(), proctree.loop.exists())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1 False\n"
