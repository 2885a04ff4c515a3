"""Content hashes: what chunks and map pages are called by. A backend has one of them, fixed when it is created.

BLAKE3 and SHA-256 are collision-resistant: equal digests are equal contents. XXH3-128 is not, and anybody can make two
contents with one digest: whoever finds a digest in the store compares the bytes before believing it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import blake3
import xxhash

from archipfs.errors import InvalidInput
from archipfs.types import Digest

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ContentHash:
    """One of the hashes a backend may have."""

    name: str
    digest_bytes: int
    trusted: bool
    """Equal digests mean equal contents. If not, bytes are to be compared."""
    _function: Callable[[Buffer], bytes]

    def digest(self, data: Buffer) -> Digest:
        """What ``data`` is called by."""
        return Digest(self._function(data))


_HASHES = {
    hash_.name: hash_
    for hash_ in (
        ContentHash("blake3", 32, True, lambda data: blake3.blake3(data).digest()),
        ContentHash("sha256", 32, True, lambda data: hashlib.sha256(data).digest()),
        ContentHash("xxh3-128", 16, False, lambda data: xxhash.xxh3_128_digest(data)),
    )
}


def content_hash(name: str) -> ContentHash:
    """The hash of that name. Raises ``InvalidInput`` if there is none."""
    try:
        return _HASHES[name]
    except KeyError:
        raise InvalidInput(f"no content hash is called {name!r}; choose one of {', '.join(_HASHES)}") from None
