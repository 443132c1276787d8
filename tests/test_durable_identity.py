"""The same target is known again by another process, and another one is not taken for it."""

from __future__ import annotations

import collections
import enum
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proctree.durable.identity import TEXT_MAX, fingerprint
from proctree.functions import Function


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Point:
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def norm(self) -> None: ...


class Tags(set):  # type: ignore[type-arg]
    pass


def job(*args: object) -> None: ...


def of(*args: Any, **kwargs: Any) -> str:
    return fingerprint(Function("job:main", args, kwargs)).digest


DIFFERENT = {
    "command": lambda: fingerprint(["make", "all"]),
    "other arguments": lambda: fingerprint(["make all"]),
    "working directory": lambda: fingerprint(["make", "all"], cwd="/"),
    "function": lambda: fingerprint("job:main"),
    "other function": lambda: fingerprint("job:other"),
    "function elsewhere": lambda: fingerprint("job:main", cwd="/"),
    "callable": lambda: fingerprint(job),
    "method": lambda: fingerprint(Point(1, 2).norm),
    "partial": lambda: fingerprint(functools.partial(job, 1)),
    "other partial": lambda: fingerprint(functools.partial(job, 2)),
    "its name as a command": lambda: fingerprint(["job:main"]),
    **{
        f"argument {index}": lambda value=value: fingerprint(Function("job:main", (value,)))
        for index, value in enumerate(
            (
                *(0, 0.0, False, None, "", b"", "0", b"0", -1, 1, 1.0, True, 1j, 10**5000),
                *(
                    (),
                    [],
                    {},
                    (0,),
                    [0],
                    {0: 0},
                    {"a": (1, 2)},
                    {"a": 1, "b": 2},
                    [[0], []],
                    [[], [0]],
                ),
                *(
                    {1, 2},
                    frozenset({1, 2}),
                    Tags({1, 2}),
                    bytearray(b"0"),
                    float("inf"),
                    float("nan"),
                ),
                *(Colour.RED, Colour.BLUE, Path("/a"), Point, job, len, collections.deque([1, 2])),
                *(collections.OrderedDict(a=1), collections.Counter("aab"), ["a", "b"], ["ab"]),
            )
        )
    },
    "with an object": lambda: fingerprint(Function("job:main", (Point(1, 2),))),
    "with another one": lambda: fingerprint(Function("job:main", (Point(2, 1),))),
    "with a keyword": lambda: fingerprint(Function("job:main", kwargs={"x": 0})),
}


def test_different_targets():
    digests = {what: make().digest for what, make in DIFFERENT.items()}
    assert len(set(digests.values())) == len(DIFFERENT)
    assert all(len(digest) == 64 for digest in digests.values())


PRINTING = """
import sys
sys.path[:0] = sys.argv[1:]
import test_durable_identity as here
for make in here.DIFFERENT.values():
    print(make().digest)
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_interpreter_makes_the_same(seed):
    """The hashes of texts are others there, and so is the order of sets."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    here = [make().digest for make in DIFFERENT.values()]
    assert done.stdout.split() == here


def test_equal_values_are_the_same_whichever_objects_they_are():
    name = "".join(["long ", "enough"])
    again = "".join(["long ", "enough"])
    assert name is not again
    assert of([name, name]) == of([name, again])
    shared = [1]
    assert of([shared, shared]) == of([[1], [1]])
    assert of(Point(1, [2])) == of(Point(1, [2]))
    assert of({"a": 1, "b": 2}) == of({"b": 2, "a": 1})
    assert of(a=1, b=2) == of(b=2, a=1)


def test_what_contains_itself():
    def around(value: Any) -> list[Any]:
        ring: list[Any] = [value]
        ring.append(ring)
        return ring

    assert of(around(1)) == of(around(1))
    assert of(around(1)) != of(around(2))


def test_what_shares_much_does_not_take_long():
    value: list[Any] = []
    for _ in range(100):
        value = [value, value]
    assert of(value) == of(value)


def test_the_template_and_the_environment_do_not_count(monkeypatch):
    before = fingerprint(["env"])
    monkeypatch.setenv("PROCTREE_ANYTHING", "else")
    assert fingerprint(["env"]) == before
    assert fingerprint("job:main") == fingerprint(Function("job:main"))


def test_texts_for_people():
    assert fingerprint(["echo", "a b"]).text == "echo 'a b'"
    assert fingerprint("job:main").text == "job:main"
    assert fingerprint(functools.partial(job, 1)).text == f"{__name__}.job"
    assert len(fingerprint(["x" * 5000]).text) == TEXT_MAX


@pytest.mark.parametrize(
    ("target", "error"), [("echo", TypeError), ([], ValueError), (7, TypeError), ([7], TypeError)]
)
def test_what_is_no_target(target, error):
    with pytest.raises(error, match="argv"):
        fingerprint(target)


def test_nested_too_deeply():
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(ValueError, match="nested too deeply"):
        fingerprint(functools.partial(job, value))
