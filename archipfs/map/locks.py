"""Locks of volumes: in the store, so that they hold between hosts and outlive whoever took them.

The owner is a node, not a process: after a crash the same node takes its own lock again and recovers. A lock is held
for one or more reasons (``Hold``) and given back when none is left. Breaking it raises the generation; an owner
compares that with the generation it got before it makes anything durable, and stops for good when they differ.
"""

import time
from contextlib import suppress
from dataclasses import dataclass

from archipfs.blockers.contract import VersionPaths
from archipfs.errors import Conflict, Fenced, LockHeld
from archipfs.map.catalog import Catalog, Versioned
from archipfs.map.records import Hold, LockRecord
from archipfs.types import VolumeId


@dataclass(frozen=True, slots=True)
class Node:
    """Who we are to other nodes: ``id`` is kept in the state directory, ``host`` is for people."""

    id: str
    host: str


class Locks:
    """The locks of one backend, as seen by one node."""

    def __init__(self, catalog: Catalog, node: Node) -> None:
        self._catalog = catalog
        self._node = node

    def get(self, volume: VolumeId) -> LockRecord | None:
        found = self._catalog.lock(volume)
        return None if found is None else found.record

    def holder(self, volume: VolumeId) -> LockRecord | None:
        """The lock if somebody holds it."""
        record = self.get(volume)
        return record if record is not None and record.node is not None else None

    def holds(self, volume: VolumeId, hold: Hold) -> bool:
        """Whether this node has the lock for that reason; a crash may have left it so."""
        record = self.get(volume)
        return record is not None and record.node == self._node.id and hold in record.holds

    def held_here(self, hold: Hold) -> set[VolumeId]:
        """The volumes whose lock this node has for that reason."""
        locks = (found.record for _, found in self._catalog.list(LockRecord, skip_damaged=True))
        return {lock.volume for lock in locks if self.is_ours(lock) and hold in lock.holds}

    def held_elsewhere(self) -> set[VolumeId]:
        """The volumes whose lock another node has."""
        locks = (found.record for _, found in self._catalog.list(LockRecord, skip_damaged=True))
        return {lock.volume for lock in locks if lock.node is not None and not self.is_ours(lock)}

    def take(self, volume: VolumeId, hold: Hold, *, called: str) -> LockRecord:
        """Hold the lock for the reason ``hold`` too; nothing changes if we do already.

        Raises ``LockHeld`` if another node has it. ``called`` is the volume's name, for the message. The generation
        rises whenever the lock was free: others may have had it since, and what we remember of the volume from an
        earlier time, as a live bitmap does, is worth nothing.
        """
        while True:
            found = self._catalog.lock(volume)
            current = found.record if found else LockRecord(volume, 0, None, "", 0)
            self._refuse_foreign(current, called)
            if current.node is not None and hold in current.holds:
                return current
            was_free = current.node is None
            since_ns = time.time_ns() if was_free else current.since_ns
            generation = current.generation + was_free
            holds = (*current.holds, hold)
            taken = LockRecord(volume, generation, self._node.id, self._node.host, since_ns, holds)
            if self._replace(found, taken):
                return taken

    def give_back(self, volume: VolumeId, hold: Hold, *, called: str) -> None:
        """Drop the reason ``hold``; the lock is free when it was the last one. Nothing happens if we had it not.

        Raises ``LockHeld`` if another node has the lock.
        """
        while True:
            found = self._catalog.lock(volume)
            if found is None or found.record.node is None:
                return
            self._refuse_foreign(found.record, called)
            holds = tuple(other for other in found.record.holds if other is not hold)
            if holds == found.record.holds:
                return
            if self._replace(found, self._with_holds(found.record, holds)):
                return

    def break_(self, volume: VolumeId) -> None:
        """Take the lock from whoever has it, and raise the generation so that it stops writing."""
        while True:
            found = self._catalog.lock(volume)
            if found is None:
                return
            freed = self._with_holds(found.record, ())
            broken = LockRecord(volume, found.record.generation + 1, freed.node, freed.host, freed.since_ns)
            if self._replace(found, broken):
                return

    def verify(self, lease: LockRecord, *, called: str) -> int:
        """Raises ``Fenced`` if the lock is no longer the one that ``lease`` was got for.

        Returns the version of its record: as long as it is at that, there is nothing new to be found here.
        """
        found = self._catalog.lock(lease.volume)
        if found is None or (found.record.node, found.record.generation) != (lease.node, lease.generation):
            raise Fenced(f"the lock of {called} was broken by another node; this one writes to it no more")
        return found.version

    def version_paths(self, volume: VolumeId, version: int) -> VersionPaths | None:
        """How C code sees that the lock's record is still at ``version``."""
        return self._catalog.version_paths(LockRecord, volume, version)

    def forget(self, volume: VolumeId) -> None:
        """Remove the lock's record, after the volume's."""
        while (found := self._catalog.lock(volume)) is not None:
            with suppress(Conflict):
                self._catalog.delete(LockRecord, volume, found.version)

    def is_ours(self, record: LockRecord) -> bool:
        return record.node == self._node.id

    def _refuse_foreign(self, record: LockRecord, called: str) -> None:
        if record.node not in (None, self._node.id):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.since_ns / 1e9))
            raise LockHeld(
                f"{called} is locked by {record.host} (node {record.node}) since {since}; "
                f"close it there, or break the lock with `archip volume-unlock -f {called}`"
            )

    def _with_holds(self, record: LockRecord, holds: tuple[Hold, ...]) -> LockRecord:
        if holds:
            return LockRecord(record.volume, record.generation, record.node, record.host, record.since_ns, holds)
        return LockRecord(record.volume, record.generation, None, "", 0)

    def _replace(self, found: Versioned[LockRecord] | None, record: LockRecord) -> bool:
        try:
            self._catalog.put(record, record.volume, found.version if found else None)
        except Conflict:
            return False
        return True
