"""Trees with a pseudo-terminal: what they see, what is typed, and that they end all the same."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import proctree
from integration.conftest import DEADLINE, QUICK, eventually, living
from integration.test_endings import end
from proctree import CAPTURE, Chunks, ContainmentUnavailable, Limits, WatchedSubprocess
from proctree.process import cgroups, proof
from proctree.terminal import Terminal


class Screen:
    """What the terminal has shown, and somebody who waits for a text on it."""

    def __init__(self) -> None:
        self.text = ""
        self._changed = threading.Condition()
        self._seen = 0

    def __call__(self, data: bytes) -> None:
        with self._changed:
            self.text += data.decode()
            self._changed.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match behind the last one."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            match = re.compile(pattern).search(self.text, self._seen)
            found.extend([match] if match else [])
            return match is not None

        with self._changed:
            assert self._changed.wait_for(look, DEADLINE), (pattern, self.text[self._seen :])
            self._seen = found[0].end()
            return found[0]


def begin(target: Any, containment: str, **options: Any) -> tuple[WatchedSubprocess, Screen]:
    screen = Screen()
    options = {"pty": (24, 80), "kill": QUICK, **options}
    handle = WatchedSubprocess.start(
        target, containment=containment, stdout=Chunks(screen), **options
    )
    _begun.append(handle)
    return handle, screen


_begun: list[WatchedSubprocess] = []


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """A test that fails in the middle leaves its tree to nobody else."""
    yield
    while _begun:
        end(_begun.pop())


def terminal_of(handle: WatchedSubprocess) -> Terminal:
    assert handle.terminal is not None
    return handle.terminal


def done(handle: WatchedSubprocess) -> proctree.Outcome:
    outcome = handle.wait(timeout=DEADLINE)
    assert outcome is not None
    return outcome


# Each answer only when it is true: the name of the terminal is the same by all three descriptors,
# it is the controlling one, and its foreground group is that of the main process.
LOOK = """
test -t 0 && test -t 1 && test -t 2 && echo all three
exec 3>&1
name=$(tty); test "$name" = "$(tty <&3)" && test "$name" = "$(tty <&2)" && echo "the same: $name"
echo controlling >/dev/tty
stty size
cut -d' ' -f5-8 /proc/$$/stat
"""


def look() -> None:
    names = {os.ttyname(fd) for fd in (0, 1, 2)}
    print("all three" if all(os.isatty(fd) for fd in (0, 1, 2)) else "no")
    print("the same:", *names)
    with open("/dev/tty", "w") as tty:
        sys.stdout.flush()
        tty.write("controlling\n")
    size = os.get_terminal_size(0)
    print(size.lines, size.columns)
    stat = proof.read_stat(os.getpid())
    assert stat is not None
    number = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[4]
    print(stat.pgrp, stat.session, number, os.tcgetpgrp(0))


@pytest.mark.parametrize("target", [["sh", "-c", LOOK], look], ids=["command", "callable"])
def test_it_is_the_terminal_of_the_tree(target: Any, containment: str) -> None:
    outcome = proctree.run(target, pty=(33, 101), stdout=CAPTURE, containment=containment)
    assert outcome.ok
    lines = (outcome.stdout or b"").decode().split("\r\n")
    assert lines[0] == "all three"
    assert re.fullmatch("the same: /dev/pts/[0-9]+", lines[1])
    assert lines[2:4] == ["controlling", "33 101"]
    group, session, number, foreground = map(int, lines[4].split())
    assert group == session == foreground
    assert number != 0
    assert lines[5:] == [""]


def test_ours_is_not_touched(containment: str) -> None:
    """The terminal is not ours: we have the controlling one that we had, or none."""

    def ours() -> list[str]:
        return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[3:6]

    before = ours()
    assert proctree.run(["true"], pty=True, stdout=CAPTURE, containment=containment).ok
    assert ours() == before


def test_all_of_the_output_is_there(containment: str) -> None:
    """A pseudo-terminal hands it on by a worker of the kernel, behind the writer's back."""
    code = "import os\nfor i in range(50): os.write(1, b'%04d' % i * 750)"
    for _ in range(5):
        outcome = proctree.run(
            [sys.executable, "-S", "-c", code], pty=True, stdout=CAPTURE, containment=containment
        )
        assert outcome.stdout == b"".join(b"%04d" % i * 750 for i in range(50))


# -- typing


@pytest.mark.parametrize("typed", [b"", b"one\n", b"one\ntwo", b"one\n" * 20_000])
def test_bytes_are_typed_and_then_the_input_ends(typed: bytes, containment: str) -> None:
    """Much of it too: a terminal holds 4 KiB, so it takes turns with the reader."""
    outcome = proctree.run(
        ["sh", "-c", "stty -echo; printf '<'; cat; printf '>'"],
        pty=True,
        stdin=typed,
        stdout=CAPTURE,
        containment=containment,
        timeout=DEADLINE,
    )
    assert outcome.ok
    # What was typed before the echo was turned off is on the screen twice.
    shown = (outcome.stdout or b"").rpartition(b"<")[2]
    assert shown == typed.replace(b"\n", b"\r\n") + b">"


def test_a_callable_reads_what_is_typed(containment: str) -> None:
    def reads() -> None:
        print([sys.stdin.readline(), sys.stdin.readline()])

    outcome = proctree.run(
        reads, pty=True, stdin=b"one\ntwo", stdout=CAPTURE, containment=containment
    )
    assert (outcome.stdout or b"").endswith(b"['one\\n', 'two']\r\n")


def test_a_conversation(containment: str) -> None:
    handle, screen = begin(["sh", "-c", "stty -echo; echo ready; exec cat"], containment)
    screen.wait_for("ready\r\n")
    for word in ("hello", "again"):
        assert terminal_of(handle).write(f"{word}\n".encode())
        screen.wait_for(f"{word}\r\n")
    assert terminal_of(handle).write(b"")
    assert terminal_of(handle).write(b"\x04")  # VEOF
    assert done(handle).ok
    assert terminal_of(handle).write(b"too late") is False
    terminal_of(handle).resize(1, 1)  # and that does nothing


def type_for_ever(terminal: Terminal, answers: list[bool], typed: list[int]) -> None:
    while terminal.write(b"x" * 4096):
        typed[0] += 4096
    answers.append(False)


def test_a_tree_that_does_not_read_holds_the_typist_up(containment: str) -> None:
    """And its end lets the typist go."""
    handle, screen = begin(["sh", "-c", "stty raw -echo; echo ready; sleep 1000"], containment)
    screen.wait_for("ready")
    answers: list[bool] = []
    typed = [0]
    typist = threading.Thread(target=type_for_ever, args=(terminal_of(handle), answers, typed))
    typist.start()
    terminal = terminal_of(handle)

    def is_full() -> bool:
        full = typed[0]
        # A round trip of the loop, in which it could have taken more.
        assert proctree.run(["true"]).ok
        return bool(terminal._waiting) and 0 < full == typed[0]

    eventually(is_full, "it is held up")
    assert answers == []
    end(handle)
    typist.join(DEADLINE)
    assert answers == [False]


# -- signals by the terminal


@pytest.mark.parametrize(
    ("key", "signo"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)], ids=["^C", "^\\"]
)
def test_a_key_is_a_signal_for_the_foreground_group(
    key: bytes, signo: signal.Signals, containment: str
) -> None:
    handle, screen = begin(["sh", "-c", "echo ready; exec sleep 1000"], containment)
    screen.wait_for("ready")
    terminal_of(handle).write(key)
    outcome = done(handle)
    assert (outcome.reason, outcome.returncode) == (proctree.Reason.SIGNALED, -signo)


BASH = ["bash", "--norc", "--noprofile", "-i"]


def shell(containment: str) -> tuple[WatchedSubprocess, Screen]:
    env = {**os.environ, "PS1": "[ready]", "TERM": "dumb", "HISTFILE": ""}
    handle, screen = begin(BASH, containment, env=env)
    screen.wait_for(r"\[ready\]")
    return handle, screen


def test_a_key_interrupts_the_job_and_not_the_shell(containment: str) -> None:
    handle, screen = shell(containment)
    terminal = terminal_of(handle)
    terminal.write(b"sh -c 'echo be\"\"gin; exec cat'; echo not this\n")
    screen.wait_for("begin\r\n")
    terminal.write(b"\x03")
    screen.wait_for(r"\[ready\]")
    terminal.write(b'echo "status $?"\n')
    screen.wait_for("status 130\r\n")
    terminal.write(b"exit 5\n")
    assert done(handle).returncode == 5
    assert "\nnot this" not in screen.text


def test_job_control_inside(containment: str) -> None:
    handle, screen = shell(containment)
    terminal = terminal_of(handle)
    terminal.write(b'sh -c \'echo be""gin; while read x; do echo "<$x>"; done\'\n')
    screen.wait_for("begin\r\n")
    terminal.write(b"one\n")
    screen.wait_for("<one>\r\n")
    terminal.write(b"\x1a")
    screen.wait_for(r"Stopped +sh -c")
    screen.wait_for(r"\[ready\]")
    terminal.write(b"fg\n")
    terminal.write(b"two\n")
    screen.wait_for("<two>\r\n")
    terminal.write(b"\x04")
    screen.wait_for(r"\[ready\]")
    terminal.write(b"sleep 1000 &\n")
    screen.wait_for(r"\[ready\]")
    terminal.write(b"exit\n")
    outcome = done(handle)
    assert outcome.returncode == 0
    assert not living()


# -- the size


SIZES = """
import os, signal
def show(*_):
    size = os.get_terminal_size(0)
    os.write(1, b"%d x %d\\n" % (size.lines, size.columns))
signal.signal(signal.SIGWINCH, show)
show()
while True: signal.pause()
"""


def test_another_size_is_a_signal(containment: str) -> None:
    handle, screen = begin([sys.executable, "-S", "-c", SIZES], containment)
    screen.wait_for("24 x 80\r\n")
    for rows, columns in ((50, 132), (1, 65535)):
        terminal_of(handle).resize(rows, columns)
        screen.wait_for(f"{rows} x {columns}\r\n")
    end(handle)


# -- the end


def test_who_holds_the_terminal_in_the_background_ends_too(actors: str, containment: str) -> None:
    """SIGHUP ignored, in a session of its own, the terminal as its standard streams."""
    handle, screen = begin(
        ["sh", "-c", f"trap '' HUP; setsid {actors} ignore & {actors} ignore & wait"], containment
    )
    screen.wait_for("ready\r\nready\r\n")
    outcome = end(handle)
    assert outcome.survivors == ()
    assert not living()


def test_main_that_leaves_somebody_at_the_terminal(actors: str, containment: str) -> None:
    handle, screen = begin(
        ["sh", "-c", f"trap '' HUP; setsid {actors} ignore & read line; exit 3"], containment
    )
    screen.wait_for("ready\r\n")
    terminal_of(handle).write(b"go\n")
    outcome = done(handle)
    assert (outcome.returncode, len(outcome.leftovers)) == (3, 1)
    assert not living()


def test_a_process_outside_that_holds_the_terminal_costs_nothing(containment: str) -> None:
    """Here it is the test itself."""
    handle, screen = begin(["sh", "-c", "tty; stty -echo; read line; echo last words"], containment)
    name = screen.wait_for("(/dev/pts/[0-9]+)\r\n").group(1)
    held = os.open(name, os.O_RDWR | os.O_NOCTTY)
    try:
        terminal_of(handle).write(b"go\n")
        assert done(handle).ok
        screen.wait_for("last words\r\n")
        # Our end of it is closed: hung up.
        with pytest.raises(termios.error):
            termios.tcgetattr(held)
    finally:
        os.close(held)


def test_a_program_that_cannot_be_started_leaves_no_terminal(containment: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        proctree.run(["no-such-command"], pty=True, stdout=CAPTURE, containment=containment)
    assert os.listdir("/proc/self/fd") == before


# -- limits: where this machine can have none, it says so


@pytest.mark.parametrize(
    ("controller", "limits"),
    [
        ("memory", Limits(memory_max=2**30)),
        ("pids", Limits(pids_max=100)),
        ("cpu", Limits(cpu_max=0.5)),
    ],
)
@pytest.mark.parametrize("containment", ["auto", "cgroup"])
def test_a_limit_without_its_controller_says_how_to_get_it(
    controller: str, limits: Limits, containment: str
) -> None:
    try:
        home = cgroups.find_home(cgroups.own_path())
        given = Path(home.path, "cgroup.controllers").read_text().split()
    except ContainmentUnavailable as error:
        pytest.skip(str(error))
    if cgroups.trouble(home) or controller in given:
        pytest.skip(f"{home.path} has the controller, or is not for us")
    with pytest.raises(ContainmentUnavailable) as info:
        proctree.run(["true"], limits=limits, containment=containment)
    text = str(info.value)
    assert f"the controller {controller!r}" in text
    assert f"cgroup_no_v1={controller}" in text or "Delegate=yes" in text
    assert not living()
