"""Changing volumes: rename, resize, roll back, remove, copy ranges, attributes."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import structlog

from archipfs.compose.copy import copy_range
from archipfs.compose.recovery import Recovery
from archipfs.compose.volume import OpenVolume
from archipfs.compose.volumes import Found
from archipfs.errors import AlreadyExists, Busy, Conflict, InvalidInput, NotFound, ReadOnlyVolume, StoreFull
from archipfs.map.mapper import Mapper
from archipfs.map.names import check_name
from archipfs.map.records import Hold, Kind, VolumeRecord
from archipfs.types import NAME_BYTES_MAX, RequestId, VolumeId

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RolledBack:
    kept: VolumeRecord
    """A snapshot of what the rollback left."""
    record: VolumeRecord


class Changing(Recovery):
    def copy_range(
        self, source: OpenVolume, source_offset: int, target: OpenVolume, target_offset: int, length: int
    ) -> int:
        """Copy a range between open volumes, which stay open meanwhile, or within one. Returns how many bytes that
        were: fewer than ``length`` if the caller has to ask again, 0 at or beyond the end of the source.

        Raises as ``archipfs.compose.copy.copy_range``.
        """
        copied = copy_range(source, source_offset, target, target_offset, length)
        self._reclaim_wanted |= copied.leaves_layer
        return copied.length

    def rename(self, name: str, new_name: str, *, replace: bool = False, request: RequestId | None = None) -> None:
        """``replace``: take the name from whichever volume has it, which is removed, as rename(2) does."""
        while True:
            # First of all: another volume may have been given the old name since.
            if self._done_before(new_name, request) is not None:
                return
            found = self.find(name)
            if new_name == name:
                return
            try:
                self._rename(found, name, new_name, replace=replace, request=request)
                return
            except AlreadyExists:
                if not replace:
                    raise  # else it was made meanwhile
            except (Conflict, NotFound):
                continue  # one of the two was renamed or removed meanwhile, or is not there at all: ``find`` says so

    def _rename(self, found: Found, name: str, new_name: str, *, replace: bool, request: RequestId | None) -> None:
        check_name(new_name)
        other = self._find_or_none(new_name)
        if other is not None and not replace:
            raise AlreadyExists(f"{new_name} exists already; choose another name or remove it first")
        if other is not None and other.mapper is not found.mapper:
            raise Busy(f"{new_name} lies in another backend than {name}; remove it first")
        both = [found] if other is None else sorted((found, other), key=lambda each: each.record.id)
        with ExitStack() as stack:
            opened = {each.record.id: stack.enter_context(self._locked(each)) for each in both}
            self._refuse_moved(found)
            if other is not None:
                self._refuse_held(other, "replace")
            displaced = found.mapper.rename(
                found.record.id, new_name, replace=other.record.id if other is not None else None, request=request
            )
            self._refresh(opened[found.record.id])
            if displaced is not None:
                self._lost_name(opened[displaced.id], displaced)

    def resize(self, found: Found, size: int) -> VolumeRecord:
        """Data beyond a smaller size is lost, for good and by intention."""
        if size:
            found.mapper.check_fits(size)
        with self._owning(found) as opened:
            opened.resize(size)
            return opened.record

    def rollback(self, name: str, snapshot: str, *, request: RequestId | None = None) -> RolledBack:
        """Have the volume read as the snapshot does. What it held is kept as another snapshot.

        Raises ``Busy`` if it is open. A crash in between leaves the volume as it was, beside the snapshot kept.
        """
        found, source = self.find(name), self.find(snapshot)
        if request is not None and found.record.request == request:
            return RolledBack(self._kept_by(request, found), found.record)
        if source.record.writable:
            raise InvalidInput(f"{snapshot} is not a snapshot; see `archip volume-list`")
        if not found.record.writable:
            raise ReadOnlyVolume(f"{name} is a snapshot and does not change; clone it to write")
        mapper = found.mapper
        with ExitStack() as stack:
            opened = stack.enter_context(self._alone(found, "roll back"))
            opened.start()
            # Only now do the layers stay what they are.
            if source.mapper is not mapper or not self._descends(mapper, opened.record, source.record):
                raise InvalidInput(f"{snapshot} is not a snapshot of {name}; clone it instead")
            reservation = stack.enter_context(mapper.reserve(self._free_name(_kept_name(name))))
            frozen = opened.freeze()
            kept = mapper.publish_snapshot(reservation, opened.record, frozen.layer, frozen.size, request).record
            with mapper.new_layer(source.record.layer, source.record.size) as head:
                # The new layer exists; whoever removes the snapshot from here on sees that its layer is in use.
                mapper.still_there(source.record)
                opened.replace_layers(head.id, source.record.size, request=request)
            record = opened.record
        self._reclaim_wanted = True
        log.info("rolled back", volume=name, to=snapshot, kept=kept.name)
        return RolledBack(kept, record)

    def remove(self, name: str, *, even_if_open: bool = False, only: VolumeId | None = None) -> None:
        """``even_if_open`` as unlink(2): who has it open goes on using it, and its space comes back afterwards.

        It works on a full store too: to write down that something is removed takes room, which is kept back for that.
        Raises ``NotFound``, also if the name is that of another volume than ``only``.
        """
        found = self.find(name)
        if only is not None and found.record.id != only:
            raise NotFound(f"{name} is another volume than it was; see `archip volume-list`")
        try:
            self._remove(found, even_if_open=even_if_open)
        except StoreFull:
            if not found.mapper.blocker.relieve():
                raise
            self._remove(found, even_if_open=even_if_open)

    def remove_in(self, backend: str, name: str) -> None:
        """Remove what has that name in that backend, also a replica, or what lies behind another one of its name."""
        mapper = self.mapper(backend)
        found = mapper.find(name)
        if found is None:
            raise NotFound(f"no volume in backend {backend} is called {name}; see `archip volume-list`")
        leads_to = self._find_or_none(name)
        if leads_to is not None and leads_to.mapper is mapper:
            self.remove(name, only=found.record.id)
            return
        opened = self._table.volumes.get(found.record.id)
        if opened is not None and opened.mapper is mapper:
            raise Busy(f"{name} in backend {backend} is open; close it before you remove it")
        self._refuse_held(Found(mapper, found.record), "remove")
        if found.record.writable:
            mapper.locks.take(found.record.id, Hold.IO, called=name)
        self._purge_removed(mapper, mapper.remove(found.record.id))

    def _remove(self, found: Found, *, even_if_open: bool) -> None:
        with self._locked(found) if even_if_open else self._alone(found, "remove") as opened:
            if not found.record.writable:
                self._refuse_moved(found)
            self._refuse_held(found, "remove")
            self._lost_name(opened, found.mapper.remove(found.record.id))

    def set_attributes(
        self, volume: VolumeId, edit: Callable[[VolumeRecord], VolumeRecord], *, sets_mtime: bool = False
    ) -> VolumeRecord:
        """Change mode, owner, times or extended attributes. Anybody may, lock or not; the last one wins.

        ``sets_mtime``: the time of change is among them, and counts for more than that of the last write.
        """
        found = self.find_by_id(volume)
        opened = self._table.volumes.get(volume)
        if opened is None:
            return self._as_open(found.mapper.change(volume, edit).record)
        with opened.control:
            if sets_mtime:
                opened.forget_write_time()
            record = opened.mapper.change(volume, edit).record
            self._refresh(opened)
        return self._as_open(record)

    def _descends(self, mapper: Mapper, record: VolumeRecord, snapshot: VolumeRecord) -> bool:
        if snapshot.origin == record.id:
            return True
        return any(layer.id == snapshot.layer for layer in mapper.catalog.lineage(record.layer))

    def _free_name(self, name: str) -> str:
        candidate, number = name, 1
        while self._find_or_none(candidate) is not None:
            number += 1
            candidate = f"{name}-{number}"
        return candidate

    def _kept_by(self, request: RequestId, found: Found) -> VolumeRecord:
        """What the rollback by this very request kept of the volume; the last one, if a crash made it begin anew."""
        made = [each.record for each in found.mapper.volumes() if each.record.request == request]
        kept = [each for each in made if each.kind is Kind.SNAPSHOT and each.origin == found.record.id]
        if not kept:
            raise NotFound(f"{found.record.name} was rolled back, and what it held before has been removed since")
        return max(kept, key=lambda each: each.created_ns)


def _kept_name(name: str) -> str:
    """What a rollback calls the snapshot of what it leaves: as much of the volume's name as there is room for."""
    suffix = f"@before-rollback-{time.strftime('%Y%m%d-%H%M%S')}"
    room = NAME_BYTES_MAX - len(suffix) - len("-9999")
    return name.encode()[:room].decode(errors="ignore") + suffix
