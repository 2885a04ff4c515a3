"""The session: what must outlive the daemon for the kernel's connection to go on with the next one.

A memfd that the supervisor keeps beside /dev/fuse. docs/format.md, "The session", has its layout. The front writes the
kernel's INIT request into it, this module the rest: who the session is, and which handles are open.
"""

import errno
import os
import secrets
import struct
import threading
from dataclasses import dataclass

import xxhash

from archipfs.errors import DaemonError
from archipfs.types import RequestId, VolumeId

MAGIC = b"archsess"
VERSION = 1
HANDLES_OFFSET = 8192
REMOVALS_MAX = 256
"""So many are noted at a time, more than pyfuse3 has requests under way."""

_HEADER = struct.Struct("<8sII16sQ")
_CHECKSUM = struct.Struct("<Q")
_SLOT = struct.Struct("<QQ16s")
_FREE = bytes(_SLOT.size)
_REMOVAL = (1 << 64) - 1
"""In place of a generation: the slot is no handle, but says which volume a request is to remove."""


@dataclass(frozen=True, slots=True)
class Handle:
    """An open file, as the kernel knows it."""

    number: int
    """Of the OPEN or CREATE request that made it."""
    volume: VolumeId
    generation: int
    """Of the volume's lock that we held, 0 if another node had it."""


class Session:
    """Thread-safe. Every change is one pwrite of a slot, so that a process killed at any moment leaves it whole."""

    def __init__(self, descriptor: int) -> None:
        """Read a session that is there; ``descriptor`` stays the caller's. Raises ``DaemonError`` if it is none."""
        self.descriptor = descriptor
        header = os.pread(descriptor, _HEADER.size + _CHECKSUM.size, 0)
        if len(header) != _HEADER.size + _CHECKSUM.size or header[: len(MAGIC)] != MAGIC:
            raise DaemonError("the session is damaged: no header; unmount and mount again")
        _, version, self.request_bytes, ident, self.device_number = _HEADER.unpack_from(header)
        if version != VERSION:
            raise DaemonError(f"the session has format {version}, this archipfs reads {VERSION}; unmount, mount again")
        if _CHECKSUM.unpack_from(header, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(header[: _HEADER.size]):
            raise DaemonError("the session is damaged: bad checksum; unmount and mount again")
        self.id = ident.hex()
        self._mutex = threading.Lock()
        self._slots: dict[int, int] = {}
        """Of each handle."""
        self._handles: dict[int, Handle] = {}
        self._removals: dict[int, VolumeId] = {}
        """By request, the oldest first."""
        self._free: list[int] = []
        self._end = 0
        self._read_slots()

    @classmethod
    def create(cls, *, request_bytes: int, device_number: int) -> "Session":
        """A new session, in a memfd that is the caller's to close. ``device_number`` is st_dev of the mount."""
        descriptor = os.memfd_create("archipfs-session", os.MFD_CLOEXEC)
        header = _HEADER.pack(MAGIC, VERSION, request_bytes, secrets.token_bytes(16), device_number)
        os.ftruncate(descriptor, HANDLES_OFFSET)
        os.pwrite(descriptor, header + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header)), 0)
        return cls(descriptor)

    def request_id(self, number: int) -> RequestId:
        """Who the request with that number is, in every process that serves this session."""
        return RequestId(f"{self.id}:{number}")

    def handles(self) -> list[Handle]:
        with self._mutex:
            return list(self._handles.values())

    def put(self, handle: Handle) -> None:
        """Remember an open handle, or what has changed about it."""
        with self._mutex:
            self._put(handle.number, handle.generation, handle.volume)
            self._handles[handle.number] = handle

    def get(self, number: int) -> Handle | None:
        with self._mutex:
            return self._handles.get(number)

    def remove(self, number: int) -> None:
        """Forget a handle; one that is not known was forgotten already."""
        with self._mutex:
            if self._handles.pop(number, None) is not None:
                self._clear(number)

    def note_removal(self, number: int, volume: VolumeId) -> None:
        """Before the request removes that volume. Kept until many others are noted, since it may be sent again."""
        with self._mutex:
            if number not in self._removals and len(self._removals) >= REMOVALS_MAX:
                oldest = next(iter(self._removals))
                del self._removals[oldest]
                self._clear(oldest)
            self._put(number, _REMOVAL, volume)
            self._removals[number] = volume

    def removal(self, number: int) -> VolumeId | None:
        """What the request of that number is to remove, if it has begun to."""
        with self._mutex:
            return self._removals.get(number)

    def _put(self, number: int, generation: int, volume: VolumeId) -> None:
        slot = self._slots.get(number)
        if slot is None:
            slot = self._free.pop() if self._free else self._end
            self._end = max(self._end, slot + 1)
        self._write(slot, _SLOT.pack(number, generation, bytes.fromhex(volume)))
        self._slots[number] = slot

    def _clear(self, number: int) -> None:
        slot = self._slots.pop(number)
        self._write(slot, _FREE)
        self._free.append(slot)

    def _write(self, slot: int, content: bytes) -> None:
        if os.pwrite(self.descriptor, content, HANDLES_OFFSET + slot * _SLOT.size) != len(content):
            raise OSError(errno.ENOSPC, "there is no memory left for the session")

    def _read_slots(self) -> None:
        content = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, HANDLES_OFFSET)
        whole = len(content) // _SLOT.size * _SLOT.size
        for slot, (number, generation, volume) in enumerate(_SLOT.iter_unpack(content[:whole])):
            if not number:
                self._free.append(slot)
            else:
                self._slots[number] = slot
                if generation == _REMOVAL:
                    self._removals[number] = VolumeId(volume.hex())
                else:
                    self._handles[number] = Handle(number, VolumeId(volume.hex()), generation)
            self._end = slot + 1
