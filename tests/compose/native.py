"""A driver whose data objects are called in C, with no descriptor and no Python between: as those of a cluster are."""

from archipfs.blockers.contract import DataObject
from archipfs.blockers.file import FileBlocker
from archipfs.compose._engine import ffi, lib


class NativeObject(DataObject):
    """A file that only shows the engine's own C functions for it."""

    def __init__(self, inner: DataObject) -> None:
        self._inner = inner
        self._made = ffi.new("struct ae_object *")

    def native(self) -> int:
        descriptor = self._inner.fileno()
        assert descriptor is not None
        assert lib.ae_object_file(descriptor, self._made) == 0
        self._made.waits = True
        return int(ffi.cast("uintptr_t", self._made))

    def pread(self, offset: int, length: int) -> bytes:
        return self._inner.pread(offset, length)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._inner.pwrite(offset, data)

    def punch(self, offset: int, length: int) -> None:
        self._inner.punch(offset, length)

    def truncate(self, size: int) -> None:
        self._inner.truncate(size)

    def flush(self) -> None:
        self._inner.flush()

    def size(self) -> int:
        return self._inner.size()

    def allocated(self) -> int:
        return self._inner.allocated()

    def next_data(self, offset: int) -> int | None:
        return self._inner.next_data(offset)

    def next_hole(self, offset: int) -> int:
        return self._inner.next_hole(offset)

    def close(self) -> None:
        self._inner.close()


class NativeBlocker(FileBlocker):
    """A directory, of which nobody above sees a descriptor."""

    def open(self, key: str) -> DataObject:
        return NativeObject(super().open(key))

    def create_data(self, key: str) -> DataObject:
        return NativeObject(super().create_data(key))

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        return NativeObject(super().open_data(key, writable=writable, claim=claim))
