"""One mount of the file system: made, served, taken down."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pyfuse3
import trio

from archipfs.compose.composer import Composer
from archipfs.endpoints.fuse.device import FS_NAME, FS_TYPE, open_mounted, unmount
from archipfs.endpoints.fuse.front import Front
from archipfs.endpoints.fuse.operations import VolumeOperations
from archipfs.errors import DaemonError

__all__ = ["FS_TYPE", "Mount", "is_stale", "mounted_at"]

STOP_GRACE_SECONDS = 10.0
"""How long requests under way may take once we are told to stop; a write that waits for a lock would never end."""
REQUEST_BYTES = 1 << 20
"""The most that a read or a write carries: as much as pyfuse3 takes."""
MESSAGE_ROOM_BYTES = 8192
"""What a message has in it beside the bytes of a read or a write, and the socket's own share."""
SOCKET_BYTES = 8 << 20

_SO_SNDBUFFORCE = 32
_GONE = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


class Mount:
    """A context manager: mounted inside it, unmounted behind it.

    With the front, that one has /dev/fuse, and pyfuse3 one end of a pair of sockets.
    """

    def __init__(self, composer: Composer, mountpoint: Path, *, front: bool, threads: int | None = None) -> None:
        """``threads`` of the front that read requests at a time; ``None``: as many as suits the machine."""
        self.operations = VolumeOperations(composer, os.getuid(), os.getgid())
        self.front: Front | None = None
        self._composer = composer
        self.mountpoint = mountpoint
        self._with_front = front
        self._threads = threads
        self._device_number: str | None = None
        self._serving = trio.CancelScope()
        self._undo = ExitStack()

    def __enter__(self) -> "Mount":
        """Raises ``DaemonError`` if the kernel or fusermount3 refuses."""
        with ExitStack() as undo:
            if self._with_front:
                self._begin_with_front(undo)
            else:
                self._begin_pyfuse3(str(self.mountpoint), undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def _begin_pyfuse3(self, place: str, undo: ExitStack) -> None:
        options = {*pyfuse3.default_options, f"fsname={FS_NAME}", f"subtype={FS_NAME}"}
        if os.getuid() == 0:
            options.add("allow_other")
        try:
            pyfuse3.init(self.operations, place, options)
        except RuntimeError as error:
            raise DaemonError(
                f"cannot mount at {self.mountpoint}: {error}; look for /dev/fuse and fusermount3, and at the log"
            ) from error
        undo.callback(pyfuse3.close, unmount=True)

    def _begin_with_front(self, undo: ExitStack) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(ours.close)
        upcalls, upcalled = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(upcalled.close)
        undo.callback(upcalls.close)
        with theirs:
            room = min(_enlarge(ours), _enlarge(theirs)) - MESSAGE_ROOM_BYTES
            # libfuse takes it for an open /dev/fuse, and closes it in the end.
            self._begin_pyfuse3(f"/dev/fd/{theirs.fileno()}", undo)
            theirs.detach()
        request_bytes = min(REQUEST_BYTES, 1 << (room.bit_length() - 1))
        device = open_mounted(self.mountpoint, read_bytes_max=request_bytes)
        undo.callback(os.close, device)
        self._device_number = _device_at(self.mountpoint)
        undo.callback(self._end_connection)
        self.front = Front(device, ours.fileno(), upcalls.fileno(), request_bytes=request_bytes, seats=self._threads)
        self._composer.add_engine_user(self.front)
        self.front.serve()

    def _end_connection(self) -> None:
        try:
            if self.front is not None:
                self.front.drain()
            # Unless somebody else has unmounted it; what is there now is not ours.
            if self._device_number is not None and _device_at(self.mountpoint) == self._device_number:
                unmount(self.mountpoint)
        finally:
            if self.front is not None:
                self.front.stop()

    async def serve(self) -> None:
        """Answer the kernel until it is unmounted or ``stop`` is called."""
        async with trio.open_nursery() as nursery:
            if self.front is not None:
                nursery.start_soon(self._stop_at_end, self.front.ended_fd)
            with self._serving:
                await pyfuse3.main()
            nursery.cancel_scope.cancel()

    async def _stop_at_end(self, ended_fd: int) -> None:
        """pyfuse3 does not see the end of the kernel's connection by itself: the front is in between."""
        await trio.lowlevel.wait_readable(ended_fd)
        await self.stop()

    async def stop(self) -> None:
        """Answer no more requests than those under way."""
        pyfuse3.terminate()
        self._serving.deadline = trio.current_time() + STOP_GRACE_SECONDS


def _enlarge(end: socket.socket) -> int:
    """Have a socket hold many requests, as far as we may; how many bytes it holds then."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BYTES)
    except PermissionError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    return end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def mounted_at(mountpoint: Path) -> str | None:
    """The type of the file system that is mounted at a directory, ``None`` if nothing is."""
    found = _mounted_at(mountpoint)
    return found.fs_type if found is not None else None


def _device_at(mountpoint: Path) -> str | None:
    """The number of the file system that is mounted there."""
    found = _mounted_at(mountpoint)
    return found.device if found is not None else None


class _Mounted(NamedTuple):
    place: str
    fs_type: str
    device: str


def _mounted_at(mountpoint: Path) -> _Mounted | None:
    wanted = os.path.realpath(mountpoint.parent) + "/" + mountpoint.name if mountpoint.name else "/"
    found = None
    for mounted in _mounts():
        if mounted.place == wanted.replace("//", "/"):
            found = mounted  # the last one covers the others
    return found


def _mounts() -> Iterator[_Mounted]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            _, _, device, _, place, *_ = before.split(" ")
            for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                place = place.replace(escaped, character)
            yield _Mounted(place, after.split(" ")[0], device)


def is_stale(mountpoint: Path) -> bool:
    """Whether a daemon died and left its mount behind: the kernel answers for it, with ENOTCONN.

    It is asked for the space, which it does not cache as it does attributes.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in _GONE
    return False
