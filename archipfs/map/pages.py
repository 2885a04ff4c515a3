"""Map pages as bytes, and what a leaf says as extents. docs/format.md has the layout.

A map is a tree of fixed height: the root is at level 3, leaves are at level 0, and each page above the leaves has up
to 256 slots. A leaf lists the extents of one region, in order; what no extent has is a hole. What is empty is not
there: no slot leads to it, and only the root may have no entry. So equal contents, put together alike, are equal pages.

Encoders expect what decoders accept. Decoders check everything and raise ``ObjectDamaged``, or ``FormatTooNew``.
Pure: no I/O.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from archipfs.errors import FormatTooNew, ObjectDamaged
from archipfs.types import CHUNK_SECTORS_MAX, REGION_SECTORS, Digest

if TYPE_CHECKING:
    import numpy

SLOT_BITS = 8
FANOUT = 1 << SLOT_BITS
ROOT_LEVEL = 3

_MAGIC = b"archpage"
_VERSION = 1
_HEADER = struct.Struct("<8sHBBI")
"""Magic, version, level, digest bytes, entries."""
_DIGEST_BYTES = (16, 32)


class Extent(NamedTuple):
    """Sectors [first, first + count) of a region are sectors [inner, inner + count) of a chunk."""

    first: int
    count: int  # type: ignore[assignment]  # tuple has a method of that name
    digest: Digest
    """The chunk's."""
    inner: int

    @property
    def end(self) -> int:
        return self.first + self.count


class Slot(NamedTuple):
    """Where a page above the leaves leads to."""

    slot: int
    digest: Digest
    """The page's one level below."""


def encode_leaf(extents: Sequence[Extent], digest_bytes: int) -> bytes:
    """The page of a region that is not empty."""
    entry = _leaf_entry(digest_bytes)
    assert extents
    assert _extents_fault(extents) is None
    assert digest_bytes in _DIGEST_BYTES
    assert all(len(extent.digest) == digest_bytes for extent in extents)
    page = bytearray(_HEADER.size + len(extents) * entry.size)
    _HEADER.pack_into(page, 0, _MAGIC, _VERSION, 0, digest_bytes, len(extents))
    for index, (first, count, digest, inner) in enumerate(extents):
        entry.pack_into(page, _HEADER.size + index * entry.size, first, count, inner, 0, digest)
    return bytes(page)


def decode_leaf(page: bytes) -> list[Extent]:
    """The extents of a region, in order."""
    level, digest_bytes = _header(page)
    if level != 0:
        raise _damaged(f"a leaf was expected where a page of level {level} lies")
    extents = []
    for first, count, inner, zero, digest in _leaf_entry(digest_bytes).iter_unpack(page[_HEADER.size :]):
        if zero != 0:
            raise _damaged(f"something unknown stands at sector {first}")
        extents.append(Extent(first, count, Digest(digest), inner))
    fault = _extents_fault(extents)
    if fault is not None:
        raise _damaged(fault)
    return extents


def encode_node(level: int, slots: Sequence[Slot], digest_bytes: int) -> bytes:
    """A page of level 1, 2 or 3."""
    assert 1 <= level <= ROOT_LEVEL
    assert slots or level == ROOT_LEVEL
    assert _slots_fault(slots) is None
    assert digest_bytes in _DIGEST_BYTES
    assert all(len(slot.digest) == digest_bytes for slot in slots)
    header = _HEADER.pack(_MAGIC, _VERSION, level, digest_bytes, len(slots))
    return header + b"".join(_node_entry(digest_bytes).pack(*slot) for slot in slots)


def decode_node(page: bytes) -> tuple[int, list[Slot]]:
    """The level of a page above the leaves, and where it leads to, in order."""
    level, digest_bytes = _header(page)
    if level == 0:
        raise _damaged("a page above the leaves was expected where a leaf lies")
    slots = [Slot(slot, Digest(digest)) for slot, digest in _node_entry(digest_bytes).iter_unpack(page[_HEADER.size :])]
    fault = _slots_fault(slots)
    if fault is not None:
        raise _damaged(fault)
    return level, slots


def level_of(page: bytes) -> int:
    """0 for a leaf, 3 for a root. Looks at the header and the page's length only."""
    return _header(page)[0]


def leaf_digests(page: bytes) -> "numpy.ndarray[Any, numpy.dtype[numpy.uint64]]":
    """The first eight bytes of each extent's digest, little-endian, in order: enough to mark millions of them fast.

    Of what ``decode_leaf`` checks, only the header and the length: this is for pages that were read by their digest.
    """
    import numpy  # takes longer to load than all the rest, and commands that collect no garbage do without

    level, digest_bytes = _header(page)
    if level != 0:
        raise _damaged(f"a leaf was expected where a page of level {level} lies")
    words = numpy.frombuffer(page, dtype="<u8", offset=_HEADER.size)
    return words[1 :: _leaf_entry(digest_bytes).size // 8].astype(numpy.uint64)


def node_digests(page: bytes) -> list[Digest]:
    """The pages that a page above the leaves leads to, in order."""
    return [slot.digest for slot in decode_node(page)[1]]


def find_slot(page: bytes, slot: int) -> tuple[int, Digest | None]:
    """The level of a page above the leaves, and where that slot of it leads to.

    Of what ``decode_node`` checks, only the header and the length: this is for pages that were read by their digest.
    """
    level, digest_bytes = _header(page)
    if level == 0:
        raise _damaged("a page above the leaves was expected where a leaf lies")
    entry = _node_entry(digest_bytes)

    def slot_at(place: int) -> int:
        return int.from_bytes(page[place : place + 2], "little")

    places = range(_HEADER.size, len(page), entry.size)
    index = bisect_left(places, slot, key=slot_at)
    if index == len(places) or slot_at(places[index]) != slot:
        return level, None
    return level, Digest(page[places[index] + 2 : places[index] + entry.size])


def overlay(below: Sequence[Extent], first: int, count: int, above: Sequence[Extent]) -> list[Extent]:
    """``below`` with the sectors [first, first + count) replaced by what ``above`` has there, holes included.

    All of ``above`` lies within. Extents that reach across a border are split, and neighbours at the borders that go on
    in the same chunk are joined, so that a region does not fall into more pieces than it has to.
    """
    end = first + count
    assert not above or (first <= above[0].first and above[-1].end <= end)
    start = bisect_left(below, (first,))
    stop = bisect_left(below, (end,), lo=start)
    left = list(below[:start])
    right = list(below[stop:])
    # Only the last extent that begins before a border can reach across it.
    if stop > 0 and below[stop - 1].end > end:
        right.insert(0, _part(below[stop - 1], end, below[stop - 1].end))
    if left and left[-1].end > first:
        left[-1] = _part(left[-1], left[-1].first, first)
    return _joined(_joined(left, above), right)


def _part(extent: Extent, first: int, end: int) -> Extent:
    return Extent(first, end - first, extent.digest, extent.inner + first - extent.first)


def _joined(left: list[Extent], right: Sequence[Extent]) -> list[Extent]:
    """``left`` and ``right``, one behind the other; one extent where they meet if it is the same chunk that goes on."""
    if left and right:
        last, next_ = left[-1], right[0]
        if last.end == next_.first and last.digest == next_.digest and last.inner + last.count == next_.inner:
            return [*left[:-1], Extent(last.first, last.count + next_.count, last.digest, last.inner), *right[1:]]
    return [*left, *right]


@cache
def _leaf_entry(digest_bytes: int) -> struct.Struct:
    """First, count, inner, zero, digest."""
    return struct.Struct(f"<HHHH{digest_bytes}s")


@cache
def _node_entry(digest_bytes: int) -> struct.Struct:
    """Slot, digest."""
    return struct.Struct(f"<H{digest_bytes}s")


def _header(page: bytes) -> tuple[int, int]:
    """Level and digest bytes of a page that is as long as its header says."""
    if len(page) < _HEADER.size:
        raise _damaged("it is cut off")
    magic, version, level, digest_bytes, entries = _HEADER.unpack_from(page)
    if magic != _MAGIC:
        raise _damaged("it does not begin as pages do")
    if version > _VERSION:
        raise FormatTooNew(f"a map page has format {version}, this archipfs reads {_VERSION}; upgrade archipfs")
    if version != _VERSION or level > ROOT_LEVEL or digest_bytes not in _DIGEST_BYTES:
        raise _damaged("its header makes no sense")
    if entries == 0 and level != ROOT_LEVEL:
        raise _damaged("it is empty, and no root")
    entry = _leaf_entry(digest_bytes) if level == 0 else _node_entry(digest_bytes)
    if len(page) != _HEADER.size + entries * entry.size:
        raise _damaged(f"it is not as long as {entries} entries are")
    return level, digest_bytes


def _extents_fault(extents: Sequence[Extent]) -> str | None:
    """What is wrong with a leaf's extents."""
    end = 0
    for first, count, _, inner in extents:
        if count == 0 or first < end or first + count > REGION_SECTORS or inner + count > CHUNK_SECTORS_MAX:
            return f"its extent at sector {first} cannot be"
        end = first + count
    return None


def _slots_fault(slots: Sequence[Slot]) -> str | None:
    """What is wrong with the slots of a page."""
    next_slot = 0
    for slot, _ in slots:
        if not next_slot <= slot < FANOUT:
            return f"its slot {slot} cannot be"
        next_slot = slot + 1
    return None


def _damaged(how: str) -> ObjectDamaged:
    return ObjectDamaged(f"a map page is damaged: {how}; run archip check --repair, or restore it from a copy")
