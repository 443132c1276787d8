"""The descriptors that are objects: `fds.File`."""

from __future__ import annotations

import os

import pytest

from forks import in_child, is_open
from proctree.process import fds


@pytest.fixture
def descriptor(tmp_path) -> int:
    return os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_it_is_closed_with_the_last_reference(descriptor):
    with fds.making():
        file = fds.File(descriptor)
    assert is_open(descriptor)
    del file
    assert not is_open(descriptor)
    with fds.making(), fds.File(os.dup(0)):
        assert all(known() is not None for known in fds._files)  # what has gone is not remembered


def test_a_forked_child_has_it_closed(descriptor):
    with fds.making(), fds.File(descriptor) as file:
        assert not in_child(lambda: is_open(descriptor))
        assert in_child(lambda: file.closed)
        assert is_open(descriptor)


def test_a_child_that_is_spared_it_has_it_by_its_number(descriptor):
    """And keeps it through its own forks, and when the object has gone."""
    files = [fds.File(descriptor)]

    def child() -> bool:
        files.clear()
        with fds.sparing(()):  # its own forks know nothing of that
            return is_open(descriptor) and in_child(lambda: is_open(descriptor))

    with fds.making(), fds.sparing((descriptor,)):
        assert in_child(child)
    assert not in_child(lambda: is_open(descriptor))
    files[0].close()


def test_a_closed_one_is_nothing_to_a_child(descriptor):
    with fds.making():
        file = fds.File(descriptor)
    file.close()
    other = os.dup(0)  # may have its number
    assert in_child(lambda: is_open(other))
    os.close(other)
