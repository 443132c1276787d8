"""The check that every test here goes through: it has to see what a test leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from proctree.process import cgroups

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


IN_A_WORKER = """
import os, time
from pathlib import Path
from conftest import Place
assert Place.runtime == os.environ["XDG_RUNTIME_DIR"]
written = Path({folder!r}) / f"place-{{os.getpid()}}.new"
written.write_text(f"{{Place.cgroup}}\\n{{Place.runtime}}\\n")
written.rename(written.with_suffix(".txt"))
# Neither goes on without the other: what one of them leaves behind is there beside the other.
deadline = time.monotonic() + 60
while len(list(Path({folder!r}).glob("place-*.txt"))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
"""


def run_tests(folder: Path, bodies: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Tests with these bodies, `test_0` and so on, by a pytest of their own."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text("[pytest]\n")
    tests = ""
    for number, body in enumerate(bodies):
        # What stays is waited for no longer than need be, and what goes as long as it takes.
        stays = any(body == leak for leak, _ in LEAKS.values())
        body = f"import conftest; conftest.LEAVE_SECONDS = {0.5 if stays else 30.0}\n{body.strip()}"
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        tests += f"def test_{number}():\n{lines}\n"
    (folder / "test_it.py").write_text(tests)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        # What it leaves behind comes to us in the end, and in its own session we know that it is
        # nobody's whom we have started.
        start_new_session=True,
    )


def blamed(output: str) -> list[tuple[str, str]]:
    """The tests that failed for what they left, and what that was."""
    found, name = [], ""
    for line in output.splitlines():
        if line.startswith("___"):
            name = line.strip("_ ").rpartition(" ")[2]
        elif line.startswith("E  ") and "left behind" in line:
            found.append((name, line))
    return found


BODIES = [*(body for body, _ in LEAKS.values()), *CLEAN.values()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """All of them by one pytest, so that it is also seen that none is blamed for another."""
    return run_tests(tmp_path_factory.mktemp("suite"), BODIES)


@pytest.mark.parametrize("what", LEAKS)
def test_what_is_left_behind_fails_the_test(done, what):
    _, named = LEAKS[what]
    test = f"test_{list(LEAKS).index(what)}"
    assert done.returncode == 1, done.stdout
    assert f"::{test} PASSED" in done.stdout
    assert f"::{test} ERROR" in done.stdout
    (line,) = (line for name, line in blamed(done.stdout) if name == test)
    assert named in line


@pytest.mark.parametrize("what", CLEAN)
def test_what_leaves_nothing_behind_passes(done, what):
    test = f"test_{BODIES.index(CLEAN[what])}"
    assert f"::{test} PASSED" in done.stdout
    assert f"::{test} ERROR" not in done.stdout


def test_each_worker_of_xdist_sees_what_is_left_behind_in_it(tmp_path):
    """And nothing of the other's, which does the same at the same time."""
    together = IN_A_WORKER.format(folder=str(tmp_path))
    done = run_tests(tmp_path, [together, *BODIES], "--dist=each", "--tx=2*popen")
    assert done.returncode == 1, done.stdout
    assert f" {2 * (1 + len(BODIES))} passed, {2 * len(LEAKS)} errors in " in done.stdout
    found = Counter(name for name, _ in blamed(done.stdout))
    assert found == {f"test_{number + 1}": 2 for number in range(len(LEAKS))}
    texts = [path.read_text().splitlines() for path in tmp_path.glob("place-*.txt")]
    places, runtimes = zip(*texts, strict=True)
    assert len(set(runtimes)) == 2
    assert not any(map(os.path.exists, (*places, *runtimes)))
    if "None" not in places:
        assert len(set(places)) == 2
        home = cgroups.find_home(cgroups.own_path()).path
        assert set(map(os.path.dirname, places)) == {home}  # and not below the controller's
