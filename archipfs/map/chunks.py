"""The store of chunks: what is sealed, by content hash, in the packs of one backend.

Whoever seals opens a :class:`Session`, adds chunks and pages, and flushes it; what the store has already is not stored
again. Whoever reads gives a digest and gets the bytes, or the place where they lie.

The order, and what a crash leaves
==================================

A pack is durable before the index knows it, and the index knows it before its chunks count as stored; nobody names a
digest in a record before the session is flushed. So whatever a crash cuts short leaves packs that nobody names, and an
index that lacks some packs: ``refresh`` finds them in the store.

The index is a cache, one a node. It may lack packs that others made: who misses a digest refreshes once, then it is
missing. It may have packs that another node's garbage collection took away: reading one fails with ``ObjectMissing``,
never with other bytes, for a pack's name stands for its content; it is forgotten then, and other copies are tried. And
a session that relied on one learns it from ``verify`` (docs/architecture.md, "Seal" and "Garbage collection").

Memory: a session holds the pack that it fills and those that it is just putting, one a thread at most; with a hash
that is not trusted the chunks' bytes a second time.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Condition, Lock
from typing import NamedTuple

import structlog
import zstandard

from archipfs.blockers.contract import Blocker, DataObject
from archipfs.errors import (
    ArchipError,
    FormatTooNew,
    InvalidInput,
    ObjectDamaged,
    ObjectMissing,
    ShutOut,
    StoreError,
    StoreUnavailable,
)
from archipfs.map.cache import Cache
from archipfs.map.cache import Location as Location
from archipfs.map.catalog import Catalog
from archipfs.map.hashes import Buffer, ContentHash
from archipfs.map.packs import HEADER_BYTES, Coding, Kind, PackBuilder, PackIndex, index_bytes, parse
from archipfs.map.records import CondemnedRecord, DamageRecord
from archipfs.types import Digest, PackId

log = structlog.get_logger()

Progress = Callable[[int, int], None]
"""Called with how much is done, and how much there is in all."""

PACK_KIND = "pack"
COMPRESSIONS = ("none", "zstd")

_HEADS_AT_ONCE = 4
_HEADS_IN_MEMORY = 64
_HEADS_OF_BYTES = 256 << 20
"""Heads of so many bytes of packs at most: they take a tenth of that where all chunks are of one sector."""
_HEAD_BYTES_LIKELY = 16 << 10
"""One read is enough then: a pack of 4 MiB with chunks of 32 KiB has a head of 8 KiB."""


_SAYS_NOTHING = (StoreUnavailable, ShutOut)
"""What fails so, fails whatever it is that is asked for."""


class Swept(ArchipError):
    """What a session relied upon is being taken away, gone or damaged: seal anew."""


def check_compression(name: str) -> str:
    """``name`` if chunks can be stored so. Raises ``InvalidInput``."""
    if name not in COMPRESSIONS:
        raise InvalidInput(f"no compression is called {name!r}; choose one of {', '.join(COMPRESSIONS)}")
    return name


def pack_key(pack: PackId) -> str:
    return f"{PACK_KIND}/{pack}"


class _Marks(NamedTuple):
    """What records say about packs."""

    condemned: frozenset[PackId]
    damaged: frozenset[tuple[PackId, Digest]]


class ChunkStore:
    """The chunks and pages of one backend. Thread-safe. Blocks: never call it from the event loop.

    Locks, in this order: ``_refreshing`` and ``_marking``, each held around calls of the store, so that there is one at
    a time; ``claims``, then ``_sessions_lock`` or the lock of a session, for moments.
    """

    def __init__(
        self,
        blocker: Blocker,
        cache: Cache,
        content_hash: ContentHash,
        *,
        node: str,
        compression: str = "none",
        pack_bytes: int | None = None,
    ) -> None:
        """``node`` is this node's id; packs have about ``pack_bytes``, by default what the driver wishes."""
        check_compression(compression)
        self.hash = content_hash
        self.node = node
        self.pack_bytes = blocker.pack_bytes if pack_bytes is None else pack_bytes
        self.blocker = blocker
        self.cache = cache
        self.damaged_packs: dict[PackId, str] = {}
        """Packs whose heads cannot be read, and why: nothing in them can be found."""
        self._catalog = Catalog(blocker)
        self._coder = _Coder(compression)
        self._marks = _Marks(frozenset(), frozenset())
        self._refreshing = Lock()
        self._marking = Lock()
        self._refreshes_begun = 0
        self._sessions_lock = Lock()
        self._sessions: set[Session] = set()
        self.claims = Lock()
        """Held by a session while it takes something in: no other one does so at that moment."""
        self.puts = 0
        """How many packs the sessions have put so far: the index may have what it had not before."""

    # The index

    def refresh(self, progress: Progress | None = None) -> None:
        """Make the index know the packs that are in the store, and no others; only new packs' heads are read.

        Packs whose heads cannot be read are left out and named in ``damaged_packs``. Raises what the store raises.
        """
        with self._refreshing:
            self._refresh(progress)

    def _refresh(self, progress: Progress | None) -> None:
        self._refreshes_begun += 1
        # Before the list: a session of ours may add one that the list does not have yet.
        known = self.cache.packs()
        present = {PackId(key.partition("/")[2]) for key in self.blocker.list(PACK_KIND)}
        gone = known - present
        if gone:
            self.forget(gone)
        self._learn(sorted(present - known), progress)
        self.reread_marks()

    def _learn(self, packs: Sequence[PackId], progress: Progress | None) -> None:
        damaged: dict[PackId, str] = {}
        done = 0
        following = iter(packs)
        together = min(_HEADS_IN_MEMORY, max(_HEADS_AT_ONCE, _HEADS_OF_BYTES // self.pack_bytes))
        with ThreadPoolExecutor(_HEADS_AT_ONCE, thread_name_prefix="pack-heads") as threads:
            while batch := list(islice(following, together)):
                heads = list(threads.map(self._index_or_error, batch))
                self.cache.add_packs([head for head in heads if isinstance(head, PackIndex)])
                for pack, found in zip(batch, heads, strict=True):
                    if isinstance(found, StoreError) and not isinstance(found, ObjectMissing):
                        if pack not in self.damaged_packs:
                            log.error("pack cannot be used", pack=pack, error=str(found))
                        damaged[pack] = str(found)
                done += len(batch)
                if progress is not None:
                    progress(done, len(packs))
        self.damaged_packs = damaged

    def _index_or_error(self, pack: PackId) -> PackIndex | StoreError:
        """One bad pack does not keep the others from being read, be it damaged or on a bad place of a disk; one that
        was deleted meanwhile is no error. A store that cannot be reached says nothing about its packs."""
        try:
            return self.index(pack)
        except _SAYS_NOTHING:
            raise
        except StoreError as error:
            return error

    def reread_marks(self) -> frozenset[PackId]:
        """Learn what is known to be damaged and which packs are condemned. Returns these, as the store says now."""
        # One at a time: else what was read first could replace what was read last.
        with self._marking:
            condemned = frozenset(PackId(ident) for ident in self._catalog.idents(CondemnedRecord))
            damaged = frozenset(
                (found.record.pack, Digest(bytes.fromhex(digest)))
                # A record that cannot be read says nothing; `archip check` says so.
                for _, found in self._catalog.list(DamageRecord, skip_damaged=True)
                for digest in found.record.digests
            )
            before, self._marks = self._marks, _Marks(condemned, damaged)
            if damaged != before.damaged:
                try:
                    self.cache.regions_forget()
                except BaseException:
                    # The next look has to find that it differs, and try again.
                    self._marks = _Marks(condemned, before.damaged)
                    raise
        return condemned

    def forget(self, packs: Iterable[PackId]) -> None:
        """These packs are gone: nothing is found in them, or in resolved regions, any more. Pages are named by their
        content and stay."""
        self.cache.forget_packs(packs)
        self.cache.regions_forget()

    def packs(self) -> set[PackId]:
        """Those that the index knows."""
        return self.cache.packs()

    def condemned(self) -> frozenset[PackId]:
        """As of the last look: see ``reread_marks``."""
        return self._marks.condemned

    def damaged(self) -> frozenset[tuple[PackId, Digest]]:
        """What is known to be damaged, as of the last look."""
        return self._marks.damaged

    def index(self, pack: PackId) -> PackIndex:
        """What a pack's head says, read from the store.

        Raises ``ObjectMissing``, ``ObjectDamaged``, ``FormatTooNew``, each naming the pack.
        """
        key = pack_key(pack)
        try:
            begin = self.blocker.get(key, 0, _HEAD_BYTES_LIKELY)
        except (ObjectMissing, *_SAYS_NOTHING):
            raise
        except StoreError:
            # A disk may have a bad place behind the head.
            begin = self.blocker.get(key, 0, HEADER_BYTES)
        try:
            head_bytes = index_bytes(begin)
        except (ObjectDamaged, FormatTooNew):
            # It says the same, and which pack.
            return parse(pack, begin)
        if head_bytes > len(begin):
            begin += self.blocker.get(key, len(begin), head_bytes - len(begin))
        return parse(pack, begin[:head_bytes])

    # Where things lie

    def locate(self, digest: Digest) -> Location:
        """As ``locate_all``."""
        return self.locate_all([digest])[0]

    def locate_all(self, digests: Sequence[Digest]) -> list[Location]:
        """Where each lies: rather in a pack that is not condemned, then in the one with the lowest id.

        Raises ``ObjectMissing`` if one is in no pack, and ``ObjectDamaged`` if all copies of one are known to be
        damaged.
        """
        located = []
        for digest, place in zip(digests, self.locate_each(digests), strict=True):
            if place is None:
                raise self._unusable(digest)
            located.append(place)
        return located

    def locate_each(self, digests: Sequence[Digest]) -> list[Location | None]:
        """As ``locate_all``, but ``None`` for one that nobody can read. Refreshes at most once, however many miss."""
        begun = self._refreshes_begun
        found = self._find_usable(digests)
        if not all(found):
            self._refresh_since(begun)
            found = self._find_usable(digests)
        return [places[0] if places else None for places in found]

    def _find_usable(self, digests: Sequence[Digest]) -> list[list[Location]]:
        return [self._usable(digest, places) for digest, places in zip(digests, self.cache.find(digests), strict=True)]

    def _usable(self, digest: Digest, places: Iterable[Location]) -> list[Location]:
        """Those not known to be damaged, the best one first. All nodes put them into the same order."""
        marks = self._marks
        usable = (
            [place for place in places if (place.pack, digest) not in marks.damaged] if marks.damaged else [*places]
        )
        if len(usable) > 1:
            usable.sort(key=lambda place: (place.pack in marks.condemned, place.pack, place.offset))
        return usable

    def _unusable(self, digest: Digest) -> StoreError:
        """The error for a digest with no usable place."""
        places = self.cache.find([digest])[0]
        if places:
            packs = ", ".join(sorted(place.pack for place in places))
            return ObjectDamaged(
                f"chunk {digest.hex()} is damaged in every pack that has it ({packs}); "
                "run `archip check --data --repair`"
            )
        unread = f", {len(self.damaged_packs)} of which cannot be read" if self.damaged_packs else ""
        return ObjectMissing(
            f"chunk {digest.hex()} is in no pack of {self.blocker.describe()}{unread}; run `archip check`"
        )

    def _refresh_since(self, begun: int) -> None:
        """Refresh, unless somebody else began to after ``begun`` was read."""
        with self._refreshing:
            if self._refreshes_begun == begun:
                self._refresh(None)

    # Bytes

    def read(self, digest: Digest) -> bytes:
        """The raw bytes that have that digest: they are hashed. Whatever is wrong with one copy, the others are tried.

        Raises ``ObjectMissing``, ``ObjectDamaged``, and what the store raises.
        """
        begun = self._refreshes_begun
        failure: StoreError | None = None
        for refreshed in (False, True):
            if refreshed:
                # Another node may have put a copy elsewhere.
                self._refresh_since(begun)
            for place in self._find_usable([digest])[0]:
                try:
                    return self.read_at(place, digest)
                except ObjectMissing:
                    self.forget([place.pack])
                except StoreError as error:
                    failure = error
        raise failure or self._unusable(digest)

    def read_at(self, place: Location, digest: Digest) -> bytes:
        """The raw bytes of ``digest`` at ``place``. Raises ``ObjectMissing`` if the pack is gone, ``ObjectDamaged``."""
        stored = self.blocker.get(pack_key(place.pack), place.offset, place.stored_bytes)
        raw = self._coder.decode(place.coding, stored, place.raw_bytes)
        if raw is None or self.hash.digest(raw) != digest:
            raise ObjectDamaged(
                f"pack {place.pack} is damaged at {place.offset}: it should have chunk {digest.hex()}; "
                "run `archip check --data --repair`"
            )
        return raw

    def page(self, digest: Digest) -> bytes:
        """A map page, as ``read``; from LMDB if that has it."""
        page = self.cache.page_get(digest)
        if page is None or self.hash.digest(page) != digest:
            page = self.read(digest)
            with _only_slower():
                self.cache.page_put(digest, page)
        return page

    def keep_pages(self, pages: Sequence[tuple[Digest, bytes]]) -> None:
        """Have LMDB know pages that are just being stored: whoever reads the volume, or seals what is written on top of
        it, needs them soon."""
        with _only_slower():
            self.cache.pages_put(pages)

    def open_pack(self, pack: PackId) -> DataObject:
        """The pack, to read at its places. Raises ``ObjectMissing``, and ``ObjectDamaged`` if its size is not right.

        One that is missing is forgotten: what is located again lies elsewhere.
        """
        try:
            expected_bytes = self.cache.pack_bytes(pack)
            if expected_bytes is None:
                expected_bytes = self.index(pack).total_bytes
            data = self.blocker.open(pack_key(pack))
        except ObjectMissing:
            self.forget([pack])
            raise
        try:
            found_bytes = data.size()
            if found_bytes != expected_bytes:
                raise ObjectDamaged(
                    f"pack {pack} is damaged: it has {found_bytes} bytes, not {expected_bytes}; "
                    "run `archip check --data --repair`"
                )
        except BaseException:
            data.close()
            raise
        return data

    # Regions, resolved: what is in them is the composer's affair

    def region_get(self, leaf: Digest) -> bytes | None:
        return self.cache.region_get(leaf)

    def regions_ticket(self) -> int:
        """For ``region_put``, drawn before anything is located that goes into the region."""
        return self.cache.regions_ticket()

    def region_put(self, leaf: Digest, blob: bytes, ticket: int) -> None:
        """Keep it, unless packs have gone or damage has become known since the ticket was drawn."""
        with _only_slower():
            self.cache.region_put(leaf, blob, ticket)

    # Storing

    @contextmanager
    def session(self, progress: Progress | None = None) -> Iterator["Session"]:
        """To add chunks and pages. What it wrote or relied upon is pinned until it ends: commit before that.

        Refreshes first, so that what other nodes stored, or this one before it lost its cache, is not stored again.
        """
        self.refresh(progress)
        session = Session(self, self._coder)
        with self._sessions_lock:
            self._sessions.add(session)
        try:
            yield session
        finally:
            with self._sessions_lock:
                self._sessions.discard(session)

    def pinned(self) -> set[PackId]:
        """Packs that sessions of this process wrote or rely upon: garbage collection leaves them alone."""
        with self._sessions_lock:
            sessions = tuple(self._sessions)
        return {pack for session in sessions for pack in session.relied_upon()}

    def check_others(self, session: "Session", digest: Digest, data: Buffer) -> None:
        """Raises ``StoreError`` if another session of this process is about to store other bytes under that digest."""
        with self._sessions_lock:
            others = self._sessions - {session}
        for other in others:
            other.check_pending(digest, data)

    def place_to_rely_on(self, digest: Digest, data: Buffer, places: Iterable[Location]) -> Location | None:
        """Which of ``places`` has ``data`` and may be relied upon: in no condemned pack, and not known to be damaged.

        With a hash that is not trusted the bytes are read and compared. Raises ``StoreError`` if they differ.
        """
        for place in self._usable(digest, places):
            if place.pack in self._marks.condemned:
                continue
            if self.hash.trusted:
                return place
            try:
                found = self.read_at(place, digest)
            except (ObjectDamaged, ObjectMissing):
                # No copy to rely upon: this one is stored.
                continue
            check_same(digest, found, data)
            return place
        return None


@contextmanager
def _only_slower() -> Iterator[None]:
    """What was read is good, and is returned, also where the cache's disk is full or fails."""
    try:
        yield
    except StoreError as error:
        log.warning("cache not written", error=str(error))


def check_same(digest: Digest, found: Buffer, data: Buffer) -> None:
    """Raises ``StoreError`` if two contents with the same digest differ."""
    if memoryview(found) != memoryview(data):
        raise StoreError(
            f"two contents have the hash {digest.hex()}; keep this volume in a backend whose hash is blake3 or sha256"
        )


class Session:
    """Adds chunks and pages to a store. Several threads may add at once; one of them flushes when all have added.

    After an error it may be gone on with: what was not put is put by the next call. What was flushed stays, and is
    found by the next session even if this one is given up.

    Locks: ``_changed`` is held for moments, never around a call of the store or the cache.
    """

    def __init__(self, store: ChunkStore, coder: "_Coder") -> None:
        self.added_bytes = 0
        """What was new, as stored."""
        self.added_chunks = 0
        """Chunks and pages that were new."""
        self.hit_chunks = 0
        """Chunks and pages that the store had."""
        self._store = store
        self._coder = coder
        self._changed = Condition()
        self._filling = _Filling(self._new_builder())
        self._full: deque[_Filling] = deque()
        self._putting = 0
        self._pending: dict[Digest, bytes | None] = {}
        """What is in no durable pack yet; with its bytes where the hash is not trusted."""
        self._relied_upon: set[PackId] = set()
        self._damaged_before = store.damaged()

    def add_chunk(self, digest: Digest, data: Buffer) -> bool:
        """Have the store keep ``data``, which has that digest. Whether it was new. Puts a pack when one is full.

        Raises ``StoreError`` if the store has other bytes under that digest (with a hash that is not trusted).
        """
        return self._add(digest, Kind.CHUNK, data)

    def add_chunks(self, chunks: Sequence[tuple[Digest, Buffer]]) -> None:
        """As ``add_chunk`` for each, with one look into the index for all where the hash is trusted.

        What another thread puts between that look and its chunk's turn may be stored twice.
        """
        found: Sequence[Sequence[Location] | None] = [None] * len(chunks)
        if self._store.hash.trusted:
            found = self._store.cache.find([digest for digest, _ in chunks])
        for (digest, data), places in zip(chunks, found, strict=True):
            self._add(digest, Kind.CHUNK, data, places)

    def lacks(self, digests: Iterable[Digest]) -> list[Digest]:
        """Which of these are to be added, each once: the store has the others, and the session relies on them.

        With a hash that is not trusted those are all: only who has the bytes can compare them.
        """
        distinct = list(dict.fromkeys(digests))
        if not self._store.hash.trusted:
            return distinct
        lacking = []
        for digest, places in zip(distinct, self._store.cache.find(distinct), strict=True):
            if self._is_pending(digest, b""):
                continue
            place = self._store.place_to_rely_on(digest, b"", places)
            if place is None:
                lacking.append(digest)
                continue
            with self._changed:
                self._relied_upon.add(place.pack)
                self.hit_chunks += 1
        return lacking

    def add_page(self, page: bytes) -> Digest:
        """As ``add_chunk``. Returns its digest."""
        digest = self._store.hash.digest(page)
        self._add(digest, Kind.PAGE, page)
        return digest

    def flush(self) -> None:
        """Everything that was added is durable when it returns, and the index knows it."""
        with self._changed:
            while self._putting:
                self._changed.wait()
            self._close_filling()
        while self._put_one():
            continue

    def verify(self) -> None:
        """Raises ``Swept`` if anything that this session wrote or relies upon is condemned or gone, or was found to be
        damaged since it began: whoever seals anew has a good copy yet, and stores it.

        The condemned come before the list: a pack that was condemned, deleted and absolved before the first look is
        missing in the second.
        """
        condemned = self._store.reread_marks()
        damaged = {pack for pack, _ in self._store.damaged() - self._damaged_before}
        present = {PackId(key.partition("/")[2]) for key in self._store.blocker.list(PACK_KIND)}
        relied_upon = self.relied_upon()
        gone = {pack for pack in relied_upon - present if not self._store.blocker.exists(pack_key(pack))}
        if gone:
            self._store.forget(gone)
        swept = relied_upon & (condemned | damaged) | gone
        if swept:
            raise Swept(
                f"{len(swept)} of {len(relied_upon)} packs that were relied upon are being collected as garbage or "
                f"damaged, pack {min(swept)} among them; seal anew"
            )

    def relied_upon(self) -> set[PackId]:
        """The packs that it wrote, and those in which it found something."""
        with self._changed:
            return set(self._relied_upon)

    def _add(self, digest: Digest, kind: Kind, data: Buffer, places: Sequence[Location] | None = None) -> bool:
        """``places``: where the index has it, if that was looked up already."""
        if self._is_pending(digest, data):
            return False
        puts = self._store.puts
        if places is None:
            places = self._store.cache.find([digest])[0]
        place = self._store.place_to_rely_on(digest, data, places)
        if place is not None:
            with self._changed:
                self._relied_upon.add(place.pack)
                self.hit_chunks += 1
            return False
        coding, stored = self._coder.encode(data)
        if not self._take_in(digest, kind, coding, data, stored, puts):
            # Another thread came first: now it is pending, or stored.
            return self._add(digest, kind, data)
        self._put_one()
        return True

    def _take_in(
        self, digest: Digest, kind: Kind, coding: Coding, data: Buffer, stored: Buffer, puts_before: int
    ) -> bool:
        """Unless it is pending by now. Where the hash is not trusted, nobody can have stored or be about to store other
        bytes under the digest without these being compared: not if something was put since we looked either."""
        trusted = self._store.hash.trusted
        kept = None if trusted else bytes(data)
        with self._store.claims:
            if not trusted:
                self._store.check_others(self, digest, data)
            with self._changed:
                if digest in self._pending or not (trusted or puts_before == self._store.puts):
                    return False
                self._pending[digest] = kept
                self._filling.builder.add(digest, kind, coding, len(data), stored)
                self._filling.digests.append(digest)
                self.added_bytes += len(stored)
                self.added_chunks += 1
                if self._filling.builder.stored_bytes >= self._store.pack_bytes:
                    self._close_filling()
        return True

    def check_pending(self, digest: Digest, data: Buffer) -> None:
        """Raises ``StoreError`` if other bytes are pending here under that digest."""
        with self._changed:
            found = self._pending.get(digest)
        if found is not None:
            check_same(digest, found, data)

    def _is_pending(self, digest: Digest, data: Buffer) -> bool:
        with self._changed:
            if digest not in self._pending:
                return False
            found = self._pending[digest]
            self.hit_chunks += 1
        if found is not None:
            check_same(digest, found, data)
        return True

    def _new_builder(self) -> PackBuilder:
        return PackBuilder(self._store.hash.digest_bytes, self._store.node, time.time_ns())

    def _close_filling(self) -> None:
        """Have it put next; ``_changed`` is held."""
        if self._filling.digests:
            self._full.append(self._filling)
            self._filling = _Filling(self._new_builder())

    def _put_one(self) -> bool:
        """Put a pack that is full, if there is one: durably, then the index, and only then is it not pending."""
        with self._changed:
            if not self._full:
                return False
            filling = self._full.popleft()
            self._putting += 1
        done = False
        try:
            pack, pieces = filling.builder.pieces()
            with self._changed:
                # Before it is in the store: garbage collection in this process must not find it unpinned.
                self._relied_upon.add(pack)
            self._store.blocker.put(pack_key(pack), pieces)
            self._store.cache.add_pack(parse(pack, pieces[0]))
            with self._store.claims:
                self._store.puts += 1
            done = True
        finally:
            with self._changed:
                self._putting -= 1
                if done:
                    for digest in filling.digests:
                        del self._pending[digest]
                else:
                    self._full.append(filling)
                self._changed.notify_all()
        return True


class _Filling:
    """A pack that is being filled."""

    def __init__(self, builder: PackBuilder) -> None:
        self.builder = builder
        self.digests: list[Digest] = []


class _Coder:
    """How chunks are stored. Each thread has its own state: that of zstandard is for one at a time."""

    def __init__(self, compression: str) -> None:
        self._compress = compression == "zstd"
        self._own = threading.local()

    def encode(self, data: Buffer) -> tuple[Coding, Buffer]:
        """Compressed only where that saves an eighth: reading it costs more then, and the engine cannot do it."""
        if self._compress:
            stored = self._compressor().compress(data)
            if len(stored) * 8 <= len(data) * 7:
                return Coding.ZSTD, stored
        return Coding.RAW, data

    def decode(self, coding: Coding, stored: bytes, raw_bytes: int) -> bytes | None:
        """The raw bytes, ``None`` if ``stored`` cannot be them."""
        if coding is Coding.RAW:
            return stored
        try:
            # What a damaged frame claims to become must not be allocated.
            if zstandard.frame_content_size(stored) != raw_bytes:
                return None
            return self._decompressor().decompress(stored)
        except zstandard.ZstdError:
            return None

    def _compressor(self) -> zstandard.ZstdCompressor:
        if not hasattr(self._own, "compressor"):
            self._own.compressor = zstandard.ZstdCompressor()
        compressor: zstandard.ZstdCompressor = self._own.compressor
        return compressor

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if not hasattr(self._own, "decompressor"):
            self._own.decompressor = zstandard.ZstdDecompressor()
        decompressor: zstandard.ZstdDecompressor = self._own.decompressor
        return decompressor
