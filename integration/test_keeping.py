"""Durable wardens: who may attach, who owns the tree, how long it lives, what is written down."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.conftest import DEADLINE, available, eventually, is_alive, start_supervisor
from integration.fault_tools import Helper
from integration.keepers import LONG, Client, Run, boottime
from proctree import Reason, protocol
from proctree.durable.recording import Cause, Exit
from proctree.policy import Stage
from proctree.process import proof
from proctree.protocol import Message, Type

pytestmark = pytest.mark.wardens("sanitized")

WATCHERS_MAX = 32
POLLED = 5 + 1 + 2 * WATCHERS_MAX
"""Descriptors that a durable warden waits for at once."""

SHORT = (Stage(signal.SIGTERM, 0.1), Stage(signal.SIGKILL, 0.1))
EPROTO = (errno.EPROTO, "protocol")
EPERM = (errno.EPERM, "attach")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.close()


class Gate:
    """A FIFO that a shell reads a line of, when it may go on."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        # For both: then neither side waits for the other, and what is written is there to be read.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def open(self) -> None:
        os.write(self._fd, b"go\n")

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    made.close()


def waits(gate: Gate, status: int = 3) -> list[str]:
    return ["sh", "-c", f'read _ <"$0"; exit {status}', gate.path]


def leaves(gate: Gate) -> list[str]:
    """Ends at once, and what it leaves has another session and another parent."""
    return ["sh", "-c", '(setsid sh -c \'read _ <"$0"\' "$0" &); exit 0', gate.path]


def fault(message: Message | None) -> tuple[int, str]:
    assert message is not None
    assert message.type is Type.FAULT
    number, step = message.values
    return number, protocol.STEPS[step]


def types(messages: list[Message]) -> list[Type]:
    return [message.type for message in messages]


def ending(client: Client) -> Cause | None:
    """Why the warden ends the tree, if it does."""
    _, number = client.attach().values
    return Cause(number - 1) if number else None


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) == "T", "it is stopped")


def state_of(pid: int) -> str | None:
    stat = proof.read_stat(pid)
    return None if stat is None else stat.state


# -- The exit record


@pytest.mark.parametrize("opened", [os.O_RDONLY | os.O_DIRECTORY, os.O_PATH], ids=["read", "path"])
def test_how_it_ended_is_on_record_before_it_is_told(run: Run, gate: Gate, opened: int) -> None:
    owner = run.start(waits(gate), opened=opened)
    main = run.main()
    assert run.locked()
    gate.open()
    owner.until(Type.EXITED)
    empty = owner.until(Type.EMPTY)
    told = run.record()
    assert (told.returncode, told.cause, told.pid) == (3, Cause.ITSELF, main)
    assert run.wait() == told
    assert run.status == 0
    assert not run.locked()
    assert sorted(os.listdir(run.attempt)) == ["err.log", "exit", "out.log"]
    # Byte for byte what Python would have written.
    assert (run.attempt / "exit").read_bytes() == told.encode()
    _reaped, user, system, *others = empty.values
    usage = told.usage
    assert (round(usage.user * 1e6), round(usage.system * 1e6)) == (user, system)
    assert [usage.max_rss, usage.memory_peak, usage.pids_peak, usage.oom_kills] == others
    assert usage.max_rss > 0


def test_the_record_of_a_signal(run: Run, gate: Gate) -> None:
    run.start(waits(gate))
    os.kill(run.main(), signal.SIGUSR1)
    assert run.wait()[:2] == (signal.SIGUSR1, Cause.ITSELF)


def test_the_duration_is_that_of_the_tree(run: Run, gate: Gate) -> None:
    owner = run.start(leaves(gate))
    owner.until(Type.EXITED)
    time.sleep(0.3)  # the span that is measured
    gate.open()
    owner.until(Type.EMPTY)
    assert run.wait().duration >= 0.29


def test_a_record_without_a_place_that_was_kept_for_it(run: Run, gate: Gate) -> None:
    run.start(waits(gate))
    run.main()
    (run.attempt / "exit~").unlink()
    gate.open()
    assert run.wait().returncode == 3


@pytest.mark.parametrize(
    ("argv", "more", "error", "step"),
    [
        (["/nonexistent/command"], [], errno.ENOENT, "exec"),
        (["/etc/passwd"], [], errno.EACCES, "exec"),
        (["true"], ["cwd=/nonexistent"], errno.ENOENT, "chdir"),
        (["true"], ["cgroup=/nonexistent/leaf"], errno.ENOENT, "cgroup"),
    ],
)
@pytest.mark.not_with("valgrind", "it runs the child in a copy of our memory")
def test_what_could_not_start_is_on_record(
    run: Run, argv: list[str], more: list[str], error: int, step: str
) -> None:
    owner = run.start(argv, more=more)
    failed = owner.until(Type.EXEC_FAILED)
    assert failed.values == (error, next(n for n, name in protocol.STEPS.items() if name == step))
    assert run.record() == run.wait()
    record = run.record()
    assert record == Exit(None, Cause.NOT_STARTED, error=error, step=failed.values[1])
    assert not run.locked()


@pytest.mark.parametrize("how", ["end of file", "garbage"])
def test_nothing_is_started_or_written_without_start(run: Run, how: str) -> None:
    owner = run.start(["touch", str(run.folder / "started")], begin=False)
    if how == "garbage":
        owner.send(b"nonsense")
        assert fault(owner.receive()) == EPROTO
    owner.close()
    with pytest.raises(FileNotFoundError):
        run.wait()
    assert not (run.folder / "started").exists()
    assert not run.locked()


def test_a_record_that_cannot_be_written_is_told_and_the_tree_ends_all_the_same(
    run: Run, gate: Gate
) -> None:
    owner = run.start(waits(gate))
    watcher = run.attached()
    (run.attempt / "exit").mkdir()
    (run.attempt / "exit" / "occupied").touch()
    gate.open()
    for client in (owner, watcher):
        rest = client.rest()
        assert types(rest)[-3:] == [Type.EXITED, Type.FAULT, Type.EMPTY]
        assert fault(rest[-2])[1] == "record"
    with pytest.raises(IsADirectoryError):
        run.wait()
    assert run.status == 0
    # What has no name yet counts.
    assert Exit.decode((run.attempt / "exit~").read_bytes()).returncode == 3


FULL = """
import os, sys
from pathlib import Path
from integration.keepers import Run
from proctree.protocol import Type
folder = Path(sys.argv[1])
os.system(f"mount -t tmpfs -o size=256k none {folder}") == 0 or sys.exit(77)
run = Run(folder)
owner = run.start(["sh", "-c", "read _; cat /dev/zero; exit 3"])
run.main()
if sys.argv[2] == "lost":
    (run.attempt / "exit~").unlink()
sys.stdin.close()
rest = owner.rest()
try:
    print(run.wait().returncode, *(message.type.name for message in rest))
except FileNotFoundError:
    print("none", *(f"{message.type.name} {message.values}" for message in rest))
print((folder / "attempt" / "out.log").stat().st_size, os.statvfs(folder).f_bavail)
run.close()
"""


def full(tmp_path: Path, which: str) -> list[str]:
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", FULL]
    done = subprocess.run(
        [*command, str(tmp_path), which], input="", capture_output=True, text=True, timeout=60
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    result, room = done.stdout.splitlines()
    size, available_blocks = map(int, room.split())
    assert size > 100_000, "the tree has filled it up"
    assert which == "lost" or available_blocks == 0
    return result.split(maxsplit=1)


def test_a_full_disk_does_not_lose_the_record(tmp_path: Path) -> None:
    assert full(tmp_path, "kept") == ["3", "EXITED EMPTY"]


# -- The lease


def test_the_lease_counts_from_the_last_one_that_leaves(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate), lease=1000)
    watcher = run.attached()
    owner.close()
    time.sleep(1.5)  # longer than the lease, which does not run
    assert ending(watcher) is None
    left = time.monotonic()
    watcher.plain(Type.DETACH)
    assert watcher.rest() == []
    record = run.wait()
    assert time.monotonic() - left >= 0.99
    assert (record.status, record.cause) == (signal.SIGTERM, Cause.LEASE)


def test_who_attaches_stops_the_lease(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate), lease=4000)
    run.main()
    owner.plain(Type.DETACH)
    assert owner.rest() == []
    watcher = run.attached()
    time.sleep(4.5)  # longer than it had
    assert ending(watcher) is None
    gate.open()
    assert run.wait().cause is Cause.ITSELF


def test_a_connection_that_has_not_attached_is_nobody(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate), lease=200)
    run.main()
    silent = run.connect()
    owner.close()
    assert run.wait().cause is Cause.LEASE
    assert silent.rest() == []


def test_a_tree_whose_lease_has_run_out_ends_whoever_comes(run: Run, actors: str) -> None:
    plan = (Stage(signal.SIGTERM, 2.0), Stage(signal.SIGKILL, DEADLINE))
    owner = run.start([actors, "ignore"], lease=0, plan=plan)
    run.main()
    eventually(lambda: (run.attempt / "out.log").read_text() != "", "it ignores SIGTERM")
    owner.close()
    eventually(lambda: ending(run.attached(own=True)) is Cause.LEASE, "the lease has run out")
    record = run.wait()
    assert (record.status, record.cause) == (signal.SIGKILL, Cause.LEASE)


def test_keep_gives_the_next_lease_another_length(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate), lease=LONG)
    run.main()
    owner.send(protocol.encode_keep(0.1))
    owner.close()
    assert run.wait().cause is Cause.LEASE


def test_a_strict_lease_runs_whoever_is_attached(run: Run, gate: Gate) -> None:
    began = time.monotonic()
    owner = run.start(waits(gate), lease=700, strict=True, plan=SHORT)
    watcher = run.attached(own=True)
    for client in (owner, watcher):
        assert types(client.rest())[-2:] == [Type.EXITED, Type.EMPTY]
    assert time.monotonic() - began >= 0.49
    assert run.wait()[:2] == (signal.SIGTERM, Cause.LEASE)


def test_only_keep_moves_a_strict_lease(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate), lease=3000, strict=True, plan=SHORT)
    owner.send(protocol.encode_keep(boottime() + LONG))
    time.sleep(3.5)  # longer than it had at first
    assert ending(owner) is None
    owner.plain(Type.DETACH)
    run.attached().plain(Type.DETACH)
    new = run.attached(own=True)
    assert ending(new) is None
    new.send(protocol.encode_keep(0))
    assert run.wait().cause is Cause.LEASE


def test_when_a_strict_lease_is_over_the_tree_is_not_to_be_ended_but_dead(
    run: Run, actors: str
) -> None:
    plan = (Stage(signal.SIGTERM, 1.0), Stage(signal.SIGKILL, 28.0))
    began = time.monotonic()
    owner = run.start([actors, "ignore"], lease=30_000, strict=True, plan=plan)
    eventually(lambda: ending(owner) is not None, "it is being ended")
    assert 0.9 < time.monotonic() - began < 30.0
    assert run.wait()[:2] == (signal.SIGKILL, Cause.LEASE)


def test_a_tree_whose_time_is_over_before_it_begins_is_not_started(
    run: Run, tmp_path: Path
) -> None:
    """Whoever starts it may have been stopped in between."""
    owner = run.start(["touch", str(tmp_path / "ran")], strict=True, lease=0, plan=SHORT)
    assert owner.until(Type.EXEC_FAILED).values[0] == errno.ETIMEDOUT
    record = run.wait()
    assert (record.cause, record.error) == (Cause.NOT_STARTED, errno.ETIMEDOUT)
    assert not (tmp_path / "ran").exists()


def test_a_strict_lease_counts_the_time_in_which_the_machine_is_suspended(
    run: Run, gate: Gate
) -> None:
    """No test can suspend it: what the kernel says of the timer, proc_pid_fdinfo(5)."""
    run.start(waits(gate), strict=True)
    run.main()
    proc = Path(f"/proc/{run.warden}")
    (timer,) = (fd.name for fd in (proc / "fd").iterdir() if "timerfd" in os.readlink(fd))
    assert f"clockid: {time.CLOCK_BOOTTIME}\n" in (proc / "fdinfo" / timer).read_text()
    gate.open()
    assert run.wait().cause is Cause.ITSELF


def test_all_stages_of_the_plan_come_before_the_end_of_a_strict_lease(run: Run, gate: Gate) -> None:
    plan = (Stage(signal.SIGTERM, 590.0), Stage(signal.SIGKILL, 9.9))
    run.start(waits(gate), lease=600_000, strict=True, plan=plan)
    assert run.wait()[:2] == (signal.SIGTERM, Cause.LEASE)


def test_the_end_by_itself_is_nobody_elses(run: Run, gate: Gate) -> None:
    """What its main process has left lives on, and then the lease runs out."""
    owner = run.start(leaves(gate), lease=0)
    owner.until(Type.EXITED)
    owner.close()
    record = run.wait()
    assert (record.status, record.cause) == (0, Cause.ITSELF)


# -- What the main process leaves


def test_the_lock_is_held_until_the_last_one_has_gone(run: Run, gate: Gate) -> None:
    owner = run.start(leaves(gate), lease=LONG)
    assert owner.until(Type.EXITED).values[1] == 1
    owner.close()
    watcher = run.attached()
    told = watcher.until(Type.EXITED)
    assert told.values[:2] == (0, 1)
    assert ending(watcher) is None
    assert run.locked()
    gate.open()
    assert types(watcher.rest()) == [Type.EMPTY]
    assert run.wait()[:2] == (0, Cause.ITSELF)
    assert not run.locked()


@pytest.mark.parametrize("when", ["before", "after"])
def test_leftovers_end_when_nobody_owns_them(run: Run, gate: Gate, when: str) -> None:
    first = Gate(run.folder / "first")
    script = 'read _ <"$0"; (setsid sh -c \'read _ <"$0"\' "$1" &); exit 0'
    owner = run.start(["sh", "-c", script, first.path, gate.path], end_leftovers=True)
    watcher = run.attached()
    if when == "before":
        owner.close()
        first.open()
    else:
        first.open()
        owner.until(Type.EXITED)
        assert ending(owner) is None  # it is the owner's business
        owner.close()
    assert types(watcher.rest())[-2:] == [Type.EXITED, Type.EMPTY]
    assert run.wait()[:2] == (0, Cause.ITSELF)
    first.close()


def test_a_new_owner_decides_about_leftovers(run: Run, gate: Gate) -> None:
    owner = run.start(leaves(gate), end_leftovers=True)
    owner.until(Type.EXITED)
    heir = run.attached(own=True)
    owner.close()
    assert heir.until(Type.ATTACHED).flags == protocol.ATTACHED_OWNER | protocol.ATTACHED_ENDS
    assert ending(heir) is None
    heir.plain(Type.LIST, 5)
    assert heir.until(Type.MEMBERS).values[0] == 1
    gate.open()
    assert run.wait().cause is Cause.ITSELF


def test_what_cannot_be_ended_keeps_the_lock(run: Run, actors: str) -> None:
    """A zombie that its tracer holds: no signal helps, and its warden does not give up."""
    plan = (Stage(signal.SIGTERM, 0.05), Stage(signal.SIGKILL, 0.05))
    owner = run.start([actors, "pause"], lease=0, plan=plan)
    main = run.main()
    watcher = run.attached()
    tracer = Helper([actors, "trace", str(main)], b"tracing\n")
    try:
        watcher.plain(Type.DETACH)
        owner.close()
        eventually(lambda: state_of(main) == "Z", "it is dead")
        time.sleep(1.0)  # longer than the whole plan
        assert run.locked()
        assert ending(run.attached()) is Cause.LEASE
    finally:
        tracer.close()
    assert run.wait().cause is Cause.LEASE
    assert not run.locked()


def test_a_plan_that_kills_nobody_is_not_the_last_word(run: Run, actors: str) -> None:
    owner = run.start([actors, "ignore"], lease=0, plan=[Stage(signal.SIGTERM, 0.1)])
    run.main()
    eventually(lambda: (run.attempt / "out.log").read_text() != "", "it ignores SIGTERM")
    owner.close()
    assert run.wait()[:2] == (signal.SIGKILL, Cause.LEASE)


# -- Who owns it


def test_ownership_goes_to_the_one_that_has_waited_longest(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    watches, second, third = (run.attached(own) for own in (False, True, True))
    assert [client.seen[0].flags for client in (watches, second, third)] == [0, 0, 0]
    assert watches.seen[0].values == (os.getpid(), 0)
    assert second.attach(own=True, serial=77).serial == 77  # asking again is not coming again
    owner.plain(Type.DETACH)
    assert owner.rest()[1:] == []
    told = second.until(Type.ATTACHED)
    assert (told.flags, told.serial, told.values) == (1, 0, (os.getpid(), 0))
    second.plain(Type.LIST, 9)
    assert second.until(Type.MEMBERS).serial == 9
    assert watches.attach(own=True).flags == 0
    second.close()
    assert third.until(Type.ATTACHED).flags == protocol.ATTACHED_OWNER
    assert watches.silent()
    third.plain(Type.ATTACH)  # still the owner: it leaves by leaving
    assert third.until(Type.ATTACHED).flags == protocol.ATTACHED_OWNER
    third.close()
    assert watches.until(Type.ATTACHED).flags == protocol.ATTACHED_OWNER
    gate.open()
    assert types(watches.rest())[-2:] == [Type.EXITED, Type.EMPTY]
    assert run.wait().returncode == 3


def test_who_has_changed_his_mind_does_not_become_the_owner(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    first, second = run.attached(own=True), run.attached(own=True)
    first.attach(own=False)
    owner.close()
    assert second.until(Type.ATTACHED).flags == protocol.ATTACHED_OWNER
    assert first.attach().flags == 0
    gate.open()
    run.wait()


def test_without_an_owner_who_wants_it_owns_it_at_once(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    watcher = run.attached()
    owner.close()
    eventually(lambda: watcher.attach().values[0] == 0, "nobody owns it")
    assert watcher.attach(own=True).flags == protocol.ATTACHED_OWNER
    assert run.attached(own=True).seen[0].flags == 0
    gate.open()
    run.wait()


def test_who_comes_late_is_told_what_there_was(run: Run, gate: Gate) -> None:
    owner = run.start(leaves(gate))
    started, exited = owner.until(Type.STARTED), owner.until(Type.EXITED)
    late = run.connect()
    late.attach(serial=4)
    assert [late.receive(), late.receive()] == [started, exited]
    late.attach()  # but once
    assert late.silent()
    gate.open()
    assert types(late.rest()) == [Type.EMPTY]
    run.wait()


OWNERS_ONLY = [
    protocol.encode_signal(1, Stage(signal.SIGKILL), resume=True, ending=True),
    protocol.encode_plain(Type.LIST, 1),
    protocol.encode_plain(Type.FREEZE, 1),
    protocol.encode_plain(Type.THAW, 1),
    protocol.encode_plain(Type.RELEASE, 1),
    protocol.encode_keep(0),
    protocol.encode_note(b"mine"),
]


def test_what_only_the_owner_may(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate), strict=True)
    watcher = run.attached(own=True)
    for request in OWNERS_ONLY:
        watcher.send(request)
        assert fault(watcher.receive()) == EPERM
    assert ending(watcher) is None  # it is still attached
    assert is_alive(run.main())
    owner.plain(Type.RELEASE)
    assert fault(owner.until(Type.FAULT)) == EPERM
    gate.open()
    assert run.wait() == run.record()
    assert run.record()[:3] == (3 << 8, Cause.ITSELF, "")


GARBAGE = [
    b"x",
    b"nonsense",
    bytes([2, Type.ATTACH, 0, 0, 0, 0, 0, 0]),
    protocol.encode_plain(Type.STARTED, 0),
    protocol.encode_attach(True) + b"\0",
    protocol.encode_start([Stage(signal.SIGKILL)]),
    protocol.encode_note(b"")[:-1],
    b"x" * 5000,
]


@pytest.mark.parametrize("who", ["owner", "watcher", "promoted"])
def test_garbage_ends_a_connection_and_not_the_tree(run: Run, gate: Gate, who: str) -> None:
    owner = run.start(waits(gate), lease=LONG)
    witness = run.attached()
    if who == "promoted":
        owner.close()
    for garbage in GARBAGE:
        client = owner if who == "owner" else run.attached(own=who == "promoted")
        client.send(garbage)
        assert fault(client.until(Type.FAULT)) == EPROTO
        assert client.rest() == []
        assert ending(witness) is None
        if who == "owner":
            break
    gate.open()
    assert types(witness.rest()) == [Type.EXITED, Type.EMPTY]
    assert run.wait()[:2] == (3 << 8, Cause.ITSELF)


def test_before_attach_nothing_else_is_understood(run: Run, gate: Gate) -> None:
    run.start(waits(gate))
    for request in [
        *OWNERS_ONLY,
        protocol.encode_plain(Type.CANCEL, 0),
        protocol.encode_plain(Type.DETACH, 0),
    ]:
        client = run.connect()
        client.send(request)
        assert fault(client.receive()) == EPROTO
        assert client.rest() == []
    gate.open()
    assert run.wait().cause is Cause.ITSELF


def test_there_is_room_for_so_many(run: Run, gate: Gate) -> None:
    run.start(waits(gate))
    watchers = [run.attached() for _ in range(WATCHERS_MAX)]
    for _ in range(2):
        refused = run.connect()
        assert fault(refused.receive()) == (errno.EUSERS, "attach")
        assert refused.rest() == []
    watchers[7].plain(Type.DETACH)
    assert watchers[7].rest() == []
    watchers[7] = run.attached()
    gate.open()
    for watcher in watchers:
        assert types(watcher.rest()) == [Type.EXITED, Type.EMPTY]
    assert run.wait().returncode == 3


def test_who_says_nothing_does_not_lock_others_out(run: Run, gate: Gate) -> None:
    run.start(waits(gate))
    run.main()
    attached = run.attached()
    silent = [run.connect() for _ in range(WATCHERS_MAX - 1)]
    for each in silent[:-1]:  # who has come first goes first, and is told nothing
        assert run.attached().silent()
        assert each.rest() == []
    silent[-1].attach()
    refused = run.connect()
    assert fault(refused.receive()) == (errno.EUSERS, "attach")
    gate.open()
    assert types(attached.rest()) == [Type.EXITED, Type.EMPTY]
    assert run.wait().returncode == 3


FOREIGNER = """
import os, sys
from integration.keepers import Client
import socket
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
client = Client(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
client.socket.connect(f"/proc/self/fd/{sys.argv[1]}/control")
print([(message.type.name, *message.values) for message in client.rest()])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
def test_another_user_is_refused(run: Run, gate: Gate) -> None:
    run.start(waits(gate))
    run.main()
    (run.attempt / "control").chmod(0o777)
    run.attempt.chmod(0o755)
    directory = os.open(run.attempt, os.O_PATH)
    done = subprocess.run(
        [sys.executable, "-c", FOREIGNER, str(directory)],
        pass_fds=[directory],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    os.close(directory)
    assert done.stderr == ""
    assert done.stdout.strip() == f"[('FAULT', {errno.EPERM}, 38)]"
    gate.open()
    assert run.wait().returncode == 3


# -- Those that are gone and do not say so


OWNER = """
import os, signal, sys
from pathlib import Path
from integration.keepers import Run
run = Run(Path(sys.argv[1]))
run.start(["sh", "-c", 'read _ <"$0"; exit 3', sys.argv[2]], lease=int(sys.argv[3]))
copy = os.fork()
if copy == 0:
    signal.pause()
os.write(1, b"%d %d %d\\n" % (run.warden, run.main(), copy))
signal.pause()
"""

CLIENT = """
import os, signal, sys, socket
from integration.keepers import Client
client = Client(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
client.socket.connect(sys.argv[1])
client.attach(own=sys.argv[2] == "own")
copy = os.fork()
if copy == 0:
    signal.pause()
os.write(1, b"%d\\n" % copy)
os.read(0, 1)
client.send(bytes.fromhex(sys.argv[3]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def said(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def end_copy(process: subprocess.Popen[str], copy: int) -> None:
    """It is a process of ours now: nobody else reaps it."""
    process.wait(DEADLINE)
    os.kill(copy, signal.SIGKILL)
    os.waitpid(copy, 0)
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()


def test_an_owner_that_is_killed_is_gone_though_its_socket_is_not(
    tmp_path: Path, gate: Gate
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    process = start_supervisor(OWNER, str(folder), gate.path, "300")
    warden, main, copy = said(process)
    began = time.monotonic()
    process.kill()
    end_copy(process, copy)
    os.waitpid(warden, 0)  # it has been ours since its parent died
    assert time.monotonic() - began >= 0.29
    record = Exit.decode((folder / "attempt" / "exit").read_bytes())
    assert (record.pid, record.status, record.cause) == (main, signal.SIGTERM, Cause.LEASE)


LAST_WORDS = {
    "own": protocol.encode_keep(0.4),
    "watch": protocol.encode_attach(False),
    "heir": protocol.encode_attach(True),
}


@pytest.mark.parametrize("role", LAST_WORDS)
def test_one_that_is_killed_is_heard_out_and_gone(run: Run, gate: Gate, role: str) -> None:
    """A copy of its socket lives on. What it has said last is obeyed."""
    owner = run.start(waits(gate), lease=0)
    run.main()
    control = str(run.attempt / "control")
    process = start_supervisor(CLIENT, control, role, LAST_WORDS[role].hex())
    (copy,) = said(process)
    owner.close()
    watcher = run.attached()
    wanted = process.pid if role == "own" else 0
    eventually(lambda: watcher.attach().values[0] == wanted, "its owner has gone")
    stop(run.warden)
    assert process.stdin is not None
    process.stdin.write("x")
    process.stdin.flush()
    eventually(lambda: state_of(process.pid) == "Z", "it is dead, and has said something")
    os.kill(run.warden, signal.SIGCONT)
    eventually(lambda: watcher.attach().values[0] == 0, "nobody owns it")
    assert ending(watcher) is None
    left = time.monotonic()
    watcher.plain(Type.DETACH)
    assert run.wait().cause is Cause.LEASE
    if role == "own":
        assert time.monotonic() - left >= 0.39
    end_copy(process, copy)


def send_until_dropped(client: Client, data: bytes) -> None:
    """Reads nothing."""
    client.socket.settimeout(DEADLINE)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            client.socket.send(data)


def test_a_watcher_that_does_not_read_is_dropped(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    watcher = run.attached()
    send_until_dropped(watcher, protocol.encode_attach(False))
    owner.plain(Type.LIST, 6)
    assert owner.until(Type.MEMBERS).serial == 6
    gate.open()
    assert run.wait().returncode == 3


@pytest.mark.parametrize("heir", [False, True], ids=["alone", "heir"])
def test_an_owner_that_does_not_read_is_dropped(run: Run, heir: bool) -> None:
    """A hundred members and a hundred lists of them: thousands of lines that nobody wants."""
    script = "for i in $(seq 100); do sleep 1000 & done; echo ready; wait"
    owner = run.start(["sh", "-c", script], lease=0)
    run.main()
    eventually(lambda: (run.attempt / "out.log").read_text() != "", "they are there")
    watcher = run.attached(own=heir)
    send_until_dropped(owner, protocol.encode_plain(Type.LIST, 1))
    if heir:
        assert watcher.until(Type.ATTACHED).flags == protocol.ATTACHED_OWNER
        watcher.plain(Type.LIST, 8)
        while (members := watcher.until(Type.MEMBERS)).flags & protocol.MEMBERS_MORE:
            pass
        assert members.values[1] == 101
    watcher.close()
    assert run.wait().cause is Cause.LEASE


# -- Ending it on purpose


def test_the_owner_ends_it_and_says_why(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    run.main()
    for text in (b"never mind", f"{Reason.KILLED}\0after 3 s \xe9".encode()):
        owner.send(protocol.encode_note(text))
    owner.signal(signal.SIGTERM, ending=True)
    owner.until(Type.EMPTY)
    record = run.wait()
    assert (record.status, record.cause) == (signal.SIGTERM, Cause.OWNER)
    assert record.note == f"{Reason.KILLED}\0after 3 s \xe9"


def test_a_note_of_every_byte(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    text = bytes(range(256))[-protocol.NOTE_MAX :]
    owner.send(protocol.encode_note(text))
    owner.signal(signal.SIGKILL, ending=True)
    assert run.wait().note.encode("utf-8", "surrogateescape") == text


def test_a_signal_that_ends_nothing_on_purpose(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    run.main()
    owner.send(protocol.encode_note(b"unused"))
    owner.signal(signal.SIGTERM)
    assert run.wait()[:3] == (signal.SIGTERM, Cause.ITSELF, "")


def test_why_an_owner_ends_it_is_not_why_another_one_does(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    run.main()
    heir = run.attached(own=True)
    owner.send(protocol.encode_note(b"first"))
    owner.close()
    heir.until(Type.ATTACHED)
    heir.signal(signal.SIGTERM, ending=True)
    assert run.wait()[1:3] == (Cause.OWNER, "")


def test_the_first_reason_counts(run: Run, actors: str) -> None:
    """An owner begins to end it; what comes then does not change why it ends."""
    owner = run.start([actors, "ignore"], lease=0)
    run.main()
    eventually(lambda: (run.attempt / "out.log").read_text() != "", "it ignores SIGTERM")
    heir = run.attached(own=True)
    owner.send(protocol.encode_note(b"first"))
    owner.signal(signal.SIGTERM, ending=True)
    owner.until(Type.SIGNALLED)
    owner.send(protocol.encode_note(b"second"))
    heir.plain(Type.CANCEL)
    owner.until(Type.ASKED)
    owner.signal(signal.SIGKILL, ending=True)
    assert run.wait()[:3] == (signal.SIGKILL, Cause.OWNER, "first")


def test_what_an_owner_has_begun_to_end_ends_without_it(run: Run, gate: Gate) -> None:
    """Whoever comes next."""
    owner = run.start(waits(gate))
    run.main()
    heir = run.attached(own=True)
    owner.send(protocol.encode_note(b"first"))
    owner.signal(signal.SIGCONT, ending=True)
    owner.plain(Type.LIST)  # what it asks for besides does not take that back
    owner.close()
    told = heir.until(Type.ATTACHED)
    assert (told.flags, heir.until(Type.EMPTY).type) == (protocol.ATTACHED_OWNER, Type.EMPTY)
    assert run.wait()[:3] == (signal.SIGTERM, Cause.OWNER, "first")


def test_cancel_asks_the_owner(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    watcher = run.attached()
    owner.send(protocol.encode_note(b"unused"))
    watcher.plain(Type.CANCEL)
    assert owner.until(Type.ASKED).values == (0, os.getpid(), os.geteuid())
    owner.signal(signal.SIGINT, ending=True)
    assert run.wait()[:3] == (signal.SIGINT, Cause.CANCELLED, "")


@pytest.mark.parametrize("who", ["watcher", "owner"])
def test_an_owner_that_does_not_act_is_not_waited_for(run: Run, gate: Gate, who: str) -> None:
    """A list that it asks for at that moment is no act."""
    owner = run.start(waits(gate))
    watcher = run.attached()
    (watcher if who == "watcher" else owner).plain(Type.CANCEL)
    owner.until(Type.ASKED)
    owner.plain(Type.LIST)
    owner.until(Type.EMPTY)
    assert run.wait()[:2] == (signal.SIGTERM, Cause.CANCELLED)


def test_who_is_asked_twice_and_does_not_act_is_not_asked_again(run: Run, actors: str) -> None:
    """Then the warden does not wait for the owner any more."""
    owner = run.start([actors, "ignore"])
    run.main()
    eventually(lambda: (run.attempt / "out.log").read_text() != "", "it ignores SIGTERM")
    watcher = run.attached()
    stop(run.warden)
    for _ in range(3):
        watcher.plain(Type.CANCEL)
    watcher.send(protocol.encode_attach(False))
    os.kill(run.warden, signal.SIGCONT)
    told = watcher.until(Type.ATTACHED)
    assert told.values == (os.getpid(), 1 + Cause.CANCELLED)
    owner.signal(signal.SIGKILL, ending=True)
    assert types(owner.rest()).count(Type.ASKED) == 1
    assert run.wait()[:2] == (signal.SIGKILL, Cause.CANCELLED)


def test_cancel_without_an_owner(run: Run, actors: str) -> None:
    plan = (Stage(signal.SIGUSR2, DEADLINE), Stage(signal.SIGKILL, DEADLINE))
    owner = run.start([actors, "pause"], plan=plan)
    run.main()
    watcher = run.attached()
    owner.close()
    eventually(lambda: watcher.attach().values[0] == 0, "nobody owns it")
    stop(run.warden)
    watcher.plain(Type.CANCEL)
    watcher.send(protocol.encode_attach(False))
    os.kill(run.warden, signal.SIGCONT)
    rest = watcher.rest()
    assert rest[0].type is not Type.ATTACHED or rest[0].values == (0, 1 + Cause.CANCELLED)
    assert types(rest)[-2:] == [Type.EXITED, Type.EMPTY]
    assert run.wait()[:2] == (signal.SIGUSR2, Cause.CANCELLED)


def test_cancel_of_what_has_exited(run: Run, gate: Gate) -> None:
    """It is ended because of that, and yet has ended by itself."""
    plan = (Stage(signal.SIGCONT, DEADLINE), Stage(signal.SIGKILL, DEADLINE))
    owner = run.start(leaves(gate), plan=plan)
    owner.until(Type.EXITED)
    watcher = run.attached()
    owner.close()
    eventually(lambda: watcher.attach().values[0] == 0, "nobody owns it")
    watcher.plain(Type.CANCEL)
    assert ending(watcher) is Cause.CANCELLED
    gate.open()
    watcher.until(Type.EMPTY)
    assert run.wait()[:2] == (0, Cause.ITSELF)


@pytest.mark.parametrize("owned", [True, False])
def test_a_signal_to_the_warden(run: Run, gate: Gate, owned: bool) -> None:
    owner = run.start(waits(gate))
    run.main()
    watcher = run.attached()
    if not owned:
        owner.close()
        eventually(lambda: watcher.attach().values[0] == 0, "nobody owns it")
    os.kill(run.warden, signal.SIGTERM)
    if owned:
        asked = owner.until(Type.ASKED)
        assert asked.values == (signal.SIGTERM, os.getpid(), os.geteuid())
    assert run.wait()[:2] == (signal.SIGTERM, Cause.ASKED)


def test_an_end_that_has_not_been_read_yet_is_its_own(run: Run, gate: Gate) -> None:
    """The main process has exited, and the warden is told to end it before it knows."""
    owner = run.start(waits(gate))
    main = run.main()
    stop(run.warden)
    gate.open()
    eventually(lambda: state_of(main) == "Z", "it has exited")
    owner.signal(signal.SIGTERM, ending=True)
    os.kill(run.warden, signal.SIGCONT)
    assert run.wait()[:2] == (3 << 8, Cause.ITSELF)


# -- What the tree gets of it


@pytest.mark.not_with("valgrind", "valgrind keeps descriptors of its own")
@pytest.mark.parametrize("containment", ["warden", "pidns"])
def test_the_tree_has_nothing_of_the_wardens(run: Run, actors: str, containment: str) -> None:
    available(containment)
    more = ["pidns=1"] * (containment == "pidns")
    owner = run.start([actors, "pause"], more=more, strict=True, lease=LONG)
    main = run.main()
    run.attached()
    # Right behind its exec, the dynamic linker has files open.
    opened = lambda: {int(fd) for fd in os.listdir(f"/proc/{main}/fd")}  # noqa: E731
    eventually(lambda: opened() == {0, 1, 2}, "the standard streams and nothing else")
    below = Path(f"/proc/{run.warden}/task/{run.warden}/children").read_text().split()
    others = [pid for pid in below if int(pid) != main]
    assert len(others) == len(more)
    for pid in others:  # the init of the namespace
        names = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        sockets = {name for name in names if name.startswith("socket:")}
        assert len(sockets) == 1, "its own to the warden"
        assert names - sockets <= {"/dev/null", "anon_inode:[signalfd]"}
    owner.signal(signal.SIGKILL, ending=True)
    assert run.wait().cause is Cause.OWNER


@pytest.mark.not_with("valgrind", "valgrind keeps descriptors of its own")
def test_the_warden_closes_what_those_had_who_have_gone(run: Run, gate: Gate) -> None:
    owner = run.start(waits(gate))
    run.main()
    ending(owner)

    def opened() -> int:
        return len(os.listdir(f"/proc/{run.warden}/fd"))

    before = opened()
    for how in range(40):
        client = run.attached(own=bool(how % 2))
        if how % 3 == 0:
            client.send(b"nonsense")
        client.close()
    ending(owner)
    eventually(lambda: opened() == before, "all are closed")
    heir = run.attached(own=True)
    owner.close()
    heir.until(Type.ATTACHED)
    assert opened() == before
    gate.open()
    run.wait()


def times_rested(pid: int) -> int:
    """How often it has given up a processor to wait for something, proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


@pytest.mark.not_with("valgrind", "valgrind keeps descriptors of its own")
def test_a_warden_without_a_descriptor_left_accepts_later(run: Run, gate: Gate) -> None:
    """And rests meanwhile, though somebody waits at its door all the time."""
    run.start(waits(gate))
    run.main()
    # So many that they take all that poll(2) still allows it to have (EINVAL).
    for _ in range(WATCHERS_MAX - 1):
        run.attached()
    _, hard = resource.prlimit(run.warden, resource.RLIMIT_NOFILE)
    resource.prlimit(run.warden, resource.RLIMIT_NOFILE, (POLLED, hard))
    client = run.connect()
    client.send(protocol.encode_attach(False))
    rests = times_rested(run.warden)
    # One that asked again and again would never sleep, however little of a processor it had.
    eventually(lambda: times_rested(run.warden) >= rests + 3, "it rests between two tries")
    assert client.silent()
    resource.prlimit(run.warden, resource.RLIMIT_NOFILE, (hard, hard))
    assert client.until(Type.ATTACHED).values == (os.getpid(), 0)
    gate.open()
    assert run.wait().returncode == 3


def test_a_durable_warden_to_which_nobody_can_attach(run: Run, gate: Gate) -> None:
    """`listen` is not needed for a record."""
    owner = run.start(waits(gate), listen=False)
    main = run.main()
    owner.close()
    gate.open()
    assert run.wait().returncode == 3
    assert not is_alive(main)
