"""Moving a volume or a snapshot from one backend to another, while it is in use if it is a volume.

1. It is replicated, again and again while it is written, until little is left to copy.
2. Requests wait. What is left is copied, and the replica becomes one that *arrives*, under our lock of it.
3. **The original's record loses its name and says where it has moved to.** From then on the other one is the volume.
4. The engine goes over to the other one's layers; requests go on.
5. The replica stops being one; the original is purged.

docs/architecture.md, "Replicas and moves", has what a crash leaves.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import structlog

from archipfs.compose.recovery import Recovery
from archipfs.compose.replicas import Copier, Replicas
from archipfs.compose.sealing import Progress
from archipfs.compose.volume import OpenVolume
from archipfs.compose.volumes import Found
from archipfs.errors import Fenced, InvalidInput, NotFound, StoreError
from archipfs.map.records import LockRecord, Replica, VolumeRecord
from archipfs.types import VOLUME_BYTES_MAX

log = structlog.get_logger()

PAUSE_BYTES = 16 << 20
"""So much may be left to copy when requests are made to wait."""
ROUNDS_MAX = 8
"""Who is written faster than it is copied waits longer at the end."""


@dataclass(frozen=True, slots=True)
class Moved:
    record: VolumeRecord
    added_bytes: int
    """What it took in the backend that it is in now."""
    was_there: bool = False
    """It had been moved before."""


class Moving(Replicas, Recovery):
    def move(self, name: str, *, origin: str, target: str, progress: Progress) -> Moved:
        """Move one volume or snapshot; those made from it stay where they are, and so do those it was made from.

        Raises ``Busy`` for a snapshot in use, ``LockHeld`` for a volume that another node has, ``PassedOver`` where
        something in the target is in the way. After any error it is where it was, or where it was to go, and whole.
        """
        source, other = self.mapper(origin), self.mapper(target)
        if source is other:
            raise InvalidInput(f"{origin} is both where {name} comes from and where it goes; give two backends")
        self._finish_moves(source, other)
        found = self.find(name)
        if found.mapper is other:
            return Moved(found.record, 0, was_there=True)
        if found.mapper is not source:
            raise NotFound(f"{name} lies in backend {found.mapper.backend}, not in {origin}")
        if found.record.size:
            other.check_fits(found.record.size)
        try:
            with self._copier(source, other) as copier:
                copier.expect([found.record], self._heeding_the_end(progress))
                move = self._move_volume if found.record.writable else self._move_snapshot
                record = move(found, copier)
        finally:
            self._reclaim_wanted = True  # of what was copied on the way, and of what an error has left
        log.info("moved", volume=name, origin=origin, target=target, added=copier.added_bytes)
        return Moved(record, copier.added_bytes)

    def _move_snapshot(self, found: Found, copier: Copier) -> VolumeRecord:
        self._replicate(copier, found.record)
        with self._alone(found, "move"):
            content = self.content(copier.origin, found.record.id)
            self.put_replica(copier, content, _arriving(copier, content.record))
            original = self._leave(copier, content.record)
        self._settle(copier, original)
        return copier.target.catalog.volume(original.id).record

    def _move_volume(self, found: Found, copier: Copier) -> VolumeRecord:
        for _ in range(ROUNDS_MAX):
            self._replicate(copier, found.record)
            now = copier.origin.catalog.volume(found.record.id).record
            if self.stored_bytes(Found(copier.origin, now)) <= PAUSE_BYTES:
                break
        with self._owning(found) as opened, self._locked_there(opened, copier) as lease:
            paused = time.monotonic()
            original = self._cross(opened, copier, lease)
            log.info("crossed", volume=opened.name, pause_ms=round((time.monotonic() - paused) * 1e3, 1))
            self._settle(copier, original)
            opened.record = copier.target.catalog.volume(opened.id).record
            return opened.record

    @contextmanager
    def _locked_there(self, opened: OpenVolume, copier: Copier) -> Iterator[LockRecord]:
        """Our lock in the target, held as it is in the origin; given back if the volume does not go there."""
        lock = copier.origin.locks.get(opened.id)
        assert lock is not None, "whoever owns a volume has its lock"
        lease = copier.target.locks.take_over(lock, called=opened.name)
        try:
            yield lease
        except BaseException:
            if opened.mapper is copier.origin:
                copier.target.locks.let_go(opened.id)
            raise

    def _cross(self, opened: OpenVolume, copier: Copier, lease: LockRecord) -> VolumeRecord:
        """Steps 2 to 4. Returns the last that the original's record says."""
        with opened.standing_still() as engine:
            present = opened.present_record()
            assert present is not None
            if present.name is None:
                raise NotFound(f"the volume {opened.id} has just been removed; see `archip volume-list`")
            head = copier.origin.catalog.layer(present.layer).record
            shows_all = engine.parent_visible >= engine.size
            unwritten = engine.size == 0 or (shows_all and engine.head_is_clear(0, engine.size))
            shared = head.parent if unwritten else None
            layer = copier.layer(shared) if shared is not None else copier.still_changing(head)
            with copier.target.new_layer(layer.id, present.size) as new_head:
                record = self.put_arriving(copier, new_head.id, _arriving(copier, present))
                if shared is not None:
                    self._expect_kept(copier, shared, record)
                home = self._home(copier.target)
                return opened.go_over(home, lease, record, lambda: self._leave(copier, present))

    def _settle(self, copier: Copier, original: VolumeRecord) -> None:
        """Step 5, in that order: until the replica is none, the original's record must say where it went. What cannot
        be done now, recovery does, or the next move."""
        if self._arrived(copier.origin, original):
            self._purge_removed(copier.origin, original)

    def _leave(self, copier: Copier, volume: VolumeRecord) -> VolumeRecord:
        """Step 3. A store that failed at it is asked whether it happened all the same."""
        origin, store = copier.origin, copier.target.store.id
        try:
            return origin.leave(volume.id, volume.layer, store)
        except Fenced:
            raise
        except StoreError:
            now = origin.catalog.volume(volume.id).record
            if now.moved_to != store:
                raise
            return now


def _arriving(copier: Copier, record: VolumeRecord) -> VolumeRecord:
    replica_of = Replica(copier.origin.store.id, arriving=True)
    return msgspec.structs.replace(record, replica_of=replica_of, visible=VOLUME_BYTES_MAX)
