"""What is swept, and what never is, whoever else is at work."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Thread

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.blockers.contract import DataObject, Record
from archipfs.blockers.fault import FaultBlocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.composer import Composer
from archipfs.errors import FormatTooNew, NotFound, ObjectDamaged, ObjectMissing, StoreUnavailable
from archipfs.map import mapper as mapper_module
from archipfs.map.catalog import Catalog, children_first
from archipfs.map.check import Severity
from archipfs.map.locks import Node
from archipfs.map.mapper import Attributes, Mapper, bitmap_key, create_store, data_key
from archipfs.map.reclaim import Reclaimed, delete_objects, reachable
from archipfs.map.records import LayerRecord
from archipfs.types import LayerId
from tests.compose.interleave import SteppedBlocker, schedules, whole_second
from tests.compose.world import World, content_of, fill, pattern

CONTENT = pattern(1, 4)
NOTHING = Reclaimed(0, 0)


def layers_of(mapper: Mapper) -> set[str]:
    return set(mapper.catalog.idents(LayerRecord))


def new_layer(mapper: Mapper, parent: LayerId | None = None) -> LayerId:
    """A layer that nobody comes to name."""
    with mapper.new_layer(parent, 0) as layer:
        return layer.id


def errors_of(world: World) -> list[str]:
    return [f"{found.which}: {found.what}" for found in world.check() if found.severity is Severity.ERROR]


# The pure parts

shapes = st.lists(st.integers(-3, 11), max_size=12)
"""For each layer the number of its parent; negative: none, or one that is not there."""


def layers_from(shape: list[int]) -> dict[LayerId, LayerRecord]:
    """Parents come before children, so there is no circle."""

    def parent_of(number: int, parent: int) -> LayerId | None:
        if parent < 0:
            return None if parent < -1 else LayerId("gone")
        return LayerId(str(parent % number)) if number else None

    return {
        LayerId(str(number)): LayerRecord(LayerId(str(number)), parent_of(number, parent), 0, "node", 0)
        for number, parent in enumerate(shape)
    }


@given(shapes, st.randoms(use_true_random=False))
def test_children_come_before_parents(shape: list[int], draw: object) -> None:
    layers = layers_from(shape)
    keys = list(layers)
    draw.shuffle(keys)  # type: ignore[attr-defined]
    order = [record.id for record in children_first({key: layers[key] for key in keys})]
    assert sorted(order) == sorted(layers)
    for record in layers.values():
        if record.parent in layers:
            assert order.index(record.id) < order.index(record.parent)


def test_children_first_comes_to_an_end_in_a_circle() -> None:
    one, two = LayerId("1"), LayerId("2")
    layers = {one: LayerRecord(one, two, 0, "node", 0), two: LayerRecord(two, one, 0, "node", 0)}
    assert {record.id for record in children_first(layers)} == {one, two}
    assert reachable({one}, layers) == {one, two}


def test_children_first_takes_long_chains() -> None:
    ids = [LayerId(str(number)) for number in range(20_000)]
    layers = {
        layer: LayerRecord(layer, ids[number - 1] if number else None, 0, "node", 0) for number, layer in enumerate(ids)
    }
    assert [record.id for record in children_first(layers)] == ids[::-1]
    assert reachable({ids[-1]}, layers) == set(ids)


@given(shapes, st.sets(st.integers(0, 11)))
def test_reachable_is_the_roots_and_their_ancestors(shape: list[int], picked: set[int]) -> None:
    layers = layers_from(shape)
    roots = {LayerId(str(number)) for number in picked}
    expected = set(roots)
    while True:
        parents = {layers[layer].parent for layer in expected if layer in layers} - {None}
        if parents <= expected:
            break
        expected |= {parent for parent in parents if parent is not None}
    assert reachable(roots, layers) == expected


# What is swept


def test_a_layer_that_nobody_names_is_swept(world: World) -> None:
    mapper = world.mapper()
    layer = new_layer(mapper)
    assert mapper.reclaim().layers == 1
    assert layers_of(mapper) == set()
    assert list(world.store.list_data("layer")) == list(world.store.list_data("bitmap")) == []
    assert layer not in layers_of(mapper)


def test_what_is_freed_is_told(world: World) -> None:
    composer = world.composer()
    composer.create("vm", len(CONTENT))
    fill(composer, "vm", CONTENT)
    composer.snapshot("vm", "snap")
    composer.remove("vm")
    composer.remove("snap")
    freed = composer.mapper().reclaim()
    assert freed.layers == 1, "the head goes with its volume, the frozen layer is left"
    assert freed.stored_bytes >= len(CONTENT)
    assert world.check() == []


def test_layers_of_a_record_without_objects_are_swept(world: World) -> None:
    """A crash between the layer's record and its objects."""
    mapper = world.mapper()
    layer = new_layer(mapper)
    world.store.delete_data(data_key(layer))
    other = new_layer(mapper)
    world.store.delete_data(bitmap_key(other))
    assert mapper.reclaim().layers == 2
    assert world.check() == []


def test_parents_in_use_stay(world: World) -> None:
    composer = world.composer()
    composer.create("vm", len(CONTENT))
    fill(composer, "vm", CONTENT)
    composer.snapshot("vm", "snap")
    composer.clone("snap", "copy")
    composer.remove("snap")
    composer.remove("vm")
    composer.mapper().reclaim()
    assert content_of(composer, "copy") == CONTENT
    assert world.check() == []


# What is not


def test_a_pending_layer_stays(world: World) -> None:
    mapper = world.mapper()
    with mapper.new_layer(None, 0) as layer:
        assert mapper.reclaim() == NOTHING
        assert layers_of(mapper) == {layer.id}
    mapper.reclaim()
    assert layers_of(mapper) == set()


def test_the_parent_of_a_pending_layer_stays(world: World) -> None:
    mapper = world.mapper()
    parent = new_layer(mapper)
    with mapper.new_layer(parent, 0):
        mapper.reclaim()
        assert parent in layers_of(mapper)


def test_a_young_layer_of_another_node_stays_until_it_is_old(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    other = new_layer(world.mapper(host="two"))
    mapper = world.mapper()
    assert mapper.reclaim() == NOTHING
    assert layers_of(mapper) == {other}
    monkeypatch.setattr(mapper_module, "FOREIGN_GRACE_NS", 0)
    assert mapper.reclaim().layers == 1


def test_a_layer_of_a_removed_volume_that_is_not_purged_stays(world: World) -> None:
    """Somebody may have it open."""
    mapper = world.mapper()
    volume = mapper.create("vm", 4096, Attributes()).record
    mapper.remove(volume.id)
    assert mapper.reclaim() == NOTHING
    assert layers_of(mapper) == {volume.layer}


@pytest.mark.parametrize("kind", ["volume", "layer"])
@pytest.mark.parametrize(
    ("damage", "error"), [(b"nonsense", ObjectDamaged), (b"archipfs-record 5 volume a b\n{}", FormatTooNew)]
)
def test_where_a_record_cannot_be_read_nothing_is_swept(
    world: World, kind: str, damage: bytes, error: type[Exception]
) -> None:
    mapper = world.mapper()
    mapper.create("vm", 4096, Attributes())
    garbage = new_layer(mapper)
    key, record = next((key, record) for key, record in world.store.list_records(kind) if garbage not in key)
    world.store.put_record(key, damage, record.version)
    with pytest.raises(error):
        mapper.reclaim()
    assert garbage in {key.partition("/")[2] for key, _ in world.store.list_records("layer")}
    assert len(list(world.store.list_data("layer"))) == 2


def test_where_a_layer_in_use_is_missing_nothing_is_swept(world: World) -> None:
    """Its parents hold what can still be saved."""
    composer = world.composer()
    composer.create("vm", len(CONTENT))
    for number in range(3):
        composer.snapshot("vm", f"snap{number}")
    found = composer.find("vm")
    chain = [layer.id for layer in found.mapper.catalog.chain(found.record.layer)]
    for number in range(3):
        composer.remove(f"snap{number}")
    lost = found.mapper.catalog.layer(chain[1])
    found.mapper.catalog.delete(LayerRecord, chain[1], lost.version)
    garbage = new_layer(found.mapper)
    with pytest.raises(ObjectMissing, match=r"layer .* of vm is not in the store"):
        found.mapper.reclaim()
    assert layers_of(found.mapper) == {*chain, garbage} - {chain[1]}


# Beside others

Operation = Callable[[Composer], object]


def remove_and_reclaim(name: str) -> Operation:
    def operation(composer: Composer) -> None:
        composer.remove(name)
        composer.reclaim()

    return operation


def reclaim_garbage(composer: Composer) -> None:
    composer.mapper().reclaim()


RACES: dict[str, tuple[Operation, Operation]] = {
    "clone, and removal of its source": (
        lambda composer: composer.clone("snap", "made"),
        remove_and_reclaim("snap"),
    ),
    "snapshot of a snapshot, and removal of its source": (
        lambda composer: composer.snapshot("snap", "made"),
        remove_and_reclaim("snap"),
    ),
    "rollback, and removal of the snapshot": (
        lambda composer: composer.rollback("vm", "snap"),
        remove_and_reclaim("snap"),
    ),
    "clone of a live volume, and its removal": (
        lambda composer: composer.clone("vm", "made"),
        remove_and_reclaim("vm"),
    ),
    "create": (lambda composer: composer.create("made", 4096), reclaim_garbage),
    "snapshot": (lambda composer: composer.snapshot("vm", "made"), reclaim_garbage),
    "clone": (lambda composer: composer.clone("snap", "made"), reclaim_garbage),
    "rollback": (lambda composer: composer.rollback("vm", "snap"), reclaim_garbage),
    "resize": (lambda composer: composer.resize(composer.find("vm"), 4096), reclaim_garbage),
    "rename": (lambda composer: composer.rename("vm", "snap", replace=True), reclaim_garbage),
}


def race_world(directory: Path) -> tuple[World, SteppedBlocker]:
    """A volume, a snapshot of it whose layer nobody else needs, and a layer that is garbage."""
    world = World(directory)
    composer = world.composer()
    composer.create("vm", len(CONTENT))
    composer.snapshot("vm", "empty")
    fill(composer, "vm", CONTENT)
    composer.rename(str(composer.rollback("vm", "empty").kept.name), "snap")
    fill(composer, "vm", pattern(2, 1))
    new_layer(composer.mapper())
    return world, SteppedBlocker(world.store)


def judge_race(world: World, composer: Composer, *, made: bool) -> None:
    """Whatever has a name can be read, and what was made reads as its source did."""
    assert errors_of(world) == []
    for found in list(composer.volumes()):
        content = content_of(composer, str(found.record.name))
        assert content in (
            CONTENT,
            bytes(len(CONTENT)),
            bytes(4096),
            pattern(2, 1).ljust(len(CONTENT), b"\0"),
            pattern(2, 1),
        )
    composer.close_all()
    composer.mapper().reclaim()
    assert errors_of(world) == []
    if made:
        names = {str(found.record.name) for found in composer.volumes()}
        assert {"made"} <= names


@pytest.mark.parametrize("hosts", [("one", "one"), ("one", "two")], ids=["in one process", "on two nodes"])
@pytest.mark.parametrize("first", ["the operation", "the removal"])
@pytest.mark.parametrize("race", RACES)
def test_reclaim_beside_an_operation_takes_nothing_that_is_named(
    tmp_path: Path, race: str, first: str, hosts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archipfs.compose.volumes.CLOSING_SECONDS", 0.005)
    operation, removal = RACES[race]
    for number, schedule in enumerate(schedules(whole_second)):
        world, blocker = race_world(tmp_path / str(number))
        composer = world.composer(blocker, hosts[0])
        other = composer if hosts[0] == hosts[1] else world.composer(blocker, hosts[1])
        both = [partial(operation, composer), partial(removal, other)]
        if first == "the removal":
            both.reverse()
        one, two, whole = schedule.run(blocker, *both)
        outcome = one if first == "the operation" else two
        made = outcome.succeeded and ("made" in world_names(world))
        assert made or not outcome.succeeded or race in ("rollback, and removal of the snapshot", *RACES_WITHOUT_MADE)
        judge_race(world, composer, made=made)
        if whole:
            return


RACES_WITHOUT_MADE = ("rollback", "resize", "rename")


def world_names(world: World) -> set[str]:
    return {str(found.record.name) for found in world.mapper().volumes()}


def test_a_clone_of_a_source_that_is_gone_is_refused(world: World) -> None:
    composer = world.composer()
    composer.create("vm", 4096)
    composer.snapshot("vm", "snap")
    source = composer.find("snap").record
    composer.remove("snap")
    with pytest.raises(NotFound, match="snap has just been removed"):
        composer.mapper().clone(source, "copy", 4096, Attributes())
    assert composer.mapper().find("copy") is None


class SlowListing(MemoryBlocker):
    """Lists the keys, lets something happen, and reads the records after it: as a directory is read."""

    meanwhile: Callable[[], None] | None = None

    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        keys = [key for key, _ in super().list_records(kind)]
        if kind == "volume" and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        for key in keys:
            record = self.get_record(key)
            if record is not None:
                yield key, record


def test_a_layer_handed_from_a_volume_to_a_new_snapshot_while_volumes_are_listed_is_kept() -> None:
    """As a rollback does: the listing has neither the snapshot nor, when it comes to the volume, its old layer."""
    store = SlowListing()
    create_store(store)
    mapper = Mapper("default", store, Node("node", "host"), lambda bitmap, layer: None)
    volume = mapper.create("vm", 4096, Attributes()).record
    with mapper.new_layer(volume.layer, 4096) as head:
        mapper.change(volume.id, lambda record: msgspec.structs.replace(record, layer=head.id))
    mapper.reclaim()

    def roll_back() -> None:
        with mapper.reserve("kept") as reservation:
            mapper.publish_snapshot(reservation, volume, volume.layer, 4096)
        with mapper.new_layer(None, 0) as fresh:
            mapper.change(volume.id, lambda record: msgspec.structs.replace(record, layer=fresh.id))

    store.meanwhile = roll_back
    mapper.reclaim()
    assert volume.layer in layers_of(mapper)


def test_a_layer_that_somebody_is_about_to_seal_goes_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record changes under the hands of who deletes it, and that is nobody's trouble."""
    mapper = world.mapper()
    layer = new_layer(mapper)
    delete = Catalog.delete

    def shows_intent_first(self: Catalog, kind: type[LayerRecord], ident: str, expected: int) -> None:
        monkeypatch.undo()
        self.put(msgspec.structs.replace(self.layer(layer).record, sealing="token"), layer, expected)
        delete(self, kind, ident, expected)

    monkeypatch.setattr(Catalog, "delete", shows_intent_first)
    assert mapper.reclaim().layers == 1
    assert layers_of(mapper) == set()


def test_two_sweeps_at_once_take_nothing_that_is_being_made(world: World) -> None:
    """As ``archip gc`` beside recovery: the second one to begin does not have the first forget what is pending."""

    class Twice(FaultBlocker):
        begun = False

        def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
            if kind == "layer" and not self.begun:
                self.begun = True
                other.start()
                other.join(0.2)
                made.append(stack.enter_context(mapper.new_layer(None, 0)).id)
            yield from super().list_records(kind)

    made: list[LayerId] = []
    mapper = world.mapper(Twice(world.store))
    garbage = new_layer(mapper)
    other = Thread(target=mapper.reclaim)
    with ExitStack() as stack:
        mapper.reclaim()
        other.join()
        assert layers_of(mapper) == set(made)
    assert garbage not in layers_of(mapper)


class CutShort(MemoryBlocker):
    """Each object's first deletion is cut short: nobody can open it any more, and not all of it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.half_deleted: set[str] = set()

    def delete_data(self, key: str) -> None:
        if key in self.half_deleted:
            super().delete_data(key)
        else:
            self.half_deleted.add(key)
            raise StoreUnavailable("no luck; wanted by the test")

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        if key in self.half_deleted:
            raise ObjectMissing("half of it is gone")
        return super().open_data(key, writable=writable, claim=claim)


def test_what_a_deletion_that_was_cut_short_has_left_is_deleted_by_the_next() -> None:
    blocker = CutShort()
    layer = LayerId("a")
    for key in (bitmap_key(layer), data_key(layer)):
        blocker.create_data(key).close()
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            delete_objects(blocker, layer)
    delete_objects(blocker, layer)
    assert [*blocker.list_data("layer"), *blocker.list_data("bitmap")] == []
