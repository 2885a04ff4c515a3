"""Sealing through the composer: what is read stays the same, and what lay in data objects lies in packs."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from archipfs.blockers.contract import DataObject
from archipfs.blockers.fault import FaultBlocker
from archipfs.compose.composer import Composer
from archipfs.compose.sparse_file import SparseFile
from archipfs.compose.volume import OpenVolume
from archipfs.errors import InvalidInput, LockHeld, NotFound, StoreError
from archipfs.map.records import LayerRecord
from archipfs.types import REGION_BYTES, SECTOR_BYTES
from tests.compose.world import World, content_of, fill, pattern, see

REGIONS = 2
SIZE = REGIONS * REGION_BYTES + 5 * SECTOR_BYTES


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "nodes")


@pytest.fixture
def composer(world: World) -> Iterator[Composer]:
    composer = world.composer()
    yield composer
    composer.close_all()
    composer.reclaim()
    assert world.problems() == []


def noise(seed: int, sectors: int) -> bytes:
    return random.Random(seed).randbytes(sectors * SECTOR_BYTES)


def volume(composer: Composer, name: str, *pieces: tuple[int, bytes], size: int = SIZE) -> bytes:
    """A volume with these pieces at these sectors; its content."""
    composer.create(name, size)
    write(composer, name, *pieces)
    return content_of(composer, name)


def write(composer: Composer, name: str, *pieces: tuple[int, bytes]) -> None:
    with composer.using(composer.find(name)) as opened:
        for sector, data in pieces:
            opened.write(sector * SECTOR_BYTES, data)


def layer_of(composer: Composer, name: str) -> LayerRecord:
    found = composer.find(name)
    return found.mapper.catalog.layer(found.record.layer).record


def data_objects(world: World) -> set[str]:
    return {key.partition("/")[2] for kind in ("layer", "bitmap") for key in world.store.list_data(kind)}


def packs(world: World) -> set[str]:
    return set(world.store.list("pack"))


def test_a_sealed_snapshot_reads_the_same_and_has_no_objects(world: World, composer: Composer) -> None:
    content = volume(composer, "vm", (3, noise(1, 40)), (1020, noise(2, 9)), (2048, noise(3, 5)))
    composer.snapshot("vm", "snap")
    layer = layer_of(composer, "snap").id
    done = composer.seal("snap")
    assert (done.layers, done.read_bytes) == (1, 54 * SECTOR_BYTES)
    assert done.added_bytes >= 54 * SECTOR_BYTES
    assert layer not in data_objects(world)
    assert content_of(composer, "snap") == content
    assert content_of(composer, "vm") == content
    assert see(world.composer())["snap"].content == content


def test_sealing_again_does_nothing(world: World, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 9)))
    composer.snapshot("vm", "snap")
    composer.seal("snap")
    stored = packs(world)
    assert composer.seal("snap").layers == 0
    assert packs(world) == stored


def test_the_same_data_is_stored_once(world: World, composer: Composer) -> None:
    """Wherever it lies, moved by whole sectors."""
    data = noise(1, 200)
    volume(composer, "one", (0, data))
    volume(composer, "two", (777, data))
    for name in ("one", "two"):
        composer.snapshot(name, f"{name}@a")
    composer.seal("one@a")
    added = composer.seal("two@a").added_bytes
    assert added < len(data) // 3


def test_a_second_snapshot_costs_what_changed(composer: Composer) -> None:
    content = bytearray(volume(composer, "vm", (0, noise(1, 1000))))
    composer.snapshot("vm", "first")
    composer.seal("first")
    write(composer, "vm", (500, noise(2, 1)))
    content[500 * SECTOR_BYTES : 501 * SECTOR_BYTES] = noise(2, 1)
    composer.snapshot("vm", "second")
    done = composer.seal("second")
    assert done.read_bytes == SECTOR_BYTES
    assert done.added_bytes < 5 * SECTOR_BYTES
    assert content_of(composer, "second") == bytes(content)


def test_zeros_and_discards_are_holes(world: World, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 100)))
    composer.snapshot("vm", "first")
    composer.seal("first")
    with composer.using(composer.find("vm")) as opened:
        opened.write(0, bytes(10 * SECTOR_BYTES))
        opened.discard(50 * SECTOR_BYTES, 20 * SECTOR_BYTES)
    composer.snapshot("vm", "second")
    composer.seal("second")
    sealed = layer_of(composer, "second").sealed
    assert sealed is not None
    assert sealed.data_bytes == 70 * SECTOR_BYTES
    content = content_of(composer, "second")
    assert content[: 10 * SECTOR_BYTES] == bytes(10 * SECTOR_BYTES)
    assert content[50 * SECTOR_BYTES : 70 * SECTOR_BYTES] == bytes(20 * SECTOR_BYTES)
    assert content == content_of(composer, "vm")


def test_a_chain_is_one_deep_when_it_is_sealed(world: World, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(0, 50)))
    contents = {}
    for number in range(1, 12):
        write(composer, "vm", (3 * number, noise(number, 2)))
        composer.snapshot("vm", f"vm@{number}")
        contents[f"vm@{number}"] = content_of(composer, "vm")
    composer.seal("vm")
    catalog = composer.mapper().catalog
    assert len(catalog.chain(composer.find("vm").record.layer)) == 2
    assert all(layer_of(composer, name).sealed for name in contents)
    assert {name: content_of(composer, name) for name in contents} == contents


def test_unnamed_layers_are_merged_into_the_one_above(world: World, composer: Composer) -> None:
    content = volume(composer, "vm", (0, noise(0, 50)))
    for number in range(3):
        composer.snapshot("vm", f"vm@{number}")
        write(composer, "vm", (number, noise(number + 1, 1)))
        content = content_of(composer, "vm")
    composer.snapshot("vm", "last")
    for number in range(3):
        composer.remove(f"vm@{number}")
    assert composer.seal("last").layers == 1
    composer.reclaim()
    layers = [found.record for _, found in composer.mapper().catalog.list(LayerRecord)]
    assert len(layers) == 2
    assert content_of(composer, "last") == content


def test_a_layer_with_several_children_gets_a_map_of_its_own(composer: Composer) -> None:
    volume(composer, "vm", (0, noise(0, 50)))
    composer.clone("vm", "other")  # its layer has no name, and two heads on it
    write(composer, "vm", (7, noise(1, 3)))
    composer.snapshot("vm", "snap")
    assert composer.seal("snap").layers == 2
    assert composer.seal("other").layers == 0


def test_a_live_volume_is_sealed_as_it_is_now(world: World, composer: Composer) -> None:
    content = volume(composer, "vm", (3, noise(1, 40)))
    assert composer.seal("vm").layers == 0
    assert composer.seal("vm", live=True).layers == 1
    assert composer.seal("vm", live=True).layers == 0, "nothing was written since"
    assert content_of(composer, "vm") == content
    assert [each.sealed is not None for each in composer.mapper().catalog.chain(layer_of(composer, "vm").id)] == [
        False,
        True,
    ]


def test_a_volume_without_a_size_has_nothing_to_seal(world: World, composer: Composer) -> None:
    composer.create("touched", 0)
    assert composer.seal("touched", live=True).layers == 0
    assert packs(world) == set()


def test_an_open_volume_goes_over_to_the_sealed_layer(world: World, composer: Composer) -> None:
    content = bytearray(volume(composer, "vm", (0, noise(1, 300))))
    with composer.using(composer.find("vm")) as opened:
        composer.snapshot("vm", "snap")
        with composer.using(composer.find("snap")) as frozen:
            opened.write(5 * SECTOR_BYTES, noise(2, 1))
            content[5 * SECTOR_BYTES : 6 * SECTOR_BYTES] = noise(2, 1)
            composer.seal("snap")
            assert opened.engine.statistics().layers == 2
            assert opened.read(0, SIZE) == bytes(content)
            with frozen.reading() as reader:
                assert reader.statistics().layers == 1
            opened.write(5 * SECTOR_BYTES + 100, b"partly")
            content[5 * SECTOR_BYTES + 100 : 5 * SECTOR_BYTES + 106] = b"partly"
            opened.write(9 * SECTOR_BYTES + 100, b"the rest of this sector is in a pack")
            content[9 * SECTOR_BYTES + 100 : 9 * SECTOR_BYTES + 136] = b"the rest of this sector is in a pack"
            assert opened.read(0, SIZE) == bytes(content)


def test_a_volume_that_cannot_go_over_keeps_no_other_from_it(
    world: World, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume(composer, "vm", (0, noise(1, 9)))
    composer.snapshot("vm", "before")
    write(composer, "vm", (3, noise(2, 1)))
    content = content_of(composer, "vm")
    composer.snapshot("vm", "snap")
    composer.remove("before")
    names = ("clone1", "clone2", "clone3")
    for name in names:
        composer.clone("snap", name)
    opened = [composer.open(composer.find(name)) for name in names]
    rebase = OpenVolume.rebase

    def fails_for_one(self: OpenVolume, sealed: LayerRecord) -> None:
        if self is opened[0]:
            raise StoreError("wanted by the test")
        rebase(self, sealed)

    monkeypatch.setattr(OpenVolume, "rebase", fails_for_one)
    layer = layer_of(composer, "snap").id
    with pytest.raises(StoreError, match="wanted by the test"):
        composer.seal("snap")
    assert layer in data_objects(world)
    composer.reclaim()
    assert layer not in data_objects(world)
    assert [each.read(0, SIZE) for each in opened] == [content] * 3
    assert [each.engine.statistics().layers for each in opened] == [3, 2, 2]
    for each in opened:
        composer.release(each)


def test_what_a_shrink_has_hidden_stays_hidden(world: World, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 2050)))
    composer.snapshot("vm", "first")
    composer.seal("first")
    composer.resize(composer.find("vm"), 7 * SECTOR_BYTES)
    composer.resize(composer.find("vm"), SIZE)
    write(composer, "vm", (1500, noise(2, 4)))
    content = content_of(composer, "vm")
    composer.snapshot("vm", "second")
    composer.seal("second")
    assert content_of(composer, "second") == content
    sealed = layer_of(composer, "second").sealed
    assert sealed is not None
    assert sealed.data_bytes == 11 * SECTOR_BYTES


def test_a_region_in_too_many_pieces_is_cut_afresh(world: World, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 1024)))
    composer.snapshot("vm", "first")
    composer.seal("first")
    write(composer, "vm", *((sector, noise(sector, 1)) for sector in range(0, 1024, 3)))
    content = content_of(composer, "vm")
    composer.snapshot("vm", "second")
    done = composer.seal("second")
    assert done.added_bytes > REGION_BYTES
    assert content_of(composer, "second") == content


def test_everything_that_takes_a_snapshot_takes_a_sealed_one(world: World, composer: Composer) -> None:
    content = volume(composer, "vm", (3, noise(1, 40)))
    composer.snapshot("vm", "snap")
    composer.seal("snap")
    composer.clone("snap", "copy", size=2 * SIZE)
    composer.snapshot("snap", "again")
    write(composer, "vm", (3, noise(2, 1)))
    write(composer, "copy", (4, noise(3, 1)))
    changed = content[: 4 * SECTOR_BYTES] + noise(3, 1) + content[5 * SECTOR_BYTES :] + bytes(SIZE)
    assert content_of(composer, "copy") == changed
    composer.rollback("vm", "snap")
    assert content_of(composer, "vm") == content
    composer.create("target", 0)
    with composer.using(composer.find("snap")) as source, composer.using(composer.find("target")) as target:
        assert composer.copy_range(source, 0, target, 0, SIZE) == SIZE
        assert composer.copy_range(source, SECTOR_BYTES, target, 9 * SECTOR_BYTES, 9 * SECTOR_BYTES)
    moved = content_of(composer, "target")
    assert moved[9 * SECTOR_BYTES : 18 * SECTOR_BYTES] == content[SECTOR_BYTES : 10 * SECTOR_BYTES]
    composer.remove("snap")
    composer.reclaim()
    assert content_of(composer, "again") == content
    assert content_of(composer, "vm") == content
    assert content_of(composer, "copy") == changed


def test_rolling_back_past_sealed_layers(composer: Composer) -> None:
    first = volume(composer, "vm", (0, noise(1, 20)))
    composer.snapshot("vm", "vm@1")
    write(composer, "vm", (5, noise(2, 2)))
    composer.clone("vm", "copy")
    composer.snapshot("copy", "copy@1")
    composer.seal("copy@1")
    composer.reclaim()
    composer.rollback("copy", "vm@1")
    assert content_of(composer, "copy") == first


def test_removing_what_is_sealed_leaves_nothing_but_packs(world: World, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 20)))
    composer.snapshot("vm", "snap")
    composer.seal("snap")
    for name in ("vm", "snap"):
        composer.remove(name)
    composer.reclaim()
    assert [found for _, found in composer.mapper().catalog.list(LayerRecord)] == []
    assert data_objects(world) == set()


def test_clones_made_before_during_and_after_read_the_same(world: World, composer: Composer) -> None:
    content = volume(composer, "vm", (0, noise(1, 1500)))
    composer.snapshot("vm", "snap")
    composer.clone("snap", "before")
    made = []

    def progress(done: int, total: int) -> None:
        if not made:
            composer.clone("snap", "during")
            made.append(composer.open(composer.find("during")))

    composer.seal("snap", progress=progress)
    composer.clone("snap", "after")
    assert made[0].read(0, SIZE) == content
    assert made[0].engine.statistics().layers == 2
    composer.release(made[0])
    assert {content_of(composer, name) for name in ("before", "during", "after")} == {content}


def test_two_seals_of_one_layer_at_once(world: World, composer: Composer) -> None:
    """By two nodes: each reads all of it before either commits."""
    content = volume(composer, "vm", (0, noise(1, 1500)))
    composer.snapshot("vm", "snap")
    other = world.composer(host="two")
    both_read = threading.Barrier(2, timeout=60)
    failed: list[BaseException] = []

    def seal(one: Composer) -> None:
        waited = False

        def progress(done: int, total: int) -> None:
            nonlocal waited
            if not waited:
                waited = True
                both_read.wait()

        try:
            one.seal("snap", progress=progress)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=seal, args=(one,)) for one in (composer, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert content_of(composer, "snap") == content
    assert content_of(other, "snap") == content
    record = layer_of(composer, "snap")
    assert record.sealed is not None
    assert record.sealing is None


def test_a_seal_that_is_stopped_is_gone_on_with(world: World, composer: Composer) -> None:
    content = volume(composer, "vm", *((region * 1024, noise(region, 1024)) for region in range(12)), size=12 << 22)
    composer.snapshot("vm", "snap")

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total >= 12 << 22
        if done > 6 << 22:
            raise StoppedError

    store = composer.sealed_store(composer.mapper()).chunks
    store.pack_bytes = 4 << 20
    with pytest.raises(StoppedError):
        composer.seal("snap", progress=stop)
    assert layer_of(composer, "snap").sealed is None
    assert content_of(composer, "snap") == content
    assert composer.seal("snap").added_bytes < 8 << 22
    assert content_of(composer, "snap") == content


def test_a_volume_that_is_removed_while_it_is_sealed(composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 20)))
    composer.snapshot("vm", "snap")

    def remove(done: int, total: int) -> None:
        for name in ("snap", "vm"):
            composer.remove(name)
        composer.reclaim()

    with pytest.raises(NotFound):
        composer.seal("snap", progress=remove)


def test_a_snapshot_that_is_removed_before_its_turn_comes(composer: Composer) -> None:
    """Its layer is gone by then, which is no damage of the store."""
    volume(composer, "vm", (0, noise(1, 20)))
    composer.snapshot("vm", "first")
    write(composer, "vm", (9, noise(2, 1)))
    composer.snapshot("vm", "second")

    def remove(done: int, total: int) -> None:
        for name in ("second", "vm"):
            composer.remove(name)
        composer.reclaim()

    with pytest.raises(NotFound, match="second has just been removed"):
        composer.seal("second", progress=remove)
    assert layer_of(composer, "first").sealed is not None


def test_a_volume_of_another_node_is_left_alone(world: World, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 20)))
    composer.snapshot("vm", "snap")
    with composer.using(composer.find("vm")):
        other = world.composer(host="two")
        with pytest.raises(LockHeld):
            other.seal("vm")
        assert other.seal("snap").layers == 1  # whose layer nobody writes
        assert content_of(composer, "vm") == content_of(other, "snap")


def test_a_reader_whose_layer_another_node_seals_reads_on(world: World, composer: Composer) -> None:
    content = volume(composer, "vm", (0, noise(1, 20)))
    composer.snapshot("vm", "snap")
    other = world.composer(host="two")
    with other.using(other.find("snap")) as opened:
        composer.seal("snap")
        composer.reclaim()
        assert opened.read(0, SIZE) == content
    assert content_of(other, "snap") == content


def test_opening_looks_again_when_a_layer_was_sealed_in_between(world: World) -> None:
    composer = world.composer()
    content = volume(composer, "vm", (0, noise(1, 20)))
    composer.snapshot("vm", "snap")
    sealed_in_between: list[str] = []

    class SealsFirst(FaultBlocker):
        """Seals the layer when somebody has read its record and is about to open its objects."""

        def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
            if not sealed_in_between:
                sealed_in_between.append(key)
                composer.seal("snap")
            return super().open_data(key, writable=writable, claim=claim)

    reader = world.composer(SealsFirst(world.store), host="two")
    assert content_of(reader, "snap") == content
    assert sealed_in_between


def test_a_map_of_a_terabyte_with_little_in_it(world: World, composer: Composer) -> None:
    size = 1 << 40
    composer.create("vm", size)
    places = [0, 5 << 22, 700 << 30, size - SECTOR_BYTES]
    with composer.using(composer.find("vm")) as opened:
        for place in places:
            opened.write(place, pattern(place))
        composer.snapshot("vm", "snap")
        assert composer.seal("snap").read_bytes == len(places) * SECTOR_BYTES
        assert [opened.read(place, SECTOR_BYTES) for place in places] == [pattern(place) for place in places]
        assert opened.engine.seek_data(6 << 22) == 700 << 30
        assert opened.engine.seek_hole(0) == SECTOR_BYTES


def test_an_import_goes_straight_to_packs(world: World, composer: Composer, tmp_path: Path) -> None:
    path = tmp_path / "image"
    with open(path, "wb") as stream:
        stream.truncate(40 << 20)
        stream.seek(7 << 20)
        stream.write(noise(1, 100) + b"end")
    with SparseFile(path) as file:
        made = composer.import_sealed("vm", file.size, file, about_bytes=file.data_bytes())
    assert made.made.record.size == 40 << 20
    assert made.data_bytes == 101 * SECTOR_BYTES
    assert content_of(composer, "vm") == path.read_bytes()
    assert len(data_objects(world)) == 1, "the head's, and no other"
    with SparseFile(path) as file:
        again = composer.import_sealed("vm2", file.size, file, about_bytes=file.data_bytes())
    assert again.added_bytes == 0
    fill(composer, "vm2", b"written")
    assert content_of(composer, "vm2") == b"written" + path.read_bytes()[7:]


def test_an_empty_file_cannot_be_imported(composer: Composer, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with SparseFile(tmp_path / "empty") as file, pytest.raises(InvalidInput):
        composer.import_sealed("vm", file.size, file, about_bytes=0)


def test_layers_that_were_frozen_before_a_volume_was_opened_are_sealed_beneath_it(composer: Composer) -> None:
    content = volume(composer, "vm", (0, noise(1, 300)))
    composer.snapshot("vm", "snap")
    with composer.using(composer.find("vm")) as opened:
        composer.seal("snap")
        assert opened.engine.statistics().layers == 2
        assert opened.read(0, SIZE) == content
        assert [each.sealed is not None for each in composer.mapper().catalog.chain(opened.record.layer)] == [
            False,
            True,
        ]


def test_hundreds_of_snapshots_sealed_cost_reads_nothing(composer: Composer) -> None:
    volume(composer, "vm", (0, noise(0, 4)))
    with composer.using(composer.find("vm")) as opened:
        for number in range(400):
            opened.write(number * SECTOR_BYTES, noise(number, 1))
            composer.snapshot("vm", f"vm@{number}")
        content = opened.read(0, SIZE)
        assert composer.seal("vm").layers == 400
        assert opened.engine.statistics().layers == 2
        assert opened.read(0, SIZE) == content
    assert content_of(composer, "vm@200")[: 201 * SECTOR_BYTES] == content[: 201 * SECTOR_BYTES]
