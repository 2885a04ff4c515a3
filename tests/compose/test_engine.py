"""The engine's Python face: over files, over objects that are called back, and over objects that fail."""

import gc
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from archipfs.blockers.contract import Blocker, DataObject
from archipfs.blockers.file import FileBlocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.engine import EngineLayer, EngineVolume, format_bitmap
from archipfs.errors import (
    ArchipError,
    Fenced,
    FormatTooNew,
    InvalidInput,
    ObjectDamaged,
    ReadOnlyVolume,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX
from tests.compose.native import NativeBlocker

BOOT = "11111111-2222-3333-4444-555555555555"
SIZE = 1 << 40


class Interrupted(BaseException):
    """As KeyboardInterrupt: no ``Exception``."""


class Faulty(DataObject):
    """Passes everything on, until it is told what to raise in which method."""

    def __init__(self, inner: DataObject) -> None:
        self.inner = inner
        self.closed = 0
        self.faults: dict[str, BaseException] = {}

    def _meet(self, method: str) -> None:
        if method in self.faults:
            raise self.faults[method]

    def pread(self, offset: int, length: int) -> bytes:
        self._meet("pread")
        return self.inner.pread(offset, length)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._meet("pwrite")
        self.inner.pwrite(offset, data)

    def punch(self, offset: int, length: int) -> None:
        self._meet("punch")
        self.inner.punch(offset, length)

    def truncate(self, size: int) -> None:
        self._meet("truncate")
        self.inner.truncate(size)

    def flush(self) -> None:
        self._meet("flush")
        self.inner.flush()

    def size(self) -> int:
        self._meet("size")
        return self.inner.size()

    def allocated(self) -> int:
        return self.inner.allocated()

    def next_data(self, offset: int) -> int | None:
        self._meet("next_data")
        return self.inner.next_data(offset)

    def next_hole(self, offset: int) -> int:
        self._meet("next_hole")
        return self.inner.next_hole(offset)

    def close(self) -> None:
        self.closed += 1
        self.inner.close()


class Rig:
    """A store, and layers in it."""

    def __init__(self, blocker: Blocker, directory: Path) -> None:
        self.blocker = blocker
        self.live = directory / "live"
        self.live.mkdir(parents=True)

    def new(self) -> str:
        layer_id = uuid.uuid4().hex
        self.blocker.create_data(f"data/{layer_id}").close()
        bitmap = self.blocker.create_data(f"bitmap/{layer_id}")
        format_bitmap(bitmap, layer_id)
        bitmap.close()
        return layer_id

    def objects(self, layer_id: str) -> tuple[DataObject, DataObject]:
        return (
            self.blocker.open_data(f"data/{layer_id}", writable=True),
            self.blocker.open_data(f"bitmap/{layer_id}", writable=True),
        )

    def open(self, layer_id: str, *, head: bool = True, visible: int = VOLUME_BYTES_MAX) -> EngineLayer:
        data, bitmap = self.objects(layer_id)
        live = str(self.live / layer_id)
        return EngineLayer(layer_id, data, bitmap, parent_visible=visible, head=head, live_path=live, boot_id=BOOT)

    def volume(self, *layer_ids: str, size: int = SIZE, writable: bool = True) -> EngineVolume:
        layers = [self.open(layer_id, head=writable and index == 0) for index, layer_id in enumerate(layer_ids)]
        try:
            return EngineVolume(layers, size, writable=writable)
        finally:
            for layer in layers:
                layer.close()


@pytest.fixture(params=["file", "native", "memory"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    blocker: Blocker
    if request.param == "memory":
        blocker = MemoryBlocker()
    else:
        FileBlocker.create(tmp_path / "store")
        driver = FileBlocker if request.param == "file" else NativeBlocker
        blocker = driver(tmp_path / "store")
    yield Rig(blocker, tmp_path)
    blocker.close()


@pytest.fixture
def memory(tmp_path: Path) -> Rig:
    return Rig(MemoryBlocker(), tmp_path)


def test_reads_what_was_written(rig: Rig) -> None:
    volume = rig.volume(rig.new())
    assert volume.write(5000, b"hello") == 5
    assert volume.read(4998, 9) == b"\0\0hello\0\0"
    target = bytearray(b"x" * 9)
    assert volume.read_into(4998, target) == 9
    assert target == b"\0\0hello\0\0"
    assert volume.read_nowait(4998, 9) in (None, b"\0\0hello\0\0")
    assert volume.read(SIZE - 3, 100) == b"\0\0\0"
    assert volume.read(SIZE + 3, 100) == b""
    assert volume.read_nowait(SIZE, 5) == b""
    volume.close(clean=False)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_writes_any_bytes(rig: Rig, make: Callable[[bytes], bytes]) -> None:
    volume = rig.volume(rig.new())
    assert volume.write(SECTOR_BYTES, make(b"abc" * 5000)) == 15000
    assert volume.read(SECTOR_BYTES, 15000) == b"abc" * 5000
    assert volume.write(0, b"") == 0
    volume.close(clean=False)


def test_a_volume_waits_if_its_head_does(tmp_path: Path) -> None:
    FileBlocker.create(tmp_path / "store")
    near, far = (
        Rig(FileBlocker(tmp_path / "store"), tmp_path / "near"),
        Rig(NativeBlocker(tmp_path / "store"), tmp_path),
    )
    volume = near.volume(near.new())
    assert not volume.waits
    volume.swap_head(far.open(far.new()))
    assert volume.waits
    volume.swap_head(near.open(near.new()))
    assert not volume.waits
    volume.close(clean=False)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_native_objects_are_closed_once(tmp_path: Path) -> None:
    FileBlocker.create(tmp_path / "store")
    rig = Rig(NativeBlocker(tmp_path / "store"), tmp_path)
    layer_id = rig.new()
    before = open_descriptors()
    volume = rig.volume(layer_id)
    volume.write(0, b"x")
    assert open_descriptors() > before
    volume.close(clean=False)
    assert open_descriptors() == before


def test_a_guard_without_paths_is_believed(memory: Rig) -> None:
    volume = memory.volume(memory.new(), size=5)
    volume.write(0, b"12345")
    assert not volume.sync()
    volume.guard(None, 5)
    assert volume.sync()
    volume.write(5, b"6")
    assert not volume.sync()
    volume.close(clean=False)


def test_read_into_wants_something_to_write_to(memory: Rig) -> None:
    volume = memory.volume(memory.new())
    with pytest.raises((TypeError, BufferError, ValueError)):
        volume.read_into(0, memoryview(b"fixed"))
    volume.close(clean=False)


def test_discard_zeros_and_seek(rig: Rig) -> None:
    volume = rig.volume(rig.new())
    volume.write(SECTOR_BYTES, b"a" * 4 * SECTOR_BYTES)
    assert volume.seek_data(0) == SECTOR_BYTES
    assert volume.seek_hole(SECTOR_BYTES) == 5 * SECTOR_BYTES
    volume.discard(2 * SECTOR_BYTES, SECTOR_BYTES)
    volume.write_zeros(3 * SECTOR_BYTES + 10, 20)
    assert volume.read(2 * SECTOR_BYTES, SECTOR_BYTES) == bytes(SECTOR_BYTES)
    assert volume.read(3 * SECTOR_BYTES + 9, 22) == b"a" + bytes(20) + b"a"
    assert volume.seek_hole(SECTOR_BYTES) == 2 * SECTOR_BYTES
    volume.discard(0, SIZE)
    assert volume.seek_data(0) is None
    assert volume.seek_hole(5) == 5
    assert volume.seek_hole(SIZE) is None
    volume.close(clean=False)


def test_a_new_head_leaves_the_old_as_it_was(rig: Rig) -> None:
    first, second = rig.new(), rig.new()
    volume = rig.volume(first)
    volume.write(0, b"old" * 3000)
    head = rig.open(second)
    assert volume.swap_head(head) == SIZE
    volume.write(3, b"new")
    volume.discard(SECTOR_BYTES, SECTOR_BYTES)
    assert volume.read(0, 9) == b"oldnewold"
    volume.flush()
    assert head.count_sectors() == 2
    assert not head.dirty
    head.close()
    volume.close(clean=True)
    assert list(rig.live.iterdir()) == []

    snapshot = rig.volume(first, writable=False)
    assert snapshot.read(0, 9000) == b"old" * 3000
    with pytest.raises(ReadOnlyVolume):
        snapshot.write(0, b"x")
    with pytest.raises(ReadOnlyVolume):
        snapshot.discard(0, 1)
    snapshot.close(clean=False)
    volume = rig.volume(second, first)
    assert volume.read(0, 9) == b"oldnewold"
    volume.close(clean=False)


def test_a_killed_process_loses_nothing(rig: Rig) -> None:
    first = rig.new()
    volume = rig.volume(first, size=10)
    volume.write(0, b"a" * 10000)
    assert volume.size == 10000
    volume.close(clean=False)
    layer = rig.open(first)
    assert layer.recovered
    assert layer.dirty
    assert layer.live_size == 10000
    volume = EngineVolume([layer], layer.live_size, writable=True)
    layer.close()
    assert volume.read(0, 10001) == b"a" * 10000
    volume.close(clean=False)


def test_resize(rig: Rig) -> None:
    volume = rig.volume(rig.new())
    volume.write(0, b"a" * 10000)
    volume.pause()
    volume.announce_size(5000)
    volume.resize(5000)
    volume.resize(20000)
    volume.resume()
    assert volume.size == 20000
    assert volume.read(0, 20000) == b"a" * 5000 + bytes(15000)
    volume.close(clean=False)


def test_statistics(rig: Rig) -> None:
    volume = rig.volume(rig.new())
    volume.write(1, b"abc")
    volume.read(0, 100)
    volume.discard(0, SECTOR_BYTES)
    volume.flush()
    found = volume.statistics()
    assert (found.writes, found.written_bytes, found.fills) == (1, 3, 1)
    assert (found.reads, found.read_bytes) == (1, 100)
    assert (found.discards, found.discarded_bytes, found.flushes) == (1, SECTOR_BYTES, 1)
    assert (found.layers, found.failed) == (1, 0)
    volume.close(clean=True)


@pytest.mark.parametrize("number", [-1, -(1 << 70)])
def test_negative_numbers(memory: Rig, number: int) -> None:
    volume = memory.volume(memory.new())
    for use in (
        lambda: volume.read(number, 1),
        lambda: volume.read(0, number),
        lambda: volume.write(number, b"x"),
        lambda: volume.discard(0, number),
        lambda: volume.seek_data(number),
        lambda: volume.resize(number),
    ):
        with pytest.raises(InvalidInput):
            use()
    volume.close(clean=False)


@pytest.mark.parametrize("offset", [VOLUME_BYTES_MAX, (1 << 63) - 1, 1 << 64, 1 << 80])
def test_too_large(memory: Rig, offset: int) -> None:
    volume = memory.volume(memory.new())
    with pytest.raises(TooLarge):
        volume.write(offset, b"x")
    assert volume.size == SIZE
    volume.close(clean=False)


def test_bad_layers(memory: Rig) -> None:
    with pytest.raises(InvalidInput):
        EngineVolume([], SIZE, writable=True)
    first = memory.new()
    data, bitmap = (Faulty(found) for found in memory.objects(first))
    with pytest.raises(InvalidInput):
        EngineLayer("xyz", data, bitmap, parent_visible=0, head=True, live_path=None, boot_id=BOOT)
    assert data.closed == bitmap.closed == 1
    memory.open(first).close()
    memory.blocker.open_data(f"bitmap/{first}", writable=True).pwrite(9, b"\x09")
    with pytest.raises(ObjectDamaged):
        memory.open(first)


def test_a_later_format(memory: Rig) -> None:
    first = memory.new()
    bitmap = memory.blocker.open_data(f"bitmap/{first}", writable=True)
    header = bytearray(bitmap.pread(0, 64))
    header[8] = 2
    header[12:16] = bytes(4)
    header[12:16] = crc32c(header).to_bytes(4, "little")
    bitmap.pwrite(0, header)
    with pytest.raises(FormatTooNew):
        memory.open(first)


def crc32c(data: bytes | bytearray) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def faulty_volume(rig: Rig) -> tuple[EngineVolume, Faulty, Faulty]:
    first = rig.new()
    data, bitmap = (Faulty(found) for found in rig.objects(first))
    live = str(rig.live / first)
    layer = EngineLayer(first, data, bitmap, parent_visible=0, head=True, live_path=live, boot_id=BOOT)
    volume = EngineVolume([layer], SIZE, writable=True)
    layer.close()
    return volume, data, bitmap


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (StoreFull("no space"), StoreFull),
        (StoreUnavailable("gone"), StoreError),
        (TooLarge("too large"), TooLarge),
        (OSError(28, "no space"), StoreFull),
        (ZeroDivisionError("a bug"), StoreError),
    ],
)
def test_errors_of_objects_come_back_with_their_cause(
    memory: Rig, raised: Exception, expected: type[ArchipError]
) -> None:
    volume, data, _ = faulty_volume(memory)
    data.faults["pwrite"] = raised
    with pytest.raises(expected) as found:
        volume.write(0, b"x")
    assert found.value.__cause__ is raised
    data.faults.clear()
    assert volume.write(0, b"x") == 1
    data.faults["pread"] = raised
    with pytest.raises(expected):
        volume.read(0, 1)
    data.faults["next_data"] = raised
    with pytest.raises(expected):
        volume.seek_data(0)
    volume.close(clean=False)
    assert data.closed == 1


@pytest.mark.parametrize("method", ["pwrite", "flush"])
def test_what_is_no_exception_goes_through(memory: Rig, method: str) -> None:
    volume, data, _ = faulty_volume(memory)
    if method == "flush":
        volume.write(0, b"x")
    data.faults[method] = Interrupted()
    with pytest.raises(Interrupted):
        volume.flush() if method == "flush" else volume.write(0, b"x")
    volume.close(clean=False)


def test_a_failed_flush_ends_the_writing(memory: Rig) -> None:
    volume, data, _ = faulty_volume(memory)
    volume.write(0, b"x")
    data.faults["flush"] = StoreUnavailable("gone")
    with pytest.raises(StoreError):
        volume.flush()
    data.faults.clear()
    with pytest.raises(StoreError):
        volume.write(0, b"y")
    with pytest.raises(StoreError):
        volume.flush()
    assert volume.read(0, 1) == b"x"
    volume.close(clean=False)


def test_a_full_store_at_the_bitmap_can_be_mended(memory: Rig) -> None:
    volume, _, bitmap = faulty_volume(memory)
    volume.write(0, b"x")
    bitmap.faults["pwrite"] = StoreFull("no space")
    with pytest.raises(StoreFull):
        volume.flush()
    bitmap.faults.clear()
    volume.flush()
    volume.close(clean=True)


def test_an_object_that_gives_too_little(memory: Rig) -> None:
    volume, data, _ = faulty_volume(memory)
    volume.write(0, b"x" * 100)
    data.pread = lambda offset, length: b"short"  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        volume.read(0, 100)
    volume.close(clean=False)


def test_fence(rig: Rig) -> None:
    first = rig.new()
    volume = rig.volume(first)
    volume.write(0, b"x")
    volume.fence()
    for use in (lambda: volume.write(0, b"y"), lambda: volume.discard(0, 1), volume.flush):
        with pytest.raises(Fenced):
            use()
    assert volume.read(0, 1) == b"x"
    volume.close(clean=False)
    layer = rig.open(first)
    assert not layer.recovered
    layer.close()


def test_closed_handles(rig: Rig) -> None:
    first = rig.new()
    layer = rig.open(first)
    volume = EngineVolume([layer], SIZE, writable=True)
    layer.close()
    layer.close()
    with pytest.raises(ArchipError, match="closed"):
        layer.count_sectors()
    with pytest.raises(ArchipError, match="closed"):
        EngineVolume([layer], SIZE, writable=True)
    volume.close(clean=False)
    volume.close(clean=True)
    assert volume.size == SIZE
    for use in (
        lambda: volume.read(0, 1),
        lambda: volume.write(0, b"x"),
        volume.flush,
        volume.pause,
        volume.statistics,
    ):
        with pytest.raises(ArchipError, match="closed"):
            use()


def test_close_waits_for_those_inside_and_lets_them_out(memory: Rig) -> None:
    volume = memory.volume(memory.new())
    volume.write(0, b"x")
    volume.pause()
    results: list[bytes] = []
    reader = threading.Thread(target=lambda: results.append(volume.read(0, 1)))
    reader.start()
    while not volume._handle._users:
        os.sched_yield()
    volume.close(clean=False)
    reader.join()
    assert results == [b"x"]


def test_forgotten_handles_are_given_back(memory: Rig) -> None:
    volume, data, bitmap = faulty_volume(memory)
    volume.write(0, b"x")
    del volume
    gc.collect()
    assert data.closed == bitmap.closed == 1


def test_many_threads(rig: Rig) -> None:
    volume = rig.volume(rig.new())
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for round_number in range(60):
                offset = number * 1000 + round_number * 3 * SECTOR_BYTES
                payload = bytes([number + 1]) * 900
                volume.write(offset, payload)
                assert volume.read(offset, 900) == payload
                if round_number % 20 == number:
                    volume.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        head = rig.open(rig.new())
        volume.swap_head(head)
        head.close()
    for thread in threads:
        thread.join()
    assert failures == []
    for number in range(4):
        for round_number in range(60):
            assert volume.read(number * 1000 + round_number * 3 * SECTOR_BYTES, 900) == bytes([number + 1]) * 900
    volume.flush()
    volume.close(clean=True)
    assert list(rig.live.iterdir()) == []
