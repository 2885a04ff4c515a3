"""Who reads a volume that another node writes, or layers that another node seals."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from archipfs.blockers.contract import DataObject
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.composer import Composer
from archipfs.compose.engine import EngineVolume
from archipfs.compose.reader import FreshReader
from archipfs.errors import ObjectMissing, StoreUnavailable
from archipfs.map import mapper as mapper_module
from archipfs.map.mapper import bitmap_key, data_key
from archipfs.types import SECTOR_BYTES
from tests.compose.world import World, content_of, fill, pattern

SIZE = 64 * SECTOR_BYTES


class Forgetful(MemoryBlocker):
    """A deleted data object is gone, also for those who have it open."""

    @property
    def keeps_deleted(self) -> bool:
        return False

    def __init__(self) -> None:
        super().__init__()
        self.before_read: Callable[[str], None] = lambda key: None

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        data = super().open_data(key, writable=writable, claim=claim)
        read = data.pread

        def pread(offset: int, length: int) -> bytes:
            self.before_read(key)
            if key not in self.store.data:
                raise ObjectMissing(f"{key} was deleted; wanted by the test")
            return read(offset, length)

        data.pread = pread  # type: ignore[method-assign]
        return data


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), Forgetful())


def objects_of(world: World, layer: str) -> set[str]:
    return {data_key(layer), bitmap_key(layer)} & set(world.store.store.data)  # type: ignore[arg-type, attr-defined]


def test_each_read_sees_what_was_flushed_before(world: World) -> None:
    one, two = world.composer(host="one"), world.composer(host="two")
    one.create("vm1", SIZE)
    writing, reading = one.open(one.find("vm1")), two.open(two.find("vm1"))
    for number in range(5):
        writing.write(number * SECTOR_BYTES, pattern(number))
        writing.flush()
        assert reading.read(number * SECTOR_BYTES, SECTOR_BYTES) == pattern(number)
        if number == 2:
            one.snapshot("vm1", "monday")


def test_reads_that_come_together_share_an_opening_and_none_that_began_before_them() -> None:
    begun, may_open = threading.Semaphore(0), threading.Semaphore(0)
    made: list[EngineVolume] = []

    def open_now() -> EngineVolume:
        begun.release()
        assert may_open.acquire(timeout=60)
        made.append(Fake())  # type: ignore[arg-type]
        return made[-1]

    reader = FreshReader(open_now)
    seen: list[object] = []

    def read() -> None:
        with reader.engine() as engine:
            assert not engine.closed  # type: ignore[attr-defined]
            seen.append(engine)

    first = threading.Thread(target=read)
    first.start()
    assert begun.acquire(timeout=60)
    others = [threading.Thread(target=read) for _ in range(8)]
    for thread in others:
        thread.start()
    while len(reader._waiting) < 8:
        threading.Event().wait(0.001)
    may_open.release()
    first.join(60)
    assert begun.acquire(timeout=60)
    may_open.release()
    for thread in others:
        thread.join(60)
    assert len(made) == 2
    assert sorted(map(id, seen)) == sorted([id(made[0])] + 8 * [id(made[1])])
    assert all(engine.closed for engine in made)  # type: ignore[attr-defined]


class Fake:
    closed = False

    def close(self, *, clean: bool) -> None:
        assert not self.closed
        self.closed = True


def test_a_read_that_cannot_be_opened_leaves_the_others_to_try() -> None:
    attempts: list[int] = []

    def open_now() -> EngineVolume:
        attempts.append(1)
        if len(attempts) == 1:
            raise StoreUnavailable("wanted by the test")
        return Fake()  # type: ignore[return-value]

    reader = FreshReader(open_now)
    with pytest.raises(StoreUnavailable), reader.engine():
        pass
    with reader.engine():
        assert len(attempts) == 2


def sealed_elsewhere(world: World) -> tuple[Composer, Composer]:
    """A snapshot and a clone of it, and two nodes; the second has both open when the first seals the snapshot."""
    one, two = world.composer(host="one"), world.composer(host="two")
    one.create("vm1", SIZE)
    fill(one, "vm1", pattern(1, 8))
    one.snapshot("vm1", "monday")
    two.clone("monday", "copy")
    return one, two


def test_what_was_sealed_keeps_its_objects_for_those_who_read_them_elsewhere(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = sealed_elsewhere(world)
    layer = one.find("monday").record.layer
    snapshot, copy = two.open(two.find("monday")), two.open(two.find("copy"))
    copy.write(0, pattern(2))
    assert one.layers_waiting(one.default_backend) == 0
    one.seal("monday")
    one.reclaim()
    one.recover()
    assert len(objects_of(world, layer)) == 2
    assert one.layers_waiting(one.default_backend) == 1
    assert snapshot.read(0, 8 * SECTOR_BYTES) == pattern(1, 8)
    two.go_over_to_seals()
    monkeypatch.setattr(mapper_module, "READERS_GRACE_NS", 0)
    two.recover()
    assert two.layers_waiting(two.default_backend) == 0
    assert objects_of(world, layer) == set()
    assert snapshot.read(0, 8 * SECTOR_BYTES) == pattern(1, 8)
    assert copy.read(0, 8 * SECTOR_BYTES) == pattern(2) + pattern(1, 8)[SECTOR_BYTES:]
    two.release(snapshot)
    two.release(copy)
    assert content_of(one, "copy") == pattern(2) + pattern(1, 8)[SECTOR_BYTES:] + bytes(SIZE - 8 * SECTOR_BYTES)
    assert world.problems() == []


def test_a_reader_that_finds_an_object_gone_goes_on_with_what_took_its_place(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that could not look for longer than the objects were kept."""
    one, two = sealed_elsewhere(world)
    snapshot, copy = two.open(two.find("monday")), two.open(two.find("copy"))
    monkeypatch.setattr(mapper_module, "READERS_GRACE_NS", 0)
    one.seal("monday")
    one.recover()
    assert objects_of(world, one.find("monday").record.layer) == set()
    assert snapshot.read(0, 8 * SECTOR_BYTES) == pattern(1, 8)
    assert copy.read_nowait(0, SECTOR_BYTES) is None
    copy.write(SECTOR_BYTES + 10, b"part")  # of a sector: the rest comes from what is gone
    expected = bytearray(pattern(1, 8))
    expected[SECTOR_BYTES + 10 : SECTOR_BYTES + 14] = b"part"
    assert copy.read(0, 8 * SECTOR_BYTES) == bytes(expected)


def test_so_does_one_that_opens_a_volume_of_another_node_for_each_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = sealed_elsewhere(world)
    layer = one.find("monday").record.layer
    writing, reading = one.open(one.find("vm1")), two.open(two.find("vm1"))
    monkeypatch.setattr(mapper_module, "READERS_GRACE_NS", 0)

    def seal(key: str) -> None:
        if key == data_key(layer):
            monkeypatch.setattr(world.store, "before_read", lambda key: None)
            one.seal("monday")
            one.recover()

    monkeypatch.setattr(world.store, "before_read", seal)
    assert reading.read(0, 8 * SECTOR_BYTES) == pattern(1, 8)
    assert objects_of(world, layer) == set()
    one.release(writing)


def test_what_is_really_missing_is_an_error(world: World) -> None:
    one, two = sealed_elsewhere(world)
    snapshot, writing = two.open(two.find("monday")), one.open(one.find("vm1"))
    reading = two.open(two.find("vm1"))
    for key in objects_of(world, one.find("monday").record.layer):
        world.store.delete_data(key)
    for opened in (snapshot, reading, writing):
        with pytest.raises(ObjectMissing):
            opened.read(0, SECTOR_BYTES)


def test_layers_that_were_merged_away_stay_as_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = world.composer(host="one"), world.composer(host="two")
    one.create("vm1", SIZE)
    for number in range(3):
        fill(one, "vm1", pattern(number), number * SECTOR_BYTES)
        one.snapshot("vm1", f"day{number}")
    lower = one.find("day0").record.layer
    reading = two.open(two.find("day2"))
    one.remove("day0")
    one.remove("day1")
    one.seal("day2")
    one.reclaim()
    assert len(objects_of(world, lower)) == 2
    assert reading.read(0, 3 * SECTOR_BYTES) == b"".join(pattern(number) for number in range(3))
    two.go_over_to_seals()
    monkeypatch.setattr(mapper_module, "READERS_GRACE_NS", 0)
    one.recover()
    assert objects_of(world, lower) == set()
    assert reading.read(0, 3 * SECTOR_BYTES) == b"".join(pattern(number) for number in range(3))
    assert world.problems() == []


def test_where_readers_keep_what_is_deleted_room_comes_back_at_once(tmp_path: Path) -> None:
    here = World(tmp_path / "here")
    one, _ = sealed_elsewhere(here)
    layer = one.find("monday").record.layer
    one.seal("monday")
    assert objects_of(here, layer) == set()


def test_what_waits_is_reclaimed_later_without_anybody_asking(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = sealed_elsewhere(world)
    layer = one.find("monday").record.layer
    one.seal("monday")
    monkeypatch.setattr(mapper_module, "READERS_GRACE_NS", 0)
    one._reclaim_wanted = False
    one.reclaim()
    assert len(objects_of(world, layer)) == 2, "nothing was asked for"
    one._reclaim_at = 0.0
    one.reclaim()
    assert objects_of(world, layer) == set()
