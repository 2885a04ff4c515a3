"""Large files, written past the page cache (open(2), O_DIRECT).

What is packed away is not read soon by who packs it. Copying it into the page cache would be most of the CPU time that
sealing takes, and would throw out what guests are using.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress

WORTHWHILE_BYTES = 1 << 20
"""Below, the cache costs less than waiting for the disk piece by piece."""
STAGING_BYTES = 8 << 20
ALIGNMENT = 4096
"""Of memory, place and length of each write: the largest that disks ask for."""


def write_direct(fd: int, pieces: Iterable[bytes]) -> None:
    """Write the pieces one after the other to a new, empty file, open for writing. It is not synced.

    Where the file system will not have it, they go through the page cache like everything else.
    """
    with suppress(OSError):
        _set_direct(fd, True)
    place = used = 0
    # Not closed by hand: an error's traceback may still have a view of it.
    staging = memoryview(mmap.mmap(-1, STAGING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
    for piece in pieces:
        taken = 0
        while taken < len(piece):
            count = min(len(piece) - taken, STAGING_BYTES - used)
            staging[used : used + count] = memoryview(piece)[taken : taken + count]
            taken += count
            used += count
            if used == STAGING_BYTES:
                _write(fd, staging, place)
                place, used = place + used, 0
    if used:
        _write(fd, staging[: -(-used // ALIGNMENT) * ALIGNMENT], place)
        os.ftruncate(fd, place + used)


def _write(fd: int, data: memoryview, place: int) -> None:
    while data:
        try:
            written = os.pwrite(fd, data, place)
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            _set_direct(fd, False)
            continue
        if written % ALIGNMENT:
            _set_direct(fd, False)  # the disk is nearly full; the rest of this has no place to be written to directly
        data, place = data[written:], place + written


def _set_direct(fd: int, on: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
