"""One mount of the file system: made, served, taken down."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pyfuse3
import trio

from archipfs.compose.composer import Composer
from archipfs.endpoints.fuse.device import FS_NAME, FS_TYPE, open_mounted, unmount
from archipfs.endpoints.fuse.front import Front
from archipfs.endpoints.fuse.operations import Numbering, VolumeOperations
from archipfs.endpoints.fuse.session import Session
from archipfs.endpoints.fuse.upcalls import Upcalls
from archipfs.errors import DaemonError

__all__ = ["FS_TYPE", "Kept", "Mount", "is_stale", "mounted_at"]

STOP_GRACE_SECONDS = 10.0
"""How long requests under way may take once we are told to stop; a write that waits for a lock would never end."""
REQUEST_BYTES = 1 << 20
"""The most that a read or a write carries: as much as pyfuse3 takes."""
MESSAGE_ROOM_BYTES = 8192
"""What a message has in it beside the bytes of a read or a write, and the socket's own share."""
SOCKET_BYTES = 8 << 20
HAND_OVER_SECONDS = 0.1
"""How long pyfuse3 may take to answer what it has, before the next daemon gets it once more."""

_SO_SNDBUFFORCE = 32
_GONE = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


@dataclass(frozen=True, slots=True)
class Kept:
    """Descriptors that the next daemon needs to go on with the mount."""

    device: int
    """/dev/fuse, mounted."""
    session: int


class Mount:
    """A context manager: mounted inside it, unmounted behind it.

    With the front, that one has /dev/fuse, and pyfuse3 one end of a pair of sockets. What pyfuse3 has no handlers for,
    the front hands to ``Upcalls`` over another pair.
    """

    def __init__(
        self,
        composer: Composer,
        mountpoint: Path,
        *,
        front: bool,
        threads: int | None = None,
        kept: Kept | None = None,
    ) -> None:
        """``threads`` of the front that read requests at a time; ``None``: as many as suits the machine.

        ``kept``: go on with the mount that an earlier daemon served. Its descriptors are ours then.
        """
        self.operations = VolumeOperations(composer, os.getuid(), os.getgid())
        self.front: Front | None = None
        self._composer = composer
        self.mountpoint = mountpoint
        self._with_front = front
        self._threads = threads
        self._taken_up = kept
        self._upcalls: Upcalls | None = None
        self._session: Session | None = None
        self._stopped = False
        self._handed_over = False
        self._device: int = -1
        self._reading = trio.Event()
        self._serving = trio.CancelScope()
        self._undo = ExitStack()

    def __enter__(self) -> "Mount":
        """Raises ``DaemonError`` if the kernel or fusermount3 refuses, or what was kept cannot be used."""
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
        with theirs:
            room = min(_enlarge(ours), _enlarge(theirs)) - MESSAGE_ROOM_BYTES
            # libfuse takes it for an open /dev/fuse, and closes it in the end.
            self._begin_pyfuse3(f"/dev/fd/{theirs.fileno()}", undo)
            theirs.detach()
        session = self._connect(min(REQUEST_BYTES, 1 << (room.bit_length() - 1)), undo)
        upcalls, upcalls_read = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(upcalls_read.close)
        undo.callback(upcalls.close)
        undo.callback(self._end_connection)
        self.front = Front(
            self._device,
            ours.fileno(),
            upcalls.fileno(),
            request_bytes=session.request_bytes,
            seats=self._threads,
            session=session.descriptor,
        )
        self.operations.numbering = Numbering(session, self.front.number_of)
        self._upcalls = Upcalls(self.operations, self._composer, self._device, upcalls_read)
        self._composer.add_engine_user(self.front)
        self._composer.add_engine_user(self.operations)

    def _connect(self, request_bytes: int, undo: ExitStack) -> Session:
        """Mount, or take up what is mounted."""
        if self._taken_up is None:
            self._device = open_mounted(self.mountpoint, read_bytes_max=request_bytes)
            undo.callback(os.close, self._device)
            device_number = _device_at(self.mountpoint)
            session = Session.create(request_bytes=request_bytes, device_number=device_number or 0)
            undo.callback(os.close, session.descriptor)
        else:
            self._device = self._taken_up.device
            undo.callback(os.close, self._taken_up.device)
            undo.callback(os.close, self._taken_up.session)
            session = Session(self._taken_up.session)
            if session.request_bytes > request_bytes:
                raise DaemonError(
                    f"requests of the mount at {self.mountpoint} carry {session.request_bytes} bytes, which is more "
                    "than a socket holds here; raise net.core.wmem_max, or unmount and mount again"
                )
        self._session = session
        return session

    def _end_connection(self) -> None:
        try:
            if self.front is not None:
                self.front.drain()
            # Unless somebody else has unmounted it, and what is there now is not ours; or we could not take it up, and
            # the next one may.
            ends = self._taken_up is None or self._stopped
            if ends and self._session is not None and _device_at(self.mountpoint) == self._session.device_number:
                unmount(self.mountpoint)
        finally:
            if self.front is not None:
                self.front.stop()

    async def serve(self) -> None:
        """Answer the kernel until it is unmounted or ``stop`` is called."""
        async with trio.open_nursery() as nursery:
            if self.front is not None and self._upcalls is not None:
                nursery.start_soon(self._stop_at_end, self.front.ended_fd)
                nursery.start_soon(self._upcalls.serve)
                nursery.start_soon(self._begin_serving, self.front)
            with self._serving:
                await pyfuse3.main()
            if self._handed_over:
                await trio.sleep_forever()  # to return would unmount what is the next daemon's now
            nursery.cancel_scope.cancel()

    async def _begin_serving(self, front: Front) -> None:
        await self.operations.take_up()
        # Only now: whoever is answered natively must be known to the front.
        await trio.to_thread.run_sync(front.serve)
        self._reading.set()

    async def initialised(self) -> None:
        """Return once everything is open again that the kernel has open, requests are read, and the first one was
        answered, which settled what the kernel can do."""
        if self.front is not None:
            await self._reading.wait()
            await trio.lowlevel.wait_readable(self.front.initialised_fd)

    @property
    def kept(self) -> Kept | None:
        """What the next daemon needs, once it is ``initialised``; ``None`` where none can go on with this mount."""
        if self.front is None or self._session is None or not self.front.resumable:
            return None
        return Kept(self._device, self._session.descriptor)

    async def _stop_at_end(self, ended_fd: int) -> None:
        """pyfuse3 does not see the end of the kernel's connection by itself: the front is in between."""
        await trio.lowlevel.wait_readable(ended_fd)
        await self.stop()

    async def stop(self) -> None:
        """Answer no more requests than those under way."""
        self._stopped = True
        pyfuse3.terminate()
        self._serving.deadline = trio.current_time() + STOP_GRACE_SECONDS

    async def hand_over(self) -> None:
        """Answer what is under way, and read no more: the process may then end as if it were killed.

        What takes long is not waited for; the next daemon gets it again.
        """
        if self.front is not None:
            # First, since libfuse takes the end of its socket, which draining is, for an error that ends the mount.
            self._handed_over = True
            pyfuse3.terminate()
            await trio.to_thread.run_sync(self.front.drain)
            with trio.move_on_after(HAND_OVER_SECONDS):
                await self.operations.idle()


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


def _device_at(mountpoint: Path) -> int | None:
    """st_dev of the file system that is mounted there."""
    found = _mounted_at(mountpoint)
    return found.device if found is not None else None


class _Mounted(NamedTuple):
    place: str
    fs_type: str
    device: int


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
            major, _, minor = device.partition(":")
            yield _Mounted(place, after.split(" ")[0], os.makedev(int(major), int(minor)))


def is_stale(mountpoint: Path) -> bool:
    """Whether a daemon died and left its mount behind: the kernel answers for it, with ENOTCONN.

    It is asked for the space, which it does not cache as it does attributes.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in _GONE
    return False
