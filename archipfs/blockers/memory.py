"""The ``memory`` driver: a store in RAM. The reference that other drivers are tested against, and for tests above it.

Everything is durable for as long as the :class:`MemoryStore` lives; ``fault`` adds what power loss does.

A store that is given to several blockers knows them apart, as a cluster knows its clients, and one of them can shut out
another::

    store = MemoryStore()
    here, there = MemoryBlocker(store), MemoryBlocker(store)
    there.claim("lock/a", "node-2/1")
    here.shut_out("lock/a")
    there.get_record("lock/a")                      # ShutOut
    there.adopt(there.reconnect())                  # and on it goes, without its claims

Calls take effect one at a time, under one lock for the whole store: so nothing of a client that was shut out is still
under way when ``shut_out`` returns.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition

from archipfs.blockers.contract import Blocker, DataObject, Record, Space, check_key, check_kind, check_range
from archipfs.errors import AlreadyExists, Conflict, InvalidInput, ObjectMissing, ShutOut, StoreError, TooLarge
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX

PACK_BYTES = 64 << 20
_ZERO_SECTOR = bytes(SECTOR_BYTES)


@dataclass(slots=True)
class _Sparse:
    """The content of an object: only the sectors that were written."""

    size: int = 0
    sectors: dict[int, bytes] = field(default_factory=dict)
    order: list[int] | None = None
    """The numbers in ``sectors``, sorted, or ``None`` after that changed."""

    def read(self, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        first, last = offset // SECTOR_BYTES, (offset + length - 1) // SECTOR_BYTES
        whole = b"".join(self.sectors.get(sector, _ZERO_SECTOR) for sector in range(first, last + 1))
        begin = offset - first * SECTOR_BYTES
        return whole[begin : begin + length]

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put ``data``, which is not empty, at byte ``offset``."""
        end = offset + len(data)
        at = offset
        while at < end:
            begin = at % SECTOR_BYTES
            count = min(SECTOR_BYTES - begin, end - at)
            self.change(at // SECTOR_BYTES, begin, data[at - offset : at - offset + count])
            at += count
        self.size = max(self.size, end)

    def change(self, sector: int, begin: int, data: bytes | memoryview) -> None:
        """Put ``data`` at byte ``begin`` of a sector."""
        if len(data) == SECTOR_BYTES:
            content = bytes(data)
        else:
            old = self.sectors.get(sector, _ZERO_SECTOR)
            content = old[:begin] + data + old[begin + len(data) :]
        if sector not in self.sectors:
            self.order = None
        self.sectors[sector] = content

    def clear(self, offset: int, end: int) -> None:
        """Make a range zeros: whole sectors become holes."""
        first, last = -(-offset // SECTOR_BYTES), end // SECTOR_BYTES
        if first > last:
            pieces = [(offset, end)]
        else:
            pieces = [(offset, first * SECTOR_BYTES), (last * SECTOR_BYTES, end)]
            order = self.sorted()
            for sector in order[bisect_left(order, first) : bisect_left(order, last)]:
                del self.sectors[sector]
            self.order = None
        for piece_begin, piece_end in pieces:
            sector = piece_begin // SECTOR_BYTES
            if piece_begin < piece_end and sector in self.sectors:
                self.change(sector, piece_begin % SECTOR_BYTES, bytes(piece_end - piece_begin))

    def sorted(self) -> list[int]:
        if self.order is None:
            self.order = sorted(self.sectors)
        return self.order


@dataclass(slots=True, eq=False)
class _Claim:
    """What a blocker has claimed."""

    key: str
    lost: bool = False
    """We were shut out since: what was opened under it waits."""
    given_up: bool = False
    """What was opened under it fails."""


@dataclass(eq=False)
class _Client:
    """Whom a store knows a blocker by."""

    shut_out: bool = False


class MemoryStore:
    """An empty store, for one blocker or several."""

    def __init__(self) -> None:
        self.changed = Condition()
        """Its lock guards all below, the contents of data objects, and the clients and claims of all blockers."""
        self.objects: dict[str, bytes] = {}
        self.data: dict[str, _Sparse] = {}
        self.records: dict[str, Record] = {}
        self.versions = itertools.count(1)
        self.claims: dict[str, _Client] = {}

    def shut_out(self, client: _Client) -> None:
        client.shut_out = True
        self.drop_claims(client)

    def drop_claims(self, client: _Client) -> None:
        for key in [key for key, holder in self.claims.items() if holder is client]:
            del self.claims[key]


class MemoryDataObject(DataObject):
    """Sectors in a dictionary: an offset of a tebibyte costs what offset 0 costs."""

    def __init__(
        self, blocker: "MemoryBlocker", content: _Sparse, key: str, *, writable: bool, claim: _Claim | None
    ) -> None:
        self._blocker = blocker
        self._content = content
        self._key = key
        self._writable = writable
        self._claim = claim
        self._closed = False

    @contextmanager
    def _entered(self, *, writing: bool = False) -> Iterator[_Sparse]:
        """The content, with the store's lock held, once nothing has this call wait."""
        with self._blocker.store.changed:
            while True:
                if self._closed or (writing and not self._writable):
                    raise StoreError(f"{self._key}: it was closed, or opened for reading only; open it again")
                if self._claim is None:
                    self._blocker.check_not_shut_out()
                    break
                if self._claim.given_up:
                    raise StoreError(f"{self._key}: {self._claim.key} is not ours any more; open it again")
                if not self._claim.lost and not self._blocker.is_shut_out:
                    break
                self._blocker.store.changed.wait()
            yield self._content

    def _check_end(self, end: int) -> None:
        if end > VOLUME_BYTES_MAX:
            raise TooLarge(f"{self._key}: {end} bytes are more than a data object can hold; keep to {VOLUME_BYTES_MAX}")

    def pread(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        with self._entered() as content:
            return content.read(offset, length)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        check_range(offset)
        view = memoryview(data).cast("B")
        with self._entered(writing=True) as content:
            self._check_end(offset + len(view))
            if view:
                content.write(offset, view)

    def punch(self, offset: int, length: int) -> None:
        check_range(offset, length)
        with self._entered(writing=True) as content:
            end = min(offset + length, content.size)
            if end == content.size:
                # Nothing lies in the last sector past the end, so it can go whole.
                end = -(-end // SECTOR_BYTES) * SECTOR_BYTES
            if offset < end:
                content.clear(offset, end)

    def truncate(self, size: int) -> None:
        check_range(size)
        with self._entered(writing=True) as content:
            self._check_end(size)
            if size < content.size:
                content.clear(size, -(-content.size // SECTOR_BYTES) * SECTOR_BYTES)
            content.size = size

    def flush(self) -> None:
        with self._entered():
            return

    def size(self) -> int:
        with self._entered() as content:
            return content.size

    def allocated(self) -> int:
        with self._entered() as content:
            return len(content.sectors) * SECTOR_BYTES

    def next_data(self, offset: int) -> int | None:
        check_range(offset)
        with self._entered() as content:
            order = content.sorted()
            at = bisect_left(order, offset // SECTOR_BYTES)
            found = max(offset, order[at] * SECTOR_BYTES) if at < len(order) else None
            return found if found is not None and found < content.size else None

    def next_hole(self, offset: int) -> int:
        check_range(offset)
        with self._entered() as content:
            if offset >= content.size:
                return offset
            sector = offset // SECTOR_BYTES
            while sector in content.sectors:
                sector += 1
            return min(max(offset, sector * SECTOR_BYTES), content.size)

    def close(self) -> None:
        with self._blocker.store.changed:
            self._closed = True
            self._blocker.store.changed.notify_all()


class MemoryBlocker(Blocker):
    """One client of ``store``; of an empty store of its own if none is given, and then there is nobody to shut out."""

    def __init__(self, store: MemoryStore | None = None, *, pack_bytes: int = PACK_BYTES) -> None:
        self.store = store or MemoryStore()
        self._shares = store is not None
        self._pack_bytes = pack_bytes
        self._client = _Client()
        self._claims: dict[str, _Claim] = {}

    def check_not_shut_out(self) -> None:
        if self._client.shut_out:
            raise ShutOut("the memory store takes nothing from this client any more; have it reconnect")

    @contextmanager
    def _entered(self) -> Iterator[MemoryStore]:
        """The store, with its lock held, if it takes anything from us."""
        with self.store.changed:
            self.check_not_shut_out()
            yield self.store

    # Immutable objects

    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        check_key(key)
        with self._entered() as store:
            store.objects.setdefault(key, data if isinstance(data, bytes) else b"".join(data))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(offset, length or 0)
        with self._entered() as store:
            data = store.objects.get(key)
        if data is None:
            raise ObjectMissing(f"reading {key}: no such object; check the store with `archip check`")
        return data[offset:] if length is None else data[offset : offset + length]

    def open(self, key: str) -> DataObject:
        data = self.get(key)
        content = _Sparse()
        if data:
            content.write(0, data)
        return MemoryDataObject(self, content, key, writable=False, claim=None)

    def exists(self, key: str) -> bool:
        check_key(key)
        with self._entered() as store:
            return key in store.objects

    def delete(self, key: str) -> None:
        check_key(key)
        with self._entered() as store:
            store.objects.pop(key, None)

    def list(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        with self._entered() as store:
            keys = tuple(key for key in store.objects if key.startswith(f"{kind}/"))
        yield from keys

    @property
    def pack_bytes(self) -> int:
        return self._pack_bytes

    # Data objects

    def create_data(self, key: str) -> DataObject:
        check_key(key)
        with self._entered() as store:
            if key in store.data:
                raise AlreadyExists(f"creating {key}: there is one; use another key")
            content = store.data[key] = _Sparse()
        return MemoryDataObject(self, content, key, writable=True, claim=None)

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        check_key(key)
        with self._entered() as store:
            content = store.data.get(key)
            if content is None:
                raise ObjectMissing(f"opening {key}: no such object; check the store with `archip check`")
            under = None
            if claim is not None and self._shares:
                under = self._claims.get(claim)
                if under is None:
                    raise StoreError(f"opening {key}: {claim} is not claimed; claim it first")
        return MemoryDataObject(self, content, key, writable=writable, claim=under)

    def delete_data(self, key: str) -> None:
        check_key(key)
        with self._entered() as store:
            store.data.pop(key, None)

    def list_data(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        with self._entered() as store:
            keys = tuple(key for key in store.data if key.startswith(f"{kind}/"))
        yield from keys

    @property
    def keeps_deleted(self) -> bool:
        return True

    @property
    def data_bytes_max(self) -> int:
        return VOLUME_BYTES_MAX

    # Records

    def get_record(self, key: str) -> Record | None:
        check_key(key)
        with self._entered() as store:
            return store.records.get(key)

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        check_key(key)
        with self._entered() as store:
            found = store.records.get(key)
            if (found.version if found else None) != expected:
                raise Conflict(f"record {key} is not at version {expected} any more; read it again")
            version = next(store.versions)
            store.records[key] = Record(bytes(value), version)
        return version

    def delete_record(self, key: str, expected: int) -> None:
        check_key(key)
        with self._entered() as store:
            found = store.records.get(key)
            if found is not None and found.version != expected:
                raise Conflict(f"record {key} is not at version {expected} any more; read it again")
            store.records.pop(key, None)

    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        check_kind(kind)
        with self._entered() as store:
            found = tuple((key, record) for key, record in store.records.items() if key.startswith(f"{kind}/"))
        yield from found

    # Claims

    @property
    def shuts_out(self) -> bool:
        return self._shares

    def claim(self, key: str, owner: str) -> None:
        check_key(key)
        if not self._shares:
            return
        with self._entered() as store:
            holder = store.claims.get(key)
            if holder is not None and holder is not self._client:
                store.shut_out(holder)
            store.claims[key] = self._client
            self._claims.setdefault(key, _Claim(key)).lost = False
            store.changed.notify_all()

    def disclaim(self, key: str) -> None:
        check_key(key)
        with self.store.changed:
            if self.store.claims.get(key) is self._client:
                del self.store.claims[key]
            given_up = self._claims.pop(key, None)
            if given_up is not None:
                given_up.given_up = True
            self.store.changed.notify_all()

    def shut_out(self, key: str) -> None:
        check_key(key)
        with self._entered() as store:
            holder = store.claims.get(key)
            if holder is self._client:
                raise InvalidInput(f"{key} is claimed by this client itself; have it give the claim up instead")
            if holder is not None:
                store.shut_out(holder)

    @property
    def is_shut_out(self) -> bool:
        return self._client.shut_out

    def reconnect(self) -> Blocker:
        if not self._shares:
            return super().reconnect()
        return MemoryBlocker(self.store, pack_bytes=self._pack_bytes)

    def adopt(self, successor: Blocker) -> None:
        if not isinstance(successor, MemoryBlocker) or successor.store is not self.store:
            raise InvalidInput("only another client of the same store can be adopted; this is a bug, please report it")
        with self.store.changed:
            self.store.drop_claims(self._client)
            self._client = successor._client
            for claim in self._claims.values():
                claim.lost = True
            self.store.changed.notify_all()

    # The whole

    def space(self) -> Space:
        with self._entered():
            return Space(total_bytes=0, free_bytes=0, available_bytes=0)

    def describe(self) -> str:
        return "memory"

    def close(self) -> None:
        """Keeps everything: a store outlives those who use it."""
