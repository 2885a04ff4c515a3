"""The ioctls of tools/archip-ioctl.h: their numbers and structures. Pure.

All structures have the same layout for 32 and 64 bits. Numbers are in the machine's byte order.
"""

import enum
import struct
from dataclasses import dataclass

from archipfs.errors import InvalidInput
from archipfs.map.names import check_name
from archipfs.map.records import Kind
from archipfs.types import VolumeId

_NAME = struct.Struct("=256s32s")
_INFO = struct.Struct("=IIQQQ16s16s256s64x")

# _IOW and _IOR of <asm-generic/ioctl.h>.
_MAGIC, _WRITE, _READ = 0xA8, 1, 2


def _command(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _MAGIC << 8 | number


SNAPSHOT = _command(_WRITE, 1, _NAME.size)
CLONE = _command(_WRITE, 2, _NAME.size)
INFO = _command(_READ, 3, _INFO.size)

_KINDS = {Kind.VOLUME: 1, Kind.SNAPSHOT: 2, Kind.CLONE: 3}


class InfoFlags(enum.IntFlag):
    OPEN = 0x1
    KEPT = 0x2
    LOCKED = 0x4
    FOREIGN = 0x8
    REMOVED = 0x10


@dataclass(frozen=True, slots=True)
class Info:
    """struct archip_info."""

    format: int
    kind: Kind
    flags: InfoFlags
    size_bytes: int
    stored_bytes: int
    id: VolumeId
    origin: VolumeId | None
    name: str | None


def encode_name(name: str) -> bytes:
    """struct archip_name. Raises ``InvalidName`` for what cannot be a volume's name."""
    return _NAME.pack(check_name(name).encode(), b"")


def decode_name(data: bytes) -> str:
    """The name in a struct archip_name. Raises ``InvalidName``, and ``InvalidInput`` for what is no such structure."""
    if len(data) != _NAME.size:
        raise InvalidInput(f"not a struct archip_name: {len(data)} bytes; it has {_NAME.size}")
    name, reserved = _NAME.unpack(data)
    if any(reserved):
        raise InvalidInput("what is reserved in struct archip_name is not zero; clear the structure first")
    name, end, _ = name.partition(b"\0")
    if not end:
        raise InvalidInput(f"the name {name[:24]!r}… is not ended by a NUL; {len(name) - 1} bytes are the most")
    # What is not UTF-8 becomes lone surrogates, which no name may have.
    return check_name(name.decode(errors="surrogateescape"))


def encode_info(info: Info) -> bytes:
    return _INFO.pack(
        info.format,
        _KINDS[info.kind],
        info.flags,
        info.size_bytes,
        info.stored_bytes,
        bytes.fromhex(info.id),
        bytes.fromhex(info.origin or ""),
        (info.name or "").encode(),
    )


def decode_info(data: bytes) -> Info:
    """Raises ``InvalidInput`` for other than a whole struct archip_info."""
    if len(data) != _INFO.size:
        raise InvalidInput(f"not a struct archip_info: {len(data)} bytes; it has {_INFO.size}")
    version, kind, flags, size_bytes, stored_bytes, ident, origin, name = _INFO.unpack(data)
    kinds = {number: each for each, number in _KINDS.items()}
    if kind not in kinds:
        raise InvalidInput(f"struct archip_info has the unknown kind {kind}; it is of another version")
    return Info(
        version,
        kinds[kind],
        InfoFlags(flags),
        size_bytes,
        stored_bytes,
        VolumeId(ident.hex()),
        VolumeId(origin.hex()) if any(origin) else None,
        name.partition(b"\0")[0].decode(errors="surrogateescape") or None,
    )
