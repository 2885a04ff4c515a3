"""Snapshots and clones by ioctl: from C and Python, by whom they may be made, and beside writes that go on."""

import errno
import fcntl
import os
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from archipfs.endpoints.fuse.ioctls import CLONE, INFO, SNAPSHOT, Info, InfoFlags, decode_info, encode_name
from archipfs.map.records import Kind
from tests.conftest import MakeInstance
from tests.lib.instance import Instance
from tests.lib.stream import Stream, streams_of
from tests.lib.volumes import SECTOR_BYTES, clone, create, fact, opened, read_all
from tests.lib.waiting import Task, threads, wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20
HEADER = Path(__file__).parents[2] / "tools" / "archip-ioctl.h"
NOBODY = 65534
KILLS = 4
"""Fewer than make a supervisor give up."""
SYSTEM_PYTHON = "/usr/bin/python3"
"""Which every user may start, unlike what lies in somebody's home directory."""

PROGRAM = """
#include "archip-ioctl.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

int main(int argc, char **argv) {
    struct archip_name name;
    struct archip_info info;
    int volume = argc == 4 ? open(argv[2], O_RDONLY) : -1;
    if (volume < 0)
        return 255;
    memset(&name, 0, sizeof name);
    strncpy(name.name, argv[3], sizeof name.name - 1);
    if (ioctl(volume, strcmp(argv[1], "clone") == 0 ? ARCHIP_IOC_CLONE : ARCHIP_IOC_SNAPSHOT, &name) < 0)
        return errno;
    if (ioctl(volume, ARCHIP_IOC_INFO, &info) < 0)
        return errno;
    printf("%s %u %llu\\n", info.name, (unsigned)info.kind, (unsigned long long)info.size_bytes);
    return 0;
}
"""

IOCTL_OF_AN_INHERITED_DESCRIPTOR = """
import fcntl, sys
try:
    fcntl.ioctl(int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3]))
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        yield
    assert caught.value.errno == number, f"{caught.value}, not {errno.errorcode[number]}"


def ioctl(path: Path, command: int, data: bytes) -> bytes:
    with opened(path, os.O_RDONLY) as descriptor:
        return fcntl.ioctl(descriptor, command, data)


def snapshot_by_ioctl(path: Path, name: str) -> Path:
    ioctl(path, SNAPSHOT, encode_name(name))
    return path.with_name(name)


def clone_by_ioctl(path: Path, name: str) -> Path:
    ioctl(path, CLONE, encode_name(name))
    return path.with_name(name)


def info(path: Path) -> Info:
    return decode_info(ioctl(path, INFO, bytes(384)))


def run_as_nobody(
    program: str, descriptor: int, *arguments: str, groups: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    """Run Python code as another user, with a descriptor that it inherits."""
    return subprocess.run(
        [SYSTEM_PYTHON, "-I", "-c", program, str(descriptor), *arguments],
        user=NOBODY,
        group=NOBODY,
        extra_groups=groups,
        pass_fds=[descriptor],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def errno_as_nobody(descriptor: int, command: int, data: bytes, groups: Sequence[int] = ()) -> int:
    """What another user gets for an ioctl, 0 if it is done."""
    arguments = (str(command), data.hex())
    return run_as_nobody(IOCTL_OF_AN_INHERITED_DESCRIPTOR, descriptor, *arguments, groups=groups).returncode


# What they do


def test_a_snapshot_holds_what_was_written_before_it_and_is_there_at_once(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"before", 0)
        assert not (mount.path / "monday").exists()
        fcntl.ioctl(descriptor, SNAPSHOT, encode_name("monday"))
        assert "monday" in os.listdir(mount.path)
        os.pwrite(descriptor, b"after!", 0)
    assert read_all(mount.path / "monday") == b"before".ljust(MIB, b"\0")
    assert read_all(volume) == b"after!".ljust(MIB, b"\0")
    assert stat.S_IMODE((mount.path / "monday").stat().st_mode) == 0o444
    assert fact(mount.path / "monday", "kind") == "snapshot"


def test_the_root_directory_shows_at_once_that_a_name_was_made(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    before_ns = mount.path.stat().st_mtime_ns
    snapshot_by_ioctl(volume, "monday")
    assert mount.path.stat().st_mtime_ns > before_ns


def test_the_space_of_what_is_frozen_is_the_volumes_own_no_more(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(os.urandom(MIB))
    with opened(volume, os.O_RDONLY) as descriptor:
        assert os.fstat(descriptor).st_blocks * 512 >= MIB
        fcntl.ioctl(descriptor, SNAPSHOT, encode_name("monday"))
        assert os.fstat(descriptor).st_blocks * 512 < MIB
    assert (mount.path / "monday").stat().st_blocks * 512 >= MIB


def test_clones_of_a_volume_and_of_a_snapshot_are_writable_and_independent(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * 10000)
    monday = snapshot_by_ioctl(volume, "monday")
    copies = [clone_by_ioctl(volume, "c1"), clone_by_ioctl(monday, "c2"), clone_by_ioctl(volume, "c3")]
    with opened(copies[0]) as descriptor:
        os.pwrite(descriptor, b"own", 5000)
    assert read_all(copies[0]) == b"x" * 5000 + b"own" + b"x" * 4997
    for path in (volume, monday, copies[1], copies[2]):
        assert read_all(path) == b"x" * 10000


def test_a_snapshot_of_a_snapshot_is_a_second_name_for_what_it_holds(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * 10000)
    monday = snapshot_by_ioctl(volume, "monday")
    again = snapshot_by_ioctl(monday, "again")
    monday.unlink()
    assert read_all(again) == b"x" * 10000


def test_info_says_what_the_attributes_say(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(os.urandom(3 * SECTOR_BYTES))
    said = info(volume)
    assert (said.name, said.kind, said.size_bytes, said.origin) == ("vm1", Kind.VOLUME, 3 * SECTOR_BYTES, None)
    assert (said.id, said.stored_bytes) == (fact(volume, "uuid"), 3 * SECTOR_BYTES)
    assert said.flags == InfoFlags.OPEN
    monday = info(snapshot_by_ioctl(volume, "monday"))
    assert (monday.kind, monday.origin, monday.stored_bytes) == (Kind.SNAPSHOT, said.id, 3 * SECTOR_BYTES)
    made = info(clone_by_ioctl(mount.path / "monday", "vm2"))
    assert (made.kind, made.origin, made.stored_bytes) == (Kind.CLONE, monday.id, 0)
    os.setxattr(volume, "user.archip.lock", b"")
    assert info(volume).flags == InfoFlags.OPEN | InfoFlags.LOCKED


def test_a_volume_that_was_removed_tells_of_itself_and_makes_nothing(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume) as descriptor:
        volume.unlink()
        said = decode_info(fcntl.ioctl(descriptor, INFO, bytes(384)))
        assert (said.name, said.size_bytes) == (None, MIB)
        assert InfoFlags.REMOVED in said.flags
        for command in (SNAPSHOT, CLONE):
            with refused(errno.ENOENT):
                fcntl.ioctl(descriptor, command, encode_name("late"))
    assert os.listdir(mount.path) == []


@pytest.mark.parametrize("compiler", [["gcc", "-x", "c", "-std=c11"], ["g++", "-x", "c++"]], ids=["C", "C++"])
def test_a_program_in_c_takes_snapshots_and_clones(mount: Instance, tmp_path: Path, compiler: list[str]) -> None:
    source, program = tmp_path / "source", tmp_path / "program"
    source.write_text(PROGRAM)
    flags = ["-Wall", "-Wextra", "-Werror", f"-I{HEADER.parent}"]
    subprocess.run([*compiler, *flags, source, "-o", program], check=True, timeout=60)
    volume = create(mount.path / "vm1", MIB)

    def run(*arguments: str | Path) -> tuple[int, str]:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout.strip()

    assert run("snapshot", volume, "monday") == (0, f"vm1 1 {MIB}")
    assert run("clone", mount.path / "monday", "vm2") == (0, f"monday 2 {MIB}")
    assert run("clone", mount.path / "vm2", "vm3") == (0, f"vm2 3 {MIB}")
    assert run("snapshot", volume, "monday") == (errno.EEXIST, "")
    assert sorted(os.listdir(mount.path)) == ["monday", "vm1", "vm2", "vm3"]


# What they refuse


@pytest.mark.parametrize("command", [SNAPSHOT, CLONE], ids=["snapshot", "clone"])
@pytest.mark.parametrize(
    "name",
    [b"", b"a/b", b".hidden", b"..", b"\xff\xfe", b"x" * 256, b"x" * 300],
    ids=["empty", "slash", "dot", "parent", "not UTF-8", "not ended", "300 bytes"],
)
def test_a_bad_name_is_refused_and_makes_nothing(mount: Instance, command: int, name: bytes) -> None:
    volume = create(mount.path / "vm1", MIB)
    with refused(errno.EINVAL):
        ioctl(volume, command, name.ljust(288, b"\0"))
    assert os.listdir(mount.path) == ["vm1"]


def test_a_name_of_255_bytes_is_taken(mount: Instance) -> None:
    name = "ä" * 127 + "x"
    snapshot_by_ioctl(create(mount.path / "vm1", MIB), name)
    assert sorted(os.listdir(mount.path)) == ["vm1", name]


def test_what_is_reserved_must_be_zero(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with refused(errno.EINVAL):
        ioctl(volume, SNAPSHOT, encode_name("monday")[:-1] + b"\1")


@pytest.mark.parametrize("command", [SNAPSHOT, CLONE], ids=["snapshot", "clone"])
def test_a_taken_name_is_refused_and_the_log_has_the_sentence(mount: Instance, command: int) -> None:
    volume = create(mount.path / "vm1", MIB)
    with refused(errno.EEXIST):
        ioctl(volume, command, encode_name("vm1"))
    assert mount.logged("vm1 exists already")


def test_other_ioctls_are_no_commands_and_not_worth_a_line_in_the_log(mount: Instance) -> None:
    """BLKSSZGET, one of ours with another size, one that we may have some day, and one of ours on the directory."""
    volume = create(mount.path / "vm1", MIB)
    larger = SNAPSHOT & ~(0x3FFF << 16) | 300 << 16
    for command in (0x1268, larger, SNAPSHOT + 7):
        with refused(errno.ENOTTY):
            ioctl(volume, command, bytes(300))
    directory = os.open(mount.path, os.O_RDONLY)
    try:
        with refused(errno.ENOTTY):
            fcntl.ioctl(directory, SNAPSHOT, encode_name("monday"))
    finally:
        os.close(directory)
    assert not mount.logged("no such ioctl")


def test_tools_that_probe_with_ioctls_go_on(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    for command in (
        ["qemu-img", "info", "-f", "raw", volume],
        ["qemu-io", "-f", "raw", "-t", "none", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", volume],
        ["cp", "--reflink=auto", volume, mount.path / "vm2"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    for place in (["-d", mount.path], [volume]):
        said = subprocess.run(["lsattr", *place], capture_output=True, text=True, check=False, timeout=60).stderr
        assert "not supported" in said or "Inappropriate ioctl" in said
    assert read_all(mount.path / "vm2") == read_all(volume) == (b"\7" * 65536).ljust(MIB, b"\0")


def test_without_the_front_there_are_none(make_instance: MakeInstance) -> None:
    instance = make_instance(front=False).mount()
    with refused(errno.ENOTTY):
        snapshot_by_ioctl(create(instance.path / "vm1", MIB), "monday")


def test_a_volume_that_another_node_has_locked_is_refused(make_instance: MakeInstance) -> None:
    first = make_instance().mount()
    second = make_instance(store=first.store).mount()
    with opened(create(first.path / "vm1", MIB)):
        volume = second.path / "vm1"
        wait_until(volume.exists, "the other node sees the volume")
        assert info(volume).flags == InfoFlags.OPEN | InfoFlags.FOREIGN
        for command in (SNAPSHOT, CLONE):
            with refused(errno.EBUSY):
                ioctl(volume, command, encode_name("monday"))


# Who may


def test_a_clone_is_the_callers_and_nobody_elses(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.chown(volume, NOBODY, NOBODY)
    with opened(volume, os.O_RDONLY) as descriptor:
        assert errno_as_nobody(descriptor, CLONE, encode_name("theirs")) == 0
    made = [mount.path / "theirs", clone_by_ioctl(volume, "by-ioctl"), clone(volume, "by-attribute")]
    assert [(path.stat().st_uid, path.stat().st_gid) for path in made] == [(NOBODY, NOBODY), (0, 0), (0, 0)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}


@pytest.mark.parametrize(
    ("mode", "owner", "groups", "snapshots", "clones"),
    [
        (0o600, NOBODY, [], True, True),
        (0o400, NOBODY, [], False, True),
        (0o200, NOBODY, [], True, False),
        (0o077, NOBODY, [], False, False),
        (0o600, 1234, [], False, False),
        (0o644, 1234, [], False, False),
        (0o666, 1234, [], True, True),
        (0o606, 1234, [1234], False, False),
        (0o660, 1234, [], False, False),
        (0o660, 1234, [77, 1234], True, True),
        (0o620, 1234, [1234], True, False),
    ],
)
def test_what_counts_is_what_the_caller_may_do_with_the_file(
    mount: Instance, mode: int, owner: int, groups: list[int], snapshots: bool, clones: bool
) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.chown(volume, owner, owner)
    volume.chmod(mode)
    with opened(volume) as descriptor:
        for command, name, may in ((SNAPSHOT, "monday", snapshots), (CLONE, "vm2", clones)):
            assert errno_as_nobody(descriptor, command, encode_name(name), groups) == (0 if may else errno.EACCES)
            assert (mount.path / name).exists() == may
        assert errno_as_nobody(descriptor, INFO, bytes(384), groups) == 0


def test_who_may_write_but_not_read_gets_no_clone_to_read_by_attribute_either(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.chown(volume, 1234, 1234)
    program = "import os, sys; os.setxattr(int(sys.argv[1]), 'user.archip.clone', b'vm2')"
    with opened(volume) as descriptor:
        volume.chmod(0o602)
        assert "Permission denied" in run_as_nobody(program, descriptor).stderr
        assert not (mount.path / "vm2").exists()
        volume.chmod(0o606)
        assert run_as_nobody(program, descriptor).returncode == 0
    assert (mount.path / "vm2").stat().st_uid == NOBODY


# Beside writes


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("make", [snapshot_by_ioctl, clone_by_ioctl], ids=["snapshots", "clones"])
def test_what_is_made_beside_writes_holds_an_exact_prefix_of_them(
    mount: Instance, flags: int, make: Callable[[Path, str], Path]
) -> None:
    volume = create(mount.path / "vm1", 8 * MIB)
    streams = streams_of(8 * MIB, 4, 96)

    def writing(stream: Stream) -> Task:
        def task(stop: threading.Event) -> None:
            with opened(volume, os.O_RDWR | flags) as descriptor:
                while not stop.is_set():
                    stream.write(descriptor)

        return task

    taken = {}
    with threads([writing(stream) for stream in streams]):
        for number in range(6):
            wanted = [stream.acknowledged + 20 for stream in streams]
            wait_until(lambda wanted=wanted: all(map(reached, streams, wanted)), "every stream has got further")
            at_least = [stream.acknowledged for stream in streams]
            path = make(volume, f"made{number}")
            taken[path] = list(zip(at_least, [stream.issued for stream in streams], strict=True))
    for path, bounds in taken.items():
        content = read_all(path)
        for stream, (least, most) in zip(streams, bounds, strict=True):
            stream.expect_prefix(content, least, most)


def reached(stream: Stream, number: int) -> bool:
    return stream.acknowledged >= number


def test_what_was_made_survives_a_kill_of_the_daemon(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * MIB)
    snapshot_by_ioctl(volume, "monday")
    clone_by_ioctl(volume, "vm2")
    mount.kill()
    mount.remount()
    for name in ("vm1", "monday", "vm2"):
        assert read_all(mount.path / name) == b"x" * MIB


def test_who_takes_snapshots_does_not_notice_that_daemons_are_killed(make_instance: MakeInstance) -> None:
    """Each is taken once: one that is asked for again because its answer was lost is found to be done."""
    instance = make_instance(supervised=True).mount()
    volume = create(instance.path / "vm1", MIB)
    taken: list[int] = []

    def takes(stop: threading.Event) -> None:
        with opened(volume) as descriptor:
            while not stop.is_set():
                number = len(taken) + 1
                os.pwrite(descriptor, number.to_bytes(8, "little"), 0)
                fcntl.ioctl(descriptor, SNAPSHOT, encode_name(f"s{number}"))
                taken.append(number)

    with threads([takes]):
        for _ in range(KILLS):
            before = len(taken)
            wait_until(lambda before=before: len(taken) >= before + 5, "some snapshots more are taken")
            instance.kill_daemon()
    for number in taken:
        assert int.from_bytes(read_all(instance.path / f"s{number}")[:8], "little") == number
    assert sorted(os.listdir(instance.path)) == sorted(["vm1", *(f"s{number}" for number in taken)])
