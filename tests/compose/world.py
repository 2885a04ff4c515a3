"""A store in memory, the nodes that use it, and what can be seen in it. Shared by the tests of mapper and composer."""

import hashlib
import os
import random
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from archipfs.blockers.contract import Blocker
from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment, SimulatedCrash
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.composer import Backends, Composer
from archipfs.compose.engine import format_bitmap
from archipfs.compose.layers import LiveBitmaps
from archipfs.compose.sealed import SealedStore, Shared
from archipfs.errors import StoreError
from archipfs.map.check import Finding, Severity, check_backend
from archipfs.map.locks import Node
from archipfs.map.mapper import AS_USUAL, Mapper, StoreOptions, create_store
from archipfs.map.records import Kind
from archipfs.types import SECTOR_BYTES

T = TypeVar("T")

BACKEND = "default"
DANGLING_NAME = "name leads to no volume"


@dataclass(frozen=True, slots=True)
class Seen:
    """A volume as its user sees it."""

    kind: Kind
    mode: int
    content: bytes = field(repr=False)


class MortalBlocker(FaultBlocker):
    """A ``FaultBlocker`` for a process: when it crashes, the live bitmaps stay as they are at that moment.

    The engine hears of the crash as of any failed call, and may mark a live bitmap as not to be believed. A process
    that is gone marks nothing.
    """

    def __init__(self, inner: Blocker, live: Path, plan: FaultPlan | None = None) -> None:
        super().__init__(inner, plan)
        self._live = live
        self._left: dict[str, LiveFile] = {}
        self._buried = False

    def call(self, doing: str, action: Callable[[], T], *, torn: Callable[[random.Random], object] | None = None) -> T:
        crashed_before = self.crashed
        try:
            return super().call(doing, action, torn=torn)
        except SimulatedCrash:
            if not crashed_before:
                self._left = read_live_files(self._live)
            raise

    def crash(self) -> None:
        if not self.crashed:
            super().crash()
            self._left = read_live_files(self._live)

    def arm(self, calls: int, *, seed: int) -> None:
        """Crash in the middle of one of the next calls."""
        self._random.seed(seed)
        self._plan = FaultPlan(crash_at=self.calls + calls, moment=Moment.TORN)

    def arm_error(self, calls: int, error: type[StoreError], moment: Moment) -> None:
        """Fail once, at one of the next calls."""
        self._plan = FaultPlan(error_at=self.calls + calls, error=error, moment=moment)

    def disarm(self) -> None:
        self._plan = FaultPlan()

    def next_process(self) -> "MortalBlocker":
        """For the process after this one, on the same disk: what was not flushed may still be lost."""
        following = MortalBlocker(self._inner, self._live)
        following._unsynced = self._unsynced
        return following

    def bury(self) -> None:
        """After all was let go of that the process had: leave the live bitmaps as the crash did."""
        assert self.crashed
        if not self._buried:
            self._buried = True
            write_live_files(self._live, self._left)


@dataclass(frozen=True, slots=True)
class LiveFile:
    """A live bitmap: sparse, so only what is in it."""

    size: int
    pieces: tuple[tuple[int, bytes], ...]


def read_live_files(directory: Path) -> dict[str, LiveFile]:
    return {path.name: _read_sparse(path) for path in directory.iterdir()}


def _read_sparse(path: Path) -> LiveFile:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size, end = os.fstat(descriptor).st_size, 0
        pieces: list[tuple[int, bytes]] = []
        while True:
            try:
                begin = os.lseek(descriptor, end, os.SEEK_DATA)
            except OSError:
                return LiveFile(size, tuple(pieces))
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
            pieces.append((begin, os.pread(descriptor, end - begin, begin)))
    finally:
        os.close(descriptor)


def write_live_files(directory: Path, files: dict[str, LiveFile]) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    for name, file in files.items():
        with open(directory / name, "wb") as stream:
            stream.truncate(file.size)
            for begin, data in file.pieces:
                os.pwrite(stream.fileno(), data, begin)


@dataclass(slots=True)
class World:
    """One store, and a directory for the live bitmaps of its nodes, which are called by their hosts."""

    directory: Path
    store: Blocker = field(default_factory=MemoryBlocker)

    def __post_init__(self) -> None:
        create_store(self.store)

    def mapper(self, blocker: Blocker | None = None, host: str = "one") -> Mapper:
        node = Node(hashlib.md5(host.encode()).hexdigest(), host)
        return Mapper(BACKEND, blocker or self.store, node, format_bitmap)

    def composer(self, blocker: Blocker | None = None, host: str = "one") -> Composer:
        mapper = self.mapper(blocker, host)
        stores, close = self.sealed_stores(mapper)
        composer = Composer(Backends({BACKEND: mapper}, stores, LiveBitmaps(self.directory / host), BACKEND))
        weakref.finalize(composer, close)
        return composer

    def sealed_stores(self, mapper: Mapper) -> tuple[dict[str, SealedStore], Callable[[], None]]:
        """With a cache of its own for each process, so that a process need not end before the next one begins; and what
        closes and removes that."""
        caches = Path(tempfile.gettempdir()) / f"archipfs-test-{uuid.uuid4().hex}"  # made when it is needed
        shared = Shared(caches, table_bytes_max=1 << 20, objects_bytes_max=4 << 20, packs_bytes_max=4 << 20)
        store = SealedStore(mapper, shared)

        def close() -> None:
            store.close()
            shared.close()
            shutil.rmtree(caches, ignore_errors=True)

        return {BACKEND: store}, close

    def mortal(self, plan: FaultPlan | None = None, host: str = "one") -> MortalBlocker:
        """For a process that is going to crash."""
        (self.directory / host).mkdir(parents=True, exist_ok=True)
        return MortalBlocker(self.store, self.directory / host, plan)

    def recovered(self, host: str = "one") -> Composer:
        composer = self.composer(host=host)
        composer.recover()
        return composer

    def lose_live_bitmaps(self, host: str = "one") -> None:
        """What a reboot does to them."""
        shutil.rmtree(self.directory / host, ignore_errors=True)

    def check(self) -> list[Finding]:
        return check_backend(self.mapper())

    def problems(self) -> list[Finding]:
        """What ``check`` finds, but for names that a crash left dangling: those may stay."""
        return [
            found for found in self.check() if not (found.severity is Severity.LEFTOVER and found.what == DANGLING_NAME)
        ]


@dataclass(slots=True)
class TwoStores:
    """Two backends, a and b, of the same nodes."""

    directory: Path
    options_a: StoreOptions = AS_USUAL
    options_b: StoreOptions = AS_USUAL
    stores: dict[str, Blocker] = field(default_factory=lambda: {"a": MemoryBlocker(), "b": MemoryBlocker()})

    def __post_init__(self) -> None:
        create_store(self.stores["a"], self.options_a)
        create_store(self.stores["b"], self.options_b)

    def composer(
        self, blockers: dict[str, Blocker] | None = None, *, host: str = "one", only: str | None = None
    ) -> Composer:
        """``only``: of a node that has no other backend."""
        node = Node(hashlib.md5(host.encode()).hexdigest(), host)
        mappers = {
            name: Mapper(name, (blockers or {}).get(name, store), node, format_bitmap)
            for name, store in self.stores.items()
            if only in (None, name)
        }
        caches = Path(tempfile.gettempdir()) / f"archipfs-test-{uuid.uuid4().hex}"
        shared = Shared(caches, table_bytes_max=1 << 20, objects_bytes_max=4 << 20, packs_bytes_max=4 << 20)
        sealed = {name: SealedStore(mapper, shared) for name, mapper in mappers.items()}
        live = self.directory / (host if only is None else f"{host}-{only}")
        composer = Composer(Backends(mappers, sealed, LiveBitmaps(live), only or "a"))

        def close() -> None:
            for store in sealed.values():
                store.close()
            shared.close()
            shutil.rmtree(caches, ignore_errors=True)

        weakref.finalize(composer, close)
        return composer

    def mortal(self, side: str, plan: FaultPlan, host: str = "one") -> MortalBlocker:
        """For a process that is going to crash at a call of one of the two."""
        (self.directory / host).mkdir(parents=True, exist_ok=True)
        return MortalBlocker(self.stores[side], self.directory / host, plan)

    def problems(self) -> list[Finding]:
        node = Node("0" * 32, "check")
        return [
            found
            for name, store in self.stores.items()
            for found in check_backend(Mapper(name, store, node, format_bitmap))
            if (found.severity, found.what) != (Severity.LEFTOVER, DANGLING_NAME)
        ]

    def contents(self, side: str) -> dict[str, object]:
        """Everything in one of the stores."""
        store = self.stores[side]
        records = {
            key: found.version for kind in ("volume", "layer", "name") for key, found in store.list_records(kind)
        }
        objects = [*store.list("pack"), *store.list_data("layer"), *store.list_data("bitmap")]
        return {**records, **dict.fromkeys(objects)}


@contextmanager
def crashing(composer: Composer) -> Iterator[None]:
    """Run a block in a process that may crash in it, and let go of what the process had open."""
    try:
        yield
    except SimulatedCrash:
        composer.abandon()


def see(composer: Composer) -> dict[str, Seen]:
    """All volumes with all their bytes."""
    seen = {}
    for found in list(composer.volumes()):
        with composer.using(found) as opened:
            record = opened.record
            seen[str(record.name)] = Seen(record.kind, record.mode, opened.read(0, opened.size))
    return seen


def fill(composer: Composer, name: str, content: bytes, offset: int = 0) -> None:
    """Write to a volume and close it."""
    with composer.using(composer.find(name)) as opened:
        opened.write(offset, content)


def content_of(composer: Composer, name: str) -> bytes:
    with composer.using(composer.find(name)) as opened:
        return opened.read(0, opened.size)


def pattern(seed: int, sectors: float = 1) -> bytes:
    """Bytes that differ from sector to sector and from seed to seed."""
    size = int(sectors * SECTOR_BYTES)
    return b"".join(
        hashlib.blake2b(f"{seed} {number}".encode()).digest() * (SECTOR_BYTES // 64)
        for number in range(-(-size // SECTOR_BYTES))
    )[:size]


def cut_power(world: World, blocker: FaultBlocker, seed: int) -> None:
    blocker.power_loss(seed)
    world.lose_live_bitmaps()
