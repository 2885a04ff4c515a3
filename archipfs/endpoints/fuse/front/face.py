"""The front's Python face."""

import os
from typing import Any

import structlog

from archipfs.compose.engine import EngineVolume, calls_address
from archipfs.endpoints.fuse._front import ffi, lib
from archipfs.endpoints.fuse.inodes import inode_of
from archipfs.errors import from_errno
from archipfs.types import VolumeId

log = structlog.get_logger()


class Front:
    """Threads between the kernel and pyfuse3, until ``stop``. They know nothing but open volumes.

    It is an ``EngineUser``: the composer tells it which volume is served by which engine.
    """

    def __init__(self, device: int, socket: int, *, request_bytes: int, seats: int | None = None) -> None:
        """``device`` is /dev/fuse, mounted, ``socket`` our end of the pair; both stay the caller's.

        ``seats`` is how many threads read requests at a time; one a core, if it is not said, and two at least.
        """
        seats = seats or max(2, len(os.sched_getaffinity(0)))
        options = ffi.new("struct af_options *")
        options.device, options.socket = device, socket
        options.seats = min(seats, lib.AF_THREADS_MAX)
        options.request_bytes = request_bytes
        options.engine = ffi.cast("struct ae_calls *", calls_address())
        started = ffi.new("struct af_front **")
        number = -lib.af_front_start(options, started)
        if number:
            raise from_errno(number, "starting the threads that serve the mount")
        self._front: Any = started[0]
        """``None`` once it was stopped."""

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
