"""Sealing: from what layers show to chunks, map pages and a root. docs/architecture.md, "Seal", steps 2 to 4.

What is to be sealed is read region by region (4 MiB), and only where it differs from its *base*, a map that is there
already. A region's new page is the base's page with the new chunks laid over it, so that 4 KiB changed cost 4 KiB and a
page. A region in too many pieces is put together and cut afresh.

Memory: 4 MiB to read to for each thread, what the session keeps of the packs it is
making, and for each changed region the digest of its new page (about 200 bytes, so 50 MiB for a whole TiB).
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeVar

from archipfs.errors import ObjectDamaged, ObjectMissing
from archipfs.map.chunker import cut
from archipfs.map.chunks import ChunkStore, Session
from archipfs.map.hashes import Buffer
from archipfs.map.pages import Extent, decode_leaf, encode_leaf, overlay
from archipfs.map.tree import Tree, updated
from archipfs.types import REGION_BYTES, SECTOR_BYTES, Digest

EXTENTS_MAX = 384
"""How many pieces a region may be in; with more it is put together and cut afresh."""
BATCH_REGIONS_MAX = 32
ASK_BYTES = 16 * SECTOR_BYTES
"""A run of changes longer than that may have holes worth looking for before it is read."""

T = TypeVar("T")
W = TypeVar("W")

Progress = Callable[[int], None]
"""Told how many bytes more were read, in the thread that seals. What it raises ends the sealing."""


class Reader(Protocol):
    """What is to be sealed: a space of bytes in whole sectors. Calls may come from several threads at once."""

    def next_change(self, offset: int, end: int) -> tuple[int, int] | None:
        """The first run of whole sectors from ``offset`` on that may differ from the base; ``None``: none before
        ``end``. Without a base: that may have data."""

    def next_data(self, offset: int) -> int | None:
        """The first offset from ``offset`` on that may hold more than a hole."""

    def next_hole(self, offset: int) -> int | None:
        """The first offset from ``offset`` on that is known to be a hole."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; what lies behind the end is zeros."""


@dataclass(frozen=True, slots=True)
class Map:
    """A map in the store."""

    root: Digest
    data_bytes: int
    """What it has, without its holes."""


@dataclass(frozen=True, slots=True)
class _Region:
    number: int
    leaf: Digest | None
    """Its page in the base."""
    runs: list[tuple[int, int]]
    """What differs: from, until, in bytes of the whole."""


_Batch = list[_Region]


@dataclass(frozen=True, slots=True)
class _Sealed:
    number: int
    leaf: Digest | None
    more_sectors: int
    """How many more the map has there than the base; may be negative."""
    read_bytes: int


def build_map(
    reader: Reader,
    end: int,
    base: Map | None,
    store: ChunkStore,
    session: Session,
    *,
    mask_bits: int,
    threads: int,
    progress: Progress,
) -> Map:
    """The map of what ``reader`` shows before ``end``; chunks and pages go to ``session``, which is not flushed.

    ``mask_bits`` as the chunker takes it. Raises what reader and store raise; then nothing names what was stored.
    """
    sealer = _Sealer(reader, store, session, mask_bits)
    tree = Tree(store.page, base.root if base is not None else None)
    leaves: dict[int, Digest | None] = {}
    more_sectors = 0
    batches = _batches(_changed_regions(reader, end, _Cursor(tree)))
    for sealed in chain.from_iterable(in_threads(sealer.seal, batches, threads)):
        leaves[sealed.number] = sealed.leaf
        more_sectors += sealed.more_sectors
        progress(sealed.read_bytes)
    root = updated(
        store.page, session.add_page, base.root if base is not None else None, leaves, store.hash.digest_bytes
    )
    return Map(root, (base.data_bytes if base is not None else 0) + more_sectors * SECTOR_BYTES)


def in_threads(work: Callable[[W], T], batches: Iterator[W], threads: int) -> Iterator[T]:
    """The results, in no order: a thread may be putting a pack for long. One batch waits for the next free thread."""
    under_way: set[Future[T]] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix="seal") as pool:
        try:
            for batch in batches:
                under_way.add(pool.submit(work, batch))
                if len(under_way) > threads:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            for future in as_completed(under_way):
                yield future.result()
        finally:
            for future in under_way:
                future.cancel()


def _batches(regions: Iterator[_Region]) -> Iterator[_Batch]:
    """Regions in which little has changed go together: to begin with each would take longer than to seal it."""
    batch: _Batch = []
    changed_bytes = 0
    for region in regions:
        more_bytes = sum(end - start for start, end in region.runs)
        if batch and (changed_bytes + more_bytes > REGION_BYTES or len(batch) == BATCH_REGIONS_MAX):
            yield batch
            batch, changed_bytes = [], 0
        batch.append(region)
        changed_bytes += more_bytes
    if batch:
        yield batch


class _Cursor:
    """The base's regions, asked for in rising order."""

    NEAR_REGIONS = 256
    """What lies farther ahead is looked for from the root, not step by step."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._at = 0
        self._rest = tree.regions(0)
        self._next = next(self._rest, None)

    def next_from(self, region: int) -> tuple[int, Digest] | None:
        """The first region from ``region`` on that has a page, and that page."""
        if region - self._at > self.NEAR_REGIONS:
            self._rest = self._tree.regions(region)
            self._next = next(self._rest, None)
        while self._next is not None and self._next[0] < region:
            self._next = next(self._rest, None)
        self._at = region
        return self._next

    def leaf(self, region: int) -> Digest | None:
        found = self.next_from(region)
        return found[1] if found is not None and found[0] == region else None


def _changed_regions(reader: Reader, end: int, base: _Cursor) -> Iterator[_Region]:
    run = _pass_over(reader, end, base, reader.next_change(0, end))
    while run is not None:
        region = run[0] // REGION_BYTES
        region_end = (region + 1) * REGION_BYTES
        runs = []
        while run is not None and run[0] < region_end:
            runs.append((run[0], min(run[1], region_end)))
            run = (region_end, run[1]) if run[1] > region_end else reader.next_change(run[1], end)
        yield _Region(region, base.leaf(region), runs)
        run = _pass_over(reader, end, base, run)


def _pass_over(reader: Reader, end: int, base: _Cursor, run: tuple[int, int] | None) -> tuple[int, int] | None:
    """Without whole regions, at its beginning, that are holes and that the base has nothing of: what a large volume
    that shrank hides goes on for terabytes."""
    while run is not None and run[1] - run[0] > REGION_BYTES:
        known = base.next_from(run[0] // REGION_BYTES)
        data = reader.next_data(run[0])
        starts = [known[0] * REGION_BYTES] if known is not None else []
        starts += [data // REGION_BYTES * REGION_BYTES] if data is not None else []
        start = max(run[0], min(starts, default=run[1]))
        if start < run[1]:
            return start, run[1]
        run = reader.next_change(run[1], end)
    return run


class _Room:
    """Where a thread reads to, and what of it has been cut into chunks and not been stored yet."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(REGION_BYTES))
        self._used_bytes = 0
        self.chunks: list[tuple[Digest, Buffer]] = []
        self.pages: list[tuple[Digest, bytes]] = []
        """Those made of them."""

    def take(self, length: int) -> memoryview | None:
        """So many bytes that nobody uses; ``None`` if there are not as many, so that ``clear`` must come first."""
        start, end = self._used_bytes, self._used_bytes + length
        if end > REGION_BYTES:
            return None
        self._used_bytes = end
        return self._buffer[start:end]

    def clear(self) -> None:
        self._used_bytes = 0
        self.chunks.clear()


class _Sealer:
    """Seals regions, in any thread."""

    def __init__(self, reader: Reader, store: ChunkStore, session: Session, mask_bits: int) -> None:
        self._reader = reader
        self._store = store
        self._session = session
        self._mask_bits = mask_bits
        self._own = threading.local()

    def seal(self, batch: _Batch) -> list[_Sealed]:
        if not hasattr(self._own, "room"):
            self._own.room = _Room()
        room: _Room = self._own.room
        room.clear()
        room.pages.clear()
        sealed = [self._seal(region, room) for region in batch]
        self._session.add_chunks(room.chunks)
        if room.pages:
            self._store.keep_pages(room.pages)
        return sealed

    def _seal(self, region: _Region, room: _Room) -> _Sealed:
        below = decode_leaf(self._store.page(region.leaf)) if region.leaf is not None else []
        start = region.number * REGION_BYTES
        extents, read_bytes = below, 0
        for run_start, run_end in region.runs:
            above: list[Extent] = []
            for piece_start, piece_end in self._data(run_start, run_end):
                above += self._cut(start, piece_start, piece_end, room)
                read_bytes += piece_end - piece_start
            first, count = (run_start - start) // SECTOR_BYTES, (run_end - run_start) // SECTOR_BYTES
            extents = overlay(extents, first, count, above)
        if len(extents) > EXTENTS_MAX:
            with suppress(ObjectDamaged, ObjectMissing):  # it stays in its pieces until that is repaired
                extents, more_bytes = self._cut_afresh(start, extents, {extent.digest for extent in below}, room)
                read_bytes += more_bytes
        leaf = None
        if extents:
            page = encode_leaf(extents, self._store.hash.digest_bytes)
            leaf = self._session.add_page(page)
            room.pages.append((leaf, page))
        return _Sealed(region.number, leaf, _sectors(extents) - _sectors(below), read_bytes)

    def _data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The pieces of a run that may have data."""
        while end - start > ASK_BYTES:
            data = self._reader.next_data(start)
            if data is None or data >= end:
                return
            data -= data % SECTOR_BYTES
            hole = self._reader.next_hole(data)
            until = end if hole is None else min(end, -(-hole // SECTOR_BYTES) * SECTOR_BYTES)
            yield max(start, data), until
            start = until
        if start < end:
            yield start, end

    def _cut(self, region_start: int, start: int, end: int, room: _Room) -> list[Extent]:
        """Read a piece of a region and cut it into chunks."""
        data = self._take(end - start, room)
        self._reader.read_into(start, data)
        return self._chunks_of(data, (start - region_start) // SECTOR_BYTES, room)

    def _cut_afresh(
        self, region_start: int, extents: list[Extent], in_base: set[Digest], room: _Room
    ) -> tuple[list[Extent], int]:
        """The same region in fewer pieces, and how many bytes were read of what is not sealed.

        What the base has comes from there by its digests, and so is compared with them: to read it as a volume is
        read could give bytes that have changed on the disk a new digest, and then they would pass for the right ones.
        """
        data = self._take(REGION_BYTES, room)
        data[:] = bytes(REGION_BYTES)
        read_bytes = 0
        known, chunk = None, b""
        for extent in extents:
            place = data[extent.first * SECTOR_BYTES : extent.end * SECTOR_BYTES]
            if extent.digest not in in_base:
                self._reader.read_into(region_start + extent.first * SECTOR_BYTES, place)
                read_bytes += len(place)
                continue
            if extent.digest != known:
                known, chunk = extent.digest, self._store.read(extent.digest)
            piece = chunk[extent.inner * SECTOR_BYTES :][: len(place)]
            if len(piece) < len(place):
                raise ObjectDamaged(f"chunk {extent.digest.hex()} is shorter than its page says; run `archip check`")
            place[:] = piece
        return self._chunks_of(data, 0, room), read_bytes

    def _take(self, length: int, room: _Room) -> memoryview:
        data = room.take(length)
        if data is None:
            # The session copies what it keeps.
            self._session.add_chunks(room.chunks)
            room.clear()
            data = room.take(length)
            assert data is not None
        return data

    def _chunks_of(self, data: memoryview, first_of_piece: int, room: _Room) -> list[Extent]:
        """Cut what was read; its first sector has that number in its region."""
        extents = []
        for first, count in cut(data, self._mask_bits):
            chunk = data[first * SECTOR_BYTES : (first + count) * SECTOR_BYTES]
            digest = self._store.hash.digest(chunk)
            room.chunks.append((digest, chunk))
            extents.append(Extent(first_of_piece + first, count, digest, 0))
        return extents


def _sectors(extents: list[Extent]) -> int:
    return sum(extent.count for extent in extents)
