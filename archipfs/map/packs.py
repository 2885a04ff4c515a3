"""Packs: immutable objects that hold many chunks and map pages. docs/format.md has the bytes.

    head: header, index, zeros   │ data: raw chunks, on sector borders │ everything else, back to back
    0                      4096 n                                                        total_bytes

The index lists what the data holds, in its order and without gaps. A pack's name is the BLAKE2b-256 of its head, and
the head has the digest of every entry: so the name stands for the whole content, and a pack is known by reading its
head alone. Pure: no I/O.
"""

import enum
import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from archipfs.errors import FormatTooNew, InvalidInput, ObjectDamaged
from archipfs.map.hashes import Buffer
from archipfs.types import CHUNK_SECTORS_MAX, SECTOR_BYTES, Digest, PackId

HEADER_BYTES = 4096
PACK_BYTES_MAX = 1 << 30
"""No pack is larger, so that what a damaged header says cannot have anybody read without end."""

RAW_BYTES_MAX = CHUNK_SECTORS_MAX * SECTOR_BYTES
"""The longest chunk; pages are far shorter. Bounds what reading one entry takes."""

_MAGIC = b"archpack"
_VERSION = 1
_HEADER = struct.Struct("<8sIIIIQQQ16sQ")
"""Magic, version, digest bytes, entries, zero, created (ns), total bytes, data offset, node, checksum."""
_CHECKSUM_OFFSET = _HEADER.size - 8
_ENTRY = struct.Struct("<32sBBHIII")
"""Digest and zeros, kind, coding, zero, raw bytes, offset in the data, stored bytes."""
_DIGEST_BYTES = (16, 32)


class Kind(enum.IntEnum):
    """What an entry is: a piece of volumes, or a page of a map."""

    CHUNK = 0
    PAGE = 1


class Coding(enum.IntEnum):
    """How an entry's bytes are stored."""

    RAW = 0
    ZSTD = 1


class Entry(NamedTuple):
    """One chunk or page. Sizes and offsets are bytes."""

    digest: Digest
    """Of the raw bytes."""
    kind: Kind
    coding: Coding
    raw_bytes: int
    offset: int
    """From the start of the object."""
    stored_bytes: int


@dataclass(frozen=True)
class PackIndex:
    """What a pack's head says."""

    id: PackId
    node: str
    """Who made it."""
    created_ns: int
    total_bytes: int
    """The object's size."""
    entries: list[Entry]
    """In the order of their offsets."""


def _aligned(number: int) -> int:
    return -(-number // SECTOR_BYTES) * SECTOR_BYTES


def _data_offset(entries: int) -> int:
    return _aligned(HEADER_BYTES + entries * _ENTRY.size)


class PackBuilder:
    """Collects what goes into one pack."""

    def __init__(self, digest_bytes: int, node: str, created_ns: int) -> None:
        """``node`` is who makes it: a node's id, 32 hexadecimal digits. Raises ``InvalidInput`` if it is not."""
        try:
            self._node = bytes.fromhex(node)
        except ValueError:
            self._node = b""
        if len(self._node) != 16:
            raise InvalidInput(f"not a node's id: {node!r}; it takes 32 hexadecimal digits")
        assert digest_bytes in _DIGEST_BYTES
        self._digest_bytes = digest_bytes
        self._created_ns = created_ns
        self._aligned: list[tuple[Entry, bytes]] = []
        self._unaligned: list[tuple[Entry, bytes]] = []
        self._data_bytes = 0

    def add(self, digest: Digest, kind: Kind, coding: Coding, raw_bytes: int, data: Buffer) -> None:
        """Take in ``data``, the stored form of something with ``raw_bytes`` bytes; the bytes are copied."""
        stored = bytes(data)
        assert len(digest) == self._digest_bytes
        entry = Entry(digest, kind, coding, raw_bytes, 0, len(stored))
        assert _sizes_fit(entry)
        (self._aligned if _stands_aligned(entry) else self._unaligned).append((entry, stored))
        self._data_bytes += len(stored)

    @property
    def stored_bytes(self) -> int:
        """What the pack takes so far, with its index; 0 while it has nothing."""
        entries = len(self._aligned) + len(self._unaligned)
        return _data_offset(entries) + self._data_bytes if entries else 0

    def build(self) -> tuple[PackId, bytes]:
        """The pack's name and its bytes."""
        pack, pieces = self.pieces()
        return pack, b"".join(pieces)

    def pieces(self) -> tuple[PackId, list[bytes]]:
        """As ``build``, without a second copy: its head, then what it holds, piece by piece."""
        content = self._aligned + self._unaligned
        data_offset = _data_offset(len(content))
        total_bytes = data_offset + self._data_bytes
        assert total_bytes <= PACK_BYTES_MAX
        head = bytearray(data_offset)
        header = (_VERSION, self._digest_bytes, len(content), 0, self._created_ns, total_bytes, data_offset, self._node)
        _HEADER.pack_into(head, 0, _MAGIC, *header, 0)
        place = HEADER_BYTES
        offset = 0
        for entry, stored in content:
            sizes = (entry.raw_bytes, offset, len(stored))
            _ENTRY.pack_into(head, place, entry.digest, entry.kind, entry.coding, 0, *sizes)
            place += _ENTRY.size
            offset += len(stored)
        struct.pack_into("<Q", head, _CHECKSUM_OFFSET, _checksum(head))
        return _name(head), [bytes(head), *(stored for _, stored in content)]


def _stands_aligned(entry: Entry) -> bool:
    """Raw chunks stand first: as they are whole sectors, so are their places."""
    return entry.kind is Kind.CHUNK and entry.coding is Coding.RAW


def _sizes_fit(entry: Entry) -> bool:
    """Chunks are whole sectors, nothing is empty, too long or longer as stored, and what is raw has one size."""
    return (
        0 < entry.stored_bytes <= entry.raw_bytes <= RAW_BYTES_MAX
        and (entry.kind is not Kind.CHUNK or entry.raw_bytes % SECTOR_BYTES == 0)
        and (entry.coding is not Coding.RAW or entry.raw_bytes == entry.stored_bytes)
    )


def _checksum(head: Buffer) -> int:
    """XXH3-64 of the head with the checksum's own field zero."""
    blank = bytearray(head)
    blank[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 8] = bytes(8)
    return xxhash.xxh3_64_intdigest(blank)


def _name(head: Buffer) -> PackId:
    return PackId(hashlib.blake2b(head, digest_size=32).hexdigest())


class _Header(NamedTuple):
    digest_bytes: int
    entries: int
    created_ns: int
    total_bytes: int
    data_offset: int
    node: bytes
    checksum: int


def _header(what: str, header: Buffer) -> _Header:
    if len(header) < HEADER_BYTES:
        raise _damaged(what, "its header is cut off")
    magic, version, digest_bytes, entries, zero, *rest = _HEADER.unpack_from(header)
    if magic != _MAGIC:
        raise _damaged(what, "it does not begin as packs do")
    if version > _VERSION:
        raise FormatTooNew(f"{what} has format {version}, this archipfs reads {_VERSION}; upgrade archipfs")
    found = _Header(digest_bytes, entries, *rest)
    if (
        version != _VERSION
        or zero != 0
        or digest_bytes not in _DIGEST_BYTES
        or found.data_offset != _data_offset(entries)
        or not found.data_offset <= found.total_bytes <= PACK_BYTES_MAX
    ):
        raise _damaged(what, "its header contradicts itself")
    return found


def index_bytes(header: Buffer) -> int:
    """How many bytes from the start of a pack are its head; ``header`` is its first ``HEADER_BYTES``.

    Raises ``ObjectDamaged`` and ``FormatTooNew``. Only ``parse`` knows whether the number is right.
    """
    return _header("a pack", header).data_offset


def parse(pack: PackId, head: Buffer) -> PackIndex:
    """What the pack of that name holds; ``head`` is as long as ``index_bytes`` says.

    Raises ``ObjectDamaged`` if the head is not the one that the name stands for, ``FormatTooNew``.
    """
    what = f"pack {pack}"
    header = _header(what, head)
    if len(head) != header.data_offset:
        raise _damaged(what, "its index is cut off")
    if _checksum(head) != header.checksum:
        raise _damaged(what, "bad checksum of its index")
    if _name(head) != pack:
        raise _damaged(what, "its index is that of another pack")
    return PackIndex(pack, header.node.hex(), header.created_ns, header.total_bytes, _entries(what, header, head))


def _entries(what: str, header: _Header, head: Buffer) -> list[Entry]:
    """The index, which has to describe all of the data, piece behind piece."""
    end = HEADER_BYTES + header.entries * _ENTRY.size
    found: list[Entry] = []
    expected = 0
    for digest, kind, coding, zero, raw_bytes, offset, stored_bytes in _ENTRY.iter_unpack(head[HEADER_BYTES:end]):
        if zero != 0 or any(digest[header.digest_bytes :]) or offset != expected:
            raise _damaged(what, f"entry {len(found)} of its index contradicts the others")
        try:
            entry = Entry(
                Digest(digest[: header.digest_bytes]),
                Kind(kind),
                Coding(coding),
                raw_bytes,
                header.data_offset + offset,
                stored_bytes,
            )
        except ValueError:
            raise _damaged(what, f"entry {len(found)} of its index is of no known kind") from None
        if not _sizes_fit(entry):
            raise _damaged(what, f"entry {len(found)} of its index has impossible sizes")
        if _stands_aligned(entry) and offset % SECTOR_BYTES != 0:
            raise _damaged(what, f"entry {len(found)} of its index is a raw chunk beside the sector borders")
        found.append(entry)
        expected += stored_bytes
    if header.data_offset + expected != header.total_bytes:
        raise _damaged(what, "its index and its size differ")
    return found


def _damaged(what: str, how: str) -> ObjectDamaged:
    return ObjectDamaged(f"{what} is damaged: {how}; run archip check --repair, or restore it from a copy of the store")
