"""What of each pack is needed: garbage collection decides by it, accounts add it up. Pure, over the packs' indexes.

What lies in several packs is needed in one of them only. Which one is, follows from the packs alone, so that everybody
decides alike: of the copies that are not known to be damaged, before those that are; of those, one in a pack that is
not condemned, before one in a pack that is; of those, the one in the pack with the lowest id.

Memory: 4 bytes a marked digest and 1 byte an entry of the packs, beside one pack's index at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from archipfs.map.marking import Mask, Prefixes, look_up, prefixes
from archipfs.map.packs import PackIndex
from archipfs.types import Digest, PackId

_NOBODY = -1
_Numbers = numpy.ndarray[Any, numpy.dtype[numpy.int32]]


@dataclass(slots=True)
class PackUse:
    """What of one pack is needed. Bytes are as stored."""

    pack: PackId
    node: str
    created_ns: int
    total_bytes: int
    """The whole object."""
    entry_bytes: int
    """What lies in it, without its head."""
    live: Mask
    """For each entry whether it is needed, here."""
    live_bytes: int
    damaged: bool
    """Whether something in it is known to be damaged, needed or not."""

    @property
    def dead(self) -> bool:
        return self.live_bytes == 0


def take_census(
    packs: Iterable[PackId],
    condemned: Collection[PackId],
    damage: Mapping[PackId, Set[Digest]],
    marks: Prefixes,
    index_of: Callable[[PackId], PackIndex | None],
) -> dict[PackId, PackUse]:
    """What of each of ``packs`` is needed, if what is marked is. ``marks`` are sorted prefixes of digests.

    ``damage``: what is known to be damaged, by pack. ``index_of`` is asked once for each pack, and again for a pack
    that has copies of what others have; ``None`` leaves a pack out. What it raises goes through.
    """
    order = sorted(packs, key=lambda pack: (pack in condemned, pack))
    uses: list[PackUse] = []
    holder = numpy.full(len(marks), _NOBODY, numpy.int32)
    """By mark, the number of the pack whose whole copy counts."""
    contested: list[_Contested] = []
    for pack in order:
        index = index_of(pack)
        if index is None:
            continue
        number, entries = len(uses), index.entries
        bad = damage.get(pack, frozenset())
        marked, places = look_up(marks, prefixes(entry.digest for entry in entries))
        whole = numpy.fromiter((entry.digest not in bad for entry in entries), numpy.bool_, len(entries))
        stored = numpy.fromiter((entry.stored_bytes for entry in entries), numpy.int64, len(entries))
        live = marked & whole
        live[live] = holder[places[live]] == _NOBODY
        holder[places[live]] = number
        uses.append(
            PackUse(
                pack=pack,
                node=index.node,
                created_ns=index.created_ns,
                total_bytes=index.total_bytes,
                entry_bytes=int(stored.sum()),
                live=live,
                live_bytes=int(stored[live].sum()),
                damaged=bool(bad),
            )
        )
        contested += (
            _Contested(
                number,
                int(entry),
                int(places[entry]),
                entries[entry].digest,
                entries[entry].stored_bytes,
                bool(whole[entry]),
            )
            for entry in numpy.flatnonzero(marked & ~live)
        )
    counted = [use.pack for use in uses]
    for each in _without_better_copy(contested, counted, holder, damage, index_of):
        uses[each.pack].live[each.entry] = True
        uses[each.pack].live_bytes += each.stored_bytes
    return {use.pack: use for use in uses}


class _Contested(NamedTuple):
    """A marked entry that is damaged, or has the prefix of one that an earlier pack holds. Packs by number."""

    pack: int
    entry: int
    mark: int
    digest: Digest
    stored_bytes: int
    whole: bool


def _without_better_copy(
    contested: list[_Contested],
    packs: list[PackId],
    holder: _Numbers,
    damage: Mapping[PackId, Set[Digest]],
    index_of: Callable[[PackId], PackIndex | None],
) -> Collection[_Contested]:
    """The best copy of each digest that the pack holding its mark has no whole copy of: only the first bytes are the
    same there, or no pack holds the mark, since every copy is damaged."""
    by_holder: dict[int, list[_Contested]] = defaultdict(list)
    for each in contested:
        by_holder[int(holder[each.mark])].append(each)
    best: dict[Digest, _Contested] = {}
    for number, waiting in by_holder.items():
        held: Set[Digest] = frozenset()
        if number != _NOBODY and (index := index_of(packs[number])) is not None:
            held = {entry.digest for entry in index.entries} - damage.get(packs[number], frozenset())
        for each in waiting:
            if each.digest in held:
                continue
            known = best.setdefault(each.digest, each)
            if (not each.whole, each.pack) < (not known.whole, known.pack):
                best[each.digest] = each
    return best.values()
