"""The front's Python face."""

import errno
import os
from typing import Any

import structlog

from archipfs.compose.engine import EngineVolume, calls_address
from archipfs.endpoints.fuse._front import ffi, lib
from archipfs.endpoints.fuse.inodes import inode_of
from archipfs.errors import DaemonError, from_errno
from archipfs.types import VolumeId

log = structlog.get_logger()


class Front:
    """Threads between the kernel and pyfuse3, until ``stop``. They know nothing but open volumes.

    It is an ``EngineUser``: the composer tells it which volume is served by which engine.
    """

    def __init__(
        self,
        device: int,
        socket: int,
        upcalls: int,
        *,
        request_bytes: int,
        seats: int | None = None,
        session: int | None = None,
    ) -> None:
        """Requests are read from ``serve`` on. Raises ``DaemonError`` if the session is damaged.

        ``device`` is /dev/fuse, mounted, ``socket`` our end of the pair to libfuse, ``upcalls`` of the one that takes
        IOCTL and COPY_FILE_RANGE. ``session`` is the memfd of the session; without one, nothing is kept for a process
        behind us, and if it holds an INIT request, libfuse gets that one. All of them stay the caller's.

        ``seats`` is how many threads read requests at a time; one a core, if it is not said, and two at least.
        """
        seats = seats or max(2, len(os.sched_getaffinity(0)))
        options = ffi.new("struct af_options *")
        options.device, options.socket, options.upcalls = device, socket, upcalls
        options.session = -1 if session is None else session
        options.seats = min(seats, lib.AF_THREADS_MAX)
        options.request_bytes = request_bytes
        options.engine = ffi.cast("struct ae_calls *", calls_address())
        started = ffi.new("struct af_front **")
        number = -lib.af_front_start(options, started)
        if number == errno.EBADMSG:
            raise DaemonError("the session that the last daemon left is damaged; unmount, and mount again")
        if number:
            raise from_errno(number, "starting the threads that serve the mount")
        self._front: Any = started[0]
        """``None`` once it was stopped."""

    def serve(self) -> None:
        """Begin to read requests, once; those first that a process before us left without an answer."""
        number = -lib.af_front_serve(self._front)
        if number:
            raise from_errno(number, "reading requests of the mount")

    @property
    def initialised_fd(self) -> int:
        """Readable once libfuse's answer to INIT has passed."""
        return int(lib.af_front_initialised_fd(self._front))

    @property
    def resumable(self) -> bool:
        """Whether another process can go on with the session; known once initialised. Kernels before 6.9 say no."""
        return bool(lib.af_front_resumable(self._front))

    def number_of(self, pid: int) -> tuple[int, bool]:
        """The number of a request that pyfuse3 has, by the ``pid`` it shows, and whether it is sent again.

        The number is the same each time it is sent. Ask before the request is answered.
        """
        resent = ffi.new("bool *")
        number = int(lib.af_front_number(self._front, pid, resent))
        assert number != 0, f"no request is under way that has the tag {pid}"
        return number, bool(resent[0])

    @property
    def ended_fd(self) -> int:
        """Readable as soon as the kernel has ended the connection."""
        return int(lib.af_front_ended_fd(self._front))

    def engine_opened(self, volume: VolumeId, engine: EngineVolume, size_max: int) -> None:
        """From now on the volume's bytes are served here; where that cannot be, pyfuse3 goes on doing so."""
        if self._front is None:
            return
        address = ffi.cast("struct ae_volume *", engine.address())
        number = -lib.af_front_register(self._front, inode_of(volume), address, size_max)
        if number:
            log.error("served slowly", volume=volume, error=os.strerror(number))

    def engine_closing(self, volume: VolumeId) -> None:
        """Returns when no request is inside the engine any more."""
        if self._front is not None:
            lib.af_front_unregister(self._front, inode_of(volume))

    def drain(self) -> None:
        """Have requests under way answered, and read no more."""
        lib.af_front_drain(self._front)

    def stop(self) -> None:
        """End the kernel's connection before: see ``af_front_stop``."""
        front, self._front = self._front, None
        lib.af_front_stop(front)
