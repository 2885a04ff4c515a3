"""The requests that pyfuse3 has no handlers for: ioctls, and copies of ranges between open files.

The front hands them to us whole, over a socket, and we answer on /dev/fuse ourselves. Each request is a task of its
own, which is carried out and answered in a thread. One whose thread has not begun when we are cancelled stays
unanswered: the kernel's connection ends then, or the next daemon gets it again.
"""

import errno
import os
import socket
from collections.abc import Callable
from functools import partial

import structlog
import trio

from archipfs.compose.composer import Composer, Found
from archipfs.compose.volume import OpenVolume
from archipfs.endpoints.fuse import ioctls, wire
from archipfs.endpoints.fuse.commands import Caller, clone, groups_of, snapshot
from archipfs.endpoints.fuse.inodes import ROOT, inode_of
from archipfs.endpoints.fuse.ioctls import InfoFlags
from archipfs.endpoints.fuse.operations import VolumeOperations, refusal
from archipfs.endpoints.fuse.wire import CopyRange, Ioctl, Malformed
from archipfs.errors import InvalidInput, LockHeld
from archipfs.map.records import FORMAT_VERSION, Hold

log = structlog.get_logger()

THREADS_MAX = 16
MESSAGE_BYTES_MAX = 32 << 10
"""More than an ioctl can have: its number leaves 14 bits for the size of its structure."""

_NOBODY_WAITS = frozenset({errno.ENOENT, errno.ENODEV, errno.ECONNABORTED})
"""What /dev/fuse says when the request, the inode or the whole connection is gone."""
_HOLDS = {Hold.IO: InfoFlags.OPEN, Hold.OPENED: InfoFlags.KEPT, Hold.LOCKED: InfoFlags.LOCKED}


class Upcalls:
    def __init__(self, operations: VolumeOperations, composer: Composer, device: int, requests: socket.socket) -> None:
        """``requests`` come from the front, ``device`` is /dev/fuse. Both stay the caller's."""
        self._operations = operations
        self._composer = composer
        self._device = device
        self._requests = requests
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self._commands: dict[int, Callable[[Ioctl, Found], bytes]] = {
            ioctls.SNAPSHOT: self._snapshot,
            ioctls.CLONE: self._clone,
            ioctls.INFO: self._info,
        }

    async def serve(self) -> None:
        """Carry out requests until cancelled, or until the front has closed its end."""
        self._requests.setblocking(False)
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(self._requests)
                try:
                    message = self._requests.recv(MESSAGE_BYTES_MAX)
                except BlockingIOError:
                    continue
                if not message:
                    return
                nursery.start_soon(self._serve, message)

    async def _serve(self, message: bytes) -> None:
        try:
            request = wire.parse(message)
        except Malformed as error:
            self._write(wire.error_answer(error.unique, refusal("upcall", error)))
            return
        except InvalidInput as error:
            log.error("not answered", operation="upcall", error=str(error))
            return
        try:
            work = self._work_of_ioctl(request) if isinstance(request, Ioctl) else await self._work_of_copy(request)
        except Exception as error:
            self._refuse(request, error)
            return
        await trio.to_thread.run_sync(self._carry_out, request, work, limiter=self._threads)

    # In a thread

    def _carry_out(self, request: Ioctl | CopyRange, work: Callable[[], bytes | int]) -> None:
        try:
            answer = wire.answer(request, work())
        except Exception as error:
            self._refuse(request, error)
        else:
            self._write(answer)

    def _refuse(self, request: Ioctl | CopyRange, error: Exception) -> None:
        operation = "ioctl" if isinstance(request, Ioctl) else "copy_file_range"
        self._write(wire.error_answer(request.header.unique, refusal(operation, error)))

    def _write(self, message: bytes) -> None:
        try:
            os.write(self._device, message)
        except OSError as error:
            if error.errno not in _NOBODY_WAITS:
                log.error("not answered", operation="upcall", error=str(error))

    # ioctls

    def _work_of_ioctl(self, request: Ioctl) -> Callable[[], bytes]:
        command = self._commands.get(request.command)
        if command is None or request.directory:
            raise OSError(errno.ENOTTY, f"no such ioctl: {request.command:#x}")
        return lambda: command(request, self._operations.found(request.header.inode))

    def _snapshot(self, request: Ioctl, found: Found) -> bytes:
        snapshot(self._composer, found, ioctls.decode_name(request.data), self._caller(request))
        self._made_from(found)
        return b""

    def _clone(self, request: Ioctl, found: Found) -> bytes:
        clone(self._composer, found, ioctls.decode_name(request.data), self._caller(request))
        self._made_from(found)
        return b""

    def _info(self, request: Ioctl, found: Found) -> bytes:
        record, lock = found.record, self._composer.lock_of(found)
        flags = InfoFlags(0)
        if lock is not None:
            for hold in lock.holds:
                flags |= _HOLDS[hold]
            if not found.mapper.locks.is_ours(lock):
                flags |= InfoFlags.FOREIGN
        if record.name is None:
            flags |= InfoFlags.REMOVED
        stored_bytes = self._composer.stored_bytes(found)
        return ioctls.encode_info(
            ioctls.Info(
                FORMAT_VERSION, record.kind, flags, record.size, stored_bytes, record.id, record.origin, record.name
            )
        )

    def _caller(self, request: Ioctl) -> Caller:
        header = request.header
        groups = groups_of(header.pid)
        return Caller(header.uid, header.gid, groups, request=self._operations.request_id(header.number))

    def _made_from(self, found: Found) -> None:
        """There is a new name, and the volume has a new head, in which nothing is stored yet."""
        self._operations.names_changed()
        for inode in (ROOT, inode_of(found.record.id)):
            self._write(wire.attributes_changed(inode))

    # Copies

    async def _work_of_copy(self, request: CopyRange) -> Callable[[], int]:
        source = await self._operations.opened(request.handle)
        target = await self._operations.opened(request.target_handle)
        return partial(self._copy, request, source, target)

    def _copy(self, request: CopyRange, source: OpenVolume, target: OpenVolume) -> int:
        try:
            copied = self._composer.copy_range(source, request.offset, target, request.target_offset, request.length)
        except LockHeld as error:
            # The kernel then reads and writes instead, and a write waits for the lock.
            raise OSError(errno.EOPNOTSUPP, str(error)) from error
        # What a copy freezes leaves the source with a new head. The target's attributes the kernel sees to by itself.
        self._write(wire.attributes_changed(inode_of(source.id)))
        return copied
