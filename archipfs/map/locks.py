"""Locks of volumes: in the store, so that they hold between hosts and outlive whoever took them.

The owner is a node, not a process: after a crash the same node takes its own lock again and recovers. A lock is held
for one or more reasons (``Hold``) and given back when none is left. Breaking it raises the generation; an owner
compares that with the generation it got before it makes anything durable, and stops for good when they differ.

Where the store knows its clients (``Blocker.shuts_out``), that comparison is not what protects the next owner: the
store is told which process changes the volume (a *claim*), and takes nothing from that one any more once another one
claims it. The record says who is right, the claim has the store enforce it, so the order is always the same::

    take:       record ─▶ claim ─▶ look at the record again     nothing is written before that
    give back:  last write ─▶ disclaim ─▶ record
    break:      shut out ─▶ record ─▶ shut out

Whoever claims has seen the record say that it is the owner, and looks again. So a break that came in between either
finds the claim, with the second ``shut out``, or was there to be seen. (The first one has a store that cannot shut
anybody out refuse before anything is changed.)
"""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakValueDictionary

import msgspec

from archipfs.blockers.contract import Blocker, VersionPaths
from archipfs.errors import ArchipError, Busy, Conflict, Fenced, InvalidInput, LockHeld
from archipfs.map.catalog import Catalog, Versioned
from archipfs.map.records import KIND_NAMES, Hold, LockRecord
from archipfs.types import VolumeId


def lock_key(volume: VolumeId) -> str:
    """The key of the lock's record, which is what is claimed too."""
    return f"{KIND_NAMES[LockRecord]}/{volume}"


@dataclass(frozen=True, slots=True)
class Node:
    """Who we are to other nodes: ``id`` is kept in the state directory, ``host`` is for people."""

    id: str
    host: str


def is_same(record: LockRecord, lease: LockRecord) -> bool:
    """Whether the lock is still the one that ``lease`` was got for."""
    return (record.node, record.generation) == (lease.node, lease.generation)


def _owner(lease: LockRecord) -> str:
    """As whom we claim."""
    return f"{lease.node}/{lease.generation}"


class Locks:
    """The locks of one backend, as seen by one node. Thread-safe."""

    def __init__(self, blocker: Blocker, node: Node) -> None:
        self._blocker = blocker
        self._catalog = Catalog(blocker)
        self._node = node
        self._mutex = threading.Lock()
        self._claimed: dict[VolumeId, LockRecord] = {}
        """What this process has claimed, or is about to."""
        self._turns: WeakValueDictionary[VolumeId, threading.Lock] = WeakValueDictionary()
        """Held by whoever claims a volume or gives its claim up, except where its lock was broken."""

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

        For ``Hold.IO`` the volume is claimed too, also if the lock was ours: by the process before this one, which is
        shut out by that, so that nothing of it arrives late.
        """
        while True:
            taken, is_new = self._take_record(volume, hold, called)
            if hold is not Hold.IO or not self._blocker.shuts_out:
                return taken
            try:
                self._claim(taken)
                now = self.get(volume)
            except ArchipError:
                # Nobody knows whether we have it claimed. What was ours before stays so, with the live bitmap beside
                # it; and so does, as after a crash, what cannot be given back.
                if is_new:
                    with suppress(ArchipError):
                        self.give_back(volume, hold, called=called)
                raise
            if now is not None and is_same(now, taken):
                return taken
            self._disclaim(volume)  # broken between our two looks

    def _take_record(self, volume: VolumeId, hold: Hold, called: str) -> tuple[LockRecord, bool]:
        """The lock, and whether it was not held for that reason before."""
        while True:
            found = self._catalog.lock(volume)
            current = found.record if found else LockRecord(volume, 0, None, "", 0)
            self._refuse_foreign(current, called)
            if current.node is not None and hold in current.holds:
                return current, False
            was_free = current.node is None
            since_ns = time.time_ns() if was_free else current.since_ns
            generation = current.generation + was_free
            holds = (*current.holds, hold)
            taken = LockRecord(volume, generation, self._node.id, self._node.host, since_ns, holds, current.broken)
            if self._replace(found, taken):
                return taken, True

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
            if hold is Hold.IO:
                # First: as soon as the record is free, the next owner claims, and would shut us out altogether.
                self._disclaim(volume)
            if self._replace(found, self._with_holds(found.record, holds)):
                return

    def take_over(self, lock: LockRecord, *, called: str) -> LockRecord:
        """Hold the lock of a volume that comes from another store as ``lock`` was held there, under its generation if
        that can be: whoever has the volume open remembers it. Raises ``LockHeld``."""
        while True:
            found = self._catalog.lock(lock.volume)
            current = found.record if found else LockRecord(lock.volume, 0, None, "", 0)
            self._refuse_foreign(current, called)
            passed = current.generation > lock.generation
            generation = current.generation + 1 if passed else lock.generation
            if self._replace(found, msgspec.structs.replace(lock, generation=generation, broken=current.broken)):
                return self.take(lock.volume, Hold.IO, called=called)

    def let_go(self, volume: VolumeId) -> None:
        """Give the lock back for whatever reason we hold it, if we do."""
        lock = self.get(volume)
        for hold in lock.holds if lock is not None and self.is_ours(lock) else ():
            self.give_back(volume, hold, called=f"the volume {volume}")

    def break_(self, volume: VolumeId) -> None:
        """Take the lock from whoever has it, and raise the generation so that it stops writing.

        Where the store can shut it out, that has happened on return. Raises ``StoreUnavailable`` if nobody knows.
        """
        self._shut_out(volume)
        self._break_record(volume)
        self._shut_out(volume)

    def _break_record(self, volume: VolumeId) -> None:
        while True:
            found = self._catalog.lock(volume)
            if found is None or found.record.node is None:
                return
            freed = self._with_holds(found.record, ())
            broken = msgspec.structs.replace(
                freed, generation=found.record.generation + 1, broken=freed.broken or self._may_write_late(found.record)
            )
            if self._replace(found, broken):
                return

    def _may_write_late(self, lock: LockRecord) -> bool:
        return Hold.IO in lock.holds and not self._blocker.shuts_out

    def _shut_out(self, volume: VolumeId) -> None:
        with suppress(InvalidInput):  # it is we who have it: to have claimed it, we have shut out whoever had it before
            self._blocker.shut_out(lock_key(volume))

    def mended(self, lease: LockRecord) -> LockRecord:
        """After an owner has put a head on top of whatever may still be written late: forget that the lock was broken.

        Raises ``Fenced`` if it is not ours any more.
        """
        while True:
            found = self._catalog.lock(lease.volume)
            if found is None or not is_same(found.record, lease):
                raise Fenced(f"the lock of volume {lease.volume} was broken by another node; open it again")
            mended = msgspec.structs.replace(found.record, broken=False)
            if mended == found.record or self._replace(found, mended):
                return mended

    def verify(self, lease: LockRecord, *, called: str) -> int:
        """Raises ``Fenced`` if the lock is no longer the one that ``lease`` was got for.

        Returns the version of its record: as long as it is at that, there is nothing new to be found here.
        """
        found = self._catalog.lock(lease.volume)
        if found is None or not is_same(found.record, lease):
            raise Fenced(f"the lock of {called} was broken by another node; this one writes to it no more")
        return found.version

    def version_paths(self, volume: VolumeId, version: int) -> VersionPaths | None:
        """How C code sees that the lock's record is still at ``version``."""
        return self._catalog.version_paths(LockRecord, volume, version)

    def forget(self, volume: VolumeId) -> None:
        """Remove the lock's record: nobody needs the volume any more."""
        self._disclaim(volume)
        while (found := self._catalog.lock(volume)) is not None:
            with suppress(Conflict):
                self._catalog.delete(LockRecord, volume, found.version)

    def is_ours(self, record: LockRecord) -> bool:
        return record.node == self._node.id

    # Claims

    def claimed(self) -> Mapping[VolumeId, LockRecord]:
        """The locks under which this process may be writing. Only where the store shuts out."""
        with self._mutex:
            return dict(self._claimed)

    def claim_again(self, lease: LockRecord) -> bool:
        """Claim a volume for a process that lost all its claims; false if the lock is not what it was, or not ours.

        Nobody loses a claim by that who has a right to it, save for a moment: if the lock is broken between our looks.
        """
        if not self._is_current(lease):
            return False
        self._claim(lease)
        if self._is_current(lease):
            return True
        self._disclaim(lease.volume)
        return False

    def claim_anew(self, lease: LockRecord) -> bool:
        """Claim a volume by the client that came in the place of the one by which we had; false if its lock was broken.

        Others close and open it meanwhile: what was given back stays so, and who has taken it anew keeps it. Raises
        ``Busy`` if somebody is just at that.
        """
        is_current = self._is_current(lease)
        turn = self._turn(lease.volume)
        if not turn.acquire(blocking=False):
            raise Busy(f"volume {lease.volume} is just being claimed or given back; try again")
        try:
            if not self._has_claimed(lease):
                if lease.volume not in self.claimed():
                    # The new client has claimed it for us before that.
                    self._blocker.disclaim(lock_key(lease.volume))
                return True
            if is_current:
                self._blocker.claim(lock_key(lease.volume), _owner(lease))
        finally:
            turn.release()
        # Whoever gives the lock back has given its claim up before.
        return (is_current and self._is_current(lease)) or not self._has_claimed(lease)

    def give_up(self, volume: VolumeId) -> None:
        """The lock was broken: calls under way on what was opened under it fail."""
        # Not in its turn: who has that may be waiting for us.
        self._disclaim_now(volume)

    def _is_current(self, lease: LockRecord) -> bool:
        now = self.get(lease.volume)
        return now is not None and is_same(now, lease)

    def _has_claimed(self, lease: LockRecord) -> bool:
        claimed = self.claimed().get(lease.volume)
        return claimed is not None and is_same(claimed, lease)

    def _turn(self, volume: VolumeId) -> threading.Lock:
        with self._mutex:
            return self._turns.setdefault(volume, threading.Lock())

    def _claim(self, lease: LockRecord) -> None:
        with self._turn(lease.volume):
            # Noted first: if we are shut out in between, whoever looks after our claims must not miss this one.
            with self._mutex:
                self._claimed[lease.volume] = lease
            self._blocker.claim(lock_key(lease.volume), _owner(lease))

    def _disclaim(self, volume: VolumeId) -> None:
        with self._turn(volume):
            self._disclaim_now(volume)

    def _disclaim_now(self, volume: VolumeId) -> None:
        self._blocker.disclaim(lock_key(volume))
        with self._mutex:
            self._claimed.pop(volume, None)

    def _refuse_foreign(self, record: LockRecord, called: str) -> None:
        if record.node not in (None, self._node.id):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.since_ns / 1e9))
            raise LockHeld(
                f"{called} is locked by {record.host} (node {record.node}) since {since}; "
                f"close it there, or break the lock with `archip volume-unlock -f {called}`"
            )

    def _with_holds(self, record: LockRecord, holds: tuple[Hold, ...]) -> LockRecord:
        if holds:
            return msgspec.structs.replace(record, holds=holds)
        return LockRecord(record.volume, record.generation, None, "", 0, broken=record.broken)

    def _replace(self, found: Versioned[LockRecord] | None, record: LockRecord) -> bool:
        try:
            self._catalog.put(record, record.volume, found.version if found else None)
        except Conflict:
            return False
        return True
