"""Every key has one directory, which no other key has."""

from __future__ import annotations

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proctree.durable import keys

KEYS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=()), min_size=1, max_size=300
)


@given(KEYS)
@example(".")
@example("..")
@example("a/../b")
@example("~")
@example("%41")
@example("\ud800\udcff\u20ac\n")
@example("x" * 4096)
@example("\U0001f600" * 4096)
def test_a_name_that_is_one(key):
    name = keys.to_name(key)
    assert 0 < len(os.fsencode(name)) <= 255
    assert "/" not in name
    assert not name.startswith(".")
    assert keys.from_name(name) == (key if keys.says_all(name) else None)


@given(KEYS, KEYS)
@example("A", "%41")
@example("x" * 300, "x" * 301)
@example("\u20ac" * 200, "\u20ac" * 201)
def test_two_keys_have_two_names(one, other):
    assert (keys.to_name(one) == keys.to_name(other)) == (one == other)


def test_short_ones_can_be_read_by_people():
    assert keys.to_name("nightly-backup_2.1") == "nightly-backup_2.1"
    assert keys.to_name(".a b/c~") == "%2Ea%20b%2Fc%7E"


def test_a_long_one_is_cut_between_characters():
    assert "%" not in keys.to_name("a" * 149 + "/" * 100).partition("~")[0]


@pytest.mark.parametrize("name", ["", ".a", "%41", "%2e", "a%", "%00", "\u20ac", "a b", "%FF"])
def test_names_of_no_key(name):
    assert keys.from_name(name) is None


@pytest.mark.parametrize(
    ("key", "error"),
    [("", ValueError), ("a\0", ValueError), ("x" * 4097, ValueError), (b"k", TypeError)],
)
def test_what_is_no_key(key, error):
    with pytest.raises(error, match="key: "):
        keys.check_key(key)
