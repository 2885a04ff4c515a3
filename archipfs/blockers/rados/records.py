"""Records: entries ``ident`` → version, ``=``, value, in the omaps of the objects ``records.<kind>.<shard>``.

Versions
========

A version is never used twice for a key, whatever the clocks of the nodes show, and it grows:

- a replaced record's version is the old one and 1, and the OSD compares and replaces in one step;
- each shard has a *floor*, the entry ``/floor``: no record that was deleted from the shard had a version above it. A
  delete raises the floor in the same step, where it is lower;
- a new record's version is above the floor, which the OSD compares in the same step as that there is no record.

So what a key's next life begins with is above all that its earlier ones had. That a new version, and a new floor, is
the time in nanoseconds is only to have the first try succeed: with clocks that agree it is above the floor.

A delayed request is harmless for the same reason: one that its sender has given up waiting for, and that an OSD carries
out much later, finds another version, or a floor that is above its own, and changes nothing; unless the record is still
exactly as the sender thought.
"""

import time
from collections.abc import Iterator, Sequence

from archipfs.blockers.contract import Record
from archipfs.blockers.rados.connection import Connection
from archipfs.blockers.rados.omap import Condition, Is, change, read, scan, shard, shards
from archipfs.errors import Conflict, ObjectDamaged, StoreError

SHARDS = 16
_FLOOR = "/floor"
"""No ident has a slash in it."""
_DIGITS = 20
_LIVE = b"="
_TRIES_MAX = 1000


class Records:
    """All records of a store. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, kind: str, ident: str) -> Record | None:
        found = self._read(kind, ident, f"reading record {kind}/{ident}")
        return decode(f"{kind}/{ident}", found[ident]) if ident in found else None

    def put(self, kind: str, ident: str, value: bytes, expected: int | None) -> int:
        if expected is None:
            return self._create(kind, ident, value)
        doing = f"replacing record {kind}/{ident}"
        conditions = _is_at(ident, expected)
        if not self._change(kind, ident, doing, conditions, put={ident: encode(value, expected + 1)}):
            raise _conflict(kind, ident, expected)
        return expected + 1

    def _create(self, kind: str, ident: str, value: bytes) -> int:
        doing = f"creating record {kind}/{ident}"
        version = time.time_ns()
        for _ in range(_TRIES_MAX):
            conditions = [Condition(ident, Is.EQUAL, ""), Condition(_FLOOR, Is.LESS, _digits(version))]
            if self._change(kind, ident, doing, conditions, put={ident: encode(value, version)}):
                return version
            found = self._read(kind, ident, doing)
            if ident in found:
                raise _conflict(kind, ident, None)
            version = max(time.time_ns(), _floor(found) + 1)
        raise _overtaken(doing)

    def delete(self, kind: str, ident: str, expected: int) -> None:
        doing = f"deleting record {kind}/{ident}"
        is_at = _is_at(ident, expected)
        floor = -1
        for _ in range(_TRIES_MAX):
            if floor >= expected:
                # It never gets lower.
                conditions, put = is_at, {}
            else:
                raised = _digits(max(time.time_ns(), expected))
                conditions, put = [*is_at, Condition(_FLOOR, Is.LESS, raised)], {_FLOOR: raised.encode()}
            if self._change(kind, ident, doing, conditions, put=put, remove=(ident,)):
                return
            found = self._read(kind, ident, doing)
            if ident not in found:
                return
            if decode(f"{kind}/{ident}", found[ident]).version != expected:
                raise _conflict(kind, ident, expected)
            floor = _floor(found)
        raise _overtaken(doing)

    def list(self, kind: str) -> Iterator[tuple[str, Record]]:
        """Idents and records."""
        names = shards(f"records.{kind}", SHARDS)
        for ident, content in scan(self._connection, self._connection.main, names, f"listing records of kind {kind}"):
            if ident != _FLOOR:
                yield ident, decode(f"{kind}/{ident}", content)

    def _read(self, kind: str, ident: str, doing: str) -> dict[str, bytes]:
        return read(self._connection, self._connection.main, _shard(kind, ident), (ident, _FLOOR), doing)

    def _change(
        self,
        kind: str,
        ident: str,
        doing: str,
        conditions: Sequence[Condition],
        *,
        put: dict[str, bytes],
        remove: tuple[str, ...] = (),
    ) -> bool:
        return change(
            self._connection,
            self._connection.main,
            _shard(kind, ident),
            doing,
            conditions=conditions,
            put=put,
            remove=remove,
        )


def encode(value: bytes, version: int) -> bytes:
    return _digits(version).encode() + _LIVE + value


def decode(key: str, content: bytes) -> Record:
    """Raises ``ObjectDamaged``."""
    version = content[:_DIGITS]
    if not (len(version) == _DIGITS and version.isdigit() and content[_DIGITS : _DIGITS + 1] == _LIVE):
        raise ObjectDamaged(f"record {key} has no version; check the store with `archip check`")
    return Record(content[_DIGITS + 1 :], int(version))


def _shard(kind: str, ident: str) -> str:
    return shard(f"records.{kind}", SHARDS, ident)


def _digits(version: int) -> str:
    return f"{version:0{_DIGITS}d}"


def _is_at(ident: str, version: int) -> Sequence[Condition]:
    """That the record is at this version: its content begins with these digits, and something follows."""
    return [
        Condition(ident, Is.GREATER, _digits(version)),
        Condition(ident, Is.LESS, _digits(version + 1)),
    ]


def _floor(found: dict[str, bytes]) -> int:
    return int(found.get(_FLOOR, b"-1"))


def _conflict(kind: str, ident: str, expected: int | None) -> Conflict:
    return Conflict(f"record {kind}/{ident} is not at version {expected} any more; read it again")


def _overtaken(doing: str) -> StoreError:
    return StoreError(f"{doing}: overtaken {_TRIES_MAX} times by others; try again")
