"""One volume seen in many ways at once: buffered, with O_DIRECT, mapped, as a disk. All of them show the same."""

import mmap
import os
import random
import sqlite3
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.lib.disks import check_file_system, loop_device, make_file_system, mounted
from tests.lib.instance import Instance
from tests.lib.volumes import SECTOR_BYTES, clone, create, fact, opened, read_all, rollback, snapshot
from tests.lib.waiting import threads, wait_until
from tests.lib.ways import FRONT, PLAIN, POOL

pytestmark = [pytest.mark.mount, pytest.mark.ways(FRONT, PLAIN, POOL)]

MIB = 1 << 20
SIZE = 64 * SECTOR_BYTES
STEPS = 150


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


class Views:
    """A volume opened buffered, with O_DIRECT and mapped twice, beside what it should hold."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.content = bytearray(content)
        self.buffered = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.page = mmap.mmap(-1, SIZE)
        self.map()

    def map(self) -> None:
        """Anew, as what lies behind the end of a file must not be touched."""
        size = len(self.content)
        self.mappings = [mmap.mmap(each, size, mmap.MAP_SHARED) for each in (self.buffered, self.direct)]

    def unmap(self) -> None:
        for mapping in self.mappings:
            mapping.close()

    def close(self) -> None:
        self.unmap()
        os.close(self.buffered)
        os.close(self.direct)

    def expect_the_same(self, after: str) -> None:
        size = len(self.content)
        seen = {
            "buffered": os.pread(self.buffered, SIZE, 0),
            "direct": self.page[: os.preadv(self.direct, [self.page], 0)],
            "mapped": self.mappings[0][:size],
            "mapped from a direct open": self.mappings[1][:size],
            "anew": read_all(self.path),
        }
        for way, found in seen.items():
            assert len(found) == size, f"{way} after {after}: {len(found)} bytes instead of {size}"
            if found != self.content:
                at = next(offset for offset in range(size) if found[offset] != self.content[offset])
                raise AssertionError(f"{way} after {after}: differs from byte {at} on")

    # What happens to it

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        self.page[: len(data)] = data
        assert os.pwrite(descriptor, memoryview(self.page)[: len(data)], offset) == len(data)
        self.content[offset : offset + len(data)] = data

    def write_mapped(self, which: int, data: bytes, offset: int) -> None:
        self.mappings[which][offset : offset + len(data)] = data
        # Until then a direct read may see what was there before, on any file system.
        self.mappings[which].flush()
        self.content[offset : offset + len(data)] = data

    def zero(self, how: str, offset: int, length: int) -> None:
        command = ["fallocate", how, "-o", str(offset), "-l", str(length), self.path]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        self.content[offset : offset + length] = bytes(length)

    def truncate(self, size: int) -> None:
        self.unmap()
        os.ftruncate(self.buffered, size)
        self.content = self.content[:size] + bytes(max(0, size - len(self.content)))
        self.map()


@contextmanager
def views_of(path: Path, content: bytes) -> Iterator[Views]:
    views = Views(path, content)
    try:
        yield views
    finally:
        views.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_all_views_agree_after_every_change(mount: Instance, front: bool, seed: int) -> None:
    numbers = random.Random(seed)
    volume = mount.path / "vm1"
    volume.write_bytes(numbers.randbytes(SIZE))
    taken: dict[Path, bytes] = {}
    kinds = ["buffered", "direct", "mapped", "mapped direct", "truncate", "snapshot", "clone"]
    kinds += ["punch", "zero range"] if front else []
    with views_of(volume, read_all(volume)) as views:
        for step in range(STEPS):
            kind = numbers.choice(kinds)
            size = len(views.content)
            offset = numbers.randrange(size // 512) * 512
            length = min(numbers.choice((512, SECTOR_BYTES, 5 * SECTOR_BYTES)), size - offset) // 512 * 512
            data = numbers.randbytes(length)
            match kind:
                case "buffered":
                    views.write(views.buffered, data[:-3], offset + 3)
                case "direct":
                    views.write(views.direct, data, offset)
                case "mapped":
                    views.write_mapped(0, data, offset)
                case "mapped direct":
                    views.write_mapped(1, data, offset)
                case "punch":
                    views.zero("-p", offset, length)
                case "zero range":
                    views.zero("-z", offset, length)
                case "truncate":
                    views.truncate(
                        numbers.choice((SIZE, SIZE // 2, SIZE - 1000, numbers.randrange(2 * SECTOR_BYTES, SIZE)))
                    )
                case "snapshot":
                    taken[snapshot(volume, f"s{step}")] = bytes(views.content)
                case "clone":
                    taken[mount.clone("vm1", f"c{step}")] = bytes(views.content)
            views.expect_the_same(f"step {step}, {kind}")
    for path, content in taken.items():
        assert read_all(path) == content, path.name


def by_attribute(mount: Instance, volume: Path, to: str) -> None:
    rollback(volume, to)


def by_command(mount: Instance, volume: Path, to: str) -> None:
    mount.call("volume-rollback", name=volume.name, snapshot=to)


@pytest.mark.directory("the page cache is the same over every store")
def test_a_rollback_of_what_is_in_use_is_refused_and_changes_no_view(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * SIZE)
    snapshot(volume, "monday")
    with views_of(volume, b"x" * SIZE) as views:
        views.write(views.buffered, b"y" * 5000, 100)
        with pytest.raises(OSError, match="busy"):
            rollback(volume, "monday")
        views.expect_the_same("a rollback that was refused")
        # A mapping alone keeps it open, too.
        with opened(volume) as descriptor:
            mapping = mmap.mmap(descriptor, SIZE, mmap.MAP_SHARED)
    with mapping:
        with pytest.raises(OSError, match="busy"):
            rollback(volume, "monday")
        assert mapping[100:5100] == b"y" * 5000


@pytest.mark.parametrize("roll_back", [by_attribute, by_command])
def test_no_view_shows_what_was_there_before_a_rollback(
    mount: Instance, roll_back: Callable[[Instance, Path, str], None]
) -> None:
    volume = mount.path / "vm1"
    before = os.urandom(SIZE)
    volume.write_bytes(before)
    snapshot(volume, "monday")
    for size in (SIZE, SIZE // 2 + 77, 2 * SIZE):
        os.truncate(volume, size)
        with views_of(volume, read_all(volume)) as views:
            views.write(views.buffered, b"y" * 5000, 100)
            views.write_mapped(0, b"z" * 5000, 9 * SECTOR_BYTES)
            assert read_all(volume) == views.content
        wait_until(lambda: fact(volume, "state") == "closed", "it is closed")
        roll_back(mount, volume, "monday")
        assert volume.stat().st_size == SIZE
        with views_of(volume, before) as views:
            views.expect_the_same("a rollback")


def test_a_volume_that_is_not_open_is_resized_and_rolled_back_by_commands_under_the_page_cache(mount: Instance) -> None:
    """What the kernel caches of a closed volume is dropped when a command changes it."""
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * SIZE)
    assert read_all(volume) == b"x" * SIZE
    for size in (SECTOR_BYTES + 5, SIZE):
        mount.call("volume-resize", name="vm1", size=size)
    assert volume.stat().st_size == SIZE
    assert read_all(volume) == b"x" * (SECTOR_BYTES + 5) + bytes(SIZE - SECTOR_BYTES - 5)


class Counter:
    """A number at the end of each write, which readers must never see fall behind what was acknowledged."""

    def __init__(self, path: Path, length: int, flags: int = 0) -> None:
        self.path = path
        self.length = length
        self.at = length - SECTOR_BYTES
        self.flags = flags
        self.acknowledged = 0

    def write(self, stop: threading.Event) -> None:
        page = mmap.mmap(-1, self.length)
        with opened(self.path, os.O_RDWR | self.flags) as descriptor:
            while not stop.is_set():
                page[self.at : self.at + 8] = struct.pack("<Q", self.acknowledged + 1)
                assert os.pwrite(descriptor, page, 0) == self.length
                self.acknowledged += 1

    def read(self, stop: threading.Event) -> None:
        with opened(self.path, os.O_RDONLY) as descriptor:
            while not stop.is_set():
                self._expect(lambda: os.pread(descriptor, 8, self.at))

    def read_direct(self, stop: threading.Event) -> None:
        page = mmap.mmap(-1, SECTOR_BYTES)
        with opened(self.path, os.O_RDONLY | os.O_DIRECT) as descriptor:
            while not stop.is_set():
                self._expect(lambda: page[: os.preadv(descriptor, [page], self.at)])

    def read_mapped(self, stop: threading.Event) -> None:
        with opened(self.path, os.O_RDONLY) as file, mmap.mmap(file, self.length, prot=mmap.PROT_READ) as mapping:
            while not stop.is_set():
                self._expect(lambda: mapping[self.at : self.at + 8])

    def _expect(self, look: Callable[[], bytes]) -> None:
        least = self.acknowledged
        [number] = struct.unpack_from("<Q", look())
        assert number >= least, f"read {number} after {least} was written"

    def wait_for(self, writes: int) -> None:
        wanted = self.acknowledged + writes
        wait_until(lambda: self.acknowledged >= wanted, f"{writes} more are written")


@pytest.mark.directory("the page cache is the same over every store")
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_readers_never_go_back_behind_a_write_that_returned(mount: Instance, front: bool, flags: int) -> None:
    if not front and not flags:
        pytest.skip("libfuse has the kernel drop pages under a write; see docs/architecture.md, Limits")
    counter = Counter(create(mount.path / "vm1", 4 * SECTOR_BYTES), 4 * SECTOR_BYTES, flags)
    with threads([counter.write, counter.read, counter.read_direct, counter.read_mapped]):
        for number in range(3):
            counter.wait_for(60)
            snapshot(counter.path, f"s{number}")


@pytest.mark.directory("it is about the page cache, and writes 1 GiB")
def test_no_page_is_fetched_behind_the_back_of_a_write_under_way(mount: Instance, front: bool) -> None:
    """If looking at a volume dropped pages whose write is not done yet, a reader would keep the old ones."""
    if not front:
        pytest.skip("libfuse has the kernel drop pages under a write; see docs/architecture.md, Limits")
    counter = Counter(create(mount.path / "vm1", MIB), MIB)

    def look(stop: threading.Event) -> None:
        while not stop.is_set():
            os.stat(counter.path)

    with threads([counter.write, counter.read, look]):
        counter.wait_for(1000)


# As a disk


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_a_disk_on_a_volume_and_the_volume_agree(mount: Instance, tmp_path: Path, direct: bool) -> None:
    volume = create(mount.path / "vm1", 64 * MIB)
    with loop_device(volume, direct=direct) as device:
        make_file_system("ext4", device)
        with mounted(device, tmp_path / "disk") as disk:
            content = os.urandom(5 * MIB)
            (disk / "file").write_bytes(content)
            with mmap.mmap(-1, len(content)) as page, (disk / "file").open("r+b") as stream:
                page[:] = content
                with mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED) as mapping:
                    mapping[MIB : MIB + 5] = b"mapped"[:5]
                    mapping.flush()
        check_file_system("ext4", device)
        found = device.read_bytes()
    assert read_all(volume) == found
    assert read_all(volume, os.O_DIRECT) == found
    # Without the device, the file system is in the volume all the same, and in a clone of it.
    with loop_device(clone(volume, "vm2"), direct=not direct) as device, mounted(device, tmp_path / "disk") as disk:
        assert (disk / "file").read_bytes() == content[:MIB] + b"mappe" + content[MIB + 5 :]


# As a database


def use_database(path: Path, journal: str) -> None:
    with sqlite_at(path) as database:
        database.execute("PRAGMA mmap_size=67108864")
        assert database.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
        database.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, value BLOB)")
        [start] = database.execute("SELECT coalesce(max(id), 0) FROM t").fetchone()
        for first in range(start + 1, start + 400, 40):
            with database:
                rows = [(number, number.to_bytes(4, "big") * 300) for number in range(first, first + 40)]
                database.executemany("INSERT INTO t VALUES (?, ?)", rows)
            with database:
                database.execute("DELETE FROM t WHERE id % 3 = 0")
            with suppress(ZeroDivisionError), database:
                database.execute("DELETE FROM t")
                raise ZeroDivisionError  # rolled back
        expect_database(database, start + 400)


def expect_database(database: sqlite3.Connection, end: int) -> None:
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    rows = database.execute("SELECT id, value FROM t ORDER BY id").fetchall()
    assert rows == [(number, number.to_bytes(4, "big") * 300) for number in range(1, end + 1) if number % 3]


@contextmanager
def sqlite_at(path: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(path)
    try:
        yield database
    finally:
        database.close()


@pytest.mark.directory("a database flushes again and again, which takes a pool seconds")
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_a_database_on_a_disk_on_a_volume_stays_whole(mount: Instance, tmp_path: Path, direct: bool) -> None:
    volume = create(mount.path / "vm1", 64 * MIB)
    with loop_device(volume, direct=direct) as device:
        make_file_system("ext4", device)
        for journal in ("wal", "delete"):
            with mounted(device, tmp_path / "disk") as disk:
                use_database(disk / "db", journal)
        check_file_system("ext4", device)
        with mounted(device, tmp_path / "disk") as disk, sqlite_at(disk / "db") as database:
            expect_database(database, 800)


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
@pytest.mark.directory("a database flushes again and again, which takes a pool 25 s a journal")
def test_a_database_that_is_a_volume_itself_stays_whole(mount: Instance, journal: str) -> None:
    """The write-ahead log is a volume beside it then, and so is its index, which is mapped and shared."""
    path = mount.path / "db"
    use_database(path, journal)
    with sqlite_at(path) as one, sqlite_at(path) as other:
        with one:
            one.execute("UPDATE t SET value = 'new' WHERE id = 1")
        assert other.execute("SELECT value FROM t WHERE id = 1").fetchone() == ("new",)
        with other:
            other.execute("UPDATE t SET value = ? WHERE id = 1", ((1).to_bytes(4, "big") * 300,))
    mount.remount()
    with sqlite_at(path) as database:
        expect_database(database, 400)


def test_what_is_mapped_and_synced_outlives_the_daemon(mount: Instance) -> None:
    """msync(2) is a write and a flush; in pieces, whole, and of pages that were only partly changed."""
    volume = create(mount.path / "vm1", SIZE)
    content = bytearray(SIZE)
    numbers = random.Random(4)
    with opened(volume) as descriptor:
        mapping = mmap.mmap(descriptor, SIZE, mmap.MAP_SHARED)
        for step in range(60):
            offset = numbers.randrange(SIZE)
            data = numbers.randbytes(min(numbers.choice((1, 100, SECTOR_BYTES, 20_000)), SIZE - offset))
            mapping[offset : offset + len(data)] = data
            content[offset : offset + len(data)] = data
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            if step % 2:
                mapping.flush(start, offset + len(data) - start)
            else:
                mapping.flush()
        mount.kill()
        with suppress(BufferError):
            mapping.close()
    mount.mount()
    assert read_all(volume) == content
