"""The engine's Python face: layers and volumes as objects, errors as exceptions.

A call of the engine runs without the GIL, so any number of threads may be inside. A handle counts those that are, and
gives the engine's object back only when the last one has left; to use it after that is an error and never a crash.
"""

import errno
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from archipfs.blockers.contract import DataObject, VersionPaths
from archipfs.compose._engine import ffi, lib
from archipfs.compose.engine.extents import ExtentTable, Resolve, open_resolver
from archipfs.compose.engine.handle import Handle
from archipfs.compose.engine.objects import attempt, call, close_object, error_of, open_object
from archipfs.errors import ArchipError, Fenced, InvalidInput, StoreError, TooLarge
from archipfs.types import SIZE_BYTES_MAX

Buffer = bytes | bytearray | memoryview

_allocate = ffi.new_allocator(should_clear_after_alloc=False)


@lru_cache(maxsize=1024)
def _id_bytes(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise InvalidInput(f"not a layer or boot id: {text!r}; it takes 32 hexadecimal digits") from None


def format_bitmap(bitmap: DataObject, layer_id: str) -> None:
    """Make a new object the bitmap of an empty layer, durably. It stays open, and the caller's."""
    made = open_object(bitmap, owned=False)
    try:
        call(f"formatting the bitmap of layer {layer_id}", lib.ae_bitmap_format, made[0], _id_bytes(layer_id))
    finally:
        close_object(made)


def _release(pointer: Any) -> None:
    attempt(lib.ae_layer_release, pointer)


class EngineLayer:
    """An open layer. It takes over both objects: they are closed with it, also when opening fails.

    A volume goes on using its layers after they were closed here; the last user closes the objects.
    """

    layer_id: str
    _handle: Handle

    def __init__(
        self,
        layer_id: str,
        data: DataObject,
        bitmap: DataObject,
        *,
        parent_visible: int,
        head: bool,
        live_path: str | None,
        boot_id: str,
    ) -> None:
        """Open it; ``boot_id`` is what a live bitmap must carry to be believed.

        Raises ``ObjectDamaged`` if the bitmap is not this layer's, ``FormatTooNew`` if a later archipfs wrote it.
        """
        self.layer_id = layer_id
        spec = ffi.new("struct ae_layer_spec *")
        opened = ffi.new("struct ae_layer **")
        with ExitStack() as unopened:
            unopened.callback(bitmap.close)
            unopened.callback(data.close)
            spec.id = _id_bytes(layer_id)
            spec.boot_id = _id_bytes(boot_id)
            spec.parent_visible = _checked(parent_visible)
            spec.head = head
            # The C structure does not keep the path alive: this name does.
            path = ffi.new("char[]", os.fsencode(live_path)) if live_path is not None else ffi.NULL
            spec.live_path = path
            spec.data = open_object(data, owned=True)[0]
            unopened.callback(close_object, spec.data)
            spec.bitmap = open_object(bitmap, owned=True)[0]
            unopened.pop_all()
        call(f"opening layer {layer_id}", lib.ae_layer_open, spec, opened)
        self._handle = Handle(ffi.gc(opened[0], _release), f"layer {layer_id}")

    @classmethod
    def sealed(cls, layer_id: str, table: ExtentTable, resolve: Resolve) -> "EngineLayer":
        """A layer whose bytes lie in packs; it ends its chain, or is all of it.

        ``resolve`` is called for a region that the table does not have, on the thread that reads, by one thread at a
        time for the same region. What it raises, the call of the volume raises, with it as the cause; others who
        waited for the same region get the error without the cause.
        """
        layer = cls.__new__(cls)
        layer.layer_id = layer_id
        opened = ffi.new("struct ae_layer **")
        with table.handle as pointer:
            identity = _id_bytes(layer_id)
            resolver = open_resolver(resolve)
            call(f"opening sealed layer {layer_id}", lib.ae_layer_open_sealed, identity, pointer, resolver, opened)
        layer._handle = Handle(ffi.gc(opened[0], _release), f"layer {layer_id}")
        return layer

    @property
    def live_size(self) -> int:
        """The volume's size as the live bitmap remembers it, 0 if there was none to believe."""
        with self._handle as layer:
            return int(lib.ae_layer_live_size(layer))

    @property
    def recovered(self) -> bool:
        """Whether a live bitmap that a crash left behind was taken over."""
        with self._handle as layer:
            return bool(lib.ae_layer_recovered(layer))

    @property
    def dirty(self) -> bool:
        """Whether it holds anything that a flush has yet to make durable."""
        with self._handle as layer:
            return bool(lib.ae_layer_dirty(layer))

    @property
    def parent_visible(self) -> int:
        """How many bytes of the parent shine through now."""
        with self._handle as layer:
            return int(lib.ae_layer_parent_visible(layer))

    def count_sectors(self) -> int:
        """How many sectors were written or discarded in this layer; reads its whole bitmap.

        Of a sealed layer: how many are no holes; resolves all its regions.
        """
        with self._handle as layer:
            return call(f"counting the sectors of layer {self.layer_id}", lib.ae_layer_count, layer)

    def close(self) -> None:
        """Let go of it. Closing twice is allowed."""
        self._handle.close(ffi.release)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an engine volume did since it was opened."""

    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    discards: int
    discarded_bytes: int
    flushes: int
    fills: int
    """First writes to a part of a sector, completed from the parent."""
    layers: int
    failed: int
    """0, or the errno for which it refuses to be written to."""


def _abandon(pointer: Any) -> None:
    attempt(lib.ae_volume_close, pointer, False)


class EngineVolume:
    """The bytes of a volume, out of its layers: the head first, each next one the parent of the one before.

    The calls under "Control" are for one at a time, and the caller sees to that. All others may be called from any
    thread at any time.
    """

    def __init__(self, layers: Sequence[EngineLayer], size: int, *, writable: bool) -> None:
        """The layers stay the caller's to close; he may do so at once."""
        self._head_id = layers[0].layer_id if layers else "none"
        self._fenced = False
        self._at_close: tuple[int, int] | None = None
        opened = ffi.new("struct ae_volume **")
        with _pointers(layers) as pointers:
            doing = f"opening the volume with head {self._head_id}"
            call(doing, lib.ae_volume_open, pointers, len(layers), _checked(size), writable, opened)
        self._handle = Handle(ffi.gc(opened[0], _abandon), f"the volume with head {self._head_id}")

    # Bytes

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes, fewer only at the end of the volume."""
        with self._handle as volume:
            length = min(_checked(length), max(0, lib.ae_volume_size(volume) - _checked(offset)))
            buffer = _allocate("char[]", length)
            count = call(f"reading {length} bytes at {offset}", lib.ae_read, volume, buffer, length, offset)
            return bytes(ffi.buffer(buffer, count))

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill the buffer; returns how many bytes that took, fewer than fit only at the end of the volume."""
        with self._handle as volume, ffi.from_buffer(buffer, require_writable=True) as target:
            return call(f"reading at {offset}", lib.ae_read, volume, target, len(target), _checked(offset))

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """As ``read``, but ``None`` when it would wait for a disk, a lock or the gate."""
        with self._handle as volume:
            length = min(_checked(length), max(0, lib.ae_volume_size(volume) - _checked(offset)))
            buffer = _allocate("char[]", length)
            count, raised = attempt(lib.ae_read_nowait, volume, buffer, length, offset)
            if count == -errno.EAGAIN:
                return None
            if count < 0:
                raise error_of(-count, f"reading {length} bytes at {offset}") from raised
            return bytes(ffi.buffer(buffer, count))

    def write(self, offset: int, data: Buffer) -> int:
        """Write all of ``data``; beyond the end the volume becomes larger. Raises ``TooLarge``, ``StoreFull``."""
        with self._handle as volume, ffi.from_buffer(data) as source:
            doing = f"writing {len(source)} bytes at {offset}"
            return self._change(doing, lib.ae_write, volume, source, len(source), _checked(offset))

    def discard(self, offset: int, length: int) -> None:
        """Have the range read as zeros and give its space back. Clipped to the volume's size."""
        with self._handle as volume:
            doing = f"discarding {length} bytes at {offset}"
            self._change(doing, lib.ae_discard, volume, _checked(offset), _checked(length))

    def write_zeros(self, offset: int, length: int) -> None:
        """Have the range read as zeros. Clipped to the volume's size."""
        with self._handle as volume:
            doing = f"zeroing {length} bytes at {offset}"
            self._change(doing, lib.ae_write_zeros, volume, _checked(offset), _checked(length))

    def seek_data(self, offset: int) -> int | None:
        """The first data at or after ``offset``; ``None`` if there is none."""
        return self._seek(lib.ae_seek_data, offset)

    def seek_hole(self, offset: int) -> int | None:
        """The first hole at or after ``offset``, the end of the volume if no other; ``None`` beyond it."""
        return self._seek(lib.ae_seek_hole, offset)

    def copy_from(self, source: "EngineVolume", source_offset: int, offset: int, length: int) -> int:
        """Copy a range of ``source`` to ``offset``; this volume may be the source, with a range that does not overlap.

        Returns how many bytes that were: 64 MiB at most, 0 only at or beyond the end of the source.
        """
        with self._handle as volume, source._handle as other:
            doing = f"copying {length} bytes to {offset}"
            numbers = _checked(offset), other, _checked(source_offset), _checked(length)
            return self._change(doing, lib.ae_copy, volume, *numbers)

    def flush(self) -> None:
        """All that returned before is durable. When the store fails at it, the volume takes no more writes."""
        with self._handle as volume:
            self._change("flushing", lib.ae_flush, volume)

    def flush_parents(self) -> None:
        """As ``flush``, but for the head: what a swap has frozen is durable."""
        with self._handle as volume:
            self._change("flushing what is frozen", lib.ae_volume_flush_parents, volume)

    # Control

    def swap_head(self, layer: EngineLayer) -> int:
        """Put an empty head on top; writes go there from now on. Returns the size that the old head holds."""
        with self._handle as volume, layer._handle as head:
            size = self._change("putting a new head on top", lib.ae_volume_swap_head, volume, head)
            self._head_id = layer.layer_id
            return size

    def pause(self) -> None:
        """Wait for the calls inside, and hold the others until ``resume``."""
        with self._handle as volume:
            lib.ae_volume_pause(volume)

    def resume(self) -> None:
        """Let them in again."""
        with self._handle as volume:
            lib.ae_volume_resume(volume)

    def announce_size(self, size: int) -> None:
        """While paused: have the live bitmap remember ``size``, before a shrink to it is committed."""
        with self._handle as volume:
            lib.ae_volume_announce_size(volume, _checked(size))

    def resize(self, size: int) -> None:
        """While paused: cut or grow."""
        with self._handle as volume:
            self._change(f"resizing to {size} bytes", lib.ae_volume_resize, volume, _checked(size))

    def replace(self, layers: Sequence[EngineLayer], size: int) -> None:
        """While paused: be what other layers hold, at their size. What it was before must have been flushed."""
        with self._handle as volume, _pointers(layers) as pointers:
            self._change(
                "going over to other layers", lib.ae_volume_replace, volume, pointers, len(layers), _checked(size)
            )
            self._head_id = layers[0].layer_id

    def rebase(self, layer_id: str, sealed: EngineLayer) -> None:
        """Have ``sealed`` take the place of that layer of its chain and of all below it: it shows the same.

        Nobody waits: calls under way end on the old layers, which are let go of then. Raises ``ObjectMissing`` if it
        has no such layer, ``StoreError`` if that is its head, or not all from there on is durable.
        """
        with self._handle as volume, sealed._handle as layer:
            doing = f"going over to sealed layer {layer_id}"
            self._change(doing, lib.ae_volume_rebase, volume, _id_bytes(layer_id), layer)

    def next_change(self, base: str | None, offset: int, end: int) -> tuple[int, int] | None:
        """The next run of whole sectors, as (from, until), that it does not show straight from the layer ``base``.

        Those are written, discarded or hidden above it. Without a base: those that hold data. ``offset`` is a multiple
        of the sector's size; ``until`` may lie beyond an ``end`` within a sector. ``None``: there is no more before
        ``end``. Raises ``ObjectMissing`` if it has no such layer. Any thread may call it.
        """
        found = ffi.new("uint64_t [2]")
        with self._handle as volume:
            identity = _id_bytes(base) if base is not None else ffi.NULL
            span = _checked(offset), _checked(end)
            result, raised = attempt(lib.ae_volume_next_change, volume, identity, *span, found, found + 1)
            if result == -errno.ENXIO:
                return None
            if result < 0:
                raise error_of(-result, f"looking for changes since layer {base}") from raised
            return int(found[0]), int(found[1])

    def shows_until(self, layer_id: str, offset: int, end: int) -> int | None:
        """How far from ``offset`` on it shows what that layer of its chain shows; ``None`` if it has no such layer."""
        until = ffi.new("uint64_t *")
        with self._handle as volume:
            span = _checked(offset), _checked(end)
            result, raised = attempt(lib.ae_volume_shows, volume, _id_bytes(layer_id), *span, until)
            if result == -errno.ENOENT:
                return None
            if result < 0:
                raise error_of(-result, f"looking for what lies above layer {layer_id}") from raised
            return int(until[0])

    def head_is_clear(self, offset: int, end: int) -> bool:
        """While paused: whether the head has nothing in that range, not even in the rest of its outer sectors."""
        with self._handle as volume:
            doing = f"looking into layer {self._head_id}"
            return bool(call(doing, lib.ae_volume_head_is_clear, volume, _checked(offset), _checked(end)))

    def extend(self, size: int) -> None:
        """While paused: show the parent as far as ``size``, and be that large."""
        with self._handle as volume:
            self._change(f"extending to {size} bytes", lib.ae_volume_extend, volume, _checked(size))

    def guard(self, paths: VersionPaths | None, size: int) -> None:
        """Let C code flush without asking us (``ae_sync``) while the lock's record stands and ``size`` is the size.

        Without paths, which is for a store that takes nothing from us once somebody broke our lock, the record is not
        looked at. Any thread may call it at any time; the last call counts.
        """
        with self._handle as volume:
            names = (
                (ffi.NULL, ffi.NULL) if paths is None else (os.fsencode(paths.present), os.fsencode(paths.following))
            )
            call(f"guarding layer {self._head_id}", lib.ae_volume_guard, volume, *names, _checked(size))

    def sync(self) -> bool:
        """What C code calls to flush: false, and nothing done, if that is not all that has to be done."""
        with self._handle as volume:
            result, raised = attempt(lib.ae_sync, volume)
            if result < 0 and result != -errno.EAGAIN:
                raise error_of(-result, f"flushing (head {self._head_id})") from raised
            return result == 0

    def fail(self) -> None:
        """For good, as after a flush that failed: it takes no more writes, and its live bitmaps are not believed."""
        with self._handle as volume:
            lib.ae_volume_fence(volume)

    def fence(self) -> None:
        """For good: every later write, discard and flush raises ``Fenced``."""
        self._fenced = True
        with self._handle as volume:
            lib.ae_volume_fence(volume)

    def close(self, *, clean: bool) -> None:
        """Wait for the calls inside and let go. Closing twice is allowed.

        With ``clean``, after a flush that succeeded, the live bitmaps are removed; else they stay as after a crash.
        """

        def release(pointer: Any) -> None:
            ffi.gc(pointer, None)
            attempt(lib.ae_volume_close, pointer, clean)

        if self._at_close is None:
            self._at_close = self.size, self.changed_ns
        self._handle.close(release, hurry=lib.ae_volume_resume)

    # Looking

    @property
    def size(self) -> int:
        """In bytes, with what writes beyond the end added; once closed, what it was then."""
        try:
            with self._handle as volume:
                return int(lib.ae_volume_size(volume))
        except ArchipError:
            if self._at_close is None:
                raise
            return self._at_close[0]

    @property
    def changed_ns(self) -> int:
        """When its content last changed, 0 if it did not since it was opened; once closed, what it was then."""
        try:
            with self._handle as volume:
                return int(lib.ae_volume_changed_ns(volume))
        except ArchipError:
            if self._at_close is None:
                raise
            return self._at_close[1]

    def forget_change(self) -> None:
        """As if nothing had changed it yet: somebody set the time of change."""
        with self._handle as volume:
            lib.ae_volume_forget_change(volume)

    @property
    def waits(self) -> bool:
        """Whether calls wait for a network, and not for memory or a disk."""
        with self._handle as volume:
            return bool(lib.ae_volume_waits(volume))

    def address(self) -> int:
        """Where the engine's volume lies, for C code that calls it past us, by the table at ``calls_address``.

        Whoever takes it must have done with it before ``close``.
        """
        with self._handle as volume:
            return int(ffi.cast("uintptr_t", volume))

    @property
    def parent_visible(self) -> int:
        """How many bytes of the head's parent shine through now."""
        with self._handle as volume:
            return int(lib.ae_volume_parent_visible(volume))

    def statistics(self) -> Statistics:
        """What it did since it was opened."""
        with self._handle as volume:
            counts = ffi.new("struct ae_statistics *")
            lib.ae_volume_statistics(volume, counts)
            return Statistics(**{name: int(getattr(counts, name)) for name in Statistics.__slots__})

    def _seek(self, function: Callable[..., int], offset: int) -> int | None:
        with self._handle as volume:
            found, raised = attempt(function, volume, _checked(offset))
            if found == -errno.ENXIO:
                return None
            if found < 0:
                raise error_of(-found, f"seeking from {offset}") from raised
            return found

    def _change(self, doing: str, function: Callable[..., int], *arguments: Any) -> int:
        try:
            return call(f"{doing} (head {self._head_id})", function, *arguments)
        except StoreError as error:
            if self._fenced:
                raise Fenced(
                    f"{doing}: our lock was broken, this process writes no more; open the volume anew"
                ) from error
            raise


@contextmanager
def _pointers(layers: Sequence[EngineLayer]) -> Iterator[Any]:
    """The layers as C takes them; they stay open within the block."""
    with ExitStack() as entered:
        pointers = ffi.new("struct ae_layer *[]", max(1, len(layers)))
        for index, layer in enumerate(layers):
            pointers[index] = entered.enter_context(layer._handle)
        yield pointers


def calls_address() -> int:
    """Where the ``struct ae_calls`` lies: the engine's calls, for C code in another module."""
    return int(ffi.cast("uintptr_t", lib.ae_calls()))


def _checked(number: int) -> int:
    """An offset, a length or a size that C can take."""
    if number < 0:
        raise InvalidInput(f"not an offset or a length: {number}; it must not be negative")
    if number > SIZE_BYTES_MAX:
        raise TooLarge(f"{number} bytes are more than a volume can have: {SIZE_BYTES_MAX}")
    return number
