"""A host program's tests may fake subprocess: that is about the host's own processes. What proctree
starts is real all the same, and is none of the fake's business."""

from __future__ import annotations

import subprocess

import pytest

import proctree


@pytest.mark.parametrize("containment", ["warden", "group"])
def test_a_faked_subprocess_is_not_ours(fp, containment):
    fp.register(["deploy", fp.any()], stdout="pretended")
    assert subprocess.run(["deploy", "now"], capture_output=True).stdout == b"pretended"
    recorded = list(fp.calls)

    outcome = proctree.run(
        ["sh", "-c", "echo real; exit 3"], stdout=proctree.CAPTURE, containment=containment
    )

    assert (outcome.returncode, outcome.stdout) == (3, b"real\n")
    assert outcome.pid is not None
    assert list(fp.calls) == recorded == [["deploy", "now"]]


def test_a_command_that_the_fake_does_not_know_runs(fp):
    with pytest.raises(fp.exceptions.ProcessNotRegisteredError):
        subprocess.run(["true"])
    assert proctree.run(["true"]).ok


def test_a_callable_that_uses_the_fake_gets_it(fp):
    """It runs in a fork of the test process, fake and all."""
    fp.register(["deploy"], stdout="pretended")

    def work() -> None:
        print(subprocess.run(["deploy"], capture_output=True, text=True).stdout)

    outcome = proctree.run(work, stdout=proctree.CAPTURE)
    assert (outcome.returncode, outcome.stdout) == (0, b"pretended\n")
