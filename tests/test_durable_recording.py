"""What is recorded of a run is read as it was written, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctree.durable.recording import Cause, Exit, Request, Unreadable
from proctree.records import Usage

TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
NUMBER = st.integers(0, 2**64)


def requests() -> st.SearchStrategy[Request]:
    return st.builds(
        Request,
        *(TEXT, TEXT, TEXT, TEXT, st.sampled_from(["tree", "job"]), TEXT),
        *(NUMBER, TEXT, NUMBER, NUMBER, TEXT, TEXT),
    )


def exits() -> st.SearchStrategy[Exit]:
    return st.builds(
        Exit,
        status=st.none() | st.integers(0, 0xFFFF),
        cause=st.sampled_from(Cause),
        note=st.text(max_size=40),
        error=st.integers(0, 200),
        step=st.integers(0, 40),
        pid=st.integers(0, 2**22),
        duration=st.integers(0, 2**30).map(lambda ms: ms / 1000),
        usage=st.builds(Usage, st.integers(0, 1000).map(float), st.integers(0, 1000).map(float)),
    )


@given(requests() | exits())
def test_what_is_written_is_read(record):
    read = type(record).decode(record.encode())
    assert read == record
    assert [type(value) for value in read] == [type(value) for value in record]


@given(requests() | exits(), st.data())
def test_one_byte_of_another_value_is_not_believed(record, data):
    whole = bytearray(record.encode())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Unreadable):
        type(record).decode(bytes(whole))


@given(requests() | exits(), st.data())
def test_cut_off_anywhere(record, data):
    whole = record.encode()
    with pytest.raises(Unreadable):
        type(record).decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
