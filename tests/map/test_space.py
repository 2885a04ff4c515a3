"""Accounts against what removing a volume does free, and against sets of whole digests."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.engine import format_bitmap
from archipfs.map.locks import Node
from archipfs.map.mapper import Attributes, Mapper, create_store
from archipfs.map.packs import Kind
from archipfs.map.pages import decode_leaf
from archipfs.map.records import LayerRecord, VolumeRecord
from archipfs.map.space import Accountant, Space, VolumeSpace, stacks
from archipfs.map.tree import Tree
from archipfs.types import SECTOR_BYTES, Digest, LayerId
from tests.lib.searching import searching
from tests.map.sealing import NODE, Content, Sealer, chunk_of, sealer


@pytest.fixture
def blocker() -> MemoryBlocker:
    blocker = MemoryBlocker(pack_bytes=64 << 10)
    create_store(blocker)
    return blocker


@pytest.fixture
def mapper(blocker: MemoryBlocker) -> Mapper:
    return Mapper("default", blocker, Node(NODE, "host"), format_bitmap)


@pytest.fixture
def node(blocker: MemoryBlocker, tmp_path: Path) -> Iterator[Sealer]:
    with sealer(blocker, tmp_path / "cache") as node:
        yield node


def digests_of(node: Sealer, root: Digest) -> set[Digest]:
    """All pages and chunks of a map."""
    found = {digest for digest, _ in Tree(node.store.page, root).pages(set())}
    for _, leaf in Tree(node.store.page, root).regions():
        found |= {extent.digest for extent in decode_leaf(node.store.page(leaf))}
    return found


def sizes_of(node: Sealer) -> dict[Digest, tuple[int, int]]:
    """Stored bytes of each digest, and raw bytes if it is a chunk."""
    return {
        entry.digest: (entry.stored_bytes, entry.raw_bytes if entry.kind is Kind.CHUNK else 0)
        for pack in node.store.packs()
        for entry in node.store.index(pack).entries
    }


contents = st.dictionaries(
    st.sampled_from([0, 1, 255, 256, 70_000]), st.lists(st.integers(0, 9), max_size=3), max_size=4
)


@given(st.lists(st.tuples(contents, st.integers(-1, 3)), min_size=1, max_size=5), st.booleans())
@searching(30)
def test_an_account_is_what_sets_of_digests_say(maps: list[tuple[Content, int]], compressed: bool) -> None:
    """Maps on top of each other and beside each other."""
    with (
        tempfile.TemporaryDirectory() as directory,
        sealer(
            MemoryBlocker(pack_bytes=64 << 10), Path(directory), compression="zstd" if compressed else "none"
        ) as node,
    ):
        roots: list[Digest] = []
        for content, below in maps:
            base = roots[below % len(roots)] if roots and below >= 0 else None
            roots.append(node.root(node.seal(content, base=base)))
        accountant = Accountant(node.store)
        sizes = sizes_of(node)
        for chosen in (set(roots), set(roots[:1]), set(roots)):
            account = accountant.account(chosen)
            assert account is not None
            reach = {root: digests_of(node, root) for root in chosen}
            every = set().union(*reach.values())
            for root in chosen:
                others = set().union(*(reach[other] for other in chosen if other != root))
                assert account.exclusive[root] == sum(sizes[digest][0] for digest in reach[root] - others)
                assert accountant.reach(root) == sum(sizes[digest][0] for digest in reach[root])
            assert account.live_bytes == sum(sizes[digest][0] for digest in every)
            assert account.unique_bytes == sum(sizes[digest][1] for digest in every)
            assert account.chunk_bytes == sum(sizes[digest][0] for digest in every if sizes[digest][1])
            assert account.reclaimable_bytes == sum(stored for stored, _ in sizes.values()) - account.live_bytes


def test_each_page_is_read_a_few_times_however_many_snapshots_have_it(node: Sealer) -> None:
    layer = node.seal({region: [region] for region in range(40)})
    roots = [node.root(layer)]
    for number in range(20):
        roots.append(node.root(node.seal({number: [100 + number]}, base=roots[-1])))
    fetched: list[Digest] = []
    page = node.store.page

    def counting(digest: Digest) -> bytes:
        fetched.append(digest)
        return page(digest)

    node.store.page = counting  # type: ignore[method-assign]
    accountant = Accountant(node.store)
    assert accountant.account(set(roots)) is not None
    assert max(fetched.count(digest) for digest in set(fetched)) <= 2
    fetched.clear()
    assert accountant.account(set(roots)) is not None
    assert not fetched, "nothing has changed"


def test_what_is_too_large_to_count_is_not_counted(node: Sealer) -> None:
    root = node.root(node.seal({region: [1] for region in range(3)} | {3: [2]}))
    assert Accountant(node.store, leaves_max=1).account({root}) is None
    assert Accountant(node.store, leaves_max=2).account({root}) is not None


def test_an_empty_store_has_nothing(node: Sealer) -> None:
    account = Accountant(node.store).account(set())
    assert account is not None
    assert (account.live_bytes, account.pack_bytes, account.reclaimable_bytes) == (0, 0, 0)


# Volumes


def add_volume(mapper: Mapper, name: str, layer: LayerId | None) -> VolumeRecord:
    """A volume whose head, which is empty, lies on a layer."""
    record = mapper.create(name, 1 << 30, Attributes()).record
    if layer is not None:
        head = mapper.catalog.layer(record.layer)
        on_layer = msgspec.structs.replace(head.record, parent=layer, parent_visible=1 << 30)
        mapper.catalog.put(on_layer, record.layer, head.version)
    return record


def write(mapper: Mapper, record: VolumeRecord, sectors: int) -> None:
    data = mapper.blocker.open_data(f"layer/{record.layer}", writable=True)
    data.pwrite(0, b"x" * SECTOR_BYTES * sectors)
    data.close()


def test_what_a_volume_has_for_itself_is_what_removing_it_frees(mapper: Mapper, node: Sealer) -> None:
    common = {0: [1, 2, 3]}
    layers = [node.seal(common | {5: [4, 5]}), node.seal(common | {6: [6]})]
    records = [add_volume(mapper, f"vm{number}", layer) for number, layer in enumerate(layers)]
    accountant = Accountant(node.store)
    space = Space(mapper.catalog, mapper.blocker, lambda: accountant)
    before = space.account()
    told = space.of_volume(records[0])
    assert before is not None
    assert told is not None
    assert told.exclusive_bytes > sum(len(chunk_of(number)) for number in (4, 5))
    assert told.shared_bytes >= sum(len(chunk_of(number)) for number in (1, 2, 3))
    mapper.remove(records[0].id)
    after = Space(mapper.catalog, mapper.blocker, lambda: accountant).account()
    assert after is not None
    assert before.live_bytes - after.live_bytes == told.exclusive_bytes
    assert after.reclaimable_bytes - before.reclaimable_bytes == told.exclusive_bytes


def test_a_map_that_two_volumes_read_is_shared(mapper: Mapper, node: Sealer) -> None:
    layer = node.seal({0: [1, 2]})
    records = [add_volume(mapper, name, layer) for name in ("one", "two")]
    write(mapper, records[0], 3)
    space = Space(mapper.catalog, mapper.blocker, lambda: Accountant(node.store))
    first, second = (space.of_volume(record) for record in records)
    assert first is not None
    assert second is not None
    assert first.exclusive_bytes == 3 * SECTOR_BYTES
    assert second == VolumeSpace(0, first.shared_bytes)
    assert second.shared_bytes > len(chunk_of(1)) + len(chunk_of(2))
    mapper.remove(records[1].id)
    alone = Space(mapper.catalog, mapper.blocker, lambda: Accountant(node.store)).of_volume(records[0])
    assert alone == VolumeSpace(first.exclusive_bytes + first.shared_bytes, 0)


def test_an_unsealed_layer_counts_for_whoever_reads_it_alone(mapper: Mapper) -> None:
    below = add_volume(mapper, "below", None)
    write(mapper, below, 5)
    above = add_volume(mapper, "above", below.layer)
    write(mapper, above, 2)

    def nobody_is_asked() -> Accountant:
        raise AssertionError("nothing is sealed, so no index is needed")

    space = Space(mapper.catalog, mapper.blocker, nobody_is_asked)
    assert space.of_volume(below) == VolumeSpace(0, 5 * SECTOR_BYTES)
    assert space.of_volume(above) == VolumeSpace(2 * SECTOR_BYTES, 5 * SECTOR_BYTES)
    assert space.unsealed_bytes == 7 * SECTOR_BYTES
    assert space.sealed_bytes == 0


def test_a_stack_ends_at_the_sealed_layer_and_stands_gaps(node: Sealer, mapper: Mapper) -> None:
    layer = node.seal({0: [1]})
    record = add_volume(mapper, "vm", layer)
    layers = {LayerId(ident): found.record for ident, found in mapper.catalog.list(LayerRecord)}
    assert stacks([record], layers)[record.id].sealed == layer
    del layers[layer]
    assert stacks([record], layers)[record.id].sealed is None
