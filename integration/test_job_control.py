"""`proctree run --pty` and `--foreground` in a real terminal, under a shell with job control."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from integration.conftest import eventually, living
from integration.test_terminal import BASH, SIZES, Screen

PROCTREE = os.path.join(os.path.dirname(sys.executable), "proctree")
READY = r"\[ready\]"


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Window:
    """A terminal window: a pseudo-terminal of the test's own, and a program in it."""

    def __init__(self, argv: list[str]) -> None:
        self.ours, self.theirs = os.openpty()
        self.resize(24, 80)
        env = {**os.environ, "PS1": "[ready]", "TERM": "dumb", "HISTFILE": "", "P": PROCTREE}
        self.process = subprocess.Popen(
            argv,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env=env,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        self.screen = Screen()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: everybody has closed the other end
            while data := os.read(self.ours, 4096):
                self.screen(data)

    def resize(self, rows: int, columns: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, size)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def see(self, pattern: str) -> re.Match[str]:
        return self.screen.wait_for(pattern)

    def run(self, line: str) -> None:
        """For the shell, which is at its prompt."""
        self.type(line + "\n")

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.theirs)

    def foreground(self) -> int:
        return os.tcgetpgrp(self.ours)

    def close(self) -> None:
        """As when somebody closes the window: the shell gets SIGHUP and hands it on."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()
        os.close(self.theirs)
        self._reader.join()
        os.close(self.ours)


@pytest.fixture
def window() -> Iterator[Window]:
    """With a shell at its prompt, which has the terminal."""
    window = Window(BASH)
    try:
        window.see(READY)
        assert window.foreground() == window.process.pid
        yield window
    finally:
        window.close()
    eventually(lambda: not living(), "nothing is left")


# A job that is sure to have the terminal when it says so; the text differs from what was typed.
ANSWERS = 'sh -c \'echo be""gin; while read x; do echo "<$x>"; done; echo e""nd\''


# -- --pty


def test_pty_between_two_terminals(window: Window) -> None:
    window.resize(40, 120)
    window.run(f"$P run --pty -- {sys.executable} -S -c '{SIZES}'; echo \"status $?\"")
    window.see("40 x 120\r\n")
    # Raw, so that every key is the inner one's.
    eventually(lambda: not window.modes()[3] & (termios.ISIG | termios.ICANON), "raw mode")
    window.resize(50, 132)
    window.see("50 x 132\r\n")
    window.type("\x03")
    window.see(f"status {128 + signal.SIGINT}\r\n")
    window.see(READY)
    # For a program of the shell's they are as ever.
    window.run("stty -a | grep -c -w isig")
    window.see("1\r\n")
    window.see(READY)


def test_pty_puts_the_modes_back() -> None:
    """Without a shell, which has modes of its own for its line editor."""
    script = 'echo be""gin; read x; "$P" run --pty -- sh -c \'echo in""ner; read y; exit 7\''
    window = Window(["sh", "-c", f'{script}; echo "status $?"; read z'])
    try:
        window.see("begin\r\n")
        before = window.modes()
        window.type("\n")
        # Two of them when it was shown before our terminal had become raw.
        window.see("inner\r+\n")
        eventually(lambda: window.modes() != before, "raw mode")
        window.type("\r")
        window.see("status 7\r\n")
        assert window.modes() == before
    finally:
        window.close()


def test_pty_keys_reach_the_inner_job(window: Window) -> None:
    """Ctrl-C and Ctrl-Z are those of the shell inside."""
    window.run("PS1='[inner]' $P run --pty -- " + " ".join(BASH) + '; echo "status $?"')
    window.see(r"\[inner\]")
    window.type(ANSWERS + "\r")
    window.see("begin\r\n")
    window.type("\x1a")
    window.see("Stopped")
    window.see(r"\[inner\]")
    window.type("fg\n")
    window.type("one\n")
    window.see("<one>\r\n")
    window.type("\x03")
    window.see(r"\[inner\]")
    window.type("exit 9\r")
    window.see("status 9\r\n")
    window.see(READY)


@pytest.mark.parametrize(("text", "count"), [(b"", 0), (b"a\nb\n", 2), (b"a\nb", 2)])
def test_pty_without_a_terminal_ends_the_input(text: bytes, count: int) -> None:
    script = "stty -echo; test -t 0 && echo terminal; grep -c ''; exit 0"
    done = subprocess.run(
        [PROCTREE, "run", "--pty", "--", "sh", "-c", script],
        input=text,
        capture_output=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )
    assert done.stdout.endswith(b"terminal\r\n%d\r\n" % count)
    assert (done.returncode, done.stderr) == (0, b"")


# -- --foreground


def test_foreground_has_the_terminal(window: Window) -> None:
    window.run(f'$P run --foreground -- {ANSWERS}; echo "status $?"')
    window.see("begin\r\n")
    assert window.foreground() not in (window.process.pid, os.getpgrp())
    assert os.getsid(window.foreground()) == window.process.pid
    window.type("one\n")
    window.see("<one>\r\n")
    window.type("\x04")
    window.see("end\r\n")
    window.see("status 0\r\n")
    window.see(READY)
    assert window.foreground() == window.process.pid


def test_foreground_ctrl_c_is_for_the_command(window: Window, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    window.run(f'$P run --foreground --json {report} -- {ANSWERS}; echo "status $?"')
    window.see("begin\r\n")
    window.type("\x03")
    window.see("status 130\r\n")
    window.see(READY)
    # By the terminal, and not by proctree: it was not asked for anything.
    assert '"reason": "signaled"' in report.read_text()


def test_foreground_stops_and_goes_on_as_a_whole(window: Window) -> None:
    window.run(f"$P run --foreground -- {ANSWERS}")
    window.see("begin\r\n")
    command = window.foreground()
    for word in ("one", "two"):
        window.type("\x1a")
        window.see("Stopped")
        window.see(READY)
        assert window.foreground() == window.process.pid
        window.run("fg")
        eventually(lambda: window.foreground() == command, "the command has the terminal")
        window.type(f"{word}\n")
        window.see(f"<{word}>\r\n")
    window.type("\x04")
    window.see("end\r\n")
    window.see(READY)
    assert window.foreground() == window.process.pid


def test_foreground_goes_on_in_the_background(window: Window, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Nothing that forks: a shell that is in vfork(2) stops for nobody, and when its child has
    # stopped before it executes anything, both stay like that.
    window.run(f'$P run --foreground -- sh -c \'echo be""gin; read x <{fifo}; echo "$x"\'')
    window.see("begin\r\n")
    window.type("\x1a")
    window.see("Stopped")
    window.see(READY)
    window.run("bg")
    window.see(READY)
    fifo.write_text("from the background\n")
    window.see("from the background\r\n")
    assert window.foreground() == window.process.pid
    window.run('wait; echo wai""ted')  # what is typed is shown, too
    window.see("waited\r\n")


def test_the_shell_has_its_terminal_back_after_sigkill(window: Window) -> None:
    window.run(f'$P run --foreground -- {ANSWERS}; echo "status $?"')
    window.see("begin\r\n")
    os.kill(window.foreground(), signal.SIGKILL)
    window.see("status 137\r\n")
    window.see(READY)
    assert window.foreground() == window.process.pid


def test_a_script_has_its_terminal_back(window: Window) -> None:
    """It is in the group of its own proctree, and nobody gives it the terminal but the warden."""
    window.run('sh -c \'"$P" run --foreground -- sh -c "kill -9 \\$\\$"; read x; echo "<$x>"\'')
    window.type("still here\n")
    window.see("<still here>\r\n")


def test_a_script_stops_with_its_command(window: Window) -> None:
    window.run('sh -c \'"$P" run --foreground -- sh -c "echo be"gin"; read x; echo got:\\$x"; :\'')
    window.see("begin\r\n")
    window.type("\x1a")
    window.see("Stopped")
    window.see(READY)
    window.run("fg")
    window.type("went on\n")
    window.see("got:went on\r\n")
    window.see(READY)


def test_foreground_without_any_terminal_is_a_job_like_any_other() -> None:
    done = subprocess.run(
        [PROCTREE, "run", "--foreground", "--", "sh", "-c", "cat; exit 6"],
        input=b"text",
        capture_output=True,
        start_new_session=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (6, b"text", b"")


@pytest.mark.parametrize("containment", ["group", "pidns"])
def test_foreground_in_what_cannot_have_one(containment: str) -> None:
    done = subprocess.run(
        [PROCTREE, "run", "--foreground", "--containment", containment, "--", "true"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(f"proctree run: no containment: {containment}: ")
    assert containment == "pidns" or "a foreground job" in done.stderr


def test_pty_and_foreground_exclude_each_other() -> None:
    done = subprocess.run(
        [PROCTREE, "run", "--foreground", "--pty", "--", "true"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 125
    assert done.stderr.startswith("proctree run: new_session: ")
