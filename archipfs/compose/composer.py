"""All volumes of all backends, by name: what the mount, the control socket and the command line ask for.

Every method blocks and may be called from any thread. Operations that change a volume open it first, so that what a
crash left behind is recovered before anything else happens to it.
"""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import msgspec
import structlog

from archipfs.blockers.contract import Space
from archipfs.compose.copy import copy_range
from archipfs.compose.layers import LiveBitmaps
from archipfs.compose.sealed import SealedStore
from archipfs.compose.sealing import (
    Advance,
    Progress,
    SealedVolume,
    bytes_to_seal,
    import_layer,
    layers_to_seal,
    seal_layer,
    unheeded,
)
from archipfs.compose.volume import EngineUser, OpenVolume
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Busy,
    Conflict,
    Fenced,
    FormatTooNew,
    InvalidInput,
    InvalidSize,
    LockHeld,
    NotFound,
    ObjectDamaged,
    ObjectMissing,
    ReadOnlyVolume,
    StoreError,
    StoreFull,
)
from archipfs.map.mapper import Attributes, Mapper
from archipfs.map.names import check_name
from archipfs.map.reclaim import delete_objects
from archipfs.map.records import Hold, Kind, LayerRecord, LockRecord, Sealed, VolumeRecord
from archipfs.map.seal import Reader
from archipfs.types import NAME_BYTES_MAX, SECTOR_BYTES, LayerId, RequestId, VolumeId
from archipfs.units import format_size

log = structlog.get_logger()

SEAL_THREADS = max(1, os.cpu_count() or 1)
"""That hash, when somebody waits for it."""
CLOSING_SECONDS = 2.0
"""How long an operation on an unused volume waits for its last user, who may be closing it just now."""


@dataclass(frozen=True, slots=True)
class Found:
    """A volume, with the mapper of the backend it lies in."""

    mapper: Mapper
    record: VolumeRecord


@dataclass(frozen=True, slots=True)
class Made:
    """What an operation made, and how long it took in here."""

    record: VolumeRecord
    seconds: float


@dataclass(frozen=True, slots=True)
class Imported:
    """An import; one that was done when it came first has nothing to say of its bytes."""

    made: Made
    data_bytes: int
    added_bytes: int


@dataclass(frozen=True, slots=True)
class RolledBack:
    kept: VolumeRecord
    """A snapshot of what the rollback left."""
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


class Composer:
    def __init__(
        self,
        mappers: Mapping[str, Mapper],
        live: LiveBitmaps,
        sealed: Mapping[str, SealedStore],
        default_backend: str,
    ) -> None:
        """``mappers`` by backend name, in the order in which names are looked for; ``sealed`` by the same names."""
        self._mappers = mappers
        self._sealed = sealed
        self._default_backend = default_backend
        self._live = {name: live.of(mapper.store.id) for name, mapper in mappers.items()}
        self._table = _Table()
        self._engine_users: list[EngineUser] = []
        self.seals_waited_for = 0
        self._seals_end = False
        self._reclaim_mutex = threading.Lock()
        self._reclaim_wanted = False

    def add_engine_user(self, user: EngineUser) -> None:
        """Have it told of the engines of all volumes that are opened from now on."""
        self._engine_users.append(user)

    # Looking

    @property
    def mappers(self) -> Mapping[str, Mapper]:
        return self._mappers

    def sealed_store(self, mapper: Mapper) -> SealedStore:
        """Where the chunks and maps of its sealed layers are."""
        return self._sealed[mapper.backend]

    def find(self, name: str) -> Found:
        """Raises ``NotFound``, and ``InvalidName`` for what cannot be a name."""
        check_name(name)
        for mapper in self._mappers.values():
            found = mapper.find(name)
            if found is not None:
                return Found(mapper, self._as_open(found.record))
        raise NotFound(f"no volume is called {name}; see `archip volume-list`")

    def find_by_id(self, volume: VolumeId) -> Found:
        """Also finds a volume that was removed and is still open. Raises ``NotFound``."""
        opened = self._table.volumes.get(volume)
        record = opened.present_record() if opened is not None else None
        if opened is not None and record is not None:
            return Found(opened.mapper, record)
        for mapper in self._mappers.values():
            found = mapper.catalog.get(VolumeRecord, volume)
            if found is not None:
                return Found(mapper, found.record)
        raise NotFound(f"no volume has the id {volume}; see `archip volume-list`")

    def find_again(self, found: Found) -> Found:
        """The volume as it is now. Raises ``NotFound``.

        Takes a look at the store only if this process has had it open: else its size is as it was found.
        """
        return self.find_by_id(found.record.id) if found.record.id in self._table.ever_open else found

    def volumes(self) -> Iterator[Found]:
        """All volumes, in no order; each name once, as ``find`` finds it."""
        seen = set()
        for mapper in self._mappers.values():
            for found in mapper.volumes():
                if found.record.name not in seen:
                    seen.add(found.record.name)
                    yield Found(mapper, self._as_open(found.record))

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
        opened = self._join(found)
        try:
            with opened.control:
                if not opened.started:
                    opened.start()
        except BaseException:
            self.release(opened)
            raise
        return opened

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
        for mapper in self._mappers.values():
            found = mapper.catalog.get(VolumeRecord, volume)
            if found is not None:
                break
        else:
            raise NotFound(f"no volume has the id {volume}; it was open, and is gone")
        self._table.awaited.add(volume)
        opened = self._join(Found(mapper, found.record))
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
            if not self._table.changed.wait_for(lambda: volume not in self._table.volumes, CLOSING_SECONDS):
                raise Busy(f"{found.record.name} is open; close it before you {doing} it")
            self._table.volumes[volume] = opened
            self._table.ever_open.add(volume)
            opened.uses += 1
        return opened

    def _make_open(self, found: Found) -> OpenVolume:
        backend = found.mapper.backend
        return OpenVolume(found.mapper, self._live[backend], self._sealed[backend], found.record.id, self._engine_users)

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
            opened.own()
            yield opened

    @contextmanager
    def _locked(self, found: Found) -> Iterator[OpenVolume]:
        """Hold the volume's lock, open or not, without opening it. Raises ``LockHeld`` if another node has it."""
        opened = self._join(found)
        try:
            with opened.control, self._lock_held(found, opened):
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
        if not found.record.writable or (opened.started and opened.owned):
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
            if not was_ours and not (opened.started and opened.owned):
                found.mapper.locks.give_back(found.record.id, Hold.IO, called=called)

    # Making

    def create(
        self,
        name: str,
        size: int,
        *,
        backend: str | None = None,
        attributes: Attributes | None = None,
        request: RequestId | None = None,
    ) -> Made:
        """An empty volume. ``size`` 0 is what a file just created has; commands refuse it."""

        def create() -> VolumeRecord:
            self._refuse_taken(name)
            return self.mapper(backend).create(name, size, attributes or Attributes(), request).record

        return self._make("created", name, request, create)

    def snapshot(self, name: str, snapshot: str, *, size: int | None = None, request: RequestId | None = None) -> Made:
        """A snapshot of a volume, or a second name for what a snapshot holds."""
        return self._make("snapshot", snapshot, request, lambda: self._snapshot(name, snapshot, size, request))

    def _snapshot(self, name: str, snapshot: str, size: int | None, request: RequestId | None) -> VolumeRecord:
        found = self.find(name)
        self._refuse_taken(snapshot)
        mapper = found.mapper
        with mapper.reserve(snapshot) as reservation:
            if not found.record.writable:
                wanted = self._at_least(found.record.size, size, name)
                return mapper.publish_again(reservation, found.record, wanted, request).record
            with self._owning(found) as opened:
                self._refuse_empty(opened)
                wanted = self._at_least(opened.size, size, name)
                frozen = opened.freeze()
                wanted = max(frozen.size, wanted if size else 0)
                return mapper.publish_snapshot(reservation, opened.record, frozen.layer, wanted, request).record

    def clone(
        self,
        name: str,
        clone: str,
        *,
        size: int | None = None,
        attributes: Attributes | None = None,
        request: RequestId | None = None,
    ) -> Made:
        """A writable volume that begins as a copy of a snapshot, or of a volume as it is now.

        Unless ``attributes`` say otherwise, it belongs to whom the source belongs to.
        """
        return self._make("cloned", clone, request, lambda: self._clone(name, clone, size, attributes, request))

    def _clone(
        self, name: str, clone: str, size: int | None, attributes: Attributes | None, request: RequestId | None
    ) -> VolumeRecord:
        found = self.find(name)
        self._refuse_taken(clone)
        record = found.record
        attributes = attributes or Attributes(0o600, record.uid, record.gid)
        wanted = self._at_least(record.size, size, name)
        found.mapper.check_fits(wanted)
        if record.writable:
            with self._owning(found) as opened:
                frozen = opened.freeze()
                record = msgspec.structs.replace(opened.record, layer=frozen.layer, size=frozen.size)
                return found.mapper.clone(record, clone, max(wanted, frozen.size), attributes, request).record
        return found.mapper.clone(record, clone, wanted, attributes, request).record

    def _make(self, event: str, name: str, request: RequestId | None, make: Callable[[], VolumeRecord]) -> Made:
        """Make what will be called ``name``, or return it if the same request made it when it came first."""
        started = time.perf_counter()
        try:
            record = make()
        except AlreadyExists:
            done = self._done_before(name, request)
            if done is None:
                raise
            record = done
        seconds = time.perf_counter() - started
        log.info(event, volume=record.name, kind=record.kind.value, size=record.size, seconds=round(seconds, 6))
        return Made(record, seconds)

    def _done_before(self, name: str, request: RequestId | None) -> VolumeRecord | None:
        """The volume called ``name``, if it was this very request that made it or called it so."""
        if request is None:
            return None
        found = self._find_or_none(name)
        return found.record if found is not None and found.record.request == request else None

    # Changing

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
            record = found.mapper.change(volume, edit).record
            self._refresh(opened)
        return self._as_open(record)

    # Sealing

    def seal(
        self,
        name: str,
        *,
        live: bool = False,
        threads: int = SEAL_THREADS,
        progress: Progress = unheeded,
        waited_for: bool = True,
    ) -> SealedVolume:
        """Give a snapshot's layer a map, and all below it; of a volume, what lies below its head.

        ``live``: what a volume holds now is frozen first, so that all of it is sealed. Returns when nothing is left to
        do. Raises what ``progress`` raises, and ``NotFound`` if it is removed meanwhile; what was done so far is found
        again by the next who seals it. ``waited_for``: somebody waits for it; ``seals_waited_for`` counts those.
        """
        with self._table.changed:
            self.seals_waited_for += waited_for
        try:
            return self._seal(self.find(name), live, threads, progress)
        finally:
            with self._table.changed:
                self.seals_waited_for -= waited_for

    def _seal(self, found: Found, live: bool, threads: int, progress: Progress) -> SealedVolume:
        try:
            return self._seal_found(found, live, threads, progress)
        except ObjectMissing:
            self._refuse_moved(found)  # then its layers may be gone, and nothing is wrong with the store
            raise

    def _seal_found(self, found: Found, live: bool, threads: int, progress: Progress) -> SealedVolume:
        target = self._frozen_layer(found, live)
        if target is None:
            return SealedVolume(0, 0, 0)
        advance = Advance(self._heeding_the_end(progress), bytes_to_seal(found.mapper, target))
        sealed = [
            self._seal_layer(found.mapper, layer, threads, advance)
            for layer in layers_to_seal(found.mapper.catalog, target)
        ]
        return SealedVolume(len(sealed), advance.read_bytes, sum(each.added_bytes for each in sealed))

    def import_sealed(
        self,
        name: str,
        size: int,
        reader: Reader,
        *,
        about_bytes: int,
        backend: str | None = None,
        attributes: Attributes | None = None,
        threads: int = SEAL_THREADS,
        progress: Progress = unheeded,
        request: RequestId | None = None,
    ) -> Imported:
        """A volume that holds what ``reader`` shows, which goes straight to packs: a head over a sealed layer.

        ``about_bytes``: how much there is to read. What was stored before an error is found again by the next import.
        """
        sealed: Sealed | None = None

        def make() -> VolumeRecord:
            nonlocal sealed
            self._refuse_taken(name)
            mapper = self.mapper(backend)
            mapper.check_fits(size)
            advance = Advance(self._heeding_the_end(progress), about_bytes)
            with (
                mapper.reserve(name) as reservation,
                import_layer(mapper, self._sealed[mapper.backend], reader, size, threads, advance) as layer,
            ):
                sealed = layer.sealed
                return mapper.publish_over(reservation, layer.id, size, attributes or Attributes(), request).record

        made = self._make("imported", name, request, make)
        return Imported(made, sealed.data_bytes if sealed else 0, sealed.added_bytes if sealed else 0)

    def end_seals(self) -> None:
        """Have those under way, and imports, end soon, with an error: this process is to end. What they have stored is
        found again."""
        self._seals_end = True

    def _heeding_the_end(self, progress: Progress) -> Progress:
        def heed(done: int, total: int) -> None:
            progress(done, total)
            if self._seals_end:
                raise ArchipError("sealing was cut short, since the daemon ends; seal again to go on with it")

        return heed

    def _frozen_layer(self, found: Found, live: bool) -> LayerId | None:
        """The uppermost layer of the volume that does not change any more, durable."""
        if not found.record.writable:
            return found.record.layer
        with self._owning(found) as opened:
            if live and not opened.head_is_empty():
                return opened.freeze().layer
            return opened.frozen_below()

    def _seal_layer(self, mapper: Mapper, layer: LayerId, threads: int, advance: Advance) -> Sealed:
        started = time.perf_counter()
        record = seal_layer(mapper, self._sealed[mapper.backend], layer, threads=threads, advance=advance)
        assert record.sealed is not None
        self._reclaim_wanted = True
        self._go_over(mapper, record)
        seconds = round(time.perf_counter() - started, 3)
        log.info("sealed", layer=layer, data=record.sealed.data_bytes, added=record.sealed.added_bytes, seconds=seconds)
        return record.sealed

    def _go_over(self, mapper: Mapper, sealed: LayerRecord) -> None:
        """Have all that is open here read the sealed layer, then delete the objects that it was before.

        A volume that is just being opened has its ``control`` held until it is; whoever opens it later finds the layer
        sealed, or objects missing, and looks again.
        """
        with self._table.changed:
            opened_all = list(self._table.volumes.values())
        failed: ArchipError | None = None
        for opened in opened_all:
            if opened.mapper is mapper:
                try:
                    opened.rebase(sealed)
                except ArchipError as error:
                    # It goes on with the objects that it has open. The layer is sealed: nobody comes by again for the
                    # others.
                    log.error("reads on what was sealed until it is closed", volume=opened.id, error=str(error))
                    failed = failed or error
        if failed is not None:
            raise failed
        self._live[mapper.backend].forget(sealed.id)
        delete_objects(mapper.blocker, sealed.id)

    # Locks

    def lock(self, name: str) -> LockRecord:
        found = self.find(name)
        return found.mapper.locks.take(found.record.id, Hold.LOCKED, called=name)

    def unlock(self, name: str, *, force: bool = False) -> None:
        """``force`` breaks the lock of whoever has it: that one writes no more. Ours is given back, not broken."""
        found = self.find(name)
        lock = found.mapper.locks.holder(found.record.id)
        if force and lock is not None and not found.mapper.locks.is_ours(lock):
            found.mapper.locks.break_(found.record.id)
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

    def verify_leases(self) -> list[VolumeId]:
        """Fence the volumes whose locks were broken; which ones that is true of now."""
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

    # The whole

    def recover(self) -> None:
        """Finish what a crash cut short: purge removed volumes, delete layers that nothing leads to.

        What cannot be done now, as in a store that is full or damaged somewhere, is logged and left for the next time.
        May run beside everything else; what is open stays so.
        """
        for mapper in self._mappers.values():
            self._live[mapper.backend].adopt(functools.partial(_is_layer_of, mapper))
            live = self._live[mapper.backend].layers()  # first: a layer's record is there before its live bitmap
            for record in mapper.removed():
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
        if opened is not None:
            self._removed_while_open(mapper, opened)
            return
        if record.id in self._table.awaited:
            return

        def purge() -> None:
            if record.writable:
                mapper.locks.take(record.id, Hold.IO, called=f"the removed volume {record.id}")
            mapper.purge(record)

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

    def _removed_while_open(self, mapper: Mapper, opened: OpenVolume) -> None:
        """Nobody opens a volume without a name; but who has it open from before it was removed, goes on using it."""
        try:
            with opened.control:
                if opened.started:
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
            in_use = self.is_open(record.id) or record.id in self._table.awaited
            if record.writable and (record.layer in live or record.id in held) and not in_use:
                try:
                    with self.using(found) as opened:
                        log.info("recovered", volume=record.name, size=opened.size)
                except ArchipError as error:
                    log.error("not recovered", volume=record.name, error=str(error))

    def reclaim(self) -> None:
        """Delete the layers that removed volumes have left; does nothing when none was removed."""
        with self._reclaim_mutex:
            if not self._reclaim_wanted:
                return
            self._reclaim_wanted = False
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
        if freed.layers:
            log.info("reclaimed", layers=freed.layers, freed=format_size(freed.stored_bytes))
        return True

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

    def mapper(self, backend: str | None = None) -> Mapper:
        """Raises ``NotFound`` for a backend that is not configured."""
        name = backend or self._default_backend
        if name not in self._mappers:
            raise NotFound(f"no backend is called {name}; see `archip backend-list`")
        return self._mappers[name]

    # Helpers

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

    def _refuse_empty(self, opened: OpenVolume) -> None:
        if opened.size == 0:
            raise InvalidInput(
                f"{opened.name} has no size yet, there is nothing to take a snapshot of; resize it first"
            )

    def _refuse_moved(self, found: Found) -> None:
        """Raises ``NotFound`` if the name leads to the volume no more."""
        now = found.mapper.find(str(found.record.name))
        if now is None or now.record.id != found.record.id:
            raise NotFound(f"{found.record.name} has just been removed or renamed; see `archip volume-list`")

    def _refuse_held(self, found: Found, doing: str) -> None:
        lock = found.mapper.locks.holder(found.record.id)
        if lock is not None and any(hold is not Hold.IO for hold in lock.holds):
            command = "volume-close" if Hold.OPENED in lock.holds else "volume-unlock"
            name = found.record.name
            raise Busy(f"{name} is held by {lock.host}; `archip {command} {name}` before you {doing} it")

    def _at_least(self, least: int, size: int | None, name: str) -> int:
        if size is None:
            return least
        if size < least:
            raise InvalidSize(
                f"size {format_size(size)} is smaller than {name}, which has {format_size(least)}; give at least that"
            )
        return size

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


def _is_layer_of(mapper: Mapper, layer: LayerId) -> bool:
    return mapper.catalog.get(LayerRecord, layer) is not None


def _kept_name(name: str) -> str:
    """What a rollback calls the snapshot of what it leaves: as much of the volume's name as there is room for."""
    suffix = f"@before-rollback-{time.strftime('%Y%m%d-%H%M%S')}"
    room = NAME_BYTES_MAX - len(suffix) - len("-9999")
    return name.encode()[:room].decode(errors="ignore") + suffix
