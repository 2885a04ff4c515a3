"""The native client's face: data objects, packs to read, and the native side of claims.

No call holds the GIL while it waits for the cluster.
"""

import errno
import math
from collections.abc import Callable
from typing import Any

import structlog

from archipfs.blockers.contract import DataObject, check_range
from archipfs.blockers.rados._native import ffi, lib
from archipfs.blockers.rados.failures import store_error
from archipfs.blockers.rados.settings import Settings
from archipfs.errors import StoreError, StoreUnavailable, TooLarge

log = structlog.get_logger()

LIBRARY = "librados.so.2"
DATA_BYTES_MAX: int = lib.RA_DATA_BYTES_MAX
STRIPE_BYTES: int = lib.RA_STRIPE_BYTES

_PROBLEM_BYTES = 500
_ADDRESSES_BYTES = 4096
_UINT64_MAX = (1 << 64) - 1


def _check(result: int, doing: str) -> None:
    if result < 0:
        raise store_error(-result, doing)


class NativeClient:
    """One native client of the cluster. Thread-safe."""

    def __init__(self, settings: Settings, library: str = LIBRARY) -> None:
        """Connect. Raises ``StoreUnavailable`` within ``settings.timeout_s``."""
        problem = ffi.new("char[]", _PROBLEM_BYTES)
        made = ffi.new("struct ra_client **")
        texts = {
            name: ffi.new("char[]", value.encode())
            for name, value in {
                "library": library,
                "conf": settings.conf,
                "user": settings.user,
                "pool": settings.pool,
                "space": settings.namespace,
                "keyring": settings.keyring,
            }.items()
            if value is not None
        }
        given = ffi.new("struct ra_settings *", texts)
        given.timeout_s = max(1, math.ceil(settings.timeout_s))
        given.operation_timeout_s = math.ceil(settings.operation_timeout_s)
        result = lib.ra_client_open(given, made, problem, _PROBLEM_BYTES)
        if result < 0:
            said = ffi.string(problem).decode(errors="replace")
            error = store_error(-result, f"connecting to pool {settings.pool} as {settings.user}: {said}")
            raise error if isinstance(error, StoreUnavailable) else StoreUnavailable(str(error))
        # Closed when the last call that uses it is over. Objects keep what they need of it alive themselves.
        self._client: Any = ffi.gc(made[0], lib.ra_client_close)

    def create(self, key: str) -> "NativeDataObject":
        """An empty data object. Raises ``AlreadyExists``."""
        made = ffi.new("struct ra_data **")
        _check(lib.ra_data_create(self._open_client(), key.encode(), made), f"creating {key}")
        return NativeDataObject(key, made[0])

    def open(self, key: str, *, writable: bool, claim: str | None = None) -> "NativeDataObject":
        """Open a data object. ``claim``: the key of a claim that was made here. Raises ``ObjectMissing``."""
        made = ffi.new("struct ra_data **")
        under = ffi.NULL if claim is None else claim.encode()
        _check(lib.ra_data_open(self._open_client(), key.encode(), writable, under, made), f"opening {key}")
        return NativeDataObject(key, made[0])

    def delete(self, key: str) -> None:
        """Remove a data object with all its stripes, durably; there may be none."""
        _check(lib.ra_data_delete(self._open_client(), key.encode()), f"deleting {key}")

    def exists(self, key: str) -> bool:
        """Whether there is such a data object, or what a removal that was cut short has left of one."""
        result = lib.ra_data_exists(self._open_client(), key.encode())
        if result == -errno.ENOENT:
            return False
        _check(result, f"looking for {key}")
        return True

    def open_immutable(self, key: str) -> "NativePack":
        """Open a pack. Raises ``ObjectMissing``."""
        made = ffi.new("struct ra_pack **")
        _check(lib.ra_pack_open(self._open_client(), key.encode(), made), f"opening {key}")
        return NativePack(key, made[0])

    def claim(self, key: str, owner: str) -> None:
        """Have the cluster note that this client acts for ``owner``. Raises ``Busy`` if another owner is noted."""
        _check(lib.ra_claim(self._open_client(), key.encode(), owner.encode()), f"claiming {key} for {owner}")

    def disclaim(self, key: str) -> bool:
        """Give a claim up, after the calls under way on what was opened under it; there may be none. Returns whether it
        stays noted.

        If the cluster left one of its writes unanswered, the claim stays noted, so that whoever claims it next shuts
        this client out before it does anything else.
        """
        kept = ffi.new("bool *")
        _check(lib.ra_disclaim(self._open_client(), key.encode(), kept), f"giving up the claim of {key}")
        if kept[0]:
            log.warning("a claim stays in the store, since a write under it was never answered", key=key)
        return bool(kept[0])

    def addresses(self) -> list[str]:
        """By which the cluster knows this client, as ``osd blocklist add`` takes them."""
        found = ffi.new("char[]", _ADDRESSES_BYTES)
        result = lib.ra_client_addresses(self._open_client(), found, _ADDRESSES_BYTES)
        _check(result, "asking for the client's addresses")
        return [each for each in ffi.string(found).decode().split(",") if each]

    def wait_for_latest_map(self) -> None:
        """From then on, who was shut out before is refused wherever we have been: see ``claims``."""
        result = lib.ra_client_wait_for_latest_map(self._open_client())
        _check(result, "waiting for the cluster's newest map")

    @property
    def is_shut_out(self) -> bool:
        """Whether an operation came back with ESHUTDOWN."""
        return bool(lib.ra_client_is_shut_out(self._open_client()))

    def adopt(self, successor: "NativeClient") -> None:
        """Go on by the successor's connection: objects without a claim at once, others when it is claimed again."""
        lib.ra_client_adopt(self._open_client(), successor._open_client())

    def close(self) -> None:
        """Let go of the cluster. What is open goes on, except under claims."""
        self._client = None

    def _open_client(self) -> Any:
        client = self._client
        if client is None:
            raise StoreError("the connection to the cluster was closed; open the backend again")
        return client


class NativeDataObject(DataObject):
    """A data object: a header, and stripes of 4 MiB."""

    def __init__(self, key: str, data: Any) -> None:
        self._key = key
        # Closed when the last call that uses it is over.
        self._data = ffi.gc(data, lib.ra_data_close)
        self._natives: list[Any] = []

    def pread(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        buffer = bytearray(length)
        data = self._open_data("reading")
        result = lib.ra_data_read(data, ffi.from_buffer(buffer), length, min(offset, _UINT64_MAX))
        _check(result, f"reading {self._key} at {offset}")
        return bytes(buffer)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        check_range(offset)
        view = memoryview(data).cast("B")
        self._check_end(offset + len(view))
        result = lib.ra_data_write(self._open_data("writing"), ffi.from_buffer(view), len(view), offset)
        _check(result, f"writing {self._key} at {offset}")

    def punch(self, offset: int, length: int) -> None:
        check_range(offset, length)
        begin, end = (min(each, DATA_BYTES_MAX) for each in (offset, offset + length))
        result = lib.ra_data_punch(self._open_data("punching"), begin, end - begin)
        _check(result, f"punching {self._key} at {offset}")

    def truncate(self, size: int) -> None:
        check_range(size)
        self._check_end(size)
        _check(lib.ra_data_truncate(self._open_data("truncating"), size), f"truncating {self._key} to {size}")

    def flush(self) -> None:
        # A write is answered when all replicas have it on disk.
        self._open_data("flushing")

    def size(self) -> int:
        return self._ask(lib.ra_data_size, "asking for the size of")

    def allocated(self) -> int:
        return self._ask(lib.ra_data_allocated, "asking for the room taken by")

    def next_data(self, offset: int) -> int | None:
        return self._seek(lib.ra_data_next_data, offset)

    def next_hole(self, offset: int) -> int:
        found = self._seek(lib.ra_data_next_hole, offset)
        return offset if found is None else found

    def native(self) -> int | None:
        return _share(self._natives, lib.ra_data_share, self._open_data("opening"))

    def close(self) -> None:
        self._data = None

    def _open_data(self, doing: str) -> Any:
        data = self._data
        if data is None:
            raise StoreError(f"{doing} {self._key}: it was closed; open it again")
        return data

    def _ask(self, question: Callable[..., int], doing: str) -> int:
        answer = ffi.new("uint64_t *")
        _check(question(self._open_data(doing), answer), f"{doing} {self._key}")
        return int(answer[0])

    def _seek(self, question: Callable[..., int], offset: int) -> int | None:
        check_range(offset)
        found = ffi.new("uint64_t *")
        result = question(self._open_data("looking into"), min(offset, _UINT64_MAX), found)
        if result == -errno.ENXIO:
            return None
        _check(result, f"looking for data and holes of {self._key} at {offset}")
        return int(found[0])

    def _check_end(self, end: int) -> None:
        if end > DATA_BYTES_MAX:
            raise TooLarge(f"{self._key}: {end} bytes are more than a data object can have ({DATA_BYTES_MAX})")


class NativePack(DataObject):
    """A pack: one RADOS object that never changes."""

    def __init__(self, key: str, pack: Any) -> None:
        self._key = key
        self._pack = ffi.gc(pack, lib.ra_pack_close)
        self._natives: list[Any] = []

    def pread(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        buffer = bytearray(length)
        result = lib.ra_pack_read(self._open_pack(), ffi.from_buffer(buffer), length, min(offset, _UINT64_MAX))
        _check(result, f"reading {self._key} at {offset}")
        return bytes(buffer)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        raise self._unchangeable()

    def punch(self, offset: int, length: int) -> None:
        raise self._unchangeable()

    def truncate(self, size: int) -> None:
        raise self._unchangeable()

    def flush(self) -> None:
        self._open_pack()

    def size(self) -> int:
        return int(lib.ra_pack_bytes(self._open_pack()))

    def allocated(self) -> int:
        return self.size()

    def next_data(self, offset: int) -> int | None:
        check_range(offset)
        return offset if offset < self.size() else None

    def next_hole(self, offset: int) -> int:
        check_range(offset)
        return max(offset, self.size())

    def native(self) -> int | None:
        return _share(self._natives, lib.ra_pack_share, self._open_pack())

    def close(self) -> None:
        self._pack = None

    def _open_pack(self) -> Any:
        pack = self._pack
        if pack is None:
            raise StoreError(f"{self._key}: it was closed; open it again")
        return pack

    def _unchangeable(self) -> StoreError:
        return StoreError(f"{self._key}: a pack never changes; this is a bug in the caller, please report it")


def _share(kept: list[Any], share: Callable[..., None], opened: Any) -> int:
    """The address of a ``struct ae_object`` that stays there for as long as ``kept`` does."""
    made = ffi.new("struct ae_object *")
    share(opened, made)
    kept.append(made)
    return int(ffi.cast("uintptr_t", made))
