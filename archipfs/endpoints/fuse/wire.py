"""The FUSE requests that reach us past libfuse, and the messages we write to /dev/fuse ourselves. Pure.

The structures are those of the kernel's <linux/fuse.h>, in the machine's byte order. Every size in a request is checked
before it is believed.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from archipfs.errors import InvalidInput

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_IOCTL_IN = struct.Struct("=QIIQII")
_IOCTL_OUT = struct.Struct("=iIII")
_COPY_IN = struct.Struct("=QQQQQQQ")
_WRITE_OUT = struct.Struct("=II")
_COPY_OUT = struct.Struct("=Q")
_INVAL_INODE_OUT = struct.Struct("=Qqq")

_IOCTL = 39
_COPY_FILE_RANGE = 47
_COPY_FILE_RANGE_64 = 53
"""Since Linux 6.18; an older kernel knows the one before only."""
_NOTIFY_INVAL_INODE = 2

RESENT = 1 << 63
"""The bit of a request's number that says that the kernel sends it again (FUSE_UNIQUE_RESEND)."""
_IOCTL_DIRECTORY = 1 << 4
_IOCTL_FLAGS = (1 << 6) - 1
_OFFSET_MAX = (1 << 63) - 1
_COPY_BYTES_MAX = 0xFFFF_F000
"""Of a COPY_FILE_RANGE, whose answer has 32 bits: whole pages, so that what follows stays aligned."""


class Malformed(InvalidInput):
    """The request ``unique`` is not one; it is to be answered with EINVAL."""

    def __init__(self, unique: int, message: str) -> None:
        super().__init__(message)
        self.unique = unique


@dataclass(frozen=True, slots=True)
class Header:
    """Who asks, and about which inode."""

    unique: int
    """To be answered with, ``RESENT`` included."""
    inode: int
    uid: int
    gid: int
    pid: int
    """0 if the caller's process cannot be seen from here."""

    @property
    def number(self) -> int:
        """The same when the request is sent again."""
        return self.unique & ~RESENT


@dataclass(frozen=True, slots=True)
class Ioctl:
    header: Header
    handle: int
    command: int
    directory: bool
    data: bytes
    """What the command's structure held, if it is one that gives something in."""
    out_bytes: int
    """Room for the answer."""


@dataclass(frozen=True, slots=True)
class CopyRange:
    header: Header
    handle: int
    offset: int
    target_handle: int
    target_offset: int
    length: int
    """Not more than can be answered with."""
    wide: bool
    """Answered with 64 bits."""


def parse(message: bytes) -> Ioctl | CopyRange:
    """The request in ``message``. Raises ``Malformed``, and ``InvalidInput`` for what cannot even be answered."""
    if len(message) < _IN_HEADER.size:
        raise InvalidInput(f"not a FUSE request: {len(message)} bytes")
    length, opcode, unique, inode, uid, gid, pid, _, _ = _IN_HEADER.unpack_from(message)
    if length != len(message):
        raise Malformed(unique, f"FUSE request {unique} says {length} bytes and has {len(message)}")
    parser = _PARSERS.get(opcode)
    if parser is None:
        raise Malformed(unique, f"FUSE request {unique} has the opcode {opcode}, which is not served here")
    return parser(Header(unique, inode, uid, gid, pid), message[_IN_HEADER.size :])


def _parse_ioctl(header: Header, body: bytes) -> Ioctl:
    if len(body) < _IOCTL_IN.size:
        raise Malformed(header.unique, f"ioctl request {header.unique} is cut short")
    handle, flags, command, _, in_bytes, out_bytes = _IOCTL_IN.unpack_from(body)
    data = body[_IOCTL_IN.size :]
    if in_bytes != len(data):
        raise Malformed(header.unique, f"ioctl {command:#x} announces {in_bytes} bytes and has {len(data)}")
    if flags & ~_IOCTL_FLAGS:
        raise Malformed(header.unique, f"ioctl {command:#x} has unknown flags: {flags:#x}")
    return Ioctl(header, handle, command, bool(flags & _IOCTL_DIRECTORY), data, out_bytes)


def _parse_copy(header: Header, body: bytes, *, wide: bool = False) -> CopyRange:
    if len(body) != _COPY_IN.size:
        raise Malformed(header.unique, f"copy request {header.unique} has {len(body)} bytes; it takes {_COPY_IN.size}")
    handle, offset, _, target_handle, target_offset, length, flags = _COPY_IN.unpack(body)
    if flags:
        raise Malformed(header.unique, f"copy request {header.unique} has unknown flags: {flags:#x}")
    if max(offset, target_offset) > _OFFSET_MAX:
        raise Malformed(header.unique, f"copy request {header.unique} has a negative offset")
    most = _OFFSET_MAX if wide else _COPY_BYTES_MAX
    length = min(length, most, _OFFSET_MAX - max(offset, target_offset))
    return CopyRange(header, handle, offset, target_handle, target_offset, length, wide)


def _parse_copy_64(header: Header, body: bytes) -> CopyRange:
    return _parse_copy(header, body, wide=True)


_PARSERS: dict[int, Callable[[Header, bytes], Ioctl | CopyRange]] = {
    _IOCTL: _parse_ioctl,
    _COPY_FILE_RANGE: _parse_copy,
    _COPY_FILE_RANGE_64: _parse_copy_64,
}


def answer(request: Ioctl | CopyRange, result: bytes | int) -> bytes:
    """The whole answer: to an ioctl what its structure gets, to a copy the number of bytes copied.

    Raises ``Malformed`` if the caller of the ioctl has no room for it.
    """
    if isinstance(request, CopyRange):
        assert isinstance(result, int), "a copy is answered with a number"
        body = _COPY_OUT.pack(result) if request.wide else _WRITE_OUT.pack(result, 0)
    else:
        assert isinstance(result, bytes), "an ioctl is answered with its structure"
        if len(result) > request.out_bytes:
            said = f"ioctl {request.command:#x} answers {len(result)} bytes; there is room for {request.out_bytes}"
            raise Malformed(request.header.unique, said)
        body = _IOCTL_OUT.pack(0, 0, 0, 0) + result
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, request.header.unique) + body


def error_answer(unique: int, number: int) -> bytes:
    """``number`` is an errno."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -number, unique)


def attributes_changed(inode: int) -> bytes:
    """Has the kernel ask for the inode's attributes anew; what it caches of the content stays."""
    body = _INVAL_INODE_OUT.pack(inode, -1, 0)
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), _NOTIFY_INVAL_INODE, 0) + body
