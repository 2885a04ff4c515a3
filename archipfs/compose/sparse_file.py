"""A file outside, or a disk, read hole by hole: what is imported."""

import errno
import os
import stat
from pathlib import Path
from types import TracebackType

from archipfs.errors import ArchipError, InvalidInput, NotFound
from archipfs.types import SECTOR_BYTES


class SparseFile:
    """Open for reading; a context manager. May be read from several threads at once. As ``seal.Reader`` has it: what is
    behind the end, up to a whole sector, is zeros."""

    def __init__(self, path: Path) -> None:
        """Raises ``NotFound``, and ``InvalidInput`` for what has no size."""
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"there is no file {path}; give one that can be read here") from None
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}; give a file that can be read here") from error
        try:
            mode = os.fstat(self._file).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise InvalidInput(f"{path} is neither a file nor a disk; give one that is")
            self.size = os.lseek(self._file, 0, os.SEEK_END)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "SparseFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)

    def data_bytes(self) -> int:
        """About how much it has beside its holes."""
        status = os.fstat(self._file)
        return min(self.size, status.st_blocks * 512) if stat.S_ISREG(status.st_mode) else self.size

    def next_change(self, offset: int, end: int) -> tuple[int, int] | None:
        data = self.next_data(offset)
        if data is None or data >= end:
            return None
        hole = self.next_hole(data)
        return data - data % SECTOR_BYTES, min(end, -(-hole // SECTOR_BYTES) * SECTOR_BYTES)

    def next_data(self, offset: int) -> int | None:
        if offset >= self.size:
            return None
        try:
            return os.lseek(self._file, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno == errno.EINVAL:
                return offset  # a disk has no holes that it knows of
            raise self._failed(error) from error

    def next_hole(self, offset: int) -> int:
        try:
            return os.lseek(self._file, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.EINVAL):
                return self.size
            raise self._failed(error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._file, [buffer[filled:]], offset + filled)
            except OSError as error:
                raise self._failed(error) from error
            if count == 0:
                break  # the end, or it was cut while we read it
            filled += count
        buffer[filled:] = bytes(len(buffer) - filled)

    def _failed(self, error: OSError) -> ArchipError:
        return ArchipError(f"cannot read {self._path}: {error.strerror}; see the system's log")
