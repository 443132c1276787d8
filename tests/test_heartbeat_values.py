"""What heartbeats and readiness checks take, and what they say about what they do not take."""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from proctree.supervisor.fields import Endpoint, to_endpoint
from proctree.supervisor.heartbeat import Beat, Heartbeat, HttpBeat, Rejected
from proctree.supervisor.readiness import (
    LINE_MAX,
    PAUSE_LEAST,
    PAUSE_MOST,
    Check,
    File,
    Http,
    Matcher,
    Notified,
    OutputLine,
    Tcp,
    UnixSocket,
    pause,
)

URL = "http://127.0.0.1:8793/run/7"


def beat(_beat: Beat) -> None:
    """A heartbeat."""


async def later(_beat: Beat) -> None:
    """None."""


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Heartbeat(None), TypeError, "beat: "),
    (lambda: Heartbeat(HttpBeat), TypeError, "beat: "),
    (lambda: Heartbeat(later), TypeError, "beat: an ordinary function"),
    (lambda: Heartbeat(beat, 0), ValueError, "interval: "),
    (lambda: Heartbeat(beat, -1.0), ValueError, "interval: "),
    (lambda: Heartbeat(beat, math.nan), ValueError, "interval: "),
    (lambda: Heartbeat(beat, math.inf), ValueError, "interval: "),
    (lambda: Heartbeat(beat, "10"), TypeError, "interval: "),
    (lambda: Heartbeat(beat, True), TypeError, "interval: "),
    (lambda: Heartbeat(beat, timeout=0), ValueError, "timeout: "),
    (lambda: Heartbeat(beat, timeout=None), TypeError, "timeout: "),
    (lambda: Heartbeat(beat, 2, timeout=3), ValueError, "timeout: 3 s is longer than the interval"),
    (lambda: Heartbeat(beat, failures=0), ValueError, "failures: "),
    (lambda: Heartbeat(beat, failures=2.0), TypeError, "failures: "),
    (lambda: Heartbeat(beat, failures=True), TypeError, "failures: "),
    (lambda: HttpBeat(None), TypeError, "url: "),
    (lambda: HttpBeat("ftp://host/"), ValueError, "url: .*scheme 'ftp'"),
    (lambda: HttpBeat("127.0.0.1/beat"), ValueError, "url: .*scheme"),
    (lambda: HttpBeat("http:///beat"), ValueError, "url: .*no host"),
    (lambda: HttpBeat("http://:80/beat"), ValueError, "url: .*no host"),
    (lambda: HttpBeat("http://host:99999/"), ValueError, "url: "),
    (lambda: HttpBeat("http://host:0/"), ValueError, "url: 0 is not between"),
    (lambda: HttpBeat("http://host:x/"), ValueError, "url: "),
    (lambda: HttpBeat("http://[::1/"), ValueError, "url: "),
    (lambda: HttpBeat("http://user:word@host/"), ValueError, "url: no user"),
    (lambda: HttpBeat("http://host/a b"), ValueError, "url: .*percent-encoded"),
    (lambda: HttpBeat("http://host/a\r\nX: y"), ValueError, "url: .*percent-encoded"),
    (lambda: HttpBeat("http://host/ä"), ValueError, "url: .*percent-encoded"),
    (lambda: HttpBeat("http://a..b/"), ValueError, "url: .*no host name"),
    (lambda: HttpBeat("http://a b/"), ValueError, "url: .*no host name"),
    (lambda: HttpBeat(URL, method="GET /"), ValueError, "method: "),
    (lambda: HttpBeat(URL, method=None), TypeError, "method: "),
    (lambda: HttpBeat(URL, headers="X: y"), TypeError, "headers: "),
    (lambda: HttpBeat(URL, headers={"X": 1}), TypeError, r"headers\['X'\]: "),
    (lambda: HttpBeat(URL, headers={"X ": "y"}), ValueError, r"headers\['X '\]: "),
    (lambda: HttpBeat(URL, headers={"X": "y\r\nZ: 1"}), ValueError, r"headers\['X'\]: "),
    (lambda: HttpBeat(URL, headers={"X": "\u20ac"}), ValueError, r"headers\['X'\]: "),
    (lambda: HttpBeat(URL, body="text"), TypeError, "body: "),
    (lambda: HttpBeat(URL, body=later), TypeError, "body: "),
    (lambda: HttpBeat(URL, rejected=409), TypeError, "rejected: "),
    (lambda: HttpBeat(URL, rejected={"409"}), TypeError, "rejected: "),
    (lambda: HttpBeat(URL, rejected={99}), ValueError, "rejected: 99"),
    (lambda: HttpBeat(URL, rejected={204}), ValueError, "rejected: 204 is among the accepted"),
    (lambda: HttpBeat(URL, accepted="200"), TypeError, "accepted: "),
    (lambda: HttpBeat(URL, accepted=range(200, 700)), ValueError, "accepted: 600"),
    (lambda: HttpBeat(URL, context=True), TypeError, "context: "),
    (lambda: HttpBeat(URL, context=ssl.create_default_context()), ValueError, "context: "),
    (lambda: Tcp(0), ValueError, "port: 0 is not between 1 and 65535"),
    (lambda: Tcp(65536), ValueError, "port: 65536"),
    (lambda: Tcp("80"), TypeError, "port: "),
    (lambda: Tcp(80, host=""), ValueError, "host: "),
    (lambda: Tcp(80, host="a/b"), ValueError, "host: "),
    (lambda: Tcp(80, host=None), TypeError, "host: "),
    (lambda: Tcp(80, timeout=0), ValueError, "timeout: "),
    (lambda: Tcp(80, timeout=math.nan), ValueError, "timeout: "),
    (lambda: Tcp(80, interval=0), ValueError, "interval: "),
    (lambda: Tcp(80, interval=math.inf), ValueError, "interval: "),
    (lambda: UnixSocket("run/socket"), ValueError, "path: .*not absolute"),
    (lambda: UnixSocket("/" + 107 * "x"), ValueError, "path: .*longer than the 107 bytes"),
    (lambda: UnixSocket("/" + 54 * "ä"), ValueError, "path: .*longer than the 107 bytes"),
    (lambda: UnixSocket("\0" + 108 * "x"), ValueError, "path: .*longer than the 108 bytes"),
    (lambda: UnixSocket("/a\0b"), ValueError, "path: .*NUL"),
    (lambda: UnixSocket(b"/socket"), TypeError, "path: "),
    (lambda: File("ready"), ValueError, "path: .*not absolute"),
    (lambda: File(3), TypeError, "path: "),
    (lambda: Http("https://"), ValueError, "url: .*no host"),
    (lambda: Http(URL, status=200), TypeError, "status: "),
    (lambda: Http(URL, status={1}), ValueError, "status: 1 "),
    (lambda: Check(None), TypeError, "function: "),
    (lambda: Check(later), TypeError, "function: an ordinary function"),
    (lambda: OutputLine("("), ValueError, "pattern: "),
    (lambda: OutputLine(b"ready"), TypeError, "pattern: "),
    (lambda: OutputLine("ready", "stdin"), ValueError, "stream: "),
    (lambda: Notified(timeout=-1), ValueError, "timeout: "),
]


@pytest.mark.parametrize(("make", "kind", "text"), WRONG, ids=[text for _, _, text in WRONG])
def test_an_error_names_the_field(make, kind, text):
    with pytest.raises(kind, match=f"^{text}"):
        make()


def test_defaults_of_a_heartbeat():
    heartbeat = Heartbeat(beat)
    assert (heartbeat.interval, heartbeat.timeout, heartbeat.failures) == (10.0, 5.0, 3)
    assert Heartbeat(beat, interval=2).timeout == 2.0
    http = HttpBeat(URL)
    assert (http.method, http.headers, http.body) == ("POST", (), None)
    assert set(http.rejected) == {404, 409, 410}
    assert http.accepted == range(200, 300)
    assert Heartbeat(http).beat is http


def test_values_are_frozen_and_can_be_evolved():
    http = HttpBeat(URL, headers={"Authorization": "Bearer s3cret"}, body=b"s3cret")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        http.url = "http://elsewhere/"  # type: ignore[misc]
    assert attrs.evolve(http, url="https://[::1]/").endpoint == Endpoint(True, "::1", 443, "/")
    assert attrs.evolve(http).headers == (("Authorization", "Bearer s3cret"),)
    assert "s3cret" not in repr(http)
    assert "s3cret" not in repr(Http(URL, headers={"X": "s3cret"}))
    hash(http), hash(Heartbeat(http)), hash(Tcp(80)), hash(OutputLine("a"))


def test_a_secret_header_is_not_in_its_error():
    with pytest.raises(ValueError) as caught:
        HttpBeat(URL, headers={"Authorization": "s3cret\n"})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "endpoint", "authority"),
    [
        ("http://h", Endpoint(False, "h", 80, "/"), "h"),
        ("https://H.example:443/a?b=c#d", Endpoint(True, "h.example", 443, "/a?b=c"), "h.example"),
        ("http://h:443/", Endpoint(False, "h", 443, "/"), "h:443"),
        ("http://[::1]:8080/x", Endpoint(False, "::1", 8080, "/x"), "[::1]:8080"),
        ("http://bücher.example/", Endpoint(False, "bücher.example", 80, "/"), None),
    ],
)
def test_a_url_is_taken_apart(url, endpoint, authority):
    assert to_endpoint(url) == endpoint
    assert endpoint.authority == (authority or "xn--bcher-kva.example")


def test_a_rejection_is_an_exception_of_ours():
    assert issubclass(Rejected, Exception)
    assert str(Rejected("gone")) == "gone"


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        (Tcp(8000), "tcp 127.0.0.1:8000"),
        (Tcp(8000, "::1"), "tcp [::1]:8000"),
        (Tcp(8000, host="localhost"), "tcp localhost:8000"),
        (UnixSocket("/run/x"), "unix socket /run/x"),
        (UnixSocket("\0x"), "unix socket @x"),
        (UnixSocket("/" + 106 * "x"), "unix socket /" + 106 * "x"),
        (Http("http://h/health?key=s3cret"), "GET http://h/health"),
        (File("/run/ready"), "file /run/ready"),
        (Check(beat), "check beat"),
        (OutputLine("ready$", "stdout"), "line /ready$/ on stdout"),
        (OutputLine("ready"), "line /ready/ on stdout or stderr"),
        (Notified(), "READY=1 by sd_notify"),
    ],
)
def test_a_probe_describes_itself_and_has_a_time(probe, text):
    assert probe.describe() == text
    assert probe.timeout == 90.0
    assert attrs.evolve(probe, timeout=math.inf).timeout == math.inf


def test_the_pause_grows_with_what_it_has_taken():
    assert pause(None, 0.0) == PAUSE_LEAST
    assert pause(None, 2.0) == 0.2
    assert pause(None, 3600.0) == PAUSE_MOST
    assert pause(5.0, 0.0) == 5.0


def test_a_line_matches_once_on_its_stream():
    matcher = Matcher(OutputLine(r"listening on \d+", "stdout"))
    assert matcher.trouble == "no line has come"
    assert not matcher.feed("stderr", "listening on 80")
    assert matcher.trouble == "no line has come"
    assert not matcher.feed("stdout", "starting\x07")
    assert matcher.trouble == "none of 1 lines matched, the last one is 'starting'"
    assert matcher.feed("stdout", "now listening on 80.")
    assert not matcher.feed("stdout", "listening on 80")


def test_both_streams_are_looked_at_unless_one_is_named():
    assert Matcher(OutputLine("x")).feed("stderr", "x")
    assert Matcher(OutputLine("x")).feed("stdout", "x")


def test_only_the_beginning_of_a_line_is_searched():
    matcher = Matcher(OutputLine("ready"))
    assert not matcher.feed("stdout", " " * LINE_MAX + "ready")
    assert len(matcher.trouble) < 500
    assert matcher.feed("stdout", " " * (LINE_MAX - 5) + "ready")
