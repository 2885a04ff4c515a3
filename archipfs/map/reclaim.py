"""Layers that nothing leads to any more, and how to delete them without taking one that is about to be used.

A layer is in use if a volume's record names it, or a layer in use has it for a parent, or its maker is still at work
with it. Volumes are read before layers: a layer becomes a parent only through a volume that names it, so if no volume
read first leads to it, every child it will ever have is among the layers read afterwards, and whoever makes a child
looks once more whether the volume it came from is still there (``Mapper.still_there``).

Where a record cannot be read, or one is missing that a volume needs, nobody knows what else is needed: nothing is
deleted then.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from archipfs.blockers.contract import Blocker
from archipfs.errors import Conflict, ObjectMissing
from archipfs.map.catalog import Catalog, children_first
from archipfs.map.records import LayerRecord, VolumeRecord
from archipfs.types import LayerId


@dataclass(frozen=True, slots=True)
class Reclaimed:
    layers: int
    stored_bytes: int
    """What their data objects took in the store."""
    waiting: int = 0
    """How many layers are to be deleted later, or the objects that they were made of before they were sealed."""


def reclaim(
    catalog: Catalog,
    blocker: Blocker,
    in_use: Callable[[LayerRecord], bool],
    may_go: Callable[[LayerRecord, bool], bool],
) -> Reclaimed:
    """Delete every layer that no volume and no layer ``in_use`` leads to; children first, so that a crash in between
    leaves no layer without its parent.

    ``may_go`` says of each whether it may be deleted now; for one that is still used, and sealed, its objects.
    """
    volumes, layers = _collect(catalog)
    roots = {record.layer for record in volumes}
    roots |= {layer for layer, record in layers.items() if in_use(record)}
    used = reachable(roots, layers)
    garbage = {layer: record for layer, record in layers.items() if layer not in used}
    if garbage:
        refuse_gaps(catalog, volumes, layers)
    going = _those_that_may_go(children_first(garbage), may_go)
    stored_bytes = sum(delete_layer(catalog, blocker, record.id) for record in going)
    left = _sealed_objects(blocker, layers, garbage)
    leaving = [record for record in left if may_go(record, False)]
    stored_bytes += sum(delete_objects(blocker, record.id) for record in leaving)
    return Reclaimed(len(going), stored_bytes, len(garbage) - len(going) + len(left) - len(leaving))


def _those_that_may_go(
    garbage: Sequence[LayerRecord], may_go: Callable[[LayerRecord, bool], bool]
) -> list[LayerRecord]:
    """Of layers, children first: not the parent of one that stays."""
    going = []
    needed: set[LayerId | None] = set()
    for record in garbage:
        if may_go(record, True) and record.id not in needed:
            going.append(record)
        else:
            needed.add(record.reads_parent)
    return going


def _sealed_objects(
    blocker: Blocker, layers: Mapping[LayerId, LayerRecord], garbage: Mapping[LayerId, LayerRecord]
) -> list[LayerRecord]:
    """The layers that are sealed and have objects from before; nobody who looks now reads those."""
    sealed = {layer for layer, record in layers.items() if record.sealed is not None and layer not in garbage}
    if not sealed:
        return []
    present = {LayerId(key.partition("/")[2]) for kind in ("layer", "bitmap") for key in blocker.list_data(kind)}
    return [layers[layer] for layer in sealed & present]


def _collect(catalog: Catalog) -> tuple[list[VolumeRecord], dict[LayerId, LayerRecord]]:
    """All volumes as they were at one moment, and the layers read after it.

    A list is not read at one moment: a rollback can hand a layer from the volume, read late, to the snapshot that it
    keeps, made after the list was begun. A volume never gets a layer back that it had, so two lists that agree are what
    there was between them.
    """
    volumes = [found.record for _, found in catalog.list(VolumeRecord)]
    while True:
        layers = {found.record.id: found.record for _, found in catalog.list(LayerRecord)}
        again = [found.record for _, found in catalog.list(VolumeRecord)]
        if {(each.id, each.layer) for each in again} == {(each.id, each.layer) for each in volumes}:
            return volumes, layers
        volumes = again


def refuse_gaps(catalog: Catalog, volumes: list[VolumeRecord], layers: Mapping[LayerId, LayerRecord]) -> None:
    """Raises ``ObjectMissing`` if a layer is missing that a volume needs. The volumes were read before the layers."""
    if reachable({record.layer for record in volumes}, layers) <= layers.keys():
        return
    for record in volumes:
        missing = reachable({record.layer}, layers) - layers.keys()
        now = catalog.get(VolumeRecord, record.id) if missing and record.name is not None else None
        if now is None or now.record.layer != record.layer or now.record.name is None:
            continue
        try:
            catalog.chain(record.layer)  # a layer may have been sealed since, and what it was merged with deleted
        except ObjectMissing as error:
            raise ObjectMissing(
                f"layer {min(missing)} of {record.name} is not in the store; "
                "nothing is deleted as long as nobody knows what else it needs; run `archip check`"
            ) from error


def reachable(roots: set[LayerId], layers: Mapping[LayerId, LayerRecord]) -> set[LayerId]:
    """``roots`` and all the layers that they read. Pure."""
    seen: set[LayerId] = set()
    for root in roots:
        following: LayerId | None = root
        while following is not None and following not in seen:
            seen.add(following)
            record = layers.get(following)
            following = record.reads_parent if record is not None else None
    return seen


def delete_layer(catalog: Catalog, blocker: Blocker, layer: LayerId) -> int:
    """Delete a layer's objects, then its record, so that a record leads to whatever is left. Returns bytes freed."""
    stored_bytes = delete_objects(blocker, layer)
    while (found := catalog.get(LayerRecord, layer)) is not None:
        with suppress(Conflict):  # somebody was about to seal it
            catalog.delete(LayerRecord, layer, found.version)
    return stored_bytes


def delete_objects(blocker: Blocker, layer: LayerId) -> int:
    """Delete a layer's data object and bitmap, as far as they are there. Returns bytes freed."""
    stored_bytes = 0
    for key in (f"bitmap/{layer}", f"layer/{layer}"):
        with suppress(ObjectMissing):
            data = blocker.open_data(key, writable=False)
            stored_bytes += data.allocated()
            data.close()
        # Also what cannot be opened: an attempt that was cut short may have left a part of it.
        blocker.delete_data(key)
    return stored_bytes
