"""A signal handler at each single bytecode of a request: see channel_injector.py.

What may become of a request depends on the mode: with handlers that ask, and beside a thread that
asks, it is answered as if nothing had been; a handler's exception comes out of it, and the next one
is answered. In all of them: nobody gets what is for somebody else, nobody hangs, nothing is left.
"""

from __future__ import annotations

import pytest

from integration.channel_parts import run_tree

# Each N of the most telling ones, and of others one of a few: all of it takes five minutes
# (`python -m integration.channel_injector --run SHAPE MODE`).
CASES = [
    ("plain", "nested", 1),
    ("plain", "signal", 2),
    ("plain", "signal-twice", 4),
    ("plain", "thread", 3),
    ("plain", "raise", 1),
    # What the channel itself expects from the system, and from what it iterates over.
    ("plain", "raise-timeout", 1),
    ("plain", "raise-blocking", 1),
    ("plain", "raise-reset", 2),
    ("plain", "raise-index", 1),
    ("plain", "raise-runtime", 1),
    ("plain", "raise-key", 2),
    ("polled", "raise", 1),
    ("polled", "signal", 4),
    ("due", "raise", 2),
    ("large", "signal", 5),
    ("large", "raise-timeout", 2),
    ("fds", "signal", 2),
    ("fds", "raise", 1),
    ("noting", "signal", 2),
    ("noting", "raise", 2),
    ("beside-leader", "raise", 1),
    ("beside-follower", "raise", 4),
    ("beside-follower", "signal", 7),
    ("beside-loop", "raise", 2),
    ("beside-loop", "raise-timeout", 3),
    ("tasks", "signal", 4),
]


@pytest.mark.parametrize(("shape", "mode", "stride"), CASES)
def test_at_every_bytecode(shape: str, mode: str, stride: int) -> None:
    printed = run_tree("channel_injector", shape, mode, str(stride)).decode()
    told = dict(word.split("=") for word in printed.split() if "=" in word)
    # Had the way of a request got shorter than that, nothing much would have been interrupted.
    assert int(told["opcodes"]) > 300, printed
    assert int(told["handlers"]) > 300 // stride, printed
