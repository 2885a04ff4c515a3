"""Sealed layers through the engine's Python face: packs with and without a descriptor, resolvers that fail, rebase."""

import errno
import gc
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from archipfs.blockers.file import FileBlocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.engine import (
    PACK_DAMAGED,
    EngineLayer,
    EnginePack,
    EngineVolume,
    ExtentTable,
    Region,
    format_bitmap,
)
from archipfs.compose.engine.extents import EXTENT
from archipfs.errors import InvalidInput, ObjectDamaged, ObjectMissing, StoreError
from archipfs.types import REGION_BYTES, REGION_SECTORS, SECTOR_BYTES
from tests.compose.test_engine import Faulty

REGIONS_MAX = 1 << 32
"""As many as a map has room for, which is more than a volume can have."""
SIZE = 4 * REGION_BYTES
LAYER = "c" * 32


def sector(number: int) -> bytes:
    return number.to_bytes(8, "little") * (SECTOR_BYTES // 8)


class Interrupted(BaseException):
    """As KeyboardInterrupt: no ``Exception``."""


def watched(data: bytes) -> Faulty:
    """A pack's object that fails as it is told to."""
    made = MemoryBlocker().create_data("pack/watched")
    made.pwrite(0, data)
    return Faulty(made)


class Sealed:
    """Packs, and a resolver that knows which regions lie in them. All other regions are empty."""

    def __init__(self, blocker: MemoryBlocker | FileBlocker) -> None:
        self.blocker = blocker
        self.table = ExtentTable(1 << 20)
        self.regions: dict[int, Region] = {}
        self.asked: list[int] = []
        self.fault: BaseException | None = None

    def pack(self, *sectors: int, size: int | None = None) -> EnginePack:
        data = b"".join(sector(number) for number in sectors)
        made = self.blocker.create_data(f"pack/{uuid.uuid4().hex}")
        made.pwrite(0, data)
        return EnginePack("a pack", made, len(data) if size is None else size)

    def put(self, region: int, extents: list[tuple[int, int, int, int]] | bytes, packs: list[EnginePack]) -> None:
        self.regions[region] = Region(region, region + 1, extents, packs)

    def resolve(self, region: int) -> Region:
        self.asked.append(region)
        if self.fault is not None:
            raise self.fault
        if region in self.regions:
            return self.regions[region]
        first = max((known + 1 for known in self.regions if known < region), default=0)
        end = min((known for known in self.regions if known > region), default=REGIONS_MAX)
        return Region(first, end, [], [])

    def layer(self) -> EngineLayer:
        return EngineLayer.sealed(LAYER, self.table, self.resolve)

    def volume(self, *above: EngineLayer, writable: bool = False) -> EngineVolume:
        layer = self.layer()
        volume = EngineVolume([*above, layer], SIZE, writable=writable)
        layer.close()
        return volume

    def written(self, **sectors: bytes) -> EngineLayer:
        """A frozen layer in the same store with that in it."""
        layer = self.head()
        volume = EngineVolume([layer], SIZE, writable=True)
        for name, data in sectors.items():
            volume.write(int(name.removeprefix("at")) * SECTOR_BYTES, data)
        volume.flush()
        volume.close(clean=True)
        layer.close()
        return self.open(layer.layer_id, head=False)

    def head(self) -> EngineLayer:
        layer_id = uuid.uuid4().hex
        self.blocker.create_data(f"data/{layer_id}").close()
        bitmap = self.blocker.create_data(f"bitmap/{layer_id}")
        format_bitmap(bitmap, layer_id)
        bitmap.close()
        return self.open(layer_id, head=True)

    def open(self, layer_id: str, *, head: bool) -> EngineLayer:
        return EngineLayer(
            layer_id,
            self.blocker.open_data(f"data/{layer_id}", writable=True),
            self.blocker.open_data(f"bitmap/{layer_id}", writable=True),
            parent_visible=SIZE,
            head=head,
            live_path=self.live_path if head else None,
            boot_id="0" * 32,
        )

    live_path: str


@pytest.fixture(params=["file", "memory"])
def sealed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sealed]:
    blocker: MemoryBlocker | FileBlocker
    if request.param == "file":
        FileBlocker.create(tmp_path / "store")
        blocker = FileBlocker(tmp_path / "store")
    else:
        blocker = MemoryBlocker()
    world = Sealed(blocker)
    world.live_path = str(tmp_path / "live")
    yield world
    world.table.close()
    blocker.close()


def test_reads_extents_from_packs_and_zeros_between_them(sealed: Sealed) -> None:
    sealed.put(1, [(2, 3, 0, SECTOR_BYTES), (10, 1, 1, 0)], [sealed.pack(1, 2, 3, 4), sealed.pack(5)])
    volume = sealed.volume()
    expected = b"\0" * 2 * SECTOR_BYTES + sector(2) + sector(3) + sector(4) + b"\0" * 5 * SECTOR_BYTES + sector(5)
    assert volume.read(REGION_BYTES, 11 * SECTOR_BYTES) == expected
    assert volume.read(REGION_BYTES + 3 * SECTOR_BYTES + 100, 50) == sector(3)[100:150]
    assert volume.read(0, REGION_BYTES) == bytes(REGION_BYTES)
    assert sealed.asked == [1, 0]
    assert volume.seek_data(0) == REGION_BYTES + 2 * SECTOR_BYTES
    assert volume.seek_hole(REGION_BYTES + 2 * SECTOR_BYTES) == REGION_BYTES + 5 * SECTOR_BYTES
    assert volume.seek_data(REGION_BYTES + 11 * SECTOR_BYTES) is None
    volume.close(clean=True)


def test_extents_may_come_packed(sealed: Sealed) -> None:
    sealed.put(0, EXTENT.pack(0, 1, 0, SECTOR_BYTES) + EXTENT.pack(1, 1, 0, 0), [sealed.pack(1, 2)])
    volume = sealed.volume()
    assert volume.read(0, 2 * SECTOR_BYTES) == sector(2) + sector(1)
    volume.close(clean=True)


def test_packs_are_closed_with_the_last_region_that_names_them(sealed: Sealed) -> None:
    data = watched(sector(7))
    pack = EnginePack("a pack", data, SECTOR_BYTES)
    sealed.put(0, [(0, 1, 0, 0)], [pack])
    volume = sealed.volume()
    assert volume.read(0, SECTOR_BYTES) == sector(7)
    pack.close()
    pack.close()
    assert volume.read(0, SECTOR_BYTES) == sector(7)
    assert data.closed == 0
    sealed.table.forget()
    assert data.closed == 1
    volume.close(clean=True)


def test_a_pack_that_is_gone_is_looked_for_once_more(sealed: Sealed) -> None:
    data = watched(sector(7))
    moved = EnginePack("a pack", data, SECTOR_BYTES)
    sealed.put(0, [(0, 1, 0, 0)], [moved])
    volume = sealed.volume()
    assert volume.read(0, 8) == sector(7)[:8]
    gone = ObjectMissing("pack a: not in the store; run archip check")
    data.faults["pread"] = gone
    sealed.put(0, [(0, 1, 0, 0)], [EnginePack("another", watched(sector(7)), SECTOR_BYTES)])
    assert volume.read(0, 8) == sector(7)[:8]
    assert sealed.asked == [0, 0]
    sealed.table.forget()
    sealed.put(0, [(0, 1, 0, 0)], [moved])
    with pytest.raises(StoreError) as caught:
        volume.read(0, 8)
    assert caught.value.__cause__ is gone
    del data.faults["pread"]
    assert volume.read(0, 8) == sector(7)[:8]
    volume.close(clean=True)


def test_table_counts_and_stays_within_its_bound(sealed: Sealed) -> None:
    table = ExtentTable(1000)
    pack = sealed.pack(*range(REGION_SECTORS))
    for region in range(4):
        sealed.put(region, [(2 * n, 1, 0, 0) for n in range(20)], [pack])
    layer = EngineLayer.sealed(LAYER, table, sealed.resolve)
    volume = EngineVolume([layer], SIZE, writable=False)
    for _round in range(3):
        for region in range(4):
            assert volume.read(region * REGION_BYTES, SECTOR_BYTES) == sector(0)
            assert volume.read(region * REGION_BYTES, SECTOR_BYTES) == sector(0)
    counts = table.statistics()
    assert 0 < counts.bytes <= 1000
    assert counts.regions > 0
    assert (counts.hits, counts.misses) == (12, 12)
    assert counts.evictions == 12 - counts.regions
    table.forget()
    assert (table.statistics().bytes, table.statistics().regions) == (0, 0)
    volume.close(clean=True)
    layer.close()
    table.close()


def test_what_a_resolver_raises_reaches_the_reader(sealed: Sealed) -> None:
    volume = sealed.volume()
    sealed.fault = ObjectDamaged("region 0: its page is damaged; run archip check")
    with pytest.raises(StoreError) as caught:
        volume.read(0, 10)
    assert caught.value.__cause__ is sealed.fault
    sealed.fault = OSError(errno.ENOMEM, "no memory")
    with pytest.raises(StoreError, match="ENOMEM"):
        volume.seek_data(0)
    sealed.fault = Interrupted()
    with pytest.raises(Interrupted):
        volume.read(0, 10)
    sealed.fault = None
    assert volume.read(0, 10) == bytes(10)
    volume.close(clean=True)


@pytest.mark.parametrize(
    "extents",
    [[(0, 0, 0, 0)], [(0, 2, 0, 0), (1, 1, 0, 0)], [(0, 1, 1, 0)], [(1024, 1, 0, 0)], [(0, 70000, 0, 0)], b"short"],
    ids=["empty", "overlapping", "pack", "beyond", "number", "bytes"],
)
def test_a_region_that_cannot_be_is_refused(sealed: Sealed, extents: list[tuple[int, int, int, int]] | bytes) -> None:
    sealed.put(0, extents, [sealed.pack(1)])
    volume = sealed.volume()
    with pytest.raises(InvalidInput) as caught:
        volume.read(0, 10)
    assert isinstance(caught.value.__cause__, InvalidInput)
    assert volume.read(REGION_BYTES, 10) == bytes(10)
    volume.close(clean=True)


def test_damage_is_an_error_there_and_nowhere_else(sealed: Sealed) -> None:
    truncated = sealed.pack(1, 2, size=4 * SECTOR_BYTES)
    sealed.put(0, [(0, 1, PACK_DAMAGED, 0), (1, 4, 0, 0)], [truncated])
    volume = sealed.volume()
    for bad in (0, 3, 4):
        with pytest.raises(StoreError):
            volume.read(bad * SECTOR_BYTES, 1)
    assert volume.read_nowait(3 * SECTOR_BYTES, 1) is None
    assert volume.read(SECTOR_BYTES, 2 * SECTOR_BYTES) == sector(1) + sector(2)
    volume.close(clean=True)


def test_one_resolve_serves_all_who_wait_for_it(sealed: Sealed) -> None:
    sealed.put(0, [(0, 1, 0, 0)], [sealed.pack(9)])
    begun, go_on = threading.Event(), threading.Event()

    def slow(region: int) -> Region:
        begun.set()
        assert go_on.wait(60)
        return sealed.resolve(region)

    layer = EngineLayer.sealed(LAYER, sealed.table, slow)
    volume = EngineVolume([layer], SIZE, writable=False)
    layer.close()
    read: list[bytes] = []
    threads = [threading.Thread(target=lambda: read.append(volume.read(0, SECTOR_BYTES))) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert volume.read_nowait(0, 10) is None
    while sealed.table.statistics().misses < len(threads):
        threading.Event().wait(0.001)
    go_on.set()
    for thread in threads:
        thread.join()
    assert read == [sector(9)] * len(threads)
    assert sealed.asked == [0]
    volume.close(clean=True)


def test_writes_on_top_are_completed_from_packs(sealed: Sealed) -> None:
    sealed.put(0, [(0, 2, 0, 0)], [sealed.pack(1, 2)])
    volume = sealed.volume(sealed.head(), writable=True)
    volume.write(100, b"x" * 50)
    expected = sector(1)[:100] + b"x" * 50 + sector(1)[150:] + sector(2)
    assert volume.read(0, 2 * SECTOR_BYTES) == expected
    assert volume.statistics().fills == 1
    assert volume.shows_until(LAYER, SECTOR_BYTES, SIZE) == SIZE
    assert volume.next_change(LAYER, 0, SIZE) == (0, SECTOR_BYTES)
    assert volume.next_change(LAYER, SECTOR_BYTES, SIZE) is None
    assert volume.next_change(None, 0, SIZE) == (0, 2 * SECTOR_BYTES)
    with pytest.raises(ObjectMissing):
        volume.next_change("d" * 32, 0, SIZE)
    with pytest.raises(InvalidInput):
        volume.next_change(LAYER, 1, SIZE)
    volume.close(clean=False)


def test_copies_from_packs(sealed: Sealed) -> None:
    sealed.put(0, [(1, 2, 0, SECTOR_BYTES)], [sealed.pack(1, 2, 3)])
    source = sealed.volume()
    target = EngineVolume([sealed.head()], 0, writable=True)
    assert target.copy_from(source, 0, 0, REGION_BYTES) == REGION_BYTES
    assert target.read(0, 4 * SECTOR_BYTES) == bytes(SECTOR_BYTES) + sector(2) + sector(3) + bytes(SECTOR_BYTES)
    assert target.seek_data(0) == SECTOR_BYTES
    target.close(clean=False)
    source.close(clean=True)


def test_rebase_puts_the_sealed_layer_in_place(sealed: Sealed) -> None:
    below = sealed.written(at0=sector(1) + sector(2), at1024=sector(3))
    middle = sealed.written(at1=sector(4))
    head = sealed.head()
    volume = EngineVolume([head, middle, below], SIZE, writable=True)
    volume.write(1025 * SECTOR_BYTES, sector(5))
    before = volume.read(0, SIZE)

    sealed.put(0, [(0, 2, 0, 0)], [sealed.pack(1, 4)])
    sealed.put(1, [(0, 1, 0, 0)], [sealed.pack(3)])
    layer = EngineLayer.sealed(middle.layer_id, sealed.table, sealed.resolve)
    with pytest.raises(ObjectMissing):
        volume.rebase("e" * 32, layer)
    with pytest.raises(StoreError):
        volume.rebase(head.layer_id, layer)
    with pytest.raises(InvalidInput):
        volume.rebase(middle.layer_id, below)
    volume.rebase(middle.layer_id, layer)
    for each in (below, middle, head, layer):
        each.close()
    assert volume.statistics().layers == 2
    assert volume.read(0, SIZE) == before
    volume.flush()
    volume.close(clean=True)


def test_rebase_of_a_snapshot_puts_the_sealed_layer_on_top(sealed: Sealed) -> None:
    frozen = sealed.written(at0=sector(1))
    volume = EngineVolume([frozen], SIZE, writable=False)
    frozen.close()
    assert volume.read(0, SECTOR_BYTES) == sector(1)
    sealed.put(0, [(0, 1, 0, 0)], [sealed.pack(1)])
    layer = EngineLayer.sealed(frozen.layer_id, sealed.table, sealed.resolve)
    volume.rebase(frozen.layer_id, layer)
    layer.close()
    assert volume.read(0, SECTOR_BYTES) == sector(1)
    assert sealed.asked == [0]
    volume.close(clean=True)


def test_a_sealed_layer_alone(sealed: Sealed) -> None:
    sealed.put(2, [(0, 5, PACK_DAMAGED, 0)], [])
    layer = sealed.layer()
    assert layer.count_sectors() == 5
    assert (layer.dirty, layer.recovered, layer.live_size, layer.parent_visible) == (False, False, 0, 0)
    with pytest.raises(InvalidInput):
        EngineVolume([layer], SIZE, writable=True)
    with pytest.raises(InvalidInput):
        EngineVolume([layer, layer], SIZE, writable=False)
    layer.close()


def test_nothing_is_left_when_handles_are_dropped(sealed: Sealed) -> None:
    sealed.put(0, [(0, 1, 0, 0)], [sealed.pack(1)])
    volume = sealed.volume()
    assert volume.read(0, SECTOR_BYTES) == sector(1)
    del volume
    gc.collect()
    sealed.table.forget()
    assert sealed.table.statistics().bytes == 0


def test_sizes_that_cannot_be(sealed: Sealed) -> None:
    with pytest.raises(InvalidInput):
        ExtentTable(-1)
    with pytest.raises(InvalidInput):
        sealed.pack(1, size=-1)
