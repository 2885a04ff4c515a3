"""What sealed layers lead to and cannot be read, and which bytes of which volumes that is.

Goes past what is damaged, where marking stops. Reads every page from its pack, not from a cache, and looks every chunk
up; chunks themselves are not read: which of them are damaged, a scrub finds out and writes down.

Memory: about 150 bytes a distinct page, as a page stands for up to 4 MiB of volumes.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass

from archipfs.errors import FormatTooNew, ObjectDamaged, ObjectMissing
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import ChunkStore
from archipfs.map.pages import ROOT_LEVEL, SLOT_BITS, Extent, decode_leaf, decode_node
from archipfs.map.records import DamageRecord, LayerRecord, VolumeRecord
from archipfs.types import REGION_BYTES, SECTOR_BYTES, Digest, LayerId, PackId

UNREADABLE = (ObjectMissing, ObjectDamaged, FormatTooNew)


@dataclass(frozen=True, slots=True)
class Held:
    """A run of bytes that cannot be read: of a volume's, as far as nothing newer hides it there; or of a layer's."""

    volume: VolumeRecord | None
    """``None`` if no volume's name leads to that layer."""
    layer: LayerId
    offset: int
    end: int
    digest: Digest
    """The chunk or page that it would take."""


def sealed_roots(catalog: Catalog) -> dict[LayerId, Digest]:
    """The map roots of all sealed layers. A record that cannot be read has none; ``check`` says so."""
    return {
        LayerId(layer): Digest(bytes.fromhex(found.record.sealed.root))
        for layer, found in catalog.list(LayerRecord, skip_damaged=True)
        if found.record.sealed is not None
    }


def unreadable_packs(store: ChunkStore, pulse: Callable[[], None]) -> set[PackId]:
    """Packs whose heads are damaged, also those that our index knows from before: others find nothing in them."""
    unreadable = set(store.damaged_packs)
    for pack in store.packs():
        pulse()
        try:
            store.index(pack)
        except ObjectDamaged:
            unreadable.add(pack)
        except ObjectMissing:
            continue  # it was collected as garbage meanwhile
    return unreadable


def find_lost(
    catalog: Catalog, store: ChunkStore, pulse: Callable[[], None], without: Set[PackId] = frozenset()
) -> dict[Digest, str]:
    """Every page and chunk that some sealed layer needs and nobody can read, with why. Refresh the store before.

    As if the packs ``without`` were gone; but what lies only in those is gone through as long as it can be read.
    """
    damage = {
        (found.record.pack, bytes.fromhex(digest))
        for _, found in catalog.list(DamageRecord, skip_damaged=True)
        for digest in found.record.digests
    }
    lost: dict[Digest, str] = {}
    seen: set[Digest] = set()

    def go_through(digest: Digest, level: int) -> None:
        if digest in seen:
            return
        seen.add(digest)
        pulse()
        try:
            if level == 0:
                look_up(digest, decode_leaf(read(digest)))
                return
            below = _children(digest, read(digest), level)
        except UNREADABLE as error:
            lost[digest] = str(error)
            return
        for _, child in below:
            go_through(child, level - 1)

    def read(digest: Digest) -> bytes:
        page = store.read(digest)
        if without and all(place.pack in without for place in store.cache.find([digest])[0]):
            lost[digest] = f"map page {digest.hex()} lies in a damaged pack"
        return page

    def look_up(leaf: Digest, extents: list[Extent]) -> None:
        for extent, known in zip(extents, store.cache.find([extent.digest for extent in extents]), strict=True):
            places = [place for place in known if place.pack not in without]
            whole = [place for place in places if (place.pack, extent.digest) not in damage]
            if not places:
                lost[extent.digest] = f"chunk {extent.digest.hex()} is in no pack"
            elif not whole:
                lost[extent.digest] = f"chunk {extent.digest.hex()} is damaged in pack {min(places).pack}"
            elif any(place.raw_bytes < (extent.inner + extent.count) * SECTOR_BYTES for place in whole):
                lost[leaf] = f"map page {leaf.hex()} says more of chunk {extent.digest.hex()} than there is"

    for root in sealed_roots(catalog).values():
        go_through(root, ROOT_LEVEL)
    return lost


def holders(
    catalog: Catalog, store: ChunkStore, lost: Mapping[Digest, object], pulse: Callable[[], None]
) -> Iterator[Held]:
    """Where the ``lost`` pages and chunks belong; volumes in the order of their names, then layers without one.

    Descends only into pages that lead to something lost.
    """
    tainted: dict[Digest, bool] = {}

    def leads_to_lost(digest: Digest, level: int) -> bool:
        if digest not in tainted:
            pulse()
            if digest in lost:
                tainted[digest] = True
            elif level == 0:
                tainted[digest] = any(extent.digest in lost for extent in decode_leaf(store.page(digest)))
            else:
                below = _children(digest, store.page(digest), level)
                tainted[digest] = any(leads_to_lost(child, level - 1) for _, child in below)
        return tainted[digest]

    def runs(digest: Digest, level: int, region: int) -> Iterator[tuple[int, int, Digest]]:
        if not leads_to_lost(digest, level):
            return
        start = region * REGION_BYTES
        if digest in lost:
            yield start, start + (REGION_BYTES << level * SLOT_BITS), digest
        elif level == 0:
            for extent in decode_leaf(store.page(digest)):
                if extent.digest in lost:
                    yield start + extent.first * SECTOR_BYTES, start + extent.end * SECTOR_BYTES, extent.digest
        else:
            for slot, child in _children(digest, store.page(digest), level):
                yield from runs(child, level - 1, region + (slot << (level - 1) * SLOT_BITS))

    roots = sealed_roots(catalog)
    held: set[LayerId] = set()
    for found in sorted(catalog.volumes(), key=lambda found: str(found.record.name)):
        layer, limit = _sealed_under(catalog, found.record)
        if layer is not None and layer in roots:
            held.add(layer)
            for offset, end, digest in runs(roots[layer], ROOT_LEVEL, 0):
                if offset < limit:
                    yield Held(found.record, layer, offset, min(end, limit), digest)
    for layer in sorted(roots.keys() - held):
        for offset, end, digest in runs(roots[layer], ROOT_LEVEL, 0):
            yield Held(None, layer, offset, end, digest)


def _children(digest: Digest, page: bytes, level: int) -> list[tuple[int, Digest]]:
    found, slots = decode_node(page)
    if found != level:
        raise ObjectDamaged(f"map page {digest.hex()} is of level {found} where one of level {level} belongs")
    return [(slot.slot, slot.digest) for slot in slots]


def _sealed_under(catalog: Catalog, volume: VolumeRecord) -> tuple[LayerId | None, int]:
    """The sealed layer at the end of the volume's chain, and how many of its bytes the volume can show."""
    limit, seen = volume.size, set[LayerId]()
    following: LayerId | None = volume.layer
    visible = volume.visible
    while following is not None and following not in seen:
        seen.add(following)
        found = catalog.get(LayerRecord, following)
        if found is None:
            break
        if found.record.sealed is not None:
            return following, limit
        limit = min(limit, visible, found.record.parent_visible)
        visible = limit
        following = found.record.reads_parent
    return None, limit
