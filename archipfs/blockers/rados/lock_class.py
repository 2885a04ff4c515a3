"""What python3-rados lacks of the OSDs' class ``lock``: who holds a lock.

The request and the answer are as Ceph encodes them (src/cls/lock/cls_lock_ops.h and cls_lock_types.h,
src/msg/msg_types.h): numbers are little-endian; strings, and maps, begin with their length in 4 bytes; and a struct
with a byte for its version, one for the oldest version whose readers understand it, and 4 for the bytes that follow.
What newer versions add stands at the end of a struct, and is skipped.
"""

import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import Self

from archipfs.errors import ObjectDamaged

GET_INFO = "get_info"
ANSWER_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Locker:
    """One who holds a lock."""

    client: int
    """The cluster's number of that client."""
    cookie: str
    address: str
    """As ``osd blocklist add`` takes it."""


@dataclass(frozen=True, slots=True)
class LockInfo:
    """A lock, and who holds it; by nobody, if there is no such lock."""

    lockers: tuple[Locker, ...] = ()
    tag: str = ""

    @classmethod
    def decode(cls, answer: bytes) -> Self:
        """The answer to :func:`get_info`. Raises ``ObjectDamaged`` for anything else."""
        try:
            reader = _Reader(answer).struct()
            lockers = tuple(_locker(reader) for _ in range(reader.number("<I")))
            reader.number("<B")
            return cls(lockers, reader.string())
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise ObjectDamaged(
                f"what the cluster says of a lock cannot be understood ({error}); is it older than Ceph 16?"
            ) from error


def get_info(lock: str) -> bytes:
    """The request for a lock's :class:`LockInfo`."""
    name = lock.encode()
    content = struct.pack("<I", len(name)) + name
    return struct.pack("<BBI", 1, 1, len(content)) + content


def _locker(reader: "_Reader") -> Locker:
    key = reader.struct()
    info = reader.struct()
    key.number("<B")
    client = key.number("<q")
    cookie = key.string()
    # When the lock ends, in seconds and nanoseconds; ours does not.
    info.take(8)
    return Locker(client, cookie, _address(info))


def _address(reader: "_Reader") -> str:
    """struct entity_addr_t, in the form that it has had since Ceph 10."""
    if reader.number("<B") != 1:
        raise ValueError("an address of an old kind")
    reader = reader.struct()
    reader.number("<I")
    nonce = reader.number("<I")
    address = reader.take(reader.number("<I"))
    (family,) = struct.unpack_from("<H", address)
    (port,) = struct.unpack_from(">H", address, 2)
    if family == socket.AF_INET:
        host = str(ipaddress.IPv4Address(address[4:8]))
    elif family == socket.AF_INET6:
        host = f"[{ipaddress.IPv6Address(address[8:24])}]"
    else:
        raise ValueError(f"an address of family {family}")
    return f"{host}:{port}/{nonce}"


class _Reader:
    """Takes an encoding apart from its beginning. Raises ``struct.error`` or ``ValueError`` where it ends too early."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, length: int) -> bytes:
        if length > len(self._content) - self._at:
            raise ValueError("it ends too early")
        taken = self._content[self._at : self._at + length]
        self._at += length
        return taken

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def string(self) -> str:
        return self.take(self.number("<I")).decode()

    def struct(self) -> "_Reader":
        """The content of the struct that comes next."""
        self.take(1)
        if self.number("<B") != 1:
            raise ValueError("a struct of a later kind")
        return _Reader(self.take(self.number("<I")))
