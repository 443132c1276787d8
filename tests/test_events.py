"""Events go where the host program wants them, and nowhere else."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

import proctree
from proctree import events


@pytest.fixture(autouse=True)
def structlog_as_it_was() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )


@pytest.mark.parametrize("imports", ["", "import structlog\n"])
def test_nothing_is_printed_when_nobody_configured_anything(imports):
    done = run_python(imports + "import proctree\nassert proctree.run(['true']).ok")
    assert (done.stdout, done.stderr) == ("", "")


def test_a_warning_never_goes_to_standard_output():
    done = run_python(
        "import structlog\n"
        "from proctree import events\n"
        "events.debug('quiet')\n"
        "events.warning('heard', pid=7)\n"
    )
    assert done.stdout == ""
    assert done.stderr == "heard pid=7\n"


def test_logging_is_imported_only_when_there_is_something_to_say():
    done = run_python(
        "import sys\n"
        "from proctree import events\n"
        "events.debug('quiet')\n"
        "print('logging' in sys.modules, 'structlog' in sys.modules)\n"
        "events.error('heard')\n"
        "print('logging' in sys.modules, 'structlog' in sys.modules)\n"
    )
    assert done.stdout == "False False\nTrue False\n"


def test_warnings_go_to_the_standard_logger_of_that_name(caplog):
    caplog.set_level(logging.DEBUG, "proctree")
    events.debug("quiet", pid=1)
    events.warning("tree.survivor", pid=7, name="x y")
    events.error("loop.defect")
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("proctree", "WARNING", "tree.survivor pid=7 name='x y'"),
        ("proctree", "ERROR", "loop.defect "),
    ]


def test_events_of_a_tree_arrive_where_structlog_is_configured():
    structlog.configure()
    with structlog.testing.capture_logs() as logs:
        outcome = proctree.run(["sh", "-c", "exit 3"], name="three")
    started, ended = (
        next(log for log in logs if log["event"] == event)
        for event in ("tree.started", "tree.ended")
    )
    assert started == {
        "event": "tree.started",
        "log_level": "debug",
        "tree_id": outcome.tree_id,
        "pid": outcome.pid,
        "name": "three",
        "containment": outcome.containment,
    }
    assert (ended["tree_id"], ended["reason"], ended["returncode"]) == (
        outcome.tree_id,
        "exited",
        3,
    )


@pytest.mark.parametrize("emit", [events.debug, events.warning, events.error])
def test_each_level_reaches_structlog(emit):
    structlog.configure()
    with structlog.testing.capture_logs() as logs:
        emit("something", name="x", level_of="y")
    assert logs == [
        {"event": "something", "log_level": emit.__name__, "name": "x", "level_of": "y"}
    ]


def broken(_logger: Any, _method: str, _event: Any) -> Any:
    raise RuntimeError("a processor of the host")


@pytest.mark.parametrize("emit", [events.debug, events.warning, events.error])
def test_a_processor_that_raises_reaches_nobody(emit, capsys):
    structlog.configure(processors=[broken])
    emit("something")
    assert "logging something failed" in capsys.readouterr().err


def test_a_processor_that_raises_holds_up_no_tree():
    structlog.configure(processors=[broken])
    assert proctree.run(["true"]).ok


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_nor_does_it_without_a_standard_error(stderr, monkeypatch, tmp_path):
    """As in a daemon: sys.stderr is None, or closed."""
    structlog.configure(processors=[broken])
    file = open(tmp_path / "stderr", "w")  # noqa: SIM115
    file.close()
    monkeypatch.setattr(sys, "stderr", None if stderr is None else file)
    events.warning("something")
