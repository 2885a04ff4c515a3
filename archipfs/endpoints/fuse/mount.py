"""One mount of the file system: made, served, taken down."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pyfuse3
import trio

from archipfs.compose.composer import Composer
from archipfs.endpoints.fuse.operations import VolumeOperations
from archipfs.errors import DaemonError

FS_NAME = "archipfs"
FS_TYPE = "fuse.archipfs"
STOP_GRACE_SECONDS = 10.0
"""How long requests under way may take once we are told to stop; a write that waits for a lock would never end."""


_GONE = frozenset({errno.ENOTCONN, errno.ECONNABORTED})


class Mount:
    """A context manager: mounted inside it, unmounted behind it."""

    def __init__(self, composer: Composer, mountpoint: Path) -> None:
        self.operations = VolumeOperations(composer, os.getuid(), os.getgid())
        self._mountpoint = mountpoint
        self._serving = trio.CancelScope()

    def __enter__(self) -> "Mount":
        """Raises ``DaemonError`` if the kernel or fusermount3 refuses."""
        options = {*pyfuse3.default_options, f"fsname={FS_NAME}", f"subtype={FS_NAME}"}
        if os.getuid() == 0:
            options.add("allow_other")
        try:
            pyfuse3.init(self.operations, str(self._mountpoint), options)
        except RuntimeError as error:
            raise DaemonError(
                f"cannot mount at {self._mountpoint}: {error}; look for /dev/fuse and fusermount3, and at the log"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pyfuse3.close(unmount=True)

    async def serve(self) -> None:
        """Answer the kernel until it is unmounted or ``stop`` is called."""
        with self._serving:
            await pyfuse3.main()

    async def stop(self) -> None:
        """Answer no more requests than those under way."""
        pyfuse3.terminate()
        self._serving.deadline = trio.current_time() + STOP_GRACE_SECONDS


def mounted_at(mountpoint: Path) -> str | None:
    """The type of the file system that is mounted at a directory, ``None`` if nothing is."""
    wanted = os.path.realpath(mountpoint.parent) + "/" + mountpoint.name if mountpoint.name else "/"
    found = None
    for place, fs_type in _mounts():
        if place == wanted.replace("//", "/"):
            found = fs_type  # the last one covers the others
    return found


def _mounts() -> Iterator[tuple[str, str]]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            place = before.split(" ")[4]
            for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                place = place.replace(escaped, character)
            yield place, after.split(" ")[0]


def is_stale(mountpoint: Path) -> bool:
    """Whether a daemon died and left its mount behind: the kernel answers for it, with ENOTCONN.

    It is asked for the space, which it does not cache as it does attributes.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in _GONE
    return False
