"""The check that every test here goes through: it has to see what a test leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parent.parent / "conftest.py"

DOUBLE_FORK = """
import os
pid = os.fork()
if pid == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvpe("sleep", ["sleep", "1000"], {})
    os._exit(0)
os.waitpid(pid, 0)
"""

LEAKS = {
    "a process": ("import subprocess; subprocess.Popen(['sleep', '1000'])", "sleep"),
    "a process that got away": (DOUBLE_FORK, "sleep"),
    "a tree": ("import proctree; T = proctree.WatchedSubprocess.start(['sleep', '1000'])", "sleep"),
    "a zombie": (
        "import os\npid = os.fork()\nif pid == 0: os._exit(0)\n"
        "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)",
        "python",
    ),
    "a pipe": ("import os; os.pipe()", "pipe:"),
    "a file": ("import os; os.open('/etc/passwd', os.O_RDONLY)", "/etc/passwd"),
}

CLEAN = {
    "nothing": "pass",
    "what was cleaned up": (
        "import os, subprocess\n"
        "for fd in os.pipe(): os.close(fd)\n"
        "subprocess.run(['true'])\n"
        "import proctree\n"
        "assert proctree.run(['sh', '-c', 'sleep 1000 & exit 0']).ok\n"
    ),
}


@pytest.fixture
def run_test(tmp_path):
    def run(body: str) -> subprocess.CompletedProcess[str]:
        patient = CONFTEST.read_text()
        conftest = patient.replace("LEAVE_SECONDS = 10.0", "LEAVE_SECONDS = 0.5")
        assert conftest != patient
        (tmp_path / "conftest.py").write_text(conftest)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
        (tmp_path / "test_it.py").write_text(f"def test_it():\n{lines}")
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            # What it leaves behind comes to us in the end, and in its own session we know that it
            # is nobody's whom we have started.
            start_new_session=True,
        )

    return run


@pytest.mark.parametrize("what", LEAKS)
def test_what_is_left_behind_fails_the_test(run_test, what):
    body, named = LEAKS[what]
    done = run_test(body)
    assert done.returncode == 1, done.stdout
    assert "1 passed, 1 error" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("E  "))
    assert "left behind" in line
    assert named in line


@pytest.mark.parametrize("what", CLEAN)
def test_what_leaves_nothing_behind_passes(run_test, what):
    done = run_test(CLEAN[what])
    assert done.returncode == 0, done.stdout
