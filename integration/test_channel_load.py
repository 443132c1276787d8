"""A short run of channel_load.py; the long one is `python -m integration.channel_load`."""

from __future__ import annotations

import os

import pytest

from integration.channel_load import SHAPES
from integration.channel_parts import run_tree

REQUESTS = int(os.environ.get("PROCTREE_CHANNEL_REQUESTS", "24000"))
"""Of all shapes together."""


@pytest.mark.timeout(120 + REQUESTS / 200)
def test_every_kind_of_caller() -> None:
    """On one channel of one process. It exits with 1 if any request did not end as it should."""
    printed = run_tree("channel_load", "--tree", f"--requests={REQUESTS}").decode()
    lines = [line for line in printed.splitlines() if " 0 wrong, " in line and " 0 hung" in line]
    assert [line.partition(":")[0] for line in lines] == list(SHAPES), printed
