"""Where sealed layers lie, as the engine takes it: packs, resolved regions, and the table that keeps them.

A resolver is called back on the thread that reads, as data objects are (``objects.py``), and what it raises travels the
same way.
"""

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from archipfs.blockers.contract import DataObject
from archipfs.compose._engine import ffi, lib
from archipfs.compose.engine.cached import CacheFiles
from archipfs.compose.engine.handle import Handle
from archipfs.compose.engine.objects import attempt, call, keep, open_object
from archipfs.errors import InvalidInput

EXTENT = struct.Struct("<HHIQ")
"""An extent as ``Region.extents`` may hold it packed: first sector, count, pack, byte offset in the pack."""
PACK_DAMAGED: int = lib.AE_PACK_DAMAGED
"""In place of a pack's number: this extent is known to be damaged, and reading it is an error."""


def _release_pack(pointer: Any) -> None:
    attempt(lib.ae_pack_release, pointer)


class EnginePack:
    """A pack that sealed layers read. It takes over the object, which is closed when nobody reads it any more."""

    def __init__(
        self, pack: str, data: DataObject, size: int, *, cached: tuple[CacheFiles, Path] | None = None
    ) -> None:
        """``size`` in bytes is how large it should be: what lies beyond it, or beyond the object's end, is an error.

        ``cached``: read it through this file, which is no other pack's, in a directory that is there.
        """
        opened = ffi.new("struct ae_pack **")
        doing = f"opening pack {pack}"
        with ExitStack() as entered, ExitStack() as unopened:
            unopened.callback(data.close)
            if size < 0:
                raise InvalidInput(f"pack {pack}: its size is given as {size} bytes; it must not be negative")
            through: tuple[Any, ...] = ()
            if cached is not None:
                files, path = cached
                cache = entered.enter_context(files.handle)
                through = cache, os.fsencode(path), ffi.new("uint8_t [32]", bytes.fromhex(pack))
            made = open_object(data, owned=True)
            unopened.pop_all()
            if through:
                call(doing, lib.ae_object_cached, *through, made[0], size, made)
            call(doing, lib.ae_pack_open, made[0], size, opened)
        self._handle = Handle(ffi.gc(opened[0], _release_pack), f"pack {pack}")

    @property
    def handle(self) -> Handle:
        """The engine's pack, for who calls the engine."""
        return self._handle

    def close(self) -> None:
        """Let go of it; regions that name it keep it open. Closing twice is allowed."""
        self._handle.close(ffi.release)


class Region(NamedTuple):
    """A region, ``end_region == first_region + 1``, and where its sectors lie; or a run of regions that are empty.

    Extents come in order and do not overlap: (first sector in the region, sectors, index into ``packs``, byte offset in
    the pack), or the same packed one after the other as ``EXTENT`` has it. What is in none of them is zeros.
    """

    first_region: int
    end_region: int
    extents: Sequence[tuple[int, int, int, int]] | bytes
    packs: Sequence[EnginePack]


Resolve = Callable[[int], Region]
"""From a region's number to where it lies, or to the run of empty ones it is in. May block; must not call a volume."""


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """What a table holds, and how often it had what was asked for."""

    bytes: int
    regions: int
    hits: int
    misses: int
    """The resolver was asked, or somebody who was asking it was waited for."""
    evictions: int


def _release_table(pointer: Any) -> None:
    attempt(lib.ae_table_release, pointer)


class ExtentTable:
    """The resolved regions of all sealed layers of a process.

    A region takes 104 bytes, 16 for each extent and 8 for each pack it names; extents that continue each other in one
    pack count as one. So 1 MiB is enough for 30 GiB of sealed volumes whose chunks lie side by side, for 2 GiB where
    chunks of 32 KiB lie in no order, and for 250 MiB where each sector is elsewhere.
    """

    def __init__(self, bytes_max: int) -> None:
        """It never holds more than ``bytes_max`` bytes of regions."""
        if bytes_max < 0:
            raise InvalidInput(f"a table of extents of {bytes_max} bytes cannot be; give it some, 64 MiB are usual")
        opened = ffi.new("struct ae_table **")
        call("making the table of extents", lib.ae_table_open, bytes_max, opened)
        self._handle = Handle(ffi.gc(opened[0], _release_table), "the table of extents")

    @property
    def handle(self) -> Handle:
        """The engine's table, for who calls the engine."""
        return self._handle

    def forget(self) -> None:
        """Drop everything: packs were deleted, or what was known to be damaged has a good copy now."""
        with self._handle as table:
            attempt(lib.ae_table_forget, table)

    def statistics(self) -> TableStatistics:
        """What it holds now, and what it did since it was made."""
        with self._handle as table:
            counts = ffi.new("struct ae_table_statistics *")
            lib.ae_table_statistics(table, counts)
            return TableStatistics(**{name: int(getattr(counts, name)) for name in TableStatistics.__slots__})

    def close(self) -> None:
        """Let go of it; sealed layers that use it keep it. Closing twice is allowed."""
        self._handle.close(_close_table)


def _close_table(pointer: Any) -> None:
    ffi.gc(pointer, None)
    attempt(lib.ae_table_release, pointer)


class _Resolver:
    """A resolver that the engine calls back. It lives until the engine closes it."""

    def __init__(self, resolve: Resolve) -> None:
        self.resolve = resolve
        self.handle = ffi.new_handle(self)


_resolvers: set[_Resolver] = set()
"""Those the engine holds: C keeps a pointer, which the garbage collector does not see."""


def open_resolver(resolve: Resolve) -> Any:
    """A ``struct ae_resolver`` that calls it, for a layer that takes it over."""
    resolver = _Resolver(resolve)
    _resolvers.add(resolver)
    made = ffi.new("struct ae_resolver *")
    made.resolve = lib.archipfs_resolve
    made.close = lib.archipfs_resolver_close
    made.ctx = resolver.handle
    return made[0]


def _make_region(region: Region, made: Any) -> None:
    first_region, end_region, extents, packs = region
    if not isinstance(extents, bytes):
        try:
            extents = b"".join(EXTENT.pack(*extent) for extent in extents)
        except struct.error as error:
            raise InvalidInput(f"region {first_region}: not an extent: {error}; this is a bug") from error
    if len(extents) % EXTENT.size:
        raise InvalidInput(f"region {first_region}: {len(extents)} bytes are no whole extents; this is a bug")
    with ExitStack() as entered:
        pointers = ffi.new("struct ae_pack *[]", max(1, len(packs)))
        for index, pack in enumerate(packs):
            pointers[index] = entered.enter_context(pack.handle)
        call(
            f"taking in region {first_region}",
            lib.ae_region_make,
            first_region,
            end_region,
            ffi.from_buffer("struct ae_extent[]", extents) if extents else ffi.NULL,
            len(extents) // EXTENT.size,
            pointers,
            len(packs),
            made,
        )


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_resolve(context: Any, number: int, made: Any) -> int:
    try:
        resolver: _Resolver = ffi.from_handle(context)
        _make_region(resolver.resolve(number), made)
        return 0
    except BaseException as error:
        return keep(error, "resolving a region")


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_resolver_close(context: Any) -> None:
    _resolvers.discard(ffi.from_handle(context))
