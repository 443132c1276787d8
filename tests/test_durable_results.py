"""From the record of an attempt to the outcome that users get."""

from __future__ import annotations

import signal

import pytest

from proctree.durable.recording import Cause, Exit, Request
from proctree.durable.results import outcome_of
from proctree.policy import Scope
from proctree.records import Cut, Ending, Member, Reason, StageSent, Usage

REQUEST = Request(
    key="key",
    target="sh",
    fingerprint="",
    tree_id="0123456789abcdef",
    kind="tree",
    boot="",
    pid_namespace=1,
    host="",
    supervisor=1,
    requested=1,
    containment="cgroup",
)


@pytest.mark.parametrize(
    ("how", "reason", "detail", "returncode"),
    [
        (Exit(0), Reason.EXITED, "", 0),
        (Exit(3 << 8), Reason.EXITED, "", 3),
        (Exit(9), Reason.SIGNALED, "", -9),
        (
            Exit(15, Cause.OWNER, "timeout\0not done after 5 s"),
            Reason.TIMEOUT,
            "not done after 5 s",
            -15,
        ),
        (Exit(15, Cause.OWNER, ""), Reason.KILLED, "", -15),
        (Exit(15, Cause.OWNER, "of-the-future\0why"), Reason.KILLED, "why", -15),
        (Exit(15, Cause.CANCELLED), Reason.KILLED, "cancelled", -15),
        (Exit(0, Cause.ASKED), Reason.KILLED, "a signal asked its warden to end it", 0),
        (Exit(None, Cause.NOT_STARTED, error=2, step=12), Reason.EXEC_FAILED, "exec: ENOENT", None),
        (
            Exit(None, Cause.NOT_STARTED, error=2, step=99),
            Reason.EXEC_FAILED,
            "step 99: ENOENT",
            None,
        ),
    ],
)
def test_each_cause_has_its_reason(how, reason, detail, returncode):
    outcome = outcome_of(how, REQUEST)
    assert (outcome.reason, outcome.detail, outcome.returncode) == (reason, detail, returncode)
    assert outcome.tree_id == "0123456789abcdef"
    assert outcome.containment == "cgroup"


def test_a_lease_that_ran_out_is_the_loss_of_the_supervisor():
    outcome = outcome_of(Exit(15, Cause.LEASE), REQUEST)
    assert outcome.reason is Reason.SUPERVISOR_LOST
    assert "lease" in outcome.detail


def test_what_was_seen_adds_what_is_not_recorded_and_changes_nothing_else():
    stage = StageSent(signal.SIGTERM, Scope.TREE, 0.1, 1)
    member = Member(7, 1, 1, "S", "left")
    ending = Ending(
        returncode=None,
        reason=Reason.WARDEN_LOST,
        detail="end of file",
        stages=(stage,),
        leftovers=(member,),
        survivors=(),
        usage=Usage(),
        duration=99.0,
        containment="warden",
        tree_id="x",
        pid=None,
        stdout=b"out",
        stderr=None,
        stdout_cut=Cut(1, 2),
        stderr_cut=None,
        callback_errors=3,
    )
    usage = Usage(1.0, 2.0, 3)
    outcome = outcome_of(Exit(0, pid=4, duration=5.0, usage=usage), REQUEST, ending)
    assert (outcome.reason, outcome.returncode, outcome.detail) == (Reason.EXITED, 0, "")
    assert (outcome.pid, outcome.duration, outcome.usage) == (4, 5.0, usage)
    assert (outcome.stages, outcome.leftovers) == ((stage,), (member,))
    assert (outcome.stdout, outcome.stdout_cut, outcome.callback_errors) == (b"out", Cut(1, 2), 3)


def test_what_was_captured_from_the_files_is_in_it():
    captured = ((b"out", Cut(3, 4)), (b"err", None))
    outcome = outcome_of(Exit(0), REQUEST, captured=captured)
    assert (outcome.stdout, outcome.stdout_cut) == (b"out", Cut(3, 4))
    assert (outcome.stderr, outcome.stderr_cut) == (b"err", None)
