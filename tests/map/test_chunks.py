"""The store of chunks: what went in comes out, whatever crashes, goes away or is damaged meanwhile."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from archipfs.blockers.contract import Blocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import InvalidInput, ObjectDamaged, ObjectMissing, StoreError
from archipfs.map.cache import Cache
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import ChunkStore, Session, Swept, pack_key
from archipfs.map.hashes import ContentHash, content_hash
from archipfs.map.packs import Coding, Kind
from archipfs.map.records import CondemnedRecord, DamageRecord
from archipfs.types import SECTOR_BYTES, Digest, PackId

NODE = "0123456789abcdef" * 2
BLAKE3 = content_hash("blake3")
XXH3 = content_hash("xxh3-128")
PACK_BYTES = 40_000


class Node:
    """One node: a cache of its own on a store that others may use too."""

    def __init__(self, blocker: Blocker, path: Path, **options: object) -> None:
        self.cache = Cache(path)
        hash_: ContentHash = options.pop("hash", BLAKE3)  # type: ignore[assignment]
        self.store = ChunkStore(blocker, self.cache, hash_, node=NODE, **{"pack_bytes": PACK_BYTES} | options)  # type: ignore[arg-type]


@pytest.fixture
def blocker() -> MemoryBlocker:
    return MemoryBlocker()


class Nodes:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: list[Node] = []

    def __call__(self, blocker: Blocker, name: str = "a", **options: object) -> ChunkStore:
        node = Node(blocker, self._path / name, **options)
        self._made.append(node)
        return node.store

    def stop(self) -> None:
        for node in self._made:
            node.cache.close()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.stop()


def chunk(seed: int, sectors: int = 2) -> bytes:
    return random.Random(seed).randbytes(sectors * SECTOR_BYTES)


def add(session: Session, data: bytes, hash_: ContentHash = BLAKE3) -> Digest:
    digest = hash_.digest(data)
    session.add_chunk(digest, data)
    return digest


def store_all(store: ChunkStore, chunks: list[bytes]) -> list[Digest]:
    with store.session() as session:
        digests = [add(session, data, store.hash) for data in chunks]
        session.flush()
        session.verify()
    return digests


def damage(blocker: MemoryBlocker, pack: PackId, offset: int) -> None:
    content = bytearray(blocker.get(pack_key(pack)))
    content[offset] ^= 1
    blocker.delete(pack_key(pack))
    blocker.put(pack_key(pack), bytes(content))


def condemn(blocker: Blocker, pack: PackId) -> None:
    Catalog(blocker).put(CondemnedRecord(pack, NODE, 1), pack, None)


def test_what_was_stored_is_read(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    chunks = [chunk(seed, 1 + seed % 5) for seed in range(30)]
    with store.session() as session:
        digests = [add(session, data) for data in chunks]
        page = session.add_page(b"a page of any length")
        session.flush()
        assert (session.added_chunks, session.hit_chunks) == (31, 0)
        assert session.added_bytes == sum(map(len, chunks)) + 20
    assert [store.read(digest) for digest in digests] == chunks
    assert store.page(page) == b"a page of any length"
    assert len(store.packs()) > 3
    for place, data in zip(store.locate_all(digests), chunks, strict=True):
        assert blocker.get(pack_key(place.pack), place.offset, place.stored_bytes) == data
        assert place.offset % SECTOR_BYTES == 0
        assert (place.kind, place.coding, place.raw_bytes) == (Kind.CHUNK, Coding.RAW, len(data))


def test_packs_are_about_as_large_as_wished(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    store_all(store, [chunk(seed) for seed in range(40)])
    sizes = [len(blocker.get(key)) for key in blocker.list("pack")]
    assert sum(size >= PACK_BYTES for size in sizes) >= len(sizes) - 1
    assert max(sizes) < PACK_BYTES + 3 * SECTOR_BYTES
    assert nodes(MemoryBlocker(pack_bytes=77), "b", pack_bytes=None).pack_bytes == 77


def test_the_same_is_stored_once(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    data = chunk(1)
    with store.session() as session:
        assert session.add_chunk(BLAKE3.digest(data), data)
        assert not session.add_chunk(BLAKE3.digest(data), bytearray(data))
        session.flush()
        assert not session.add_chunk(BLAKE3.digest(data), memoryview(data))
        session.flush()
        assert (session.added_chunks, session.hit_chunks) == (1, 2)
    with store.session() as session:
        assert not session.add_chunk(BLAKE3.digest(data), data)
        session.flush()
        assert session.added_bytes == 0
    assert len(list(blocker.list("pack"))) == 1


def test_another_node_finds_it_and_rebuilds_its_index_with_progress(blocker: MemoryBlocker, nodes: Nodes) -> None:
    chunks = [chunk(seed) for seed in range(100)]
    digests = store_all(nodes(blocker), chunks)
    other = nodes(blocker, "b")
    seen: list[tuple[int, int]] = []
    other.refresh(lambda done, total: seen.append((done, total)))
    count = len(list(blocker.list("pack")))
    assert count > 16
    assert seen[-1] == (count, count)
    assert seen == sorted(seen)
    assert other.packs() == nodes(blocker, "c").packs() | other.packs()
    assert [other.read(digest) for digest in digests] == chunks


def test_a_miss_refreshes_once(blocker: MemoryBlocker, nodes: Nodes) -> None:
    first, second = nodes(blocker), nodes(blocker, "b")
    digests = store_all(first, [chunk(1), chunk(2)])
    assert second.locate(digests[0]) == first.locate(digests[0])
    more = store_all(first, [chunk(3)])
    assert second.read(more[0]) == chunk(3)
    with pytest.raises(ObjectMissing, match="in no pack"):
        second.locate(BLAKE3.digest(b"nothing"))
    with pytest.raises(ObjectMissing):
        second.read(BLAKE3.digest(b"nothing"))


def test_a_pack_that_another_node_deleted_is_missing_never_other_bytes(blocker: MemoryBlocker, nodes: Nodes) -> None:
    first, second = nodes(blocker), nodes(blocker, "b")
    digests = store_all(first, [chunk(1), chunk(2)])
    place = second.locate(digests[0])
    second.region_put(digests[0], b"resolved")
    blocker.delete(pack_key(place.pack))
    with pytest.raises(ObjectMissing):
        second.open_pack(place.pack)
    assert second.region_get(digests[0]) is None
    assert second.packs() == set()
    with pytest.raises(ObjectMissing):
        first.read(digests[1])
    assert first.packs() == set()
    moved = store_all(second, [chunk(1)])
    assert moved == digests[:1]
    assert first.read(digests[0]) == chunk(1)


def test_a_pack_is_opened_only_at_its_size(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    digest = store_all(store, [chunk(1)])[0]
    place = store.locate(digest)
    data = store.open_pack(place.pack)
    assert data.pread(place.offset, place.stored_bytes) == chunk(1)
    data.close()
    content = blocker.get(pack_key(place.pack))
    blocker.delete(pack_key(place.pack))
    blocker.put(pack_key(place.pack), content[:-1])
    for reader in (store, nodes(blocker, "b")):
        with pytest.raises(ObjectDamaged, match=place.pack):
            reader.open_pack(place.pack)


# Damage


def test_a_damaged_chunk_is_an_error_and_harms_no_other(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    digests = store_all(store, [chunk(1), chunk(2)])
    place = store.locate(digests[0])
    damage(blocker, place.pack, place.offset + 100)
    with pytest.raises(ObjectDamaged, match=place.pack):
        store.read(digests[0])
    assert store.read(digests[1]) == chunk(2)


def test_a_damaged_head_is_reported_and_keeps_no_other_pack_out(blocker: MemoryBlocker, nodes: Nodes) -> None:
    digests = store_all(nodes(blocker), [chunk(seed) for seed in range(20)])
    for offset in (0, 9, 4096 + 5):
        bad = sorted(blocker.list("pack"))[offset % 3].partition("/")[2]
        damage(blocker, PackId(bad), offset)
        store = nodes(blocker, f"b{offset}")
        store.refresh()
        assert set(store.damaged_packs) == {bad}
        assert bad in store.damaged_packs[PackId(bad)]
        assert len(store.packs()) == len(list(blocker.list("pack"))) - 1
        lost = 0
        for seed, digest in enumerate(digests):
            try:
                assert store.read(digest) == chunk(seed)
            except ObjectMissing:
                lost += 1
                with pytest.raises(ObjectMissing, match="1 of which cannot be read"):
                    store.locate(digest)
        assert 0 < lost < 20
        damage(blocker, PackId(bad), offset)
        store.refresh()
        assert store.damaged_packs == {}
        assert [store.read(digest) for digest in digests] == [chunk(seed) for seed in range(20)]


def test_a_copy_is_read_where_one_is_damaged_or_gone(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    digest = store_all(store, [chunk(1)])[0]
    # Another node, which had not heard of the first pack.
    other = nodes(blocker, "b", pack_bytes=1)
    assert store_all(other, [chunk(1)]) == [digest]
    store.refresh()
    places = [store.locate(digest)]
    assert len(store.packs()) == 2
    damage(blocker, places[0].pack, places[0].offset)
    assert store.read(digest) == chunk(1)
    blocker.delete(pack_key(places[0].pack))
    assert store.read(digest) == chunk(1)
    assert len(store.packs()) == 1


def test_known_damage_is_avoided_and_said(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    digest = store_all(store, [chunk(1)])[0]
    bad = store.locate(digest).pack
    store.region_put(digest, b"resolved")
    version = Catalog(blocker).put(DamageRecord(bad, [digest.hex()]), bad, None).version
    store.refresh()
    assert store.region_get(digest) is None
    for ask in (store.locate, store.read):
        with pytest.raises(ObjectDamaged, match=bad):
            ask(digest)
    # It is no copy to rely upon, so a good one is stored.
    assert store_all(store, [chunk(1)]) == [digest]
    assert store.locate(digest).pack != bad
    Catalog(blocker).delete(DamageRecord, bad, version)
    store.refresh()
    assert store.locate(digest).pack == min(store.packs())


# Garbage collection beside it


def test_condemned_packs_are_no_hits_but_are_read(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    digest = store_all(store, [chunk(1)])[0]
    first = store.locate(digest).pack
    condemn(blocker, first)
    assert store.read(digest) == chunk(1)
    store_all(store, [chunk(1)])
    assert len(store.packs()) == 2
    assert store.locate(digest).pack != first


@pytest.mark.parametrize("how", ["condemned", "deleted", "condemned, deleted and absolved"])
@pytest.mark.parametrize("what", ["hit", "written"])
def test_verify_sees_what_is_swept(blocker: MemoryBlocker, nodes: Nodes, how: str, what: str) -> None:
    store = nodes(blocker)
    if what == "hit":
        store_all(store, [chunk(1)])
    with store.session() as session:
        digest = add(session, chunk(1))
        session.flush()
        session.verify()
        (pack,) = session.relied_upon()
        if how != "deleted":
            condemn(blocker, pack)
        if how != "condemned":
            blocker.delete(pack_key(pack))
        if how == "condemned, deleted and absolved":
            catalog = Catalog(blocker)
            found = catalog.get(CondemnedRecord, pack)
            assert found is not None
            catalog.delete(CondemnedRecord, pack, found.version)
        with pytest.raises(Swept, match=pack):
            session.verify()
    assert store_all(store, [chunk(1)]) == [digest]
    assert store.locate(digest).pack != pack
    assert store.read(digest) == chunk(1)


def test_sessions_pin_what_they_wrote_and_hit(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    store_all(store, [chunk(1)])
    (old,) = store.packs()
    with store.session() as session:
        add(session, chunk(1))
        assert store.pinned() == {old}
        add(session, chunk(2))
        session.flush()
        assert store.pinned() == store.packs()
        assert len(store.packs()) == 2
    assert store.pinned() == set()


def test_a_pack_is_pinned_before_it_is_in_the_store(nodes: Nodes) -> None:
    class Watched(MemoryBlocker):
        def put(self, key: str, data: bytes) -> None:
            assert PackId(key.partition("/")[2]) in store.pinned()
            super().put(key, data)
            seen.append(key)

    seen: list[str] = []
    store = nodes(Watched())
    store_all(store, [chunk(1)])
    assert len(seen) == 1


def test_a_forgotten_pack_is_not_found(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    digest = store_all(store, [chunk(1)])[0]
    pack = store.locate(digest).pack
    blocker.delete(pack_key(pack))
    store.forget([pack])
    assert store.packs() == set()
    with pytest.raises(ObjectMissing):
        store.locate(digest)


# Hashes and compression


COLLIDING = ContentHash("colliding", 16, False, lambda _: bytes(16))


def test_a_collision_is_an_error_and_stores_nothing_wrong(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker, hash=COLLIDING)
    with store.session() as session:
        digest = add(session, chunk(1), COLLIDING)
        with pytest.raises(StoreError, match="blake3"):
            add(session, chunk(2), COLLIDING)
        session.flush()
        with pytest.raises(StoreError, match="blake3"):
            add(session, chunk(2), COLLIDING)
        assert not session.add_chunk(digest, chunk(1))
        session.flush()
    assert store.read(digest) == chunk(1)
    other = nodes(blocker, "b", hash=COLLIDING)
    other.refresh()
    with other.session() as session, pytest.raises(StoreError):
        add(session, chunk(3, 5), COLLIDING)
    assert len(list(blocker.list("pack"))) == 1


def test_an_untrusted_hit_on_a_damaged_copy_stores_a_good_one(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker, hash=XXH3)
    digest = store_all(store, [chunk(1)])[0]
    place = store.locate(digest)
    damage(blocker, place.pack, place.offset)
    store_all(store, [chunk(1)])
    assert store.read(digest) == chunk(1)


@pytest.mark.parametrize("name", ["blake3", "sha256", "xxh3-128"])
def test_every_hash(blocker: MemoryBlocker, nodes: Nodes, name: str) -> None:
    store = nodes(blocker, hash=content_hash(name))
    chunks = [chunk(seed) for seed in range(10)]
    digests = store_all(store, chunks)
    assert store_all(store, chunks) == digests
    assert sum(len(store.index(pack).entries) for pack in store.packs()) == 10
    other = nodes(blocker, "b", hash=content_hash(name))
    assert [other.read(digest) for digest in digests] == chunks


def test_compression_only_where_it_saves_an_eighth(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker, compression="zstd")
    text = b"archipelago " * 2048
    text = text[: len(text) // SECTOR_BYTES * SECTOR_BYTES]
    barely = chunk(1, 9) + bytes(SECTOR_BYTES)
    digests = store_all(store, [text, chunk(2), barely])
    codings = [place.coding for place in store.locate_all(digests)]
    assert codings == [Coding.ZSTD, Coding.RAW, Coding.RAW]
    assert store.locate(digests[0]).stored_bytes < len(text) // 8
    reader = nodes(blocker, "b")
    assert [reader.read(digest) for digest in digests] == [text, chunk(2), barely]
    assert nodes(blocker, "c", compression="zstd").read(digests[0]) == text


def test_damage_of_what_is_compressed_is_found(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker, compression="zstd")
    text = b"archipelago " * 4096
    text = text[: len(text) // SECTOR_BYTES * SECTOR_BYTES]
    digest = store_all(store, [text])[0]
    place = store.locate(digest)
    found = 0
    for at in range(place.stored_bytes):
        damage(blocker, place.pack, place.offset + at)
        try:
            # zstd does not look at every bit.
            assert store.read(digest) == text
        except ObjectDamaged:
            found += 1
        damage(blocker, place.pack, place.offset + at)
    assert place.stored_bytes // 2 < found
    assert store.read(digest) == text


def test_unknown_compression(blocker: MemoryBlocker, nodes: Nodes) -> None:
    with pytest.raises(InvalidInput, match="none, zstd"):
        nodes(blocker, compression="lzo")
