"""What only the native front can do, what it must not change, and how it ends."""

import errno
import mmap
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.lib.instance import Instance, mount_type, process_lives
from tests.lib.stream import Stream, streams_of
from tests.lib.usage import given_back
from tests.lib.volumes import SECTOR_BYTES, clone, closes, create, fact, opened, read_all, snapshot
from tests.lib.waiting import WAIT_SECONDS, Task, threads, wait_until
from tests.lib.ways import POOL, Way, also_on_a_pool

pytestmark = pytest.mark.mount

MIB = 1 << 20
CONNECTIONS = Path("/sys/fs/fuse/connections")


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


def fallocate(path: Path, *arguments: str | int) -> None:
    subprocess.run(["fallocate", *map(str, arguments), path], check=True, capture_output=True, timeout=60)


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        yield
    assert caught.value.errno == number, f"{caught.value}, not {errno.errorcode[number]}"


# Giving space back, and looking for holes


@also_on_a_pool
def test_a_punched_hole_reads_as_zeros_and_gives_its_space_back(mount: Instance, way: Way) -> None:
    volume = mount.path / "vm1"
    content = bytearray(os.urandom(12 * MIB))
    volume.write_bytes(content)
    fallocate(volume, "-p", "-o", MIB - 100, "-l", 8 * MIB + 300)
    content[MIB - 100 : 9 * MIB + 200] = bytes(8 * MIB + 300)
    assert read_all(volume) == content
    if way is not POOL:  # which counts every stripe that was ever written
        wait_until(lambda: volume.stat().st_blocks * 512 <= 4 * MIB + 64 * 1024, "the space is back")
    mount.remount()
    assert read_all(volume) == content


@also_on_a_pool
def test_a_hole_in_a_clone_hides_the_parent(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * MIB)
    copy = clone(volume, "vm2")
    fallocate(copy, "-p", "-o", 4096, "-l", 8192)
    fallocate(copy, "-z", "-o", 20000, "-l", 10000)
    wanted = bytearray(b"x" * MIB)
    wanted[4096:12288] = bytes(8192)
    wanted[20000:30000] = bytes(10000)
    assert read_all(copy) == wanted
    assert read_all(volume) == b"x" * MIB


@pytest.mark.parametrize("zeros", [[], ["-z"]], ids=["allocate", "zero range"])
def test_allocating_beyond_the_end_makes_it_larger_unless_told_not_to(mount: Instance, zeros: list[str]) -> None:
    volume = create(mount.path / "vm1", MIB)
    fallocate(volume, *zeros, "-n", "-o", 0, "-l", 3 * MIB)
    assert volume.stat().st_size == MIB
    fallocate(volume, *zeros, "-o", MIB, "-l", MIB)
    assert volume.stat().st_size == 2 * MIB
    assert volume.stat().st_blocks * 512 < 64 * 1024  # thinly
    mount.remount()
    assert volume.stat().st_size == 2 * MIB
    assert read_all(volume) == bytes(2 * MIB)


@also_on_a_pool
def test_allocating_keeps_what_is_there(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * 10000)
    fallocate(volume, "-o", 0, "-l", 20000)
    assert read_all(volume) == b"x" * 10000 + bytes(10000)


def test_what_cannot_be_allocated(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume) as descriptor, refused(errno.EFBIG):
        os.posix_fallocate(descriptor, 0, 1 << 62)
    assert volume.stat().st_size == MIB
    for mode in ("-c", "-i"):  # collapse, insert
        done = subprocess.run(["fallocate", mode, "-o", "4096", "-l", "4096", volume], capture_output=True, text=True)
        assert "not supported" in done.stderr
    with opened(snapshot(volume, "monday"), os.O_RDONLY) as descriptor, refused(errno.EBADF):
        os.posix_fallocate(descriptor, 0, MIB)


@also_on_a_pool
def test_holes_and_data_are_found(mount: Instance) -> None:
    volume = create(mount.path / "vm1", 10 * MIB + 5)
    with opened(volume) as descriptor:
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 0
        with refused(errno.ENXIO):
            os.lseek(descriptor, 0, os.SEEK_DATA)
        os.pwrite(descriptor, b"x" * 8192, 2 * MIB)
        os.pwrite(descriptor, b"x", 10 * MIB + 4)
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == 2 * MIB
        assert os.lseek(descriptor, 2 * MIB + 5000, os.SEEK_DATA) == 2 * MIB + 5000
        assert os.lseek(descriptor, 2 * MIB, os.SEEK_HOLE) == 2 * MIB + 8192
        assert os.lseek(descriptor, 3 * MIB, os.SEEK_DATA) == 10 * MIB
        assert os.lseek(descriptor, 10 * MIB, os.SEEK_HOLE) == 10 * MIB + 5
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with refused(errno.ENXIO):
                os.lseek(descriptor, 10 * MIB + 5, whence)
        assert os.lseek(descriptor, 0, os.SEEK_END) == 10 * MIB + 5
    monday = snapshot(volume, "monday")
    with opened(monday, os.O_RDONLY) as descriptor:
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == 2 * MIB


def test_without_the_front_there_is_neither(make_instance: MakeInstance) -> None:
    instance = make_instance(front=False).mount()
    assert instance.json("status")[0]["front"] == "off"
    volume = create(instance.path / "vm1", MIB)
    with opened(volume) as descriptor:
        assert os.lseek(descriptor, 5, os.SEEK_DATA) == 5
    done = subprocess.run(["fallocate", "-p", "-o", "0", "-l", "4096", volume], capture_output=True, text=True)
    assert "unsupported" in done.stderr


def test_a_volume_of_another_node_cannot_be_punched_until_it_is_ours(make_instance: MakeInstance) -> None:
    first = make_instance()
    second = make_instance(**first.place)
    first.mount()
    second.mount()
    assert first.json("status")[0]["front"] == "on"
    (first.path / "vm1").write_bytes(b"x" * 8192)
    closes(first.path / "vm1")
    with opened(first.path / "vm1"), opened(second.path / "vm1") as foreign, refused(errno.EOPNOTSUPP):
        os.lseek(foreign, 0, os.SEEK_DATA)
    closes(second.path / "vm1")
    fallocate(second.path / "vm1", "-p", "-o", 0, "-l", 4096)
    assert read_all(second.path / "vm1") == bytes(4096) + b"x" * 4096


# Ways to read and write


def test_synchronous_direct_writers_beside_each_other(mount: Instance) -> None:
    volume = create(mount.path / "vm1", 4 * MIB)
    streams = streams_of(4 * MIB, 8, 40, (SECTOR_BYTES,))

    def writer(stream: Stream) -> Task:
        def task(stop: threading.Event) -> None:
            with opened(volume, os.O_RDWR | os.O_DIRECT) as descriptor:
                for _ in range(300):
                    stream.write(descriptor)

        return task

    with threads([writer(stream) for stream in streams]):
        pass
    content = read_all(volume)
    for stream in streams:
        assert stream.expect_prefix(content, 300, 300) == 300


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_shared_mapping_reads_and_writes_the_volume(mount: Instance, flags: int) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume, os.O_RDWR | flags) as descriptor:
        with mmap.mmap(descriptor, MIB, mmap.MAP_SHARED) as mapping:
            mapping[5000:5006] = b"mapped"
            mapping.flush()
            assert read_all(volume)[5000:5006] == b"mapped"
            mapping[MIB - 1 :] = b"!"
        os.fsync(descriptor)
    mount.remount()
    content = read_all(volume)
    assert (content[5000:5006], content[-1:]) == (b"mapped", b"!")


def test_direct_and_buffered_opens_see_each_other(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    page = mmap.mmap(-1, SECTOR_BYTES)
    with opened(volume) as buffered, opened(volume, os.O_RDWR | os.O_DIRECT) as direct:
        for number in range(1, 20):
            assert os.pread(buffered, MIB, 0)[:1] == bytes([number - 1])
            page[:] = bytes([number]) * SECTOR_BYTES
            os.pwrite(direct, page, 0)
            assert os.pread(buffered, 1, 0) == bytes([number])
            os.pwrite(buffered, bytes([number + 100]), SECTOR_BYTES)
            os.preadv(direct, [page], SECTOR_BYTES)
            assert page[:1] == bytes([number + 100])


def test_both_ways_do_the_same(make_instance: MakeInstance) -> None:
    """The same random operations on two mounts, one with the front and one without, and on a byte array."""
    paths = [create(make_instance(front=front).mount().path / "vm1", 0) for front in (True, False)]
    content = bytearray()
    numbers = random.Random(1)
    buffer = mmap.mmap(-1, 16 * SECTOR_BYTES)
    descriptors = [os.open(path, os.O_RDWR) for path in paths]
    direct = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in paths]
    try:
        for step in range(600):
            offset, length = numbers.randrange(MIB), numbers.randrange(1, 16 * SECTOR_BYTES)
            data = numbers.randbytes(length)
            operation = numbers.choice(
                ["write", "direct write", "read", "direct read", "truncate", "fsync", "snapshot"]
            )
            if operation == "truncate":
                for path in paths:
                    os.truncate(path, offset)
                content[offset:] = bytes(max(0, offset - len(content)))
            elif operation in ("write", "direct write"):
                if operation == "direct write":
                    offset, length = offset // 512 * 512, -(-length // 512) * 512
                    data = (data + bytes(512))[:length]
                buffer[:length] = data
                for descriptor in direct if operation == "direct write" else descriptors:
                    assert os.pwrite(descriptor, memoryview(buffer)[:length], offset) == length
                content.extend(bytes(max(0, offset + length - len(content))))
                content[offset : offset + length] = data
            elif operation in ("read", "direct read"):
                if operation == "direct read":
                    offset, length = offset // 512 * 512, -(-length // 512) * 512
                for descriptor in direct if operation == "direct read" else descriptors:
                    count = os.preadv(descriptor, [memoryview(buffer)[:length]], offset)
                    assert buffer[:count] == content[offset : offset + length]
            elif operation == "fsync":
                for descriptor in descriptors:
                    os.fsync(descriptor)
            elif content and step % 10 == 0:
                for path in paths:
                    snapshot(path, f"s{step}")
            assert [os.fstat(descriptor).st_size for descriptor in descriptors] == [len(content)] * 2
    finally:
        for descriptor in descriptors + direct:
            os.close(descriptor)
    for path in paths:
        assert read_all(path) == content
    for snapshots in zip(*(sorted(path.parent.iterdir()) for path in paths), strict=True):
        assert len({read_all(path) for path in snapshots}) == 1


# How it ends


def workers(path: Path, streams: list[Stream]) -> list[Task]:
    """Writers and readers at work until they get an error; those that wait for a sync, too."""

    def writer(stream: Stream, flags: int) -> Task:
        def task(stop: threading.Event) -> None:
            with suppress(OSError), opened(path, os.O_RDWR | flags) as descriptor:
                while not stop.is_set():
                    stream.write(descriptor)
                    if stream.issued % 20 == 0:
                        stream.flush(descriptor)

        return task

    def reader(stop: threading.Event) -> None:
        numbers = random.Random(3)
        page = mmap.mmap(-1, SECTOR_BYTES)
        with suppress(OSError), opened(path, os.O_RDONLY | os.O_DIRECT) as descriptor:
            while not stop.is_set():
                os.preadv(descriptor, [page], numbers.randrange(0, 4 * MIB, SECTOR_BYTES))
                os.stat(path)

    flags = (0, os.O_DIRECT)
    return [writer(stream, flags[stream.ident % 2]) for stream in streams] + [reader] * 4


def abort(instance: Instance) -> None:
    number = os.minor(instance.path.stat().st_dev)
    mounts = mount_type(CONNECTIONS) is None
    if mounts:
        subprocess.run(["mount", "-t", "fusectl", "none", CONNECTIONS], check=True, capture_output=True)
    try:
        (CONNECTIONS / str(number) / "abort").write_text("1")
    finally:
        if mounts:
            subprocess.run(["umount", CONNECTIONS], check=True)


def terminate(instance: Instance) -> None:
    pid = instance.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGTERM)


def detach(instance: Instance) -> None:
    subprocess.run(["umount", "-l", instance.path], check=True, timeout=60)


@pytest.mark.parametrize("end", [terminate, abort, detach])
def test_it_ends_under_load_without_hanging_and_keeps_what_it_acknowledged(
    make_instance: MakeInstance, end: Callable[[Instance], None]
) -> None:
    instance = make_instance().mount()
    volume = create(instance.path / "vm1", 4 * MIB)
    streams = streams_of(4 * MIB, 6, 40, (SECTOR_BYTES, 512))
    pid = instance.daemon_pid()
    assert pid is not None
    with threads(workers(volume, streams)):
        wait_until(lambda: min(stream.acknowledged for stream in streams) > 50, "all are at work")
        end(instance)
        if end is not detach:
            # A mount that is only detached ends when its last file is closed.
            wait_until(lambda: not process_lives(pid), "the daemon has ended")
    wait_until(lambda: not process_lives(pid), "the daemon has ended")
    assert mount_type(instance.path) is None
    instance.mount()
    content = read_all(volume)
    for stream in streams:
        stream.expect_prefix(content, stream.acknowledged, stream.issued)


def test_what_killed_and_interrupted_programs_held_is_given_back(mount: Instance) -> None:
    """fio and qemu die in the middle of what they do: asynchronous, mapped, synchronous, flushing, punching."""
    volume = create(mount.path / "vm1", 64 * MIB)
    fio = ["fio", "--name=job", f"--filename={volume}", "--size=64M", "--rw=randrw", "--bs=16k", "--thread"]
    fio += ["--time_based", "--runtime=60", "--fdatasync=8", "--output=/dev/null"]
    programs: list[list[str | Path]] = [
        [*fio, "--ioengine=libaio", "--direct=1", "--iodepth=64"],
        [*fio, "--ioengine=io_uring", "--direct=1", "--iodepth=64"],
        [*fio, "--ioengine=mmap"],
        [*fio, "--ioengine=psync", "--numjobs=4"],
        ["qemu-img", "bench", "-f", "raw", "-w", "-t", "none", "-i", "native", "-c", "9999999", "-d", "64", volume],
    ]

    def kill_all(number: signal.Signals) -> None:
        for program in programs:
            running = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                before = volume.stat().st_mtime_ns
                wait_until(lambda before=before: volume.stat().st_mtime_ns > before, "it writes")  # type: ignore[misc]
                assert running.poll() is None, f"{program} ended by itself"
            finally:
                running.send_signal(number)
                running.wait(WAIT_SECONDS)

    kill_all(signal.SIGKILL)
    wait_until(lambda: fact(volume, "state") == "closed", "all that they had open is closed")
    with given_back(mount):
        for number in (signal.SIGKILL, signal.SIGINT):
            kill_all(number)
        wait_until(lambda: fact(volume, "state") == "closed", "all that they had open is closed")
    volume.write_bytes(b"works")
    assert read_all(volume) == b"works"


def test_threads_and_descriptors_do_not_grow(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    pid = mount.daemon_pid()

    def use() -> None:
        for number in range(20):
            with opened(volume, os.O_RDWR | (os.O_DIRECT if number % 2 else 0)) as descriptor:
                os.pwrite(descriptor, mmap.mmap(-1, SECTOR_BYTES), 0)
            with suppress(OSError):
                os.open(mount.path / "missing", os.O_RDONLY | os.O_DIRECT)

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    use()
    wait_until(lambda: fact(volume, "state") == "closed", "it is closed")
    before = descriptors()
    use()
    wait_until(lambda: fact(volume, "state") == "closed" and descriptors() <= before, "nothing is left open")
