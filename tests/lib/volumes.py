"""Volumes as files: the few calls that tests on a mount use again and again."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from archipfs.types import SECTOR_BYTES
from tests.lib.waiting import wait_until

__all__ = [
    "SECTOR_BYTES",
    "clone",
    "closes",
    "command",
    "create",
    "fact",
    "opened",
    "read_all",
    "rollback",
    "snapshot",
]


def create(path: Path, size: int) -> Path:
    """A new volume of that size."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.truncate(path, size)
    return path


def command(path: Path, name: str, value: str = "") -> None:
    os.setxattr(path, f"user.archip.{name}", value.encode())


def fact(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.archip.{name}").decode()


def closes(path: Path) -> None:
    """Wait until nobody has the volume open: what it holds is flushed then, and its lock free.

    The kernel tells the daemon of the last close only after close(2) has returned, and then the daemon flushes.
    """
    wait_until(lambda: fact(path, "lock") == "", f"nobody holds {path.name}")


def snapshot(path: Path, name: str) -> Path:
    command(path, "snapshot", name)
    return path.with_name(name)


def clone(path: Path, name: str) -> Path:
    command(path, "clone", name)
    return path.with_name(name)


def rollback(path: Path, to: str) -> None:
    command(path, "rollback", to)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor, as open(2) gives it. It may also be closed when the daemon was killed meanwhile."""
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        try:
            os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise


def read_all(path: Path, flags: int = 0) -> bytes:
    """The whole volume; ``flags`` in addition to O_RDONLY."""
    with opened(path, os.O_RDONLY | flags) as descriptor:
        size = os.fstat(descriptor).st_size
        pieces = []
        offset = 0
        while offset < size:
            piece = os.pread(descriptor, min(1 << 20, size - offset), offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)
