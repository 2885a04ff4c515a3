"""Whose the space is: what a volume has for itself, what it shares, what the whole store holds and could give back.

A chunk or page belongs to a map alone if no other map leads to it. To find out, each map is gone through until it meets
a page that an earlier one has; what lies below such a page is shared, and is gone through once more to say so. So each
distinct page is read twice at most, however many snapshots have it.

An account is remembered until a map or a pack comes or goes. Making it takes half a second for 4 GiB of chunks, and
60 ms when the packs were looked at before: 15 µs a reading of a page, 3 µs an entry of a new pack. Memory: 32 bytes an
entry of the packs, which is kept; 40 bytes a distinct chunk and 150 a distinct page while it is made. Beyond
``LEAVES_MAX`` there is none.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy

from archipfs.blockers.contract import Blocker
from archipfs.errors import ObjectMissing
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import ChunkStore
from archipfs.map.marking import Marks, Prefixes, look_up, prefixes
from archipfs.map.packs import Kind
from archipfs.map.pages import ROOT_LEVEL, leaf_digests, level_of, node_digests
from archipfs.map.reclaim import reachable
from archipfs.map.records import LayerRecord, VolumeRecord
from archipfs.map.tree import Fetch, Tree
from archipfs.types import Digest, LayerId, PackId, VolumeId

LEAVES_MAX = 1 << 15
"""Of distinct map pages, 4 MiB of a volume each; about four million chunks."""

_SHARED = -1
_Numbers = numpy.ndarray[Any, numpy.dtype[numpy.int64]]
_Sizes32 = numpy.ndarray[Any, numpy.dtype[numpy.uint32]]


@dataclass(frozen=True, slots=True)
class Account:
    """What the maps of a store have. All bytes are as stored unless it says otherwise."""

    exclusive: Mapping[Digest, int]
    """By root, what no other of the roots leads to."""
    unique_bytes: int
    """Chunks that some root leads to, each once, uncompressed."""
    chunk_bytes: int
    """The same as stored."""
    live_bytes: int
    """The same with the map pages."""
    pack_bytes: int
    """All packs."""
    reclaimable_bytes: int
    """What in packs no root leads to, and second copies: garbage collection frees it, sooner or later."""


@dataclass(frozen=True, slots=True)
class VolumeSpace:
    exclusive_bytes: int
    """What removing the volume would free, once garbage is collected."""
    shared_bytes: int
    """What it reads and others too."""


# Maps


class _Sizes:
    """What each digest takes, by its prefix; second copies left out."""

    def __init__(self, packs: Sequence[tuple[Prefixes, _Sizes32, _Sizes32]]) -> None:
        """By pack: digests, stored bytes, raw bytes (0 for pages)."""
        nothing = numpy.empty(0, numpy.uint32)
        together = numpy.concatenate([numpy.empty(0, numpy.uint64), *(pack[0] for pack in packs)])
        self.prefixes, first = numpy.unique(together, return_index=True)
        self.stored = numpy.concatenate([nothing, *(pack[1] for pack in packs)])[first]
        self.raw = numpy.concatenate([nothing, *(pack[2] for pack in packs)])[first]

    def sums(self, some: Prefixes) -> tuple[int, int, int]:
        """Of digests, each given once: stored bytes, raw bytes of the chunks, stored bytes of the chunks."""
        known, places = look_up(self.prefixes, some)
        found = places[known]
        stored, raw = self.stored[found], self.raw[found]
        return (
            int(stored.sum(dtype=numpy.int64)),
            int(raw.sum(dtype=numpy.int64)),
            int(stored[raw > 0].sum(dtype=numpy.int64)),
        )


def owners(
    fetch: Fetch, roots: Iterable[Digest], leaves_max: int
) -> tuple[dict[Digest, int], dict[Digest, int]] | None:
    """For each page above the leaves, and for each leaf, the number of the root that alone leads to it, or -1.

    ``None`` if there are more leaves than ``leaves_max``.
    """
    above: dict[Digest, int] = {}
    leaves: dict[Digest, int] = {}

    def go_through(digest: Digest, level: int, owner: int) -> bool:
        known = above if level else leaves
        before = known.get(digest)
        if before in (owner, _SHARED):
            return True
        number = owner if before is None else _SHARED
        known[digest] = number
        if level == 0:
            return len(leaves) <= leaves_max
        return all(go_through(child, level - 1, number) for child in node_digests(fetch(digest)))

    for number, root in enumerate(roots):
        if not go_through(root, ROOT_LEVEL, number):
            return None
    return above, leaves


class Accountant:
    """Keeps the account of one backend. Thread-safe."""

    def __init__(self, store: ChunkStore, leaves_max: int = LEAVES_MAX) -> None:
        self._store = store
        self._leaves_max = leaves_max
        self._mutex = threading.Lock()
        self._packs: dict[PackId, tuple[Prefixes, _Sizes32, _Sizes32]] = {}
        self._sizes = _Sizes([])
        self._reach: dict[Digest, int] = {}
        self._made_for: tuple[frozenset[Digest], frozenset[PackId]] | None = None
        self._account: Account | None = None

    def account(self, roots: Set[Digest]) -> Account | None:
        """What these maps have in the store; ``None`` if they are too many pages to count.

        Raises ``ObjectMissing`` or ``ObjectDamaged`` for a page that cannot be read.
        """
        with self._mutex:
            if self._made_for != (frozenset(roots), frozenset(self._store.packs())):
                self._store.refresh()
                packs = self._store.packs()
                self._account = self._make(sorted(roots), packs)
                self._made_for = frozenset(roots), frozenset(packs)
            return self._account

    def _make(self, roots: list[Digest], packs: set[PackId]) -> Account | None:
        self._reach.clear()
        found = owners(self._store.page, roots, self._leaves_max)
        if found is None:
            return None
        above, leaves = found
        sizes = self._sizes = self._add_up(packs)
        digests = [prefixes([*above, *leaves])]
        owner = [numpy.fromiter((*above.values(), *leaves.values()), numpy.int64, len(above) + len(leaves))]
        for leaf, number in leaves.items():
            digests.append(leaf_digests(self._store.page(leaf)))
            owner.append(numpy.full(len(digests[-1]), number, numpy.int64))
        every, alone = _owned_alone(numpy.concatenate(digests), numpy.concatenate(owner))
        live_bytes, unique_bytes, chunk_bytes = sizes.sums(every)
        return Account(
            exclusive={root: sizes.sums(every[alone == number])[0] for number, root in enumerate(roots)},
            unique_bytes=unique_bytes,
            chunk_bytes=chunk_bytes,
            live_bytes=live_bytes,
            pack_bytes=sum(self._store.cache.pack_bytes(pack) or 0 for pack in packs),
            reclaimable_bytes=sum(int(stored.sum(dtype=numpy.int64)) for _, stored, _ in self._packs.values())
            - live_bytes,
        )

    def _add_up(self, packs: set[PackId]) -> _Sizes:
        for pack in self._packs.keys() - packs:
            del self._packs[pack]
        for pack in packs - self._packs.keys():
            entries = self._store.index(pack).entries
            self._packs[pack] = (
                prefixes(entry.digest for entry in entries),
                numpy.fromiter((entry.stored_bytes for entry in entries), numpy.uint32, len(entries)),
                numpy.fromiter(
                    (entry.raw_bytes if entry.kind is Kind.CHUNK else 0 for entry in entries),
                    numpy.uint32,
                    len(entries),
                ),
            )
        return _Sizes(list(self._packs.values()))

    def reach(self, root: Digest) -> int:
        """All that a map leads to, as stored; one of those last accounted for. Reads its pages, the first time."""
        with self._mutex:
            if root not in self._reach:
                marks = Marks()
                pages: list[Digest] = []
                for digest, page in Tree(self._store.page, root).pages(set()):
                    pages.append(digest)
                    if level_of(page) == 0:
                        marks.add(leaf_digests(page))
                marks.add(prefixes(pages))
                self._reach[root] = self._sizes.sums(marks.sorted())[0]
            return self._reach[root]


def _owned_alone(digests: Prefixes, owner: _Numbers) -> tuple[Prefixes, _Numbers]:
    """Each digest once, and its only owner, or -1."""
    if not len(digests):
        return digests, owner
    order = numpy.argsort(digests)
    digests, owner = digests[order], owner[order]
    starts = numpy.flatnonzero(numpy.concatenate([[True], digests[1:] != digests[:-1]]))
    least, most = numpy.minimum.reduceat(owner, starts), numpy.maximum.reduceat(owner, starts)
    return digests[starts], numpy.where(least == most, least, _SHARED)


# Volumes


@dataclass(frozen=True, slots=True)
class Stack:
    """What a volume is made of."""

    unsealed: tuple[LayerId, ...]
    sealed: LayerId | None
    """Where its chain ends."""


def stacks(volumes: Iterable[VolumeRecord], layers: Mapping[LayerId, LayerRecord]) -> dict[VolumeId, Stack]:
    """By volume what it reads, as far as there are records of it. Pure."""
    found = {}
    for volume in volumes:
        chain = [layer for layer in reachable({volume.layer}, layers) if layer in layers]
        sealed = [layer for layer in chain if layers[layer].sealed is not None]
        unsealed = tuple(layer for layer in chain if layers[layer].sealed is None)
        found[volume.id] = Stack(unsealed, sealed[0] if sealed else None)
    return found


class Space:
    """The space of one backend's volumes, as its records were at one time."""

    def __init__(self, catalog: Catalog, blocker: Blocker, accountant: Callable[[], Accountant]) -> None:
        """``accountant`` is called when something is sealed: without that, no index has to be opened."""
        self._blocker = blocker
        layers = {LayerId(layer): found.record for layer, found in catalog.list(LayerRecord, skip_damaged=True)}
        self._volumes = [found.record for found in catalog.volumes()]
        self._stacks = stacks(self._volumes, layers)
        self._sealed = {layer: record.sealed for layer, record in layers.items() if record.sealed is not None}
        self._readers = Counter(layer for stack in self._stacks.values() for layer in stack.unsealed)
        self._readers_of_root = Counter(
            self._root(stack.sealed) for stack in self._stacks.values() if stack.sealed is not None
        )
        self._accountant = accountant() if self._readers_of_root else None

    def of_volume(self, volume: VolumeRecord) -> VolumeSpace | None:
        """``None`` if there are too many pages to count. Raises ``ObjectMissing``, ``ObjectDamaged``."""
        stack = self._stacks.get(volume.id)
        if stack is None:
            return VolumeSpace(0, 0)  # it has just been removed
        own = sum(self._allocated(layer) for layer in stack.unsealed if self._readers[layer] == 1)
        shared = sum(self._allocated(layer) for layer in stack.unsealed if self._readers[layer] > 1)
        if stack.sealed is not None and self._accountant is not None:
            root = self._root(stack.sealed)
            account = self._accountant.account(self._readers_of_root.keys())
            if account is None:
                return None
            alone = account.exclusive[root] if self._readers_of_root[root] == 1 else 0
            own += alone
            shared += self._accountant.reach(root) - alone
        return VolumeSpace(own, shared)

    def account(self) -> Account | None:
        """Of all that is sealed and some volume reads; ``None`` as for ``of_volume``."""
        if self._accountant is None:
            return Account({}, 0, 0, 0, 0, 0)
        return self._accountant.account(self._readers_of_root.keys())

    @property
    def sealed_bytes(self) -> int:
        """What is sealed of all volumes and snapshots, without holes, as if nothing were shared."""
        return sum(self._sealed[stack.sealed].data_bytes for stack in self._stacks.values() if stack.sealed is not None)

    @property
    def unsealed_bytes(self) -> int:
        """What the layers take that are not sealed."""
        return sum(self._allocated(layer) for layer in self._readers)

    def _root(self, layer: LayerId) -> Digest:
        return Digest(bytes.fromhex(self._sealed[layer].root))

    def _allocated(self, layer: LayerId) -> int:
        try:
            data = self._blocker.open_data(f"layer/{layer}", writable=False)
        except ObjectMissing:
            return 0  # it has just been sealed, or is gone
        with closing(data):
            return data.allocated()
