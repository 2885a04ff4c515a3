"""Replicas: what lies in one backend, once more in another. docs/architecture.md, "Replicas and moves".

Layers are copied as they never change once they are frozen: sealed ones as maps, page by page and chunk by chunk
(``archipfs.map.replicate``), where the other store has the same hash; all others are read, cut and hashed as sealing
does it, but into the other store. A copied layer names its original, and so is found again by the next run.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import msgspec
import structlog

from archipfs.compose.diff import Run, differing_in_maps
from archipfs.compose.engine import EngineVolume
from archipfs.compose.layers import is_blank
from archipfs.compose.sealed import SealedStore
from archipfs.compose.sealing import (
    Advance,
    ChainReader,
    Progress,
    map_of,
    mask_bits,
    reading_chain,
    stored_bytes,
    unheeded,
)
from archipfs.compose.seals import SEAL_THREADS, Seals
from archipfs.compose.volumes import Found
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Busy,
    Conflict,
    InvalidInput,
    NotFound,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from archipfs.map.catalog import Versioned
from archipfs.map.chunks import Session, Swept
from archipfs.map.commit import commit_sealed
from archipfs.map.mapper import FOREIGN_GRACE_NS, Mapper
from archipfs.map.records import Hold, LayerRecord, Replica, Sealed, VolumeRecord
from archipfs.map.replicate import copy_map
from archipfs.map.seal import Reader, build_map
from archipfs.types import NAME_BYTES_MAX, VOLUME_BYTES_MAX, LayerId, VolumeId

log = structlog.get_logger()

COPY_THREADS = max(4, SEAL_THREADS)
"""They wait for stores more than they hash."""
ATTEMPTS_MAX = 5
"""How many times in turn a layer may be sealed or reclaimed under us."""
PENDING_NS_MAX = FOREIGN_GRACE_NS // 2
"""How old a layer that nothing leads to may be for us to rely on it: other nodes take it for left behind later on."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a volume holds at one moment, as a layer that does not change any more."""

    layer: LayerId
    record: VolumeRecord
    """With the size and the time of change that belong to it."""


@dataclass(slots=True)
class Synced:
    """What a sync has done, by the names of volumes and snapshots; or would do."""

    copied: list[str] = field(default_factory=list)
    current: list[str] = field(default_factory=list)
    """Those that were the same already."""
    removed: list[str] = field(default_factory=list)
    passed_over: list[tuple[str, str]] = field(default_factory=list)
    """And why."""
    added_bytes: int = 0
    """What that took in the target."""


class PassedOver(ArchipError):
    """This volume cannot be copied, and why; others can."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A layer of the target that shows what one of the origin does."""

    record: LayerRecord
    via: VolumeRecord | None
    """The volume that keeps it from being reclaimed; ``None``: it was made by us and is pending."""


class Copier:
    """Copies layers from one backend to another. What it made counts as used until it is closed."""

    def __init__(
        self,
        origin: Mapper,
        origin_sealed: SealedStore,
        target: Mapper,
        target_sealed: SealedStore,
    ) -> None:
        self.origin, self.target = origin, target
        self.added_bytes = 0
        self.about_bytes = 0
        """What there may be to copy or to read."""
        self._origin_sealed, self._target_sealed = origin_sealed, target_sealed
        self._advance: Callable[[int], None] = Advance(unheeded, 0)
        self._pending = ExitStack()
        self._known = dict(self._kept_by_volumes())

    def __enter__(self) -> "Copier":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pending.close()

    def _kept_by_volumes(self) -> Iterator[tuple[LayerId, _Known]]:
        """By the origin's layers: the target's that are copies of them, or that they are copies of."""
        layers = {
            found.record.id: found.record for _, found in self.target.catalog.list(LayerRecord, skip_damaged=True)
        }
        copied_back = {
            found.record.original: found.record.id
            for _, found in self.origin.catalog.list(LayerRecord, skip_damaged=True)
            if found.record.original in layers
        }
        for volume in self.target.volumes():
            layer = layers.get(volume.record.layer)
            if layer is not None and layer.sealed is None and layer.parent is not None:
                layer = layers.get(layer.parent)
            if layer is not None and layer.sealed is not None:
                known = _Known(layer, volume.record)
                for original in (layer.original, copied_back.get(layer.id)):
                    if original is not None:
                        yield original, known

    def expect(self, volumes: Iterable[VolumeRecord], progress: Progress) -> None:
        """What these hold is to be copied; ``progress`` is told how far that is."""
        layers = {layer for volume in volumes for layer in self._lacking(volume)}
        self.about_bytes = sum(
            layer.sealed.added_bytes if layer.sealed is not None else stored_bytes(self.origin, layer.id)
            for layer in layers
        )
        self._advance = Advance(progress, self.about_bytes)

    def _lacking(self, volume: VolumeRecord) -> list[LayerRecord]:
        """The layers of its chain that the target has no copy of."""
        try:
            return [layer for layer in self.origin.catalog.chain(volume.layer) if layer.id not in self._known]
        except ObjectMissing:
            return []  # that is said when it is copied

    def is_replica(self, volume: VolumeRecord) -> bool:
        """Whether this volume in the target is one of the origin's, and has not moved from there."""
        replica = volume.replica_of
        if replica is None or replica.store != self.origin.store.id:
            return False
        # Whether it arrives or not: a sync on another node may have written that down just when it moved.
        original = self.origin.catalog.get(VolumeRecord, volume.id)
        return original is None or original.record.moved_to != self.target.store.id

    def has_original(self, replica: VolumeRecord) -> bool:
        """Whether the origin still has the volume. Raises ``ObjectDamaged`` or ``FormatTooNew`` if its record does not
        say."""
        original = self.origin.catalog.get(VolumeRecord, replica.id)
        return original is not None and original.record.name is not None

    def heed(self) -> None:
        """Raise what ``progress`` raises: nobody waits any more."""
        self._advance(0)

    def lies_on(self, head: LayerId, layer: LayerId) -> bool:
        """Whether the layer below ``head``, in the target, shows what the origin's ``layer`` does."""
        found, known = self.target.catalog.get(LayerRecord, head), self._known.get(layer)
        return found is not None and known is not None and found.record.parent == known.record.id

    def layer(self, layer: LayerId) -> LayerRecord:
        """The target's layer that shows what ``layer`` does, sealed; copied if it is not there.

        Raises ``ObjectMissing`` or ``NotFound`` if the layer is gone, or was merged with one above it.
        """
        known = self._known.get(layer)
        if known is None:
            source = self.origin.catalog.layer(layer).record
            known = self._known[layer] = _Known(self._copy(source, layer), None)
        return known.record

    def still_changing(self, head: LayerRecord) -> LayerRecord:
        """As ``layer``, of a head to which nobody writes just now: what is copied of it is that of this moment."""
        return self._copy(head, None)

    def still_kept(self, layer: LayerId, by: VolumeRecord) -> bool:
        """Whether the copy of ``layer`` is not about to be reclaimed, now that ``by`` leads to it too.

        Whoever reclaims and has not seen ``by`` has seen who kept the layer before, if that still does.
        """
        kept = self._is_kept(self._known[layer], by)
        if not kept:
            del self._known[layer]
        return kept

    def _is_kept(self, known: _Known, by: VolumeRecord) -> bool:
        if known.via is None:
            return time.time_ns() - known.record.created_ns < PENDING_NS_MAX
        if known.via.id == by.id:
            return True
        now = self.target.catalog.get(VolumeRecord, known.via.id)
        return now is not None and now.record.name is not None and now.record.layer == known.via.layer

    def _copy(self, source: LayerRecord, original: LayerId | None) -> LayerRecord:
        while True:
            if source.sealed is None:
                self._copy_base(source)
            with self._target_sealed.chunks.session() as session:
                sealed, base = self._fill(source, session)
                session.flush()
                made = self._pending.enter_context(self.target.bare_layer(original))
                try:
                    record = commit_sealed(self.target.catalog, made, base, sealed, session)
                except Swept:
                    self._forget_gone()
                    continue
                self.added_bytes += session.added_bytes
                return record

    def _forget_gone(self) -> None:
        """What was relied upon is going: perhaps a base that nothing leads to any more."""
        for layer, known in list(self._known.items()):
            if self.target.catalog.get(LayerRecord, known.record.id) is None:
                del self._known[layer]

    def _fill(self, source: LayerRecord, session: Session) -> tuple[Sealed, LayerRecord | None]:
        """Store what ``source`` shows. Its map, and the base in the target that it was made on."""
        if source.sealed is None:
            with reading_chain(self.origin, self._origin_sealed, source.id) as (chain, engine):
                near = next((record.id for record in chain if record.id in self._known), None)
                base = self._known[near].record if near is not None else None
                return self._build(ChainReader(engine, near), base, session), base
        ancestor, base = self._base(source)
        if self.origin.store.hash != self.target.store.hash:
            with reading_chain(self.origin, self._origin_sealed, source.id) as (_, engine):
                return self._build(_Between(engine, self._changes(ancestor, source)), base, session), base
        made = map_of(source)
        assert made is not None
        root_of_base = map_of(base)
        copy_map(
            self._origin_sealed.chunks,
            self._target_sealed.chunks.page,
            session,
            made.root,
            root_of_base.root if root_of_base is not None else None,
            threads=COPY_THREADS,
            progress=self._advance,
        )
        return Sealed(made.root.hex(), made.data_bytes, session.added_bytes), base

    def _copy_base(self, source: LayerRecord) -> None:
        """First the sealed layer in which its chain ends, if that is to be copied from packs and not from here."""
        chain = self.origin.catalog.chain(source.id)
        if chain[-1].sealed is not None and not any(record.id in self._known for record in chain):
            self.layer(chain[-1].id)

    def _base(self, source: LayerRecord) -> tuple[LayerRecord | None, LayerRecord | None]:
        """The nearest sealed layer that it came from and that the target has, and that one in the target."""
        for ancestor in self.origin.catalog.lineage(source.id):
            if ancestor.id != source.id and ancestor.sealed is not None and ancestor.id in self._known:
                return ancestor, self._known[ancestor.id].record
        return None, None

    def _changes(self, ancestor: LayerRecord | None, source: LayerRecord) -> Iterator[Run]:
        before, after = map_of(ancestor), map_of(source)
        assert after is not None
        return differing_in_maps(
            self._origin_sealed.chunks.page, before.root if before is not None else None, after.root
        )

    def _build(self, reader: Reader, base: LayerRecord | None, session: Session) -> Sealed:
        made = build_map(
            reader,
            VOLUME_BYTES_MAX,
            map_of(base),
            self._target_sealed.chunks,
            session,
            mask_bits=mask_bits(self.target),
            threads=COPY_THREADS,
            progress=self._advance,
        )
        return Sealed(made.root.hex(), made.data_bytes, session.added_bytes)


class _Between(ChainReader):
    """As a ``ChainReader``, where the changes are known already; they are asked for in rising order."""

    def __init__(self, engine: EngineVolume, changes: Iterator[Run]) -> None:
        super().__init__(engine, None)
        self._changes = changes
        self._next = next(changes, None)

    def next_change(self, offset: int, end: int) -> Run | None:
        while self._next is not None and self._next[1] <= offset:
            self._next = next(self._changes, None)
        if self._next is None or self._next[0] >= end:
            return None
        return max(self._next[0], offset), self._next[1]


class Replicas(Seals):
    def sync(
        self, origin: str, target: str, *, progress: Progress, delete: bool = False, dry_run: bool = False
    ) -> Synced:
        """Copy to one backend the volumes and snapshots of another that it lacks, or has as they were before.

        ``delete``: remove from it the replicas of what the other one has no more.

        What cannot be copied is passed over, and said why. What was copied before an error or a crash stays, and is
        found by the next sync. With ``dry_run`` nothing is changed, and how much is added is a guess.
        """
        source, other = self.mapper(origin), self.mapper(target)
        if source is other:
            raise InvalidInput(f"{origin} is both origin and target; give two backends")
        records = [each.record for each in source.volumes() if self._is_to_be_copied(source, other, each.record)]
        records.sort(key=lambda each: (each.writable, each.created_ns))  # so that most find what they are made from
        done = Synced()
        try:
            with self._copier(source, other) as copier:
                if delete:
                    self._remove_orphans(copier, done, dry_run=dry_run)
                lacking = []
                for record in records:
                    with _passing_over(done, record):
                        if self._is_same(copier, record):
                            done.current.append(str(record.name))
                        else:
                            lacking.append(record)
                copier.expect(lacking, self._heeding_the_end(progress))
                for record in lacking:
                    with _passing_over(done, record):
                        changed = dry_run or self._replicate(copier, record)
                        (done.copied if changed else done.current).append(str(record.name))
                done.added_bytes = copier.about_bytes if dry_run else copier.added_bytes
        finally:
            self._reclaim_wanted = True  # of heads that replicas have left, and of what an error has
        return done

    def _copier(self, origin: Mapper, target: Mapper) -> Copier:
        return Copier(origin, self.sealed_store(origin), target, self.sealed_store(target))

    def _is_to_be_copied(self, origin: Mapper, target: Mapper, record: VolumeRecord) -> bool:
        """Not what is a replica itself: unless of a volume that the target had, and has no more."""
        if not self.is_hidden(origin, record):
            return True
        assert record.replica_of is not None
        return record.replica_of.store == target.store.id and target.catalog.get(VolumeRecord, record.id) is None

    def content(self, mapper: Mapper, volume: VolumeId) -> Content:
        """What the volume holds now, frozen for that if it was written since the last snapshot.

        Raises ``NotFound`` if it is gone, ``LockHeld`` if another node writes it.
        """
        record = mapper.catalog.volume(volume).record
        if record.name is None:
            raise NotFound(f"the volume {volume} has just been removed; see `archip volume-list`")
        if not record.writable:
            return Content(record.layer, record)
        if self.is_hidden(mapper, record):
            below = mapper.catalog.layer(record.layer).record.parent
            assert below is not None, "the head of a replica lies on what was copied"
            return Content(below, record)
        with self._owning(Found(mapper, record)) as opened:
            frozen = opened.freeze_if_written()
            present = opened.present_record()
            assert present is not None
            return Content(frozen.layer, msgspec.structs.replace(present, size=frozen.size))

    def _replicate(self, copier: Copier, record: VolumeRecord) -> bool:
        """Whether there was anything to do. Raises ``PassedOver``, and what copying raises."""
        for _ in range(ATTEMPTS_MAX):
            copier.heed()
            content = self.content(copier.origin, record.id)
            try:
                return self.put_replica(copier, content, self._as_replica(copier, content.record)) is not None
            except (ObjectMissing, Conflict) as error:
                # The layer was merged with one above it, or the replica changed. If it is neither, that stays so.
                failure = error
        raise failure

    def _as_replica(self, copier: Copier, record: VolumeRecord) -> VolumeRecord:
        comes_home = record.replica_of is not None and record.replica_of.store == copier.target.store.id
        replica_of = None if comes_home else Replica(copier.origin.store.id)
        return msgspec.structs.replace(record, replica_of=replica_of, visible=VOLUME_BYTES_MAX)

    def _is_same(self, copier: Copier, record: VolumeRecord) -> bool:
        """Whether the replica is up to date, as far as records tell: they do of what nobody has open."""
        found = self._present(copier, record)
        if found is None:
            return False
        wanted = msgspec.structs.replace(self._as_replica(copier, record), layer=found.record.layer)
        if wanted != found.record:
            return False
        if not record.writable:
            return True
        if self.is_open(record.id) or copier.origin.locks.holder(record.id) is not None:
            return False
        below = copier.origin.catalog.layer(record.layer).record.parent
        if below is None or not copier.lies_on(found.record.layer, below):
            return False
        return is_blank(copier.origin.blocker, record.layer)  # else an owner died who did not write down when he wrote

    def _present(self, copier: Copier, record: VolumeRecord) -> Versioned[VolumeRecord] | None:
        """The replica, if there is one. Raises ``PassedOver`` for a volume that is none."""
        found = copier.target.catalog.get(VolumeRecord, record.id)
        if found is None:
            return None
        backend = copier.target.backend
        if found.record.name is None:
            raise PassedOver(f"{record.name} is just being removed from backend {backend}; try again")
        if not copier.is_replica(found.record):
            raise PassedOver(
                f"{record.name} is a volume of its own in backend {backend}, since it was opened there; "
                "remove it from one of the two"
            )
        return found

    def put_replica(self, copier: Copier, content: Content, wanted: VolumeRecord) -> VolumeRecord | None:
        """Have the target's record of the volume be as ``wanted``, but for its layers, with what ``content`` holds.

        ``None``: it is so already. Raises ``PassedOver`` where another volume is in the way, ``Conflict`` and
        ``ObjectMissing`` if it has to be tried anew.
        """
        found = self._present(copier, wanted)
        if found is None:
            return self._publish(copier, content, wanted)
        record = found.record
        if wanted.writable and (not copier.lies_on(record.layer, content.layer) or record.size != wanted.size):
            layer = copier.layer(content.layer)
            with copier.target.new_layer(layer.id, wanted.size) as head:
                record = msgspec.structs.replace(wanted, layer=head.id, name=record.name)
                copier.target.catalog.put_volume(record, found.version)
            self._expect_kept(copier, content.layer, record)
        if record == msgspec.structs.replace(wanted, layer=record.layer):
            return None if record is found.record else record
        if record.name != wanted.name:
            with self._making_way(copier, wanted):
                copier.target.rename(record.id, str(wanted.name), replace=None)

        def edit(present: VolumeRecord) -> VolumeRecord:
            if present.replica_of != found.record.replica_of and present.replica_of != wanted.replica_of:
                raise Conflict(f"{present.name} is not the replica any more that it was; look again")
            return msgspec.structs.replace(wanted, layer=present.layer)

        return copier.target.change(record.id, edit).record

    def put_arriving(self, copier: Copier, head: LayerId, wanted: VolumeRecord) -> VolumeRecord:
        """Have the replica be as ``wanted``, with that head. Raises as ``put_replica`` does."""
        found = self._present(copier, wanted)
        if found is not None and found.record.name != wanted.name:
            with self._making_way(copier, wanted):
                copier.target.rename(wanted.id, str(wanted.name), replace=None)
            found = self._present(copier, wanted)
        if found is None:
            raise Conflict(f"the replica of {wanted.name} in backend {copier.target.backend} has just been removed")
        record = msgspec.structs.replace(wanted, layer=head)
        return copier.target.catalog.put_volume(record, found.version).record

    def _publish(self, copier: Copier, content: Content, wanted: VolumeRecord) -> VolumeRecord:
        layer, target = copier.layer(content.layer), copier.target
        with ExitStack() as stack:
            with self._making_way(copier, wanted):
                reservation = stack.enter_context(target.reserve(str(wanted.name), wanted.id))
            top = layer.id
            if wanted.writable:
                top = stack.enter_context(target.new_layer(layer.id, wanted.size)).id
            made = target.publish(reservation, msgspec.structs.replace(wanted, layer=top))
            try:
                self._expect_kept(copier, content.layer, made.record)
            except Conflict:
                target.withdraw(made)
                raise
        return made.record

    @contextmanager
    def _making_way(self, copier: Copier, wanted: VolumeRecord) -> Iterator[None]:
        """Within the block, ``wanted`` gets its name in the target.

        A replica that has it, since its original was called so before, is called otherwise first. Raises ``PassedOver``
        if somebody else has it.
        """
        target, name = copier.target, str(wanted.name)
        other = target.find(name)
        if other is not None and other.record.id != wanted.id and copier.is_replica(other.record):
            target.rename(other.record.id, _aside(name, other.record.id), replace=None)
        try:
            yield
        except AlreadyExists as error:
            raise PassedOver(
                f"backend {target.backend} has another volume called {name}; rename one of the two"
            ) from error

    def _remove_orphans(self, copier: Copier, done: Synced, *, dry_run: bool) -> None:
        """Remove the replicas of what the origin has no more."""
        for found in list(copier.target.volumes()):
            record = found.record
            with _passing_over(done, record):
                if not copier.is_replica(record) or copier.has_original(record):
                    continue
                if not dry_run:
                    if record.writable:
                        copier.target.locks.take(record.id, Hold.IO, called=str(record.name))
                    copier.target.purge(copier.target.remove(record.id))
                done.removed.append(str(record.name))

    def _expect_kept(self, copier: Copier, layer: LayerId, record: VolumeRecord) -> None:
        if not copier.still_kept(layer, record):
            raise Conflict(f"what {record.name} was made on in backend {copier.target.backend} has just been removed")


def _aside(name: str, volume: VolumeId) -> str:
    """What a replica is called whose name another one has now: as much of that as there is room for."""
    suffix = f"@replaced-{volume[:8]}"
    return name.encode()[: NAME_BYTES_MAX - len(suffix)].decode(errors="ignore") + suffix


@contextmanager
def _passing_over(done: Synced, record: VolumeRecord) -> Iterator[None]:
    """Let what keeps this volume from being copied not keep others from it."""
    try:
        yield
    except NotFound:
        return  # removed meanwhile
    except (StoreFull, StoreUnavailable):
        raise
    except (Busy, StoreError, PassedOver, Conflict) as error:
        done.passed_over.append((str(record.name), str(error)))
        log.warning("not copied", volume=record.name, error=str(error))
