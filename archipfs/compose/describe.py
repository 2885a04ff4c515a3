"""What there is to say of a volume, as plain values that JSON can carry.

Sizes are integer bytes, times are seconds since the epoch.
"""

from typing import Any

from archipfs.compose.composer import Composer, Found
from archipfs.map.records import LockRecord, VolumeRecord


def summary(found: Found, origin: str | None) -> dict[str, Any]:
    """What the volume's record says by itself. ``origin``: the name of what it was made from."""
    record = found.record
    return {
        "name": record.name,
        "kind": record.kind.value,
        "size": record.size,
        "backend": found.mapper.backend,
        "parent": origin,
        "created": record.created_ns / 1e9,
        "uuid": record.id,
        "replica": record.replica_of is not None,
    }


def describe(composer: Composer, found: Found) -> dict[str, Any]:
    """All of it, with what takes a look at other records and at the layer's object."""
    record = found.record
    lock = composer.lock_of(found)
    chain = found.mapper.catalog.chain(record.layer)
    return {
        **summary(found, origin_of(found)),
        "written": composer.stored_bytes(found),
        "layers": len(chain),
        "sealed": all(layer.sealed is not None for layer in (chain[1:] if record.writable else chain)),
        "layer": record.layer,
        "lock": describe_lock(lock) if lock is not None else None,
        "state": state_of(composer, found),
        "mode": f"{record.mode & 0o7777:04o}",
        "uid": record.uid,
        "gid": record.gid,
        "modified": record.mtime_ns / 1e9,
    }


def state_of(composer: Composer, found: Found) -> str:
    """``open`` or ``closed``; of a snapshot that nobody has open, ``frozen`` or ``sealed``."""
    record = found.record
    if composer.is_open(record.id):
        return "open"
    if record.writable:
        return "closed"
    return "frozen" if found.mapper.catalog.layer(record.layer).record.sealed is None else "sealed"


def origin_of(found: Found) -> str | None:
    """The name of what the volume was made from, if that is still there."""
    if found.record.origin is None:
        return None
    source = found.mapper.catalog.get(VolumeRecord, found.record.origin)
    return source.record.name if source is not None else None


def describe_lock(lock: LockRecord) -> dict[str, Any]:
    return {
        "host": lock.host,
        "node": lock.node,
        "since": lock.since_ns / 1e9,
        "generation": lock.generation,
        "holds": [hold.value for hold in lock.holds],
    }
