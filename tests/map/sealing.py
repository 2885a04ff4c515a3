"""Layers sealed by hand, by the protocol of docs/architecture.md, "Seal", and what a reader finds in them."""

import random
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from archipfs.blockers.contract import Blocker
from archipfs.errors import Conflict
from archipfs.map.cache import Cache
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import ChunkStore, Swept, pack_key
from archipfs.map.gc import Collector
from archipfs.map.hashes import content_hash
from archipfs.map.packs import PackBuilder
from archipfs.map.pages import Extent, decode_leaf, encode_leaf
from archipfs.map.records import LayerRecord, Sealed
from archipfs.map.tree import Tree, updated
from archipfs.types import REGION_SECTORS, SECTOR_BYTES, Digest, LayerId, PackId, new_layer_id

NODE = "1" * 32
OTHER_NODE = "2" * 32
CACHE_BYTES = 1 << 20

Content = Mapping[int, list[int]]
"""By region the chunks in it, each by the number that its bytes follow from, one behind the other."""


def chunk_of(number: int) -> bytes:
    """One to four sectors that no other number has."""
    return random.Random(number).randbytes(SECTOR_BYTES * (1 + number % 4))


@dataclass(slots=True)
class Sealer:
    """One process's view of a store, with a cache of its own."""

    blocker: Blocker
    store: ChunkStore
    node: str = NODE
    catalog: Catalog = field(init=False)

    def __post_init__(self) -> None:
        self.catalog = Catalog(self.blocker)

    def collector(self, *, intent_seconds: float = 0.0) -> Collector:
        return Collector(self.catalog, self.blocker, self.store, self.node, intent_seconds=intent_seconds)

    def new_layer(self, parent: LayerId | None = None) -> LayerId:
        record = LayerRecord(new_layer_id(), parent, 0, self.node, time.time_ns())
        self.catalog.put(record, record.id, None)
        return record.id

    def seal(self, content: Content, *, layer: LayerId | None = None, base: Digest | None = None) -> LayerId:
        """Give a layer that content, on top of ``base``; as often as it takes."""
        layer = layer or self.new_layer()
        while not self._try_seal(layer, content, base):
            continue
        return layer

    def _try_seal(self, layer: LayerId, content: Content, base: Digest | None) -> bool:
        digest_bytes = self.store.hash.digest_bytes
        with self.store.session() as session:
            leaves: dict[int, Digest | None] = {}
            for region, numbers in content.items():
                extents, first = [], 0
                for number in numbers:
                    data = chunk_of(number)
                    digest = self.store.hash.digest(data)
                    session.add_chunk(digest, data)
                    extents.append(Extent(first, len(data) // SECTOR_BYTES, digest, 0))
                    first += len(data) // SECTOR_BYTES
                assert first <= REGION_SECTORS
                leaves[region] = session.add_page(encode_leaf(extents, digest_bytes)) if extents else None
            root = updated(self.store.page, session.add_page, base, leaves, digest_bytes)
            session.flush()
            found = self.catalog.layer(layer)
            try:
                intent = self.catalog.put(
                    msgspec.structs.replace(found.record, sealing=secrets.token_hex(8)), layer, found.version
                )
                session.verify()
                sealed = Sealed(root.hex(), 0, session.added_bytes)
                self.catalog.put(
                    msgspec.structs.replace(intent.record, sealed=sealed, sealing=None), layer, intent.version
                )
            except Swept:
                with suppress(Conflict):
                    self.catalog.put(msgspec.structs.replace(intent.record, sealing=None), layer, intent.version)
                return False
            except Conflict:
                return False
            return True

    def copy_pack(self, pack: PackId) -> PackId:
        """Another pack with the same content, as two nodes make them that seal the same at the same time."""
        index = self.store.index(pack)
        builder = PackBuilder(self.store.hash.digest_bytes, self.node, index.created_ns + 1)
        for entry in index.entries:
            stored = self.blocker.get(pack_key(pack), entry.offset, entry.stored_bytes)
            builder.add(entry.digest, entry.kind, entry.coding, entry.raw_bytes, stored)
        copy, data = builder.build()
        self.blocker.put(pack_key(copy), data)
        return copy

    def root(self, layer: LayerId) -> Digest:
        sealed = self.catalog.layer(layer).record.sealed
        assert sealed is not None
        return Digest(bytes.fromhex(sealed.root))

    def drop(self, layer: LayerId) -> None:
        """As reclaim does, for a layer without objects."""
        self.catalog.delete(LayerRecord, layer, self.catalog.layer(layer).version)

    def content(self, layer: LayerId) -> dict[int, list[bytes]]:
        """By region the bytes of its chunks; all of them are read and hashed."""
        return {
            region: [self.store.read(extent.digest) for extent in decode_leaf(self.store.page(leaf))]
            for region, leaf in Tree(self.store.page, self.root(layer)).regions()
        }


def expected(content: Content) -> dict[int, list[bytes]]:
    return {region: [chunk_of(number) for number in numbers] for region, numbers in content.items() if numbers}


@contextmanager
def sealer(
    blocker: Blocker, directory: Path, *, node: str = NODE, hash_name: str = "blake3", compression: str = "none"
) -> Iterator[Sealer]:
    """A process with an empty cache in ``directory``, or the one that was left there."""
    with Cache(directory, pages_bytes_max=CACHE_BYTES, regions_bytes_max=CACHE_BYTES) as cache:
        yield Sealer(
            blocker,
            ChunkStore(blocker, cache, content_hash(hash_name), node=node, compression=compression),
            node,
        )
