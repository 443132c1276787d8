"""The warden is stopped, killed, asked to end, or one of the two sides speaks garbage."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import proctree
from integration.conftest import (
    QUICK,
    Lines,
    eventually,
    is_alive,
    living,
    start_supervisor,
)
from integration.test_endings import end, start
from proctree import KillPolicy, Reason, Stage, protocol, registry
from proctree.containment import warden as warden_module
from proctree.process import proof
from proctree.protocol import Type

pytestmark = pytest.mark.wardens("sanitized")


def warden_of(handle: proctree.WatchedSubprocess) -> int:
    root = handle._tree.contained.root()
    assert root is not None
    return root


@pytest.mark.not_with("valgrind", "ps shows valgrind")
def test_ps_shows_whose_warden_it_is(actors: str) -> None:
    handle, lines = start([actors, "pause"], "warden", name="nightly build")
    lines.wait_for()
    pid = warden_of(handle)
    cmdline = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert cmdline.rstrip(b"\0") == b"proctree-warden: nightly build"
    assert Path(f"/proc/{pid}/comm").read_text() == "proctree-warden\n"
    end(handle)


@pytest.mark.not_with("valgrind", "valgrind keeps descriptors of its own")
def test_the_warden_keeps_nothing_of_the_trees(actors: str) -> None:
    """No standard stream, no passed descriptor, nothing that the host let leak."""
    reader, writer = os.pipe()
    leaked = os.dup(reader)
    os.set_inheritable(leaked, True)
    handle, lines = start([actors, "pause"], "warden", pass_fds=[writer])
    lines.wait_for()
    pid = warden_of(handle)
    entry = registry.path_of(registry.directory() or "", handle.tree_id)
    known = ("/dev/null", "socket:", "anon_inode:", "/proc", entry)

    def strange() -> list[str]:
        names = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since they were listed
                names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        return [name for name in names if not name.startswith(known)]

    # The tree may have said its first word before its warden has let go of them.
    eventually(lambda: not strange(), "the warden keeps its own descriptors only")
    main = {int(fd) for fd in os.listdir(f"/proc/{handle.pid}/fd")}
    assert main == {0, 1, 2, writer}
    end(handle)
    for fd in (reader, writer, leaked):
        os.close(fd)


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_to_the_warden_ends_its_tree(actors: str, signo: signal.Signals) -> None:
    handle, lines = start([actors, "ignore"], "warden")
    lines.wait_for()
    os.kill(warden_of(handle), signo)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.reason is Reason.KILLED
    assert f"signal {int(signo)} from pid {os.getpid()}" in outcome.detail
    assert [stage.signal for stage in outcome.stages] == [signal.SIGTERM, signal.SIGKILL]
    assert not living()


def test_other_signals_to_the_warden_do_nothing(actors: str) -> None:
    handle, lines = start([actors, "counter"], "warden")
    lines.wait_for()
    for signo in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGTSTP, signal.SIGPIPE):
        os.kill(warden_of(handle), signo)
    handle.signal(signal.SIGUSR1)
    assert lines.wait_for(2)[1] == "0"
    outcome = end(handle, KillPolicy.now())
    assert outcome.returncode == -9


def test_a_warden_asked_to_end_under_a_stopped_supervisor_acts_itself(actors: str) -> None:
    code = f"""
import signal, proctree
from proctree import KillPolicy
handle = proctree.WatchedSubprocess.start(
    [{actors!r}, "ignore"], stdout=proctree.DEVNULL, kill=KillPolicy.after(0.2)
)
print(handle.pid, handle._tree.contained.root(), flush=True)
signal.pause()
"""
    supervisor = start_supervisor(code)
    assert supervisor.stdout is not None
    main, warden = map(int, supervisor.stdout.readline().split())
    os.kill(supervisor.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, supervisor.pid, os.WSTOPPED)  # all of its threads
    os.kill(warden, signal.SIGTERM)
    eventually(lambda: not is_alive(main), "the warden ends the tree by itself")
    os.kill(supervisor.pid, signal.SIGCONT)
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    assert supervisor.stdin is not None
    supervisor.stdin.close()


def test_a_killed_warden_takes_main_along_and_the_rest_is_swept(actors: str) -> None:
    script = f"{actors} ignore & setsid {actors} ignore & {actors} daemonise; wait"
    handle, lines = start(["bash", "-c", script], "warden")
    lines.wait_for(3)
    os.kill(warden_of(handle), signal.SIGKILL)
    outcome = handle.wait(timeout=60)
    assert outcome is not None
    assert outcome.reason is Reason.WARDEN_LOST
    assert outcome.survivors == ()
    assert not living()


def test_a_stopped_warden_costs_time_and_nothing_else(actors: str) -> None:
    handle, lines = start([actors, "ignore"], "warden")
    lines.wait_for()
    os.kill(warden_of(handle), signal.SIGSTOP)
    policy = KillPolicy(stages=(Stage(15, 0.1), Stage(9, 0.1)))
    outcome = end(handle, policy)
    assert outcome.survivors == ()
    assert not living()


def test_the_supervisor_given_garbage_takes_the_warden_for_lost(
    actors: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A warden that starts the command and then talks nonsense."""
    source = tmp_path / "liar.c"
    source.write_text(
        r"""
        #include <stdlib.h>
        #include <string.h>
        #include <sys/socket.h>
        #include <unistd.h>
        int main(int argc, char **argv)
        {
            int control = -1;
            char buffer[512];
            while (*++argv && strcmp(*argv, "--"))
                if (!strncmp(*argv, "control=", 8))
                    control = atoi(*argv + 8);
            (void)argc;
            recv(control, buffer, sizeof buffer, 0);
            if (fork() == 0) {
                setsid();
                execv(argv[1], argv + 1);
            }
            send(control, "\1\377nonsense", 10, 0);
            for (;;)
                pause();
        }
        """
    )
    liar = tmp_path / "liar"
    subprocess.run(["cc", "-o", str(liar), str(source)], check=True)
    monkeypatch.setenv(warden_module.WARDEN_VARIABLE, str(liar))
    lines = Lines()
    with pytest.raises(proctree.ContainmentUnavailable, match="garbage: unknown message type 255"):
        proctree.WatchedSubprocess.start([actors, "ignore"], stdout=proctree.Lines(lines))
    assert not living()


class RawWarden:
    """A real warden that we talk to ourselves."""

    def __init__(self, argv: list[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = ours
        self.socket.settimeout(30)
        self.pid = os.posix_spawn(
            warden_module.warden_path(),
            ["proctree-warden: raw", f"control={theirs.fileno()}", f"supervisor={os.getpid()}"]
            + ["--", *argv],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno())],
        )
        theirs.close()

    def say(self, data: bytes) -> None:
        self.socket.send(data)

    def hear(self) -> protocol.Message | None:
        data = self.socket.recv(protocol.MAX_MESSAGE)
        return protocol.decode(data) if data else None

    def types(self) -> list[Type]:
        """Everything until the end."""
        heard = []
        while (message := self.hear()) is not None:
            heard.append(message.type)
        return heard

    def finish(self) -> int:
        self.socket.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


START = protocol.encode_start((Stage(15, 0.1), Stage(9, 5.0)))
GARBAGE = [
    b"\0",
    b"\1",
    b"\2" + START[1:],
    START[:-1],
    START + b"\0",
    b"\1\2\0\0\0\0\0\0",
    b"\1\77\0\0\0\0\0\0",
    b"x" * 5000,
    protocol.SIGNAL.pack(1, 2, 0, 1, 9999, 3, 0, 0),
    protocol.SIGNAL.pack(1, 2, 0, 1, -1, 3, 0, 0),
    protocol.SIGNAL.pack(1, 2, 0, 1, 15, 9, 0, 0),
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_the_warden_given_garbage_says_so_and_ends_its_tree(actors: str, garbage: bytes) -> None:
    warden = RawWarden(["sh", "-c", f"{actors} ignore >/dev/null & {actors} ignore >/dev/null"])
    warden.say(START)
    assert (started := warden.hear()) is not None
    assert started.type is Type.STARTED
    warden.say(garbage)
    assert warden.hear() == protocol.Message(Type.FAULT, 0, 0, (71, 14))
    assert warden.types()[-1] is Type.EMPTY
    assert warden.finish() == 0
    assert not living()


@pytest.mark.parametrize(
    "garbage", [b"", b"hello", START[:50], protocol.encode_plain(Type.LIST, 1)], ids=repr
)
def test_the_warden_starts_nothing_without_a_proper_start(garbage: bytes, tmp_path: Path) -> None:
    proof_of_life = tmp_path / "ran"
    warden = RawWarden(["touch", str(proof_of_life)])
    if garbage:
        warden.say(garbage)
        assert warden.types() == [Type.FAULT]
    assert warden.finish() == 1
    assert not proof_of_life.exists()


CALLABLE = """
import os, signal, subprocess, sys
from proctree.process import prctl

warden, control, actors = sys.argv[1:]
prctl.load().set_child_subreaper(True)
main = os.fork()
if main == 0:
    os.setsid()
    daemon = subprocess.Popen([actors, "pause"], stdout=subprocess.DEVNULL, start_new_session=True)
    os.write(1, b"%d %d\\n" % (os.getpid(), daemon.pid))
    signal.pause()
sys.stdin.readline()
# Not our parent: as when the parent has died, and its number is somebody else's.
os.execv(warden, ["w", "control=" + control, f"supervisor={os.getpid()}", f"adopt={main}"])
"""


@pytest.mark.wardens("valgrind")
def test_a_callable_does_not_outlive_a_supervisor_that_died_early(actors: str) -> None:
    """It runs before its warden is there: what it has started by then is ended too, daemons
    included."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    os.set_inheritable(theirs.fileno(), True)
    becoming = start_supervisor(
        CALLABLE,
        warden_module.warden_path(),
        str(theirs.fileno()),
        actors,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    assert becoming.stdout is not None
    members = [int(pid) for pid in becoming.stdout.readline().split()]
    assert all(is_alive(pid) for pid in members)
    becoming.communicate("\n")
    assert becoming.returncode == 1
    message = protocol.decode(ours.recv(protocol.MAX_MESSAGE))
    assert message == protocol.Message(Type.FAULT, 0, 0, (errno.ESRCH, 6))
    ours.close()
    assert [pid for pid in members if is_alive(pid)] == []


@pytest.mark.wardens("valgrind")
def test_list_names_every_member_with_its_state(actors: str) -> None:
    warden = RawWarden([actors, "sessions", "150"])
    warden.say(START)
    started = warden.hear()
    assert started is not None
    main = started.values[0]

    def members() -> list[protocol.RawMember]:
        warden.say(protocol.encode_plain(Type.LIST, 7))
        found: list[protocol.RawMember] = []
        while True:
            message = warden.hear()
            assert message is not None
            assert (message.type, message.serial) == (Type.MEMBERS, 7)
            found += message.members
            if not message.flags & protocol.MEMBERS_MORE:
                assert message.values[1] == len(found)
                return found

    eventually(lambda: len(members()) == 151, "all are there")
    listed = members()
    assert {member.ppid for member in listed} == {warden.pid, main}
    stat = proof.read_stat(main)
    assert stat is not None
    assert (listed[0].pid, listed[0].start_time) == (main, stat.start_time)
    warden.say(protocol.encode_signal(8, Stage(9, 0.0), resume=False))
    assert warden.types()[-1] is Type.EMPTY
    assert warden.finish() == 0


@pytest.mark.wardens("valgrind")
def test_the_scan_for_kernels_without_children_files(actors: str) -> None:
    """CONFIG_PROC_CHILDREN may be missing: the same answers by reading all of /proc."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    pid = os.posix_spawn(
        warden_module.warden_path(),
        ["proctree-warden: scan", f"control={theirs.fileno()}", f"supervisor={os.getpid()}"]
        + ["scan=1", "--", "sh", "-c", f"setsid {actors} ignore & {actors} ignore & wait"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno()),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        ],
    )
    theirs.close()
    ours.send(START)
    assert protocol.decode(ours.recv(protocol.MAX_MESSAGE)).type is Type.STARTED

    def count() -> int:
        ours.send(protocol.encode_plain(Type.LIST, 1))
        return protocol.decode(ours.recv(protocol.MAX_MESSAGE)).values[1]

    eventually(lambda: count() == 3, "it finds all three")
    ours.send(protocol.encode_signal(2, Stage(9, 0.0), resume=False))
    while protocol.decode(ours.recv(protocol.MAX_MESSAGE)).type is not Type.EMPTY:
        continue
    ours.close()
    os.waitpid(pid, 0)
    assert not living()


def test_by_hand_it_says_that_it_is_not_for_hands() -> None:
    done = subprocess.run([warden_module.warden_path()], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"started by proctree" in done.stderr


def test_an_idle_tree_makes_no_noise(actors: str) -> None:
    """No timer, no poll: nothing to wake up for. Counted over a second here; `make bench` takes
    five and measures its memory too."""
    handle, lines = start([actors, "pause"], "warden")
    lines.wait_for()

    warden = Path(f"/proc/{warden_of(handle)}")

    def switches() -> list[str]:
        text = (warden / "status").read_text()
        return [line for line in text.splitlines() if "voluntary_ctxt" in line]

    handle.processes()
    # It has answered, and on a busy machine it is not yet back where it waits: proc_pid_syscall(5).
    eventually(lambda: (warden / "syscall").read_text() != "running\n", "it waits")
    before = switches()
    time.sleep(1.0)  # the span that is measured
    assert switches() == before
    end(handle, QUICK)


def test_why_a_start_failed_is_never_lost() -> None:
    """Whoever is to be the warden says it and ends with START unread: on a socket, the kernel then
    tells of a reset before it hands out what was said."""
    for _ in range(30):
        with pytest.raises(FileNotFoundError):
            proctree.run(lambda: None, containment="warden", cwd="/nonexistent")
