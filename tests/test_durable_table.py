"""The decision table of durable runs, row by row."""

from __future__ import annotations

import pytest

from proctree.durable.table import TABLE, Decision, Found, decide, judge


def test_nothing_is_recorded_so_it_is_started():
    assert decide(Found.NOTHING, same_target=False) is Decision.START


def test_it_runs_so_we_reconnect():
    assert decide(Found.RUNNING, same_target=True) is Decision.RECONNECT


def test_it_has_finished_within_what_is_allowed_so_its_result_is_taken():
    assert decide(Found.FINISHED, same_target=True) is Decision.RESULT


def test_it_has_failed_so_another_attempt_is_made():
    assert decide(Found.FAILED, same_target=True) is Decision.START


def test_it_is_gone_so_another_attempt_is_made():
    assert decide(Found.GONE, same_target=True) is Decision.START


def test_it_is_unreadable_so_another_attempt_is_made_whatever_its_target_was():
    assert decide(Found.UNREADABLE, same_target=True) is Decision.START
    assert decide(Found.UNREADABLE, same_target=False) is Decision.START


def test_it_may_have_been_submitted_so_it_is_looked_for():
    assert decide(Found.UNSURE, same_target=True) is Decision.FIND


KNOWN = [found for found in Found if found not in (Found.NOTHING, Found.UNREADABLE)]


@pytest.mark.parametrize("found", KNOWN)
def test_another_target_is_refused_unless_the_key_alone_counts(found):
    assert decide(found, same_target=False) is Decision.REFUSE
    assert decide(found, same_target=False, key_alone=True) is TABLE[found]


def test_every_finding_has_a_row():
    assert set(TABLE) == set(Found)


@pytest.mark.parametrize(
    ("returncode", "by_itself", "expected"),
    [
        (0, True, Found.FINISHED),
        (3, True, Found.FINISHED),
        (1, True, Found.FAILED),
        (-9, True, Found.FAILED),
        (None, True, Found.FAILED),
        (0, False, Found.FAILED),  # it was ended, and was polite about it
        (-15, False, Found.FAILED),
    ],
)
def test_what_counts_as_finished(returncode, by_itself, expected):
    assert judge(returncode, by_itself, {0, 3}) is expected
