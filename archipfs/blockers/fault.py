"""A wrapper that makes any driver fail on purpose: crashes, errors, delays, power loss. For tests, ours and yours.

    store = MemoryBlocker()
    for number in itertools.count(1):
        blocker = FaultBlocker(store, FaultPlan(crash_at=number, moment=Moment.TORN, seed=number))
        try:
            work(blocker)
        except SimulatedCrash:
            blocker.power_loss(seed=number)         # leave this out for a kill -9
        check(store)
        if not blocker.crashed:
            break                                   # the work has fewer calls than that

What it keeps, in memory, is what a disk's cache may still lose: the sectors of each data object as they were at the
last flush. Immutable objects and records are durable when they return, so power loss does not touch them. Every call
runs under one lock per wrapper: the order of calls is the order of numbers, and the undo log is exact.
"""

import enum
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import TypeVar

from archipfs.blockers.contract import Blocker, DataObject, Record, Space, VersionPaths, check_range
from archipfs.errors import ArchipError, ObjectMissing, StoreError, StoreUnavailable
from archipfs.types import SECTOR_BYTES

T = TypeVar("T")


class SimulatedCrash(BaseException):
    """The process is gone. No ``except Exception`` may catch it, as none would catch ``kill -9``."""


class Moment(enum.Enum):
    """Where a call fails."""

    BEFORE = "before"
    """Nothing of it happened."""
    AFTER = "after"
    """All of it happened; only the answer is lost."""
    TORN = "torn"
    """The seed decides: of a ``pwrite`` any of its sectors happened, of any other call all or nothing."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """What goes wrong, and when. Calls are numbered from 1, in all objects of the wrapper together."""

    seed: int = 0
    count_reads: bool = False
    """Whether calls that change nothing are numbered, and fail, too."""
    crash_at: int | None = None
    error_at: int | None = None
    error_rate: float = 0.0
    """How likely each call is to fail, from 0 to 1; besides ``error_at``."""
    error: type[StoreError] = StoreUnavailable
    moment: Moment = Moment.BEFORE
    delay_s: float = 0.0
    """Each numbered call takes this much longer."""


@dataclass(slots=True)
class _Unsynced:
    """One data object as it was at its last flush: all that may come back."""

    size: int
    sectors: dict[int, bytes | None] = field(default_factory=dict)
    """Sector number to its old content; ``None`` was a hole."""


class FaultBlocker(Blocker):
    """``inner`` with faults. ``inner`` itself stays usable: it is what a process started after the crash would open."""

    def __init__(self, inner: Blocker, plan: FaultPlan | None = None) -> None:
        self._inner = inner
        self._plan = plan or FaultPlan()
        self._random = random.Random(self._plan.seed)
        self._lock = RLock()
        self._unsynced: dict[str, _Unsynced] = {}
        self._calls = 0
        self._crashed = False

    @property
    def calls(self) -> int:
        """How many calls were numbered so far."""
        return self._calls

    @property
    def crashed(self) -> bool:
        """Whether the crash has happened: every call raises ``SimulatedCrash`` from then on."""
        return self._crashed

    def crash(self) -> None:
        """Crash now, between two calls."""
        self._crashed = True

    def power_loss(self, seed: int) -> None:
        """Crash, and lose what no flush covered: each such sector, and each size, stays or becomes what it was.

        Which, is drawn from ``seed``, for each on its own.
        """
        with self._lock:
            self._crashed = True
            draw = random.Random(seed)
            for key in sorted(self._unsynced):
                unsynced = self._unsynced[key]
                try:
                    data = self._inner.open_data(key, writable=True)
                except ObjectMissing:
                    # Deleted while it was open, and written after that.
                    continue
                try:
                    size = draw.choice((unsynced.size, data.size()))
                    data.truncate(max(unsynced.size, data.size()))
                    for sector, content in sorted(unsynced.sectors.items()):
                        if draw.random() < 0.5:
                            if content is None:
                                data.punch(sector * SECTOR_BYTES, SECTOR_BYTES)
                            else:
                                data.pwrite(sector * SECTOR_BYTES, content)
                    data.truncate(size)
                finally:
                    data.close()
            self._unsynced.clear()

    def call(self, doing: str, action: Callable[[], T], *, torn: Callable[[random.Random], object] | None = None) -> T:
        """Run a call that changes something, or the fault that its number has."""
        return self._run(doing, action, torn, counted=True)

    def ask(self, doing: str, action: Callable[[], T]) -> T:
        """Run a call that changes nothing."""
        return self._run(doing, action, None, counted=self._plan.count_reads)

    def _run(
        self, doing: str, action: Callable[[], T], torn: Callable[[random.Random], object] | None, *, counted: bool
    ) -> T:
        if counted and self._plan.delay_s:
            time.sleep(self._plan.delay_s)
        with self._lock:
            if self._crashed:
                raise SimulatedCrash(f"{doing}: after the crash")
            if not counted:
                return action()
            self._calls += 1
            crashing = self._calls == self._plan.crash_at
            failing = self._calls == self._plan.error_at or self._random.random() < self._plan.error_rate
            if not crashing and not failing:
                return action()
            try:
                if self._plan.moment is Moment.TORN and torn is not None:
                    torn(self._random)
                elif self._plan.moment is Moment.AFTER or (
                    self._plan.moment is Moment.TORN and self._random.random() < 0.5
                ):
                    result = action()
                    if isinstance(result, DataObject):
                        # Nobody gets to hold it.
                        result.close()
            except ArchipError:
                # A crash leaves nobody to hear of it.
                if not crashing:
                    raise
            if crashing:
                self._crashed = True
                raise SimulatedCrash(f"{doing}: call {self._calls}, {self._plan.moment.value}")
            raise self._plan.error(
                f"{doing}: fault at call {self._calls}, {self._plan.moment.value}; wanted by the test"
            )

    # What may still be lost

    def remember(self, key: str, data: DataObject, sectors: Iterator[int]) -> None:
        """Keep what these sectors hold before they change, unless that is kept already."""
        if key not in self._unsynced:
            self._unsynced[key] = _Unsynced(data.size())
        kept = self._unsynced[key].sectors
        for sector in sectors:
            if sector not in kept:
                begin = sector * SECTOR_BYTES
                found = data.next_data(begin)
                is_hole = found is None or found >= begin + SECTOR_BYTES
                kept[sector] = None if is_hole else data.pread(begin, SECTOR_BYTES)

    def forget(self, key: str) -> None:
        """All of it is durable, or gone for good."""
        self._unsynced.pop(key, None)

    # Immutable objects

    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        self.call(f"put {key}", lambda: self._inner.put(key, data))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.ask(f"get {key}", lambda: self._inner.get(key, offset, length))

    def open(self, key: str) -> DataObject:
        return _FaultDataObject(self, key, self.ask(f"open {key}", lambda: self._inner.open(key)))

    def exists(self, key: str) -> bool:
        return self.ask(f"exists {key}", lambda: self._inner.exists(key))

    def delete(self, key: str) -> None:
        self.call(f"delete {key}", lambda: self._inner.delete(key))

    def list(self, kind: str) -> Iterator[str]:
        yield from self.ask(f"list {kind}", lambda: tuple(self._inner.list(kind)))

    @property
    def pack_bytes(self) -> int:
        return self._inner.pack_bytes

    # Data objects

    def create_data(self, key: str) -> DataObject:
        return _FaultDataObject(self, key, self.call(f"create_data {key}", lambda: self._inner.create_data(key)))

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        data = self.ask(f"open_data {key}", lambda: self._inner.open_data(key, writable=writable, claim=claim))
        return _FaultDataObject(self, key, data)

    def delete_data(self, key: str) -> None:
        def action() -> None:
            self._inner.delete_data(key)
            self.forget(key)

        self.call(f"delete_data {key}", action)

    def list_data(self, kind: str) -> Iterator[str]:
        yield from self.ask(f"list_data {kind}", lambda: tuple(self._inner.list_data(kind)))

    @property
    def keeps_deleted(self) -> bool:
        return self._inner.keeps_deleted

    @property
    def data_bytes_max(self) -> int:
        return self._inner.data_bytes_max

    # Records

    def get_record(self, key: str) -> Record | None:
        return self.ask(f"get_record {key}", lambda: self._inner.get_record(key))

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        return self.call(f"put_record {key}", lambda: self._inner.put_record(key, value, expected))

    def delete_record(self, key: str, expected: int) -> None:
        self.call(f"delete_record {key}", lambda: self._inner.delete_record(key, expected))

    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        yield from self.ask(f"list_records {kind}", lambda: tuple(self._inner.list_records(kind)))

    def version_paths(self, key: str, version: int) -> VersionPaths | None:
        return self._inner.version_paths(key, version)

    # The whole

    def space(self) -> Space:
        return self.ask("space", self._inner.space)

    def relieve(self) -> bool:
        return self.ask("relieve", self._inner.relieve)

    def describe(self) -> str:
        return f"{self._inner.describe()} (with faults)"

    def close(self) -> None:
        """Only the wrapper's end: ``inner`` belongs to whoever made it."""


class _FaultDataObject(DataObject):
    """Has no ``fileno``: whoever had one would write past the faults."""

    def __init__(self, blocker: FaultBlocker, key: str, inner: DataObject) -> None:
        self._blocker = blocker
        self._key = key
        self._inner = inner

    def pread(self, offset: int, length: int) -> bytes:
        return self._blocker.ask(f"pread {self._key}", lambda: self._inner.pread(offset, length))

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        check_range(offset)
        view = memoryview(data).cast("B")
        pieces = list(_by_sector(offset, len(view)))

        def action() -> None:
            self._remember(sector for sector, _, _ in pieces)
            self._inner.pwrite(offset, view)

        def torn(draw: random.Random) -> None:
            self._remember(sector for sector, _, _ in pieces)
            for _, begin, end in pieces:
                if draw.random() < 0.5:
                    self._inner.pwrite(begin, view[begin - offset : end - offset])

        self._blocker.call(f"pwrite {self._key}", action, torn=torn)

    def punch(self, offset: int, length: int) -> None:
        check_range(offset, length)

        def action() -> None:
            self._remember(self._data_sectors(offset, offset + length))
            self._inner.punch(offset, length)

        self._blocker.call(f"punch {self._key}", action)

    def truncate(self, size: int) -> None:
        check_range(size)

        def action() -> None:
            self._remember(self._data_sectors(size, self._inner.size()))
            self._inner.truncate(size)

        self._blocker.call(f"truncate {self._key}", action)

    def flush(self) -> None:
        def action() -> None:
            self._inner.flush()
            self._blocker.forget(self._key)

        self._blocker.call(f"flush {self._key}", action)

    def size(self) -> int:
        return self._blocker.ask(f"size {self._key}", self._inner.size)

    def allocated(self) -> int:
        return self._blocker.ask(f"allocated {self._key}", self._inner.allocated)

    def next_data(self, offset: int) -> int | None:
        return self._blocker.ask(f"next_data {self._key}", lambda: self._inner.next_data(offset))

    def next_hole(self, offset: int) -> int:
        return self._blocker.ask(f"next_hole {self._key}", lambda: self._inner.next_hole(offset))

    def close(self) -> None:
        """Also after the crash: a process that is gone has closed what it had open."""
        self._inner.close()

    def _remember(self, sectors: Iterator[int]) -> None:
        self._blocker.remember(self._key, self._inner, sectors)

    def _data_sectors(self, offset: int, end: int) -> Iterator[int]:
        """The sectors of a range that are no holes: a hole that is punched or cut stays what it is."""
        found = self._inner.next_data(offset // SECTOR_BYTES * SECTOR_BYTES)
        while found is not None and found < end:
            stop = min(self._inner.next_hole(found), end)
            yield from range(found // SECTOR_BYTES, -(-stop // SECTOR_BYTES))
            found = self._inner.next_data(-(-stop // SECTOR_BYTES) * SECTOR_BYTES)


def _by_sector(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Sector number, begin and end of each piece of a range that lies in one sector."""
    begin, stop = offset, offset + length
    while begin < stop:
        sector = begin // SECTOR_BYTES
        end = min(stop, (sector + 1) * SECTOR_BYTES)
        yield sector, begin, end
        begin = end
