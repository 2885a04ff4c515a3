"""Where two volumes differ, related or not, without reading what they have in common.

1. *Candidates*, as runs of whole sectors. Of volumes in one store, what either shows that does not come straight from
   their *base*, and where the two bases differ. If their chains have a layer in common, that is the base of both, and
   does not differ from itself. Else it is the sealed layer in which a chain ends: two maps are compared by descending
   only where digests differ, then extent by extent. A chain that ends unsealed has an empty base. Of volumes in two
   stores, all that either has.
2. *Comparison*: candidates are read from both and compared sector by sector. Where neither has data there is nothing
   to read.

What lies beyond the end of the smaller volume counts as zeros. A volume that is being written is compared with each of
its sectors as it was at some moment meanwhile; a snapshot shows all of one moment.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from archipfs.compose.engine import EngineVolume
from archipfs.compose.volume import OpenVolume
from archipfs.errors import InvalidInput, ObjectMissing
from archipfs.map.mapper import Mapper
from archipfs.map.pages import Extent, decode_leaf
from archipfs.map.records import LayerRecord
from archipfs.map.tree import Fetch, differing_leaves
from archipfs.types import REGION_BYTES, SECTOR_BYTES, Digest, LayerId
from archipfs.units import format_size

PIECE_BYTES = 1 << 20
"""What is read at a time of each."""
BITMAP_BYTES_MAX = 128 << 20
"""Enough for 64 TiB by 64 KiB."""

Run = tuple[int, int]
"""From where and until where, in bytes."""
Progress = Callable[[int, int], None]


# Pure


def union(*sources: Iterable[Run]) -> Iterator[Run]:
    """What any of them has. Each is in order; so is this, and its runs do not touch."""
    start = end = -1
    for begins, ends in heapq.merge(*sources):
        if begins > end:
            if start < end:
                yield start, end
            start, end = begins, ends
        else:
            end = max(end, ends)
    if start < end:
        yield start, end


def sectors_that_differ(one: bytes, other: bytes, offset: int) -> Iterator[Run]:
    """Of two pieces of the same length that lie at ``offset``; the last sector may be cut off."""
    if one == other:
        return
    for start in range(0, len(one), SECTOR_BYTES):
        end = min(start + SECTOR_BYTES, len(one))
        if one[start:end] != other[start:end]:
            yield offset + start, offset + end


def extents_that_differ(one: Sequence[Extent], other: Sequence[Extent]) -> Iterator[Run]:
    """The sectors of a region, first and end, that two leaf pages do not have from the same place of the same chunk."""
    borders = sorted({border for extent in (*one, *other) for border in (extent.first, extent.end)})
    mine, theirs = _Places(one), _Places(other)
    for first, end in itertools.pairwise(borders):
        if mine.of(first) != theirs.of(first):
            yield first, end


class _Places:
    """Where sectors of a leaf page come from, asked for in rising order."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents = iter(extents)
        self._at = next(self._extents, None)

    def of(self, sector: int) -> tuple[Digest, int] | None:
        while self._at is not None and self._at.end <= sector:
            self._at = next(self._extents, None)
        if self._at is None or sector < self._at.first:
            return None
        return self._at.digest, self._at.inner + sector - self._at.first


def check_granularity(size: int, granularity: int) -> None:
    """Raises ``InvalidInput`` for what ``bitmap`` cannot have."""
    if granularity % SECTOR_BYTES:
        raise InvalidInput(f"granularity {granularity} is not a multiple of {SECTOR_BYTES}, a sector; give one")
    if size // granularity // 8 > BITMAP_BYTES_MAX:
        raise InvalidInput(
            f"a bitmap of {format_size(size)} by {format_size(granularity)} would take more than "
            f"{format_size(BITMAP_BYTES_MAX)}; give a larger granularity"
        )


def bitmap(runs: Iterable[Run], size: int, granularity: int) -> bytes:
    """A bit for each ``granularity`` bytes of ``size``, set where a run touches them; what lies beyond is left out. The
    first is the highest bit of the first byte, as in what xapi's VDI.list_changed_blocks returns."""
    blocks = -(-size // granularity)
    bits = bytearray(-(-blocks // 8))
    for start, end in runs:
        for block in range(start // granularity, min(blocks, -(-end // granularity))):
            bits[block >> 3] |= 0x80 >> (block & 7)
    return bytes(bits)


# By engines


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two, as it is read."""

    mapper: Mapper
    engine: EngineVolume
    chain: Sequence[LayerRecord]

    @property
    def base(self) -> LayerRecord | None:
        """The sealed layer in which the chain ends."""
        return self.chain[-1] if self.chain[-1].sealed is not None else None

    def written(self, base: LayerId | None, offset: int, end: int) -> Iterator[Run]:
        """What it does not show straight from that layer; without one, where it may have data."""
        while offset < end and (run := self.engine.next_change(base, offset, end)) is not None:
            yield run
            offset = run[1]

    def with_data(self, offset: int, end: int) -> Iterator[Run]:
        following: int | None = offset
        while following is not None and (start := self.engine.seek_data(following)) is not None and start < end:
            following = self.engine.seek_hole(start)
            yield start - start % SECTOR_BYTES, end if following is None else following


class _Data:
    """Where an engine has data next, asked for in rising order: it looks no farther than it has to."""

    def __init__(self, engine: EngineVolume) -> None:
        self._engine = engine
        self._next: int | None = -1

    def next_from(self, offset: int) -> int | None:
        if self._next is not None and self._next < offset:
            self._next = self._engine.seek_data(offset)
        return self._next


def differing_runs(one: OpenVolume, other: OpenVolume, fetch: Fetch, progress: Progress) -> Iterator[Run]:
    """The runs of whole sectors in which they differ, in order; the last may end with the larger one's end.

    ``fetch`` has the map pages of the store that both lie in. ``progress`` is told how many bytes of the larger one are
    done, and how many there are; what it raises ends this.
    """
    done = 0
    with ExitStack() as reading:
        mine, theirs = (_side(each, reading.enter_context(each.reading())) for each in (one, other))
        while True:
            try:
                for run in _differing(mine, theirs, fetch, done, progress):
                    yield run
                    done = run[1]
                return
            except ObjectMissing:
                # A layer that was our base may just have become part of a sealed one that lies above it.
                chains = mine.chain, theirs.chain
                mine, theirs = _side(one, mine.engine), _side(other, theirs.engine)
                if chains == (mine.chain, theirs.chain):
                    raise


def _side(opened: OpenVolume, engine: EngineVolume) -> _Side:
    catalog = opened.mapper.catalog
    layer = catalog.volume(opened.id).record.layer
    return _Side(opened.mapper, engine, list(catalog.chain(layer)))


def _differing(mine: _Side, theirs: _Side, fetch: Fetch, offset: int, progress: Progress) -> Iterator[Run]:
    """From ``offset`` on."""
    size = max(mine.engine.size, theirs.engine.size)
    candidates = union(_candidates(mine, theirs, fetch, offset, size), _only_one(mine, theirs, offset, size))
    return union(_compared(mine.engine, theirs.engine, candidates, size, progress))


def _candidates(mine: _Side, theirs: _Side, fetch: Fetch, offset: int, size: int) -> Iterator[Run]:
    if mine.mapper is not theirs.mapper:
        return union(mine.with_data(offset, size), theirs.with_data(offset, size))
    layers = {record.id for record in theirs.chain}
    shared = next((record.id for record in mine.chain if record.id in layers), None)
    if shared is not None:
        return union(mine.written(shared, offset, size), theirs.written(shared, offset, size))
    one, other = mine.base, theirs.base
    return union(
        mine.written(one.id if one is not None else None, offset, size),
        theirs.written(other.id if other is not None else None, offset, size),
        (
            (max(start, offset), end)
            for start, end in differing_in_maps(fetch, _root(one), _root(other))
            if end > offset
        ),
    )


def _root(base: LayerRecord | None) -> Digest | None:
    return Digest(bytes.fromhex(base.sealed.root)) if base is not None and base.sealed is not None else None


def differing_in_maps(fetch: Fetch, one: Digest | None, other: Digest | None) -> Iterator[Run]:
    """The runs of sectors that two maps of one store do not have from the same place of the same chunk, in order."""

    def extents(leaf: Digest | None) -> list[Extent]:
        return decode_leaf(fetch(leaf)) if leaf is not None else []

    for region, mine, theirs in differing_leaves(fetch, one, other):
        start = region * REGION_BYTES
        for first, end in extents_that_differ(extents(mine), extents(theirs)):
            yield start + first * SECTOR_BYTES, start + end * SECTOR_BYTES


def _only_one(mine: _Side, theirs: _Side, offset: int, size: int) -> Iterator[Run]:
    """Where only the larger one is."""
    smaller = min(mine.engine.size, theirs.engine.size)
    if smaller < size:
        yield max(offset, smaller - smaller % SECTOR_BYTES), size


def _compared(
    one: EngineVolume, other: EngineVolume, candidates: Iterator[Run], size: int, progress: Progress
) -> Iterator[Run]:
    mine, theirs = _Data(one), _Data(other)
    for start, until in candidates:
        offset, end = start, min(until, size)
        while offset < end:
            found = [data for data in (mine.next_from(offset), theirs.next_from(offset)) if data is not None]
            offset = max(offset, min(found, default=end) // SECTOR_BYTES * SECTOR_BYTES)
            length = min(PIECE_BYTES, end - offset)
            if length > 0:
                yield from sectors_that_differ(_read(one, offset, length), _read(other, offset, length), offset)
                offset += length
            progress(min(offset, end), size)
    progress(size, size)


def _read(engine: EngineVolume, offset: int, length: int) -> bytes:
    """As long as was asked for: with zeros beyond the end."""
    return engine.read(offset, length).ljust(length, b"\0")
