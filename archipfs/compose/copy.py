"""A range of one open volume, copied to another without its bytes passing through here.

Three ways, tried in this order; docs/architecture.md, "Copies of ranges, and ioctls", has what a crash in each leaves:

1. *A clone*: the beginning of a volume, into an empty one.
2. *An extension*: what follows, in pieces, into a volume that has become a clone so.
3. *A copy* inside the store: anything else.

Programs that look for holes ask for the data between them only. So the first two may begin beyond the target's end,
where the source has a hole in between, which comes with the rest.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import structlog

from archipfs.compose.engine import EngineVolume
from archipfs.compose.volume import Frozen, OpenVolume
from archipfs.errors import InvalidInput, NotFound, TooLarge
from archipfs.types import VOLUME_BYTES_MAX
from archipfs.units import format_size

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did."""

    length: int
    """In bytes; 0 at or beyond the end of the source."""
    leaves_layer: bool = False
    """Whether there is a layer now that nothing leads to: one that the target has left, or one made in vain."""


NOT_SHARED = Copied(0)


def copy_range(source: OpenVolume, source_offset: int, target: OpenVolume, target_offset: int, length: int) -> Copied:
    """Copy up to ``length`` bytes, or fewer: then the caller asks again for the rest.

    Raises ``ReadOnlyVolume``, ``LockHeld``, ``Fenced``; ``InvalidInput`` for negative numbers and for ranges of one
    volume that overlap; ``TooLarge`` if the target would become larger than its store can keep.
    """
    if min(source_offset, target_offset, length) < 0:
        raise InvalidInput(
            f"cannot copy {length} bytes from {source_offset} to {target_offset}; none of them may be negative"
        )
    engine = target.engine
    with source.reading() as reader:
        length = min(length, max(0, reader.size - source_offset))
        if length == 0:
            return Copied(0)
        _check_target(source, source_offset, target, target_offset, length)
        shared = _share(source, reader, source_offset, target, target_offset, length)
        if shared.length:
            return shared
        return Copied(engine.copy_from(reader, source_offset, target_offset, length), shared.leaves_layer)


def _check_target(source: OpenVolume, source_offset: int, target: OpenVolume, target_offset: int, length: int) -> None:
    if source.id == target.id and abs(source_offset - target_offset) < length:
        raise InvalidInput(f"cannot copy a range of {target.name} onto itself; copy it by way of another volume")
    size_max = min(VOLUME_BYTES_MAX, target.mapper.blocker.data_bytes_max)
    if target_offset + length > size_max:
        raise TooLarge(f"{target.name} cannot be larger than {format_size(size_max)} in this store; copy less")


def _share(
    source: OpenVolume,
    reader: EngineVolume,
    source_offset: int,
    target: OpenVolume,
    target_offset: int,
    length: int,
) -> Copied:
    """A clone or an extension; nothing is copied if it cannot be either."""
    if source.id == target.id or source.mapper is not target.mapper or not source.owned:
        return NOT_SHARED
    if source_offset != target_offset or target.size > target_offset:
        return NOT_SHARED
    if not _is_hole(reader, target.size, target_offset):
        return NOT_SHARED
    with _both_controlled(source, target):
        if target.size > target_offset or source.mapper is not target.mapper:
            return NOT_SHARED  # somebody wrote there meanwhile, or has moved one of them
        if target.size == 0:
            return _clone(source, reader, target, target_offset, target_offset + length)
        return _extend(reader, target, target_offset, target_offset + length)


def _is_hole(reader: EngineVolume, offset: int, end: int) -> bool:
    """Whether there is no data in the range, which may be empty."""
    if offset == end:
        return True
    data = reader.seek_data(offset)
    return data is None or data >= end


@contextmanager
def _both_controlled(one: OpenVolume, other: OpenVolume) -> Iterator[None]:
    """Hold both volumes' ``control``, in the order of their ids: who holds one may want the other."""
    with ExitStack() as held:
        for opened in sorted((one, other), key=lambda each: each.id):
            held.enter_context(opened.control)
        yield


def _clone(source: OpenVolume, reader: EngineVolume, target: OpenVolume, offset: int, end: int) -> Copied:
    record = source.record
    if record.name is None:
        return NOT_SHARED  # whoever removed it may be deleting its layers
    frozen = source.freeze() if record.writable else Frozen(record.layer, record.size)
    visible = min(end, frozen.size)
    # The layer itself must have the hole. Bits above it are looked for afterwards: they may come, but never go.
    if offset and not (_is_hole(reader, 0, offset) and reader.shows_until(frozen.layer, 0, offset) == offset):
        return NOT_SHARED
    mapper = target.mapper
    # The layer's own limit lets all shine through, for extensions: the volume's record has what counts.
    with mapper.new_layer(frozen.layer, VOLUME_BYTES_MAX) as head:
        try:
            # The new layer exists; whoever removes the source from here on sees that its layer is in use.
            mapper.still_there(record)
        except NotFound:
            return Copied(0, leaves_layer=True)
        if visible <= offset or not target.become_clone(head.id, visible, source.id):
            return Copied(0, leaves_layer=True)
    log.info("copied as a clone", volume=target.name, origin=source.name, size=visible)
    return Copied(visible - offset, leaves_layer=True)


def _extend(reader: EngineVolume, target: OpenVolume, offset: int, end: int) -> Copied:
    shown = target.size
    head = target.mapper.catalog.layer(target.record.layer).record
    end = min(end, head.parent_visible)
    if head.parent is None or end <= offset or not _is_hole(reader, shown, offset):
        return NOT_SHARED
    # Where the source has been written since it became a clone, it shows something else.
    until = reader.shows_until(head.parent, shown, end)
    if until is None or until <= offset or not target.extend(shown, until):
        return NOT_SHARED
    return Copied(until - offset)
