"""Builds of the warden that report their own errors do report them, and a report fails the test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import proctree
from integration import wardens
from integration.conftest import QUICK, WATCHED, fail_on_reports
from proctree.containment.warden import WARDEN_VARIABLE

pytestmark = pytest.mark.skipif(
    not wardens.SOURCES.is_dir(), reason="these tests have been copied without the sources"
)

MISTAKES = {
    "one too many": (
        wardens.SANITIZED,
        ("tree.c", "i < CACHE_SIZE; i++) {\n        if (w->cache[i].fd >= 0)", "i < ", "i <= "),
        "index 16 out of bounds",
    ),
    "a null pointer": (
        wardens.SANITIZED,
        ("tree.c", "    w->killed = killed;\n", "killed;", "NULL;"),
        "SEGV on unknown address",
    ),
    "never written": (
        wardens.VALGRIND,
        ("channel.c", "    memset(&message.members[count], 0,", "memset", "if (0) memset"),
        "points to uninitialised byte(s)",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_fails_the_test(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    name, (file, where, right, wrong), report = MISTAKES[what]
    if reason := wardens.unavailable(name):
        pytest.skip(reason)
    sources = tmp_path / "warden"
    shutil.copytree(wardens.SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(where) == 1
    (sources / file).write_text(text.replace(where, where.replace(right, wrong)))
    build = wardens.build(name, sources)
    request.config.add_cleanup(build.remove)
    request.node.stash[WATCHED] = build
    monkeypatch.setenv(WARDEN_VARIABLE, build.path)
    outcome = proctree.run(["sh", "-c", "sleep 1000 & exit 0"], containment="warden", kill=QUICK)
    assert outcome.survivors == ()
    with pytest.raises(pytest.fail.Exception) as caught:
        fail_on_reports(request.node)
    assert report in str(caught.value)
    fail_on_reports(request.node)  # the next test is not blamed for it


@pytest.mark.wardens("sanitized", "valgrind")
def test_without_a_mistake_nothing_is_reported(request: pytest.FixtureRequest) -> None:
    outcome = proctree.run(["sh", "-c", "exit 3"], containment="warden")
    assert (outcome.returncode, outcome.containment) == (3, "warden")
    fail_on_reports(request.node)
