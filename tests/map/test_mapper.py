"""The mapper: what it refuses, what it makes, and in which order."""

import itertools
import threading

import msgspec
import pytest

from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.engine import format_bitmap
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    FormatTooNew,
    InvalidName,
    InvalidSize,
    NotFound,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)
from archipfs.map.catalog import STORE_IDENT, Catalog
from archipfs.map.check import Severity
from archipfs.map.locks import Node
from archipfs.map.mapper import Attributes, Mapper, StoreOptions, bitmap_key, create_store, data_key
from archipfs.map.records import Hold, Kind, LayerRecord, StoreRecord, VolumeRecord
from archipfs.types import SIZE_BYTES_MAX, VOLUME_BYTES_MAX, new_layer_id, new_volume_id
from tests.compose.world import World

SIZE = 1 << 20
PLAIN = Attributes()


def make(mapper: Mapper, name: str = "vm") -> VolumeRecord:
    return mapper.create(name, SIZE, PLAIN).record


def snapshot_of(mapper: Mapper, volume: VolumeRecord, name: str) -> VolumeRecord:
    """As the composer takes one, but for the engine."""
    with mapper.new_layer(volume.layer, VOLUME_BYTES_MAX) as head:
        mapper.change(volume.id, lambda record: msgspec.structs.replace(record, layer=head.id))
    with mapper.reserve(name) as reservation:
        return mapper.publish_snapshot(reservation, volume, volume.layer, volume.size).record


# The store


def test_there_has_to_be_a_store() -> None:
    with pytest.raises(ObjectMissing, match="backend slow: no store in memory; make one with"):
        Mapper("slow", MemoryBlocker(), Node("a", "one"), format_bitmap)


def test_making_a_store_again_changes_nothing() -> None:
    blocker = MemoryBlocker()
    create_store(blocker, StoreOptions("sha256"))
    before = blocker.get_record(f"store/{STORE_IDENT}")
    create_store(blocker)
    assert blocker.get_record(f"store/{STORE_IDENT}") == before
    assert Mapper("default", blocker, Node("a", "one"), format_bitmap).store.hash == "sha256"


def test_of_racing_makers_of_a_store_one_wins() -> None:
    blocker = MemoryBlocker()
    threads = [threading.Thread(target=create_store, args=(blocker,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(Catalog(blocker).list(StoreRecord))) == 1


def test_a_store_of_a_later_format_is_left_alone() -> None:
    blocker = MemoryBlocker()
    blocker.put_record(f"store/{STORE_IDENT}", b"archipfs-record 5 store 0 0\n{}", None)
    with pytest.raises(FormatTooNew, match="format 5, this archipfs reads 4; upgrade"):
        Mapper("default", blocker, Node("a", "one"), format_bitmap)
    with pytest.raises(FormatTooNew):
        create_store(blocker)


# Making


def test_a_volume_has_a_layer_with_its_objects(world: World) -> None:
    mapper = world.mapper()
    record = mapper.create("vm", SIZE, Attributes(0o640, 7, 8)).record
    assert (record.name, record.kind, record.size) == ("vm", Kind.VOLUME, SIZE)
    assert (record.mode, record.uid, record.gid) == (0o640, 7, 8)
    assert record.writable
    layer = mapper.catalog.layer(record.layer).record
    assert (layer.parent, layer.parent_visible) == (None, 0)
    assert list(world.store.list_data("layer")) == [data_key(layer.id)]
    assert list(world.store.list_data("bitmap")) == [bitmap_key(layer.id)]
    assert world.check() == []


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (-1, InvalidSize, "size -1 is not positive"),
        (-(1 << 70), InvalidSize, "not positive"),
        (VOLUME_BYTES_MAX + 1, TooLarge, "64 TiB is the most"),
        (SIZE_BYTES_MAX + 1, InvalidSize, "over 8 EiB"),
    ],
)
def test_sizes_that_cannot_be_are_refused(world: World, size: int, error: type[ArchipError], message: str) -> None:
    mapper = world.mapper()
    with pytest.raises(error, match=message):
        mapper.create("vm", size, PLAIN)
    assert list(mapper.volumes()) == []
    assert world.check() == []


def test_the_largest_volume_can_be_made(world: World) -> None:
    assert world.mapper().create("vm", VOLUME_BYTES_MAX, PLAIN).record.size == VOLUME_BYTES_MAX


def test_a_file_just_created_has_no_size(world: World) -> None:
    assert world.mapper().create("vm", 0, PLAIN).record.size == 0


def test_a_bad_name_leaves_nothing(world: World) -> None:
    mapper = world.mapper()
    with pytest.raises(InvalidName):
        mapper.create("a/b", SIZE, PLAIN)
    assert world.check() == []
    assert list(mapper.catalog.idents(LayerRecord)) == []


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("error", [StoreFull, StoreUnavailable])
def test_a_store_that_fails_leaves_nothing_that_reclaim_does_not_take(
    world: World, moment: Moment, error: type[StoreError]
) -> None:
    """At every call; and the name can be used afterwards, unless the volume is there after all."""
    for number in itertools.count(1):
        name = f"vm{number}"
        blocker = FaultBlocker(world.store, FaultPlan(error_at=number, moment=moment, error=error))
        mapper = world.mapper(blocker)
        try:
            make(mapper, name)
        except StoreError:
            failed = True
        else:
            failed = False
        if mapper.find(name) is None:
            make(mapper, name)
        mapper.reclaim()
        assert world.problems() == []
        if not failed:
            break
    assert number > 5


def test_a_clone_has_the_layer_of_its_source_for_a_parent(world: World) -> None:
    mapper = world.mapper()
    snapshot = snapshot_of(mapper, make(mapper), "snap")
    clone = mapper.clone(snapshot, "copy", 2 * SIZE, PLAIN).record
    assert (clone.kind, clone.size, clone.origin) == (Kind.CLONE, 2 * SIZE, snapshot.id)
    layer = mapper.catalog.layer(clone.layer).record
    assert (layer.parent, layer.parent_visible) == (snapshot.layer, SIZE)
    assert world.check() == []


def test_a_snapshot_belongs_to_the_owner_of_its_source(world: World) -> None:
    mapper = world.mapper()
    volume = mapper.create("vm", SIZE, Attributes(0o666, 5, 6)).record
    snapshot = snapshot_of(mapper, volume, "snap")
    assert (snapshot.mode, snapshot.uid, snapshot.gid, snapshot.kind) == (0o444, 5, 6, Kind.SNAPSHOT)
    assert not snapshot.writable
    again = mapper.reserve("again")
    with again as reservation:
        assert mapper.publish_again(reservation, snapshot, SIZE).record.layer == snapshot.layer
    assert world.check() == []


def test_another_snapshot_of_one_that_is_gone_is_refused(world: World) -> None:
    mapper = world.mapper()
    snapshot = snapshot_of(mapper, make(mapper), "snap")
    mapper.purge(mapper.remove(snapshot.id))
    with mapper.reserve("again") as reservation, pytest.raises(NotFound):
        mapper.publish_again(reservation, snapshot, SIZE)
    assert [found.record.name for found in mapper.volumes()] == ["vm"]
    assert mapper.removed() == []


# Changing


def test_changes_of_many_are_all_made(world: World) -> None:
    """Each reads, adds one, and replaces: none is lost."""
    mappers = [world.mapper(host=host) for host in ("one", "two")]
    volume = make(mappers[0])

    def count(mapper: Mapper) -> None:
        for _ in range(25):
            mapper.change(volume.id, lambda record: msgspec.structs.replace(record, mtime_ns=record.mtime_ns + 1))

    threads = [threading.Thread(target=count, args=(mappers[number % 2],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mappers[0].catalog.volume(volume.id).record.mtime_ns == volume.mtime_ns + 100


def test_a_change_that_changes_nothing_writes_nothing(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper)
    before = mapper.catalog.volume(volume.id)
    assert mapper.change(volume.id, lambda record: record) == before
    assert mapper.catalog.volume(volume.id).version == before.version


def test_a_volume_that_is_not_there_cannot_be_changed(world: World) -> None:
    mapper = world.mapper()
    with pytest.raises(NotFound, match="no volume has the id"):
        mapper.change(new_volume_id(), lambda record: record)
    with pytest.raises(ObjectMissing, match="is not in the store; run `archip check`"):
        mapper.catalog.layer(new_layer_id())


def test_how_far_a_parent_shows_only_ever_shrinks(world: World) -> None:
    mapper = world.mapper()
    snapshot = snapshot_of(mapper, make(mapper), "snap")
    layer = mapper.clone(snapshot, "copy", SIZE, PLAIN).record.layer
    for visible, expected in [(SIZE * 2, SIZE), (100, 100), (200, 100), (0, 0)]:
        mapper.limit_parent(layer, visible)
        assert mapper.catalog.layer(layer).record.parent_visible == expected


# Removing


def test_a_removed_volume_is_found_by_nobody_until_it_is_purged(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper)
    mapper.locks.take(volume.id, Hold.IO, called="vm")
    removed = mapper.remove(volume.id)
    assert removed.name is None
    assert mapper.find("vm") is None
    assert list(mapper.volumes()) == []
    assert mapper.removed() == [removed]
    mapper.purge(removed)
    assert mapper.removed() == []
    assert mapper.locks.get(volume.id) is None
    assert world.check() == []
    assert list(world.store.list_data("layer")) == []


def test_removing_and_purging_again_is_harmless(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper)
    removed = mapper.remove(volume.id)
    assert mapper.remove(volume.id) == removed
    mapper.purge(removed)
    mapper.purge(removed)
    assert world.check() == []


def test_purging_what_was_read_long_ago_takes_the_layer_it_has_now(world: World) -> None:
    """While we looked, its owner took a snapshot: the layer that we know of is the snapshot's."""
    mapper = world.mapper()
    volume = make(mapper)
    stale = mapper.remove(volume.id)
    snapshot = snapshot_of(mapper, stale, "snap")
    mapper.purge(stale)
    assert [found.which for found in world.check() if found.severity is Severity.ERROR] == []
    assert mapper.catalog.layer(snapshot.layer)
    assert mapper.catalog.get(VolumeRecord, volume.id) is None


def test_purging_a_snapshot_leaves_its_layer_to_reclaim(world: World) -> None:
    mapper = world.mapper()
    snapshot = snapshot_of(mapper, make(mapper), "snap")
    mapper.purge(mapper.remove(snapshot.id))
    mapper.reclaim()
    assert world.check() == []
    assert len(list(mapper.catalog.idents(LayerRecord))) == 2, "the volume still reads it"


def test_locks_of_volumes_that_are_gone_are_forgotten(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper)
    mapper.locks.take(volume.id, Hold.IO, called="vm")
    mapper.locks.take(new_volume_id(), Hold.IO, called="gone")
    mapper.forget_stray_locks()
    assert world.check() == []
    assert mapper.locks.holder(volume.id) is not None


# Damage


def test_a_damaged_record_harms_no_other_volume(world: World) -> None:
    mapper = world.mapper()
    make(mapper, "good")
    bad = make(mapper, "bad")
    record = world.store.get_record(f"volume/{bad.id}")
    assert record is not None
    world.store.put_record(f"volume/{bad.id}", b"nonsense", record.version)
    assert [found.record.name for found in mapper.volumes()] == ["good"]
    assert mapper.removed() == []
    with pytest.raises(ArchipError, match=f"record volume/{bad.id} is damaged"):
        mapper.find("bad")
    with pytest.raises(ArchipError):
        make(mapper, "bad")
    make(mapper, "new")
    assert mapper.find("good") is not None


def test_a_name_that_two_claim_is_settled_by_its_record(world: World) -> None:
    """As long as that can be read; else nobody is taken for removed."""
    mapper = world.mapper()
    one, two = make(mapper, "one"), make(mapper, "two")
    mapper.change(two.id, lambda record: msgspec.structs.replace(record, name="one"))
    assert [found.record.id for found in mapper.volumes()] == [one.id]
    assert [record.id for record in mapper.removed()] == [two.id]
    entry = mapper.catalog.name("one")
    assert entry is not None
    key = next(key for key, found in world.store.list_records("name") if found.version == entry.version)
    world.store.put_record(key, b"nonsense", entry.version)
    assert list(mapper.volumes()) == []
    assert mapper.removed() == []


def test_an_already_taken_name_is_refused_before_anything_is_made(world: World) -> None:
    mapper = world.mapper()
    make(mapper)
    layers = set(mapper.catalog.idents(LayerRecord))
    with pytest.raises(AlreadyExists):
        make(mapper)
    assert set(mapper.catalog.idents(LayerRecord)) == layers
