"""The records of one backend, typed: read, replace, list, and resolve a name.

A name is held by two records, so that a rename has a single point at which it happens:

* the *name record* at the name's hash says which volume it belongs to;
* the *volume record* says what that volume is called.

The name resolves to the volume only while both agree, so the write of either of them can be the one that commits:
creating writes the name first and commits with the volume; renaming writes the new name first and commits by
replacing the volume; removing commits by replacing the volume and deletes the name afterwards. What a crash leaves
behind is a name record that nobody agrees with: it resolves to nothing and may be taken over.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from archipfs.blockers.contract import Blocker, VersionPaths
from archipfs.errors import FormatTooNew, NotFound, ObjectDamaged, ObjectMissing
from archipfs.map.names import name_ident
from archipfs.map.records import (
    KIND_NAMES,
    LayerRecord,
    LockRecord,
    NameRecord,
    R,
    StoreRecord,
    VolumeRecord,
    decode,
    encode,
)
from archipfs.types import LayerId, VolumeId

T = TypeVar("T")

STORE_IDENT = "info"


@dataclass(frozen=True, slots=True)
class Versioned(Generic[R]):
    """A record with the version that replacing it must name."""

    record: R
    version: int


class Catalog:
    """Typed access to one backend's records. Thread-safe, without state: the store is the truth."""

    def __init__(self, blocker: Blocker) -> None:
        self._blocker = blocker

    def get(self, kind: type[R], ident: str) -> Versioned[R] | None:
        key = f"{KIND_NAMES[kind]}/{ident}"
        found = self._blocker.get_record(key)
        return None if found is None else Versioned(decode(kind, key, found.value), found.version)

    def put(self, record: R, ident: str, expected: int | None) -> Versioned[R]:
        """Replace the version ``expected``, durably. Raises ``Conflict`` if it is not that."""
        version = self._blocker.put_record(f"{KIND_NAMES[type(record)]}/{ident}", encode(record), expected)
        return Versioned(record, version)

    def delete(self, kind: type[R], ident: str, expected: int) -> None:
        self._blocker.delete_record(f"{KIND_NAMES[kind]}/{ident}", expected)

    def list(self, kind: type[R], *, skip_damaged: bool = False) -> Iterator[tuple[str, Versioned[R]]]:
        """Raises ``ObjectDamaged`` or ``FormatTooNew`` at a record that cannot be read, unless such are skipped."""
        for key, found in self._blocker.list_records(KIND_NAMES[kind]):
            try:
                record = decode(kind, key, found.value)
            except (ObjectDamaged, FormatTooNew):
                if not skip_damaged:
                    raise
                continue
            yield key.partition("/")[2], Versioned(record, found.version)

    def idents(self, kind: type[R]) -> Iterator[str]:
        """What there is of a kind, readable or not."""
        for key, _ in self._blocker.list_records(KIND_NAMES[kind]):
            yield key.partition("/")[2]

    def version_paths(self, kind: type[R], ident: str, version: int) -> VersionPaths | None:
        return self._blocker.version_paths(f"{KIND_NAMES[kind]}/{ident}", version)

    # By kind

    def store(self) -> Versioned[StoreRecord] | None:
        return self.get(StoreRecord, STORE_IDENT)

    def volume(self, volume: VolumeId) -> Versioned[VolumeRecord]:
        """Raises ``NotFound``."""
        found = self.get(VolumeRecord, volume)
        if found is None:
            raise NotFound(f"no volume has the id {volume}; see `archip volume-list`")
        return found

    def put_volume(self, record: VolumeRecord, expected: int | None) -> Versioned[VolumeRecord]:
        return self.put(record, record.id, expected)

    def layer(self, layer: LayerId) -> Versioned[LayerRecord]:
        """Raises ``ObjectMissing``: whoever asks for a layer has it from a record that promises it."""
        found = self.get(LayerRecord, layer)
        if found is None:
            raise ObjectMissing(f"layer {layer} is not in the store; run `archip check` to see what needs it")
        return found

    def chain(self, head: LayerId) -> Sequence[LayerRecord]:
        """``head``, the parent that it reads, and so on to the last. Raises ``ObjectMissing``."""

        return self.with_chain(head, tuple)

    def with_chain(self, head: LayerId, use: Callable[[Sequence[LayerRecord]], T]) -> T:
        """What ``use`` makes of the chain, as it is at one moment.

        A layer may be sealed at any time: then its objects go, and what it was merged with goes too. So when something
        is missing, to us or to ``use``, and a layer has been sealed since we read its record, all begins anew.
        """
        while True:
            chain = deque[LayerRecord]()
            try:
                following: LayerId | None = head
                while following is not None:
                    chain.append(self.layer(following).record)
                    following = chain[-1].reads_parent
                return use(chain)
            except ObjectMissing:
                if not self.sealed_since(chain):
                    raise

    def sealed_since(self, chain: Iterable[LayerRecord]) -> bool:
        """Whether a layer has been sealed since these records were read."""
        return any(self._sealed_since(record) for record in chain)

    def _sealed_since(self, record: LayerRecord) -> bool:
        now = self.get(LayerRecord, record.id) if record.sealed is None else None
        return now is not None and now.record.sealed is not None

    def lineage(self, layer: LayerId) -> Iterator[LayerRecord]:
        """``layer``, its parent and so on, also beyond sealed ones, as far as it is still there."""
        following: LayerId | None = layer
        while following is not None and (found := self.get(LayerRecord, following)) is not None:
            yield found.record
            following = found.record.parent

    def lock(self, volume: VolumeId) -> Versioned[LockRecord] | None:
        return self.get(LockRecord, volume)

    # Names

    def name(self, name: str) -> Versioned[NameRecord] | None:
        return self.get(NameRecord, name_ident(name))

    def put_name(self, record: NameRecord, expected: int | None) -> Versioned[NameRecord]:
        return self.put(record, name_ident(record.name), expected)

    def delete_name(self, name: str, expected: int) -> None:
        self.delete(NameRecord, name_ident(name), expected)

    def resolve(self, name: str) -> Versioned[VolumeRecord] | None:
        """The volume called ``name``, or ``None``."""
        entry = self.name(name)
        while entry is not None:
            found = self.resolve_entry(entry.record)
            if found is not None:
                return found
            # Meanwhile the name may have gone to another volume: it was never without one.
            read, entry = entry, self.name(name)
            if entry is not None and entry.version == read.version:
                return None
        return None

    def resolve_or_none(self, name: str) -> Versioned[VolumeRecord] | None:
        """As ``resolve``; ``None`` also where a record cannot be read."""
        try:
            return self.resolve(name)
        except (ObjectDamaged, FormatTooNew):
            return None

    def resolve_entry(self, entry: NameRecord) -> Versioned[VolumeRecord] | None:
        """The volume that the entry and the volume's own record agree on, or ``None``."""
        # Once the one that was replaced has the name no more, the other one has it.
        candidates = (entry.volume,) if entry.replaced is None else (entry.volume, entry.replaced, entry.volume)
        for candidate in candidates:
            found = self.get(VolumeRecord, candidate)
            if found is not None and found.record.name == entry.name:
                return found
        return None

    def volumes(self) -> Iterator[Versioned[VolumeRecord]]:
        """All volumes that have a name and can be read, in no order.

        One pass over the volume records. Only names claimed twice (a rename onto a taken name is under way, or was
        cut short) need a look at the name record.
        """
        claims = defaultdict(list)
        for _, found in self.list(VolumeRecord, skip_damaged=True):
            if found.record.name is not None:
                claims[found.record.name].append(found)
        for name, found_all in claims.items():
            if len(found_all) == 1:
                yield found_all[0]
            elif (winner := self.resolve_or_none(name)) is not None:
                yield winner


def children_first(layers: Mapping[LayerId, LayerRecord]) -> list[LayerRecord]:
    """``layers`` with each one before its parent, as far as the parent is among them. Pure."""
    depths: dict[LayerId, int] = {}
    for start in layers:
        path: list[LayerId] = []
        following: LayerId | None = start
        while following is not None and following in layers and following not in depths:
            path.append(following)
            depths[following] = 0
            following = layers[following].parent
        depth = depths.get(following, -1) if following is not None else -1
        for layer in reversed(path):
            depth += 1
            depths[layer] = depth
    return sorted(layers.values(), key=lambda record: -depths[record.id])
