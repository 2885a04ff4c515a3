"""The ``memory`` driver: a store in RAM. The reference that other drivers are tested against, and for tests above it.

Everything is durable for as long as the :class:`MemoryBlocker` lives; ``fault`` adds what power loss does.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock

from archipfs.blockers.contract import Blocker, DataObject, Record, Space, check_key, check_kind, check_range
from archipfs.errors import AlreadyExists, Conflict, ObjectMissing, StoreError, TooLarge
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX

PACK_BYTES = 64 << 20
_ZERO_SECTOR = bytes(SECTOR_BYTES)


@dataclass(slots=True)
class _Sparse:
    """The content of a data object: only the sectors that were written. The lock is held for each operation."""

    size: int = 0
    sectors: dict[int, bytes] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    order: list[int] | None = None
    """The numbers in ``sectors``, sorted, or ``None`` after that changed."""

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


class MemoryDataObject(DataObject):
    """Sectors in a dictionary: an offset of a tebibyte costs what offset 0 costs."""

    def __init__(self, content: _Sparse, key: str, *, writable: bool) -> None:
        self._content = content
        self._key = key
        self._writable = writable
        self._closed = False

    def _check(self, *, writing: bool = False) -> None:
        if self._closed or (writing and not self._writable):
            raise StoreError(f"{self._key}: it was closed, or opened for reading only; open it again")

    def _check_end(self, end: int) -> None:
        if end > VOLUME_BYTES_MAX:
            raise TooLarge(f"{self._key}: {end} bytes are more than a data object can hold; keep to {VOLUME_BYTES_MAX}")

    def pread(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        self._check()
        if length == 0:
            return b""
        first, last = offset // SECTOR_BYTES, (offset + length - 1) // SECTOR_BYTES
        with self._content.lock:
            sectors = self._content.sectors
            whole = b"".join(sectors.get(sector, _ZERO_SECTOR) for sector in range(first, last + 1))
        begin = offset - first * SECTOR_BYTES
        return whole[begin : begin + length]

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        check_range(offset)
        self._check(writing=True)
        view = memoryview(data).cast("B")
        end = offset + len(view)
        self._check_end(end)
        if not view:
            return
        with self._content.lock:
            at = offset
            while at < end:
                begin = at % SECTOR_BYTES
                count = min(SECTOR_BYTES - begin, end - at)
                self._content.change(at // SECTOR_BYTES, begin, view[at - offset : at - offset + count])
                at += count
            self._content.size = max(self._content.size, end)

    def punch(self, offset: int, length: int) -> None:
        check_range(offset, length)
        self._check(writing=True)
        with self._content.lock:
            end = min(offset + length, self._content.size)
            if end == self._content.size:
                # Nothing lies in the last sector past the end, so it can go whole.
                end = -(-end // SECTOR_BYTES) * SECTOR_BYTES
            if offset < end:
                self._content.clear(offset, end)

    def truncate(self, size: int) -> None:
        check_range(size)
        self._check(writing=True)
        self._check_end(size)
        with self._content.lock:
            if size < self._content.size:
                self._content.clear(size, -(-self._content.size // SECTOR_BYTES) * SECTOR_BYTES)
            self._content.size = size

    def flush(self) -> None:
        self._check()

    def size(self) -> int:
        self._check()
        return self._content.size

    def allocated(self) -> int:
        self._check()
        return len(self._content.sectors) * SECTOR_BYTES

    def next_data(self, offset: int) -> int | None:
        check_range(offset)
        self._check()
        with self._content.lock:
            order = self._content.sorted()
            at = bisect_left(order, offset // SECTOR_BYTES)
            found = max(offset, order[at] * SECTOR_BYTES) if at < len(order) else None
            return found if found is not None and found < self._content.size else None

    def next_hole(self, offset: int) -> int:
        check_range(offset)
        self._check()
        with self._content.lock:
            if offset >= self._content.size:
                return offset
            sector = offset // SECTOR_BYTES
            while sector in self._content.sectors:
                sector += 1
            return min(max(offset, sector * SECTOR_BYTES), self._content.size)

    def close(self) -> None:
        self._closed = True


class MemoryBlocker(Blocker):
    """An empty store."""

    def __init__(self, *, pack_bytes: int = PACK_BYTES) -> None:
        self._pack_bytes = pack_bytes
        self._lock = Lock()
        self._objects: dict[str, bytes] = {}
        self._data: dict[str, _Sparse] = {}
        self._records: dict[str, Record] = {}
        self._versions = itertools.count(1)

    # Immutable objects

    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        check_key(key)
        with self._lock:
            self._objects.setdefault(key, data if isinstance(data, bytes) else b"".join(data))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(offset, length or 0)
        with self._lock:
            data = self._objects.get(key)
        if data is None:
            raise ObjectMissing(f"reading {key}: no such object; check the store with `archip check`")
        return data[offset:] if length is None else data[offset : offset + length]

    def open(self, key: str) -> DataObject:
        content = _Sparse()
        MemoryDataObject(content, key, writable=True).pwrite(0, self.get(key))
        return MemoryDataObject(content, key, writable=False)

    def exists(self, key: str) -> bool:
        check_key(key)
        return key in self._objects

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def list(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        with self._lock:
            keys = tuple(key for key in self._objects if key.startswith(f"{kind}/"))
        yield from keys

    @property
    def pack_bytes(self) -> int:
        return self._pack_bytes

    # Data objects

    def create_data(self, key: str) -> DataObject:
        check_key(key)
        with self._lock:
            if key in self._data:
                raise AlreadyExists(f"creating {key}: there is one; use another key")
            content = self._data[key] = _Sparse()
        return MemoryDataObject(content, key, writable=True)

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        check_key(key)
        with self._lock:
            content = self._data.get(key)
        if content is None:
            raise ObjectMissing(f"opening {key}: no such object; check the store with `archip check`")
        return MemoryDataObject(content, key, writable=writable)

    def delete_data(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._data.pop(key, None)

    def list_data(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        with self._lock:
            keys = tuple(key for key in self._data if key.startswith(f"{kind}/"))
        yield from keys

    @property
    def data_bytes_max(self) -> int:
        return VOLUME_BYTES_MAX

    # Records

    def get_record(self, key: str) -> Record | None:
        check_key(key)
        return self._records.get(key)

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        check_key(key)
        with self._lock:
            found = self._records.get(key)
            if (found.version if found else None) != expected:
                raise Conflict(f"record {key} is not at version {expected} any more; read it again")
            version = next(self._versions)
            self._records[key] = Record(bytes(value), version)
        return version

    def delete_record(self, key: str, expected: int) -> None:
        check_key(key)
        with self._lock:
            found = self._records.get(key)
            if found is not None and found.version != expected:
                raise Conflict(f"record {key} is not at version {expected} any more; read it again")
            self._records.pop(key, None)

    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        check_kind(kind)
        with self._lock:
            found = tuple((key, record) for key, record in self._records.items() if key.startswith(f"{kind}/"))
        yield from found

    # The whole

    def space(self) -> Space:
        return Space(total_bytes=0, free_bytes=0, available_bytes=0)

    def describe(self) -> str:
        return "memory"

    def close(self) -> None:
        """Keeps everything: a store outlives those who use it."""
