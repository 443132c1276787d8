"""What a supervisor of a job does next: row by row."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctree.durable.jobplan import (
    AfterFind,
    AfterPoll,
    Step,
    View,
    after_find,
    after_poll,
    exit_of,
    found_of,
    next_step,
    wait_status,
)
from proctree.durable.recording import Cause, Exit, Request
from proctree.durable.store import Attempt
from proctree.durable.table import Found
from proctree.protocol import NOTE_MAX

REQUEST = Request("k", "t", "f", "0" * 16, "job", "b", 1, "h", 2, 3)


@pytest.mark.parametrize(
    ("view", "step"),
    [
        # What was there before this supervisor came: the decision table.
        (View(Found.NOTHING), Step.BEGIN),
        (View(Found.UNREADABLE), Step.BEGIN),
        (View(Found.RUNNING), Step.POLL),
        (View(Found.FINISHED), Step.RESULT),
        (View(Found.FAILED), Step.BEGIN),
        (View(Found.UNSURE), Step.FIND),
        # Of another target.
        (View(Found.NOTHING, same_target=False), Step.BEGIN),
        (View(Found.UNREADABLE, same_target=False), Step.BEGIN),
        (View(Found.RUNNING, same_target=False), Step.REFUSE),
        (View(Found.FINISHED, same_target=False), Step.REFUSE),
        (View(Found.FAILED, same_target=False), Step.REFUSE),
        (View(Found.UNSURE, same_target=False), Step.REFUSE),
        (View(Found.FINISHED, same_target=False, key_alone=True), Step.RESULT),
        (View(Found.RUNNING, same_target=False, key_alone=True), Step.POLL),
        # While somebody else has the key, nothing is done about it.
        (View(Found.NOTHING, claimed=False), Step.WATCH),
        (View(Found.UNREADABLE, claimed=False), Step.WATCH),
        (View(Found.RUNNING, claimed=False), Step.WATCH),
        (View(Found.FAILED, claimed=False), Step.WATCH),
        (View(Found.FAILED, claimed=False, joined=True), Step.WATCH),
        (View(Found.UNSURE, claimed=False), Step.WATCH),
        (View(Found.FINISHED, claimed=False), Step.RESULT),
        (View(Found.RUNNING, claimed=False, same_target=False), Step.REFUSE),
        # What was begun or ran since: its end is the result, or costs a retry.
        (View(Found.FINISHED, joined=True, retries=1), Step.RESULT),
        (View(Found.FAILED, joined=True), Step.RESULT),
        (View(Found.FAILED, joined=True, retries=1), Step.BEGIN),
        (View(Found.FAILED, joined=True, retries=1, cancelled=True), Step.RESULT),
        (View(Found.FAILED, cancelled=True), Step.BEGIN),
        # Between the intent and the handle.
        (View(Found.UNSURE, joined=True, fresh=True), Step.SUBMIT),
        (View(Found.UNSURE, joined=True, fresh=True, cancelled=True), Step.FIND),
        (View(Found.UNSURE, joined=True, cancelled=True), Step.FIND),
        (View(Found.UNSURE, joined=True, fresh=True, claimed=False), Step.WATCH),
        (View(Found.RUNNING, joined=True, cancelled=True), Step.POLL),
    ],
    ids=str,
)
def test_each_row(view: View, step: Step) -> None:
    assert next_step(view) is step


VIEWS = st.builds(
    View,
    found=st.sampled_from([found for found in Found if found is not Found.GONE]),
    same_target=st.booleans(),
    key_alone=st.booleans(),
    claimed=st.booleans(),
    joined=st.booleans(),
    fresh=st.booleans(),
    cancelled=st.booleans(),
    retries=st.integers(-1, 3),
)


@given(VIEWS)
def test_whatever_is_found(view: View) -> None:
    """Nothing is done without the key; nothing new is begun beside what may be running; and nothing
    is submitted of which it is not certain that it was not, or that is not wanted any more."""
    step = next_step(view)
    if not view.claimed:
        assert step in (Step.WATCH, Step.RESULT, Step.REFUSE)
    if view.found in (Found.RUNNING, Found.UNSURE):
        assert step not in (Step.BEGIN, Step.RESULT)
    if step is Step.SUBMIT:
        assert view.fresh
        assert not view.cancelled


@pytest.mark.parametrize(
    ("found", "cancelled", "then"),
    [
        (True, False, AfterFind.RECORD),
        (True, True, AfterFind.RECORD),
        (False, False, AfterFind.SUBMIT),
        (False, True, AfterFind.GIVE_UP),
    ],
)
def test_behind_find(found: bool, cancelled: bool, then: AfterFind) -> None:
    assert after_find(found, cancelled) is then


@pytest.mark.parametrize(
    ("running", "cancelled", "called", "then"),
    [
        (True, False, False, AfterPoll.WAIT),
        (True, True, False, AfterPoll.CANCEL),
        (True, True, True, AfterPoll.WAIT),
        (False, False, False, AfterPoll.END),
        (False, True, False, AfterPoll.END),
    ],
)
def test_behind_poll(running: bool, cancelled: bool, called: bool, then: AfterPoll) -> None:
    assert after_poll(running, cancelled, called) is then


@pytest.mark.parametrize(
    ("attempt", "found"),
    [
        (None, Found.NOTHING),
        (Attempt(1, None, trouble="torn"), Found.UNREADABLE),
        (Attempt(1, REQUEST), Found.UNSURE),
        (Attempt(1, REQUEST, "h"), Found.RUNNING),
        (Attempt(1, REQUEST, "h", Exit(0)), Found.FINISHED),
        (Attempt(1, REQUEST, "h", Exit(2 << 8)), Found.FINISHED),
        (Attempt(1, REQUEST, "h", Exit(1 << 8)), Found.FAILED),
        (Attempt(1, REQUEST, "h", Exit(None)), Found.FAILED),
        (Attempt(1, REQUEST, "h", Exit(0, Cause.CANCELLED)), Found.FAILED),
        # The handle, or the exit, is what is unreadable: it can still be asked for.
        (Attempt(1, REQUEST, None, trouble="handle: torn"), Found.UNSURE),
        (Attempt(1, REQUEST, "h", trouble="exit: torn"), Found.RUNNING),
    ],
    ids=str,
)
def test_what_is_known_of_an_attempt(attempt: Attempt | None, found: Found) -> None:
    assert found_of(attempt, {0, 2}) is found


@given(st.integers(0, 255) | st.integers(-64, -1))
def test_statuses_are_those_of_wait(returncode: int) -> None:
    assert os.waitstatus_to_exitcode(wait_status(returncode)) == returncode


@pytest.mark.parametrize("returncode", [256, -65, 1 << 40])
def test_no_process_has_such_a_status(returncode: int) -> None:
    with pytest.raises(ValueError, match=f"{returncode} is neither an exit status"):
        wait_status(returncode)


@given(st.text(st.characters(exclude_categories=()), max_size=400))
def test_any_detail_can_be_recorded(detail: str) -> None:
    how = exit_of(3, detail, False, 1.5)
    assert Exit.decode(how.encode()) == how
    assert how.returncode == 3
    assert how.by_itself
    assert len(how.note.encode()) <= NOTE_MAX
    if detail.isascii():
        assert how.note == detail[:NOTE_MAX]


def test_what_was_cancelled_did_not_end_by_itself() -> None:
    assert exit_of(0, "", True, 0.0).cause is Cause.CANCELLED
    assert exit_of(None, "", True, 0.0).returncode is None
