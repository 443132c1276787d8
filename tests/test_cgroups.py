"""Our own cgroup: found in the texts of /proc, and on real cgroups where there are some."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proctree.errors import ContainmentUnavailable
from proctree.process import cgroups
from proctree.process.cgroups import Home, Mount, parse_mounts, parse_own, resolve

HYBRID = """\
23 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""

HYBRID_OWN = """\
9:name=systemd:/user.slice
4:memory:/batch/7
2:cpu,cpuacct:/
0::/user.slice
"""


def mount_line(root: str, point: str, *optional: str) -> str:
    return " ".join(("30", "23", "0:26", root, point, "rw,nosuid", *optional)) + (
        " - cgroup2 cgroup2 rw,nsdelegate\n"
    )


def test_a_hybrid_host():
    assert parse_mounts(HYBRID) == [Mount("/", "/sys/fs/cgroup/unified")]
    assert parse_own(HYBRID_OWN) == "/user.slice"
    assert cgroups.parse_v1_controllers(HYBRID_OWN) == {"name=systemd", "memory", "cpu", "cpuacct"}


def test_a_unified_host():
    text = mount_line("/", "/sys/fs/cgroup", "shared:9")
    assert parse_mounts(text) == [Mount("/", "/sys/fs/cgroup")]
    assert parse_own("0::/user.slice/user-0.slice/session-3.scope\n") == (
        "/user.slice/user-0.slice/session-3.scope"
    )
    assert cgroups.parse_v1_controllers("0::/user.slice\n") == set()


def test_no_cgroup2_at_all():
    assert parse_mounts(HYBRID.replace("cgroup2", "tmpfs")) == []
    assert parse_own("4:memory:/\n1:cpu:/\n") is None


@pytest.mark.parametrize("optional", [(), ("shared:9",), ("shared:9", "master:3", "unbindable")])
def test_optional_fields(optional):
    """Any number of them, up to a single hyphen: proc_pid_mountinfo(5)."""
    assert parse_mounts(mount_line("/a", "/m", *optional)) == [Mount("/a", "/m")]


@pytest.mark.parametrize(
    "line",
    ["", "-", " - cgroup2", "30 23 0:26 / /m - cgroup2 x rw", "30 23 0:26 / /m rw", "a b c d e f"],
)
def test_lines_that_are_none(line):
    assert parse_mounts(line + "\n") == []


def test_only_the_type_says_that_it_is_cgroup2():
    """The source of a mount is any word that somebody gave to mount(2)."""
    assert parse_mounts("30 23 0:26 / /m rw - tmpfs cgroup2 rw\n") == []


def kernel_escaped(path: str) -> str:
    """show_mountinfo() in fs/proc_namespace.c."""
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in path)


PATHS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=()), min_size=1, max_size=30
).map(lambda text: "/" + text)


@given(PATHS, PATHS)
@example("/a b\tc\nd\\e", "/\\040")
@example("/\u00e9\u20ac\udcff", "/\x0c\x1c\x85\u2028")  # what str.splitlines() takes for a line end
def test_any_path_comes_out_as_it_is(root, point):
    text = HYBRID + mount_line(kernel_escaped(root), kernel_escaped(point))
    assert parse_mounts(text)[1:] == [Mount(root, point)]


@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_a_cgroup_with_an_odd_name(odd):
    """Its name may hold everything but a slash and a newline."""
    assert parse_own(f"0::/a{odd}b\n") == f"/a{odd}b"
    # A name in another hierarchy says nothing about this one.
    assert parse_own(f"1:name=x:/a{odd}0::/evil\n0::/own\n") == "/own"


@pytest.mark.parametrize(
    ("root", "own", "path"),
    [
        ("/", "/", "/m"),
        ("/", "/a/b", "/m/a/b"),
        ("/a", "/a", "/m"),
        ("/a", "/a/b", "/m/b"),
        ("/a", "/ab", None),
        ("/a", "/ab/c", None),
        ("/a/b", "/a", None),
        ("/", "/..", None),
        ("/", "/../b", None),
        ("/", "/../../b", None),
        ("/..", "/", None),
        ("/../a", "/../a", None),
        ("/", "/..a/b", "/m/..a/b"),
        ("/", "/a/..b", "/m/a/..b"),
    ],
)
def test_where_our_own_is(root, own, path):
    found = resolve([Mount(root, "/m")], own)
    assert found == (None if path is None else (path, "/m"))


def test_in_a_container():
    """The root of its cgroup namespace is what is mounted: both read as /."""
    (mount,) = parse_mounts(mount_line("/", "/sys/fs/cgroup", "master:5"))
    assert resolve([mount], "/") == ("/sys/fs/cgroup", "/sys/fs/cgroup")


def test_the_mount_that_shows_us_is_taken():
    mounts = [Mount("/b", "/first"), Mount("/a", "/second"), Mount("/", "/third")]
    assert resolve(mounts, "/a/c") == ("/second/c", "/second")
    assert resolve(mounts, "/c") == ("/third/c", "/third")
    assert resolve([], "/") is None


def test_mounted_at_the_root_of_everything():
    assert resolve([Mount("/", "/")], "/") == ("/", "/")
    assert resolve([Mount("/", "/")], "/a") == ("/a", "/")


def test_this_very_process():
    """What is found is where the kernel has us."""
    try:
        home = cgroups.find_home(cgroups.own_path())
    except ContainmentUnavailable as error:
        pytest.skip(str(error))
    assert str(os.getpid()) in Path(home.path, "cgroup.procs").read_text().split()
    assert os.path.ismount(home.mount)


# -- delegation


@pytest.fixture
def below(tmp_path: Path) -> Callable[..., Home]:
    """Makes folders in a row, and gives a mark to those that begin with a +."""

    def make(*names: str, mark: str = "user.delegate", value: bytes = b"1") -> Home:
        path = tmp_path
        for name in names:
            path = path / name.lstrip("+")
            path.mkdir()
            if name.startswith("+"):
                try:
                    os.setxattr(path, mark, value)
                except OSError as error:
                    if error.errno not in (errno.ENOTSUP, errno.EPERM):
                        raise
                    pytest.skip(f"{mark} cannot be set here")
        return Home(str(path), str(tmp_path))

    return make


@pytest.mark.parametrize("managed", [True, False])
@pytest.mark.parametrize("mark", ["user.delegate", "trusted.delegate"])
def test_what_bears_the_mark_is_ours(below, mark, managed):
    """trusted.delegate is what older versions of systemd set; only root sees it."""
    if mark.startswith("trusted") and os.geteuid() != 0:
        pytest.skip("only root sees it")
    assert cgroups.delegated(below("s.slice", "+u.service", mark=mark), managed=managed)


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (("+u.service", "a"), True),
        (("+u.service", "a", "b"), True),
        (("+user@1.service", "app.slice", "x.scope"), False),  # the user's manager has that one
        (("+user@1.service", "app.slice"), False),
        (("+user@1.service", "app.slice", "+x.scope"), True),
        (("+user@1.service", "app.slice", "+x.scope", "a"), True),
        (("u.service",), False),
        (("u.service", "a"), False),
        (("a",), False),
        ((), False),
    ],
)
def test_under_systemd(below, names, ours):
    assert cgroups.delegated(below(*names), managed=True) is ours


def test_a_mark_that_says_no(below):
    assert not cgroups.delegated(below("+a", value=b"0"), managed=True)


@pytest.mark.parametrize("names", [("a", "b"), ()])
def test_where_nobody_manages_anything(below, names):
    assert cgroups.delegated(below(*names), managed=False)


def test_a_unit_needs_its_mark_even_so(below):
    """Somebody made a cgroup with a unit's name: its writer is that manager, whoever it is."""
    assert not cgroups.delegated(below("u.service"), managed=False)


# -- real cgroups

Ground = tuple[Home, str]


@pytest.fixture
def ground() -> Iterator[Ground]:
    """A cgroup of the test's own, as if it were ours, with a controller that it may give."""
    try:
        home = cgroups.find_home(cgroups.own_path())
    except ContainmentUnavailable as error:
        pytest.skip(str(error))
    if (reason := cgroups.trouble(home)) is not None:
        pytest.skip(reason)
    control = Path(home.path, "cgroup.subtree_control")
    before = control.read_text().split()
    controllers = before or Path(home.path, "cgroup.controllers").read_text().split()
    if not controllers:
        pytest.skip("cgroup v2 holds no controller here")
    controller = controllers[0]
    if not before:
        try:
            control.write_text(f"+{controller}")
        except OSError as error:
            pytest.skip(f"no controller can be enabled here: {error}")
    path = Path(home.path, f"proctree-test-{os.getpid()}")
    path.mkdir()
    try:
        yield Home(str(path), home.mount), controller
    finally:
        assert cgroups.end(str(path), 10.0)
        if not before:
            # EBUSY: somebody else has taken it up meanwhile.
            with contextlib.suppress(OSError):
                control.write_text(f"-{controller}")


@contextlib.contextmanager
def somebody_in(path: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            Path(path, "cgroup.procs").write_text(str(process.pid))
            yield process
        finally:
            process.kill()


def enabled(path: str | Path) -> list[str]:
    return Path(path, "cgroup.subtree_control").read_text().split()


def test_a_controller_is_enabled_for_what_is_below(ground):
    home, controller = ground
    assert enabled(home.path) == []
    assert cgroups.home_for(home, {controller}) == home.path
    assert enabled(home.path) == [controller]
    leaf = Path(home.path, "leaf")
    leaf.mkdir()
    assert (leaf / "cgroup.controllers").read_text().split() == [controller]
    assert cgroups.home_for(home, {controller}) == home.path  # and again


def test_with_processes_of_our_own_it_is_the_one_above(ground):
    home, controller = ground
    own = Path(home.path, "own")
    own.mkdir()
    assert cgroups.home_for(home, {controller}) == home.path
    with somebody_in(own):
        assert cgroups.home_for(Home(str(own), home.mount), {controller}) == home.path
        assert enabled(own) == []


def test_above_is_not_ours_without_delegation(ground, monkeypatch, tmp_path):
    home, controller = ground
    monkeypatch.setattr(cgroups, "_SYSTEMD", str(tmp_path))  # a directory that is there
    own = Path(home.path, "own")
    own.mkdir()
    cgroups.home_for(home, {controller})
    with somebody_in(own):
        with pytest.raises(ContainmentUnavailable) as caught:
            cgroups.home_for(Home(str(own), home.mount), {controller})
        text = str(caught.value)
        assert f"{own}/cgroup.subtree_control: EBUSY" in text
        assert controller in text
        assert "DelegateSubgroup=" in text
        try:
            os.setxattr(home.path, "user.delegate", b"1")
        except OSError:
            pytest.skip("no extended attributes on cgroups before Linux 5.7")
        assert cgroups.home_for(Home(str(own), home.mount), {controller}) == home.path


def test_a_controller_that_we_were_not_given(ground):
    """It stops at a cgroup that has not enabled it: the error names it, and what to do."""
    home, controller = ground
    own = Path(home.path, "own")
    own.mkdir()
    with pytest.raises(ContainmentUnavailable) as caught:
        cgroups.home_for(Home(str(own), home.mount), {controller})
    text = str(caught.value)
    assert f"'{controller}'" in text
    assert f"not delegated to {own}" in text
    assert f"+{controller}" in text
    assert "Delegate=yes" in text


def test_a_controller_that_cgroup_v1_holds(ground):
    home, _ = ground
    held = cgroups.parse_v1_controllers(Path("/proc/self/cgroup").read_text())
    held = {name for name in held if "=" not in name and name}
    if not held:
        pytest.skip("there is no cgroup v1 here")
    name = min(held)
    with pytest.raises(ContainmentUnavailable, match=f"cgroup_no_v1={name}"):
        cgroups.home_for(home, {name})


def test_a_threaded_cgroup_holds_no_processes_below(ground):
    home, _ = ground
    assert cgroups.trouble(home) is None
    child = Path(home.path, "threaded")
    child.mkdir()
    (child / "cgroup.type").write_text("threaded")
    reason = cgroups.trouble(Home(str(child), home.mount))
    assert reason is not None
    assert "'threaded'" in reason


def test_one_that_is_not_writable(ground):
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    home, _ = ground
    assert in_child(65534, lambda: cgroups.trouble(home)) == f"{home.path} is not writable for us"
    os.chown(home.path, 65534, -1)
    assert in_child(65534, lambda: cgroups.trouble(home)) == (
        f"{home.path}/cgroup.procs is not writable for us"
    )


def in_child(uid: int, function: Callable[[], str | None]) -> str:
    """What it returns in a process of that user."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.write(writer, repr(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text.strip("'")


def test_we_are_found_in_one_with_an_odd_name(ground):
    home, _ = ground
    odd = Path(home.path, "..a \\ \u20ac\x0c\r\x85\u2028b")
    odd.mkdir()
    code = (
        "from proctree.process.cgroups import find_home, own_path; "
        "print(ascii(find_home(own_path()).path))"
    )
    join = f"echo $$ > '{odd}/cgroup.procs' && exec \"$0\" -c '{code}'"
    done = subprocess.run(
        ["sh", "-c", join, sys.executable], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout == ascii(str(odd)) + "\n"


def test_the_end_of_one_with_others_below(ground):
    home, _ = ground
    deep = Path(home.path, "a", "b")
    deep.mkdir(parents=True)
    with somebody_in(deep) as process:
        assert cgroups.pids_in(home.path) == [process.pid]
        assert cgroups.end(str(deep.parent), 10.0)
    assert not deep.parent.exists()
    assert Path(home.path).is_dir()
    assert cgroups.pids_in(home.path) == []


def test_the_end_of_one_that_is_gone(ground):
    home, _ = ground
    assert cgroups.end(f"{home.path}/never", 1.0)


def test_without_cgroup_kill_its_members_are_killed_one_by_one(ground):
    """As it is before Linux 5.14; and nobody else is."""
    home, _ = ground
    inside, outside = Path(home.path, "a"), Path(home.path, "ab")
    (inside / "b").mkdir(parents=True)
    outside.mkdir()
    with (
        somebody_in(inside) as one,
        somebody_in(inside / "b") as two,
        somebody_in(outside) as other,
    ):
        cgroups._kill_members(str(inside))
        assert (one.wait(30), two.wait(30)) == (-9, -9)
        assert other.poll() is None
