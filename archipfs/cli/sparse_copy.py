"""An ordinary copy of a file that keeps its holes, and a new file that comes into being as a whole or not at all."""

import ctypes
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PIECE_BYTES = 1 << 20

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def temporary_beside(path: Path) -> Path:
    """A name that nothing has. It does not begin with a dot, which no volume's may."""
    return path.with_name(f"archip-reflink-{secrets.token_hex(8)}")


@contextmanager
def replacing(temporary: Path, path: Path, *, replace: bool) -> Iterator[None]:
    """Around a block that makes ``temporary``, and behind it has the name ``path``; if it fails, nothing is left.

    Raises ``FileExistsError`` for what is called so already, unless ``replace``.
    """
    try:
        yield
        if replace:
            os.rename(temporary, path)
        else:
            _rename_to_new(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _rename_to_new(old: Path, new: Path) -> None:
    """Python has no renameat2(2); without it somebody else's file could be replaced that came a moment ago."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EINVAL:
        raise OSError(number, os.strerror(number), str(new))
    # NFS has no such rename, but it has links.
    os.link(old, new)
    os.unlink(old)


def copy_sparse(source: int, target: int, advanced: Callable[[int], None]) -> None:
    """Make the new, empty file ``target`` what ``source`` is, durably. ``advanced`` is told how many bytes are done."""
    size = os.fstat(source).st_size
    for start, end in _data(source, size):
        offset = start
        while offset < end:
            advanced(offset)
            piece = os.pread(source, min(PIECE_BYTES, end - offset), offset)
            if not piece:
                break  # it was cut meanwhile
            _write_all(target, piece, offset)
            offset += len(piece)
    os.ftruncate(target, size)
    os.fsync(target)
    advanced(size)


def _data(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where there is data: start and end, in order."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
        yield start, end


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
