"""Maps as trees: from the number of a region to the digest of its leaf page.

Pages are called by their digests, so equal subtrees are equal digests and are passed over unread: to compare or to
change a map costs what differs, not what there is. A region's number is its path, eight bits a level:

    region = 2**16 × slot at level 3 + 2**8 × slot at level 2 + slot at level 1

``fetch`` returns the page of a digest, verified; what it raises goes through. A page that is not what its place calls
for is ``ObjectDamaged``. Pure: no I/O but ``fetch`` and ``store``.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby

from archipfs.errors import ObjectDamaged
from archipfs.map.pages import FANOUT, ROOT_LEVEL, SLOT_BITS, Slot, decode_node, encode_node, find_slot, level_of
from archipfs.types import Digest

REGIONS_MAX = 1 << ROOT_LEVEL * SLOT_BITS
"""64 TiB."""

Fetch = Callable[[Digest], bytes]


class Tree:
    """A map, by its root page; ``None`` is the map without pages, where all is holes."""

    def __init__(self, fetch: Fetch, root: Digest | None) -> None:
        self._fetch = fetch
        self._root = root

    def leaf(self, region: int) -> Digest | None:
        """The leaf page of a region, ``None`` if that is one hole."""
        assert 0 <= region < REGIONS_MAX
        digest = self._root
        for level in range(ROOT_LEVEL, 0, -1):
            if digest is None:
                return None
            found, below = find_slot(self._fetch(digest), _slot(region, level))
            _expect(digest, found, level)
            digest = below
        return digest

    def regions(self, first: int = 0) -> Iterator[tuple[int, Digest]]:
        """The regions that are not holes and their leaf pages, in order, from the region ``first`` on."""
        return self._regions(self._root, ROOT_LEVEL, 0, first)

    def _regions(self, digest: Digest | None, level: int, base: int, first: int) -> Iterator[tuple[int, Digest]]:
        for slot, below in _slots(self._fetch, digest, level).items():
            region = base + slot * _span(level)
            if region + _span(level) <= first:
                continue
            if level == 1:
                yield region, below
            else:
                yield from self._regions(below, level - 1, region, first)

    def pages(self, seen: set[Digest]) -> Iterator[tuple[Digest, bytes]]:
        """Every page once, each before those it leads to. What is in ``seen`` is passed over with all below it; what is
        yielded gets into it, so that with one set several maps are gone through as one."""
        if self._root is not None:
            yield from self._pages(self._root, ROOT_LEVEL, seen)

    def _pages(self, digest: Digest, level: int, seen: set[Digest]) -> Iterator[tuple[Digest, bytes]]:
        if digest in seen:
            return
        page = self._fetch(digest)
        below = _decoded(digest, page, level).values() if level > 0 else _leaf(digest, page)
        seen.add(digest)
        yield digest, page
        for child in below:
            yield from self._pages(child, level - 1, seen)


def updated(
    fetch: Fetch,
    store: Callable[[bytes], Digest],
    root: Digest | None,
    leaves: Mapping[int, Digest | None],
    digest_bytes: int,
) -> Digest:
    """The root of the map in which the regions in ``leaves`` have these leaf pages; ``None``: they are holes.

    Pages above the leaves that change are given to ``store``, each after those it leads to. What does not change is
    neither read nor stored, but for the pages above a region in ``leaves``.
    """

    def changed(digest: Digest | None, level: int, regions: list[int]) -> Digest | None:
        before = _slots(fetch, digest, level)
        after = dict(before)
        for slot, group in groupby(regions, key=lambda region: _slot(region, level)):
            of_slot = list(group)
            below = leaves[of_slot[0]] if level == 1 else changed(before.get(slot), level - 1, of_slot)
            if below is None:
                after.pop(slot, None)
            else:
                after[slot] = below
        if after == before and digest is not None:
            return digest
        if not after and level < ROOT_LEVEL:
            return None
        return store(encode_node(level, [Slot(slot, after[slot]) for slot in sorted(after)], digest_bytes))

    regions = sorted(leaves)
    assert not regions or (regions[0] >= 0 and regions[-1] < REGIONS_MAX)
    made = changed(root, ROOT_LEVEL, regions)
    assert made is not None
    return made


def differing(fetch: Fetch, one: Digest | None, other: Digest | None) -> Iterator[int]:
    """The regions whose leaf pages differ between two maps, in order. Equal subtrees are not read."""
    return (region for region, _, _ in differing_leaves(fetch, one, other))


def differing_leaves(
    fetch: Fetch, one: Digest | None, other: Digest | None
) -> Iterator[tuple[int, Digest | None, Digest | None]]:
    """As ``differing``, with the leaf page of either map; ``None`` where that one has a hole."""
    return _differing(fetch, one, other, ROOT_LEVEL, 0)


def _differing(
    fetch: Fetch, one: Digest | None, other: Digest | None, level: int, base: int
) -> Iterator[tuple[int, Digest | None, Digest | None]]:
    if one == other:
        return
    if level == 0:
        yield base, one, other
        return
    mine = _slots(fetch, one, level)
    theirs = _slots(fetch, other, level)
    for slot in sorted(mine.keys() | theirs.keys()):
        yield from _differing(fetch, mine.get(slot), theirs.get(slot), level - 1, base + slot * _span(level))


def _span(level: int) -> int:
    """How many regions one slot of a page of that level stands for."""
    return 1 << (level - 1) * SLOT_BITS


def _slot(region: int, level: int) -> int:
    return region // _span(level) % FANOUT


def _slots(fetch: Fetch, digest: Digest | None, level: int) -> dict[int, Digest]:
    """Where the page leads to, in order; nowhere if there is none."""
    return {} if digest is None else _decoded(digest, fetch(digest), level)


def _decoded(digest: Digest, page: bytes, level: int) -> dict[int, Digest]:
    found, slots = decode_node(page)
    _expect(digest, found, level)
    return {slot.slot: slot.digest for slot in slots}


def _leaf(digest: Digest, page: bytes) -> tuple[()]:
    """Leads to no page."""
    _expect(digest, level_of(page), 0)
    return ()


def _expect(digest: Digest, found: int, level: int) -> None:
    if found != level:
        raise ObjectDamaged(
            f"map page {digest.hex()} is of level {found} where one of level {level} belongs; "
            "restore it from a copy of the store"
        )
