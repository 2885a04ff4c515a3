"""copy_file_range(2) between volumes: clones in an instant, and whatever else it is asked for, byte for byte."""

import errno
import fcntl
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from archipfs.endpoints.fuse.ioctls import SNAPSHOT, encode_name
from tests.conftest import MakeInstance
from tests.lib.instance import Instance
from tests.lib.volumes import SECTOR_BYTES, closes, create, fact, opened, read_all, snapshot
from tests.lib.waiting import Task, threads, wait_until
from tests.lib.ways import also_on_a_pool

pytestmark = pytest.mark.mount

MIB, GIB = 1 << 20, 1 << 30
PIECE_BYTES = 0xFFFF_F000
"""The most that the kernel asks for at once where the answer has 32 bits (before Linux 6.18)."""
KILLS = 4
"""Fewer than make a supervisor give up."""
BOOKKEEPING_BYTES = MIB
"""What copies that share everything may take for layers, bitmaps and records."""


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        yield
    assert caught.value.errno == number, f"{caught.value}, not {errno.errorcode[number]}"


def copy_range(source: int, target: int, length: int, source_offset: int = 0, target_offset: int = 0) -> int:
    """As cp(1) does: asks until it is done or the source ends. Returns how many bytes were copied."""
    done = 0
    while done < length:
        count = os.copy_file_range(source, target, length - done, source_offset + done, target_offset + done)
        if count == 0:
            break
        done += count
    return done


def copy_whole(source: Path, target: Path) -> Path:
    with opened(source, os.O_RDONLY) as one, opened(target, os.O_RDWR | os.O_CREAT) as other:
        size = os.fstat(one).st_size
        assert copy_range(one, other, size) == size
        assert os.fstat(other).st_size == size
    return target


def cp(*arguments: str | Path) -> None:
    subprocess.run(["cp", *arguments], check=True, capture_output=True, timeout=60)


# Clones


@also_on_a_pool
def test_cp_of_a_full_volume_is_a_clone(mount: Instance) -> None:
    volume = mount.path / "vm1"
    content = bytearray(os.urandom(16 * MIB))
    volume.write_bytes(content)
    before = mount.stored_bytes()
    for name in ("vm2", "vm3"):
        cp("--sparse=never", volume, mount.path / name)
    assert mount.stored_bytes() - before < BOOKKEEPING_BYTES
    assert fact(mount.path / "vm2", "kind") == "clone"
    assert fact(mount.path / "vm2", "parent") == "vm1"
    with opened(volume) as one, opened(mount.path / "vm2") as other:
        os.pwrite(one, b"only here", 5000)
        os.pwrite(other, b"only there", MIB)
    assert read_all(mount.path / "vm3") == content
    assert read_all(mount.path / "vm2") == content[:MIB] + b"only there" + content[MIB + 10 :]
    assert read_all(volume) == content[:5000] + b"only here" + content[5009:]


@also_on_a_pool
def test_a_copy_of_a_snapshot_is_a_clone(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * MIB)
    monday = snapshot(volume, "monday")
    volume.write_bytes(b"y" * MIB)
    before = mount.stored_bytes()
    copy = copy_whole(monday, mount.path / "vm2")
    assert mount.stored_bytes() - before < BOOKKEEPING_BYTES
    assert (fact(copy, "parent"), read_all(copy)) == ("monday", b"x" * MIB)


def test_the_target_stays_the_file_it_was(mount: Instance) -> None:
    source, target = mount.path / "vm1", mount.path / "vm2"
    source.write_bytes(b"x" * MIB)
    target.touch()
    target.chmod(0o640)
    os.chown(target, 1234, 5678)
    os.setxattr(target, "user.note", b"kept")
    before = target.stat()
    copy_whole(source, target)
    after = target.stat()
    kept = ("st_ino", "st_mode", "st_uid", "st_gid")
    assert [getattr(after, each) for each in kept] == [getattr(before, each) for each in kept]
    assert os.getxattr(target, "user.note") == b"kept"
    assert after.st_mtime_ns > before.st_mtime_ns


@also_on_a_pool
def test_a_large_sparse_volume_is_copied_in_pieces_that_share_everything(mount: Instance) -> None:
    size = 9 * GIB + 12345
    source = create(mount.path / "vm1", size)
    marks = {0: b"first", PIECE_BYTES - 3: b"across", 5 * GIB: b"in the middle", size - 4: b"last"}
    with opened(source) as one, opened(mount.path / "vm2", os.O_RDWR | os.O_CREAT) as other:
        for offset, mark in marks.items():
            os.pwrite(one, mark, offset)
        before = mount.stored_bytes()
        for offset in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - offset)
            assert os.copy_file_range(one, other, length, offset, offset) == length
            assert os.fstat(other).st_size == offset + length
        assert mount.stored_bytes() - before < BOOKKEEPING_BYTES
    mount.remount()
    with opened(mount.path / "vm2", os.O_RDONLY) as other:
        for offset, mark in marks.items():
            assert os.pread(other, len(mark), offset) == mark
        assert os.pread(other, SECTOR_BYTES, 3 * GIB) == bytes(SECTOR_BYTES)
        assert os.fstat(other).st_size == size


@pytest.mark.parametrize("seed", range(4))
def test_each_piece_holds_what_the_source_held_when_it_was_copied(mount: Instance, seed: int) -> None:
    """Whatever happens between the pieces: writes to either side, snapshots, a target that is cut and grows again."""
    dice = random.Random(seed)
    size, piece = 4 * MIB, MIB // 2
    model = bytearray(dice.randbytes(size))
    copied = bytearray()
    source, target = mount.path / "vm1", mount.path / "vm2"
    source.write_bytes(model)
    with opened(source) as one, opened(target, os.O_RDWR | os.O_CREAT) as other:

        def write(descriptor: int, held: bytearray, end: int) -> None:
            data = dice.randbytes(dice.choice([5, 700, 4096, 9000]))
            offset = dice.randrange(end)
            os.pwrite(descriptor, data, offset)
            held[len(held) :] = bytes(max(0, offset - len(held)))
            held[offset : offset + len(data)] = data

        while len(copied) < len(model):
            at = len(copied)
            count = os.copy_file_range(one, other, piece, at, at)
            copied += model[at : at + count]
            assert os.fstat(other).st_size == len(copied)
            match dice.randrange(6):
                case 0:
                    write(one, model, size)
                case 1:
                    write(other, copied, len(copied))
                case 2:
                    fcntl.ioctl(dice.choice([one, other]), SNAPSHOT, encode_name(f"s{at}"))
                case 3:
                    cut = dice.randrange(max(1, len(copied) - piece), len(copied) + 1)
                    os.ftruncate(other, cut)
                    os.ftruncate(other, len(copied))
                    copied[cut:] = bytes(len(copied) - cut)
            assert os.pread(other, len(copied), 0) == copied
    assert (read_all(source), read_all(target)) == (model, copied)
    mount.remount()
    assert (read_all(source), read_all(target)) == (model, copied)


def copy_data(source: int, target: int) -> None:
    """As cp(1) of newer coreutils does it: only where there is data, then the size."""
    size, offset = os.fstat(source).st_size, 0
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = min(size, os.lseek(source, offset, os.SEEK_HOLE))
        assert copy_range(source, target, end - offset, offset, offset) == end - offset
        offset = end
    os.ftruncate(target, size)


@pytest.mark.parametrize("frozen", [False, True], ids=["volume", "snapshot"])
@pytest.mark.parametrize("first", [0, 3 * MIB])
def test_holes_that_are_left_out_are_no_end_to_sharing(mount: Instance, first: int, frozen: bool) -> None:
    source = create(mount.path / "vm1", 64 * MIB)
    content = bytearray(64 * MIB)
    with opened(source) as descriptor:
        for offset in range(first, 64 * MIB, 7 * MIB):
            data = os.urandom(MIB)
            content[offset : offset + MIB] = data
            os.pwrite(descriptor, data, offset)
    source = snapshot(source, "monday") if frozen else source
    before = mount.stored_bytes()
    with opened(source, os.O_RDONLY) as one, opened(mount.path / "vm2", os.O_RDWR | os.O_CREAT) as other:
        copy_data(one, other)
    assert mount.stored_bytes() - before < BOOKKEEPING_BYTES
    assert fact(mount.path / "vm2", "parent") == source.name
    assert read_all(mount.path / "vm2") == content
    mount.remount()
    assert read_all(mount.path / "vm2") == content


@pytest.mark.parametrize("begun", [0, MIB // 2])
@pytest.mark.parametrize("hidden", [False, True], ids=["data", "discarded data"])
def test_data_that_is_left_out_stays_out(mount: Instance, begun: int, hidden: bool) -> None:
    """Also where the source shows a hole by now, over a layer that the copy would share and that has data there."""
    source = mount.path / "vm1"
    source.write_bytes(b"x" * 2 * MIB)
    with opened(source) as one, opened(mount.path / "vm2", os.O_RDWR | os.O_CREAT) as other:
        assert os.copy_file_range(one, other, begun, 0, 0) == begun
        if hidden:
            fcntl.ioctl(one, SNAPSHOT, encode_name("monday"))
            subprocess.run(
                ["fallocate", "-p", "-o", str(begun), "-l", str(MIB - begun), source], check=True, timeout=60
            )
        assert copy_range(one, other, MIB, MIB, MIB) == MIB
        wanted = b"x" * begun + bytes(MIB - begun) + b"x" * MIB
        assert os.pread(other, 2 * MIB, 0) == wanted
    mount.remount()
    assert read_all(mount.path / "vm2") == wanted


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_out_stays_out_unless_it_was_a_hole(mount: Instance, seed: int) -> None:
    """Ranges further and further on, with gaps that hold data, holes, or what was written a moment ago."""
    dice = random.Random(seed)
    size = 2 * MIB
    model, copied = bytearray(size), bytearray()
    source, target = create(mount.path / "vm1", size), mount.path / "vm2"
    with opened(source) as one, opened(target, os.O_RDWR | os.O_CREAT) as other:

        def change(descriptor: int, held: bytearray) -> None:
            offset, length = dice.randrange(size) // 512 * 512, dice.choice([512, SECTOR_BYTES, 40000, 300000])
            length = min(length, len(held) - offset)
            if length <= 0:
                return
            if dice.randrange(2):
                data = dice.randbytes(length)
                os.pwrite(descriptor, data, offset)
            else:
                data = bytes(length)
                punch = ["fallocate", "-p", "-o", str(offset), "-l", str(length), f"/proc/self/fd/{descriptor}"]
                subprocess.run(punch, check=True, pass_fds=[descriptor], timeout=60)
            held[offset : offset + length] = data

        for _ in range(dice.randrange(12)):
            change(one, model)
        while len(copied) < size - 50000:
            start = min(size, len(copied) + dice.choice([0, 0, 4096, 20000, 60000, 300000]))
            count = os.copy_file_range(one, other, dice.choice([4096, 50000, 400000]), start, start)
            if count:
                copied[len(copied) :] = bytes(start - len(copied)) + model[start : start + count]
            assert os.pread(other, size, 0) == copied
            for _ in range(dice.randrange(3)):
                change(one, model)
            match dice.randrange(8):
                case 0:
                    change(other, copied)
                case 1:
                    fcntl.ioctl(dice.choice([one, other]), SNAPSHOT, encode_name(f"s{start}"))
        # Nor does anything come to light later.
        os.ftruncate(other, size)
        copied[len(copied) :] = bytes(size - len(copied))
        assert os.pread(other, size, 0) == copied
        assert os.pread(one, size, 0) == model
    mount.remount()
    assert (read_all(source), read_all(target)) == (model, copied)


# Ranges


@pytest.mark.parametrize("seed", range(2))
def test_ranges_at_any_offsets_within_a_volume_and_between_two(mount: Instance, seed: int) -> None:
    dice = random.Random(seed)
    size = 2 * MIB
    paths = [create(mount.path / name, size) for name in ("vm1", "vm2")]
    models = [bytearray(size), bytearray(size)]
    grains = [1, 511, SECTOR_BYTES, 64 * 1024]
    for step in range(40):
        if step == 20:
            mount.kill()
            mount.remount()
        with opened(paths[0]) as one, opened(paths[1]) as other:
            descriptors = [one, other]
            for _ in range(2):
                which, offset = dice.randrange(2), dice.randrange(size - MIB // 8)
                data = dice.randbytes(dice.randrange(1, MIB // 8))
                os.pwrite(descriptors[which], data, offset)
                models[which][offset : offset + len(data)] = data
            source, target = dice.randrange(2), dice.randrange(2)
            grain = dice.choice(grains)
            length = min(dice.randrange(1, MIB) // grain * grain or grain, size)
            start, end = (dice.randrange(0, len(models[each]), grain) for each in (source, target))
            length = min(length, len(models[source]) - start)
            if source == target and abs(start - end) < length:
                with refused(errno.EINVAL):
                    os.copy_file_range(one if source == 0 else other, one if source == 0 else other, length, start, end)
                continue
            assert copy_range(descriptors[source], descriptors[target], length, start, end) == length
            models[target][end : end + length] = models[source][start : start + length]
            assert os.fstat(descriptors[target]).st_size == len(models[target])
            if dice.randrange(8) == 0:
                fcntl.ioctl(descriptors[dice.randrange(2)], SNAPSHOT, encode_name(f"s{step}"))
            for descriptor, model in zip(descriptors, models, strict=True):
                assert os.pread(descriptor, len(model), 0) == model
    mount.remount()
    assert [read_all(path) for path in paths] == models


def test_holes_stay_holes(mount: Instance) -> None:
    source, target = create(mount.path / "vm1", GIB), create(mount.path / "vm2", GIB)
    with opened(source) as one, opened(target) as other:
        os.pwrite(one, b"x" * MIB, 512 * MIB)
        assert copy_range(one, other, GIB - MIB, 0, MIB) == GIB - MIB
        assert os.lseek(other, 0, os.SEEK_DATA) == 513 * MIB
        assert os.lseek(other, 513 * MIB, os.SEEK_HOLE) == 514 * MIB
        assert os.fstat(other).st_blocks * 512 <= MIB


def test_a_copy_ends_where_the_source_ends(mount: Instance) -> None:
    source, target = mount.path / "vm1", mount.path / "vm2"
    source.write_bytes(b"x" * 10000)
    target.write_bytes(b"y" * 20000)
    with opened(source) as one, opened(target) as other:
        assert copy_range(one, other, MIB, 9000, 1000) == 1000
        assert os.copy_file_range(one, other, MIB, 10000, 0) == 0
        assert os.copy_file_range(one, other, MIB, 30000, 0) == 0
    assert read_all(target) == b"y" * 1000 + b"x" * 1000 + b"y" * 18000


def test_what_cannot_be_copied_to(mount: Instance) -> None:
    source = mount.path / "vm1"
    source.write_bytes(b"x" * 10000)
    with opened(source, os.O_RDONLY) as one, opened(create(mount.path / "vm2", MIB)) as other:
        with refused(errno.EBADF):
            os.copy_file_range(other, one, 4096, 0, 0)
        with refused(errno.EFBIG):
            os.copy_file_range(one, other, 4096, 0, (1 << 62) + 5)
        with refused(errno.EINVAL):
            os.copy_file_range(other, other, 8192, 0, 4096)
    assert (mount.path / "vm2").stat().st_size == MIB


def test_files_outside_are_copied_as_ever(mount: Instance, tmp_path: Path) -> None:
    outside, volume = tmp_path / "outside", mount.path / "vm1"
    content = os.urandom(3 * MIB + 5)
    outside.write_bytes(content)
    cp("--sparse=never", outside, volume)
    cp("--sparse=never", volume, tmp_path / "back")
    assert read_all(volume) == (tmp_path / "back").read_bytes() == content


def test_a_copy_under_another_name_takes_the_place_of_the_old(mount: Instance) -> None:
    """As tools do that never leave half a file under its name."""
    volume, old = mount.path / "vm1", mount.path / "backup"
    volume.write_bytes(b"new" * 10000)
    old.write_bytes(b"old" * 20000)
    with opened(old, os.O_RDONLY) as descriptor:
        copy_whole(volume, mount.path / "backup.part").rename(old)
        assert os.pread(descriptor, 3, 0) == b"old"
    assert read_all(old) == b"new" * 10000
    assert sorted(os.listdir(mount.path)) == ["backup", "vm1"]


# Caches, and what goes on beside


def test_who_has_the_target_cached_or_mapped_sees_the_copy(mount: Instance) -> None:
    source, target = mount.path / "vm1", mount.path / "vm2"
    source.write_bytes(b"x" * MIB)
    target.write_bytes(b"y" * MIB)
    with (
        opened(source) as one,
        opened(target) as other,
        opened(target, os.O_RDONLY) as reader,
        mmap.mmap(reader, MIB, prot=mmap.PROT_READ) as mapped,
    ):
        assert os.pread(reader, MIB, 0) == mapped[:] == b"y" * MIB
        assert copy_range(one, other, 5000, 100, 6000) == 5000
        wanted = b"y" * 6000 + b"x" * 5000 + b"y" * (MIB - 11000)
        assert os.pread(reader, MIB, 0) == wanted
        assert mapped[:] == wanted


def test_who_has_an_empty_target_open_sees_it_become_a_clone(mount: Instance) -> None:
    source, target = mount.path / "vm1", mount.path / "vm2"
    source.write_bytes(b"x" * MIB)
    target.touch()
    with opened(target) as writer, opened(target, os.O_RDONLY) as reader:
        assert os.pread(reader, 10, 0) == b""
        copy_whole(source, target)
        assert os.fstat(reader).st_size == MIB
        assert os.pread(reader, MIB, 0) == b"x" * MIB
        os.pwrite(writer, b"own", 5)
        assert os.pread(reader, 10, 0) == b"xxxxxownxx"
    assert read_all(source) == b"x" * MIB


def test_what_was_written_to_a_mapped_source_is_copied(mount: Instance) -> None:
    source = mount.path / "vm1"
    source.write_bytes(b"x" * MIB)
    with opened(source) as one, opened(mount.path / "vm2", os.O_RDWR | os.O_CREAT) as other:
        with mmap.mmap(one, MIB) as mapped:
            mapped[5000:5003] = b"new"
            assert copy_range(one, other, MIB) == MIB
        assert os.pread(other, 5, 4999) == b"xnewx"


def test_copies_against_each_other_and_snapshots_beside_them_all_end(mount: Instance) -> None:
    paths = [mount.path / "vm1", mount.path / "vm2"]
    for path in paths:
        path.write_bytes(os.urandom(4 * MIB))

    def copies(source: Path, target: Path) -> Task:
        def task(stop: threading.Event) -> None:
            with opened(source, os.O_RDONLY) as one, opened(target) as other:
                while not stop.is_set():
                    assert copy_range(one, other, MIB, 2 * MIB, MIB // 2 + 7) == MIB

        return task

    made = []
    with threads([copies(paths[0], paths[1]), copies(paths[1], paths[0])]):
        for number in range(8):
            for path in paths:
                with opened(path) as descriptor:
                    fcntl.ioctl(descriptor, SNAPSHOT, encode_name(f"{path.name}-{number}"))
            made.append(copy_whole(paths[number % 2], mount.path / f"copy{number}"))
    for path in made:
        assert len(read_all(path)) == 4 * MIB


COPY_FOR_EVER = """
import os, sys
source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDWR)
print("begun", flush=True)
while True:
    os.copy_file_range(source, target, 64 << 20, 0, 4096)
"""


@also_on_a_pool
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_copy_that_is_interrupted_leaves_old_and_new_sectors_only(mount: Instance, number: signal.Signals) -> None:
    source, target = mount.path / "vm1", mount.path / "vm2"
    source.write_bytes(b"n" * 32 * MIB)
    target.write_bytes(b"o" * 33 * MIB)
    command = [sys.executable, "-c", COPY_FOR_EVER, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        process.wait(timeout=60)
    found = read_all(target)
    assert found[:SECTOR_BYTES] == b"o" * SECTOR_BYTES
    sectors = {found[at : at + SECTOR_BYTES] for at in range(0, len(found), SECTOR_BYTES)}
    assert sectors <= {b"o" * SECTOR_BYTES, b"n" * SECTOR_BYTES}
    assert read_all(source) == b"n" * 32 * MIB
    with opened(source) as one, opened(target) as other:
        assert copy_range(one, other, 32 * MIB) == 32 * MIB
    assert read_all(target) == b"n" * 32 * MIB + found[32 * MIB :]


def test_cp_that_is_interrupted_leaves_a_volume_like_any_other(mount: Instance, tmp_path: Path) -> None:
    outside, volume = tmp_path / "outside", mount.path / "vm1"
    with open(outside, "wb") as stream:
        stream.truncate(8 * GIB)
    with subprocess.Popen(["cp", "--sparse=never", outside, volume]) as process:
        wait_until(lambda: volume.exists() and volume.stat().st_size > 0, "cp has begun")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT
    assert 0 < volume.stat().st_size < 8 * GIB
    volume.write_bytes(b"in use")
    assert read_all(volume) == b"in use"


@also_on_a_pool
def test_what_was_copied_survives_a_kill_of_the_daemon(mount: Instance) -> None:
    volume = mount.path / "vm1"
    content = os.urandom(2 * MIB)
    volume.write_bytes(content)
    clone = copy_whole(volume, mount.path / "vm2")
    with opened(volume) as one, opened(create(mount.path / "vm3", 4 * MIB)) as other:
        assert copy_range(one, other, 2 * MIB, 0, 999) == 2 * MIB
    mount.kill()
    mount.remount()
    assert read_all(clone) == content
    assert read_all(mount.path / "vm3")[999 : 999 + 2 * MIB] == content


def test_a_copy_into_a_volume_that_another_node_has_waits_as_a_write_does(make_instance: MakeInstance) -> None:
    first = make_instance().mount()
    second = make_instance(**first.place).mount()
    (first.path / "vm1").write_bytes(b"x" * MIB)
    closes(first.path / "vm1")
    held = create(first.path / "vm2", MIB)
    target = second.path / "vm2"
    wait_until(target.exists, "the other node sees the volume")
    copied = threading.Event()

    def copy(stop: threading.Event) -> None:
        with opened(second.path / "vm1", os.O_RDONLY) as one, opened(target) as other:
            assert copy_range(one, other, MIB) == MIB
        copied.set()

    descriptor = os.open(held, os.O_RDWR)
    with threads([copy]):
        try:
            assert not copied.wait(0.5)
        finally:
            os.close(descriptor)
        wait_until(copied.is_set, "the lock is free and the copy done")
    assert read_all(target) == b"x" * MIB


def test_who_copies_does_not_notice_that_daemons_are_killed(make_instance: MakeInstance) -> None:
    instance = make_instance(supervised=True).mount()
    content = os.urandom(MIB)
    volume = instance.path / "vm1"
    volume.write_bytes(content)
    copies: list[Path] = []

    def copying(stop: threading.Event) -> None:
        with opened(volume) as one:
            while not stop.is_set():
                path = copy_whole(volume, instance.path / f"c{len(copies)}")
                with opened(path) as other:
                    assert copy_range(one, other, MIB // 2, 7, MIB) == MIB // 2
                copies.append(path)

    with threads([copying]):
        for _ in range(KILLS):
            before = len(copies)
            wait_until(lambda before=before: len(copies) >= before + 5, "some copies more are made")
            instance.kill_daemon()
    for path in copies:
        assert read_all(path) == content + content[7 : 7 + MIB // 2]
