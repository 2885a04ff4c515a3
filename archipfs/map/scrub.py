"""Scrubbing: every chunk and page in every pack is read and hashed, and what is damaged is written down.

A damage record has sealers and readers pass over the bad copy: where there is no other, reads of those bytes fail
with EIO, and nothing else suffers. ``repair`` looks for the right bytes elsewhere and stores them anew; then garbage
collection can do without the damaged pack, copies what else is in it and deletes it together with its record.

Packs are gone through in the order of their ids. How far a scrub has come is kept in a file, so that one that was ended
early goes on there; packs that came meanwhile with lower ids are read the next time.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from archipfs.blockers.contract import Blocker, DataObject
from archipfs.errors import Conflict, ObjectDamaged, ObjectMissing
from archipfs.map.catalog import Catalog
from archipfs.map.chunker import cut, is_zero
from archipfs.map.chunks import ChunkStore, Location, pack_key
from archipfs.map.packs import Coding, Entry, Kind, PackBuilder
from archipfs.map.records import DamageRecord
from archipfs.map.survey import find_lost, unreadable_packs
from archipfs.types import REGION_BYTES, SECTOR_BYTES, Digest, PackId

Progress = Callable[[int, int], None]
"""Told how many bytes were read, and of how many, in the thread that works; what it raises ends the work."""

_NAP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Scrubbed:
    packs: int
    """Read by this run."""
    read_bytes: int
    damaged: int
    """Chunks and pages found damaged by this run."""
    resumed_after: PackId | None
    """Where an earlier run was ended, from which this one went on."""


class Bookmark:
    """How far a scrub of one store has come: a file that may be lost, and then all is read again."""

    def __init__(self, path: Path, store_id: str) -> None:
        self._path = path
        self._store_id = store_id

    def read(self) -> PackId | None:
        try:
            kept = json.loads(self._path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(kept, dict) or kept.get("store") != self._store_id or not isinstance(kept.get("after"), str):
            return None
        return PackId(kept["after"])

    def write(self, pack: PackId) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        temporary.write_text(json.dumps({"store": self._store_id, "after": pack}), encoding="ascii")
        os.replace(temporary, self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def scrub(
    catalog: Catalog,
    store: ChunkStore,
    bookmark: Bookmark,
    *,
    bytes_per_second: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Scrubbed:
    """Read and hash all that is in the packs, from where the last run was ended; write down what is damaged.

    Tell those who remember places in packs when it returns, or raises: what they read may be known to be damaged now.
    Memory: a pack's index, and a chunk.
    """
    store.refresh()
    resumed_after = bookmark.read()
    packs = sorted(pack for pack in store.packs() if resumed_after is None or pack > resumed_after)
    pace = _Pace(sum(store.cache.pack_bytes(pack) or 0 for pack in packs), bytes_per_second, progress)
    damaged = 0
    try:
        for pack in packs:
            try:
                bad = [entry.digest for entry in _damaged_entries(store, pack, pace)]
            except ObjectMissing:
                continue  # it was collected as garbage meanwhile
            except ObjectDamaged:
                continue  # its head is: `check_backend` says so, and nobody can say what else
            damaged += len(bad)
            write_down(catalog, pack, bad)
            bookmark.write(pack)
    finally:
        store.reread_marks()
    bookmark.remove()
    return Scrubbed(len(packs), pace.done_bytes, damaged, resumed_after)


def _damaged_entries(store: ChunkStore, pack: PackId, pace: "_Pace") -> Iterator[Entry]:
    for entry in store.index(pack).entries:
        try:
            store.read_at(_place(pack, entry), entry.digest)
        except ObjectDamaged:
            yield entry
        pace.advance(entry.stored_bytes)


def _place(pack: PackId, entry: Entry) -> Location:
    return Location(pack, entry.kind, entry.coding, entry.offset, entry.stored_bytes, entry.raw_bytes)


def write_down(catalog: Catalog, pack: PackId, damaged: Iterable[Digest]) -> None:
    """Have the pack's damage record say just that; no record where nothing is damaged."""
    digests = sorted(digest.hex() for digest in damaged)
    while True:
        found = catalog.get(DamageRecord, pack)
        if (found.record.digests if found is not None else []) == digests:
            return
        with suppress(Conflict):
            if digests:
                catalog.put(DamageRecord(pack, digests), pack, found.version if found is not None else None)
            elif found is not None:
                catalog.delete(DamageRecord, pack, found.version)
            return


class _Pace:
    """Counts what is read, says so, and holds back to a number of bytes a second."""

    def __init__(self, total_bytes: int, bytes_per_second: int | None, progress: Progress) -> None:
        self.done_bytes = 0
        self._total_bytes = total_bytes
        self._bytes_per_second = bytes_per_second
        self._progress = progress
        self._started = time.monotonic()

    def advance(self, some_bytes: int) -> None:
        self.done_bytes += some_bytes
        self._progress(self.done_bytes, max(self.done_bytes, self._total_bytes))
        while (ahead := self._seconds_ahead()) > 0:
            time.sleep(min(ahead, _NAP_SECONDS))
            self._progress(self.done_bytes, max(self.done_bytes, self._total_bytes))

    def _seconds_ahead(self) -> float:
        if self._bytes_per_second is None:
            return 0.0
        return self._started + self.done_bytes / self._bytes_per_second - time.monotonic()


# Repair


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another place to look for bytes: a backend's data objects, and its packs if they have the same hash."""

    backend: str
    blocker: Blocker
    store: ChunkStore | None


@dataclass(frozen=True, slots=True)
class Repaired:
    mended: int
    """Chunks and pages that have a good copy again."""
    lost: int
    """That have none still."""
    tried: Sequence[str]
    """Where was looked, for people."""


def repair(
    catalog: Catalog,
    store: ChunkStore,
    elsewhere: Sequence[Elsewhere],
    mask_bits: int,
    progress: Progress = lambda done, total: None,
) -> Repaired:
    """Store anew what is lost, as far as its bytes are found somewhere. Scrub before; collect garbage afterwards.

    First, what only this node's index can find, in packs whose heads are damaged, is put where all can. Then looked
    through are, in this order, the packs of other backends with the same hash, and all data objects: what is
    not sealed yet. Those are searched for the chunks that the chunker cuts from them, and for the neighbourhood of
    every sector that a damaged copy still has. ``mask_bits`` is what the chunker was told when the store was sealed.
    Memory: two regions, and the damaged copies.
    """
    store.refresh()
    _rescue(catalog, store, lambda: progress(0, 0))
    tried = ["the other packs of this backend"]
    mended: set[Digest] = set()
    while True:
        lost = set(find_lost(catalog, store, lambda: progress(0, 0)))
        # What was stored anew and is lost still is not mended by storing it once more: it makes no sense as it is.
        found = _look_elsewhere(store, elsewhere, lost - mended, mask_bits, tried, progress)
        mended |= found
        if not found:
            return Repaired(len(mended - lost), len(lost), tried)
        # A page that is there again may lead to more that is lost.


def _rescue(catalog: Catalog, store: ChunkStore, pulse: Callable[[], None]) -> None:
    """Put what our index still finds in packs whose heads are damaged into packs that everybody can read."""
    unreadable = unreadable_packs(store, pulse)
    builder = PackBuilder(store.hash.digest_bytes, store.node, time.time_ns())

    def put() -> None:
        pack, data = builder.build()
        store.blocker.put(pack_key(pack), data)

    for digest in sorted(find_lost(catalog, store, pulse, without=unreadable)):
        for place in store.cache.find([digest])[0]:
            pulse()
            with suppress(ObjectMissing, ObjectDamaged):
                raw = store.read_at(place, digest)
                builder.add(digest, place.kind, Coding.RAW, len(raw), raw)
                break
        if builder.stored_bytes >= store.pack_bytes:
            put()
            builder = PackBuilder(store.hash.digest_bytes, store.node, time.time_ns())
    if builder.stored_bytes:
        put()
        store.refresh()


def _look_elsewhere(
    store: ChunkStore,
    elsewhere: Sequence[Elsewhere],
    missing: set[Digest],
    mask_bits: int,
    tried: list[str],
    progress: Progress,
) -> set[Digest]:
    """Store anew what of ``missing`` can be found, and take it out there. What that was."""
    found: set[Digest] = set()

    def keep(digest: Digest, data: bytes, kind: Kind) -> None:
        if kind is Kind.PAGE:
            session.add_page(data)
        else:
            session.add_chunk(digest, data)
        found.add(digest)
        missing.discard(digest)

    with store.session() as session:
        for other in elsewhere:
            if missing and other.store is not None and other.store.hash.name == store.hash.name:
                _try(tried, f"the packs of backend {other.backend}")
                for digest in sorted(missing):
                    progress(0, 0)
                    with suppress(ObjectMissing, ObjectDamaged):
                        keep(digest, other.store.read(digest), other.store.locate(digest).kind)
        search = _Search(store, missing, mask_bits)
        for other in elsewhere:
            if missing:
                _try(tried, f"what is not sealed in backend {other.backend}")
                for key in sorted(other.blocker.list_data("layer")):
                    for digest, data in search.through(other.blocker, key, progress):
                        keep(digest, data, Kind.CHUNK)
        session.flush()
    return found


def _try(tried: list[str], what: str) -> None:
    if what not in tried:
        tried.append(what)


class _Search:
    """Looks for chunks in data objects by their hashes."""

    def __init__(self, store: ChunkStore, missing: set[Digest], mask_bits: int) -> None:
        """``missing`` is looked at all the time: what is taken out of it is not looked for any more."""
        self._hash = store.hash
        self._missing = missing
        self._mask_bits = mask_bits
        self._anchors: dict[int, list[tuple[Digest, int, int]]] = defaultdict(list)
        """By the hash of a sector of a damaged copy: the chunk, the sector's place in it, and how many it has."""
        for digest, places in zip(missing, store.cache.find(list(missing)), strict=True):
            for place in places:
                if place.kind is Kind.CHUNK and place.coding is Coding.RAW:
                    with suppress(ObjectMissing):
                        self._remember(digest, store.blocker.get(pack_key(place.pack), place.offset, place.raw_bytes))

    def _remember(self, digest: Digest, damaged: bytes) -> None:
        sectors = len(damaged) // SECTOR_BYTES
        for number in range(sectors):
            sector = damaged[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
            if not is_zero(sector):
                self._anchors[xxhash.xxh3_64_intdigest(sector)].append((digest, number, sectors))

    def through(self, blocker: Blocker, key: str, progress: Progress) -> Iterator[tuple[Digest, bytes]]:
        """What is missing and found in one data object."""
        try:
            data = blocker.open_data(key, writable=False)
        except ObjectMissing:
            return  # it was sealed or removed meanwhile
        with closing(data):
            offset = data.next_data(0)
            while offset is not None and self._missing:
                progress(0, 0)
                start = offset // REGION_BYTES * REGION_BYTES
                content = data.pread(start, REGION_BYTES)
                yield from self._pieces(content)
                yield from self._neighbourhoods(data, start, content)
                offset = data.next_data(start + REGION_BYTES)

    def _pieces(self, content: bytes) -> Iterator[tuple[Digest, bytes]]:
        for first, count in cut(content, self._mask_bits):
            piece = content[first * SECTOR_BYTES : (first + count) * SECTOR_BYTES]
            digest = self._hash.digest(piece)
            if digest in self._missing:
                yield digest, piece

    def _neighbourhoods(self, data: DataObject, start: int, content: bytes) -> Iterator[tuple[Digest, bytes]]:
        if not self._anchors:
            return
        for at in range(0, len(content), SECTOR_BYTES):
            known = self._anchors.get(xxhash.xxh3_64_intdigest(content[at : at + SECTOR_BYTES]), ())
            for digest, number, sectors in known:
                begin = start + at - number * SECTOR_BYTES
                if digest in self._missing and begin >= 0:
                    window = data.pread(begin, sectors * SECTOR_BYTES)
                    if self._hash.digest(window) == digest:
                        yield digest, window
