"""The pack cache: what is read through it is what the packs have, whatever happens to its files; and each is fetched
once."""

import os
import random
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from archipfs.blockers.contract import DataObject
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.composer import Composer
from archipfs.compose.engine import EngineLayer, EngineVolume, ExtentTable, Region
from archipfs.compose.pack_cache import PackCache
from archipfs.compose.sealed import SealedStore, Shared
from archipfs.compose.volume import OpenVolume
from archipfs.errors import StoreError, StoreUnavailable
from archipfs.types import REGION_BYTES, SECTOR_BYTES, Digest, PackId
from tests.compose.test_sealed import noise
from tests.compose.world import World
from tests.lib.searching import searching
from tests.lib.waiting import wait_until

STORE = "1" * 32
BLOCK_BYTES = 65536
PACKS = 6
PACK_SECTORS = 70


class CountingBlocker(MemoryBlocker):
    """Counts what is read of its packs."""

    def __init__(self) -> None:
        super().__init__(pack_bytes=4 << 20)
        self.reads: list[tuple[int, int]] = []
        self.fails = False

    def open(self, key: str) -> DataObject:
        opened = super().open(key)
        pread = opened.pread

        def counted(offset: int, length: int) -> bytes:
            if self.fails:
                raise StoreUnavailable("the cluster does not answer; try again")
            self.reads.append((offset, length))
            return pread(offset, length)

        opened.pread = counted
        return opened

    def fetched_bytes(self) -> int:
        return sum(length for _, length in self.reads)


class Rig:
    """Packs far away, and one process after the other that reads them."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self.directory = directory
        self.bytes_max = bytes_max
        self.blocker = CountingBlocker()
        self.contents = [noise(number, PACK_SECTORS) + b"tail" for number in range(PACKS)]
        for number, content in enumerate(self.contents):
            self.blocker.put(f"pack/{self.name(number)}", content)
        self.cache = PackCache(directory, bytes_max, {STORE}, stay_ns=0)

    @staticmethod
    def name(number: int) -> PackId:
        return PackId(f"{number:064x}")

    def path(self, number: int) -> Path:
        return self.directory / STORE / self.name(number)

    def restart(self) -> None:
        self.cache.close()
        self.cache = PackCache(self.directory, self.bytes_max, {STORE}, stay_ns=0)

    def await_kept(self) -> None:
        """Until what was read is in the files, or was found not to go there."""
        wait_until(lambda: not self.cache.statistics().landed_bytes, "all that was read is in the files")

    def volume(self, number: int) -> EngineVolume:
        """One that is a pack's sectors."""
        name = self.name(number)
        pack = self.cache.open(STORE, name, self.blocker.open(f"pack/{name}"))
        table = ExtentTable(1 << 20)
        layer = EngineLayer.sealed("ab" * 16, table, lambda region: Region(0, 1, [(0, PACK_SECTORS, 0, 0)], [pack]))
        volume = EngineVolume([layer], PACK_SECTORS * SECTOR_BYTES, writable=False)
        layer.close()
        table.close()
        return volume

    def check(self, number: int, offset: int, length: int) -> None:
        volume = self.volume(number)
        try:
            end = PACK_SECTORS * SECTOR_BYTES
            expected = self.contents[number][:end][offset : offset + length]
            assert volume.read(offset, length) == expected
            assert volume.read_nowait(offset, length) in (None, expected)
        finally:
            volume.close(clean=False)


def make_rig(directory: Path, bytes_max: int = 64 << 20) -> Rig:
    return Rig(directory / "packs", bytes_max)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = make_rig(tmp_path)
    yield rig
    rig.cache.close()


Step = tuple[str, int, int, int]
READ = st.tuples(
    st.just("read"),
    st.integers(0, PACKS - 1),
    st.integers(0, PACK_SECTORS * SECTOR_BYTES),
    st.integers(0, 3 * BLOCK_BYTES),
)
MISHAP = st.tuples(
    st.sampled_from(["restart", "delete", "flip", "cut", "unlink"]),
    st.integers(0, PACKS - 1),
    st.integers(0, PACK_SECTORS * SECTOR_BYTES + 9000),
    st.integers(1, 255),
)


def mishap(rig: Rig, what: str, number: int, offset: int, value: int) -> None:
    path = rig.path(number)
    if what == "delete":
        shutil.rmtree(rig.directory, ignore_errors=True)
    elif what == "unlink":
        path.unlink(missing_ok=True)
    elif what == "cut":
        rig.await_kept()
        if path.exists():
            os.truncate(path, offset)
    elif what == "flip":
        rig.cache.close()
        if path.exists():
            flip(path, offset, value)
        rig.restart()
    elif what == "restart":
        rig.restart()


def flip(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1) or b"\0"
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ value]))


@searching(60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(READ, READ, READ, MISHAP), max_size=40), st.sampled_from([0, 600_000, 64 << 20]))
def test_reads_are_right_whatever_happens_to_the_files(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], bytes_max: int
) -> None:
    rig = make_rig(tmp_path_factory.mktemp("cache"), bytes_max)
    for what, number, first, second in steps:
        if what == "read":
            rig.check(number, first, second)
        else:
            mishap(rig, what, number, first, second)
    rig.await_kept()
    assert rig.cache.statistics().bytes <= bytes_max
    rig.cache.close()


def test_what_was_read_is_not_fetched_again(rig: Rig) -> None:
    for _ in range(3):
        rig.check(0, 5 * SECTOR_BYTES, 2 * SECTOR_BYTES)
    rig.restart()
    rig.check(0, 0, BLOCK_BYTES)
    rig.await_kept()
    assert rig.blocker.reads == [(0, BLOCK_BYTES)]
    assert rig.cache.statistics().hits >= 1
    assert rig.path(0).read_bytes()[:BLOCK_BYTES] == rig.contents[0][:BLOCK_BYTES]


def test_what_is_no_packs_file_is_deleted(rig: Rig) -> None:
    rig.check(0, 0, 1)
    rig.await_kept()
    other = rig.directory / ("2" * 32)
    other.mkdir()
    (other / rig.name(0)).write_bytes(b"of a store that is not configured any more")
    (rig.directory / "stray").touch()
    (rig.path(0).parent / "stray").touch()
    (rig.path(0).parent / "directory").mkdir()
    rig.restart()
    assert [path.name for path in rig.directory.iterdir()] == [STORE]
    assert list(rig.path(0).parent.iterdir()) == [rig.path(0)]
    assert rig.cache.statistics().files == 1


def test_a_place_that_cannot_be_written_costs_speed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    rig = Rig(tmp_path / "file" / "packs", 1 << 20)
    rig.check(0, 0, 3 * BLOCK_BYTES)
    rig.check(0, 0, 3 * BLOCK_BYTES)
    rig.await_kept()
    assert rig.cache.statistics().failures > 0
    assert rig.cache.statistics().files == 0
    rig.cache.close()


def test_what_the_store_raises_comes_through(rig: Rig) -> None:
    volume = rig.volume(0)
    rig.blocker.fails = True
    with pytest.raises(StoreError) as raised:
        volume.read(0, 1)
    assert isinstance(raised.value.__cause__, StoreUnavailable)
    rig.blocker.fails = False
    assert volume.read(0, 5) == rig.contents[0][:5]
    volume.close(clean=False)


# Through the composer


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "nodes", CountingBlocker())


def reads_of(world: World) -> CountingBlocker:
    assert isinstance(world.store, CountingBlocker)
    return world.store


def test_a_golden_image_cloned_a_hundred_times_is_fetched_once(world: World) -> None:
    content = noise(1, 3 * REGION_BYTES // SECTOR_BYTES // 2)
    maker = world.composer()
    maker.create("golden", len(content))
    with maker.using(maker.find("golden")) as opened:
        opened.write(0, content)
    maker.snapshot("golden", "image")
    maker.seal("image")
    maker.close_all()

    node = world.composer(host="two")
    shared_of(node)._packs_bytes_max = 64 << 20
    reads_of(world).reads.clear()
    for number in range(100):
        node.clone("image", f"vm{number}")
        with node.using(node.find(f"vm{number}")) as opened:
            opened.write(number * SECTOR_BYTES, b"its own")
            if number % 10:
                offset = random.Random(number).randrange(len(content) // 2) // SECTOR_BYTES * SECTOR_BYTES
                expected = content[offset : offset + 50_000]
                if not offset <= number * SECTOR_BYTES < offset + 50_000:
                    assert opened.read(offset, 50_000) == expected
            else:
                for offset in range(0, len(content), 1 << 20):
                    opened.read(offset, 1 << 20)
    assert len(content) <= reads_of(world).fetched_bytes() <= len(content) + (1 << 20)
    statistics = node.pack_cache()
    assert statistics is not None
    assert statistics.fetched_bytes == reads_of(world).fetched_bytes()
    assert statistics.ahead_bytes > 0
    node.close_all()


def shared_of(composer: Composer) -> Shared:
    return composer.sealed_store(composer.mapper())._shared


LONG = noise(2, 6 * REGION_BYTES // SECTOR_BYTES)


class Resolving:
    """A sealed image of six regions, read by a node that has never seen it, and who resolved which of them."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        maker = world.composer()
        maker.create("long", len(LONG))
        with maker.using(maker.find("long")) as opened:
            opened.write(0, LONG)
        maker.snapshot("long", "image")
        maker.seal("image")
        maker.close_all()
        self.node = world.composer(host="two")
        self.calls: list[tuple[Digest, bool]] = []
        """Leaf, and whether it was ahead of a reader."""
        self.fails_ahead = False
        plain = SealedStore.region

        def region(store: SealedStore, leaf: Digest) -> object:
            ahead = threading.current_thread().name.startswith("regions-ahead")
            self.calls.append((leaf, ahead))
            if ahead and self.fails_ahead:
                raise StoreUnavailable("the cluster does not answer; try again")
            return plain(store, leaf)

        monkeypatch.setattr(SealedStore, "region", region)

    def read(self, opened: OpenVolume, numbers: Iterable[int]) -> None:
        for number in numbers:
            assert opened.read(number * REGION_BYTES, 5000) == LONG[number * REGION_BYTES :][:5000]

    def read_three(self, opened: OpenVolume) -> None:
        """From the beginning, until the others were looked for."""
        self.read(opened, range(3))
        wait_until(lambda: len(self.calls) == 6, "what follows is resolved ahead")
        assert sorted(ahead for _, ahead in self.calls) == [False] * 3 + [True] * 3


@pytest.fixture
def resolving(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolving]:
    resolving = Resolving(world, monkeypatch)
    yield resolving
    resolving.node.close_all()


def test_who_reads_on_finds_regions_resolved(resolving: Resolving) -> None:
    with resolving.node.using(resolving.node.find("image")) as opened:
        resolving.read_three(opened)
        resolving.read(opened, range(6))
    assert len({leaf for leaf, _ in resolving.calls}) == len(resolving.calls) == 6


def test_nothing_is_resolved_ahead_of_who_reads_here_and_there(resolving: Resolving) -> None:
    with resolving.node.using(resolving.node.find("image")) as opened:
        resolving.read(opened, [5, 0, 3, 1, 4, 2])
    assert [ahead for _, ahead in resolving.calls] == [False] * 6


def test_what_was_resolved_before_all_changed_counts_no_more(resolving: Resolving) -> None:
    node = resolving.node
    with node.using(node.find("image")) as opened:
        resolving.read_three(opened)
        node.sealed_store(node.mapper()).forget([])
        resolving.calls.clear()
        resolving.read(opened, [5])
    assert [ahead for _, ahead in resolving.calls] == [False]


def test_what_failed_ahead_is_tried_again(resolving: Resolving) -> None:
    resolving.fails_ahead = True
    with resolving.node.using(resolving.node.find("image")) as opened:
        resolving.read_three(opened)
        resolving.read(opened, range(3, 6))


def test_where_no_thread_can_be_had_regions_are_resolved_by_who_reads(
    resolving: Resolving, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("regions-ahead"):
            raise RuntimeError("can't start new thread")
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with resolving.node.using(resolving.node.find("image")) as opened:
        resolving.read(opened, range(6))
    assert [ahead for _, ahead in resolving.calls] == [False] * 6
