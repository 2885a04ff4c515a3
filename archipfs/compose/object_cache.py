"""The object cache: a local file of chunks that cannot be read where they lie, since they are compressed.

One file for all volumes and backends of a node. It has slots of 64 KiB; a chunk takes as many as it has pieces of that
size. The slot used longest ago goes first. Every read compares a checksum, so nothing has to be flushed: what a crash
left half written is not there. The file may be deleted at any time. docs/format.md has its layout.

Memory: about 300 bytes a slot, 5 MiB for a cache of 1 GiB.
"""

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import xxhash

from archipfs.errors import StoreError
from archipfs.types import Digest

log = structlog.get_logger()

SLOT_BYTES = 64 << 10
_MAGIC = b"archobjs"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ")
"""Magic, version, bytes of a slot, number of slots."""
_ENTRY = struct.Struct("<32sIIQ")
"""Digest, piece of the chunk, bytes, xxh3-64 of them."""
_ENTRY_BYTES = 64
_DIGEST_BYTES = 32
_TABLE_OFFSET = 4096

_Key = tuple[bytes, int]
"""A digest as it stands in the table, 32 bytes with zeros behind a shorter one, and which piece of the chunk."""


class ObjectCache:
    """Thread-safe. One process at a time has it open: the node."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        """Open the file, or make it. ``bytes_max``: what its slots hold together, at least one chunk's."""
        self._path = path
        self._slots = max(8, bytes_max // SLOT_BYTES)
        self._data_offset = -(-(_TABLE_OFFSET + self._slots * _ENTRY_BYTES) // SLOT_BYTES) * SLOT_BYTES
        self._mutex = threading.Lock()
        self._entries: OrderedDict[_Key, tuple[int, int, int]] = OrderedDict()
        """Key → slot, bytes, checksum; used longest ago first."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"cannot open the object cache {path}: {error.strerror}; see [node] state_dir") from error
        self._load()
        used = {slot for slot, _, _ in self._entries.values()}
        self._free = [slot for slot in range(self._slots - 1, -1, -1) if slot not in used]

    def read(self, digest: Digest, offset: int, length: int, fetch: Callable[[], bytes]) -> bytes:
        """A range of the chunk. ``fetch`` returns the whole of it, verified, when it is not here."""
        name = digest.ljust(_DIGEST_BYTES, b"\0")
        first, last = offset // SLOT_BYTES, (offset + length - 1) // SLOT_BYTES
        pieces = []
        for number in range(first, last + 1):
            piece = self._get((name, number))
            if piece is None:
                return self._fetch(name, fetch)[offset : offset + length]
            pieces.append(piece)
        begin = offset - first * SLOT_BYTES
        return b"".join(pieces)[begin : begin + length]

    def close(self) -> None:
        os.close(self._file)

    def _fetch(self, name: bytes, fetch: Callable[[], bytes]) -> bytes:
        chunk = fetch()
        for number, offset in enumerate(range(0, len(chunk), SLOT_BYTES)):
            self._put((name, number), chunk[offset : offset + SLOT_BYTES])
        return chunk

    def _get(self, key: _Key) -> bytes | None:
        with self._mutex:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
        slot, length, checksum = found
        # The slot may be given to another piece meanwhile: then this is not what the checksum is of.
        try:
            piece = os.pread(self._file, length, self._offset(slot))
        except OSError as error:
            log.warning("object cache not read", path=str(self._path), error=error.strerror)
            return None
        if len(piece) == length and xxhash.xxh3_64_intdigest(piece) == checksum:
            return piece
        with self._mutex:
            if self._entries.get(key) == found:
                del self._entries[key]
                self._free.append(slot)
        return None

    def _put(self, key: _Key, piece: bytes) -> None:
        checksum = xxhash.xxh3_64_intdigest(piece)
        with self._mutex:
            if key in self._entries:
                return
            slot = self._free.pop() if self._free else self._entries.popitem(last=False)[1][0]
        entry = _ENTRY.pack(*key, len(piece), checksum)
        try:
            os.pwrite(self._file, piece, self._offset(slot))
            os.pwrite(self._file, entry, _TABLE_OFFSET + slot * _ENTRY_BYTES)
        except OSError as error:
            # A disk that is full costs speed, and nothing else.
            log.warning("object cache not written", path=str(self._path), error=error.strerror)
            with self._mutex:
                self._free.append(slot)
            return
        with self._mutex:
            if key in self._entries:
                self._free.append(slot)  # another thread has fetched the same
            else:
                self._entries[key] = slot, len(piece), checksum

    def _offset(self, slot: int) -> int:
        return self._data_offset + slot * SLOT_BYTES

    def _load(self) -> None:
        """Believe what the file's table says, if it is of our shape; what is wrong in it shows when it is read."""
        header = _HEADER.pack(_MAGIC, _VERSION, SLOT_BYTES, self._slots)
        try:
            if os.pread(self._file, len(header), 0) != header:
                os.ftruncate(self._file, 0)
                os.ftruncate(self._file, self._offset(self._slots))
                os.pwrite(self._file, header, 0)
                return
            for slot, (digest, piece, length, checksum) in enumerate(self._table()):
                if 0 < length <= SLOT_BYTES:
                    self._entries.setdefault((digest, piece), (slot, length, checksum))
        except OSError as error:
            raise StoreError(
                f"cannot read the object cache {self._path}: {error.strerror}; delete it, it is only a cache"
            ) from error

    def _table(self) -> Iterator[tuple[bytes, int, int, int]]:
        table = os.pread(self._file, self._slots * _ENTRY_BYTES, _TABLE_OFFSET)
        for offset in range(0, len(table) - _ENTRY.size + 1, _ENTRY_BYTES):
            yield _ENTRY.unpack_from(table, offset)
