"""Where volumes differ is where their bytes do, whatever they have in common, and what they have is not read."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.compose.composer import Composer
from archipfs.compose.diff import (
    BITMAP_BYTES_MAX,
    Progress,
    Run,
    bitmap,
    check_granularity,
    differing_runs,
    extents_that_differ,
    union,
)
from archipfs.compose.sealing import unheeded
from archipfs.compose.volume import OpenVolume
from archipfs.errors import InvalidInput, ObjectMissing
from archipfs.map.pages import Extent
from archipfs.types import CHUNK_SECTORS_MAX, REGION_SECTORS, SECTOR_BYTES, Digest
from tests.compose.world import World, content_of, fill, pattern
from tests.lib.searching import searching

TIB = 1 << 40


def by_bytes(one: bytes, other: bytes) -> list[Run]:
    """Where they differ, by comparing all of it."""
    size = max(len(one), len(other))
    one, other = one.ljust(size, b"\0"), other.ljust(size, b"\0")
    sectors = [(at, min(at + SECTOR_BYTES, size)) for at in range(0, size, SECTOR_BYTES)]
    return list(union((start, end) for start, end in sectors if one[start:end] != other[start:end]))


@contextmanager
def both(composer: Composer, one: str, other: str) -> Iterator[tuple[OpenVolume, OpenVolume]]:
    with composer.using(composer.find(one)) as mine, composer.using(composer.find(other)) as theirs:
        yield mine, theirs


def runs_of(composer: Composer, mine: OpenVolume, theirs: OpenVolume, progress: Progress = unheeded) -> list[Run]:
    def fetch(digest: Digest) -> bytes:
        return composer.sealed_store(mine.mapper).chunks.page(digest)

    return list(differing_runs(mine, theirs, fetch, progress))


def diff(composer: Composer, one: str, other: str) -> list[Run]:
    with both(composer, one, other) as (mine, theirs):
        return runs_of(composer, mine, theirs)


# Pure

runs_in_order = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12))).map(
    lambda pairs: sorted((start, start + length) for start, length in pairs)
)


@given(st.lists(runs_in_order, max_size=4))
def test_a_union_has_what_any_has_in_runs_that_do_not_touch(sources: list[list[Run]]) -> None:
    found = list(union(*sources))
    assert {at for run in found for at in range(*run)} == {at for runs in sources for run in runs for at in range(*run)}
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(found))


def leaf_pages() -> st.SearchStrategy[list[Extent]]:
    """Of a few chunks, so that two pages have much in common."""

    def lay(pieces: Sequence[tuple[int, int, int, int]]) -> list[Extent]:
        extents, at = [], 0
        for gap, count, chunk, inner in pieces:
            extents.append(Extent(at + gap, count, Digest(bytes([chunk]) * 16), inner))
            at += gap + count
        return extents

    piece = st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2), st.integers(0, 4))
    return st.lists(piece, max_size=12).map(lay)


@given(leaf_pages(), leaf_pages())
def test_extents_are_compared_by_where_each_sector_comes_from(one: list[Extent], other: list[Extent]) -> None:
    def places(extents: list[Extent]) -> dict[int, tuple[Digest, int]]:
        return {e.first + at: (e.digest, e.inner + at) for e in extents for at in range(e.count)}

    mine, theirs = places(one), places(other)
    expected = {sector for sector in range(REGION_SECTORS) if mine.get(sector) != theirs.get(sector)}
    assert {sector for run in extents_that_differ(one, other) for sector in range(*run)} == expected


@given(runs_in_order, st.integers(60, 90), st.integers(1, 20))
def test_a_bit_is_set_for_each_block_that_a_run_touches(runs: list[Run], size: int, granularity: int) -> None:
    bits = bitmap(runs, size, granularity)
    blocks = -(-size // granularity)
    assert len(bits) == -(-blocks // 8)
    text = "".join(f"{byte:08b}" for byte in bits)
    touched = {at // granularity for run in runs for at in range(*run)}
    assert [bit == "1" for bit in text] == [block in touched and block < blocks for block in range(len(text))]


def test_a_granularity_that_cannot_be() -> None:
    check_granularity(64 << 40, 64 << 10)
    with pytest.raises(InvalidInput, match="multiple of 4096"):
        check_granularity(1 << 30, 6000)
    with pytest.raises(InvalidInput, match="larger granularity"):
        check_granularity(8 * BITMAP_BYTES_MAX * SECTOR_BYTES * 2, SECTOR_BYTES)


# By engines

SECTORS = 24
offsets = st.integers(0, SECTORS * SECTOR_BYTES - 1)
steps = st.one_of(
    st.tuples(st.just("write"), offsets, st.integers(1, 3 * SECTOR_BYTES), st.integers(0, 2)),
    st.tuples(st.just("zero"), offsets, st.integers(1, 6 * SECTOR_BYTES)),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("clone")),
    st.tuples(st.just("create")),
    st.tuples(st.just("resize"), st.integers(1, SECTORS * SECTOR_BYTES)),
    st.tuples(st.just("seal")),
)


@searching(40)
@given(st.lists(st.tuples(st.integers(0, 9), steps), max_size=14))
def test_any_two_volumes_differ_where_their_bytes_do(program: list[tuple[int, tuple[object, ...]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        composer = World(Path(directory)).composer()
        composer.create("0", SECTORS * SECTOR_BYTES)
        writable, names = ["0"], ["0"]
        for which, (step, *arguments) in program:
            name = writable[which % len(writable)]
            with composer.using(composer.find(name)) as opened:
                if step == "write":
                    offset, length, seed = map(int, arguments)  # type: ignore[call-overload]
                    opened.write(offset, pattern(seed, SECTORS)[offset : offset + length])
                elif step == "zero":
                    offset, length = map(int, arguments)  # type: ignore[call-overload]
                    opened.discard(offset, length)
            if step in ("snapshot", "clone", "create"):
                made = str(len(names))
                names.append(made)
                if step == "snapshot":
                    composer.snapshot(name, made)
                else:
                    writable.append(made)
                    if step == "clone":
                        composer.clone(name, made)
                    else:
                        composer.create(made, SECTORS * SECTOR_BYTES)
            elif step == "seal":
                composer.seal(names[which % len(names)], live=True)
            elif step == "resize":
                composer.resize(composer.find(name), *arguments)  # type: ignore[arg-type]
        contents = {name: content_of(composer, name) for name in names}
        for one in names:
            for other in names:
                assert diff(composer, one, other) == by_bytes(contents[one], contents[other]), (one, other)


@pytest.fixture
def composer(world: World) -> Composer:
    return world.composer()


def test_of_a_tebibyte_only_what_was_changed_is_read(composer: Composer) -> None:
    composer.create("vm1", TIB)
    for number in range(50):
        fill(composer, "vm1", pattern(number), number * (TIB // 50) // SECTOR_BYTES * SECTOR_BYTES)
    composer.snapshot("vm1", "vm1@monday")
    fill(composer, "vm1", pattern(99), 17 * SECTOR_BYTES)
    fill(composer, "vm1", pattern(0), 0)  # as it was
    with both(composer, "vm1@monday", "vm1") as (mine, theirs):
        assert runs_of(composer, mine, theirs) == [(17 * SECTOR_BYTES, 18 * SECTOR_BYTES)]
        assert theirs.engine.statistics().read_bytes <= 2 * SECTOR_BYTES


def test_holes_are_not_read_on_either_side(composer: Composer) -> None:
    composer.create("vm1", TIB)
    composer.create("vm2", TIB // 2)
    fill(composer, "vm2", b"x", TIB // 4)
    with composer.using(composer.find("vm1")) as opened:
        opened.discard(0, TIB)
    with both(composer, "vm1", "vm2") as (mine, theirs):
        assert runs_of(composer, mine, theirs) == [(TIB // 4, TIB // 4 + SECTOR_BYTES)]
        assert mine.engine.statistics().read_bytes <= 2 << 20


def test_a_length_that_is_no_multiple_of_a_sector(composer: Composer) -> None:
    composer.create("vm1", 5000)
    composer.create("vm2", 9000)
    fill(composer, "vm2", b"x", 8999)
    assert diff(composer, "vm1", "vm2") == diff(composer, "vm2", "vm1") == [(8192, 9000)]
    fill(composer, "vm1", b"y", 4999)
    assert diff(composer, "vm1", "vm2") == [(4096, 9000)]


def test_volumes_without_a_size(composer: Composer) -> None:
    composer.create("vm1", 0)
    composer.create("vm2", 0)
    assert diff(composer, "vm1", "vm2") == []


def test_progress_ends_at_the_end_and_may_end_the_comparison(composer: Composer) -> None:
    class EnoughError(Exception):
        pass

    def enough(done: int, total: int) -> None:
        raise EnoughError

    size = 8 << 20
    composer.create("vm1", size)
    composer.create("vm2", size)
    fill(composer, "vm2", pattern(1, 2048))
    said: list[tuple[int, int]] = []
    with both(composer, "vm1", "vm2") as (mine, theirs):
        assert runs_of(composer, mine, theirs, lambda done, total: said.append((done, total))) == [(0, size)]
        with pytest.raises(EnoughError):
            runs_of(composer, mine, theirs, enough)
    assert said == sorted(said)
    assert said[-1] == (size, size)


def test_sealed_volumes_made_apart_are_compared_by_their_maps(composer: Composer) -> None:
    size = 64 << 20
    content = pattern(1, 4096)
    for name in ("vm1", "vm2"):
        composer.create(name, size)
        fill(composer, name, content, 8 << 20)
    fill(composer, "vm2", b"x", (20 << 20) + 5)
    for name in ("vm1", "vm2"):
        composer.snapshot(name, f"{name}@monday")
        composer.seal(f"{name}@monday")
    with both(composer, "vm1@monday", "vm2@monday") as (mine, theirs):
        assert runs_of(composer, mine, theirs) == [(20 << 20, (20 << 20) + SECTOR_BYTES)]
        with theirs.reading() as engine:
            assert engine.statistics().read_bytes <= CHUNK_SECTORS_MAX * SECTOR_BYTES


def test_a_base_that_is_sealed_away_meanwhile(composer: Composer) -> None:
    """A comparison goes on when the layer that both had in common becomes part of a sealed one above it."""
    size = 16 << 20
    composer.create("vm1", size)
    fill(composer, "vm1", pattern(1, 8))
    composer.snapshot("vm1", "vm1@monday")
    composer.clone("vm1@monday", "vm2")
    for number in range(1, 8):
        fill(composer, "vm1", pattern(number, 2), number << 20)
    composer.snapshot("vm1", "vm1@tuesday")
    with both(composer, "vm1", "vm2") as (mine, theirs):
        expected = by_bytes(mine.read(0, size), theirs.read(0, size))
        shared = composer.find("vm1@monday").record.layer
        assert mine.engine.next_change(shared, 0, size) is not None
        sealed: list[object] = []

        def seal_once(done: int, total: int) -> None:
            if not sealed:
                sealed.append(composer.seal("vm1"))

        assert runs_of(composer, mine, theirs, seal_once) == expected
        with pytest.raises(ObjectMissing):
            mine.engine.next_change(shared, 0, size)
