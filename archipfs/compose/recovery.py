"""What a crash left, what removed volumes have left, and the end of a process."""

import functools
import math
import threading
import time

import msgspec
import structlog

from archipfs.compose.volume import OpenVolume
from archipfs.compose.volumes import Backends, Found, Volumes
from archipfs.errors import (
    ArchipError,
    FormatTooNew,
    LockHeld,
    NotFound,
    ObjectDamaged,
    ObjectMissing,
    StoreError,
    StoreFull,
)
from archipfs.map.mapper import READERS_GRACE_NS, Mapper
from archipfs.map.records import Hold, LayerRecord, VolumeRecord
from archipfs.types import LayerId
from archipfs.units import format_size

log = structlog.get_logger()


class Recovery(Volumes):
    def __init__(self, backends: Backends) -> None:
        super().__init__(backends)
        self._reclaim_mutex = threading.Lock()
        self._reclaim_at = math.inf
        """When there is more to be deleted, on the monotonic clock."""
        self._layers_waiting: dict[str, int] = {}

    def recover(self) -> None:
        """Finish what a crash cut short: purge removed volumes, delete layers that nothing leads to.

        What cannot be done now, as in a store that is full or damaged somewhere, is logged and left for the next time.
        May run beside everything else; what is open stays so.
        """
        for mapper in self._mappers.values():
            self._live[mapper.backend].adopt(functools.partial(_is_layer_of, mapper))
            live = self._live[mapper.backend].layers()  # first: a layer's record is there before its live bitmap
            self._finish_moves(mapper)
            for record in mapper.removed():
                if record.moved_to is None:
                    self._purge_removed(mapper, record)
            self._reclaim(mapper)
            try:
                mapper.forget_stray_locks()
            except StoreError as error:
                log.error("stray locks stay", backend=mapper.backend, error=str(error))
            layers = {LayerId(ident) for ident in mapper.catalog.idents(LayerRecord)}
            for layer in live - layers:
                self._live[mapper.backend].forget(layer)
            self._recover_open(mapper, live & layers)

    def _purge_removed(self, mapper: Mapper, record: VolumeRecord) -> None:
        opened = self._table.volumes.get(record.id)
        if opened is not None and opened.mapper is mapper:
            self._removed_while_open(mapper, opened)
            return
        if record.id in self._table.awaited and record.moved_to is None:
            return

        def purge() -> None:
            if record.writable:
                mapper.locks.take(record.id, Hold.IO, called=f"the removed volume {record.id}")
            mapper.purge(record)
            self._live[mapper.backend].forget(record.layer)
            self._reclaim_wanted = True

        try:
            try:
                purge()
            except StoreFull:
                mapper.blocker.relieve()
                purge()
        except LockHeld:
            return  # open on another node, which purges it when it closes it
        except ArchipError as error:
            log.error("not purged", volume=record.id, error=str(error))

    def _finish_moves(self, *mappers: Mapper) -> None:
        """Purge what has moved away from there, once it needs nothing of it any more where it is now."""
        for mapper in mappers:
            for record in mapper.removed():
                if record.moved_to is not None and self._arrived(mapper, record):
                    self._purge_removed(mapper, record)

    def _arrived(self, origin: Mapper, original: VolumeRecord) -> bool:
        """Have what was moved be a volume like any other in the backend where it is now; false if that is not ours to
        do, or cannot be done now."""
        target = next((each for each in self._mappers.values() if each.store.id == original.moved_to), None)
        if target is None:
            return False  # the next node that has both does it

        def settled(record: VolumeRecord) -> VolumeRecord:
            is_its = record.replica_of is not None and record.replica_of.store == origin.store.id
            return msgspec.structs.replace(record, replica_of=None) if is_its else record

        try:
            target.change(original.id, settled)
        except NotFound:
            return True  # it was removed there since
        except ArchipError as error:
            log.error("moved, and not purged where it was; it is tried again", volume=original.id, error=str(error))
            return False
        return True

    def _removed_while_open(self, mapper: Mapper, opened: OpenVolume) -> None:
        """Nobody opens a volume without a name; but who has it open from before it was removed, goes on using it."""
        try:
            with opened.control:
                if opened.started and opened.mapper is mapper:  # else it has just been moved
                    opened.record = mapper.remove(opened.id)  # who closes it last purges it
        except ArchipError as error:
            log.error("removed, and not purged when it is closed", volume=opened.id, error=str(error))

    def _recover_open(self, mapper: Mapper, live: set[LayerId]) -> None:
        """Open and close the volumes that were open at the crash: their sizes and times of change come from what the
        live bitmaps remember, and their locks are given back."""
        held = mapper.locks.held_here(Hold.IO)
        if not live and not held:
            return
        for found in [Found(mapper, each.record) for each in mapper.volumes()]:
            record = found.record
            if self.may_be_hidden(record):
                continue  # what its live bitmap knows may be all there is, if it had just been moved
            if self.is_hidden(mapper, record):
                if record.layer in live or record.id in held:
                    self._let_go(mapper, record)
                continue
            in_use = self.is_open(record.id) or record.id in self._table.awaited
            if record.writable and (record.layer in live or record.id in held) and not in_use:
                try:
                    with self.using(found) as opened:
                        log.info("recovered", volume=record.name, size=opened.size)
                except NotFound:
                    continue  # removed since the volumes were listed
                except ArchipError as error:
                    log.error("not recovered", volume=record.name, error=str(error))

    def _let_go(self, mapper: Mapper, replica: VolumeRecord) -> None:
        """After a move that was cut short before the volume had moved."""
        opened = self._table.volumes.get(replica.id)
        if opened is None or opened.control.acquire(blocking=False):  # else it is just being moved
            try:
                now = mapper.catalog.volume(replica.id).record
                if self.is_hidden(mapper, now):  # else it has just been moved
                    self._live[mapper.backend].forget(now.layer)
                    mapper.locks.let_go(now.id)
            except ArchipError as error:
                log.error("lock of a replica not given back", volume=replica.name, error=str(error))
            finally:
                if opened is not None:
                    opened.control.release()

    def reclaim(self) -> None:
        """Delete the layers that removed volumes have left; does nothing when none was removed, or is to be by now."""
        with self._reclaim_mutex:
            if not self._reclaim_wanted and time.monotonic() < self._reclaim_at:
                return
            self._reclaim_wanted, self._reclaim_at = False, math.inf
            for mapper in self._mappers.values():
                self._reclaim_wanted |= not self._reclaim(mapper)

    def _reclaim(self, mapper: Mapper) -> bool:
        """False if it has to be tried again. A store that is damaged somewhere gives no space back, but works."""
        try:
            freed = mapper.reclaim()
        except (ObjectDamaged, ObjectMissing, FormatTooNew) as error:
            log.error("nothing reclaimed", backend=mapper.backend, error=str(error))
            return True
        except StoreError as error:
            log.warning("nothing reclaimed, it is tried again", backend=mapper.backend, error=str(error))
            return False
        self._layers_waiting[mapper.backend] = freed.waiting
        if freed.waiting:
            self._reclaim_at = min(self._reclaim_at, time.monotonic() + READERS_GRACE_NS / 1e9)
        if freed.layers:
            log.info("reclaimed", layers=freed.layers, freed=format_size(freed.stored_bytes))
        return True

    def layers_waiting(self, backend: str) -> int:
        """Of how many layers something is to be deleted a minute after it was found to be unused or replaced by a seal,
        since other nodes may be reading it; as of the last look."""
        return self._layers_waiting.get(backend, 0)

    def close_all(self) -> None:
        """Flush and close everything, whoever uses it. Errors are raised at the end, the first one."""
        failed: ArchipError | None = None
        for opened in list(self._table.volumes.values()):
            with opened.control:
                if not opened.started:
                    continue
                try:
                    opened.stop()
                except ArchipError as error:
                    log.error("close failed", volume=opened.id, error=str(error))
                    failed = failed or error
        if failed is not None:
            raise failed

    def abandon(self) -> None:
        """Let go of everything as a crash would."""
        for opened in self._table.volumes.values():
            opened.abandon()


def _is_layer_of(mapper: Mapper, layer: LayerId) -> bool:
    return mapper.catalog.get(LayerRecord, layer) is not None
