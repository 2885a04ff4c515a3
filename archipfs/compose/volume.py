"""A volume that somebody has open in this process: its engine, its lock, and the record we know of it.

Lock order: ``OpenVolume.control``, then ``Composer``'s table, then whatever the mapper and the engine have inside.
Reads, writes and flushes take neither of the two.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from archipfs.compose.control import Control
from archipfs.compose.engine import EngineLayer, EngineVolume
from archipfs.compose.layers import LiveBitmaps, open_durable_chain, open_live_chain, open_live_layer
from archipfs.compose.reader import FreshReader
from archipfs.compose.sealed import SealedStore
from archipfs.errors import (
    ArchipError,
    Fenced,
    LockHeld,
    NotFound,
    ObjectMissing,
    ReadOnlyVolume,
    ShutOut,
    StoreError,
    StoreUnavailable,
)
from archipfs.map.mapper import Mapper
from archipfs.map.records import Hold, Kind, LayerRecord, LockRecord, VolumeRecord
from archipfs.types import VOLUME_BYTES_MAX, LayerId, RequestId, VolumeId

STORE_RETRY_SECONDS = 1.0
SHUT_OUT_TRIES = 8
"""How many times in turn we may be shut out during one read or write."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a snapshot or a clone is made from."""

    layer: LayerId
    size: int


class EngineUser(Protocol):
    """An endpoint whose C code calls engines past us. Told when it may begin to and when it must have ended."""

    def engine_opened(self, volume: VolumeId, engine: EngineVolume, size_max: int) -> None:
        """The volume is served by this engine now, and may grow to ``size_max`` bytes. Must not raise."""

    def engine_closing(self, volume: VolumeId) -> None:
        """Return when nobody is in a call of its engine any more, nor will be. Must not raise."""


@dataclass(frozen=True, slots=True)
class Home:
    """The backend that a volume lies in, and what this node has for it."""

    mapper: Mapper
    live: LiveBitmaps
    sealed: SealedStore


class OpenVolume:
    """Counted by the composer, which starts it for the first user and stops it after the last."""

    def __init__(self, home: Home, volume: VolumeId, engine_users: Sequence[EngineUser] = ()) -> None:
        self.id = volume
        self._home = home
        self.uses = 0
        self.opened_ns = time.time_ns()
        self.control = Control()
        """Held by whoever changes what the volume is made of: start, stop, snapshot, resize, commit."""
        self._engine_users = engine_users
        self._record: VolumeRecord | None = None
        self._engine: EngineVolume | None = None
        self._lease: LockRecord | None = None
        self._lock_version: int | None = None
        """At which the lock's record was seen to be as we left it."""
        self._replica: VolumeRecord | None = None
        """As it was when it was opened, if it was a replica."""
        self._base: LayerId | None = None
        """The sealed layer at the bottom of the engine's chain, as far as we had it go over to one."""
        self._fresh = FreshReader(self._fresh_engine)
        self._found_missing: Sequence[object] = ()
        """What a mere reader went by when an object was missing."""
        self._guard_mutex = threading.Lock()
        self._fenced = False
        self._may_be_cut = True
        """Whether the head's data object may have been cut, by a shrink or when it was opened, and that not flushed."""

    # Starting and stopping, by the composer, under ``control``

    @property
    def started(self) -> bool:
        return self._record is not None

    def start(self) -> None:
        """Open the layers; of a writable volume as its owner, or as a mere reader if another node has the lock.

        Raises ``NotFound`` for a volume that has no name any more.
        """
        if self.mapper.catalog.volume(self.id).record.name is None:
            raise NotFound(f"the volume {self.id} has been removed; see `archip volume-list`")
        self._start()

    def _start(self) -> None:
        record = self.mapper.catalog.volume(self.id).record
        if record.writable:
            self._record = record
            try:
                self.own()
            except LockHeld:
                return
            except BaseException:
                self._record = None
                raise
        else:
            engine = self._durable_engine(record)
            self._record = record
            self._begin(engine)

    def start_again(self, generation: int) -> None:
        """As ``start``, for those who had it open when the process before us died, under the lock of ``generation``.

        A removed volume too. Raises ``NotFound`` for one that is gone.

        The lock may have been given back since, in order, by who used the volume in this process; the generation says
        whether another node had it after that.
        """
        if generation:
            record = self.mapper.catalog.volume(self.id).record
            lock = self.mapper.locks.get(self.id)
            foreign = lock is not None and lock.node is not None and not self.mapper.locks.is_ours(lock)
            if lock is None or foreign or lock.generation != generation:
                self._record, self._fenced = record, True
                return
        self._start()
        if generation and self.generation not in (generation, generation + 1):
            self._fenced = True  # another node had it, or has it, since we looked
            if self._engine is not None:
                self._fence(self._engine)

    def own(self) -> None:
        """Take the volume's lock and open it for writing. Raises ``LockHeld`` if another node has it."""
        with self.control:
            if self._fenced:
                raise self._fenced_error()
            if self._engine is not None:
                return
            # A lock that a crash left is kept when opening fails: the live bitmap beside it has all that is known.
            was_ours = self.mapper.locks.holds(self.id, Hold.IO)
            lease = self.mapper.locks.take(self.id, Hold.IO, called=self.name)
            try:
                # Only now is the record ours alone to change.
                before = self.mapper.catalog.volume(self.id).record
                if before.moved_to is not None:
                    raise self._moved_error()
                if before.replica_of is not None:
                    # Before anything is read: whoever copies to it does so only as long as it is a replica.
                    self.mapper.change(self.id, _of_its_own)
                if lease.broken:
                    lease = self._put_head_on_broken(lease)
                record = self.mapper.catalog.volume(self.id).record
                with self._open_chain(lease, record.layer, record.visible) as layers:
                    size = max(record.size, _live_size(layers))
                    engine = EngineVolume(layers, size, writable=True)
            except BaseException:
                if not was_ours:
                    self.mapper.locks.give_back(self.id, Hold.IO, called=self.name)
                raise
            self._record, self._lease, self._lock_version = record, lease, None
            self._replica = before if before.replica_of is not None else None
            self._may_be_cut = True
            self._begin(engine)
            self._renew_guard()

    def _put_head_on_broken(self, lease: LockRecord) -> LockRecord:
        """Put an empty head on top of the one that a former owner may still write to, whose lock was broken.

        What arrives late can then be seen, as long as nothing newer was written there, but overwrites nothing.
        """
        record = self.mapper.catalog.volume(self.id).record
        # The old head goes on showing as much of its parent as the volume did, and the new one no more than its size.
        self.mapper.limit_parent(record.layer, record.visible)
        with self.mapper.new_layer(record.layer, record.size) as head:
            fields = {"layer": head.id, "visible": VOLUME_BYTES_MAX}
            self.mapper.change(self.id, lambda now: _with_head(now, record.layer, **fields))
        return self.mapper.locks.mended(lease)

    def stop(self) -> None:
        """Make everything durable, close the layers, give the lock back, and purge the volume if it was removed.

        When that fails, the live bitmap and the lock stay as a crash would leave them, for the next to open it.
        """
        engine, lease = self._engine, self._lease
        self._end()
        try:
            if engine is not None and lease is not None and self.record.name is not None:
                self._stop_writing(engine, lease)
            elif engine is not None:
                engine.close(clean=False)
            if self.record.name is None:
                self._purge()
        finally:
            self._engine, self._lease, self._record, self._fenced = None, None, None, False

    def _purge(self) -> None:
        """Delete the removed volume, unless another node has it open: then that one does so when it closes it."""
        record = self.record
        if record.writable:
            try:
                self.mapper.locks.take(self.id, Hold.IO, called=self.name)
            except LockHeld:
                return
        self.mapper.purge(record)
        self._home.live.forget(record.layer)

    def _stop_writing(self, engine: EngineVolume, lease: LockRecord) -> None:
        clean = False
        try:
            self._flush(engine, lease)
            self._commit(self.record, engine.size)
            self._be_replica_again()
            clean = True
        finally:
            engine.close(clean=clean)
        self.mapper.locks.give_back(self.id, Hold.IO, called=self.name)

    def _be_replica_again(self) -> None:
        """Nobody has written to it: it still holds what its original did."""
        was, now = self._replica, self.record
        if was is not None and (was.layer, was.size) == (now.layer, now.size) and self.head_is_empty():
            self._change(replica_of=was.replica_of)

    def abandon(self) -> None:
        """Let go of everything as a crash of the process would. For tests, and for a process that must end."""
        self._end()
        if self._engine is not None:
            self._engine.close(clean=False)
        self._engine, self._lease, self._record = None, None, None

    def _begin(self, engine: EngineVolume) -> None:
        self._engine = engine
        for user in self._engine_users:
            user.engine_opened(self.id, engine, self.mapper.blocker.data_bytes_max)

    def _end(self) -> None:
        if self._engine is not None:
            for user in self._engine_users:
                user.engine_closing(self.id)

    # What it is

    @property
    def mapper(self) -> Mapper:
        """Of the backend that it lies in: another one once it was moved, which happens under ``control``."""
        return self._home.mapper

    @property
    def record(self) -> VolumeRecord:
        """The record as last read or written by us."""
        if self._record is None:
            raise NotFound(f"the volume {self.id} is not open; this is a bug, please report it")
        return self._record

    @record.setter
    def record(self, record: VolumeRecord) -> None:
        self._record = record

    @property
    def name(self) -> str:
        return self.record.name or f"the removed volume {self.id}"

    @property
    def generation(self) -> int:
        """Of the lock we hold, 0 if we hold none."""
        return self._lease.generation if self._lease is not None else 0

    @property
    def fenced(self) -> bool:
        """Whether our lock was broken: who has the volume open gets errors until everybody has closed it."""
        return self._fenced

    @property
    def owned(self) -> bool:
        """Whether we hold the lock, so that what we read may be cached."""
        return self._lease is not None or not self.record.writable

    def present_record(self) -> VolumeRecord | None:
        """The record with the size and time that writes not committed yet have given it; ``None`` if not ours.

        May be called at any time, also while another thread starts or stops the volume.
        """
        engine, record = self._engine, self._record
        if record is None or engine is None:
            return None
        return msgspec.structs.replace(record, size=engine.size, mtime_ns=max(engine.changed_ns, record.mtime_ns))

    @property
    def size(self) -> int:
        return self._engine.size if self._engine is not None else self.record.size

    @property
    def mtime_ns(self) -> int:
        changed_ns = self._engine.changed_ns if self._engine is not None else 0
        return max(changed_ns, self.record.mtime_ns)

    def forget_write_time(self) -> None:
        """The record's time of change is set by somebody: earlier writes do not count any more."""
        if self._engine is not None:
            self._engine.forget_change()

    @property
    def engine(self) -> EngineVolume:
        """Raises ``ReadOnlyVolume`` for a snapshot, ``LockHeld`` if another node has the lock."""
        if not self.record.writable:
            raise ReadOnlyVolume(f"{self.name} is a snapshot and does not change; clone it to write")
        if self._engine is None:
            self.own()
        assert self._engine is not None
        return self._engine

    # Bytes

    def read_nowait(self, offset: int, length: int) -> bytes | None:
        """As ``read``, but ``None`` where that would have to wait."""
        if self._engine is None or self._fenced:
            return None
        try:
            return self._engine.read_nowait(offset, length)
        except (ObjectMissing, ShutOut):
            return None

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes, fewer only at the end. A volume that another node writes is read as flushed there."""

        def read() -> bytes:
            with self.reading() as engine:
                return engine.read(offset, length)

        return self._with_what_is_there(read)

    def _with_what_is_there(self, action: Callable[[], T]) -> T:
        """Do it; again, if an object was missing, with what took its place."""
        while True:
            try:
                return self._once_inside(action)
            except ObjectMissing:
                if not self._is_read_otherwise():
                    raise

    def _once_inside(self, action: Callable[[], T]) -> T:
        """Do it; again, if the store has shut us out, once we are back. What was opened under a claim waits by itself,
        packs do not."""
        for _ in range(SHUT_OUT_TRIES):
            try:
                return action()
            except ShutOut:
                if self._fenced:
                    raise
                self.mapper.locks.get(self.id)  # waits as long as any call may
        return action()

    def _is_read_otherwise(self) -> bool:
        """After an object was found to be missing: whether that is because others have sealed or changed the volume,
        and it is to be read once more."""
        if self._engine is not None:
            return self.go_over_to_seal()
        # It was opened for this read, by records that are old by now: then another opening finds others.
        known, self._found_missing = self._found_missing, self._read_by()
        return known != self._found_missing

    def _read_by(self) -> Sequence[object]:
        """What says which objects it is read from."""
        record = self.mapper.catalog.volume(self.id).record
        return [record.layer, *((layer.id, layer.sealed) for layer in self.mapper.catalog.chain(record.layer))]

    @contextmanager
    def reading(self) -> Iterator[EngineVolume]:
        """The engine to read it by, within the block. Raises ``Fenced`` once our lock was broken."""
        if self._fenced:
            raise self._fenced_error()
        if self._engine is not None:
            yield self._engine
            return
        with self._fresh.engine() as engine:
            yield engine

    @contextmanager
    def reading_frozen(self) -> Iterator[EngineVolume]:
        """An engine, within the block, over what the volume holds now, which nobody writes to.

        A writable volume is frozen for that, as for a clone, if it was written since the last snapshot. Raises
        ``LockHeld`` if another node writes it.
        """
        if not self.record.writable:
            with self.reading() as engine:
                yield engine
            return
        frozen = self.freeze_if_written()
        # What the layers show is theirs to say: freezing has written down how far the head showed its parent.
        record = msgspec.structs.replace(self.record, layer=frozen.layer, size=frozen.size, visible=VOLUME_BYTES_MAX)
        engine = self._durable_engine(record)
        try:
            yield engine
        finally:
            engine.close(clean=False)

    def freeze_if_written(self) -> Frozen:
        """As ``freeze``, but without a new layer where nothing was written since the last snapshot."""
        with self.control:
            engine, below = self.engine, self.mapper.catalog.layer(self.record.layer).record.reads_parent
            size = engine.size
            if below is not None and engine.parent_visible >= size and self.head_is_empty():
                return Frozen(below, size)
            return self.freeze()

    def write(self, offset: int, data: bytes | memoryview) -> int:
        return self._with_what_is_there(lambda: self.engine.write(offset, data))

    def discard(self, offset: int, length: int) -> None:
        self.engine.discard(offset, length)

    def write_zeros(self, offset: int, length: int) -> None:
        self.engine.write_zeros(offset, length)

    def flush(self) -> None:
        """Make all that returned before durable, the size too. Raises ``Fenced`` once our lock was broken."""
        if self._fenced:
            raise self._fenced_error()
        engine, lease = self._engine, self._lease
        if engine is None or lease is None:
            return
        self._flush(engine, lease)
        if engine.size != self.record.size:
            with self.control:
                self._commit(self.record, engine.size)

    # Control

    def freeze(self) -> Frozen:
        """Put an empty head on top of the present one and make the latter durable: it changes no more.

        The steps are those of docs/architecture.md, "Snapshot".
        """
        with self.control:
            engine, lease, record = self.engine, self._owned_lease(), self.record
            # What a shrink cut off the head must be gone for good before the head becomes a parent, which is not cut
            # when it is opened. Otherwise it is flushed once nobody writes to it any more, who would have to wait.
            if self._may_be_cut:
                self._flush(engine, lease)
                self._may_be_cut = False
            self._verify(engine, lease)
            # The head may show less of its parent than is recorded: nothing beyond the size that it was opened with.
            self.mapper.limit_parent(record.layer, min(record.visible, engine.parent_visible))
            with self.mapper.new_layer(record.layer, VOLUME_BYTES_MAX) as head:
                layer = self._open_head(lease, head)
                try:
                    self._change_surely(engine, layer=head.id, visible=VOLUME_BYTES_MAX, mtime_ns=self.mtime_ns)
                    size = engine.swap_head(layer)
                finally:
                    layer.close()
                engine.flush_parents()
            if size > self.record.size:
                self._commit(self.record, size)
            return Frozen(record.layer, size)

    def resize(self, size: int) -> None:
        """Make it ``size`` bytes large. What a shrink cuts off reads as zeros if it grows again."""
        with self.control:
            engine, lease = self.engine, self._owned_lease()
            # What a shrink cut off may still be in the store. Once a larger size is committed, it could be seen.
            self._flush(engine, lease)
            if engine.size != self.record.size:
                self._commit(self.record, engine.size)
            engine.pause()
            try:
                shrinks = size < engine.size
                if shrinks:
                    self._may_be_cut = True
                    engine.announce_size(size)
                visible = min(self.record.visible, size) if shrinks else self._visible(engine, size)
                self._change_size(engine, size, visible)
                engine.resize(size)
            finally:
                engine.resume()

    def _change_size(self, engine: EngineVolume, size: int, visible: int) -> None:
        """Commit a new size. A store that failed at it is asked whether it happened all the same."""
        try:
            self._change(size=size, visible=visible, mtime_ns=time.time_ns())
        except Fenced:
            raise
        except ArchipError:
            if not self._changed_after_all(engine, size=size, visible=visible):
                engine.announce_size(engine.size)
                raise

    def _change_surely(self, engine: EngineVolume, **fields: object) -> None:
        """As ``_change``, where engine and record must not part. A store that failed at it is asked whether it happened
        all the same."""
        try:
            self._change(**fields)
        except Fenced:
            raise
        except ArchipError:
            if not self._changed_after_all(engine, **fields):
                raise

    def _changed_after_all(self, engine: EngineVolume, **fields: object) -> bool:
        """Whether the record has these values. If the store does not say, the engine takes no more writes, for nobody
        knows what they would be written to."""
        try:
            found = self._record_at_last()
        except ArchipError:
            engine.fail()
            raise
        if any(getattr(found, name) != value for name, value in fields.items()):
            return False
        self._record = found
        self._renew_guard()
        return True

    def _record_at_last(self) -> VolumeRecord:
        """The record, as soon as the store says it.

        A store that shuts out keeps what it has, and keeps others out, however long it cannot be reached: then we wait,
        as do reads and writes. Any other one may have forgotten what was not durable.
        """
        while True:
            try:
                return self.mapper.catalog.volume(self.id).record
            except (StoreUnavailable, ShutOut):
                if self._fenced or not self.mapper.blocker.shuts_out:
                    raise
            time.sleep(STORE_RETRY_SECONDS)

    def replace_layers(self, layer: LayerId, visible: int, *, request: RequestId | None = None) -> None:
        """Be what ``layer`` holds, as a rollback wants it: on top of it, at its size. Everything was frozen before."""
        with self._paused() as engine:
            self._go_over(engine, layer, visible, request=request)

    def become_clone(self, layer: LayerId, visible: int, origin: VolumeId) -> bool:
        """Be what ``layer`` shows of its parent, as a clone of ``origin``. False if this volume is not empty."""
        with self._paused() as engine:
            if engine.size != 0:
                return False
            self._go_over(engine, layer, visible, kind=Kind.CLONE, origin=origin)
            return True

    def extend(self, offset: int, end: int) -> bool:
        """Show more of the parent, which is shown to ``offset``: to ``end``. False if the volume does not end at
        ``offset``, or the head has something of its own there."""
        with self._paused() as engine:
            if not engine.size == engine.parent_visible == offset or not engine.head_is_clear(offset, end):
                return False
            self._change_surely(engine, visible=end, size=end, mtime_ns=time.time_ns())
            self._follow(engine, lambda: engine.extend(end))
            return True

    def _go_over(self, engine: EngineVolume, layer: LayerId, visible: int, **fields: object) -> None:
        """While paused: have ``layer`` for a head, with so much of its parent, and be that large."""
        now_ns = time.time_ns()
        with self._open_chain(self._owned_lease(), layer, visible) as layers:
            self._change_surely(
                engine, layer=layer, visible=visible, size=visible, mtime_ns=now_ns, ctime_ns=now_ns, **fields
            )
            self._follow(engine, lambda: engine.replace(layers, visible))

    def _follow(self, engine: EngineVolume, action: Callable[[], None]) -> None:
        """Have the engine do what is committed. If it cannot, it must not go on with what it was before."""
        try:
            action()
        except ArchipError:
            engine.fail()
            raise

    @contextmanager
    def _paused(self) -> Iterator[EngineVolume]:
        """Requests wait at the gate within the block, and find what it leaves. What came before is durable."""
        with self.control:
            engine, lease = self.engine, self._owned_lease()
            self._flush(engine, lease)
            engine.pause()
            try:
                yield engine
            finally:
                engine.resume()

    @contextmanager
    def standing_still(self) -> Iterator[EngineVolume]:
        """Requests wait within the block. The layers in the store, and their records, say all of what it holds."""
        with self._paused() as engine:
            engine.flush()  # what came between the flush before the gate was closed, and that
            self.mapper.limit_parent(self.record.layer, min(self.record.visible, engine.parent_visible))
            yield engine

    def go_over(
        self, home: Home, lease: LockRecord, record: VolumeRecord, commit: Callable[[], VolumeRecord]
    ) -> VolumeRecord:
        """While it stands still: be ``record``, which lies in another backend under our lock there, from ``commit`` on.

        Returns what that returns. If it raises, the volume stays where it is.
        """
        engine = self.engine

        def open_chain(chain: Sequence[LayerRecord]) -> list[EngineLayer]:
            return open_live_chain(home.mapper.blocker, home.sealed, home.live, lease, chain, record.visible)

        layers = home.mapper.catalog.with_chain(record.layer, open_chain)
        try:
            try:
                self._verify(engine, self._owned_lease())
                committed = commit()
            except ArchipError:
                if not self._changed_after_all(engine, moved_to=home.mapper.store.id):
                    raise
                committed = self.record
            self._home, self._record, self._lease = home, record, lease
            self._lock_version, self._replica, self._may_be_cut = None, None, True

            def follow() -> None:
                engine.replace(layers, record.size)
                self._verify(engine, lease)
                self._renew_guard()

            self._follow(engine, follow)
            return committed
        finally:
            for layer in layers:
                layer.close()

    def frozen_below(self) -> LayerId | None:
        """The layer right below the head, durable with all below it; ``None`` if the head lies on nothing."""
        with self.control:
            self._flush(self.engine, self._owned_lease())
            return self.mapper.catalog.layer(self.record.layer).record.reads_parent

    def head_is_empty(self) -> bool:
        """Whether nothing was written since the last snapshot."""
        with self._paused() as engine:
            return engine.size == 0 or engine.head_is_clear(0, engine.size)

    def go_over_to_seal(self) -> bool:
        """Read what has been sealed of the volume's layers since they were opened, by whichever node; whether there was
        any."""
        with self.control:
            if self._engine is None or self._fenced:
                return False
            base = self.mapper.catalog.chain(self.record.layer)[-1]
            if base.sealed is None or base.id == self._base:
                return False
            return self.rebase(base)

    def rebase(self, sealed: LayerRecord) -> bool:
        """Read the layer as it is sealed now, if this volume has it open; nobody waits for that."""
        with self.control:
            engine = self._engine
            if engine is None or self._fenced:
                return False
            layer = self._home.sealed.open_layer(sealed)
            try:
                engine.rebase(sealed.id, layer)
            except ObjectMissing:
                return False  # it does not have that layer
            finally:
                layer.close()
            self._base = sealed.id
            return True

    def verify_lease(self) -> None:
        """Fence ourselves, and raise ``Fenced``, if the lock was broken. Does nothing where the store sees to it."""
        engine, lease = self._engine, self._lease
        if engine is not None and lease is not None:
            self._verify(engine, lease)

    def _fresh_engine(self) -> EngineVolume:
        """Over what the store holds now of a volume that another node writes."""
        record = self.mapper.catalog.volume(self.id).record
        if record.moved_to is not None:
            raise self._moved_error()  # what is left here is what it held then
        return self._durable_engine(record)

    def _moved_error(self) -> NotFound:
        return NotFound(f"the volume {self.id} has been moved to another backend; open it again")

    def _durable_engine(self, record: VolumeRecord) -> EngineVolume:
        def open_chain(chain: Sequence[LayerRecord]) -> list[EngineLayer]:
            return open_durable_chain(self.mapper.blocker, self._home.sealed, chain, record.visible)

        layers = self.mapper.catalog.with_chain(record.layer, open_chain)
        try:
            return EngineVolume(layers, record.size, writable=False)
        finally:
            for layer in layers:
                layer.close()

    @contextmanager
    def _open_chain(self, lease: LockRecord, head: LayerId, visible: int) -> Iterator[list[EngineLayer]]:
        """The layers from ``head`` on, to be written. An engine that was given them in the block goes on using them."""

        def open_chain(chain: Sequence[LayerRecord]) -> list[EngineLayer]:
            return open_live_chain(self.mapper.blocker, self._home.sealed, self._home.live, lease, chain, visible)

        layers = self.mapper.catalog.with_chain(head, open_chain)
        try:
            yield layers
        finally:
            for layer in layers:
                layer.close()

    def _open_head(self, lease: LockRecord, head: LayerRecord) -> EngineLayer:
        return open_live_layer(
            self.mapper.blocker, self._home.live, lease, head, visible=head.parent_visible, head=True
        )

    def _owned_lease(self) -> LockRecord:
        """Of whoever changes the volume. Raises ``Fenced`` if it was lost while he waited for ``control``."""
        if self._fenced:
            raise self._fenced_error()
        assert self._lease is not None, "an engine of a writable volume is open only under its lock"
        return self._lease

    def _verify(self, engine: EngineVolume, lease: LockRecord) -> None:
        if self.mapper.blocker.shuts_out:
            return  # the store takes nothing from us once the lock is broken
        try:
            self._lock_version = self.mapper.locks.verify(lease, called=self.name)
        except Fenced:
            self._fence(engine)
            raise
        self._renew_guard()

    def _renew_guard(self) -> None:
        """Tell the engine what its own flushes go by: the lock as last seen to be ours, and the size as recorded.

        After every change of either; in turns, so that the last one leaves what is true.
        """
        with self._guard_mutex:
            engine, record, version = self._engine, self._record, self._lock_version
            if engine is None or record is None:
                return
            if self.mapper.blocker.shuts_out:
                engine.guard(None, record.size)
            elif version is not None and (paths := self.mapper.locks.version_paths(self.id, version)) is not None:
                engine.guard(paths, record.size)

    def _fenced_error(self) -> Fenced:
        return Fenced(f"the lock of {self.name} was broken by another node; close it and open it again")

    def _fence(self, engine: EngineVolume) -> None:
        """Write no more, and read no more either: what we have in memory is not what the volume holds now."""
        self._fenced = True
        engine.fence()
        self.mapper.locks.give_up(self.id)
        engine.resume()  # whoever fences while the gate is closed waits, in the next line, for those at the gate
        self._end()

    def cast_out(self) -> None:
        """As ``_fence``, by somebody who has not got ``control``: who has it finds every call to fail.

        ``settle_cast_out`` has to follow, with ``control``.
        """
        self._fenced = True
        engine = self._engine
        if engine is not None:
            with suppress(ArchipError):  # it is being closed, and that ends now
                engine.fence()
        self.mapper.locks.give_up(self.id)

    def settle_cast_out(self) -> None:
        """Return when nobody is in a call of the engine any more that was cast out."""
        if self._fenced:
            self._end()

    def _flush(self, engine: EngineVolume, lease: LockRecord) -> None:
        try:
            self._verify(engine, lease)
        except Fenced:
            raise
        except StoreError:
            # A store that cannot be read may also have forgotten what was not durable yet.
            engine.fail()
            raise
        engine.flush()

    def _commit(self, record: VolumeRecord, size: int) -> None:
        """Write size and time of last change to the record if they differ."""
        mtime_ns = self.mtime_ns
        if size != record.size or mtime_ns != record.mtime_ns:
            self._change(size=size, mtime_ns=mtime_ns, visible=self._visible(self.engine, size))

    def _visible(self, engine: EngineVolume, size: int) -> int:
        """What ``visible`` must be beside a larger ``size``: the parent may hold what lay beyond the end, written when
        power was lost, and must not show it now that the end moves on."""
        return min(self.record.visible, engine.parent_visible) if size > self.record.size else self.record.visible

    def _change(self, **fields: object) -> None:
        """Replace fields of the record. Raises ``Fenced`` if somebody else gave the volume another head meanwhile, or
        if it was lost while we waited for ``control``: a store that shut us out takes calls again once we are back."""
        if self._fenced:
            raise self._fenced_error()
        head = self.record.layer

        try:
            self._record = self.mapper.change(self.id, lambda record: _with_head(record, head, **fields)).record
        except Fenced:
            if self._engine is not None:
                self._fence(self._engine)
            raise
        self._renew_guard()


def _of_its_own(record: VolumeRecord) -> VolumeRecord:
    return msgspec.structs.replace(record, replica_of=None)


def _with_head(record: VolumeRecord, head: LayerId, **fields: object) -> VolumeRecord:
    """The record with other fields. Raises ``Fenced`` if its head is not ``head``."""
    if record.layer != head or record.moved_to is not None:
        raise Fenced(f"{record.name} was changed by another node after our lock was broken; we write no more")
    return msgspec.structs.replace(record, **fields)


def _live_size(layers: list[EngineLayer]) -> int:
    """The size that the process before us had got to: a head that it was about to put on top does not know it yet."""
    return next((layer.live_size for layer in layers if layer.live_size), 0)
