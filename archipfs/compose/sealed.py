"""Reading sealed layers: from a region's number to places in open packs, for the engine.

    region ─▶ leaf page (the layer's tree) ─▶ extents, chunks' digests ─▶ places in packs (the index) ─▶ open packs

The places are kept in LMDB by the leaf's digest, so that a region is one look-up, whichever layers have it. A place is
in a pack's own bytes where the chunk is not compressed: those of a pack with a descriptor are read in place, those of
others through the pack cache. The place of a compressed chunk is in the pack's *unpacked view*, a data object that is
called back, whose reads go through the object cache: the chunk that lies at byte N of the pack begins there at
N × 512 KiB, the most that a chunk can be.
"""

import hashlib
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from archipfs.blockers.contract import DataObject
from archipfs.compose.engine import PACK_DAMAGED, CacheStatistics, EngineLayer, EnginePack, ExtentTable, Region
from archipfs.compose.engine.extents import EXTENT
from archipfs.compose.object_cache import ObjectCache
from archipfs.compose.pack_cache import PackCache
from archipfs.errors import ArchipError, NotSupported, ObjectDamaged, ObjectMissing, StoreError
from archipfs.map.cache import Cache
from archipfs.map.chunks import PACK_KIND, ChunkStore, Progress
from archipfs.map.hashes import content_hash
from archipfs.map.mapper import Mapper
from archipfs.map.packs import Coding, Entry
from archipfs.map.pages import decode_leaf
from archipfs.map.records import LayerRecord
from archipfs.map.tree import REGIONS_MAX, Tree
from archipfs.types import CHUNK_SECTORS_MAX, SECTOR_BYTES, Digest, PackId

log = structlog.get_logger()

PACKS_OPEN_MAX = 1024
"""Those kept open because somebody may read them soon; the regions in the engine's table keep theirs beside that."""
PACKS_OPENED_MAX = 16384
"""After that many were opened, the engine's table is emptied: so many descriptors at most are in use."""
LOG_SECONDS = 2.0
NODES_KEPT = 32
"""How many runs of 256 regions a layer remembers the leaves of."""
AHEAD_REGIONS = 8
"""So many are resolved ahead of whoever asks for one after the other, where packs lie far away."""
AHEAD_THREADS = 4
CHUNK_BYTES_MAX = CHUNK_SECTORS_MAX * SECTOR_BYTES
UNPACKED_BYTES = (1 << 32) * CHUNK_BYTES_MAX
"""Whatever a pack's unpacked view may reach to: places in a pack are 32 bits."""

_COUNTS = struct.Struct("<II")
"""Packs, extents."""
_PACK = struct.Struct("<?32s")
"""Whether it is the unpacked view, and the pack's id."""

_PackName = tuple[bool, PackId]
_Places = tuple[bytes, Sequence[EnginePack]]
"""The extents of a region, packed, and the packs that they name by their place in the list."""


class Shared:
    """What all backends of a node have in common for reading sealed layers; made when the first of them needs it."""

    def __init__(self, state_dir: Path, *, table_bytes_max: int, objects_bytes_max: int, packs_bytes_max: int) -> None:
        self.directory = state_dir / "cache"
        self._table_bytes_max = table_bytes_max
        self._objects_bytes_max = objects_bytes_max
        self._packs_bytes_max = packs_bytes_max
        self._mutex = threading.Lock()
        self._stores: set[str] = set()
        self._table: ExtentTable | None = None
        self._objects: ObjectCache | None = None
        self._packs: PackCache | None = None

    def add_store(self, store: str) -> None:
        """The id of one that is read with this; before any is."""
        with self._mutex:
            self._stores.add(store)

    @property
    def table(self) -> ExtentTable:
        with self._mutex:
            if self._table is None:
                self._table = ExtentTable(self._table_bytes_max)
            return self._table

    @property
    def objects(self) -> ObjectCache:
        with self._mutex:
            if self._objects is None:
                self._objects = ObjectCache(self.directory / "objects", self._objects_bytes_max)
            return self._objects

    @property
    def packs(self) -> PackCache:
        with self._mutex:
            if self._packs is None:
                self._packs = PackCache(self.directory / "packs", self._packs_bytes_max, self._stores)
            return self._packs

    def pack_statistics(self) -> CacheStatistics | None:
        """Of the pack cache, if there is one yet."""
        with self._mutex:
            return self._packs.statistics() if self._packs is not None else None

    def close(self) -> None:
        """When no layer is open any more."""
        with self._mutex:
            if self._table is not None:
                self._table.close()
            if self._objects is not None:
                self._objects.close()
            if self._packs is not None:
                self._packs.close()


class SealedStore:
    """The sealed data of one backend. Thread-safe. Costs nothing before something is sealed or read."""

    def __init__(self, mapper: Mapper, shared: Shared) -> None:
        self._mapper = mapper
        self._shared = shared
        shared.add_store(mapper.store.id)
        self._mutex = threading.Lock()
        self._cache: Cache | None = None
        self._chunks: ChunkStore | None = None
        self._packs: OrderedDict[_PackName, EnginePack] = OrderedDict()
        self._opened = 0
        self._far = False
        """A pack was opened that is read through the pack cache."""
        self._ahead: ThreadPoolExecutor | None = None
        self._forgotten = 0
        """How often all was to be found anew."""

    @property
    def chunks(self) -> ChunkStore:
        """Opened at the first call, which may have to read what is new in the store."""
        return self.learn(_log_progress(self._mapper.backend))

    def learn(self, progress: Progress) -> ChunkStore:
        """As ``chunks``; what ``progress`` raises ends it, and the next call begins where it was."""
        with self._mutex:
            if self._chunks is None:
                self._cache, self._chunks = self._open_chunks(progress)
            return self._chunks

    def has_packs(self) -> bool:
        return any(self._mapper.blocker.list(PACK_KIND))

    def _open_chunks(self, progress: Progress) -> tuple[Cache, ChunkStore]:
        store = self._mapper.store
        cache = Cache(self._shared.directory / store.id)
        try:
            chunks = ChunkStore(
                self._mapper.blocker,
                cache,
                content_hash(store.hash),
                node=self._mapper.node.id,
                compression=store.compression,
            )
            chunks.refresh(progress)
        except BaseException:
            cache.close()
            raise
        return cache, chunks

    def open_layer(self, record: LayerRecord) -> EngineLayer:
        """The engine's layer for one that is sealed."""
        assert record.sealed is not None
        resolver = _Resolver(self, Digest(bytes.fromhex(record.sealed.root)))
        return EngineLayer.sealed(record.id, self._shared.table, resolver)

    def pack_cache(self) -> CacheStatistics | None:
        """Of the node's pack cache, if there is one yet."""
        return self._shared.pack_statistics()

    def forget(self, packs: Iterable[PackId]) -> None:
        """Packs were deleted, or damaged ones were mended: find everything anew."""
        self.chunks.forget(packs)
        self._forgotten += 1
        self._shared.table.forget()
        self._drop_packs()

    def close(self) -> None:
        """When no layer is open any more."""
        with self._mutex:
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.shutdown(cancel_futures=True)
        self._drop_packs()
        with self._mutex:
            if self._cache is not None:
                self._cache.close()
            self._chunks, self._cache = None, None

    # For the resolvers

    def region_ahead(self, leaf: Digest) -> "_Awaited | None":
        """``region``, by another thread. ``None`` where that takes too little time to be worth it, or none can be had:
        then whoever needs it asks for it himself."""
        with self._mutex:
            if not self._far:
                return None
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(AHEAD_THREADS, thread_name_prefix="regions-ahead")
            try:
                return _Awaited(self._forgotten, self._ahead.submit(self.region, leaf))
            except RuntimeError:  # Python's, where the system gives no more threads
                return None

    def await_region(self, awaited: "_Awaited") -> _Places | None:
        """What ``region_ahead`` was asked for; ``None`` if ``region`` is to be called instead: nobody has begun yet, or
        it was found, or failed, before something changed."""
        if awaited.future.cancel():
            return None
        was_done = awaited.future.done()
        try:
            found = awaited.future.result()
        except (ArchipError, CancelledError):
            # Whoever waited for it is told: the next attempt would have him wait as long again.
            if was_done or awaited.future.cancelled():
                return None
            raise
        return found if awaited.forgotten == self._forgotten else None

    def region(self, leaf: Digest) -> _Places:
        known = self.chunks.region_get(leaf)
        with suppress(ObjectMissing, ObjectDamaged):
            return self._opened_region(self._resolve(leaf) if known is None else known)
        self.chunks.refresh()  # collected by another node: the chunks lie elsewhere now
        return self._opened_region(self._resolve(leaf), beside_damage=True)

    def _opened_region(self, blob: bytes, *, beside_damage: bool = False) -> _Places:
        """``beside_damage``: what lies in packs that cannot be used is damaged, and the rest can be read."""
        count, _ = _COUNTS.unpack_from(blob)
        extents = blob[_COUNTS.size + count * _PACK.size :]
        packs: list[EnginePack] = []
        numbers = []
        for index in range(count):
            unpacked, ident = _PACK.unpack_from(blob, _COUNTS.size + index * _PACK.size)
            try:
                packs.append(self._pack((unpacked, PackId(ident.hex()))))
                numbers.append(len(packs) - 1)
            except (ObjectMissing, ObjectDamaged) as error:
                if not beside_damage:
                    raise
                log.error("pack cannot be used", pack=ident.hex(), error=str(error))
                numbers.append(PACK_DAMAGED)
        if PACK_DAMAGED in numbers:
            extents = _renumbered(extents, numbers)
        return extents, packs

    def _resolve(self, leaf: Digest) -> bytes:
        """A region as it is kept; it is kept if all of it can be read."""
        ticket = self.chunks.regions_ticket()
        extents = decode_leaf(self.chunks.page(leaf))
        locations = self.chunks.locate_each([extent.digest for extent in extents])
        names: dict[_PackName, int] = {}
        places = []
        for (first, count, digest, inner), location in zip(extents, locations, strict=True):
            if location is None:
                places.append(EXTENT.pack(first, count, PACK_DAMAGED, 0))
                continue
            pack, _, coding, offset, _, raw_bytes = location
            if (inner + count) * SECTOR_BYTES > raw_bytes:
                raise ObjectDamaged(
                    f"map page {leaf.hex()} is damaged: chunk {digest.hex()} has {raw_bytes} bytes only; "
                    "run `archip check`"
                )
            unpacked = coding is not Coding.RAW
            start = offset * CHUNK_BYTES_MAX if unpacked else offset
            index = names.setdefault((unpacked, pack), len(names))
            places.append(EXTENT.pack(first, count, index, start + inner * SECTOR_BYTES))
        packs = [_PACK.pack(unpacked, bytes.fromhex(pack)) for unpacked, pack in names]
        blob = _COUNTS.pack(len(names), len(places)) + b"".join(packs) + b"".join(places)
        if None not in locations:
            self.chunks.region_put(leaf, blob, ticket)
        return blob

    def _pack(self, name: _PackName) -> EnginePack:
        with self._mutex:
            known = self._packs.get(name)
            if known is not None:
                self._packs.move_to_end(name)
                return known
        unpacked, pack = name
        if unpacked:
            opened = EnginePack(pack, _Unpacked(self, pack), UNPACKED_BYTES)
        else:
            data = self.chunks.open_pack(pack)
            if data.fileno() is None:
                self._far = True
                opened = self._shared.packs.open(self._mapper.store.id, pack, data)
            else:
                opened = EnginePack(pack, data, data.size())
        with self._mutex:
            self._packs[name] = opened
            if len(self._packs) > PACKS_OPEN_MAX:
                self._packs.popitem(last=False)
            self._opened += 1
            crowded = self._opened > PACKS_OPENED_MAX
            if crowded:
                self._opened = 0
        if crowded:
            self._shared.table.forget()
        return opened

    def _drop_packs(self) -> None:
        """Each is closed as soon as nobody has it in hand any more, a region in the table or a thread in here."""
        with self._mutex:
            self._packs.clear()
            self._opened = 0

    def read_chunk(self, digest: Digest, offset: int, length: int) -> bytes:
        """A range of a chunk, through the object cache."""
        chunks = self.chunks
        name = digest
        if not chunks.hash.trusted:
            # The cache is that of all backends, and in another one this digest may be that of other bytes.
            key = bytes.fromhex(self._mapper.store.id)
            name = Digest(hashlib.blake2b(digest, key=key, digest_size=32).digest())
        return self._shared.objects.read(name, offset, length, lambda: chunks.read(digest))


def _renumbered(extents: bytes, numbers: Sequence[int]) -> bytes:
    """Extents whose packs have other numbers now."""
    return b"".join(
        EXTENT.pack(first, count, pack if pack == PACK_DAMAGED else numbers[pack], offset)
        for first, count, pack, offset in EXTENT.iter_unpack(extents)
    )


def _log_progress(backend: str) -> Progress:
    """Says in the log how far it is with learning what packs there are, where that takes a while."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_SECONDS:
            last = time.monotonic()
            log.info("reading which chunks the packs have", backend=backend, packs=total, done=done)

    return progress


class _Awaited(NamedTuple):
    """A region that is being resolved by another thread, since that many times all was to be found anew."""

    forgotten: int
    future: Future[_Places]


class _Resolver:
    """Where the regions of one map lie; the engine asks for one at a time, from any thread.

    To find out takes two journeys to where packs lie far away: for the page, and for each pack that is opened. Behind
    the reads of a sequential reader that is longer than fetching the region. So who asks for the one behind two others
    has those behind it resolved too, by threads of the store's.
    """

    def __init__(self, store: SealedStore, root: Digest) -> None:
        self._store = store
        self._tree = Tree(store.chunks.page, root)
        self._mutex = threading.Lock()
        self._runs: OrderedDict[int, dict[int, Digest]] = OrderedDict()
        self._asked: deque[int] = deque(maxlen=AHEAD_REGIONS)
        self._ahead: OrderedDict[int, _Awaited] = OrderedDict()

    def __call__(self, region: int) -> Region:
        run = self._run_of(region)
        leaf = run.get(region)
        if leaf is None:
            return Region(region, self._next_from(region), b"", ())
        awaited = self._look_ahead(region, run)
        found = self._store.await_region(awaited) if awaited is not None else None
        extents, packs = self._store.region(leaf) if found is None else found
        return Region(region, region + 1, extents, packs)

    def _look_ahead(self, region: int, run: dict[int, Digest]) -> _Awaited | None:
        """Have the following ones resolved. Returns the one that is asked for, if somebody has looked ahead to it."""
        with self._mutex:
            awaited = self._ahead.pop(region, None)
            if region - 1 in self._asked and region - 2 in self._asked:
                self._resolve_behind(region, run)
            self._asked.append(region)
        return awaited

    def _resolve_behind(self, region: int, run: dict[int, Digest]) -> None:
        for following in range(region + 1, region + 1 + AHEAD_REGIONS):
            if following in self._ahead or following in self._asked or following not in run:
                continue
            begun = self._store.region_ahead(run[following])
            if begun is None:
                return
            self._ahead[following] = begun
        while len(self._ahead) > 2 * AHEAD_REGIONS:
            _, unwanted = self._ahead.popitem(last=False)
            unwanted.future.cancel()

    def _run_of(self, region: int) -> dict[int, Digest]:
        """The leaves of the 256 regions around, in order: what one page above the leaves says."""
        number = region >> 8
        with self._mutex:
            if number in self._runs:
                self._runs.move_to_end(number)
                return self._runs[number]
        run = {}
        for each, leaf in self._tree.regions(number << 8):
            if each >> 8 != number:
                break
            run[each] = leaf
        with self._mutex:
            self._runs[number] = run
            if len(self._runs) > NODES_KEPT:
                self._runs.popitem(last=False)
        return run

    def _next_from(self, region: int) -> int:
        """The first region from ``region`` on that is no hole; the end of all regions if there is none."""
        within = next((each for each in self._run_of(region) if each >= region), None)
        if within is not None:
            return within
        following = next(self._tree.regions(((region >> 8) + 1) << 8), None)
        return following[0] if following is not None else REGIONS_MAX


class _Unpacked(DataObject):
    """A pack's unpacked view: read-only, and only within one chunk at a time."""

    def __init__(self, store: SealedStore, pack: PackId) -> None:
        self._store = store
        self._pack = pack
        self._mutex = threading.Lock()
        self._digests: dict[int, Digest] | None = None

    def pread(self, offset: int, length: int) -> bytes:
        start, inner = divmod(offset, CHUNK_BYTES_MAX)
        digest = self._chunks().get(start)
        if digest is None:
            raise ObjectMissing(f"pack {self._pack} has no chunk at {start}; run `archip check`")
        data = self._store.read_chunk(digest, inner, length)
        if len(data) != length:
            raise ObjectDamaged(f"a chunk in pack {self._pack} ends before {inner + length}; run `archip check --data`")
        return data

    def _chunks(self) -> dict[int, Digest]:
        """What the pack has by where it lies in it; about 100 bytes each."""
        with self._mutex:
            if self._digests is None:
                # Pages too: what a volume holds may happen to be one, and is not stored a second time.
                self._digests = {entry.offset: entry.digest for entry in self._entries()}
            return self._digests

    def _entries(self) -> Sequence[Entry]:
        try:
            return self._store.chunks.index(self._pack).entries
        except ObjectMissing:
            # Collected by another node. The engine asks once more where this lies, and then must not be sent here.
            self._store.chunks.refresh()
            raise

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        raise self._immutable()

    def punch(self, offset: int, length: int) -> None:
        raise self._immutable()

    def truncate(self, size: int) -> None:
        raise self._immutable()

    def flush(self) -> None:
        raise self._immutable()

    def _immutable(self) -> StoreError:
        return StoreError(f"pack {self._pack} never changes; this is a bug, please report it")

    def size(self) -> int:
        return UNPACKED_BYTES

    def allocated(self) -> int:
        return 0

    def next_data(self, offset: int) -> int | None:
        raise NotSupported(f"pack {self._pack} is read by place only; this is a bug, please report it")

    def next_hole(self, offset: int) -> int:
        raise NotSupported(f"pack {self._pack} is read by place only; this is a bug, please report it")

    def close(self) -> None:
        with self._mutex:
            self._digests = None
