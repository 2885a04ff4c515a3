"""Which layers are sealed, in which order, and how one of them is read for it.

A layer may be sealed once it is durable and nobody writes it any more. That is so of every layer below a snapshot's
name, since the name was given last (docs/architecture.md, "Snapshot"), and of every layer below the head of a volume
that we own and have just flushed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from archipfs.compose.engine import EngineLayer, EngineVolume
from archipfs.compose.layers import open_durable_chain
from archipfs.compose.sealed import SealedStore
from archipfs.errors import ObjectMissing
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import Session, Swept
from archipfs.map.commit import commit_sealed
from archipfs.map.mapper import Mapper, data_key
from archipfs.map.records import LayerRecord, Sealed, VolumeRecord
from archipfs.map.seal import Map, Reader, build_map
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX, Digest, LayerId, sectors_of

Progress = Callable[[int, int], None]
"""Told how many bytes were read, and of how many about, in the thread that seals; what it raises ends the sealing."""


def unheeded(done: int, total: int) -> None:
    """For those whom nobody asks how far they are."""


class Advance:
    """How far a sealing is that goes through several layers."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self.read_bytes = 0
        self._progress = progress
        self._total_bytes = total_bytes

    def __call__(self, more_bytes: int) -> None:
        self.read_bytes += more_bytes
        self._progress(self.read_bytes, max(self.read_bytes, self._total_bytes))


@dataclass(frozen=True, slots=True)
class SealedVolume:
    """What sealing a volume has done."""

    layers: int
    """How many layers got a map."""
    read_bytes: int
    added_bytes: int
    """What that took in the store."""


def layers_to_seal(catalog: Catalog, target: LayerId) -> list[LayerId]:
    """The unsealed layers from ``target`` down that get a map of their own, the lowest first; ``target`` is the last.

    Those that no volume leads to, and that only one layer lies on, are merged into the one above.
    """
    unsealed = [record.id for record in catalog.chain(target) if record.sealed is None]
    if len(unsealed) < 2:
        return unsealed
    layers = [found.record for _, found in catalog.list(LayerRecord, skip_damaged=True)]
    children = Counter(record.reads_parent for record in layers)
    named = {found.record.layer for _, found in catalog.list(VolumeRecord, skip_damaged=True)}
    return [layer for layer in reversed(unsealed) if layer == target or layer in named or children[layer] > 1]


def bytes_to_seal(mapper: Mapper, target: LayerId) -> int:
    """About how much there is to read: what the unsealed layers from ``target`` down take in the store."""
    unsealed = [record.id for record in mapper.catalog.chain(target) if record.sealed is None]
    return sum(stored_bytes(mapper, layer) for layer in unsealed)


def stored_bytes(mapper: Mapper, layer: LayerId) -> int:
    """What the layer's data object takes in the store; nothing if it has none."""
    try:
        data = mapper.blocker.open_data(data_key(layer), writable=False)
    except ObjectMissing:
        return 0  # it was sealed just now
    try:
        return data.allocated()
    finally:
        data.close()


def seal_layer(
    mapper: Mapper, store: SealedStore, layer: LayerId, *, threads: int, advance: Callable[[int], None]
) -> LayerRecord:
    """Give the layer a map of all that it shows. Returns its record; it may have been sealed already.

    Its objects, and engines that have it open, are the caller's to take care of. Raises ``NotFound`` if the layer is
    gone, since nobody needs it any more. What was stored before an error is found again by whoever seals it next.
    """
    while True:
        with reading_chain(mapper, store, layer) as (chain, engine):
            record, base = chain[0], chain[-1] if chain[-1].sealed is not None else None
            if record.sealed is not None:
                return record
            reader = ChainReader(engine, base.id if base is not None else None)
            with suppress(Swept), _mapped(mapper, store, reader, VOLUME_BYTES_MAX, base, threads, advance) as stored:
                return commit_sealed(mapper.catalog, record, base, *stored)


@contextmanager
def import_layer(
    mapper: Mapper,
    store: SealedStore,
    reader: Reader,
    size: int,
    threads: int,
    advance: Callable[[int], None],
) -> Iterator[LayerRecord]:
    """A sealed layer of what ``reader`` shows. Until the end of the block it counts as used although no record names
    it yet."""
    end = sectors_of(size) * SECTOR_BYTES
    while True:
        with _mapped(mapper, store, reader, end, None, threads, advance) as stored, mapper.bare_layer() as record:
            try:
                sealed = commit_sealed(mapper.catalog, record, None, *stored)
            except Swept:
                continue
            yield sealed
            return


@contextmanager
def _mapped(
    mapper: Mapper,
    store: SealedStore,
    reader: Reader,
    end: int,
    base: LayerRecord | None,
    threads: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[Sealed, Session]]:
    """A map of what ``reader`` shows, durable, and the session that has it in hand until it is committed."""
    chunks = store.chunks
    with chunks.session() as session:
        bits = mask_bits(mapper)
        made = build_map(reader, end, map_of(base), chunks, session, mask_bits=bits, threads=threads, progress=advance)
        session.flush()
        yield Sealed(made.root.hex(), made.data_bytes, session.added_bytes), session


def map_of(record: LayerRecord | None) -> Map | None:
    if record is None or record.sealed is None:
        return None
    return Map(Digest(bytes.fromhex(record.sealed.root)), record.sealed.data_bytes)


def mask_bits(mapper: Mapper) -> int:
    """How the chunker is told the average that the backend has, which is a power of two."""
    return mapper.store.chunk_sectors.bit_length() - 1


@contextmanager
def reading_chain(
    mapper: Mapper, store: SealedStore, layer: LayerId
) -> Iterator[tuple[list[LayerRecord], EngineVolume]]:
    """The chain from ``layer`` on, which ends at its nearest sealed layer, and its bytes, durable as they are."""

    def open_chain(chain: Sequence[LayerRecord]) -> tuple[list[LayerRecord], list[EngineLayer]]:
        return list(chain), open_durable_chain(mapper.blocker, store, chain, VOLUME_BYTES_MAX)

    chain, layers = mapper.catalog.with_chain(layer, open_chain)
    try:
        engine = EngineVolume(layers, VOLUME_BYTES_MAX, writable=False)
    finally:
        for each in layers:
            each.close()
    try:
        yield chain, engine
    finally:
        engine.close(clean=False)


class ChainReader:
    """A chain of layers as ``build_map`` reads it; with ``base``, only what does not come straight from that one."""

    def __init__(self, engine: EngineVolume, base: LayerId | None) -> None:
        self._engine = engine
        self._base = base

    def next_change(self, offset: int, end: int) -> tuple[int, int] | None:
        return self._engine.next_change(self._base, offset, end)

    def next_data(self, offset: int) -> int | None:
        return self._engine.seek_data(offset)

    def next_hole(self, offset: int) -> int | None:
        return self._engine.seek_hole(offset)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._engine.read_into(offset, buffer)
