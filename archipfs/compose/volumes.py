"""The volumes of all backends, found by name, and those open in this process: who uses one, and in which way.

What the composer does with them is in the modules beside this one: making, changing, seals, locking, recovery.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from archipfs.blockers.contract import Space
from archipfs.compose.engine import CacheStatistics
from archipfs.compose.layers import LiveBitmaps
from archipfs.compose.sealed import SealedStore
from archipfs.compose.volume import EngineUser, Home, OpenVolume
from archipfs.errors import AlreadyExists, Busy, NotFound, ObjectMissing, ReadOnlyVolume, StoreUnavailable
from archipfs.map.mapper import Mapper
from archipfs.map.names import check_name
from archipfs.map.records import Hold, LayerRecord, LockRecord, Replica, VolumeRecord
from archipfs.types import SECTOR_BYTES, RequestId, VolumeId

MOVES_MAX = 5
"""How many times in turn a volume may turn out to be in another backend while it is opened."""
CLOSING_SECONDS = 2.0
"""How long an operation that wants a volume alone waits for its last user, whose close may be on its way."""


@dataclass(frozen=True, slots=True)
class Backends:
    """Those that a composer begins with, by name."""

    mappers: Mapping[str, Mapper]
    """In the order in which names are looked for."""
    sealed: Mapping[str, SealedStore]
    live: LiveBitmaps
    default: str
    """Where volumes are made when no backend is named."""


@dataclass(frozen=True, slots=True)
class Found:
    """A volume, with the mapper of the backend it lies in."""

    mapper: Mapper
    record: VolumeRecord


@dataclass(slots=True)
class _Table:
    """The volumes open in this process; ``changed`` is notified when one is let go."""

    volumes: dict[VolumeId, OpenVolume] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    ever_open: set[VolumeId] = field(default_factory=set)
    """Those and all that were in it before, unless they were purged."""
    awaited: set[VolumeId] = field(default_factory=set)
    """Those that somebody has open since before a crash, and that were not opened again so far."""


class Volumes:
    def __init__(self, backends: Backends) -> None:
        self._mappers = backends.mappers
        self._sealed = backends.sealed
        self._default_backend = backends.default
        self._live_bitmaps = backends.live
        self._live = {name: backends.live.of(mapper.store.id) for name, mapper in backends.mappers.items()}
        self._table = _Table()
        self._engine_users: list[EngineUser] = []
        self.away: Mapping[str, StoreUnavailable] = {}
        """Backends that are configured and could not be opened yet, and why. Replaced and never changed."""
        self._reclaim_wanted = False

    def add_engine_user(self, user: EngineUser) -> None:
        """Have it told of the engines of all volumes that are opened from now on."""
        self._engine_users.append(user)

    # Backends. Readers go through them at any time: what they go through is replaced and never changed.

    def add_backend(self, mapper: Mapper, sealed: SealedStore) -> None:
        """Use one more, in which names are looked for last."""
        name = mapper.backend
        self._live = {**self._live, name: self._live_bitmaps.of(mapper.store.id)}
        self._sealed = {**self._sealed, name: sealed}
        self._mappers = {**self._mappers, name: mapper}
        self.away = {other: why for other, why in self.away.items() if other != name}

    def drop_backend(self, name: str) -> tuple[Mapper, SealedStore]:
        """Use it no more; returns what ``add_backend`` takes. Raises ``Busy`` if a volume of it is open."""
        mapper = self.mapper(name)
        with self._table.changed:
            for opened in self._table.volumes.values():
                if opened.mapper is mapper:
                    called = opened.name if opened.started else "a volume"
                    raise Busy(f"{called} in backend {name} is open; close it first")
            if any(mapper.catalog.get(VolumeRecord, volume) for volume in self._table.awaited):
                raise Busy(f"a volume in backend {name} is open; close it first")
            self._mappers = {other: each for other, each in self._mappers.items() if other != name}
            if self._default_backend == name:
                self._default_backend = next(iter(self._mappers))
        return mapper, self._sealed[name]

    @property
    def default_backend(self) -> str:
        """Where volumes are made when no backend is named."""
        return self._default_backend

    # Looking

    @property
    def mappers(self) -> Mapping[str, Mapper]:
        return self._mappers

    def sealed_store(self, mapper: Mapper) -> SealedStore:
        """Where the chunks and maps of its sealed layers are."""
        return self._sealed[mapper.backend]

    def pack_cache(self) -> CacheStatistics | None:
        """What the node's pack cache has and did, if there is one yet: all backends share it."""
        return next((sealed.pack_cache() for sealed in self._sealed.values()), None)

    def find(self, name: str) -> Found:
        """Raises ``NotFound``, and ``InvalidName`` for what cannot be a name.

        A backend that is away keeps nobody from what lies in others. Raises ``StoreUnavailable`` if that leaves it open
        whether there is such a volume.
        """
        check_name(name)
        away = next(iter(self.away.values()), None)
        for mapper in self._mappers.values():
            try:
                found = mapper.find(name)
                if found is not None and not self.is_hidden(mapper, found.record):
                    return Found(mapper, self._as_open(found.record))
            except StoreUnavailable as error:
                away = away or error
        raise away or NotFound(f"no volume is called {name}; see `archip volume-list`")

    def find_by_id(self, volume: VolumeId) -> Found:
        """Also finds a volume that was removed and is still open. Raises ``NotFound``."""
        opened = self._table.volumes.get(volume)
        record = opened.present_record() if opened is not None else None
        if opened is not None and record is not None:
            return Found(opened.mapper, record)
        found = self._stored(volume)
        if found is None:
            raise NotFound(f"no volume has the id {volume}; see `archip volume-list`")
        return found

    def _stored(self, volume: VolumeId) -> Found | None:
        """The volume of that id, removed or not, that is no hidden replica; where it lives on if it was moved."""
        away = next(iter(self.away.values()), None)
        for mapper in self._mappers.values():
            try:
                found = mapper.catalog.get(VolumeRecord, volume)
                if found is None or found.record.moved_to is not None or self.is_hidden(mapper, found.record):
                    continue
            except StoreUnavailable as error:
                away = away or error
            else:
                return Found(mapper, found.record)
        if away is not None:
            raise away
        return None

    def is_hidden(self, mapper: Mapper, record: VolumeRecord) -> bool:
        """Whether this volume in ``mapper`` is the replica of one that this node has: nothing resolves to it."""
        replica = record.replica_of
        if replica is None:
            return False
        original = self._original_of(replica)
        if original is None:
            return self.may_be_hidden(record)
        found = original.catalog.get(VolumeRecord, record.id) if replica.arriving else None
        return found is None or found.record.moved_to != mapper.store.id

    def may_be_hidden(self, record: VolumeRecord) -> bool:
        """Whether a backend is away that may have the original of this volume: nobody knows then."""
        return bool(self.away) and record.replica_of is not None and self._original_of(record.replica_of) is None

    def _original_of(self, replica: Replica) -> Mapper | None:
        """Of the backend that it was copied from, if this node has that."""
        return next((each for each in self._mappers.values() if each.store.id == replica.store), None)

    def find_again(self, found: Found) -> Found:
        """The volume as it is now. Raises ``NotFound``.

        Takes a look at the store only if this process has had it open: else its size is as it was found.
        """
        return self.find_by_id(found.record.id) if found.record.id in self._table.ever_open else found

    def volumes(self) -> Iterator[Found]:
        """All volumes, in no order; each name once, as ``find`` finds it.

        Raises ``StoreUnavailable`` at the end, behind all that can be had, if a backend is away.
        """
        seen = set()
        away = next(iter(self.away.values()), None)
        for mapper in self._mappers.values():
            try:
                shown = [each.record for each in mapper.volumes() if not self.is_hidden(mapper, each.record)]
            except StoreUnavailable as error:
                away = away or error
                continue
            for record in shown:
                if record.name not in seen:
                    seen.add(record.name)
                    yield Found(mapper, self._as_open(record))
        if away is not None:
            raise away

    def volumes_in(self, backend: str) -> Iterator[Found]:
        """All that lie in one backend, in no order, also those that no name leads to from here."""
        mapper = self.mapper(backend)
        for found in mapper.volumes():
            opened = self._table.volumes.get(found.record.id)
            is_it = opened is not None and opened.mapper is mapper
            yield Found(mapper, self._as_open(found.record) if is_it else found.record)

    def open_volumes(self) -> list[OpenVolume]:
        with self._table.changed:
            return [volume for volume in self._table.volumes.values() if volume.uses and volume.started]

    def lock_of(self, found: Found) -> LockRecord | None:
        """Who holds the volume's lock."""
        return found.mapper.locks.holder(found.record.id)

    def stored_bytes(self, found: Found) -> int:
        """What the volume's own layer takes in the store: what was written since the last snapshot.

        Of a sealed one, what sealing it has added; but a sector at least if it has any data, since programs take a file
        that has no blocks for one hole.
        """
        try:
            data = found.mapper.blocker.open_data(f"layer/{found.record.layer}", writable=False)
        except ObjectMissing:
            layer = found.mapper.catalog.get(LayerRecord, found.record.layer)
            if layer is not None and layer.record.sealed is not None:
                return max(layer.record.sealed.added_bytes, min(SECTOR_BYTES, layer.record.sealed.data_bytes))
            now = self.find_by_id(found.record.id)
            if now.record.layer == found.record.layer:
                raise
            return self.stored_bytes(now)  # it went over to another layer since, and that one is reclaimed
        try:
            return data.allocated()
        finally:
            data.close()

    def space(self) -> Space:
        """Room where volumes are made when no backend is named."""
        return self.mapper().blocker.space()

    def is_open(self, volume: VolumeId) -> bool:
        opened = self._table.volumes.get(volume)
        return opened is not None and opened.uses > 0

    def _as_open(self, record: VolumeRecord) -> VolumeRecord:
        """The record with the size and time that writes not committed yet have given it."""
        opened = self._table.volumes.get(record.id)
        present = opened.present_record() if opened is not None else None
        if present is None:
            return record
        return msgspec.structs.replace(record, size=present.size, mtime_ns=max(present.mtime_ns, record.mtime_ns))

    # Opening

    def open(self, found: Found) -> OpenVolume:
        """Use the volume until ``release``. A volume that another node has the lock of is opened for reading."""
        for _ in range(MOVES_MAX):
            opened = self._join(found)
            try:
                with opened.control:
                    if opened.mapper is found.mapper:
                        if not opened.started:
                            opened.start()
                        return opened
            except BaseException:
                self.release(opened)
                raise
            # It has just been moved, or is the other one with its id, in a backend that comes later, being recovered.
            self.release(opened)
            found = self.find_by_id(found.record.id)
        raise Busy(f"{found.record.name} is being moved from one backend to another; try again")

    def await_reopening(self, volumes: Iterable[VolumeId]) -> None:
        """Before anything else is done with them: somebody has these open since the time of an earlier process.

        Until ``reopen`` they count as open for whoever wants one alone, and for ``recover``.
        """
        self._table.awaited.update(volumes)

    def await_no_more(self, volume: VolumeId) -> None:
        """Nobody has it open any more, and it was never opened again."""
        self._table.awaited.discard(volume)

    def reopen(self, volume: VolumeId, generation: int) -> OpenVolume:
        """Use a volume that an earlier process had open, for those who still have; a removed one too.

        ``generation`` is that of the lock it had then, 0 if it had none. If that lock was broken meanwhile, somebody
        else may have written: the volume is fenced, since whoever has it open believes in what was there before.
        """
        found = self._stored(volume)
        if found is None:
            raise NotFound(f"no volume has the id {volume}; it was open, and is gone")
        self._table.awaited.add(volume)
        opened = self._join(found)
        try:
            with opened.control:
                if not opened.started:
                    opened.start_again(generation)
        except BaseException:
            self.release(opened)
            raise
        self._table.awaited.discard(volume)
        return opened

    def release(self, opened: OpenVolume) -> None:
        """The counterpart of ``open``; the last one flushes and gives the lock back."""
        with opened.control:
            with self._table.changed:
                opened.uses -= 1
                last = opened.uses == 0
            try:
                if last and opened.started:
                    removed = opened.record.name is None
                    opened.stop()
                    self._reclaim_wanted |= removed
                    if removed:
                        self._table.ever_open.discard(opened.id)
            finally:
                self._forget_unused(opened)

    def _join(self, found: Found) -> OpenVolume:
        with self._table.changed:
            opened = self._table.volumes.get(found.record.id)
            if opened is None:
                opened = self._make_open(found)
                self._table.volumes[found.record.id] = opened
            self._table.ever_open.add(found.record.id)
            opened.uses += 1
            return opened

    def _join_alone(self, found: Found, doing: str) -> OpenVolume:
        """As ``_join``, for a volume that nobody uses; its ``control`` is held already. Raises ``Busy``."""
        volume = found.record.id
        if volume in self._table.awaited:
            raise Busy(f"{found.record.name} is open; close it before you {doing} it")
        opened = self._make_open(found)
        opened.control.acquire()
        with self._table.changed:
            while not self._table.changed.wait_for(lambda: volume not in self._table.volumes, CLOSING_SECONDS):
                if self._table.volumes[volume].uses:
                    raise Busy(f"{found.record.name} is open; close it before you {doing} it")
                # It is being closed, and comes to an end with that, however long the last flush takes.
            self._table.volumes[volume] = opened
            self._table.ever_open.add(volume)
            opened.uses += 1
        return opened

    def _make_open(self, found: Found) -> OpenVolume:
        return OpenVolume(self._home(found.mapper), found.record.id, self._engine_users)

    def _home(self, mapper: Mapper) -> Home:
        return Home(mapper, self._live[mapper.backend], self._sealed[mapper.backend])

    def _forget_unused(self, opened: OpenVolume) -> None:
        with self._table.changed:
            if opened.uses == 0 and self._table.volumes.get(opened.id) is opened:
                del self._table.volumes[opened.id]
            self._table.changed.notify_all()

    @contextmanager
    def using(self, found: Found) -> Iterator[OpenVolume]:
        """``open`` and ``release`` around a block."""
        opened = self.open(found)
        try:
            yield opened
        finally:
            self.release(opened)

    @contextmanager
    def _owning(self, found: Found) -> Iterator[OpenVolume]:
        """Use a writable volume as its owner. Raises ``LockHeld`` at once if another node is."""
        if not found.record.writable:
            raise ReadOnlyVolume(f"{found.record.name} is a snapshot and does not change; clone it to write")
        with self.using(found) as opened, opened.control:
            self._refuse_elsewhere(found, opened)
            opened.own()
            yield opened

    @contextmanager
    def _locked(self, found: Found) -> Iterator[OpenVolume]:
        """Hold the volume's lock, open or not, without opening it. Raises ``LockHeld`` if another node has it."""
        opened = self._join(found)
        try:
            with opened.control:
                self._refuse_elsewhere(found, opened)
                with self._lock_held(found, opened):
                    yield opened
        finally:
            self.release(opened)

    @contextmanager
    def _alone(self, found: Found, doing: str) -> Iterator[OpenVolume]:
        """Hold the lock of a volume that nobody uses, without opening it; who opens it meanwhile waits.

        Raises ``Busy`` if it is used or held, ``LockHeld`` if another node has it.
        """
        opened = self._join_alone(found, doing)
        try:
            self._refuse_held(found, doing)
            with self._lock_held(found, opened):
                yield opened
        finally:
            try:
                self.release(opened)
            finally:
                opened.control.release()

    @contextmanager
    def _lock_held(self, found: Found, opened: OpenVolume) -> Iterator[None]:
        if not found.record.writable or (opened.started and opened.owned and not opened.fenced):
            yield
            return
        called = str(found.record.name)
        # Left by a crash, or by a close that failed: it stays, with the live bitmap beside it, for whoever opens it.
        was_ours = found.mapper.locks.holds(found.record.id, Hold.IO)
        found.mapper.locks.take(found.record.id, Hold.IO, called=called)
        try:
            self._refuse_moved(found)
            yield
        finally:
            if not was_ours and not (opened.started and opened.owned and not opened.fenced):
                found.mapper.locks.give_back(found.record.id, Hold.IO, called=called)

    # Helpers

    def mapper(self, backend: str | None = None) -> Mapper:
        """Raises ``NotFound`` for a backend that is not configured, ``StoreUnavailable`` for one that is away."""
        name = backend or self._default_backend
        if name in self.away:
            raise self.away[name]
        if name not in self._mappers:
            raise NotFound(f"no backend is called {name}; see `archip backend-list`")
        return self._mappers[name]

    def _lost_name(self, opened: OpenVolume, record: VolumeRecord) -> None:
        """A volume was removed: purge it now, or have the last to close it do so. Its ``control`` is held."""
        if opened.started:
            opened.record = record
            return
        if opened.id in self._table.awaited:
            return
        opened.mapper.purge(record)
        self._live[opened.mapper.backend].forget(record.layer)
        self._table.ever_open.discard(record.id)
        self._reclaim_wanted = True

    def _refresh(self, opened: OpenVolume) -> None:
        with opened.control:
            if opened.started:
                opened.record = opened.mapper.catalog.volume(opened.id).record

    def _find_or_none(self, name: str) -> Found | None:
        try:
            return self.find(name)
        except NotFound:
            return None

    def _refuse_taken(self, name: str) -> None:
        check_name(name)
        if self._find_or_none(name) is not None:
            raise AlreadyExists(f"{name} exists already; choose another name or remove it first")

    def _refuse_moved(self, found: Found) -> None:
        """Raises ``NotFound`` if the name leads to the volume no more."""
        now = found.mapper.find(str(found.record.name))
        if now is None or now.record.id != found.record.id:
            raise NotFound(f"{found.record.name} has just been removed or renamed; see `archip volume-list`")

    def _refuse_elsewhere(self, found: Found, opened: OpenVolume) -> None:
        """Raises ``Busy`` if it was moved to another backend since it was found; its ``control`` is held."""
        if opened.mapper is not found.mapper:
            raise Busy(f"{found.record.name} has just been moved to backend {opened.mapper.backend}; try again")

    def _refuse_held(self, found: Found, doing: str) -> None:
        lock = found.mapper.locks.holder(found.record.id)
        if lock is not None and any(hold is not Hold.IO for hold in lock.holds):
            command = "volume-close" if Hold.OPENED in lock.holds else "volume-unlock"
            name = found.record.name
            raise Busy(f"{name} is held by {lock.host}; `archip {command} {name}` before you {doing} it")

    def _done_before(self, name: str, request: RequestId | None) -> VolumeRecord | None:
        """The volume called ``name``, if it was this very request that made it or called it so."""
        if request is None:
            return None
        found = self._find_or_none(name)
        return found.record if found is not None and found.record.request == request else None
