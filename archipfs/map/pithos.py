"""Pithos' hash map of a volume: what an object is to Pithos, so that a volume can be registered there as an image.

An object is cut into blocks of 4 MiB. A block's hash is the SHA-256 of it without the zeros at its end, so that the
last one needs no padding and a hole has the hash of nothing. The *top hash* is that of a Merkle tree over them: a
binary tree whose leaves are the blocks' hashes, with as many of 32 zero bytes behind them as make their number a power
of two; a single block's own hash is the top, and where there is no block it is the hash of nothing.

The definition is Pithos' own (synnefo's ``hashmap.py``), as is the JSON (Pithos API guide: GET and PUT of an object
with ``hashmap`` and ``format=json``). Pure: no I/O.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 4 << 20
BLOCK_HASH = "sha256"
HASH_BYTES = 32

HOLE = hashlib.sha256().digest()
"""The hash of a block that is all zeros."""
_PADDING = bytes(HASH_BYTES)


@dataclass(frozen=True, slots=True)
class HashMap:
    size: int
    """Of the volume, in bytes."""
    hashes: Sequence[bytes]
    """Of its blocks, in order."""

    def as_json(self) -> dict[str, Any]:
        """What Pithos takes and gives as JSON."""
        return {
            "block_hash": BLOCK_HASH,
            "block_size": BLOCK_BYTES,
            "bytes": self.size,
            "hashes": [each.hex() for each in self.hashes],
        }


def block_count(size: int) -> int:
    """How many blocks a volume of ``size`` bytes has."""
    return -(-size // BLOCK_BYTES)


def block_hash(block: bytes) -> bytes:
    """The hash of one block, the last one may be short."""
    return hashlib.sha256(block.rstrip(b"\0")).digest()


def top_hash(hashes: Sequence[bytes]) -> bytes:
    """The top of the tree over the blocks' hashes."""
    if not hashes:
        return HOLE
    level, padding = list(hashes), _PADDING
    while len(level) > 1:
        # A subtree of nothing but padding is the same wherever it lies: one beside the last hash stands for all.
        if len(level) % 2:
            level.append(padding)
        level = [hashlib.sha256(left + right).digest() for left, right in zip(level[::2], level[1::2], strict=True)]
        padding = hashlib.sha256(padding + padding).digest()
    return level[0]
