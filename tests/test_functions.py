"""Functions by name: the values, and what is refused before anything is started."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import proctree
from proctree import Function, Template


class OfMain:
    """Pickled by a name that another interpreter does not have."""


OfMain.__module__ = "__main__"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((5,), TypeError, "^name: .*5"),
        (("",), ValueError, "^name: ''"),
        (("os",), ValueError, "^name: 'os'"),
        (("os:",), ValueError, "^name: "),
        ((":getpid",), ValueError, "^name: "),
        (("os:getpid()",), ValueError, "^name: "),
        (("os path:join",), ValueError, "^name: "),
        (("os:class",), ValueError, "^name: "),
        (("os:a:b",), ValueError, "^name: "),
        (("__main__:f",), ValueError, "^name: .*cannot import __main__; move the function"),
        (("os:getpid", "ab"), TypeError, "^args: .*'ab'"),
        (("os:getpid", 5), TypeError, "^args: .*5"),
        (("os:getpid", (), [1]), TypeError, "^kwargs: "),
        (("os:getpid", (), {1: 2}), TypeError, "^kwargs: "),
        (("os:getpid", (threading.Lock(),)), TypeError, "^args, kwargs: cannot be pickled: "),
        (("os:getpid", (lambda: None,)), TypeError, "^args, kwargs: cannot be pickled: "),
        (("os:getpid", (OfMain(),)), TypeError, "OfMain is of __main__, .* move it"),
        (("os:getpid", (), {"a": OfMain}), TypeError, "OfMain is of __main__"),
        (("os:getpid", (), {}, "t"), TypeError, "^template: .*'t'"),
    ],
)
def test_bad_functions(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Function(*arguments)


@pytest.mark.parametrize("target", ["ls", "ls -l", "http://a:80", "echo a:b", ":", "a:b:c"])
def test_a_text_that_is_none_says_what_would_be_one(target: str) -> None:
    with pytest.raises(TypeError, match=r"^argv: .*\(a function is \"module:function\"\)"):
        proctree.run(target)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"preload": "os"}, TypeError, "^preload: .*'os'"),
        ({"preload": 5}, TypeError, "^preload: .*5"),
        ({"preload": [5]}, TypeError, "^preload: .*5"),
        ({"preload": ["a b"]}, ValueError, "^preload: 'a b'"),
        ({"preload": ["__main__"]}, ValueError, "^preload: .*__main__"),
        ({"env": {"A": 1}}, TypeError, r"^env\['A'\]"),
        ({"cwd": 5}, TypeError, "^cwd: "),
        ({"name": 5}, TypeError, "^name: "),
    ],
)
def test_bad_templates(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Template(**options)


def test_a_function_is_frozen() -> None:
    function = Function("os:getpid", [1], {"a": 2})
    assert (function.args, function.kwargs, function.short_name) == ((1,), {"a": 2}, "getpid")
    with pytest.raises(AttributeError):
        function.name = "os:getppid"  # type: ignore[misc]


def test_one_that_was_never_used_is_closed_at_once() -> None:
    with Template(["json"]) as template:
        assert template.pid is None
        assert template.name == "json"
    template.close()
