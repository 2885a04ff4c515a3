"""Reading sealed layers: out of packs by descriptor and through the object cache, beside damage, and without caches."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from archipfs.blockers.contract import Blocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.blockers.registry import create_blocker
from archipfs.compose.composer import Backends, Composer
from archipfs.compose.sealed import SealedStore
from archipfs.errors import ObjectDamaged, StoreError, StoreUnavailable
from archipfs.map.catalog import STORE_IDENT, Catalog
from archipfs.map.packs import Coding, Kind
from archipfs.map.pages import Extent, encode_leaf
from archipfs.map.records import DamageRecord, LayerRecord
from archipfs.map.tree import Tree
from archipfs.types import REGION_BYTES, SECTOR_BYTES, Digest, PackId
from tests.compose.world import World, content_of

SECTORS = 1500


def noise(seed: int, sectors: int) -> bytes:
    """Which zstd makes half as large."""
    return b"".join(random.Random(seed * 10000 + number).randbytes(SECTOR_BYTES // 2) * 2 for number in range(sectors))


def make_world(directory: Path, driver: str, hash_name: str, compression: str) -> World:
    blocker: Blocker = MemoryBlocker() if driver == "memory" else create_blocker(driver, {"path": str(directory / "s")})
    world = World(directory / "nodes", blocker)
    catalog = Catalog(blocker)
    found = catalog.store()
    assert found is not None
    record = msgspec.structs.replace(found.record, hash=hash_name, compression=compression)
    catalog.put(record, STORE_IDENT, found.version)
    return world


KINDS = [
    ("file", "blake3", "none"),
    ("file", "sha256", "zstd"),
    ("memory", "blake3", "none"),
    ("memory", "xxh3-128", "zstd"),
]


@pytest.fixture(params=KINDS, ids=["-".join(kind) for kind in KINDS])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return make_world(tmp_path, *request.param)


@pytest.fixture
def composer(world: World) -> Iterator[Composer]:
    composer = world.composer()
    yield composer
    composer.close_all()


def sealed_snapshot(composer: Composer) -> bytes:
    composer.create("vm", SECTORS * SECTOR_BYTES)
    content = noise(1, SECTORS // 2) + bytes(REGION_BYTES // 2)
    content = (content + noise(2, 100)).ljust(SECTORS * SECTOR_BYTES, b"\0")
    with composer.using(composer.find("vm")) as opened:
        opened.write(0, content)
    composer.snapshot("vm", "snap")
    composer.seal("snap")
    return content


def store_of(composer: Composer) -> SealedStore:
    return composer.sealed_store(composer.mapper())


def test_every_range_reads_right(composer: Composer) -> None:
    content = sealed_snapshot(composer)
    choose = random.Random(3)
    with composer.using(composer.find("snap")) as opened:
        for _ in range(300):
            offset = choose.randrange(len(content))
            length = choose.choice((1, 512, SECTOR_BYTES, 100_000))
            assert opened.read(offset, length) == content[offset : offset + length]


def test_a_node_without_caches_reads_the_same(world: World, composer: Composer) -> None:
    content = sealed_snapshot(composer)
    assert content_of(world.composer(), "snap") == content


def test_caches_that_are_deleted_come_back(world: World, composer: Composer) -> None:
    content = sealed_snapshot(composer)
    mapper = world.mapper()
    for _ in range(2):
        stores, close = world.sealed_stores(mapper)
        directory = next(iter(stores.values()))._shared.directory
        reader = Composer(Backends({"default": mapper}, stores, composer._live["default"], "default"))
        assert content_of(reader, "snap") == content
        assert directory.exists()
        close()
        shutil.rmtree(directory, ignore_errors=True)


def test_packs_are_learned_ahead_of_the_first_read(world: World, composer: Composer) -> None:
    untouched = world.composer(host="three")
    untouched.learn_packs()
    assert not store_of(untouched)._shared.directory.exists()

    content = sealed_snapshot(composer)
    node = world.composer(host="two")
    node.end_seals()  # cut short: nothing is lost
    node.learn_packs()
    assert content_of(node, "snap") == content

    node = world.composer(host="four")
    node.learn_packs()
    assert store_of(node)._shared.directory.exists()
    assert store_of(node).chunks.packs() == store_of(composer).chunks.packs()
    assert content_of(node, "snap") == content


def test_a_store_that_does_not_answer_is_no_matter_before_somebody_reads(
    world: World, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = sealed_snapshot(composer)
    node = world.composer(host="two")

    def fail(*_: object) -> None:
        raise StoreUnavailable("the store does not answer; try again")

    with monkeypatch.context() as silent:
        silent.setattr(world.store, "get", fail)
        node.learn_packs()
        with pytest.raises(StoreUnavailable):
            content_of(node, "snap")
    assert content_of(node, "snap") == content


def chunks_of(composer: Composer) -> list[tuple[PackId, bytes, Coding]]:
    store = store_of(composer).chunks
    return [
        (pack, entry.digest, entry.coding)
        for pack in store.packs()
        for entry in store.index(pack).entries
        if entry.kind is Kind.CHUNK
    ]


def test_only_what_is_known_to_be_damaged_fails(world: World, composer: Composer) -> None:
    content = sealed_snapshot(composer)
    pack, digest, _ = chunks_of(composer)[3]
    Catalog(world.store).put(DamageRecord(pack, [digest.hex()]), pack, None)
    reader = world.composer()
    failed = 0
    with reader.using(reader.find("snap")) as opened:
        for offset in range(0, len(content), SECTOR_BYTES):
            try:
                assert opened.read(offset, SECTOR_BYTES) == content[offset : offset + SECTOR_BYTES]
            except StoreError:
                failed += 1
    assert 1 <= failed <= 128


def test_after_packs_were_collected_chunks_are_found_where_they_went(world: World, composer: Composer) -> None:
    """Both by who collected them and by another node, which has all of it open."""
    content = sealed_snapshot(composer)
    other = world.composer(host="two")
    with composer.using(composer.find("snap")) as mine, other.using(other.find("snap")) as theirs:
        assert mine.read(0, len(content)) == theirs.read(0, len(content)) == content
        store = store_of(composer).chunks
        old = store.packs()
        copy_all(composer)
        for pack in old:
            world.store.delete(f"pack/{pack}")
        store_of(composer).forget(old)
        assert mine.read(0, len(content)) == content
        assert theirs.read(0, len(content)) == content
    fresh = world.composer(host="two")
    assert content_of(fresh, "snap") == content


def copy_all(composer: Composer) -> None:
    """Everything that the packs have, in other packs: those that there are count as condemned meanwhile."""
    store = store_of(composer).chunks
    marks = store._marks
    with store.session() as session:
        store._marks = marks._replace(condemned=frozenset(store.packs()))
        for pack in store.packs():
            for entry in store.index(pack).entries:
                data = store.read(entry.digest)
                if entry.kind is Kind.PAGE:
                    session.add_page(data)
                else:
                    session.add_chunk(entry.digest, data)
        session.flush()
    store._marks = marks


def test_sealed_volumes_are_copied_and_written_like_others(composer: Composer) -> None:
    content = bytearray(sealed_snapshot(composer))
    composer.create("target", SECTORS * SECTOR_BYTES)
    with composer.using(composer.find("snap")) as source, composer.using(composer.find("target")) as target:
        done = 0
        while done < len(content):
            done += composer.copy_range(source, done, target, done, len(content) - done)
        assert target.read(0, len(content)) == bytes(content)
    with composer.using(composer.find("vm")) as opened:
        opened.write(5000, b"within a sector whose rest is in a pack")
        content[5000:5039] = b"within a sector whose rest is in a pack"
        assert opened.read(0, len(content)) == bytes(content)


def test_open_packs_are_bounded(world: World, composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(composer)
    store.chunks.pack_bytes = 64 << 10
    monkeypatch.setattr("archipfs.compose.sealed.PACKS_OPEN_MAX", 3)
    monkeypatch.setattr("archipfs.compose.sealed.PACKS_OPENED_MAX", 7)
    content = sealed_snapshot(composer)
    assert len(store.chunks.packs()) > 10
    for _ in range(2):
        assert content_of(composer, "snap") == content
    assert len(store._packs) <= 3


def know_only_pages(store: SealedStore) -> None:
    """As after many other reads: the pages are still in LMDB, what they were resolved to is not in memory any more."""
    store.chunks.cache.regions_forget()
    store._shared.table.forget()
    store._drop_packs()


@pytest.mark.parametrize("resolved", [False, True])
def test_a_stale_index_is_refreshed_before_a_read_fails(world: World, composer: Composer, resolved: bool) -> None:
    """Another node collected the packs while this one had only pages, or resolved regions too, in its cache."""
    content = sealed_snapshot(composer)
    other = world.composer(host="two")
    with other.using(other.find("snap")) as theirs:
        assert theirs.read(0, len(content)) == content
        blobs = dict(world_regions(store_of(other)))
        know_only_pages(store_of(other))
        for leaf, blob in blobs.items() if resolved else ():
            store_of(other).chunks.region_put(leaf, blob, store_of(other).chunks.regions_ticket())
        old = store_of(composer).chunks.packs()
        copy_all(composer)
        for pack in old:
            world.store.delete(f"pack/{pack}")
        assert theirs.read(0, len(content)) == content
    other.close_all()


def world_regions(store: SealedStore) -> Iterator[tuple[Digest, bytes]]:
    for layer in (record for _, record in store._mapper.catalog.list(LayerRecord) if record.record.sealed is not None):
        assert layer.record.sealed is not None
        for _, leaf in Tree(store.chunks.page, Digest(bytes.fromhex(layer.record.sealed.root))).regions():
            blob = store.chunks.region_get(leaf)
            assert blob is not None
            yield leaf, blob


def test_many_lost_chunks_cost_one_look_into_the_store(world: World, composer: Composer) -> None:
    content = sealed_snapshot(composer)
    other = world.composer(host="two")
    with other.using(other.find("snap")) as theirs:
        assert theirs.read(0, len(content)) == content
        store = store_of(other)
        know_only_pages(store)
        for pack in store.chunks.packs():
            if any(entry.kind is Kind.CHUNK for entry in store.chunks.index(pack).entries):
                world.store.delete(f"pack/{pack}")
        store.chunks.refresh()
        before = store.chunks._refreshes_begun
        with pytest.raises(StoreError):
            theirs.read(0, SECTOR_BYTES)
        assert store.chunks._refreshes_begun - before <= 2
    other.close_all()


def test_an_extent_beyond_its_chunk_is_damage_and_never_the_chunk_behind(composer: Composer) -> None:
    sealed_snapshot(composer)
    store = store_of(composer)
    chunk, behind = noise(70, 1), noise(71, 4)
    with store.chunks.session() as session:
        for data in (chunk, behind):
            session.add_chunk(store.chunks.hash.digest(data), data)
        extents = [Extent(0, 2, store.chunks.hash.digest(chunk), 0)]
        leaf = session.add_page(encode_leaf(extents, store.chunks.hash.digest_bytes))
        session.flush()
    with pytest.raises(ObjectDamaged, match="4096 bytes only"):
        store.region(leaf)


def test_a_volume_that_holds_a_page_of_a_map_is_read(composer: Composer) -> None:
    """The page is stored, so that the chunk that equals it is not; and pages are not on sector borders."""
    sealed_snapshot(composer)
    chunks = store_of(composer).chunks
    digest_bytes = chunks.hash.digest_bytes
    count = (SECTOR_BYTES - 16) // (8 + digest_bytes)
    assert 16 + count * (8 + digest_bytes) == SECTOR_BYTES
    page = encode_leaf([Extent(2 * at, 1, Digest(bytes(digest_bytes)), 0) for at in range(count)], digest_bytes)
    with chunks.session() as session:
        session.add_page(b"something before")
        session.add_page(page)
        session.flush()
    composer.create("other", SECTOR_BYTES)
    with composer.using(composer.find("other")) as opened:
        opened.write(0, page)
    composer.snapshot("other", "of a page")
    composer.seal("of a page")
    assert chunks.locate(chunks.hash.digest(page)).kind is Kind.PAGE
    assert content_of(composer, "of a page") == page


def test_a_pack_of_a_wrong_size_harms_only_what_lies_in_it(tmp_path: Path) -> None:
    world = make_world(tmp_path, "file", "blake3", "none")
    composer = world.composer()
    store_of(composer).chunks.pack_bytes = 512 << 10
    content = sealed_snapshot(composer)
    chunks = store_of(composer).chunks
    assert len(chunks.packs()) > 3
    for number, pack in enumerate(chunks.packs()):
        whole = world.store.get(f"pack/{pack}")
        replace_pack(world.store, pack, whole + bytes(SECTOR_BYTES))
        other = world.composer(host=f"node{number}")
        failed = 0
        with other.using(other.find("snap")) as opened:
            for offset in range(0, len(content), SECTOR_BYTES):
                try:
                    assert opened.read(offset, SECTOR_BYTES) == content[offset : offset + SECTOR_BYTES]
                except StoreError:
                    failed += 1
        other.close_all()
        assert 1 <= failed <= len(whole) // SECTOR_BYTES
        replace_pack(world.store, pack, whole)
    composer.close_all()


def replace_pack(blocker: Blocker, pack: PackId, content: bytes) -> None:
    blocker.delete(f"pack/{pack}")
    blocker.put(f"pack/{pack}", content)


def test_a_collision_between_backends_does_not_pass_through_the_object_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = [make_world(tmp_path / name, "memory", "xxh3-128", "zstd") for name in "ab"]
    composers = [each.composer() for each in worlds]
    one, other = (store_of(each) for each in composers)
    monkeypatch.setattr(other, "_shared", one._shared)
    digest = Digest(bytes(16))
    for store, content in ((one, b"x" * SECTOR_BYTES), (other, b"y" * SECTOR_BYTES)):
        monkeypatch.setattr(store.chunks, "read", lambda _, content=content: content)
        for _ in range(2):
            assert store.read_chunk(digest, 0, SECTOR_BYTES) == content
    monkeypatch.undo()
    for each in composers:
        each.close_all()
