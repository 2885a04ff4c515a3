"""Volumes as files: what a user sees, with the tools a user has."""

import errno
import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from archipfs.blockers.rados.data import STRIPE_BYTES
from tests.lib.instance import Instance
from tests.lib.volumes import (
    SECTOR_BYTES,
    clone,
    closes,
    command,
    create,
    fact,
    opened,
    read_all,
    rollback,
    snapshot,
)
from tests.lib.waiting import wait_until
from tests.lib.ways import FRONT, PLAIN, POOL, Way

pytestmark = [pytest.mark.mount, pytest.mark.ways(FRONT, PLAIN, POOL)]


MIB = 1 << 20
refused_before_the_store = pytest.mark.directory("what is refused never reaches the store")


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


def run(*arguments: str | Path) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}: {done.stderr}"
    return done.stdout


@contextmanager
def refused(number: int) -> Iterator[None]:
    """The block ends with the errno ``number``."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        yield
    assert caught.value.errno == number, f"{caught.value}, not {errno.errorcode[number]}"


def names(mount: Instance) -> list[str]:
    return sorted(os.listdir(mount.path))


def snapshots_left(mount: Instance, volume: str) -> list[Path]:
    """What rollbacks of the volume have kept."""
    return [mount.path / name for name in names(mount) if name.startswith(f"{volume}@before-rollback-")]


# The tour


def test_the_tour_of_the_design_works_word_for_word(mount: Instance) -> None:
    tour = """
        set -e
        truncate -s 20G vm1
        printf monday | dd of=vm1 conv=notrunc,fsync status=none
        setfattr -n user.archip.snapshot -v vm1-monday vm1
        printf tuesday | dd of=vm1 conv=notrunc,fsync status=none
        setfattr -n user.archip.clone -v vm2 vm1-monday
        head -c 6 vm2; echo
        setfattr -n user.archip.rollback -v vm1-monday vm1
        head -c 6 vm1; echo
        getfattr -n user.archip.info --only-values vm1
    """
    done = subprocess.run(["sh", "-c", tour], cwd=mount.path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    vm2, vm1, info = done.stdout.splitlines()
    assert (vm2, vm1) == ("monday", "monday")
    assert json.loads(info)["size"] == 20 << 30
    assert (mount.path / "vm1-monday").stat().st_mode == stat.S_IFREG | 0o444
    [kept] = snapshots_left(mount, "vm1")
    assert read_start(kept, 7) == b"tuesday"


def read_start(path: Path, length: int) -> bytes:
    """The beginning: the volumes of the tour are too large to read them whole."""
    with opened(path, os.O_RDONLY) as descriptor:
        return os.pread(descriptor, length, 0)


def test_truncate_and_qemu_img_and_touch_make_volumes(mount: Instance) -> None:
    run("truncate", "-s", "20G", mount.path / "vm1")
    run("qemu-img", "create", "-q", "-f", "raw", mount.path / "vm2", "1G")
    run("touch", mount.path / "vm3")
    assert {path.name: path.stat().st_size for path in mount.path.iterdir()} == {
        "vm1": 20 << 30,
        "vm2": 1 << 30,
        "vm3": 0,
    }
    assert [volume["name"] for volume in mount.json("volume-list")] == ["vm1", "vm2", "vm3"]


def test_qemu_img_converts_onto_a_volume_and_finds_it_equal(mount: Instance, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as stream:
        stream.truncate(8 * MIB)
        stream.seek(3 * MIB)
        stream.write(os.urandom(MIB + 1000))
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", image, mount.path / "vm1")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, mount.path / "vm1")


# Commands and facts


def test_a_snapshot_keeps_what_the_volume_held_while_it_changes(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"one" * 4096, 5000)
        before = read_all(volume)
        monday = snapshot(volume, "monday")
        os.pwrite(descriptor, b"two" * 4096, 7000)
        assert read_all(monday) == before
        assert read_all(volume) != before
    mount.remount()
    assert read_all(monday) == before


def test_a_clone_of_a_volume_and_of_a_snapshot_is_written_apart(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(b"a" * MIB)
    of_volume, of_snapshot = clone(volume, "c1"), clone(snapshot(volume, "monday"), "c2")
    for path, letter in ((volume, b"v"), (of_volume, b"1"), (of_snapshot, b"2")):
        with opened(path) as descriptor:
            os.pwrite(descriptor, letter * 100, 4000)
    for path, letter in ((volume, b"v"), (of_volume, b"1"), (of_snapshot, b"2")):
        assert read_all(path) == b"a" * 4000 + letter * 100 + b"a" * (MIB - 4100)
    assert fact(of_volume, "kind") == "clone"


def test_a_snapshot_of_an_open_volume_holds_every_write_that_returned(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume, os.O_RDWR | os.O_DIRECT) as direct, opened(volume) as buffered:
        for count in range(10):
            os.pwrite(direct, bytes([count]) * 512, 512 * count)
            os.pwrite(buffered, bytes([count]) * 100, 8192 + 100 * count)
            taken = read_all(snapshot(volume, f"s{count}"))
            assert taken[512 * count : 512 * count + 512] == bytes([count]) * 512
            assert taken[8192 + 100 * count : 8292 + 100 * count] == bytes([count]) * 100


def test_rollback_reads_as_the_snapshot_and_keeps_what_it_leaves(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(b"old" * 1000)
    old = read_all(volume)
    snapshot(volume, "monday")
    volume.write_bytes(b"new" * 5000)
    new = read_all(volume)
    rollback(volume, "monday")
    assert read_all(volume) == old
    [kept] = snapshots_left(mount, "vm1")
    assert read_all(kept) == new
    assert fact(kept, "kind") == "snapshot"
    rollback(volume, kept.name)
    assert read_all(volume) == new
    assert len(snapshots_left(mount, "vm1")) == 2
    mount.remount()
    assert read_all(volume) == new


@refused_before_the_store
def test_rollback_of_an_open_volume_is_busy(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    snapshot(volume, "monday")
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"still here", 0)
        with refused(errno.EBUSY):
            rollback(volume, "monday")
    assert mount.logged("vm1 is open")
    assert read_all(volume)[:10] == b"still here"
    assert snapshots_left(mount, "vm1") == []


def test_rollback_wants_a_snapshot_of_this_volume(mount: Instance) -> None:
    volume, other = create(mount.path / "vm1", MIB), create(mount.path / "vm2", MIB)
    snapshot(other, "of-vm2")
    with refused(errno.EINVAL):
        rollback(volume, "of-vm2")
    with refused(errno.EINVAL):
        rollback(volume, "vm2")
    with refused(errno.ENOENT):
        rollback(volume, "missing")
    assert names(mount) == ["of-vm2", "vm1", "vm2"]


def test_facts_are_read_as_attributes(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    monday = snapshot(volume, "monday")
    copy = clone(monday, "copy")
    info = json.loads(fact(volume, "info"))
    assert (info["name"], info["kind"], info["size"], info["uuid"]) == ("vm1", "volume", MIB, fact(volume, "uuid"))
    assert [fact(path, "kind") for path in (volume, monday, copy)] == ["volume", "snapshot", "clone"]
    assert [fact(path, "parent") for path in (volume, monday, copy)] == ["", "vm1", "monday"]
    wait_until(lambda: fact(volume, "state") == "closed", "the volume is closed")
    with opened(volume):
        assert fact(volume, "state") == "open"
        assert json.loads(fact(volume, "lock"))["holds"] == ["io"]
    wait_until(lambda: fact(volume, "state") == "closed", "the volume is closed again")
    closes(volume)


@pytest.mark.directory("what a record holds is the same in every store")
def test_lock_and_unlock_hold_a_volume_that_nobody_has_open(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    snapshot(volume, "monday")
    closes(volume)
    command(volume, "lock")
    command(volume, "lock")
    assert json.loads(fact(volume, "lock"))["holds"] == ["locked"]
    with refused(errno.EBUSY):
        rollback(volume, "monday")
    mount.remount()
    assert json.loads(fact(volume, "lock"))["holds"] == ["locked"]
    command(volume, "unlock")
    assert fact(volume, "lock") == ""
    rollback(volume, "monday")


@refused_before_the_store
def test_an_unknown_command_is_invalid_and_the_log_says_what_there_is(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with refused(errno.EINVAL):
        command(volume, "snapshoot", "monday")
    [line] = [line for line in mount.log_lines() if "snapshoot" in line]
    sentence = json.loads(line)["error"]
    assert "unknown command user.archip.snapshoot" in sentence
    assert "user.archip.snapshot" in sentence.replace("snapshoot", "")
    assert names(mount) == ["vm1"]


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("snapshot", "", errno.EINVAL),
        ("snapshot", "vm1", errno.EEXIST),
        ("snapshot", "monday", errno.EEXIST),
        ("snapshot", "a/b", errno.EINVAL),
        ("snapshot", ".hidden", errno.EINVAL),
        ("clone", "monday", errno.EEXIST),
        ("clone", "x" * 256, errno.EINVAL),
        ("lock", "yes", errno.EINVAL),
        ("unlock", "please", errno.EINVAL),
    ],
)
@refused_before_the_store
def test_a_command_with_a_bad_value_changes_nothing(mount: Instance, name: str, value: str, number: int) -> None:
    volume = create(mount.path / "vm1", MIB)
    snapshot(volume, "monday")
    with refused(number):
        command(volume, name, value)
    assert names(mount) == ["monday", "vm1"]


@pytest.mark.parametrize("name", ["snapshot", "clone"])
def test_a_snapshot_or_clone_of_nothing_is_invalid(mount: Instance, name: str) -> None:
    (mount.path / "empty").touch()
    with refused(errno.EINVAL):
        command(mount.path / "empty", name, "monday")
    assert names(mount) == ["empty"]


def test_commands_are_never_listed_so_that_a_copy_does_not_replay_them(mount: Instance, tmp_path: Path) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(os.urandom(MIB))
    os.setxattr(volume, "user.comment", b"mine")
    snapshot(volume, "monday")
    assert os.listxattr(volume) == ["user.comment"]
    assert run("getfattr", "-d", "-m", "-", "--absolute-names", volume).count("user.") == 1
    run("cp", "-a", volume, mount.path / "vm2")
    assert read_all(mount.path / "vm2") == read_all(volume)
    assert os.getxattr(mount.path / "vm2", "user.comment") == b"mine"
    assert (mount.path / "vm2").stat().st_mtime_ns == volume.stat().st_mtime_ns
    run("cp", "-a", mount.path / "monday", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == read_all(volume)
    assert names(mount) == ["monday", "vm1", "vm2"]


# Attributes


@pytest.mark.directory("what a record holds is the same in every store")
def test_owner_mode_times_and_user_attributes_outlive_a_remount(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.chmod(volume, 0o640)
    os.chown(volume, 1234, 5678)
    os.setxattr(volume, "user.comment", b"\0binary\xff")
    os.setxattr(volume, "user.gone", b"x")
    os.removexattr(volume, "user.gone")
    os.utime(volume, ns=(1_000_000_000_123_456_789, 1_100_000_000_987_654_321))

    def look() -> tuple[object, ...]:
        status = volume.stat()
        attributes = {name: os.getxattr(volume, name) for name in os.listxattr(volume)}
        times = (status.st_atime_ns, status.st_mtime_ns)
        return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, times, attributes, status.st_ino

    before = look()
    assert before[:3] == (0o640, 1234, 5678)
    assert before[3:5] == ((1_000_000_000_123_456_789, 1_100_000_000_987_654_321), {"user.comment": b"\0binary\xff"})
    mount.remount()
    assert look() == before


def test_user_attributes_are_created_and_replaced_as_asked(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.setxattr(volume, "user.a", b"1")
    os.setxattr(volume, "user.a", b"2")
    assert os.getxattr(volume, "user.a") == b"2"
    with refused(errno.ENODATA):
        os.getxattr(volume, "user.b")
    with refused(errno.ENODATA):
        os.removexattr(volume, "user.b")
    with refused(errno.ENOSPC):
        for number in range(3):
            os.setxattr(volume, f"user.large{number}", b"x" * 30000)
    with refused(errno.EOPNOTSUPP):
        os.setxattr(volume, "trusted.a", b"1")
    assert sorted(os.listxattr(volume)) == ["user.a", "user.large0", "user.large1"]


@pytest.mark.directory("what a record holds is the same in every store")
def test_writing_sets_the_time_of_change_which_is_kept(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.utime(volume, (1000, 1000))
    before_ns = time.time_ns()
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"x", 0)
    # Times come from the clock tick of the kernel or from the daemon: they may differ by some milliseconds.
    wait_until(lambda: volume.stat().st_mtime_ns >= before_ns - 20_000_000, "the time of change is that of the write")
    mount.remount()
    assert volume.stat().st_mtime_ns >= before_ns - 20_000_000


def test_others_may_not_read_what_the_mode_forbids(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.chmod(volume, 0o600)
    os.chmod(mount.directory, 0o755)
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "head", "-c1", str(volume)]
    assert subprocess.run(as_nobody, capture_output=True).returncode != 0
    os.chown(volume, 65534, 65534)
    wait_until(lambda: subprocess.run(as_nobody, capture_output=True).returncode == 0, "its owner may read it")


# Space and size


def test_a_sparse_archive_of_a_fresh_clone_has_what_the_clone_shows(mount: Instance, tmp_path: Path) -> None:
    """tar takes a file that has no blocks for one hole, without reading it."""
    volume = create(mount.path / "vm1", 4 * MIB)
    content = os.urandom(MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, content, MIB)
    snapshot(volume, "monday")
    clone(mount.path / "monday", "vm2")
    run("tar", "--sparse", "-C", mount.path, "-cf", tmp_path / "all.tar", "vm1", "vm2", "monday")
    run("tar", "-C", tmp_path, "-xf", tmp_path / "all.tar")
    for name in ("vm1", "vm2", "monday"):
        assert (tmp_path / name).read_bytes() == bytes(MIB) + content + bytes(2 * MIB)


def test_ls_and_du_count_what_was_written(mount: Instance, way: Way) -> None:
    volume = create(mount.path / "vm1", 1 << 30)
    counted = STRIPE_BYTES if way is POOL else MIB
    assert volume.stat().st_blocks * 512 <= SECTOR_BYTES
    with opened(volume) as descriptor:
        os.pwrite(descriptor, os.urandom(MIB), 512 * MIB)
        os.fsync(descriptor)
    wait_until(lambda: volume.stat().st_blocks * 512 == counted, "the blocks are counted")
    [line] = run("ls", "-ls", "--block-size=1K", volume).splitlines()
    assert int(line.split()[0]) == counted >> 10
    assert int(run("du", "-k", volume).split()[0]) == counted >> 10
    assert int(run("du", "-k", "--apparent-size", volume).split()[0]) == 1 << 20


@pytest.mark.directory("statvfs of the directory says what is right")
def test_df_shows_the_room_in_the_store(mount: Instance) -> None:
    ours, below = os.statvfs(mount.path), os.statvfs(mount.store)
    assert ours.f_blocks * ours.f_frsize == pytest.approx(below.f_blocks * below.f_frsize, rel=0.001)
    assert ours.f_bavail * ours.f_frsize == pytest.approx(below.f_bavail * below.f_frsize, rel=0.1)
    assert run("df", "--output=fstype", mount.path).split()[1] == "fuse.archipfs"


def test_truncate_down_and_up_again_shows_zeros(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"x" * MIB, 0)
        os.ftruncate(descriptor, 10_000)
        os.ftruncate(descriptor, MIB)
        assert os.pread(descriptor, MIB, 0) == b"x" * 10_000 + bytes(MIB - 10_000)
    assert read_all(volume) == b"x" * 10_000 + bytes(MIB - 10_000)


def test_truncating_a_clone_down_and_up_again_hides_its_parent(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(b"x" * MIB)
    copy = clone(volume, "copy")
    os.truncate(copy, 10_000)
    os.truncate(copy, MIB)
    expected = b"x" * 10_000 + bytes(MIB - 10_000)
    assert read_all(copy) == expected
    monday = snapshot(copy, "monday")
    mount.remount()
    assert read_all(copy) == expected
    assert read_all(monday) == expected
    assert read_all(volume) == b"x" * MIB


def test_o_trunc_empties_and_the_shell_can_write_again(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(b"long text" * 1000)
    with opened(volume, os.O_WRONLY | os.O_TRUNC):
        assert volume.stat().st_size == 0
    volume.write_bytes(b"short")
    assert read_all(volume) == b"short"


@pytest.mark.directory("an appended piece is written as any other")
def test_dd_appends(mount: Instance, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(150_001))
    volume = mount.path / "vm1"
    for _ in range(3):
        run("dd", f"if={source}", f"of={volume}", "oflag=append", "conv=notrunc", "bs=7000", "status=none")
    assert read_all(volume) == source.read_bytes() * 3
    mount.remount()
    assert read_all(volume) == source.read_bytes() * 3


def test_writing_beyond_the_end_makes_it_larger_with_zeros_between(mount: Instance) -> None:
    volume = create(mount.path / "vm1", 5000)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"end", 100_000)
        assert os.fstat(descriptor).st_size == 100_003
    assert read_all(volume) == bytes(100_000) + b"end"
    mount.remount()
    assert read_all(volume) == bytes(100_000) + b"end"


def test_a_size_beyond_the_store_is_too_large(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with refused(errno.EFBIG):
        os.truncate(volume, 1 << 62)
    assert volume.stat().st_size == MIB


# Names


def test_rm_removes_a_volume_and_leaves_its_snapshots(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(b"kept" * 100)
    content = read_all(volume)
    snapshot(volume, "monday")
    run("rm", volume)
    assert names(mount) == ["monday"]
    assert read_all(mount.path / "monday") == content
    copy = clone(mount.path / "monday", "vm1")
    run("rm", mount.path / "monday")
    assert read_all(copy) == content
    mount.remount()
    assert read_all(copy) == content


def test_mv_renames_and_replaces(mount: Instance) -> None:
    for name in ("vm1", "vm2"):
        (mount.path / name).write_bytes(name.encode())
    run("mv", mount.path / "vm1", mount.path / "vm3")
    assert names(mount) == ["vm2", "vm3"]
    run("mv", "-f", mount.path / "vm3", mount.path / "vm2")
    assert names(mount) == ["vm2"]
    assert read_all(mount.path / "vm2") == b"vm1"
    mount.remount()
    assert names(mount) == ["vm2"]
    assert read_all(mount.path / "vm2") == b"vm1"


def test_mv_onto_itself_and_of_nothing(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.rename(volume, volume)
    with refused(errno.ENOENT):
        os.rename(mount.path / "missing", mount.path / "vm2")
    with refused(errno.EINVAL):
        os.rename(volume, mount.path / ".vm")
    assert names(mount) == ["vm1"]


def test_an_open_volume_is_renamed_and_replaced_while_it_is_used(mount: Instance) -> None:
    first, second = mount.path / "vm1", mount.path / "vm2"
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    with opened(first) as renamed, opened(second) as replaced:
        os.rename(first, second)
        os.pwrite(renamed, b"FIRST", 0)
        os.pwrite(replaced, b"SECOND", 0)
        os.fsync(renamed)
        os.fsync(replaced)
        assert os.pread(replaced, 10, 0) == b"SECOND"
        assert os.fstat(replaced).st_nlink == 0
    assert read_all(second) == b"FIRST"
    mount.remount()
    assert names(mount) == ["vm2"]
    assert read_all(second) == b"FIRST"


@pytest.mark.directory("a pool counts what other tests removed within a minute, too")
def test_an_unlinked_volume_is_usable_until_it_is_closed_and_then_its_space_comes_back(mount: Instance) -> None:
    volume = mount.path / "vm1"
    with opened(volume, os.O_RDWR | os.O_CREAT) as descriptor:
        for offset in range(0, 16 * MIB, MIB):
            os.pwrite(descriptor, os.urandom(MIB), offset)
        os.unlink(volume)
        assert names(mount) == []
        os.pwrite(descriptor, b"after the end", 5)
        os.fsync(descriptor)
        assert os.pread(descriptor, 13, 5) == b"after the end"
        assert os.fstat(descriptor).st_nlink == 0
        os.ftruncate(descriptor, 17 * MIB)
        assert os.fstat(descriptor).st_size == 17 * MIB
        create(volume, 4096)  # the name is free
        assert mount.stored_bytes() >= 16 * MIB
    wait_until(lambda: mount.stored_bytes() < MIB, "the space has come back")
    assert names(mount) == ["vm1"]
    assert read_all(volume) == bytes(4096)


@pytest.mark.directory("a pool keeps what was frozen for a minute more, as other nodes may be reading it")
def test_space_of_a_removed_volume_with_snapshots_comes_back_with_the_last(mount: Instance) -> None:
    volume = create(mount.path / "vm1", 16 * MIB)
    volume.write_bytes(os.urandom(8 * MIB))
    monday = snapshot(volume, "monday")
    copy = clone(monday, "copy")
    os.unlink(volume)
    os.unlink(monday)
    assert mount.stored_bytes() >= 8 * MIB
    os.unlink(copy)
    wait_until(lambda: mount.stored_bytes() < MIB, "the space has come back")


def test_o_excl_refuses_a_name_that_is_taken(mount: Instance) -> None:
    create(mount.path / "vm1", MIB)
    with refused(errno.EEXIST):
        os.open(mount.path / "vm1", os.O_CREAT | os.O_EXCL | os.O_RDWR)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: os.mkdir(path),
        lambda path: os.symlink("vm1", path),
        lambda path: os.link(path.with_name("vm1"), path),
        lambda path: os.mkfifo(path),
    ],
    ids=["mkdir", "symlink", "link", "mkfifo"],
)
@refused_before_the_store
def test_only_volumes_can_be_made(mount: Instance, make: Callable[[Path], None]) -> None:
    create(mount.path / "vm1", MIB)
    with refused(errno.EPERM):
        make(mount.path / "other")
    with refused(errno.ENOTDIR):
        os.rmdir(mount.path / "vm1")
    assert names(mount) == ["vm1"]


def test_names_of_all_kinds_are_kept_as_they_are(mount: Instance) -> None:
    wanted = ["x" * 255, "ü" * 127 + "x", "with space", "new\nline", "%s", "名前", "vm1@monday", "-rf"]
    for name in wanted:
        (mount.path / name).write_bytes(name.encode())
    assert names(mount) == sorted(wanted)
    mount.remount()
    assert names(mount) == sorted(wanted)
    for name in wanted:
        assert read_all(mount.path / name) == name.encode()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (b"x" * 256, errno.ENAMETOOLONG),
        ("ü".encode() * 128, errno.ENAMETOOLONG),
        (b".hidden", errno.EINVAL),
        (b"...", errno.EINVAL),
        (b"\xff\xfe", errno.EINVAL),
    ],
)
@refused_before_the_store
def test_what_cannot_be_a_name_is_refused(mount: Instance, name: bytes, number: int) -> None:
    path = bytes(mount.path) + b"/" + name
    with refused(number):
        os.open(path, os.O_CREAT | os.O_RDWR)
    create(mount.path / "vm1", MIB)
    with refused(number):
        os.rename(mount.path / "vm1", path)
    with refused(errno.ENAMETOOLONG if number == errno.ENAMETOOLONG else errno.ENOENT):
        os.stat(path)
    assert names(mount) == ["vm1"]


# Snapshots do not change


def test_a_snapshot_is_read_only_even_for_root(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(b"frozen")
    monday = snapshot(volume, "monday")
    assert stat.S_IMODE(monday.stat().st_mode) == 0o444
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        with refused(errno.EROFS):
            os.open(monday, flags)
    with refused(errno.EROFS):
        os.truncate(monday, 3)
    with refused(errno.EROFS):
        rollback(monday, "monday")
    assert read_all(monday) == b"frozen"


def test_a_snapshot_is_renamed_and_removed_like_a_volume(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.rename(snapshot(volume, "monday"), mount.path / "tuesday")
    assert names(mount) == ["tuesday", "vm1"]
    with opened(mount.path / "tuesday", os.O_RDONLY) as descriptor:
        os.unlink(mount.path / "tuesday")
        assert os.pread(descriptor, 10, 0) == bytes(10)
    assert names(mount) == ["vm1"]


# The directory


@pytest.mark.directory("it takes a pool 15 s; the conformance suite has it list many records")
def test_many_volumes_are_all_listed(mount: Instance) -> None:
    wanted = [f"volume-{number:03}-{'x' * 100}" for number in range(150)]
    for name in wanted:
        (mount.path / name).touch()
    assert names(mount) == wanted
    assert len(run("ls", "-l", mount.path).splitlines()) == len(wanted) + 1
    for name in wanted:
        os.unlink(mount.path / name)
    assert names(mount) == []


def test_a_file_from_elsewhere_is_moved_in_and_out(mount: Instance, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    shutil.move(tmp_path / "file", mount.path / "vm1")
    assert read_all(mount.path / "vm1") == content
    shutil.move(mount.path / "vm1", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert names(mount) == []
