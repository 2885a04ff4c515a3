"""The store of chunks: what went in comes out, whatever crashes, goes away or is damaged meanwhile."""

import contextlib
import itertools
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import archipfs.map.cache as cache_module
from archipfs.blockers.contract import Blocker
from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment, SimulatedCrash
from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import InvalidInput, ObjectDamaged, ObjectMissing, ShutOut, StoreError, StoreFull, StoreUnavailable
from archipfs.map.cache import Cache
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import ChunkStore, Location, Session, Swept, pack_key
from archipfs.map.hashes import ContentHash, content_hash
from archipfs.map.packs import Coding, Kind, PackIndex
from archipfs.map.records import CondemnedRecord, DamageRecord
from archipfs.types import SECTOR_BYTES, Digest, PackId
from tests.blockers.conformance import run_threads

NODE = "0123456789abcdef" * 2
BLAKE3 = content_hash("blake3")
XXH3 = content_hash("xxh3-128")
PACK_BYTES = 40_000

AddPacks = Callable[[Sequence[PackIndex]], None]


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


def test_what_another_node_stored_is_not_stored_again(blocker: MemoryBlocker, nodes: Nodes) -> None:
    chunks = [chunk(seed) for seed in range(20)]
    digests = store_all(nodes(blocker), chunks)
    other = nodes(blocker, "b")
    seen: list[tuple[int, int]] = []
    with other.session(lambda done, total: seen.append((done, total))) as session:
        assert [add(session, data) for data in chunks] == digests
        assert session.added_chunks == 0
    assert seen


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


def test_an_index_that_grows_while_it_is_rebuilt_knows_all_packs(
    blocker: MemoryBlocker, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [chunk(seed) for seed in range(150)]
    store = nodes(blocker)
    digests = store_all(store, chunks)
    monkeypatch.setattr(cache_module, "_MAP_BYTES", 1 << 16)
    other = nodes(blocker, "other")
    other.refresh()
    assert other.packs() == store.packs()
    assert [other.read(digest) for digest in digests] == chunks


def test_an_index_is_rebuilt_with_few_heads_in_memory_where_packs_are_large(
    blocker: MemoryBlocker, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a pack of 64 MiB that is cut into sectors takes 6 MiB, with what is made of it."""
    store_all(nodes(blocker), [chunk(seed, 8) for seed in range(60)])
    for pack_bytes, most in ((64 << 20, 4), (4 << 20, 64)):
        other = nodes(blocker, f"other-{pack_bytes}", pack_bytes=pack_bytes)
        together: list[int] = []
        add_packs = other.cache.add_packs

        def spy(packs: Sequence[PackIndex], add: AddPacks = add_packs, seen: list[int] = together) -> None:
            seen.append(len(packs))
            add(packs)

        monkeypatch.setattr(other.cache, "add_packs", spy)
        other.refresh()
        assert sum(together) == len(other.packs()) > 50
        assert max(together) == min(most, len(other.packs()))


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
    second.region_put(digests[0], b"resolved", second.regions_ticket())
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
    with store.session() as one, nodes(blocker, "b").session() as another:
        digest = add(one, chunk(1))
        assert add(another, chunk(1)) == digest
        one.flush()
        another.flush()
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
    store.region_put(digest, b"resolved", store.regions_ticket())
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


def test_damage_that_becomes_known_while_a_region_is_resolved(
    blocker: MemoryBlocker, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was located before is not kept; and where the cache fails to forget, the next look has it do so."""
    store = nodes(blocker)
    (digest,) = store_all(store, [chunk(1)])
    ticket = store.regions_ticket()
    place = store.locate(digest)
    store.region_put(digest, b"an earlier one", ticket)
    Catalog(blocker).put(DamageRecord(place.pack, [digest.hex()]), place.pack, None)

    def full() -> None:
        raise StoreFull("made up")

    monkeypatch.setattr(store.cache, "regions_forget", full)
    with pytest.raises(StoreFull):
        store.reread_marks()
    monkeypatch.undo()
    store.reread_marks()
    store.region_put(digest, b"resolved to the damaged place", ticket)
    assert store.region_get(digest) is None
    with pytest.raises(ObjectDamaged):
        store.locate(digest)


def test_a_cache_that_is_full_fails_no_read_and_no_seal(
    blocker: MemoryBlocker, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = nodes(blocker)
    with store.session() as session:
        page = session.add_page(b"a page")
        session.flush()

    def full(*_: object) -> None:
        raise StoreFull("made up")

    monkeypatch.setattr(store.cache, "page_put", full)
    monkeypatch.setattr(store.cache, "pages_put", full)
    monkeypatch.setattr(store.cache, "region_put", full)
    assert store.page(page) == b"a page"
    store.keep_pages([(page, b"a page")])
    store.region_put(page, b"resolved", store.regions_ticket())


class BadPlaces(MemoryBlocker):
    """On a disk that cannot read some objects, from some place on."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[str] = set()
        self.bad_from = 0

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if key in self.bad and (length is None or offset + length > self.bad_from):
            raise StoreError(f"reading {key}: EIO")
        return super().get(key, offset, length)


def test_what_a_disk_cannot_read_is_read_from_another_copy(nodes: Nodes) -> None:
    blocker = BadPlaces()
    store = nodes(blocker)
    with store.session() as one, nodes(blocker, "b").session() as another:
        digest = add(one, chunk(1))
        add(another, chunk(1))
        one.flush()
        another.flush()
    store.refresh()
    assert len(store.packs()) == 2
    for bad in store.packs():
        blocker.bad = {pack_key(bad)}
        assert store.read(digest) == chunk(1)
    blocker.bad = {pack_key(pack) for pack in store.packs()}
    with pytest.raises(StoreError, match="EIO"):
        store.read(digest)


def test_a_head_that_a_disk_cannot_read_keeps_no_other_pack_out(nodes: Nodes) -> None:
    blocker = BadPlaces()
    (one,) = store_all(nodes(blocker), [chunk(1)])
    (bad,) = (PackId(key.partition("/")[2]) for key in blocker.list("pack"))
    (two,) = store_all(nodes(blocker, "b"), [chunk(2)])
    blocker.bad = {pack_key(bad)}
    reader = nodes(blocker, "c")
    assert reader.read(two) == chunk(2)
    with pytest.raises(ObjectMissing, match="cannot be read"):
        reader.read(one)
    assert reader.damaged_packs.keys() == {bad}
    blocker.bad = set()
    assert reader.read(one) == chunk(1)


@pytest.mark.parametrize("error", [StoreUnavailable, ShutOut])
def test_a_store_that_cannot_be_asked_says_nothing_about_its_packs(
    nodes: Nodes, blocker: MemoryBlocker, monkeypatch: pytest.MonkeyPatch, error: type[StoreError]
) -> None:
    digest = store_all(nodes(blocker), [chunk(1)])[0]
    reader = nodes(blocker, "other")

    def fail(*_: object) -> None:
        raise error("not now; try again")

    with monkeypatch.context() as silent:
        silent.setattr(blocker, "get", fail)
        with pytest.raises(error):
            reader.refresh()
    assert not reader.damaged_packs
    assert reader.read(digest) == chunk(1)


def test_a_chunk_that_a_disk_cannot_read_takes_no_others_of_its_pack_along(nodes: Nodes) -> None:
    """Though it lies right behind the head."""
    blocker = BadPlaces()
    chunks = [chunk(1, 1), chunk(2, 1)]
    digests = store_all(nodes(blocker), chunks)
    (pack,) = (PackId(key.partition("/")[2]) for key in blocker.list("pack"))
    blocker.bad, blocker.bad_from = {pack_key(pack)}, 8192 + SECTOR_BYTES
    reader = nodes(blocker, "other")
    assert reader.read(digests[0]) == chunks[0]
    with pytest.raises(StoreError, match="EIO"):
        reader.read(digests[1])
    assert not reader.damaged_packs


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


def test_verify_sees_damage_that_was_found_meanwhile(blocker: MemoryBlocker, nodes: Nodes) -> None:
    """A scrub beside a seal: what the seal has in hand may be the last good copy."""
    store = nodes(blocker)
    known, found = store_all(store, [chunk(1)])[0], store_all(store, [chunk(2)])[0]

    def find_damaged(digest: Digest) -> None:
        pack = store.locate(digest).pack
        Catalog(blocker).put(DamageRecord(pack, [digest.hex()]), pack, None)

    find_damaged(known)
    with store.session() as session:
        assert session.add_chunk(known, chunk(1))
        assert not session.add_chunk(found, chunk(2))
        session.flush()
        session.verify()
        find_damaged(found)
        with pytest.raises(Swept, match="damaged"):
            session.verify()
    with store.session() as session:
        assert session.add_chunk(found, chunk(2))
        session.flush()
        session.verify()
    assert store.read(found) == chunk(2)


@pytest.mark.parametrize("first", ["list", "list_records"])
def test_verify_sees_a_sweep_that_ends_while_it_looks(
    nodes: Nodes, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack is condemned, and after the first look of one kind it is deleted, and then its record."""
    blocker = MemoryBlocker()
    store = nodes(blocker)
    real = getattr(blocker, first)

    def look(kind: str) -> Iterator[object]:
        found = tuple(real(kind))
        blocker.delete(pack_key(pack))
        record = Catalog(blocker).get(CondemnedRecord, pack)
        if record is not None:
            Catalog(blocker).delete(CondemnedRecord, pack, record.version)
        return iter(found)

    with store.session() as session:
        add(session, chunk(1))
        session.flush()
        (pack,) = session.relied_upon()
        condemn(blocker, pack)
        monkeypatch.setattr(blocker, first, look)
        with pytest.raises(Swept):
            session.verify()


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


def test_a_pack_is_pinned_before_it_is_in_the_store_and_known_only_after(nodes: Nodes) -> None:
    class Watched(MemoryBlocker):
        def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
            pack = PackId(key.partition("/")[2])
            assert pack in store.pinned()
            assert pack not in store.packs()
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


def test_a_collision_with_what_was_put_since_the_look_is_found(blocker: MemoryBlocker, nodes: Nodes) -> None:
    """Between two of one call, the first one's pack is full and put."""
    store = nodes(blocker, hash=COLLIDING, pack_bytes=1)
    one, other = chunk(1), chunk(2)
    digest = COLLIDING.digest(one)
    assert COLLIDING.digest(other) == digest
    with store.session() as session:
        with pytest.raises(StoreError, match="blake3"):
            session.add_chunks([(digest, one), (digest, other)])
        session.flush()
    assert store.read(digest) == one
    assert len(list(blocker.list("pack"))) == 1


def test_a_collision_of_two_threads_is_found(
    blocker: MemoryBlocker, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stores its chunk, durably, after the other one has looked for its own."""
    store = nodes(blocker, hash=COLLIDING, pack_bytes=1)
    real = store.place_to_rely_on
    with store.session() as session:

        def look(digest: Digest, data: bytes, places: Sequence[Location]) -> Location | None:
            found = real(digest, data, places)
            if data == chunk(2) and not list(blocker.list("pack")):
                add(session, chunk(1), COLLIDING)
            return found

        monkeypatch.setattr(store, "place_to_rely_on", look)
        with pytest.raises(StoreError, match="blake3"):
            add(session, chunk(2), COLLIDING)
        session.flush()
    assert len(list(blocker.list("pack"))) == 1


def test_a_collision_of_two_sessions_is_found(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker, hash=COLLIDING)
    with store.session() as one, store.session() as another:
        digest = add(one, chunk(1), COLLIDING)
        with pytest.raises(StoreError, match="blake3"):
            add(another, chunk(2), COLLIDING)
        # The same bytes are no collision; neither session can rely on the other to put them.
        assert another.add_chunk(digest, chunk(1))
        one.flush()
        another.flush()
    assert store.read(digest) == chunk(1)


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


# Crashes, faults, threads


def work(store: ChunkStore) -> list[Digest]:
    """Two sessions, which share some; seven packs or so."""
    digests = []
    for first in (0, 12):
        with store.session() as session:
            for seed in range(first, first + 18):
                digests.append(add(session, chunk(seed)))
            digests.append(session.add_page(b"page %d" % first))
            session.flush()
            session.verify()
    return digests


EXPECTED = [chunk(seed) for seed in range(18)] + [b"page 0"] + [chunk(seed) for seed in range(12, 30)] + [b"page 12"]


def check_all(store: ChunkStore, blocker: Blocker, expected: list[bytes]) -> None:
    """Everything in the store is what its name says, and what is asked for is there."""
    store.refresh()
    assert store.damaged_packs == {}
    assert store.packs() == {PackId(key.partition("/")[2]) for key in blocker.list("pack")}
    for pack in store.packs():
        for entry in store.index(pack).entries:
            assert BLAKE3.digest(store.read(entry.digest)) == entry.digest
    for data in expected:
        assert store.read(BLAKE3.digest(data)) == data


@pytest.mark.parametrize("moment", list(Moment))
@pytest.mark.parametrize("lost", [False, True], ids=["a kill", "LMDB gone too"])
def test_crash_at_every_call_of_a_session(tmp_path: Path, moment: Moment, lost: bool) -> None:
    for number in itertools.count(1):
        inner = MemoryBlocker()
        faulty = FaultBlocker(inner, FaultPlan(seed=number, crash_at=number, moment=moment, count_reads=True))
        path = tmp_path / str(number)
        with Cache(path) as cache, contextlib.suppress(SimulatedCrash):
            work(ChunkStore(faulty, cache, BLAKE3, node=NODE, pack_bytes=PACK_BYTES))
        if lost:
            shutil.rmtree(path)
        with Cache(path) as cache:
            store = ChunkStore(inner, cache, BLAKE3, node=NODE, pack_bytes=PACK_BYTES)
            check_all(store, inner, [])
            assert [store.read(digest) for digest in work(store)] == EXPECTED
            check_all(store, inner, EXPECTED)
            # What the crash left was found again.
            entries = [entry.digest for pack in store.packs() for entry in store.index(pack).entries]
            assert len(entries) == len(set(entries)) == 32
        if not faulty.crashed:
            assert number > 15
            break


@pytest.mark.parametrize("moment", list(Moment))
def test_after_an_error_a_session_goes_on(tmp_path: Path, moment: Moment) -> None:
    """What failed to be put is put by the next call: a flush that returns has everything."""
    for number in itertools.count(1):
        inner = MemoryBlocker()
        faulty = FaultBlocker(inner, FaultPlan(seed=number, error_at=number, moment=moment))
        with Cache(tmp_path / str(number)) as cache:
            store = ChunkStore(faulty, cache, BLAKE3, node=NODE, pack_bytes=PACK_BYTES)
            errors = 0
            with store.session() as session:
                for seed in range(20):
                    try:
                        add(session, chunk(seed))
                    except StoreUnavailable:
                        errors += 1
                try:
                    session.flush()
                except StoreUnavailable:
                    errors += 1
                    session.flush()
                session.verify()
            assert errors <= 1
        with Cache(tmp_path / f"{number} other") as cache:
            check_all(ChunkStore(inner, cache, BLAKE3, node=NODE), inner, [chunk(seed) for seed in range(20)])
        if errors == 0:
            assert number > 4
            break


@pytest.mark.parametrize("seed", range(6))
def test_two_nodes_whose_caches_go_at_random(tmp_path: Path, seed: int) -> None:
    """Store, read, condemn, delete, forget, on two nodes of one store, one of which loses its cache now and then."""
    draw = random.Random(seed)
    blocker = MemoryBlocker()
    paths = [tmp_path / "a", tmp_path / "b"]
    caches = [Cache(path) for path in paths]
    stores = [ChunkStore(blocker, cache, BLAKE3, node=NODE, pack_bytes=PACK_BYTES) for cache in caches]
    present: set[int] = set()
    try:
        for _ in range(60):
            one = draw.randrange(2)
            step = draw.choice(["store", "store", "read", "delete", "lose", "reopen"])
            if step == "store":
                wanted = draw.sample(range(40), 6)
                for _ in range(5):
                    try:
                        store_all(stores[one], [chunk(number) for number in wanted])
                        break
                    except Swept:
                        continue
                else:
                    pytest.fail("swept again and again although nobody sweeps")
                present |= set(wanted)
            elif step == "read":
                for number in draw.sample(range(40), 6):
                    if number in present:
                        assert stores[one].read(BLAKE3.digest(chunk(number))) == chunk(number)
                        place = stores[one].locate(BLAKE3.digest(chunk(number)))
                        assert blocker.get(pack_key(place.pack), place.offset, place.stored_bytes) == chunk(number)
                    else:
                        with pytest.raises(ObjectMissing):
                            stores[one].read(BLAKE3.digest(chunk(number)))
            elif step == "delete":
                stores[one].refresh()
                packs = sorted(stores[one].packs())
                if packs:
                    gone = draw.choice(packs)
                    blocker.delete(pack_key(gone))
                    stores[one].forget([gone])
                    held = {entry.digest for pack in stores[one].packs() for entry in stores[one].index(pack).entries}
                    present = {number for number in present if BLAKE3.digest(chunk(number)) in held}
            else:
                caches[one].close()
                if step == "lose":
                    shutil.rmtree(paths[one] / draw.choice(["index", "pages", "."]))
                caches[one] = Cache(paths[one])
                stores[one] = ChunkStore(blocker, caches[one], BLAKE3, node=NODE, pack_bytes=PACK_BYTES)
        for store in stores:
            check_all(store, blocker, [chunk(number) for number in present])
    finally:
        for cache in caches:
            cache.close()


@pytest.mark.parametrize("hash_", [BLAKE3, XXH3], ids=["trusted", "compared"])
def test_threads_that_add_at_once(blocker: MemoryBlocker, nodes: Nodes, hash_: ContentHash) -> None:
    store = nodes(blocker, hash=hash_, compression="zstd")
    chunks = [chunk(seed, 1) for seed in range(120)]
    new: list[bool] = []
    with store.session() as session:

        def add_all(seed: int) -> None:
            order = list(chunks)
            random.Random(seed).shuffle(order)
            new.extend([session.add_chunk(hash_.digest(data), data) for data in order])
            session.add_page(b"a page of all")

        run_threads([lambda seed=seed: add_all(seed) for seed in range(4)])  # type: ignore[misc]
        session.flush()
        session.verify()
        assert sum(new) == session.added_chunks - 1
        assert session.added_chunks + session.hit_chunks == 4 * 121
    reader = nodes(blocker, "b", hash=hash_)
    assert [reader.read(hash_.digest(data)) for data in chunks] == chunks
    entries = [entry for pack in reader.packs() for entry in reader.index(pack).entries]
    assert session.added_bytes == sum(entry.stored_bytes for entry in entries)
    assert len(entries) == session.added_chunks


def test_two_threads_with_the_same_chunk_store_it_once(
    blocker: MemoryBlocker, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked for it in vain before either adds it."""
    store = nodes(blocker)
    looked = threading.Barrier(2)
    real = store.place_to_rely_on
    looks = itertools.count()

    def look(digest: Digest, data: bytes, places: Sequence[Location]) -> object:
        found = real(digest, data, places)
        if next(looks) < 2:
            looked.wait(60)
        return found

    monkeypatch.setattr(store, "place_to_rely_on", look)
    new: list[bool] = []
    with store.session() as session:
        digest = BLAKE3.digest(chunk(1))
        run_threads([lambda: new.append(session.add_chunk(digest, chunk(1)))] * 2)
        session.flush()
    assert sorted(new) == [False, True]
    assert (session.added_chunks, session.hit_chunks) == (1, 1)
    assert sum(len(store.index(pack).entries) for pack in store.packs()) == 1


def test_two_sessions_at_once_store_what_both_need(blocker: MemoryBlocker, nodes: Nodes) -> None:
    store = nodes(blocker)
    chunks = [chunk(seed) for seed in range(20)]
    with store.session() as first, store.session() as second:
        digests = [add(first, data) for data in chunks]
        assert [add(second, data) for data in chunks] == digests
        second.flush()
        for digest, data in zip(digests, chunks, strict=True):
            assert store.read(digest) == data
        first.flush()
        for session in (first, second):
            session.verify()
        assert store.pinned() == store.packs()


def test_many_who_miss_at_once_refresh_little(nodes: Nodes) -> None:
    class Counting(MemoryBlocker):
        lists = 0

        def list(self, kind: str) -> Iterator[str]:
            self.lists += 1
            time.sleep(0.02)
            return super().list(kind)

    blocker = Counting()
    digests = store_all(nodes(blocker), [chunk(seed) for seed in range(16)])
    other = nodes(blocker, "b")
    blocker.lists = 0
    found: list[bytes] = []
    run_threads([lambda digest=digest: found.append(other.read(digest)) for digest in digests])  # type: ignore[misc]
    assert sorted(found) == sorted(chunk(seed) for seed in range(16))
    assert blocker.lists <= 3


def test_a_cache_that_is_lost_in_use_is_made_again(
    blocker: MemoryBlocker, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = nodes(blocker)
    digests = store_all(store, [chunk(seed) for seed in range(20)])
    monkeypatch.setattr(cache_module, "_FORMAT", b"another")
    nodes.stop()
    again = nodes(blocker)
    assert again.packs() == set()
    assert [again.read(digest) for digest in digests] == [chunk(seed) for seed in range(20)]
