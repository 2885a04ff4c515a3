"""The pack cache as the engine has it: local files through which packs are read that lie far away."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archipfs.compose._engine import ffi, lib
from archipfs.compose.engine.handle import Handle
from archipfs.compose.engine.objects import attempt, call
from archipfs.errors import InvalidInput

STAY_NS = 1_000_000_000
"""How long what was fetched may stay in memory before it is written: whoever it was fetched for comes soon."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What the files take, and what they spared the store."""

    bytes: int
    """Of the disk, now; a file counts as 256 KiB at least."""
    files: int
    hits: int
    """Reads, or parts of them, that waited for nothing to be fetched."""
    fetches: int
    fetched_bytes: int
    ahead_bytes: int
    """Of these, those that nobody had asked for yet."""
    landed_bytes: int
    """Of these, those that are in memory now, to be written to the files."""
    evictions: int
    failures: int
    """Of the local disk: each time it is left alone for a few seconds."""


class CacheFiles:
    """The files of the pack cache, and the threads that fetch ahead into them. Thread-safe."""

    def __init__(self, bytes_max: int, *, stay_ns: int = STAY_NS) -> None:
        """They take ``bytes_max`` bytes of the disk at most, but for what is being read just then."""
        opened = ffi.new("struct ae_cache **")
        call("making the pack cache", lib.ae_cache_open, _checked(bytes_max), stay_ns, opened)
        self._handle = Handle(ffi.gc(opened[0], _close), "the pack cache")

    @property
    def handle(self) -> Handle:
        """The engine's cache, for who calls the engine."""
        return self._handle

    def limit(self, bytes_max: int) -> None:
        """Take less of the disk from now on, or more."""
        with self._handle as cache:
            attempt(lib.ae_cache_limit, cache, _checked(bytes_max))

    def adopt(self, path: Path, allocated_bytes: int) -> None:
        """A file that a process before us left; those used longest ago first."""
        with self._handle as cache:
            call(f"adopting {path}", lib.ae_cache_adopt, cache, os.fsencode(path), _checked(allocated_bytes))

    def statistics(self) -> CacheStatistics:
        """What there is now, and what was done since it was made."""
        with self._handle as cache:
            counts = ffi.new("struct ae_cache_statistics *")
            lib.ae_cache_statistics(cache, counts)
            return CacheStatistics(**{name: int(getattr(counts, name)) for name in CacheStatistics.__slots__})

    def close(self) -> None:
        """Fetch no more ahead, and let go; packs that are open go on using their files. Closing twice is allowed."""
        self._handle.close(_closed)


def _close(pointer: Any) -> None:
    attempt(lib.ae_cache_close, pointer)


def _closed(pointer: Any) -> None:
    ffi.gc(pointer, None)
    _close(pointer)


def _checked(number: int) -> int:
    if number < 0:
        raise InvalidInput(f"a pack cache of {number} bytes cannot be; give it some, see [cache] packs")
    return number
