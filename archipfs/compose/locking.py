"""Locks of volumes, as people ask for them, and watching that ours stay ours."""

import structlog

from archipfs.compose.returning import Returning
from archipfs.errors import ArchipError, Fenced
from archipfs.map.records import Hold, LockRecord
from archipfs.types import VolumeId

log = structlog.get_logger()


class Locking(Returning):
    def lock(self, name: str) -> LockRecord:
        found = self.find(name)
        return found.mapper.locks.take(found.record.id, Hold.LOCKED, called=name)

    def unlock(self, name: str, *, force: bool = False) -> None:
        """``force`` breaks the lock of whoever has it: that one writes no more. Ours is given back, not broken."""
        found = self.find(name)
        lock = found.mapper.locks.holder(found.record.id)
        if force and (lock is None or not found.mapper.locks.is_ours(lock)):
            # A free one too: an attempt before may have freed it, and not have come to shut its owner out.
            found.mapper.locks.break_(found.record.id)
            if lock is not None:
                log.warning("lock broken", volume=name, owner=lock.host, node=lock.node)
            return
        found.mapper.locks.give_back(found.record.id, Hold.LOCKED, called=name)

    def hold_open(self, name: str) -> LockRecord:
        """``volume-open``: keep the lock although nobody reads or writes."""
        found = self.find(name)
        return found.mapper.locks.take(found.record.id, Hold.OPENED, called=name)

    def close(self, name: str) -> None:
        """``volume-close``: the counterpart of ``hold_open``."""
        found = self.find(name)
        found.mapper.locks.give_back(found.record.id, Hold.OPENED, called=name)

    def watch_locks(self) -> list[VolumeId]:
        """To be called every now and then: see whether others have broken our locks. Returns the volumes fenced by
        that."""
        return [*self.return_to_stores(), *self.verify_leases()]

    def verify_leases(self) -> list[VolumeId]:
        """Fence the volumes whose locks were broken; which ones that is true of now.

        Where the store shuts out, it is that by which we learn of it.
        """
        fenced = []
        for opened in self.open_volumes():
            if not opened.control.acquire(blocking=False):
                continue  # whoever is at work with it looks himself, or gives the lock back
            try:
                opened.verify_lease()
            except Fenced as error:
                log.error("fenced", volume=opened.name, error=str(error))
                fenced.append(opened.id)
            except ArchipError as error:
                log.error("lock not verified, it is tried again", volume=opened.id, error=str(error))
            finally:
                opened.control.release()
        return fenced
