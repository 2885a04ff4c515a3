"""Small entries in the omap of objects: an omap is the sorted map from names to values that each RADOS object has.

What many nodes change at once lies in such entries: records, and the index of what there is. An OSD carries out all
that one :func:`change` asks for, or nothing, and one change of an object after the other. Reads see what is durable,
since an OSD has them wait for a change that is under way.

The entries of a kind are spread over several objects (*shards*), by the hash of their names, so that they lie on
several OSDs and none gets too large. An object without entries need not be there.
"""

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import xxhash

from archipfs.blockers.rados.connection import ALSO_WHEN_FULL, Connection, errno_of
from archipfs.blockers.rados.in_flight import IN_FLIGHT_MAX, at_once, result_of

PAGE_ENTRIES = 1000
"""Read at once from a shard: an OSD gives 1024 at most (osd_max_omap_entries_per_request)."""


class Is(Enum):
    """How an entry's value must compare. One that is not there is less than any other, and equal to ``""``."""

    EQUAL = "EQ"
    LESS = "LT"
    GREATER = "GT"


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold of an entry for a change to be made."""

    name: str
    how: Is
    value: str


def shards(prefix: str, count: int) -> list[str]:
    """The names of the objects that have the entries of one kind."""
    return [f"{prefix}.{number}" for number in range(count)]


def shard(prefix: str, count: int, name: str) -> str:
    """The one that has the entry ``name``."""
    return f"{prefix}.{xxhash.xxh3_64_intdigest(name.encode()) % count}"


def read(connection: Connection, ioctx: Any, shard: str, names: Sequence[str], doing: str) -> dict[str, bytes]:
    """Those of these entries that are there, all as they are at one moment."""
    with connection.call(doing), connection.rados.ReadOpCtx() as operation:
        found, _ = ioctx.get_omap_vals_by_keys(operation, tuple(names))
        try:
            ioctx.operate_read_op(operation, shard)
        except connection.rados.ObjectNotFound:
            connection.require_pool(doing)
            return {}
        return dict(found)


def change(
    connection: Connection,
    ioctx: Any,
    shard: str,
    doing: str,
    *,
    conditions: Iterable[Condition] = (),
    put: Mapping[str, bytes] | None = None,
    remove: Sequence[str] = (),
) -> bool:
    """Put and remove entries, durably, if all conditions hold. Returns whether they did.

    Works in a full pool too: to give room back, one has to write down what goes.
    """
    rados = connection.rados
    with connection.call(doing), rados.WriteOpCtx() as operation:
        if put:
            # Conditions, and removing, want the object to be there.
            operation.new(rados.LIBRADOS_CREATE_IDEMPOTENT)
        for condition in conditions:
            how = getattr(rados, f"LIBRADOS_CMPXATTR_OP_{condition.how.value}")
            operation.omap_cmp(condition.name, condition.value, how)
        if remove:
            ioctx.remove_omap_keys(operation, tuple(remove))
        if put:
            ioctx.set_omap(operation, tuple(put), tuple(put.values()))
        try:
            ioctx.operate_write_op(operation, shard, flags=ALSO_WHEN_FULL)
        except rados.ObjectNotFound:
            connection.require_pool(doing)
            return False
        except rados.Error as error:
            if errno_of(error) != errno.ECANCELED:
                raise
            return False
    return True


def scan(connection: Connection, ioctx: Any, names: Sequence[str], doing: str) -> Iterator[tuple[str, bytes]]:
    """All entries of these objects, in no order. What one page has is as it was at one moment.

    Nothing is under way while the caller has an entry.
    """
    places = [(name, "") for name in names]
    while places:
        asked, places = places[:IN_FLIGHT_MAX], places[IN_FLIGHT_MAX:]
        with connection.call(doing):
            pages = at_once(partial(_Page, ioctx, *place) for place in asked)
            found = [page.entries(connection, doing) for page in pages]
        for page, entries in zip(pages, found, strict=True):
            # An OSD may give less than was asked for: only an empty page is the last one.
            if entries:
                places.append((page.shard, entries[-1][0]))
            yield from entries


class _Page:
    """A part of an object's entries."""

    def __init__(self, ioctx: Any, shard: str, after: str) -> None:
        self.shard = shard
        self._ioctx = ioctx
        self._operation = ioctx.create_read_op()
        self._found, _ = ioctx.get_omap_vals(self._operation, after, "", PAGE_ENTRIES)
        self._completion = ioctx.operate_aio_read_op(self._operation, shard)
        self._result = 0

    def finish(self) -> None:
        self._result = result_of(self._completion)
        self._ioctx.release_read_op(self._operation)

    def entries(self, connection: Connection, doing: str) -> list[tuple[str, bytes]]:
        if self._result == -errno.ENOENT:
            connection.require_pool(doing)
            return []
        if self._result < 0:
            raise connection.store_error(self._result, doing)
        return list(self._found)
