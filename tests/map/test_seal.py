"""Maps of what layers show: what is built reads back as what was read, on top of a base or not."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import ObjectDamaged
from archipfs.map.cache import Cache
from archipfs.map.chunks import ChunkStore, pack_key
from archipfs.map.hashes import content_hash
from archipfs.map.pages import Extent, decode_leaf
from archipfs.map.seal import EXTENTS_MAX, Map, build_map
from archipfs.map.tree import Tree
from archipfs.types import REGION_BYTES, REGION_SECTORS, SECTOR_BYTES
from tests.lib.searching import searching

NODE = "0" * 32
MASK_BITS = 3
END = 1 << 46

Sectors = dict[int, bytes]
"""What is not zeros, by sector."""


@dataclass
class Space:
    """Sectors, and which of them may differ from the base."""

    sectors: Sectors
    changed: set[int]
    end: int = END
    read_bytes: int = field(default=0)

    def next_change(self, offset: int, end: int) -> tuple[int, int] | None:
        first = min((each for each in self.changed if offset <= each * SECTOR_BYTES < end), default=None)
        if first is None:
            return None
        until = first
        while until in self.changed:
            until += 1
        return first * SECTOR_BYTES, until * SECTOR_BYTES

    def next_data(self, offset: int) -> int | None:
        at_or_after = [each * SECTOR_BYTES for each in self.sectors if (each + 1) * SECTOR_BYTES > offset]
        return max(offset, min(at_or_after)) if at_or_after else None

    def next_hole(self, offset: int) -> int:
        sector = offset // SECTOR_BYTES
        while sector in self.sectors:
            sector += 1
        return max(offset, sector * SECTOR_BYTES)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read_bytes += len(buffer)
        for place in range(0, len(buffer), SECTOR_BYTES):
            sector = (offset + place) // SECTOR_BYTES
            buffer[place : place + SECTOR_BYTES] = self.sectors.get(sector, bytes(SECTOR_BYTES))


@contextmanager
def chunk_store(directory: Path, hash_name: str = "blake3", compression: str = "none") -> Iterator[ChunkStore]:
    with Cache(directory / "cache") as cache:
        yield ChunkStore(
            MemoryBlocker(), cache, content_hash(hash_name), node=NODE, compression=compression, pack_bytes=1 << 18
        )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with chunk_store(tmp_path) as opened:
        yield opened


def build(store: ChunkStore, space: Space, base: Map | None = None, threads: int = 2) -> Map:
    told: list[int] = []
    with store.session() as session:
        made = build_map(
            space, space.end, base, store, session, mask_bits=MASK_BITS, threads=threads, progress=told.append
        )
        session.flush()
    assert sum(told) == space.read_bytes
    return made


def sectors_of(store: ChunkStore, made: Map) -> Sectors:
    found: Sectors = {}
    for region, leaf in Tree(store.page, made.root).regions():
        for extent in decode_leaf(store.page(leaf)):
            chunk = store.read(extent.digest)
            for number in range(extent.count):
                place = (extent.inner + number) * SECTOR_BYTES
                found[region * REGION_SECTORS + extent.first + number] = chunk[place : place + SECTOR_BYTES]
    return found


def sector(seed: int) -> bytes:
    return random.Random(seed).randbytes(SECTOR_BYTES)


def fresh(sectors: Mapping[int, bytes]) -> Space:
    return Space(dict(sectors), set(sectors))


SECTORS = st.one_of(st.integers(0, 40), st.integers(1000, 1050), st.integers(5 << 20, (5 << 20) + 9))
CONTENT = st.dictionaries(SECTORS, st.integers(1, 6).map(sector), max_size=60)


@searching(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONTENT, CONTENT, st.sets(SECTORS, max_size=30), st.sets(SECTORS, max_size=10))
def test_a_map_reads_back_as_what_was_sealed(
    store: ChunkStore, first: Sectors, written: Sectors, discarded: set[int], untouched: set[int]
) -> None:
    """Also on top of another, where sectors were written, discarded, or only looked as if they might be."""
    base = build(store, fresh(first))
    assert sectors_of(store, base) == first
    assert base.data_bytes == len(first) * SECTOR_BYTES
    after = {place: data for place, data in {**first, **written}.items() if place not in discarded}
    made = build(store, Space(after, set(written) | discarded | untouched), base)
    assert sectors_of(store, made) == after
    assert made.data_bytes == len(after) * SECTOR_BYTES


def test_nothing_makes_an_empty_map(store: ChunkStore) -> None:
    made = build(store, fresh({}))
    assert sectors_of(store, made) == {}
    assert made.data_bytes == 0


def test_the_same_content_is_the_same_map(store: ChunkStore) -> None:
    """However many threads made it."""
    content = {place: sector(place) for place in range(0, 5000, 3)}
    assert build(store, fresh(content), threads=1) == build(store, fresh(content), threads=4)


def test_only_what_may_have_changed_is_read(store: ChunkStore) -> None:
    content = {place: sector(place) for place in range(3000)}
    base = build(store, fresh(content))
    space = Space({**content, 1500: sector(7)}, {1500})
    build(store, space, base)
    assert space.read_bytes == SECTOR_BYTES


def test_terabytes_that_are_hidden_are_passed_over(store: ChunkStore) -> None:
    """A volume that shrank and grew hides all of its parent from there on: holes, whatever the base has there."""
    far = (1 << 40) // SECTOR_BYTES
    content = {place: sector(place) for place in (0, 1, far, far + 1)}
    base = build(store, fresh(content))

    class Hidden(Space):
        def next_change(self, offset: int, end: int) -> tuple[int, int] | None:
            start = max(offset, SECTOR_BYTES)
            return (start, end) if start < end else None

    space = Hidden({0: sector(0)}, set())
    made = build(store, space, base)
    assert sectors_of(store, made) == {0: sector(0)}
    assert space.read_bytes < REGION_BYTES


def test_a_region_in_too_many_pieces_is_read_whole(store: ChunkStore) -> None:
    content = {place: sector(place) for place in range(REGION_SECTORS)}
    base = build(store, fresh(content))
    changed = set(range(0, REGION_SECTORS, 4))
    space = Space(content | {place: sector(place + 5000) for place in changed}, changed)
    made = build(store, space, base)
    assert space.read_bytes == 2 * len(changed) * SECTOR_BYTES, "the rest comes from the base"
    ((_, leaf),) = Tree(store.page, made.root).regions()
    assert len(decode_leaf(store.page(leaf))) < EXTENTS_MAX
    assert sectors_of(store, made) == space.sectors


def test_what_has_changed_on_the_disk_gets_no_new_digest(store: ChunkStore) -> None:
    """A reader of the volume does not notice; but whoever scrubs does, as long as the old digest is there."""
    content = {place: sector(place) for place in range(REGION_SECTORS)}
    base = build(store, fresh(content))
    damaged = store.locate(extents_of(store, base)[-1].digest)
    pack = bytearray(store.blocker.get(pack_key(damaged.pack)))
    pack[damaged.offset] ^= 1
    store.blocker.delete(pack_key(damaged.pack))
    store.blocker.put(pack_key(damaged.pack), bytes(pack))
    last = extents_of(store, base)[-1].first
    seen = content | {last: bytes([content[last][0] ^ 1]) + content[last][1:]}
    changed = set(range(0, last - 4, 4))
    space = Space(seen | {place: sector(place + 5000) for place in changed}, changed)
    with store.session() as session:
        made = build_map(space, END, base, store, session, mask_bits=MASK_BITS, threads=1, progress=lambda more: None)
        session.flush()
    with pytest.raises(ObjectDamaged):
        sectors_of(store, made)
    assert extents_of(store, made)[-1] == extents_of(store, base)[-1]


def extents_of(store: ChunkStore, made: Map) -> list[Extent]:
    ((_, leaf),) = Tree(store.page, made.root).regions()
    return decode_leaf(store.page(leaf))


def test_what_ends_it_ends_its_threads(store: ChunkStore) -> None:
    class EnoughError(Exception):
        pass

    def stop(more_bytes: int) -> None:
        raise EnoughError

    space = fresh({place: sector(place) for place in range(0, 900 * REGION_SECTORS, REGION_SECTORS)})
    with store.session() as session, pytest.raises(EnoughError):
        build_map(space, END, None, store, session, mask_bits=MASK_BITS, threads=2, progress=stop)
    assert space.read_bytes < 300 * SECTOR_BYTES


@pytest.mark.parametrize(("hash_name", "compression"), [("sha256", "none"), ("xxh3-128", "zstd"), ("blake3", "zstd")])
def test_with_every_hash_and_compression(tmp_path: Path, hash_name: str, compression: str) -> None:
    content = {place: sector(place % 5) for place in range(50)} | dict.fromkeys(range(60, 90), b"x" * SECTOR_BYTES)
    with chunk_store(tmp_path, hash_name, compression) as store:
        made = build(store, fresh(content))
        assert sectors_of(store, made) == content
