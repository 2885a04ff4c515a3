"""The commit of a seal: a layer's record gets its root. docs/architecture.md, "Seal", steps 5 to 7.

Between the look at the packs and the commit, garbage collection must not delete what the new map leads to. Each side
shows what it is about to do before it looks at the other: we put our token into the layer's record and then look for
condemned packs, it condemns packs and then looks for tokens.
"""

import random
import secrets
import time
from contextlib import suppress

import msgspec

from archipfs.errors import Conflict, NotFound
from archipfs.map.catalog import Catalog, Versioned
from archipfs.map.chunks import Session, Swept
from archipfs.map.records import LayerRecord, Sealed
from archipfs.types import LayerId

WAITS_MAX = 4
"""How many times as long as an attempt took one waits at most before the next."""


def commit_sealed(
    catalog: Catalog, layer: LayerRecord, base: LayerRecord | None, sealed: Sealed, session: Session
) -> LayerRecord:
    """Seal ``layer``, which has been read as it was in this record, with what the flushed ``session`` has stored.

    The map was made on top of ``base``, the nearest sealed layer. Returns the layer's record: sealed by us, or by
    somebody else who was quicker. Raises ``Swept`` if something that was relied upon is about to be deleted, or the
    layer is read otherwise by now: begin anew with another session; ``NotFound`` if the layer is gone.
    """
    attempts = 0
    while True:
        attempts, began = attempts + 1, time.monotonic()
        found = get_layer(catalog, layer.id)
        if found.record.sealed is not None:
            return found.record
        if _as_read(found.record) != _as_read(layer):
            raise Swept(f"layer {layer.id} has changed while it was sealed; begin anew")
        # Whose token was there before, he finds out and does the same; or a crash left it.
        intent = msgspec.structs.replace(found.record, sealing=secrets.token_hex(16))
        try:
            shown = catalog.put(intent, layer.id, found.version)
        except Conflict:
            continue
        try:
            session.verify()
            _verify_base(catalog, base)
        except Swept:
            with suppress(Conflict):  # then somebody has taken the token away already
                catalog.put(msgspec.structs.replace(intent, sealing=None), layer.id, shown.version)
            raise
        # What it was merged with is not read any more and may go; the lineage goes on at the base.
        parent = base.id if base is not None else layer.parent
        since = msgspec.structs.replace(sealed, since_ns=time.time_ns())
        done = msgspec.structs.replace(intent, sealing=None, sealed=since, parent=parent)
        with suppress(Conflict):
            return catalog.put(done, layer.id, shown.version).record
        # Two who seal the same, each as fast as the other, would take each other's token away for ever.
        time.sleep(random.uniform(0, min(attempts, WAITS_MAX) * (time.monotonic() - began)))


def get_layer(catalog: Catalog, layer: LayerId) -> Versioned[LayerRecord]:
    """Raises ``NotFound`` for a layer that was reclaimed: whoever had it is removed."""
    found = catalog.get(LayerRecord, layer)
    if found is None:
        raise NotFound(f"layer {layer} is not needed any more and gone; whoever it belonged to was removed")
    return found


def _as_read(record: LayerRecord) -> tuple[LayerId | None, int]:
    return record.parent, record.parent_visible


def _verify_base(catalog: Catalog, base: LayerRecord | None) -> None:
    """As long as its record is there, collectors mark what its map leads to, and so what we have taken from it."""
    if base is None:
        return
    found = catalog.get(LayerRecord, base.id)
    if found is None or found.record.sealed != base.sealed:
        raise Swept(f"layer {base.id}, on which a map was built, is gone; begin anew")
