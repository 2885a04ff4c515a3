"""The records and their encoding: one header line, then JSON. docs/format.md has it field by field.

    archipfs-record 4 volume 9f3c…(nonce) 5d41…(xxh3-64 of the JSON)
    {"id":"…","name":"vm1",…}

The nonce makes every encoding unique, so that a writer can tell its own value from an equal one of somebody else.
Pure: no I/O.
"""

import enum
import re
import secrets
from typing import Any, TypeVar

import msgspec
import xxhash

from archipfs.errors import FormatTooNew, ObjectDamaged
from archipfs.types import LayerId, PackId, RequestId, VolumeId

FORMAT_VERSION = 4
"""Version 1 had no ``request`` in a volume's record, and is read as if that were null. Version 2 knew no sealing: no
``sealed`` and ``sealing`` in a layer's record, no ``compression`` and ``chunk_sectors`` in the store's. Version 3 knew
no second backend: no ``replica_of`` and ``moved_to`` in a volume's record, no ``original`` in a layer's; and no nodes
that read on or write late: no ``since_ns`` in ``sealed``, no ``broken`` in a lock's."""
_MAGIC = b"archipfs-record"
_VERSION_PATTERN = re.compile(rb"[1-9][0-9]{0,8}")


class Kind(enum.Enum):
    """What a volume is. Clones and volumes are written alike; a clone knows where it came from."""

    VOLUME = "volume"
    SNAPSHOT = "snapshot"
    CLONE = "clone"


class StoreRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a whole store is, written when it is created."""

    id: str
    hash: str
    created_ns: int
    compression: str = "none"
    chunk_sectors: int = 8
    """How many a chunk has on average: a power of two."""


class Replica(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """That a volume is the copy of the one with the same id in another store, and nobody has opened it yet."""

    store: str
    """That store's id."""
    arriving: bool = False
    """It is about to take that one's place: it has done so once that one's record says ``moved_to``."""


class VolumeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A volume: its name points here, and here is which layer it is read from."""

    id: VolumeId
    name: str | None
    """``None`` once it is removed: nothing resolves to it any more, its space may go."""
    kind: Kind
    size: int
    layer: LayerId
    """The head of a volume or clone; the frozen or sealed layer of a snapshot."""
    visible: int
    """Bytes of the layer's parent that shine through; the layer's own limit holds too. Shrinking lowers it."""
    origin: VolumeId | None
    """What it was made from."""
    created_ns: int
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    xattrs: dict[str, bytes] = {}
    request: RequestId | None = None
    """Who made it, or last renamed it or rolled it back: how such a request is recognised when it comes again."""
    replica_of: Replica | None = None
    """Nothing resolves to it on a node that has that store too."""
    moved_to: str | None = None
    """The id of the store in which it lives on; it has no name here any more."""

    @property
    def writable(self) -> bool:
        return self.kind is not Kind.SNAPSHOT


class Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a layer is made of once it is sealed: chunks and map pages in packs, and no objects of its own."""

    root: str
    """Digest of the map's root page, in hexadecimal."""
    data_bytes: int
    """What the map holds, without the holes."""
    added_bytes: int
    """What sealing it added to the store; the rest was there already."""
    since_ns: int = 0
    """When that was committed: for a while, others may still read the objects that it was before."""


class LayerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer. It is the head if a writable volume names it; frozen if only snapshots or children do; or sealed."""

    id: LayerId
    parent: LayerId | None
    parent_visible: int
    """Bytes of the parent that shine through."""
    node: str
    """Who made it: that node knows whether it is still about to be used."""
    created_ns: int
    sealed: Sealed | None = None
    """Its map has all that it shows: the chain ends here, and ``parent`` only says where it came from."""
    sealing: str | None = None
    """Who is about to commit a root. Whoever takes this away makes that commit fail."""
    original: LayerId | None = None
    """The layer of another store that shows the same."""

    @property
    def reads_parent(self) -> LayerId | None:
        """The layer that shows through this one."""
        return None if self.sealed is not None else self.parent


class NameRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who a name belongs to. It counts only while that volume's record says the same name."""

    name: str
    volume: VolumeId
    replaced: VolumeId | None = None
    """Who had it before, and has it until ``volume``'s record says this name: a rename onto a taken name."""


class Hold(enum.Enum):
    """Why a lock is held. It is given back when no reason is left."""

    IO = "io"
    OPENED = "opened"
    LOCKED = "locked"


class LockRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may write a volume. The record outlives its owner, and its generation never falls."""

    volume: VolumeId
    generation: int
    node: str | None
    """The owner's node id, ``None`` when nobody holds it."""
    host: str
    since_ns: int
    holds: tuple[Hold, ...] = ()
    broken: bool = False
    """An owner lost it who may still write late. The next one puts a head on top of his before its first write."""


class CondemnedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pack that garbage collection is about to delete: nobody may rely on it any more who has not yet."""

    pack: PackId
    node: str
    since_ns: int


class DamageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known to be damaged in a pack."""

    pack: PackId
    digests: list[str]
    """In hexadecimal."""


class GcRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who collects garbage: one at a time."""

    node: str | None
    since_ns: int
    generation: int


AnyRecord = (
    StoreRecord | VolumeRecord | LayerRecord | NameRecord | LockRecord | CondemnedRecord | DamageRecord | GcRecord
)
R = TypeVar(
    "R",
    StoreRecord,
    VolumeRecord,
    LayerRecord,
    NameRecord,
    LockRecord,
    CondemnedRecord,
    DamageRecord,
    GcRecord,
)

KIND_NAMES: dict[type[Any], str] = {
    StoreRecord: "store",
    VolumeRecord: "volume",
    LayerRecord: "layer",
    NameRecord: "name",
    LockRecord: "lock",
    CondemnedRecord: "condemned",
    DamageRecord: "damage",
    GcRecord: "gc",
}


def encode(record: AnyRecord) -> bytes:
    """The bytes that stand for ``record`` in the store."""
    payload = msgspec.json.encode(record)
    kind = KIND_NAMES[type(record)]
    digest = xxhash.xxh3_64_hexdigest(payload)
    return f"archipfs-record {FORMAT_VERSION} {kind} {secrets.token_hex(8)} {digest}\n".encode() + payload


def decode(kind: type[R], key: str, value: bytes) -> R:
    """The record in ``value``, read from ``key``. Raises ``FormatTooNew`` or ``ObjectDamaged``, naming the key."""
    header, newline, payload = value.partition(b"\n")
    fields = header.split(b" ")
    if not newline or len(fields) < 2 or fields[0] != _MAGIC or not _VERSION_PATTERN.fullmatch(fields[1]):
        raise ObjectDamaged(f"record {key} is damaged: no header; restore it from a copy of the store")
    version = int(fields[1])
    if version > FORMAT_VERSION:
        raise FormatTooNew(f"record {key} has format {version}, this archipfs reads {FORMAT_VERSION}; upgrade archipfs")
    if len(fields) != 5 or fields[2] != KIND_NAMES[kind].encode():
        raise ObjectDamaged(f"record {key} is damaged: wrong header; restore it from a copy of the store")
    if xxhash.xxh3_64_hexdigest(payload).encode() != fields[4]:
        raise ObjectDamaged(f"record {key} is damaged: bad checksum; restore it from a copy of the store")
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ObjectDamaged(f"record {key} is damaged: {error}; restore it from a copy of the store") from error
