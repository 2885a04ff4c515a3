"""Immutable objects: a RADOS object each, ``<kind>/<ident>`` in the namespace ``<namespace>.packs``.

It is written by one request, which an OSD carries out wholly or not at all.
"""

import errno
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from archipfs.blockers.rados.connection import Connection
from archipfs.blockers.rados.in_flight import IN_FLIGHT_MAX, at_once, result_of
from archipfs.blockers.rados.index import Index
from archipfs.errors import ObjectMissing

SHARDS = 64
"""Of the index. An OSD warns of objects with more than 200,000 entries: these are good for 50 TiB of packs."""
_READ_BYTES = 4 << 20


class Packs:
    """All immutable objects of a store. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._index = Index(connection, "packs", SHARDS)

    def put(self, kind: str, ident: str, data: bytes | Sequence[bytes]) -> None:
        key = f"{kind}/{ident}"
        whole = data if isinstance(data, bytes) else b"".join(data)

        def write() -> None:
            with self._connection.call(f"writing {key}"):
                self._connection.packs.write_full(key, whole)

        self._index.make(kind, ident, write)

    def get(self, key: str, offset: int, length: int | None) -> bytes:
        doing = f"reading {key}"
        if not length:
            # A read of 0 bytes is one of the whole object, to an OSD.
            size = self._size(key, doing)
            length = max(size - offset, 0) if length is None else 0
        if 0 < length <= _READ_BYTES:
            with self._connection.call(doing):
                return bytes(self._connection.packs.read(key, length, offset))
        pieces: list[bytes] = []
        end = offset + length
        while offset < end:
            batch_end = min(end, offset + IN_FLIGHT_MAX * _READ_BYTES)
            with self._connection.call(doing):
                reads = at_once(
                    partial(_Read, self._connection, key, begin, min(_READ_BYTES, batch_end - begin))
                    for begin in range(offset, batch_end, _READ_BYTES)
                )
                pieces.extend(read.data(self._connection, doing) for read in reads)
            if not pieces[-1]:
                break
            offset = batch_end
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def exists(self, key: str) -> bool:
        try:
            self._size(key, f"looking for {key}")
        except ObjectMissing:
            return False
        return True

    def _size(self, key: str, doing: str) -> int:
        with self._connection.call(doing):
            size, _ = self._connection.packs.stat(key)
        return int(size)

    def delete(self, kind: str, ident: str) -> None:
        key = f"{kind}/{ident}"

        def remove() -> None:
            doing = f"deleting {key}"
            with self._connection.call(doing):
                try:
                    self._connection.packs.remove_object(key)
                except self._connection.rados.ObjectNotFound:
                    self._connection.require_pool(doing)

        self._index.remove(kind, ident, remove)

    def list(self, kind: str) -> Iterator[str]:
        """Keys. Those that are perhaps there are looked for, several at once."""
        unsure = []
        for ident, certain in self._index.list(kind):
            key = f"{kind}/{ident}"
            if certain:
                yield key
                continue
            unsure.append(key)
            if len(unsure) == IN_FLIGHT_MAX:
                yield from self._there(unsure)
                unsure = []
        yield from self._there(unsure)

    def _there(self, keys: Sequence[str]) -> Sequence[str]:
        """Those of these that are there."""
        doing = "looking for packs that may be there"
        with self._connection.call(doing):
            looks = at_once(partial(_Look, self._connection, key) for key in keys)
            return [look.key for look in looks if look.found(self._connection, doing)]


class _Read:
    """A range of an object."""

    def __init__(self, connection: Connection, key: str, offset: int, length: int) -> None:
        self._data = b""
        self._result = 0
        self._completion = connection.packs.aio_read(key, length, offset, self._arrived)

    def _arrived(self, _: Any, data: bytes | None) -> None:
        self._data = data or b""

    def finish(self) -> None:
        self._result = result_of(self._completion)

    def data(self, connection: Connection, doing: str) -> bytes:
        if self._result < 0:
            raise connection.store_error(self._result, doing)
        # Where nothing was read, the binding gives the buffer as it made it.
        return self._data[: self._result]


class _Look:
    """The question whether an object is there."""

    def __init__(self, connection: Connection, key: str) -> None:
        self.key = key
        self._result = 0
        self._completion = connection.packs.aio_stat(key, lambda *_: None)

    def finish(self) -> None:
        self._result = result_of(self._completion)

    def found(self, connection: Connection, doing: str) -> bool:
        if self._result == -errno.ENOENT:
            connection.require_pool(doing)
        elif self._result < 0:
            raise connection.store_error(self._result, doing)
        return self._result >= 0
