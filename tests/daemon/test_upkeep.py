"""The upkeep of a backend: what is opened for it, and when garbage is looked for by itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from archipfs.compose.sealed import SealedStore
from archipfs.daemon.upkeep import Upkeep
from archipfs.errors import Busy
from archipfs.map.chunks import pack_key
from archipfs.map.records import DamageRecord
from tests.compose.world import BACKEND, World
from tests.map.sealing import Sealer


def unheeded() -> None:
    """Nobody wants it to end."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def sealed(world: World) -> Iterator[SealedStore]:
    stores, close = world.sealed_stores(world.mapper())
    yield stores[BACKEND]
    close()


@pytest.fixture
def upkeep(world: World, sealed: SealedStore, tmp_path: Path) -> Upkeep:
    return Upkeep(world.mapper(), sealed, tmp_path / "state")


@pytest.fixture
def node(world: World, sealed: SealedStore) -> Sealer:
    return Sealer(world.store, sealed.chunks, world.mapper().node.id)


def test_where_nothing_was_sealed_there_is_nothing_to_do(upkeep: Upkeep) -> None:
    assert not upkeep.has_sealed()
    assert upkeep.collect(unheeded) is upkeep.collect_if_changed(unheeded) is None
    assert upkeep.scrub(None, lambda done, total: None) is None
    assert upkeep.check(unheeded) == []
    assert upkeep.as_source().store is None


def test_garbage_is_looked_for_again_when_something_has_changed(upkeep: Upkeep, node: Sealer) -> None:
    layers = [node.seal({0: [number]}) for number in range(2)]
    first = upkeep.collect_if_changed(unheeded)
    assert first is not None
    assert first.packs == 0
    assert upkeep.collect_if_changed(unheeded) is None, "nothing has changed"
    node.drop(layers[0])
    second = upkeep.collect_if_changed(unheeded)
    assert second is not None
    assert second.packs == 1
    third = upkeep.collect_if_changed(unheeded)
    assert third is not None
    assert third.packs == 0
    assert upkeep.collect_if_changed(unheeded) is None


def test_one_scrub_at_a_time(upkeep: Upkeep, node: Sealer) -> None:
    node.seal({0: [1]})

    def scrub_again(done: int, total: int) -> None:
        with pytest.raises(Busy, match="scrubbed already"):
            upkeep.scrub(None, lambda done, total: None)

    done = upkeep.scrub(None, scrub_again)
    assert done is not None
    assert done.packs == 1


def test_a_repair_beside_a_collection_leaves_the_damaged_pack_to_the_next(
    world: World, upkeep: Upkeep, node: Sealer
) -> None:
    layer = node.seal({0: [1]})
    (pack,) = node.store.packs()
    node.copy_pack(pack)
    node.catalog.put(DamageRecord(pack, [entry.digest.hex() for entry in node.store.index(pack).entries]), pack, None)
    repairs = []

    def pulse() -> None:
        if not repairs:
            repairs.append(upkeep.repair([], 3, lambda done, total: None))
            assert world.store.exists(pack_key(pack))

    upkeep.collect(pulse)
    assert (repairs[0].mended, repairs[0].lost) == (0, 0)
    upkeep.collect(unheeded)
    assert not world.store.exists(pack_key(pack))
    assert node.catalog.get(DamageRecord, pack) is None
    assert len(node.content(layer)) == 1
