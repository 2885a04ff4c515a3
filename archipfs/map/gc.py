"""Garbage collection: packs in which nothing is needed any more, or little, go; beside readers, writers and sealers.

docs/architecture.md, "Garbage collection", has the protocol; ``Collector`` has its steps under the same numbers. Why a
sealer never relies on a pack that goes:

* It shows its intent (``sealing``) before it looks for condemned packs, and the collector condemns before it looks for
  intents. So the sealer sees the pack condemned, or gone, or the collector sees the intent and waits until it is
  committed, given up or taken away. An intent that the first look does not show was shown after it, and is not waited
  for.
* What is marked stays marked for the whole collection. So the map of a layer that is removed between the two markings
  counts, and so does whatever a layer sealed on top of it has in common with it.
* Nothing is deleted that was not condemned before the second marking began.

A crash at any step leaves packs that are whole, and condemned ones that the next collection goes on with.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec
import numpy

from archipfs.blockers.contract import Blocker
from archipfs.errors import Busy, Conflict, Fenced, FormatTooNew, ObjectDamaged, ObjectMissing, StoreFull
from archipfs.map.catalog import Catalog, Versioned
from archipfs.map.census import PackUse, take_census
from archipfs.map.chunks import ChunkStore, Location, pack_key
from archipfs.map.marking import Marking, Prefixes, look_up, prefixes
from archipfs.map.packs import Entry, Kind, PackIndex
from archipfs.map.reclaim import refuse_gaps
from archipfs.map.records import CondemnedRecord, DamageRecord, GcRecord, LayerRecord, R, VolumeRecord
from archipfs.map.survey import find_lost
from archipfs.types import Digest, LayerId, PackId

FOREIGN_GRACE_NS = 3600 * 10**9
"""How old a pack that another node made must be before it is looked at, and how long a collector that says nothing is
believed to be alive."""

INTENT_SECONDS = 60.0
"""How long a sealer may take from its intent to its commit before the intent is taken away."""

_POLL_SECONDS = 0.05
_LOCK_IDENT = "lock"

SEALING_HERE = "in use by a seal"
YOUNG = "made by another node within the hour"
DAMAGED = "damaged, and needed"
FULL = "no room for what of them is needed"


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did, or with ``dry_run`` would do. Bytes are of whole packs."""

    packs: int
    """Deleted."""
    freed_bytes: int
    """By that, less what repacking took."""
    repacked: int
    """How many of those had something in them that is needed, which was copied to new packs."""
    copied_bytes: int
    """How much that was."""
    needed_again: int
    """Condemned packs that turned out to be needed."""
    kept: Mapping[str, int]
    """How many packs would have been deleted or repacked but for that reason."""


@dataclass(slots=True)
class _View:
    """What the store was seen to be, after its roots were marked."""

    condemned: set[PackId]
    damage: dict[PackId, frozenset[Digest]]
    uses: dict[PackId, PackUse]
    strays: set[PackId]
    """Packs that are gone, and have records."""


def _nothing() -> None:
    """The pulse of a collection that nobody may interrupt."""


class Collector:
    """Collects the garbage of one backend for one node. Thread-safe; one collection at a time."""

    def __init__(
        self,
        catalog: Catalog,
        blocker: Blocker,
        store: ChunkStore,
        node: str,
        forget: Callable[[Iterable[PackId]], None] | None = None,
        *,
        grace_ns: int = FOREIGN_GRACE_NS,
        intent_seconds: float = INTENT_SECONDS,
    ) -> None:
        """``node`` is our node's id. ``forget`` is told which packs were deleted: ``store.forget``, or what has others
        forget them too."""
        self._catalog = catalog
        self._blocker = blocker
        self._store = store
        self._node = node
        self._forget = forget or store.forget
        self._grace_ns = grace_ns
        self._intent_seconds = intent_seconds
        self._mutex = threading.Lock()
        self._lock = _Lock(catalog, node, grace_ns)

    def collect(
        self, *, dry_run: bool = False, unreadable: bool = False, pulse: Callable[[], None] = _nothing
    ) -> Collected:
        """Delete what is not needed; with ``dry_run`` only say what that would be, and change nothing.

        With ``unreadable`` also packs whose heads are damaged, if all that is needed lies in others. Without, they
        stay, since nobody knows what is in them.

        It works on a full store too: to write down what goes takes room, which is kept back for that; nothing is copied
        then.

        ``pulse`` is called every now and then; what it raises ends the collection, whose rest is left to the next.
        Raises ``Busy`` if another collection is under way, ``Fenced`` if another node took this one for dead, and
        ``ObjectMissing``, ``ObjectDamaged`` or ``FormatTooNew``, with nothing deleted, for a record or a page that
        cannot be read, or a layer that is missing. Takes up to two packs' bytes of memory beside what ``marking`` and
        ``census`` state.
        """
        if not self._mutex.acquire(blocking=False):
            raise Busy("garbage of this store is being collected already; wait until that is done")
        try:
            if dry_run:
                return self._foresee(pulse)
            try:
                with self._lock.held():  # 1
                    return self._collect(unreadable, pulse, repack=True)
            except StoreFull:
                if not self._blocker.relieve():
                    raise
            with self._lock.held():
                return self._collect(unreadable, pulse, repack=False)
        finally:
            self._mutex.release()

    def _collect(self, unreadable: bool, pulse: Callable[[], None], *, repack: bool) -> Collected:
        kept: Counter[str] = Counter()
        marking = Marking(self._store.page)
        before = self._look(marking, unreadable, pulse)  # 2
        dead = {use.pack for use in before.uses.values() if use.dead and self._is_ours_to_take(use, kept)}
        repacked = self._worth_repacking(before, kept) if repack else []
        condemned = before.condemned | dead | {use.pack for use in repacked}
        self._condemn(condemned - before.condemned)  # 3
        if not condemned:
            self._delete([], before.strays, pulse)
            return Collected(0, 0, 0, 0, 0, kept)
        copied_bytes, made = self._repack(repacked, kept, pulse)  # 4
        self._wait_for_intents(pulse)  # 5
        after = self._look(marking, unreadable, pulse)  # 6
        pinned = self._store.pinned()
        # What somebody else has condemned since, who was taken for dead, may be relied upon: no intent was waited for.
        ours = after.condemned & condemned & after.uses.keys() - pinned
        dead = {pack for pack in ours if after.uses[pack].dead}
        marks = marking.marks.sorted()
        doomed = [after.uses[pack] for pack in sorted(dead) if self._others_can_be_read(pack, dead, marks, kept, pulse)]
        needed = after.condemned - {use.pack for use in doomed}
        for pack in sorted(needed):
            # Whoever has taken us for dead may be about to delete it: nobody may begin to rely on it.
            self._lock.verify()
            self._drop(CondemnedRecord, pack)
        self._delete([use.pack for use in doomed], after.strays, pulse)  # 7
        made_bytes = sum(after.uses[pack].total_bytes for pack in made & after.uses.keys() - before.uses.keys())
        return Collected(
            packs=len(doomed),
            freed_bytes=sum(use.total_bytes for use in doomed) - made_bytes,
            repacked=len({use.pack for use in repacked} - needed),
            copied_bytes=copied_bytes,
            needed_again=len(needed),
            kept=kept,
        )

    def _foresee(self, pulse: Callable[[], None]) -> Collected:
        kept: Counter[str] = Counter()
        view = self._look(Marking(self._store.page), False, pulse)
        repack = self._worth_repacking(view, kept)
        dead = [use for use in view.uses.values() if use.dead and self._is_ours_to_take(use, kept)]
        copied_bytes = sum(use.live_bytes for use in repack)
        return Collected(
            packs=len(dead) + len(repack),
            freed_bytes=sum(use.total_bytes for use in (*dead, *repack)) - copied_bytes,
            repacked=len(repack),
            copied_bytes=copied_bytes,
            needed_again=sum(not view.uses[pack].dead for pack in view.condemned & view.uses.keys()),
            kept=kept,
        )

    # 2 and 6: marking, and what it says of each pack

    def _look(self, marking: Marking, unreadable: bool, pulse: Callable[[], None]) -> _View:
        # Volumes come before layers: what they lead to is listed then, unless it is lost.
        volumes = [found.record for _, found in self._catalog.list(VolumeRecord, skip_damaged=True)]
        layers = {LayerId(layer): found.record for layer, found in self._catalog.list(LayerRecord)}
        refuse_gaps(self._catalog, volumes, layers)
        roots = {
            Digest(bytes.fromhex(record.sealed.root)): layer
            for layer, record in layers.items()
            if record.sealed is not None
        }
        for root, layer in roots.items():
            marking.mark(root, layer, pulse)
        # Records come before packs: a record whose pack is not listed after it leads nowhere. Packs come last: all that
        # the roots lead to was there before them.
        condemned = {PackId(pack) for pack, _ in self._catalog.list(CondemnedRecord)}
        damage = {
            PackId(pack): frozenset(Digest(bytes.fromhex(digest)) for digest in found.record.digests)
            for pack, found in self._catalog.list(DamageRecord)
        }
        self._store.refresh()
        packs = self._store.packs()
        there = packs | self._store.damaged_packs.keys()
        uses = take_census(packs, condemned, damage, marking.marks.sorted(), self._index_of(pulse))
        broken = {pack for pack in there - uses.keys() if self._is_damaged(pack)} if unreadable else set()
        if broken and not find_lost(self._catalog, self._store, pulse, without=broken):
            uses |= {pack: _of_no_use(pack, self._node) for pack in broken}
        return _View(
            condemned=condemned & there,
            damage=damage,
            uses=uses,
            strays=(condemned | damage.keys()) - there,
        )

    def _index_of(self, pulse: Callable[[], None]) -> Callable[[PackId], PackIndex | None]:
        def index_of(pack: PackId) -> PackIndex | None:
            pulse()
            try:
                return self._store.index(pack)
            except ObjectDamaged:
                return None  # it stays as it is; and what it has does not count, since others cannot find it

        return index_of

    def _is_damaged(self, pack: PackId) -> bool:
        """Whether its head is: not merely of a later format, nor gone."""
        try:
            self._store.index(pack)
        except ObjectDamaged:
            return True
        except (ObjectMissing, FormatTooNew):
            return False
        return False

    def _is_ours_to_take(self, use: PackUse, kept: Counter[str]) -> bool:
        """Whether nobody is likely to rely on it soon. Only a courtesy: a sealer finds out in any case."""
        if use.pack in self._store.pinned():
            kept[SEALING_HERE] += 1
            return False
        if use.node != self._node and time.time_ns() - use.created_ns < self._grace_ns:
            kept[YOUNG] += 1
            return False
        return True

    # 4: repacking

    def _worth_repacking(self, view: _View, kept: Counter[str]) -> list[PackUse]:
        """Packs that are needed for less than half, or hold something damaged, and could go if the rest were copied."""
        wanted = []
        for use in view.uses.values():
            if use.dead or not (use.live_bytes * 2 < use.entry_bytes or use.damaged):
                continue
            bad = view.damage.get(use.pack, frozenset())
            if bad and any(entry.digest in bad for entry in self._needed_entries(use)):
                kept[DAMAGED] += 1
            elif self._is_ours_to_take(use, kept):
                wanted.append(use)
        return wanted

    def _needed_entries(self, use: PackUse) -> list[Entry]:
        entries = self._store.index(use.pack).entries
        return [entries[place] for place in numpy.flatnonzero(use.live)]

    def _repack(
        self, condemned: list[PackUse], kept: Counter[str], pulse: Callable[[], None]
    ) -> tuple[int, set[PackId]]:
        """Copy what is needed to packs that are not condemned. Returns how many bytes were new there, and the packs.

        A pack that cannot be read to its end, or that there is no room to copy, goes on being needed, and so it stays.
        """
        with self._store.session() as session:
            try:
                for use in condemned:
                    self._lock.verify()
                    try:
                        for entry in self._needed_entries(use):
                            pulse()
                            raw = self._store.read(entry.digest)
                            if entry.kind is Kind.PAGE:
                                session.add_page(raw)
                            else:
                                session.add_chunk(entry.digest, raw)
                    except ObjectDamaged:
                        kept[DAMAGED] += 1  # a scrub says what is
                session.flush()
            except StoreFull:
                kept[FULL] += 1  # what is dead goes all the same, which makes room for the next time
            return session.added_bytes, session.relied_upon()

    # 3, and 5 to 7: from condemned to gone

    def _condemn(self, packs: set[PackId]) -> None:
        self._lock.verify()
        for pack in sorted(packs):
            self._catalog.put(CondemnedRecord(pack, self._node, time.time_ns()), pack, None)
        if packs:
            self._store.reread_marks()  # so that our own sealers do not rely on them from here on

    def _wait_for_intents(self, pulse: Callable[[], None]) -> None:
        """Until every intent that there is now is gone, by itself or because it took too long."""
        intents = {
            LayerId(layer): found.record.sealing
            for layer, found in self._catalog.list(LayerRecord)
            if found.record.sealing is not None
        }
        deadline = time.monotonic() + self._intent_seconds
        while intents:
            for layer, token in list(intents.items()):
                found = self._catalog.get(LayerRecord, layer)
                if found is None or found.record.sealing != token:
                    del intents[layer]
                elif time.monotonic() >= deadline:
                    with suppress(Conflict):  # it has just been committed, or given up
                        self._catalog.put(msgspec.structs.replace(found.record, sealing=None), layer, found.version)
            if intents:
                pulse()
                time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))

    def _others_can_be_read(
        self, pack: PackId, dead: set[PackId], marks: Prefixes, kept: Counter[str], pulse: Callable[[], None]
    ) -> bool:
        """Whether all that is marked in a pack that is about to go has a whole copy in one that stays: it is read.

        What merely has the first bytes of something marked has none, and keeps its pack.
        """
        index = self._index_of(pulse)(pack)
        if index is None:
            return True  # `find_lost` has seen to it
        marked, _ = look_up(marks, prefixes(entry.digest for entry in index.entries))
        digests = [index.entries[place].digest for place in numpy.flatnonzero(marked)]
        for digest, places in zip(digests, self._store.cache.find(digests), strict=True):
            pulse()
            if not any(self._is_whole(place, digest) for place in places if place.pack not in dead):
                kept[DAMAGED] += 1
                return False
        return True

    def _is_whole(self, place: Location, digest: Digest) -> bool:
        try:
            self._store.read_at(place, digest)
        except (ObjectMissing, ObjectDamaged):
            return False
        return True

    def _delete(self, doomed: list[PackId], strays: set[PackId], pulse: Callable[[], None]) -> None:
        """Packs before their records, so that a record leads to whatever is left."""
        deleted: set[PackId] = set()
        try:
            for pack in sorted(doomed):
                pulse()
                self._lock.verify()
                self._blocker.delete(pack_key(pack))
                deleted.add(pack)
                self._drop(DamageRecord, pack)
                self._drop(CondemnedRecord, pack)
        finally:
            if deleted:
                self._forget(deleted)
        for pack in sorted(strays):
            self._lock.verify()
            self._drop(DamageRecord, pack)
            self._drop(CondemnedRecord, pack)

    def _drop(self, kind: type[R], pack: PackId) -> None:
        found = self._catalog.get(kind, pack)
        if found is not None:
            with suppress(Conflict):  # it has just been changed, and is looked at again the next time
                self._catalog.delete(kind, pack, found.version)


def _of_no_use(pack: PackId, node: str) -> PackUse:
    """A pack whose head is damaged, when all that is needed lies in others."""
    return PackUse(pack, node, 0, 0, 0, numpy.zeros(0, numpy.bool_), 0, damaged=True)


class _Lock:
    """The record that lets one node of all collect at a time. Whoever has it for an hour without a sign of life loses
    it to the next who asks."""

    def __init__(self, catalog: Catalog, node: str, grace_ns: int) -> None:
        self._catalog = catalog
        self._node = node
        self._grace_ns = grace_ns
        self._generation = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises ``Busy`` if another node has it. What an earlier process of ours left is taken over."""
        found = self._catalog.get(GcRecord, _LOCK_IDENT)
        silent_ns = time.time_ns() - found.record.since_ns if found is not None else 0
        if found is not None and found.record.node not in (None, self._node) and silent_ns < self._grace_ns:
            raise Busy(
                f"node {found.record.node} is collecting garbage in this store, "
                f"last heard of {silent_ns // 10**9} s ago; wait until it is done"
            )
        self._generation = 1 + (found.record.generation if found is not None else 0)
        try:
            self._put(self._node, found.version if found is not None else None)
        except Conflict as error:
            raise Busy("another node has just begun to collect garbage in this store; wait until it is done") from error
        try:
            yield
        finally:
            with suppress(Conflict, Fenced):  # somebody took it over, and has it now
                self._put(None, self._present().version)

    def verify(self) -> None:
        """Raises ``Fenced`` if it is ours no more. Shows that we are alive, now and then."""
        found = self._present()
        if time.time_ns() - found.record.since_ns > self._grace_ns // 4:
            try:
                self._put(self._node, found.version)
            except Conflict as error:
                raise self._lost() from error

    def _present(self) -> Versioned[GcRecord]:
        found = self._catalog.get(GcRecord, _LOCK_IDENT)
        if found is None or (found.record.node, found.record.generation) != (self._node, self._generation):
            raise self._lost()
        return found

    def _lost(self) -> Fenced:
        return Fenced("another node took this garbage collection for dead and began its own; this one deletes no more")

    def _put(self, node: str | None, expected: int | None) -> None:
        self._catalog.put(GcRecord(node, time.time_ns(), self._generation), _LOCK_IDENT, expected)
