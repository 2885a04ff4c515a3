"""Whether a store holds together: names, volumes, layers, objects, maps, packs.

Reads everything once, changes nothing, and may run beside writers: what looks wrong is looked at once more, so that
an operation under way is not taken for damage.
"""

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from archipfs.errors import FormatTooNew, ObjectDamaged
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import PACK_KIND, ChunkStore
from archipfs.map.mapper import Mapper, bitmap_key, data_key
from archipfs.map.names import name_ident
from archipfs.map.reclaim import reachable
from archipfs.map.records import (
    KIND_NAMES,
    AnyRecord,
    CondemnedRecord,
    DamageRecord,
    GcRecord,
    LayerRecord,
    LockRecord,
    NameRecord,
    R,
    StoreRecord,
    VolumeRecord,
    decode,
)
from archipfs.map.survey import UNREADABLE, Held, find_lost, holders
from archipfs.types import Digest, LayerId

RANGES_TOLD_MAX = 20
"""Of one volume."""


class Severity(enum.Enum):
    ERROR = "error"
    """Something is lost or contradicts itself."""
    LEFTOVER = "leftover"
    """A crash left it behind; it harms nothing and goes away by itself."""


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    what: str
    which: str


def _nothing() -> None:
    """The pulse of a check that nobody may interrupt."""


def check_backend(
    mapper: Mapper, store: ChunkStore | None = None, pulse: Callable[[], None] = _nothing
) -> list[Finding]:
    """What is wrong in one backend's store, errors first. Nothing wrong is an empty list.

    Maps and packs are looked at if ``store`` is given; every page is read then, and no chunk. ``pulse`` is called every
    now and then, and what it raises ends the check.
    """
    first = set(_findings(mapper, store, pulse))
    lasting = first & set(_findings(mapper, store, pulse)) if first else first
    return sorted(lasting, key=lambda found: (found.severity.value, found.which, found.what))


def _findings(mapper: Mapper, store: ChunkStore | None, pulse: Callable[[], None]) -> Iterator[Finding]:
    catalog = mapper.catalog
    damaged: list[Finding] = []
    _readable(mapper, StoreRecord, damaged)
    volumes = _readable(mapper, VolumeRecord, damaged)
    layers = {record.id: record for record in _readable(mapper, LayerRecord, damaged).values()}
    names = _readable(mapper, NameRecord, damaged)
    locks = _readable(mapper, LockRecord, damaged)
    condemned = _readable(mapper, CondemnedRecord, damaged)
    damage = _readable(mapper, DamageRecord, damaged)
    _readable(mapper, GcRecord, damaged)
    yield from damaged
    named = [record for record in volumes.values() if record.name is not None]
    yield from _check_names(catalog, named, names)
    for record in volumes.values():
        if record.name is None:
            yield Finding(Severity.LEFTOVER, "volume is removed and not purged yet", f"volume {record.id}")
    for volume in locks:
        if volume not in volumes:
            yield Finding(Severity.LEFTOVER, "lock of a volume that is gone", f"lock {volume}")
    used = reachable({record.layer for record in named}, layers)
    yield from _check_chains(named, layers, used)
    yield from _check_objects(mapper, layers, used)
    yield from _check_marks(mapper, condemned, damage)
    if store is not None:
        store.refresh()
        yield from _check_packs(store, pulse)
        yield from describe_lost(mapper.catalog, store, find_lost(mapper.catalog, store, pulse), pulse)


def _readable(mapper: Mapper, kind: type[R], damaged: list[Finding]) -> dict[str, R]:
    """The records of a kind that can be read, by ident; the others go to ``damaged``."""
    records: dict[str, R] = {}
    for key, found in mapper.blocker.list_records(KIND_NAMES[kind]):
        try:
            record = decode(kind, key, found.value)
        except (ObjectDamaged, FormatTooNew) as error:
            damaged.append(Finding(Severity.ERROR, str(error), f"record {key}"))
            continue
        ident = key.partition("/")[2]
        if _place_of(record) not in (ident, None):
            damaged.append(Finding(Severity.ERROR, "another record's content lies in its place", f"record {key}"))
        else:
            records[ident] = record
    return records


def _place_of(record: AnyRecord) -> str | None:
    """What identifies it, as its content has it; ``None`` for a record that is alone of its kind."""
    match record:
        case VolumeRecord() | LayerRecord():
            return record.id
        case NameRecord():
            return name_ident(record.name)
        case LockRecord():
            return record.volume
        case CondemnedRecord() | DamageRecord():
            return record.pack
        case StoreRecord() | GcRecord():
            return None


def _check_names(catalog: Catalog, named: list[VolumeRecord], names: dict[str, NameRecord]) -> Iterator[Finding]:
    for record in named:
        entry = names.get(name_ident(str(record.name)))
        if entry is None or record.id not in (entry.volume, entry.replaced):
            yield Finding(Severity.ERROR, "volume's name does not lead to it", f"volume {record.name} ({record.id})")
    by_id = {record.id: record for record in named}
    for entry in names.values():
        holders = (by_id.get(entry.volume), by_id.get(entry.replaced) if entry.replaced else None)
        if not any(holder is not None and holder.name == entry.name for holder in holders):
            yield Finding(Severity.LEFTOVER, "name leads to no volume", f"name {entry.name}")


def _check_chains(
    named: list[VolumeRecord], layers: dict[LayerId, LayerRecord], used: set[LayerId]
) -> Iterator[Finding]:
    users = Counter(record.layer for record in named)
    # A head that a crash kept from being put on top of another one is a child too, but nobody reads it.
    parents = Counter(
        each.reads_parent for each in layers.values() if each.reads_parent is not None and each.id in used
    )
    for record in named:
        which = f"volume {record.name} ({record.id})"
        if record.layer not in layers:
            yield Finding(Severity.ERROR, f"its layer {record.layer} is missing", which)
        elif record.writable and users[record.layer] > 1:
            yield Finding(Severity.ERROR, "another volume reads the layer it writes", which)
        elif record.writable and parents[record.layer]:
            yield Finding(Severity.ERROR, "the layer it writes has children", which)
        following: LayerId | None = record.layer
        seen: set[LayerId] = set()
        while following is not None and following in layers:
            if following in seen:
                yield Finding(Severity.ERROR, "its layers go round in a circle", which)
                break
            seen.add(following)
            following = layers[following].reads_parent
    for layer in used & layers.keys():
        parent = layers[layer].reads_parent
        if parent is not None and parent not in layers:
            yield Finding(Severity.ERROR, f"its parent {parent} is missing", f"layer {layer}")


def _check_objects(mapper: Mapper, layers: dict[LayerId, LayerRecord], used: set[LayerId]) -> Iterator[Finding]:
    for layer in layers.keys() - used:
        yield Finding(Severity.LEFTOVER, "layer that nothing leads to", f"layer {layer}")
    for kind, key_of in (("layer", data_key), ("bitmap", bitmap_key)):
        present = set(mapper.blocker.list_data(kind))
        for layer in used & layers.keys():
            sealed = layers[layer].sealed is not None
            if sealed and key_of(layer) in present:
                yield Finding(Severity.LEFTOVER, f"it is sealed and has a {kind} object still", f"layer {layer}")
            elif not sealed and key_of(layer) not in present:
                yield Finding(Severity.ERROR, f"its {kind} object is missing", f"layer {layer}")
        for key in present - {key_of(layer) for layer in layers}:
            yield Finding(Severity.LEFTOVER, "data object without a layer", f"object {key}")


def _check_marks(
    mapper: Mapper, condemned: Mapping[str, CondemnedRecord], damage: Mapping[str, DamageRecord]
) -> Iterator[Finding]:
    """Records about packs, which go with the next garbage collection."""
    packs = {key.partition("/")[2] for key in mapper.blocker.list(PACK_KIND)} if condemned or damage else set()
    for kind, records in (("condemned", condemned), ("damage", damage)):
        for pack in records.keys() - packs:
            yield Finding(Severity.LEFTOVER, "record of a pack that is gone", f"{kind} {pack}")
    for pack in condemned.keys() & packs:
        yield Finding(Severity.LEFTOVER, "pack is condemned and not deleted yet", f"pack {pack}")


def _check_packs(store: ChunkStore, pulse: Callable[[], None]) -> Iterator[Finding]:
    """Whether each pack has its head and its length."""
    for pack, why in store.damaged_packs.items():
        yield Finding(Severity.ERROR, why, f"pack {pack}")
    for pack in store.packs():
        pulse()
        try:
            store.index(pack)
            store.open_pack(pack).close()
        except UNREADABLE as error:
            yield Finding(Severity.ERROR, str(error), f"pack {pack}")


def describe_lost(
    catalog: Catalog, store: ChunkStore, lost: Mapping[Digest, str], pulse: Callable[[], None]
) -> Iterator[Finding]:
    """For whom ``lost`` pages and chunks are missing, by volumes and bytes."""
    if not lost:
        return
    told: Counter[str] = Counter()
    for which, offset, end, why in _joined(holders(catalog, store, lost, pulse), lost):
        told[which] += 1
        if told[which] <= RANGES_TOLD_MAX:
            yield Finding(Severity.ERROR, f"bytes {offset} to {end} cannot be read: {why}", which)
    for which, ranges in told.items():
        if ranges > RANGES_TOLD_MAX:
            yield Finding(Severity.ERROR, f"{ranges - RANGES_TOLD_MAX} more ranges cannot be read", which)


def _joined(held: Iterator[Held], lost: Mapping[Digest, str]) -> Iterator[tuple[str, int, int, str]]:
    """Who, from where, to where, and why; neighbours that cannot be read for the same reason as one."""
    pending: tuple[str, int, int, str] | None = None
    for each in held:
        volume = each.volume
        which = f"layer {each.layer}" if volume is None else f"{volume.kind.value} {volume.name} ({volume.id})"
        found = (which, each.offset, each.end, lost[each.digest])
        if pending is not None and (pending[0], pending[2], pending[3]) == (which, each.offset, found[3]):
            pending = (which, pending[1], each.end, found[3])
            continue
        if pending is not None:
            yield pending
        pending = found
    if pending is not None:
        yield pending
