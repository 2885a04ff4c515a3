"""A wrapper that repeats what failed because the store could not be reached.

Only ``StoreUnavailable`` is repeated, and ``ShutOut`` where somebody says when (``while_shut_out``): a full disk, a
missing object or a conflict stays what it is, and a store that is away (``StoreAway``) has been given its time. Three
calls need more than that (``delete_record`` does not: deleting what is gone succeeds):

``put_record``
    The record is read before anything else is done. At the expected version: nothing happened, or has not happened yet;
    do it again. Holding our value at another version: it happened. **The value must therefore be unique to its writer**
    (a generation and an owner in it, say): else another's equal value passes for ours. Anything else is a ``Conflict``,
    also where ours took effect and was replaced at once: what the caller reads next is the truth in both cases.
    The same is asked when a repeated call says ``Conflict``: the store may have been slow with our first one.
``create_data``
    ``AlreadyExists`` on a repeated call means our own, as idents are never used twice; it must be empty.
``flush``
    Is never repeated. A kernel that failed to write a page back may mark it clean, and say yes the second time; so may
    anything that caches below us. The caller has to treat what was not flushed before as lost or not, sector by sector.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog

from archipfs.blockers.contract import Blocker, DataObject, Record, Space, VersionPaths
from archipfs.errors import AlreadyExists, Conflict, ShutOut, StoreAway, StoreUnavailable

log = structlog.get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Up to ``attempts`` calls. Pauses double from ``delay_s`` to ``delay_max_s``; none ends after ``time_limit_s``."""

    attempts: int = 8
    delay_s: float = 0.05
    delay_max_s: float = 5.0
    time_limit_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def run(self, action: Callable[[int], T]) -> T:
        """The result of ``action(number of the attempt, from 0)``; its last ``StoreUnavailable`` when that is all.

        A ``StoreAway`` is always the last one.
        """
        deadline_s = self.clock() + self.time_limit_s
        delay_s = self.delay_s
        attempt = 0
        while True:
            try:
                return action(attempt)
            except StoreAway:
                raise
            except StoreUnavailable as error:
                attempt += 1
                if attempt >= self.attempts or self.clock() + delay_s > deadline_s:
                    raise
                log.warning("store call is tried again", error=str(error), attempt=attempt, delay_s=round(delay_s, 2))
            self.sleep(delay_s)
            delay_s = min(2 * delay_s, self.delay_max_s)


class _Run(Protocol):
    """Makes attempts, counted from 0, until one succeeds or the last one has failed."""

    def __call__(self, action: Callable[[int], T]) -> T: ...


def _refuse(error: ShutOut) -> None:
    raise error


class RetryBlocker(Blocker):
    """``inner``, repeated as ``policy`` says."""

    def __init__(self, inner: Blocker, policy: RetryPolicy | None = None) -> None:
        self._inner = inner
        self._policy = policy or RetryPolicy()
        self._wait: Callable[[ShutOut], None] = _refuse

    def while_shut_out(self, wait: Callable[[ShutOut], None]) -> None:
        self._wait = wait

    def _run(self, action: Callable[[int], T]) -> T:
        def attempt_inside(attempt: int) -> T:
            while True:
                try:
                    return action(attempt)
                except ShutOut as error:
                    self._wait(error)
                attempt += 1

        return self._policy.run(attempt_inside)

    # Immutable objects

    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        self._run(lambda _: self._inner.put(key, data))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._run(lambda _: self._inner.get(key, offset, length))

    def open(self, key: str) -> DataObject:
        return _RetryDataObject(self._run(lambda _: self._inner.open(key)), self._run)

    def exists(self, key: str) -> bool:
        return self._run(lambda _: self._inner.exists(key))

    def delete(self, key: str) -> None:
        self._run(lambda _: self._inner.delete(key))

    def list(self, kind: str) -> Iterator[str]:
        # Whole or not at all: going on in the middle could leave out or repeat.
        yield from self._run(lambda _: tuple(self._inner.list(kind)))

    @property
    def pack_bytes(self) -> int:
        return self._inner.pack_bytes

    # Data objects

    def create_data(self, key: str) -> DataObject:
        def action(attempt: int) -> DataObject:
            try:
                return self._inner.create_data(key)
            except AlreadyExists:
                if attempt == 0:
                    raise
                data = self._inner.open_data(key, writable=True)
                if data.size() != 0:
                    data.close()
                    raise
                return data

        return _RetryDataObject(self._run(action), self._run)

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        data = self._run(lambda _: self._inner.open_data(key, writable=writable, claim=claim))
        return _RetryDataObject(data, self._run)

    def delete_data(self, key: str) -> None:
        self._run(lambda _: self._inner.delete_data(key))

    def list_data(self, kind: str) -> Iterator[str]:
        yield from self._run(lambda _: tuple(self._inner.list_data(kind)))

    @property
    def keeps_deleted(self) -> bool:
        return self._inner.keeps_deleted

    @property
    def data_bytes_max(self) -> int:
        return self._run(lambda _: self._inner.data_bytes_max)

    # Records

    def get_record(self, key: str) -> Record | None:
        return self._run(lambda _: self._inner.get_record(key))

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        def action(attempt: int) -> int:
            if attempt > 0:
                found = self._inner.get_record(key)
                if (found.version if found else None) != expected:
                    return done_or_conflict(found)
            try:
                return self._inner.put_record(key, value, expected)
            except Conflict:
                if attempt == 0:
                    raise
                return done_or_conflict(self._inner.get_record(key))

        def done_or_conflict(found: Record | None) -> int:
            if found is None or found.value != value or found.version == expected:
                raise Conflict(f"record {key} is not at version {expected} any more; read it again")
            return found.version

        return self._run(action)

    def delete_record(self, key: str, expected: int) -> None:
        # Deleting what is gone succeeds, and so does repeating a delete that took effect. A version that is another one
        # is a Conflict both times, for no version comes back.
        self._run(lambda _: self._inner.delete_record(key, expected))

    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        yield from self._run(lambda _: tuple(self._inner.list_records(kind)))

    def version_paths(self, key: str, version: int) -> VersionPaths | None:
        return self._inner.version_paths(key, version)

    # Claims

    @property
    def shuts_out(self) -> bool:
        return self._inner.shuts_out

    def claim(self, key: str, owner: str) -> None:
        self._run(lambda _: self._inner.claim(key, owner))

    def disclaim(self, key: str) -> None:
        self._run(lambda _: self._inner.disclaim(key))

    def shut_out(self, key: str) -> None:
        self._run(lambda _: self._inner.shut_out(key))

    @property
    def is_shut_out(self) -> bool:
        return self._inner.is_shut_out

    def reconnect(self) -> Blocker:
        return RetryBlocker(self._policy.run(lambda _: self._inner.reconnect()), self._policy)

    def adopt(self, successor: Blocker) -> None:
        self._inner.adopt(successor._inner if isinstance(successor, RetryBlocker) else successor)

    # The whole

    def space(self) -> Space:
        return self._run(lambda _: self._inner.space())

    def relieve(self) -> bool:
        return self._inner.relieve()

    def describe(self) -> str:
        return self._inner.describe()

    def close(self) -> None:
        self._inner.close()


class _RetryDataObject(DataObject):
    """Everything but ``flush`` may be repeated: each call says where, so doing it twice is doing it once."""

    def __init__(self, inner: DataObject, run: _Run) -> None:
        self._inner = inner
        self._run = run

    def pread(self, offset: int, length: int) -> bytes:
        return self._run(lambda _: self._inner.pread(offset, length))

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._run(lambda _: self._inner.pwrite(offset, data))

    def punch(self, offset: int, length: int) -> None:
        self._run(lambda _: self._inner.punch(offset, length))

    def truncate(self, size: int) -> None:
        self._run(lambda _: self._inner.truncate(size))

    def flush(self) -> None:
        self._inner.flush()

    def size(self) -> int:
        return self._run(lambda _: self._inner.size())

    def allocated(self) -> int:
        return self._run(lambda _: self._inner.allocated())

    def next_data(self, offset: int) -> int | None:
        return self._run(lambda _: self._inner.next_data(offset))

    def next_hole(self, offset: int) -> int:
        return self._run(lambda _: self._inner.next_hole(offset))

    def fileno(self) -> int | None:
        return self._inner.fileno()

    def native(self) -> int | None:
        return self._inner.native()

    def close(self) -> None:
        self._inner.close()
