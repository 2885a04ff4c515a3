"""The chunker: where chunks begin and end. The rule, and why it is this one, is at the head of ``chunker.h``."""

from struct import Struct
from typing import NamedTuple

from archipfs.map._chunker import ffi, lib
from archipfs.map.hashes import Buffer
from archipfs.types import SECTOR_BYTES

_PIECE = Struct("=II")
_allocate = ffi.new_allocator(should_clear_after_alloc=False)


class Piece(NamedTuple):
    """A chunk to be: a run of sectors."""

    first: int
    count: int  # type: ignore[assignment]  # tuple has a method of that name


def cut(data: Buffer, mask_bits: int) -> list[Piece]:
    """Cut whole sectors into chunks, of 2**``mask_bits`` sectors on average; sectors of zeros are in none.

    A chunk ends after a sector whose xxh3-64 has its low ``mask_bits`` bits clear, before zeros, at the end of the
    data, and at ``CHUNK_SECTORS_MAX`` sectors. So ``data`` is cut at its borders too: give it a region, or a run
    within one. Runs without the GIL.
    """
    assert 0 <= mask_bits < 64
    with ffi.from_buffer(data) as source:
        sectors, rest = divmod(len(source), SECTOR_BYTES)
        assert rest == 0
        pieces = _allocate("struct ac_piece[]", sectors)
        count = lib.ac_cut(source, sectors, (1 << mask_bits) - 1, pieces)
        return [Piece._make(fields) for fields in _PIECE.iter_unpack(ffi.buffer(pieces)[: count * _PIECE.size])]


def is_zero(data: Buffer) -> bool:
    """Whether there are only zeros. Runs without the GIL."""
    with ffi.from_buffer(data) as source:
        return bool(lib.ac_is_zero(source, len(source)))
