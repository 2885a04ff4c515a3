"""The mapper of one backend: creates, names, snapshots, clones, renames and removes volumes.

It moves records and makes empty layers; bytes are the composer's. Every operation writes data before map and map
before name, and commits with exactly one record. docs/architecture.md lists each operation's steps with what a crash
after each of them leaves.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec

from archipfs.blockers.contract import Blocker, DataObject
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Conflict,
    Fenced,
    InvalidInput,
    NotFound,
    ObjectMissing,
    TooLarge,
)
from archipfs.map.catalog import STORE_IDENT, Catalog, Versioned
from archipfs.map.chunks import check_compression
from archipfs.map.hashes import content_hash
from archipfs.map.locks import Locks, Node
from archipfs.map.names import check_name
from archipfs.map.reclaim import Reclaimed, delete_layer, reclaim
from archipfs.map.records import Kind, LayerRecord, LockRecord, NameRecord, StoreRecord, VolumeRecord
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX, LayerId, RequestId, VolumeId, new_layer_id, new_volume_id
from archipfs.units import check_size, format_size

LOOK_SECONDS = 10.0
"""How often a node looks whether others have sealed layers that it reads, where what they delete then is gone."""
READERS_GRACE_NS = 60 * 10**9
"""How long what others may still read is kept there, after it was sealed or nothing led to it any more."""
FOREIGN_GRACE_NS = 3600 * 10**9
"""How old a layer made by another node must be before we call it left behind."""

DEFAULT_HASH = "blake3"
DEFAULT_CHUNK_BYTES = 32 << 10
DEFAULT_COMPRESSION = "none"


def data_key(layer: LayerId) -> str:
    return f"layer/{layer}"


def bitmap_key(layer: LayerId) -> str:
    return f"bitmap/{layer}"


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a file on the mount has beside its bytes."""

    mode: int = 0o600
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """A name taken for a volume that has no record yet."""

    name: str
    volume: VolumeId
    version: int


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a store is to keep what is sealed. Fixed when it is made; ``None``: as is usual."""

    hash: str | None = None
    compression: str | None = None
    chunk_bytes: int | None = None
    """How large a chunk is on average."""


AS_USUAL = StoreOptions()


def create_store(blocker: Blocker, options: StoreOptions = AS_USUAL) -> None:
    """Write what the store is. Does nothing if that is there already.

    Raises ``InvalidInput`` for what cannot be, and ``AlreadyExists`` if there is a store that is not as ``options``
    say.
    """
    wanted = _store_record(options)
    catalog = Catalog(blocker)
    found = catalog.store()
    if found is None:
        try:
            catalog.put(wanted, STORE_IDENT, None)
            return
        except Conflict:
            found = catalog.store()
    if found is not None:
        _refuse_other(blocker, options, wanted, found.record)


def _store_record(options: StoreOptions) -> StoreRecord:
    hash_name = content_hash(options.hash or DEFAULT_HASH).name
    compression = check_compression(options.compression or DEFAULT_COMPRESSION)
    chunk_bytes = options.chunk_bytes or DEFAULT_CHUNK_BYTES
    if chunk_bytes not in [SECTOR_BYTES << bits for bits in range(7)]:
        raise InvalidInput(
            f"chunks of {format_size(chunk_bytes)} on average cannot be; give 4K, 8K, 16K, 32K, 64K, 128K or 256K"
        )
    return StoreRecord(new_volume_id(), hash_name, time.time_ns(), compression, chunk_bytes // SECTOR_BYTES)


def _refuse_other(blocker: Blocker, options: StoreOptions, wanted: StoreRecord, found: StoreRecord) -> None:
    pairs = (
        (options.hash, "hash", wanted.hash, found.hash),
        (options.compression, "compression", wanted.compression, found.compression),
        (options.chunk_bytes, "average of sectors a chunk", wanted.chunk_sectors, found.chunk_sectors),
    )
    for option, what, ours, theirs in pairs:
        if option is not None and ours != theirs:
            raise AlreadyExists(
                f"there is a store in {blocker.describe()} already, and its {what} is {theirs}, which does not change; "
                "take it as it is, or choose another place"
            )


class Mapper:
    """Volumes, layers and names of one backend. Thread-safe; callers hold a volume's lock where it says so."""

    def __init__(
        self, backend: str, blocker: Blocker, node: Node, format_bitmap: Callable[[DataObject, LayerId], None]
    ) -> None:
        """Raises ``ObjectMissing`` if there is no store, ``FormatTooNew`` if a later archipfs made it."""
        self.backend = backend
        self.blocker = blocker
        self.catalog = Catalog(blocker)
        self.locks = Locks(blocker, node)
        self.node = node
        self._format_bitmap = format_bitmap
        self._mutex = threading.Lock()
        self._reclaiming = threading.Lock()
        self._pending: set[LayerId] = set()
        self._pending_since_reclaim: set[LayerId] = set()
        """Those, and all that were since the last ``reclaim`` began."""
        self._reserved: set[str] = set()
        self._unused_since: dict[LayerId, int] = {}
        """When ``reclaim`` first found that nothing leads to these."""
        found = self.catalog.store()
        if found is None:
            raise ObjectMissing(
                f"backend {backend}: no store in {blocker.describe()}; make one with `archip backend-create {backend}`"
            )
        self.store = found.record

    # Reading

    def find(self, name: str) -> Versioned[VolumeRecord] | None:
        return self.catalog.resolve(name)

    def volumes(self) -> Iterator[Versioned[VolumeRecord]]:
        return self.catalog.volumes()

    # Names

    @contextmanager
    def reserve(self, name: str, volume: VolumeId | None = None) -> Iterator[Reservation]:
        """Take a name for a volume about to be made, with a new id unless it has one. Raises ``AlreadyExists``.

        Left without ``publish``, the name resolves to nothing and is free again.
        """
        check_name(name)
        with self._mutex:
            if name in self._reserved:
                raise AlreadyExists(f"{name} is just being made by somebody else; choose another name")
            self._reserved.add(name)
        try:
            volume = volume or new_volume_id()
            yield Reservation(name, volume, self._claim(name, volume))
        finally:
            with self._mutex:
                self._reserved.discard(name)

    def publish(self, reservation: Reservation, record: VolumeRecord) -> Versioned[VolumeRecord]:
        """Commit a new volume under the reserved name. Raises ``AlreadyExists`` if another node took it meanwhile."""
        made = self.catalog.put_volume(record, None)
        if not self._keeps_name(reservation):
            self.withdraw(made)
            raise AlreadyExists(f"{reservation.name} was just made by somebody else; choose another name")
        return made

    def _keeps_name(self, reservation: Reservation) -> bool:
        """Whether the name is ours after all, now that its volume is published.

        While nobody touched the entry, whoever does so later sees the volume (``_take_over``). Else the next change of
        the entry decides, his or ours.
        """
        while True:
            entry = self.catalog.name(reservation.name)
            if entry is None or entry.record.volume != reservation.volume:
                return False
            if entry.version == reservation.version:
                return True
            try:
                self.catalog.put_name(entry.record, entry.version)
            except Conflict:
                continue
            return True

    def withdraw(self, made: Versioned[VolumeRecord]) -> None:
        """Take back what ``publish`` has made, unless it was changed since."""
        with suppress(Conflict):  # then it is being removed already
            self.catalog.delete(VolumeRecord, made.record.id, made.version)

    def _take_over(self, entry: Versioned[NameRecord], record: NameRecord) -> Versioned[NameRecord]:
        """Replace the entry of a name by ``record``. Raises ``Conflict`` if that has to be decided anew.

        The entry may be that of a volume which is just being made, or renamed to it, by somebody else. Either he or we
        must fail, so: a volume being made is published after we touched the entry, and then its maker sees that, or
        before, and then we see the volume; a volume being renamed has its record touched, so that it cannot commit.
        """
        name, pending = entry.record.name, entry.record.volume
        touched = self.catalog.put_name(entry.record, entry.version)
        found = self.catalog.get(VolumeRecord, pending)
        if found is not None and found.record.name == name and record.replaced != pending:
            raise Conflict(f"{name} was just taken by another volume; look again")
        if found is not None and found.record.name is not None and pending not in (record.volume, record.replaced):
            self.catalog.put_volume(found.record, found.version)
        return self.catalog.put_name(record, touched.version)

    def _claim(self, name: str, volume: VolumeId) -> int:
        record = NameRecord(name, volume)
        while True:
            entry = self.catalog.name(name)
            if entry is not None and self.catalog.resolve_entry(entry.record) is not None:
                raise AlreadyExists(f"{name} exists already; choose another name or remove it first")
            try:
                return self._point(entry, record)
            except Conflict:
                continue

    def _point(self, entry: Versioned[NameRecord] | None, record: NameRecord) -> int:
        if entry is None:
            return self.catalog.put_name(record, None).version
        return self._take_over(entry, record).version

    def _drop_name(self, name: str, volume: VolumeId) -> None:
        """Delete the name's entry if it still speaks of ``volume``, which is not called so any more."""
        entry = self.catalog.name(name)
        if entry is not None and entry.record.volume == volume:
            try:
                self.catalog.delete_name(name, entry.version)
            except Conflict:
                return  # somebody took the free name over

    # Layers

    @contextmanager
    def new_layer(self, parent: LayerId | None, parent_visible: int) -> Iterator[LayerRecord]:
        """An empty layer, durable. Until the end of the block it counts as used although no record names it yet."""
        with self._pending_layer(parent, parent_visible) as record:
            try:
                self._make_layer(record)
            except ArchipError:
                with suppress(ArchipError):  # else it is left behind, as by a crash
                    delete_layer(self.catalog, self.blocker, record.id)
                raise
            yield record

    @contextmanager
    def bare_layer(self, original: LayerId | None = None) -> Iterator[LayerRecord]:
        """As ``new_layer``, but it has no objects, since it is about to be sealed with what is in packs already.

        ``original``: the layer of another store that it is a copy of.
        """
        with self._pending_layer(None, 0, original) as record:
            self.catalog.put(record, record.id, None)
            yield record

    @contextmanager
    def _pending_layer(
        self, parent: LayerId | None, parent_visible: int, original: LayerId | None = None
    ) -> Iterator[LayerRecord]:
        record = LayerRecord(new_layer_id(), parent, parent_visible, self.node.id, time.time_ns(), original=original)
        with self._mutex:
            self._pending.add(record.id)
            self._pending_since_reclaim.add(record.id)
        try:
            yield record
        finally:
            with self._mutex:
                self._pending.discard(record.id)

    def _make_layer(self, record: LayerRecord) -> None:
        # The record comes first: whatever objects there are, a record leads to them.
        self.catalog.put(record, record.id, None)
        self.blocker.create_data(data_key(record.id)).close()
        bitmap = self.blocker.create_data(bitmap_key(record.id))
        try:
            self._format_bitmap(bitmap, record.id)
        finally:
            bitmap.close()

    def layers_open_elsewhere(self) -> set[LayerId]:
        """Those under volumes whose locks other nodes have. Chains with a layer missing end there."""
        layers: set[LayerId] = set()
        for volume in self.locks.held_elsewhere():
            found = self.catalog.get(VolumeRecord, volume)
            if found is not None:
                with suppress(ObjectMissing):
                    layers.update(layer.id for layer in self.catalog.chain(found.record.layer))
        return layers

    def limit_parent(self, layer: LayerId, parent_visible: int) -> None:
        """Have at most ``parent_visible`` bytes of the parent shine through, for good."""
        while True:
            found = self.catalog.layer(layer)
            if found.record.parent is None or found.record.parent_visible <= parent_visible:
                return
            try:
                self.catalog.put(
                    msgspec.structs.replace(found.record, parent_visible=parent_visible), layer, found.version
                )
                return
            except Conflict:
                continue

    def check_fits(self, size: int) -> int:
        """``size`` if a volume may be that large here. Raises ``InvalidSize`` or ``TooLarge``."""
        check_size(size)
        if size > self.blocker.data_bytes_max:
            raise TooLarge(
                f"size {format_size(size)} is more than backend {self.backend} can keep in one volume; "
                f"{format_size(self.blocker.data_bytes_max)} is the most"
            )
        return size

    # Volumes

    def create(
        self, name: str, size: int, attributes: Attributes, request: RequestId | None = None
    ) -> Versioned[VolumeRecord]:
        """A new, empty volume. ``size`` may be 0 here: a file just created has none yet.

        Raises ``InvalidName``, ``InvalidSize``, ``TooLarge``, ``AlreadyExists``.
        """
        check_name(name)
        if size:
            self.check_fits(size)
        with self.reserve(name) as reservation, self.new_layer(None, 0) as layer:
            record = self._fresh(reservation, Kind.VOLUME, size, layer.id, None, attributes, request)
            return self.publish(reservation, record)

    def publish_over(
        self,
        reservation: Reservation,
        layer: LayerId,
        size: int,
        attributes: Attributes,
        request: RequestId | None = None,
    ) -> Versioned[VolumeRecord]:
        """Commit a volume that begins as what ``layer`` holds, which the caller sees to that it is not deleted."""
        with self.new_layer(layer, size) as head:
            return self.publish(
                reservation, self._fresh(reservation, Kind.VOLUME, size, head.id, None, attributes, request)
            )

    def clone(
        self,
        source: VolumeRecord,
        name: str,
        size: int,
        attributes: Attributes,
        request: RequestId | None = None,
    ) -> Versioned[VolumeRecord]:
        """A writable volume on top of the layer of the snapshot ``source``, at least as large as it.

        Raises as ``create`` does, and ``NotFound`` if the source is removed meanwhile.
        """
        with self.reserve(name) as reservation, self.new_layer(source.layer, source.size) as layer:
            # The child exists; from here on, whoever removes the source sees that its layer is in use.
            self.still_there(source)
            record = self._fresh(reservation, Kind.CLONE, size, layer.id, source, attributes, request)
            return self.publish(reservation, record)

    def publish_snapshot(
        self,
        reservation: Reservation,
        source: VolumeRecord,
        layer: LayerId,
        size: int,
        request: RequestId | None = None,
    ) -> Versioned[VolumeRecord]:
        """Commit a snapshot of ``source`` that reads ``layer``, which nobody writes any more."""
        attributes = Attributes(0o444, source.uid, source.gid)
        record = self._fresh(reservation, Kind.SNAPSHOT, size, layer, source, attributes, request)
        return self.publish(reservation, record)

    def publish_again(
        self, reservation: Reservation, source: VolumeRecord, size: int, request: RequestId | None = None
    ) -> Versioned[VolumeRecord]:
        """Commit another snapshot of what the snapshot ``source`` holds. Raises ``NotFound`` if it is removed."""
        made = self.publish_snapshot(reservation, source, source.layer, size, request)
        try:
            # The other one leads to the layer now; whoever removes the source from here on sees that.
            self.still_there(source)
        except NotFound:
            self.withdraw(made)
            raise
        return made

    def change(self, volume: VolumeId, edit: Callable[[VolumeRecord], VolumeRecord]) -> Versioned[VolumeRecord]:
        """Replace the volume's record by ``edit(record)``, again if another node was quicker. Raises ``NotFound``."""
        while True:
            found = self.catalog.volume(volume)
            edited = edit(found.record)
            if edited == found.record:
                return found
            try:
                return self.catalog.put_volume(edited, found.version)
            except Conflict:
                continue

    def rename(
        self, volume: VolumeId, name: str, *, replace: VolumeId | None, request: RequestId | None = None
    ) -> VolumeRecord | None:
        """Call ``volume`` ``name``. Returns ``replace``, nameless now, if that is who had the name.

        Hold the lock of the volume, and of the one that is replaced. Raises ``AlreadyExists``, ``NotFound``, and
        ``Conflict`` if another volume than ``replace`` has the name.
        """
        check_name(name)
        while True:
            old = self.catalog.volume(volume)
            if old.record.name is None:
                raise NotFound(f"the volume {volume} has been removed; see `archip volume-list`")
            if old.record.name == name:
                return None
            self._finish_replacing(old.record.name, volume)
            try:
                displaced = self._point_name(name, volume, replace)
                renamed = msgspec.structs.replace(old.record, name=name, ctime_ns=time.time_ns(), request=request)
                # Not if the record changed since: whoever takes the name over touches it.
                self.catalog.put_volume(renamed, old.version)
                break
            except Conflict:
                if replace is not None:
                    raise
        self._drop_name(old.record.name, volume)
        return None if displaced is None else self._displace(displaced, name)

    def _point_name(self, name: str, volume: VolumeId, replace: VolumeId | None) -> VolumeId | None:
        """Have the name's entry speak of ``volume``, and of the one that has the name until the rename commits."""
        entry = self.catalog.name(name)
        holder = self.catalog.resolve_entry(entry.record) if entry is not None else None
        holder_id = holder.record.id if holder is not None else None
        if holder_id is not None and replace is None:
            raise AlreadyExists(f"{name} exists already; choose another name or remove it first")
        if holder_id not in (None, replace):
            raise Conflict(f"{name} is another volume than it was; look again")
        self._point(entry, NameRecord(name, volume, holder_id))
        return holder_id

    def _displace(self, volume: VolumeId, name: str) -> VolumeRecord | None:
        """Take ``name`` from the volume that was replaced. ``None`` if it is called otherwise by now, or gone."""

        def nameless(record: VolumeRecord) -> VolumeRecord:
            return msgspec.structs.replace(record, name=None) if record.name == name else record

        try:
            record = self.change(volume, nameless).record
        except NotFound:
            return None
        return record if record.name is None else None

    def _finish_replacing(self, name: str, volume: VolumeId) -> None:
        """Before ``volume`` gives up ``name``: whom it took it from, in a rename that a crash cut short, is not to get
        it back."""
        entry = self.catalog.name(name)
        if entry is not None and entry.record.volume == volume and entry.record.replaced is not None:
            self._displace(entry.record.replaced, name)

    def remove(self, volume: VolumeId) -> VolumeRecord:
        """Take the volume's name away: nobody finds it any more. ``purge`` gives its space back. Hold its lock."""
        return self._unname(volume, lambda record: msgspec.structs.replace(record, name=None))

    def leave(self, volume: VolumeId, layer: LayerId, store: str) -> VolumeRecord:
        """As ``remove``, of a volume that lives on in another store, which has what ``layer`` holds. Raises ``Fenced``
        if it has another layer by now."""

        def gone(record: VolumeRecord) -> VolumeRecord:
            if record.layer != layer:
                raise Fenced(f"{record.name} was changed by another node after our lock was broken; it is not moved")
            return msgspec.structs.replace(record, name=None, moved_to=store)

        return self._unname(volume, gone)

    def _unname(self, volume: VolumeId, edit: Callable[[VolumeRecord], VolumeRecord]) -> VolumeRecord:
        name = self.catalog.volume(volume).record.name
        if name is not None:
            self._finish_replacing(name, volume)
        removed = self.change(volume, edit).record
        if name is not None:
            self._drop_name(name, volume)
        return removed

    def purge(self, record: VolumeRecord) -> None:
        """Delete a removed volume that nobody has open. What it was made from stays until ``reclaim``."""
        now = self.catalog.get(VolumeRecord, record.id)
        if now is None or now.record.name != record.name:
            return  # another node has purged it since ``record`` was read
        if now.record.writable:
            delete_layer(self.catalog, self.blocker, now.record.layer)
        # The record goes last: as long as there is one, the volume is found again and purged to the end.
        self.locks.forget(record.id)
        while (found := self.catalog.get(VolumeRecord, record.id)) is not None:
            with suppress(Conflict):
                self.catalog.delete(VolumeRecord, record.id, found.version)

    def removed(self) -> list[VolumeRecord]:
        """Volumes that no name resolves to: removed while open, or by an operation that a crash cut short."""
        claims: dict[str, list[VolumeRecord]] = defaultdict(list)
        nameless = []
        for _, found in self.catalog.list(VolumeRecord, skip_damaged=True):
            if found.record.name is None:
                nameless.append(found.record)
            else:
                claims[found.record.name].append(found.record)
        for name, records in claims.items():
            if len(records) > 1 and (winner := self.catalog.resolve_or_none(name)) is not None:
                nameless += [record for record in records if record.id != winner.record.id]
        return nameless

    def reclaim(self) -> Reclaimed:
        """Delete the layers that nothing leads to.

        Raises ``ObjectDamaged``, ``FormatTooNew`` or ``ObjectMissing``, and deletes nothing, where it cannot know.
        """

        def in_use(layer: LayerRecord) -> bool:
            if layer.node == self.node.id:
                with self._mutex:
                    return layer.id in self._pending_since_reclaim
            return time.time_ns() - layer.created_ns < FOREIGN_GRACE_NS

        # One at a time: the next would have us forget what was pending since this one began.
        with self._reclaiming:
            with self._mutex:
                # A layer may come to be named between our look at the volumes and our look at the layers.
                self._pending_since_reclaim = set(self._pending)
            return reclaim(self.catalog, self.blocker, in_use, self._may_go)

    def _may_go(self, layer: LayerRecord, unused: bool) -> bool:
        """Whether nobody reads the layer's objects any more who has looked at records of late."""
        if self.blocker.keeps_deleted:
            return True
        if not unused and layer.sealed is not None:
            return time.time_ns() - layer.sealed.since_ns >= READERS_GRACE_NS
        if time.monotonic_ns() - self._unused_since.setdefault(layer.id, time.monotonic_ns()) < READERS_GRACE_NS:
            return False
        del self._unused_since[layer.id]
        return True

    def forget_stray_locks(self) -> None:
        """Remove the records of locks whose volumes are gone."""
        locks = list(self.catalog.idents(LockRecord))  # first: a volume is there before its lock
        volumes = set(self.catalog.idents(VolumeRecord)) if locks else set()
        for ident in locks:
            if ident not in volumes:
                self.locks.forget(VolumeId(ident))

    def still_there(self, source: VolumeRecord) -> None:
        """Raises ``NotFound`` if the volume was removed since ``source`` was read."""
        found = self.catalog.get(VolumeRecord, source.id)
        if found is None or found.record.name is None:
            raise NotFound(f"{source.name} has just been removed; see `archip volume-list`")

    def _fresh(
        self,
        reservation: Reservation,
        kind: Kind,
        size: int,
        layer: LayerId,
        origin: VolumeRecord | None,
        attributes: Attributes,
        request: RequestId | None,
    ) -> VolumeRecord:
        now_ns = time.time_ns()
        return VolumeRecord(
            id=reservation.volume,
            name=reservation.name,
            kind=kind,
            size=size,
            layer=layer,
            visible=VOLUME_BYTES_MAX,
            origin=origin.id if origin is not None else None,
            created_ns=now_ns,
            mode=attributes.mode,
            uid=attributes.uid,
            gid=attributes.gid,
            atime_ns=now_ns,
            mtime_ns=origin.mtime_ns if origin is not None else now_ns,
            ctime_ns=now_ns,
            request=request,
        )
