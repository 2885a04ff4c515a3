"""The ``rados`` driver as the contract has it: two clients of one cluster, and what lies in its pool."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from archipfs.blockers.contract import Blocker, DataObject, Record, Space, check_key, check_kind, check_range
from archipfs.blockers.rados.claims import Claims
from archipfs.blockers.rados.connection import Connection
from archipfs.blockers.rados.data import DATA_BYTES_MAX, NativeClient
from archipfs.blockers.rados.index import Index
from archipfs.blockers.rados.packs import Packs
from archipfs.blockers.rados.records import Records
from archipfs.blockers.rados.settings import Settings
from archipfs.errors import InvalidInput, NotSupported, ShutOut

PACK_BYTES = 4 << 20
DATA_SHARDS = 16
_REPLICATED = 1
"""Of pg_pool_t's types; the other one is 3, erasure-coded."""


@dataclass(frozen=True, slots=True)
class _Client:
    """All that goes by one connection of python3-rados."""

    connection: Connection
    records: Records
    packs: Packs
    data: Index
    claims: Claims

    @classmethod
    def of(cls, connection: Connection, native: NativeClient) -> Self:
        return cls(
            connection,
            Records(connection),
            Packs(connection),
            Index(connection, "data", DATA_SHARDS),
            Claims(connection, native),
        )


class RadosBlocker(Blocker):
    """A store in a namespace of a pool."""

    def __init__(self, settings: Settings, *, new: bool = False) -> None:
        """Connect. Raises ``StoreUnavailable`` within the settings' timeout, and then says what to do.

        There is nothing to lay out: a store begins to be with its first record.
        """
        self._settings = settings
        connection = Connection(settings)
        try:
            self._native = NativeClient(settings)
        except BaseException:
            connection.close()
            raise
        self._client = _Client.of(connection, self._native)
        try:
            if new:
                self._check_pool()
            # What this user may not do is said now, and not at the first write.
            self._client.records.get("store", "info")
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_options(cls, **options: str) -> Self:
        """By those of a backend's configuration. Raises ``InvalidConfig`` and what connecting does."""
        return cls(Settings.from_options(options))

    @classmethod
    def create(cls, **options: str) -> Self:
        """The same, for a new store. Raises ``NotSupported`` for a pool that cannot keep one."""
        return cls(Settings.from_options(options), new=True)

    def _check_pool(self) -> None:
        command = json.dumps({"prefix": "osd pool ls", "detail": "detail", "format": "json"})
        for pool in json.loads(self._client.connection.command("asking what the pool is", command)):
            if pool["pool_name"] == self._settings.pool and pool["type"] != _REPLICATED:
                raise NotSupported(
                    f"pool {self._settings.pool} is erasure-coded, and such a pool cannot keep records; use a "
                    "replicated one"
                )

    def _now(self) -> _Client:
        """What calls go by: another one after :meth:`adopt`."""
        if self.is_shut_out:
            raise ShutOut(f"{self.describe()} takes nothing from this process any more; have it reconnect")
        return self._client

    # Immutable objects

    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        self._now().packs.put(*check_key(key), data)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        check_range(offset, length or 0)
        return self._now().packs.get(key, offset, length)

    def open(self, key: str) -> DataObject:
        check_key(key)
        self._now()
        return self._native.open_immutable(key)

    def exists(self, key: str) -> bool:
        check_key(key)
        return self._now().packs.exists(key)

    def delete(self, key: str) -> None:
        self._now().packs.delete(*check_key(key))

    def list(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        yield from self._now().packs.list(kind)

    @property
    def pack_bytes(self) -> int:
        return PACK_BYTES

    # Data objects

    def create_data(self, key: str) -> DataObject:
        kind, ident = check_key(key)
        made: list[DataObject] = []
        self._now().data.make(kind, ident, lambda: made.append(self._native.create(key)))
        return made[-1]

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        check_key(key)
        self._now()
        return self._native.open(key, writable=writable, claim=claim)

    def delete_data(self, key: str) -> None:
        kind, ident = check_key(key)
        self._now().data.remove(kind, ident, partial(self._native.delete, key))

    def list_data(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        for ident, certain in self._now().data.list(kind):
            if certain or self._native.exists(f"{kind}/{ident}"):
                yield f"{kind}/{ident}"

    @property
    def data_bytes_max(self) -> int:
        return DATA_BYTES_MAX

    # Records

    def get_record(self, key: str) -> Record | None:
        return self._now().records.get(*check_key(key))

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        return self._now().records.put(*check_key(key), value, expected)

    def delete_record(self, key: str, expected: int) -> None:
        self._now().records.delete(*check_key(key), expected)

    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        check_kind(kind)
        for ident, record in self._now().records.list(kind):
            yield f"{kind}/{ident}", record

    # Claims

    @property
    def shuts_out(self) -> bool:
        return True

    def claim(self, key: str, owner: str) -> None:
        check_key(key)
        self._now().claims.claim(key, owner)

    def disclaim(self, key: str) -> None:
        check_key(key)
        self._client.claims.disclaim(key)

    def shut_out(self, key: str) -> None:
        check_key(key)
        self._now().claims.shut_out(key)

    @property
    def is_shut_out(self) -> bool:
        return self._client.connection.is_shut_out or self._native.is_shut_out

    def reconnect(self) -> "RadosBlocker":
        successor = RadosBlocker(self._settings)
        try:
            # Whatever it does comes after we were shut out, also where nobody is left to be shut out by its claims.
            successor._client.connection.wait_for_latest_map()
            successor._native.wait_for_latest_map()
        except BaseException:
            successor.close()
            raise
        return successor

    def adopt(self, successor: Blocker) -> None:
        if not isinstance(successor, RadosBlocker) or successor._settings != self._settings:
            raise InvalidInput("only another client of the same store can be adopted; this is a bug, please report it")
        former = self._client.connection
        self._native.adopt(successor._native)
        self._client = _Client.of(successor._client.connection.share(), self._native)
        former.close_replaced()

    # The whole

    def space(self) -> Space:
        """What a pool of its replication can still take, and its quota if it has one."""
        command = json.dumps({"prefix": "df", "detail": "detail", "format": "json"})
        pools = json.loads(self._now().connection.command("asking for the room in the cluster", command))["pools"]
        for pool in pools:
            if pool["name"] == self._settings.pool:
                stats = pool["stats"]
                used, available = int(stats["stored"]), int(stats["max_avail"])
                if stats["quota_bytes"] > 0:
                    available = min(available, max(int(stats["quota_bytes"]) - used, 0))
                return Space(used + available, available, available)
        # The managers, which count, have not counted this pool yet.
        return Space(0, 0, 0)

    def describe(self) -> str:
        connection, settings = self._client.connection, self._settings
        return f"pool {settings.pool}, namespace {settings.namespace}, of cluster {connection.fsid}"

    def close(self) -> None:
        """Claims are not given up: what they are on is settled by the lock records."""
        self._native.close()
        self._client.connection.close()
