"""Members that /proc hides and that may not be signalled: reported, and never waited for."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from integration.test_other_users import (
    NOBODY,
    PACKAGES,
    as_nobody,
    copy_packages,
    interpreter,
    open_to_all,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a set-uid program")

SETUID = r"""
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>
/* Becomes root, says so, and ends when the FIFO that it is given is opened for writing. */
int main(int argc, char **argv)
{
    char byte;
    if (argc < 2 || setuid(0) < 0)
        return 1;
    signal(SIGTERM, SIG_IGN);
    if (write(1, "root\n", 5) != 5)
        return 1;
    int fifo = open(argv[1], O_RDONLY);
    return read(fifo, &byte, 1) < 0;
}
"""

SUPERVISOR = """
import sys, threading
import proctree
from proctree import KillPolicy, Stage

program, fifo, containment, what = sys.argv[1:]
ready = threading.Event()
policy = KillPolicy(stages=(Stage(15, 0.2), Stage(9, 0.2)))
script = {"kill": '"$0" "$1" & wait', "leave": '"$0" "$1" & read _ <"$1.go"; exit 0'}[what]
handle = proctree.WatchedSubprocess.start(
    ["sh", "-c", script, program, fifo],
    stdout=proctree.Lines(lambda line: ready.set()),
    containment=containment,
    kill=policy,
)
assert ready.wait(30)
if what == "kill":
    handle.kill()
else:
    open(fifo + ".go", "w").write("\\n")
outcome = handle.wait(timeout=60)
assert outcome is not None, "it waits for what it cannot end"
print([(m.pid > 0, m.error, m.why) for m in outcome.survivors], outcome.ok)
"""


@pytest.mark.parametrize("what", ["kill", "leave"])
@pytest.mark.parametrize("hide", [False, True], ids=["visible", "hidepid"])
@pytest.mark.parametrize("containment", ["warden", "group"])
def test_a_set_uid_descendant(containment: str, hide: bool, what: str) -> None:
    if containment == "group" and hide:
        pytest.skip("the group backend finds by /proc what it did not start itself: documented")
    folder = Path(tempfile.mkdtemp(prefix="proctree-setuid-"))
    try:
        (folder / "setuid.c").write_text(SETUID)
        program, fifo = folder / "setuid", folder / "fifo"
        subprocess.run(["cc", "-o", str(program), str(folder / "setuid.c")], check=True)
        os.mkfifo(fifo)
        os.mkfifo(f"{fifo}.go")
        copy_packages(PACKAGES[:4], folder / "site")
        open_to_all(folder)
        os.chmod(f"{fifo}.go", 0o666)
        program.chmod(0o4755)
        runtime = folder / "runtime"
        runtime.mkdir(0o700)
        os.chown(runtime, NOBODY, NOBODY)
        mount = f'mount -t proc -o hidepid={2 if hide else 0} proc /proc && exec "$@"'
        # To files: the survivor holds a pipe open for as long as it lives.
        out, err = folder / "out", folder / "err"
        with open(out, "w") as stdout, open(err, "w") as stderr:
            subprocess.run(
                ["unshare", "-m", "--propagation", "private", "sh", "-c", mount, "sh"]
                + as_nobody([interpreter(), "-c", SUPERVISOR, str(program), str(fifo)])
                + [containment, what],
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(folder / "site"),
                    "XDG_RUNTIME_DIR": str(runtime),
                },
                stdout=stdout,
                stderr=stderr,
                timeout=100,
                check=False,
            )
        said, logged = out.read_text(), err.read_text()
        # Opened for writing and closed again: it ends by itself. ENXIO: it is gone, and the
        # assertions below say what else went wrong.
        with contextlib.suppress(OSError):
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    finally:
        shutil.rmtree(folder)
    name = errno.errorcode[errno.EPERM]
    wanted = f"[(True, {errno.EPERM}, 'may not be signalled ({name})')] False\n"
    assert said == wanted, logged
    assert "signal.denied" in logged
