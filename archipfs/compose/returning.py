"""Being shut out of a store, and coming back.

A store that knows its clients (``Blocker.shuts_out``) takes nothing more from a whole process once somebody has broken
one of its locks. Coming back is:

1. *Reconnect*: a new client, beside the one that was shut out.
2. *Look, and claim* by the new client what still is ours (``Locks.claim_again``): from then on, whoever breaks such a
   lock shuts the new client out too.
3. *Cast out* the volumes whose locks are lost: their engines are fenced, what is under way on them fails, and we wait
   until nobody is at work with them, so that nothing of that goes on by the new client. Who is not done after ten
   seconds waits for another of our volumes (a copy does), and changes nothing of the lost one when he goes on.
4. *Adopt* the new client. Records and everything that is only read go on.
5. *Claim anew*: what waited on our other volumes goes on, and nothing about it has failed.

If we are shut out once more meanwhile, by another break, it begins anew. A process that dies within it leaves what any
crash leaves: the next one claims, which shuts this one out.

Until 4, calls of the store wait too (``Blocker.while_shut_out``), but not on behalf of a lost volume.
"""

import functools
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog

from archipfs.compose.sealed import SealedStore
from archipfs.compose.volume import OpenVolume
from archipfs.compose.volumes import Backends, Volumes
from archipfs.errors import ArchipError, Busy, Fenced, ShutOut, StoreError
from archipfs.map.locks import Locks
from archipfs.map.mapper import Mapper
from archipfs.map.records import LockRecord
from archipfs.types import VolumeId

log = structlog.get_logger()

OUTSIDE_SECONDS = 60.0
"""How long a call of the store waits until we are back."""
LEAVING_SECONDS = 5.0
"""How long those at work with a lost volume are waited for, before nobody is let wait for the store any more: they may
be waiting for one who does. And how long after that."""


@dataclass(slots=True)
class _Outside:
    """Those who wait until a store takes calls from us again."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    """Notified when we are back, and when a volume was lost."""
    watcher: int | None = None
    """The thread that sees to it that we come back, while it does."""
    hurried: bool = False
    """Nobody may wait."""
    unclaimed: dict[VolumeId, LockRecord] = field(default_factory=dict)
    """Those that are ours, and are still to be claimed by the client that was adopted."""
    gone: list[OpenVolume] = field(default_factory=list)
    """Those that were cast out, and are still to be settled with."""


class Returning(Volumes):
    def __init__(self, backends: Backends) -> None:
        super().__init__(backends)
        self._outside = {name: _Outside() for name in backends.mappers}
        self._watching_stores = False
        self._returning = threading.Lock()
        """One at a time. Before everything else."""

    def add_backend(self, mapper: Mapper, sealed: SealedStore) -> None:
        self._outside[mapper.backend] = _Outside()
        if self._watching_stores:
            self._begin_watching(mapper)
        super().add_backend(mapper, sealed)

    def begin_watching_stores(self) -> None:
        """From now on ``return_to_stores`` is called every now and then, so calls of a store may wait for it."""
        self._watching_stores = True
        for mapper in self._mappers.values():
            self._begin_watching(mapper)

    def _begin_watching(self, mapper: Mapper) -> None:
        if mapper.blocker.shuts_out:
            mapper.blocker.while_shut_out(functools.partial(self._wait_outside, mapper))

    def return_to_stores(self) -> list[VolumeId]:
        """Come back to where we were shut out. Returns the volumes that are lost by that.

        What fails is logged, and tried again at the next call.
        """
        with self._returning:
            return self._return_to_stores()

    def _return_to_stores(self) -> list[VolumeId]:
        lost: list[VolumeId] = []
        for mapper in list(self._mappers.values()):
            if mapper.blocker.shuts_out:
                outside = self._outside[mapper.backend]
                outside.watcher = threading.get_ident()
                try:
                    self._look_after(mapper, outside, lost)
                except ArchipError as error:
                    log.error("not back in the store, it is tried again", backend=mapper.backend, error=str(error))
                finally:
                    outside.watcher = None
        return lost

    def _look_after(self, mapper: Mapper, outside: _Outside, lost: list[VolumeId]) -> None:
        """What is lost before an error is in ``lost`` all the same."""
        self._notice(mapper)
        if mapper.blocker.is_shut_out:
            self._come_back(mapper, outside, lost)
        self._claim_anew(mapper, outside, lost)
        # Only now: whoever reads for a lost volume may have waited until we are back, and whoever copies from it until
        # the other volume is claimed anew.
        if not outside.unclaimed:
            outside.gone = [opened for opened in outside.gone if not self._is_settled(opened)]

    def _claim_anew(self, mapper: Mapper, outside: _Outside, lost: list[VolumeId]) -> None:
        """Claim what is ours by the client that was adopted, and cast out what is lost after all.

        Raises the first error once all were tried.
        """
        broken = []
        failed: ArchipError | None = None
        for volume, lease in list(outside.unclaimed.items()):
            try:
                still_ours = mapper.locks.claim_anew(lease)
            except Busy:
                continue  # it is just being closed or opened; at the next call we see
            except ArchipError as error:
                failed = failed or error
                continue
            if not still_ours:
                broken.append(volume)
            del outside.unclaimed[volume]
        self._cast_out(mapper, outside, broken, lost)
        if failed is not None:
            raise failed

    def _notice(self, mapper: Mapper) -> None:
        """Ask the store for something if we have anything to lose: who reads from his page cache asks nothing."""
        volume = next(iter(mapper.locks.claimed()), None)
        if volume is not None and not mapper.blocker.is_shut_out:
            try:
                mapper.locks.get(volume)
            except ShutOut:
                log.warning("shut out", backend=mapper.backend)

    def _come_back(self, mapper: Mapper, outside: _Outside, lost: list[VolumeId]) -> None:
        started = time.monotonic()
        successor = mapper.blocker.reconnect()
        try:
            locks = Locks(successor, mapper.node)
            leases = mapper.locks.claimed()
            kept = {volume: lease for volume, lease in leases.items() if locks.claim_again(lease)}
            self._cast_out(mapper, outside, [volume for volume in leases if volume not in kept], lost)
        except BaseException:
            successor.close()
            raise
        outside.unclaimed = kept
        mapper.blocker.adopt(successor)
        successor.close()
        with outside.changed:
            outside.hurried = False
            outside.changed.notify_all()
        seconds = round(time.monotonic() - started, 3)
        log.warning("back in the store", backend=mapper.backend, kept=len(kept), of=len(leases), seconds=seconds)

    def _cast_out(self, mapper: Mapper, outside: _Outside, volumes: Iterable[VolumeId], lost: list[VolumeId]) -> None:
        """Fence these volumes, and wait a while until nobody is at work with them any more that began before."""
        opened_all = []
        for volume in volumes:
            lost.append(volume)
            opened = self._table.volumes.get(volume)
            record = opened.present_record() if opened is not None else None
            called = (record.name if record is not None else None) or volume
            log.error("fenced", volume=called, error="another node broke the lock; close it and open it again")
            if opened is None or opened.mapper is not mapper:  # or one that is about to be moved there
                mapper.locks.give_up(volume)
            else:
                opened_all.append(opened)
                outside.gone.append(opened)
                opened.cast_out()
        with outside.changed:
            outside.changed.notify_all()
        for opened in opened_all:
            if not self._has_been_left(opened, outside):
                # He may be waiting for another volume, which waits for us. Of this one he changes nothing any more
                # (``OpenVolume._change``), and he is waited for in the end.
                log.warning("somebody is still at work with a lost volume", volume=opened.id)

    def _has_been_left(self, opened: OpenVolume, outside: _Outside) -> bool:
        """Wait until nobody is at work with the volume, and after a while no more."""
        if not opened.control.acquire(timeout=LEAVING_SECONDS):
            with outside.changed:
                outside.hurried = True
                outside.changed.notify_all()
            if not opened.control.acquire(timeout=LEAVING_SECONDS):
                return False
        opened.control.release()
        return True

    def _is_settled(self, opened: OpenVolume) -> bool:
        """Settle with a volume that was cast out; false if somebody is at work with it, who may need us once more."""
        if not opened.control.acquire(timeout=LEAVING_SECONDS):
            return False
        try:
            opened.settle_cast_out()
        finally:
            opened.control.release()
        return True

    def _wait_outside(self, mapper: Mapper, error: ShutOut) -> None:
        """Return when a call of the store that was refused may be repeated. Raises ``error`` after a while, and another
        one if the call must not be waited with, or repeated."""
        outside = self._outside[mapper.backend]
        deadline = time.monotonic() + OUTSIDE_SECONDS
        with outside.changed:
            while True:
                # Also when we are back: what it was refused, the volume's next owner may do.
                if self._is_for_lost():
                    raise Fenced("the lock of a volume that this is about was broken by another node") from error
                if not mapper.blocker.is_shut_out:
                    return
                if outside.hurried:
                    raise StoreError("given up, since others wait for it who must not go on; try again") from error
                left = deadline - time.monotonic()
                if left < 0 or outside.watcher == threading.get_ident():
                    raise error
                outside.changed.wait(left)

    def _is_for_lost(self) -> bool:
        """Whether this thread is at work with a volume that we have lost."""
        # Without the table's lock: its holder may be waiting outside like us.
        opened_all = list(self._table.volumes.values())
        return any(opened.fenced and opened.control.is_held_here for opened in opened_all)
