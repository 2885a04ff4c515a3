"""Ways to cut images into pieces, and what is left when equal pieces are stored once. Nothing is stored."""

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

from archipfs.map.chunker import cut, is_zero
from archipfs.types import REGION_BYTES, SECTOR_BYTES
from benchmarks.report import KIB

AVERAGES_KIB = (8, 16, 32, 64, 128)
FIXED_KIB = (4, 64)


class Stored:
    """Every way, over the same images."""

    def __init__(self) -> None:
        self.data_bytes = 0
        """Of the sectors that are not all zeros, with those that occur again."""
        self.sizes: dict[str, dict[bytes, int]] = {
            **{f"blocks of {kib} KiB": {} for kib in FIXED_KIB},
            **{f"chunks of {kib} KiB on average": {} for kib in AVERAGES_KIB},
        }
        """Of each piece, by its hash, by the way of cutting."""

    def add_image(self, path: Path) -> None:
        for region in regions(path):
            self.data_bytes += sum(map(len, fixed(region, SECTOR_BYTES)))
            for kib in FIXED_KIB:
                _add(self.sizes[f"blocks of {kib} KiB"], fixed(region, kib * KIB))
            for kib in AVERAGES_KIB:
                _add(self.sizes[f"chunks of {kib} KiB on average"], by_content(region, kib * KIB))


def _add(sizes: dict[bytes, int], pieces: Iterator[memoryview]) -> None:
    for piece in pieces:
        # 128 bits, and nobody here makes collisions on purpose.
        sizes[xxhash.xxh3_128_digest(piece)] = len(piece)


def regions(path: Path) -> Iterator[memoryview]:
    """The regions of an image that are not holes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size, end = os.fstat(descriptor).st_size, 0
        while end < size:
            try:
                data = os.lseek(descriptor, end, os.SEEK_DATA)
            except OSError:
                return
            start = data - data % REGION_BYTES
            end = start + REGION_BYTES
            yield memoryview(os.pread(descriptor, REGION_BYTES, start))
    finally:
        os.close(descriptor)


def fixed(region: memoryview, block_bytes: int) -> Iterator[memoryview]:
    """Blocks at fixed places, but for those that are all zeros."""
    for start in range(0, len(region), block_bytes):
        block = region[start : start + block_bytes]
        if not is_zero(block):
            yield block


def by_content(region: memoryview, average_bytes: int) -> Iterator[memoryview]:
    """Chunks as sealing cuts them."""
    mask_bits = (average_bytes // SECTOR_BYTES).bit_length() - 1
    for piece in cut(region, mask_bits):
        yield region[piece.first * SECTOR_BYTES : (piece.first + piece.count) * SECTOR_BYTES]
