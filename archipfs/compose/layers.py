"""From layer records to engine layers: opening a chain, and where its live bitmaps lie."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from archipfs.blockers.contract import Blocker
from archipfs.compose.engine import EngineLayer
from archipfs.compose.sealed import SealedStore
from archipfs.map.locks import lock_key
from archipfs.map.mapper import bitmap_key, data_key
from archipfs.map.records import LayerRecord, LockRecord
from archipfs.types import LayerId

UNFINISHED = ".new"
"""What the engine adds to the name of a live bitmap while it makes it."""
BITMAP_HEADER_BYTES = 4096
"""Where the pages of a bitmap object begin."""
BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")


def is_blank(blocker: Blocker, layer: LayerId) -> bool:
    """Whether nothing that is durable was written or discarded in the layer: its bitmap has no pages."""
    bitmap = blocker.open_data(bitmap_key(layer), writable=False)
    try:
        return bitmap.next_data(BITMAP_HEADER_BYTES) is None
    finally:
        bitmap.close()


class LiveBitmaps:
    """The directory of live bitmaps: files that outlive the daemon, but not the boot they were written in.

    Those of one store, once ``of`` has said which: a store that is not configured just now keeps its own.
    """

    def __init__(self, directory: Path, store: str = "") -> None:
        self._directory = directory
        self._prefix = f"{store}-"
        self._boot_id = BOOT_ID_PATH.read_text().strip()
        directory.mkdir(parents=True, exist_ok=True)

    def of(self, store: str) -> "LiveBitmaps":
        return LiveBitmaps(self._directory, store)

    def path(self, layer: LayerId) -> str:
        return str(self._directory / f"{self._prefix}{layer}")

    def epoch(self, lease: LockRecord) -> str:
        """What a live bitmap must carry to be believed: this boot, and this generation of the volume's lock.

        Once the lock was broken, others may have written to the layer, and what we remember of it is worth nothing.
        """
        text = f"{self._boot_id} {lease.volume} {lease.generation}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def adopt(self, exists: Callable[[LayerId], bool]) -> None:
        """Take over those of this store's layers whose names an earlier version made without the store's id."""
        for path in self._directory.iterdir():
            if "-" not in path.name and exists(LayerId(path.name)):
                path.rename(self.path(LayerId(path.name)))

    def forget(self, layer: LayerId) -> None:
        """Remove a layer's live bitmap, if it has one: the layer is deleted."""
        for path in (self.path(layer), self.path(layer) + UNFINISHED):
            Path(path).unlink(missing_ok=True)

    def layers(self) -> set[LayerId]:
        """Those that have a live bitmap: they are open, or were when this node crashed."""
        names = [path.name.removesuffix(UNFINISHED) for path in self._directory.glob(f"{self._prefix}*")]
        return {LayerId(name.removeprefix(self._prefix)) for name in names}


def open_live_layer(
    blocker: Blocker, live: LiveBitmaps, lease: LockRecord, record: LayerRecord, *, visible: int, head: bool
) -> EngineLayer:
    """Open a layer of a volume whose lock we hold: a head, or one that a crash may have left not durable."""
    claim = lock_key(lease.volume)
    return _open_layer(blocker, record, visible, head, live.path(record.id), live.epoch(lease), claim)


def open_live_chain(
    blocker: Blocker,
    sealed: SealedStore,
    live: LiveBitmaps,
    lease: LockRecord,
    chain: Sequence[LayerRecord],
    visible: int,
) -> list[EngineLayer]:
    """Open the layers of a writable volume, head first."""

    def open_one(record: LayerRecord, limit: int, head: bool) -> EngineLayer:
        return open_live_layer(blocker, live, lease, record, visible=limit, head=head)

    return _open_layers(sealed, chain, visible, open_one)


def open_durable_chain(
    blocker: Blocker, sealed: SealedStore, chain: Sequence[LayerRecord], visible: int
) -> list[EngineLayer]:
    """Open the layers of a volume that we only read: a snapshot, or one that another node writes."""

    def open_one(record: LayerRecord, limit: int, head: bool) -> EngineLayer:
        return _open_layer(blocker, record, limit, False, None, "0" * 32, None)

    return _open_layers(sealed, chain, visible, open_one)


def _open_layers(
    sealed: SealedStore,
    chain: Sequence[LayerRecord],
    visible: int,
    open_one: Callable[[LayerRecord, int, bool], EngineLayer],
) -> list[EngineLayer]:
    """``open_one`` is given a layer that is not sealed, how far its parent is visible, and whether it comes first."""
    with ExitStack() as opened:
        layers: list[EngineLayer] = []
        for record in chain:
            is_first = not layers
            limit = min(visible, record.parent_visible) if is_first else record.parent_visible
            layer = sealed.open_layer(record) if record.sealed is not None else open_one(record, limit, is_first)
            opened.callback(layer.close)
            layers.append(layer)
        opened.pop_all()
        return layers


def _open_layer(
    blocker: Blocker,
    record: LayerRecord,
    visible: int,
    head: bool,
    live_path: str | None,
    epoch: str,
    claim: str | None,
) -> EngineLayer:
    """``claim``: under which it is written; what is only read goes on also when a lock of ours was broken."""
    writable = live_path is not None
    with ExitStack() as opened:
        data = blocker.open_data(data_key(record.id), writable=writable, claim=claim)
        opened.callback(data.close)
        bitmap = blocker.open_data(bitmap_key(record.id), writable=writable, claim=claim)
        opened.callback(bitmap.close)
        layer = EngineLayer(
            record.id,
            data,
            bitmap,
            parent_visible=visible if record.parent is not None else 0,
            head=head,
            live_path=live_path,
            boot_id=epoch,
        )
        opened.pop_all()
        return layer
