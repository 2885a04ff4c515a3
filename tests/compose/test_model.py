"""The composer against plain bytes: whatever is done in whatever order, both hold the same, also after crashes.

After a power crash each sector is as it was at the last flush or as it was written at any time since; what was flushed,
and every snapshot, is exact. ``--hypothesis-profile=long`` runs it for as long as it takes to find the rest.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from archipfs.blockers.fault import SimulatedCrash
from archipfs.compose import volumes as volumes_module
from archipfs.compose.composer import Composer
from archipfs.compose.volume import OpenVolume
from archipfs.errors import Busy, InvalidInput, NotFound
from archipfs.map.gc import Collector
from archipfs.map.records import Kind
from archipfs.types import SECTOR_BYTES
from tests.compose.world import World
from tests.lib.searching import is_long, searching

SIZE_MAX = 64 * SECTOR_BYTES
BIG = 1 << 40
"""The size of one volume that has room for many bitmap pages; it is looked at only where it was written."""
FAR_PLACES = (0, (128 << 20) - SECTOR_BYTES, (128 << 20) + SECTOR_BYTES, 1 << 35, BIG - 4 * SECTOR_BYTES)
"""Borders of bitmap pages, and places far from all others."""
VOLUMES_MAX = 7
ZEROS = bytes(SECTOR_BYTES)

names = st.sampled_from([f"vm{number}" for number in range(VOLUMES_MAX + 2)])
pick = st.integers(0, VOLUMES_MAX)
offsets = st.one_of(st.integers(0, SIZE_MAX - 1), st.integers(0, 63).map(lambda sector: sector * SECTOR_BYTES))
lengths = st.one_of(st.integers(1, 3 * SECTOR_BYTES), st.integers(1, 6).map(lambda sectors: sectors * SECTOR_BYTES))
sizes = st.one_of(st.integers(1, SIZE_MAX), st.integers(1, 64).map(lambda sector: sector * SECTOR_BYTES))
seeds = st.integers(0, 1 << 16)


@dataclass(slots=True)
class Expected:
    """What a volume has to show."""

    size: int
    writable: bool
    sectors: dict[int, bytes] = field(default_factory=dict)
    """What is missing is zeros."""
    earlier: dict[int, set[bytes]] = field(default_factory=dict)
    """What a sector held since the last flush, where it changed: power loss may bring any of it back."""
    earlier_sizes: set[int] = field(default_factory=set)

    def change(self, offset: int, data: bytes) -> None:
        at, end = offset, offset + len(data)
        while at < end:
            sector, begin = divmod(at, SECTOR_BYTES)
            count = min(SECTOR_BYTES - begin, end - at)
            old = self.sectors.get(sector, ZEROS)
            piece = data[at - offset : at - offset + count]
            self.earlier.setdefault(sector, set()).add(old)
            self.sectors[sector] = old[:begin] + piece + old[begin + count :]
            at += count
        if data and end > self.size:
            self.earlier_sizes.add(self.size)
            self.size = end

    def share(self, source: "Expected", offset: int, length: int) -> None:
        """End at ``offset``, and go on as the source does, durably."""
        edge = min(length, -offset % SECTOR_BYTES)
        self.change(offset, source.content(offset, edge))
        end = offset + length
        for sector in sorted(source.sectors):
            begin = max(sector * SECTOR_BYTES, offset + edge)
            if begin < end:
                self.change(begin, source.content(begin, min(SECTOR_BYTES, end - begin)))
        self.size = end
        self.flushed()

    def resize(self, size: int) -> None:
        if size > min(self.earlier_sizes | {self.size}):
            self.flushed()  # as the composer does before a size grows
        last, tail = divmod(size, SECTOR_BYTES)
        if size < self.size:
            for sectors in (self.sectors, self.earlier):
                for sector in [sector for sector in sectors if sector > last or (sector == last and not tail)]:
                    del sectors[sector]
            if last in self.sectors:
                self.sectors[last] = self.sectors[last][:tail].ljust(SECTOR_BYTES, b"\0")
        self.size = size
        self.earlier_sizes.clear()

    def flushed(self) -> None:
        self.earlier.clear()
        self.earlier_sizes.clear()

    def frozen(self) -> "Expected":
        return Expected(self.size, False, dict(self.sectors))

    def windows(self) -> Iterator[tuple[int, int]]:
        """Offset and length of what to look at."""
        if self.size <= 2 * SIZE_MAX:
            yield 0, self.size
            return
        for place in FAR_PLACES:
            yield max(0, place - SECTOR_BYTES), 8 * SECTOR_BYTES

    def content(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        first, last = offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)
        whole = b"".join(self.sectors.get(sector, ZEROS) for sector in range(first, last))
        return whole[offset - first * SECTOR_BYTES : end - first * SECTOR_BYTES]

    def adopt(self, opened: OpenVolume) -> None:
        """After a power crash: take what is there, if it may be."""
        assert opened.size in self.earlier_sizes | {self.size}
        kept: dict[int, bytes] = {}
        self.size = opened.size
        for offset, length in self.windows():
            data = opened.read(offset, length)
            assert len(data) == max(0, min(length, self.size - offset))
            for at in range(0, len(data), SECTOR_BYTES):
                sector, found = (offset + at) // SECTOR_BYTES, data[at : at + SECTOR_BYTES]
                allowed = self.earlier.get(sector, set()) | {self.sectors.get(sector, ZEROS)}
                assert found in {content[: len(found)] for content in allowed}, f"sector {sector}"
                kept[sector] = found.ljust(SECTOR_BYTES, b"\0")
        self.sectors = kept
        self.flushed()


class ComposerModel(RuleBasedStateMachine):
    """One node's volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.world = World(self.directory)
        self.blocker = self.world.mortal()
        self.composer = self.world.composer(self.blocker)
        self.expected: dict[str, Expected] = {}
        self.opened: dict[str, OpenVolume] = {}
        self.stamps = itertools.count(1)

    def teardown(self) -> None:
        try:
            for name in list(self.opened):
                self.close_it(name)
            self.composer.reclaim()
            self.look_at_all()
            assert self.world.problems() == []
        finally:
            self.composer.abandon()
            shutil.rmtree(self.directory)

    # Helpers

    def choose(self, number: int, *, writable: bool = False, snapshot: bool = False) -> str | None:
        candidates = [
            name
            for name, expected in self.expected.items()
            if (expected.writable or not writable) and not (expected.writable and snapshot)
        ]
        return candidates[number % len(candidates)] if candidates else None

    def stamp(self, length: int) -> bytes:
        unit = next(self.stamps).to_bytes(8, "little")
        return (unit * (length // 8 + 1))[:length]

    def free(self, name: str) -> bool:
        return name not in self.expected and len(self.expected) < VOLUMES_MAX

    def using(self, name: str, action: Callable[[OpenVolume], object]) -> None:
        """Do it on the volume that is open, or open it just for that; closing flushes."""
        if name in self.opened:
            action(self.opened[name])
            return
        with self.composer.using(self.composer.find(name)) as opened:
            action(opened)
        self.expected[name].flushed()

    def close_it(self, name: str) -> None:
        self.composer.release(self.opened.pop(name))
        self.expected[name].flushed()

    def look_at(self, name: str) -> None:
        expected = self.expected[name]

        def look(opened: OpenVolume) -> None:
            assert opened.size == expected.size
            for offset, length in expected.windows():
                assert opened.read(offset, length) == expected.content(offset, length)

        self.using(name, look)

    def look_at_all(self) -> None:
        assert {str(found.record.name) for found in self.composer.volumes()} == self.expected.keys()
        for name in self.expected:
            self.look_at(name)

    def start_again(self, *, power_lost: bool, seed: int = 0) -> None:
        self.blocker.crash()
        self.composer.abandon()
        self.opened.clear()
        if power_lost:
            self.blocker.power_loss(seed)
            self.world.lose_live_bitmaps()
        else:
            self.blocker.bury()
        self.blocker = self.blocker.next_process()
        self.composer = self.world.composer(self.blocker)
        self.composer.recover()
        assert self.world.problems() == []

    def adopt_all(self) -> None:
        assert {str(found.record.name) for found in self.composer.volumes()} == self.expected.keys()
        for name, expected in self.expected.items():
            with self.composer.using(self.composer.find(name)) as opened:
                expected.adopt(opened)

    # Rules

    @initialize(small=sizes, big=st.booleans())
    def begin(self, small: int, big: bool) -> None:
        self.create("vm0", small)
        if big:
            self.create("vm1", BIG)

    @rule(name=names, size=sizes)
    def create(self, name: str, size: int) -> None:
        if self.free(name):
            self.composer.create(name, size)
            self.expected[name] = Expected(size, True)

    @rule(number=pick)
    def open(self, number: int) -> None:
        name = self.choose(number)
        if name is not None and name not in self.opened:
            self.opened[name] = self.composer.open(self.composer.find(name))

    @rule(number=pick)
    def close(self, number: int) -> None:
        if self.opened:
            self.close_it(list(self.opened)[number % len(self.opened)])

    @rule(number=pick, offset=offsets, length=lengths, place=st.sampled_from(FAR_PLACES))
    def write(self, number: int, offset: int, length: int, place: int) -> None:
        """At any place of a small volume, and beyond its end; at the far places of a big one."""
        name = self.choose(number, writable=True)
        if name is None:
            return
        expected = self.expected[name]
        if expected.size > 2 * SIZE_MAX:
            offset, length = place + offset % SECTOR_BYTES, min(length, 3 * SECTOR_BYTES)
        data = self.stamp(length)

        def write(opened: OpenVolume) -> None:
            assert opened.write(offset, data) == length
            expected.change(offset, data)

        self.using(name, write)

    @rule(number=pick, offset=offsets, length=lengths, place=st.sampled_from(FAR_PLACES), zeros=st.booleans())
    def discard(self, number: int, offset: int, length: int, place: int, zeros: bool) -> None:
        name = self.choose(number, writable=True)
        if name is None:
            return
        expected = self.expected[name]
        if expected.size > 2 * SIZE_MAX:
            offset += place

        def discard(opened: OpenVolume) -> None:
            (opened.write_zeros if zeros else opened.discard)(offset, length)
            expected.change(offset, bytes(max(0, min(length, expected.size - offset))))

        self.using(name, discard)

    @rule(number=pick)
    def read(self, number: int) -> None:
        name = self.choose(number)
        if name is not None:
            self.look_at(name)

    @rule(number=pick, size=sizes)
    def resize(self, number: int, size: int) -> None:
        name = self.choose(number, writable=True)
        if name is None:
            return
        self.composer.resize(self.composer.find(name), size)
        self.expected[name].resize(size)
        if name not in self.opened:
            self.expected[name].flushed()

    @precondition(lambda self: self.opened)
    @rule(number=pick)
    def flush(self, number: int) -> None:
        name = list(self.opened)[number % len(self.opened)]
        self.opened[name].flush()
        self.expected[name].flushed()

    @rule(number=pick, snapshot=names)
    def snapshot(self, number: int, snapshot: str) -> None:
        name = self.choose(number)
        if name is not None and self.free(snapshot):
            self.composer.snapshot(name, snapshot)
            self.expected[name].flushed()
            self.expected[snapshot] = self.expected[name].frozen()

    @rule(number=pick, clone=names, more=st.integers(0, 2 * SECTOR_BYTES))
    def clone(self, number: int, clone: str, more: int) -> None:
        name = self.choose(number)
        if name is None or not self.free(clone):
            return
        size = self.expected[name].size + more
        self.composer.clone(name, clone, size=size)
        self.expected[name].flushed()
        self.expected[clone] = Expected(size, True, dict(self.expected[name].sectors))

    @rule(number=pick, source=pick)
    def roll_back(self, number: int, source: int) -> None:
        name, snapshot = self.choose(number, writable=True), self.choose(source, snapshot=True)
        if name is None or snapshot is None or len(self.expected) == VOLUMES_MAX:
            return
        try:
            kept = self.composer.rollback(name, snapshot).kept
        except Busy:
            assert name in self.opened
            return
        except InvalidInput:
            return  # a snapshot of another volume
        assert name not in self.opened
        self.expected[str(kept.name)] = self.expected[name].frozen()
        then = self.expected[snapshot]
        self.expected[name] = Expected(then.size, True, dict(then.sectors))

    @rule(number=pick, copy=names, length=st.one_of(sizes, st.just(2 * BIG)))
    def copy_to_new(self, number: int, copy: str, length: int) -> None:
        """The first piece into an empty volume makes a clone of it."""
        name = self.choose(number)
        if name is None or not self.free(copy):
            return
        self.composer.create(copy, 0)
        self.expected[copy] = Expected(0, True)
        assert self.copy_range(name, 0, copy, 0, length) == min(length, self.expected[name].size)
        assert self.composer.find(copy).record.kind is Kind.CLONE

    @rule(number=pick, to=pick, length=st.one_of(sizes, st.just(2 * BIG)))
    def copy_on(self, number: int, to: int, length: int) -> None:
        """What follows, from the end of the target: an extension where nothing has come in between."""
        name, target = self.choose(number), self.choose(to, writable=True)
        if name is not None and target is not None and name != target and self.expected[target].size < BIG // 2:
            size = self.expected[target].size
            self.copy_range(name, size, target, size, length)

    @rule(number=pick, to=pick, source_offset=offsets, offset=offsets, length=lengths)
    def copy_anything(self, number: int, to: int, source_offset: int, offset: int, length: int) -> None:
        name, target = self.choose(number), self.choose(to, writable=True)
        if name is None or target is None:
            return
        if name == target and abs(source_offset - offset) < min(length, self.expected[name].size - source_offset):
            return
        self.copy_range(name, source_offset, target, offset, length)

    def copy_range(self, name: str, source_offset: int, target: str, offset: int, length: int) -> int:
        source, expected = self.expected[name], self.expected[target]
        done = 0

        def copy(reader: OpenVolume, writer: OpenVolume) -> None:
            nonlocal done
            before = writer.record
            done = self.composer.copy_range(reader, source_offset, writer, offset, length)
            assert done <= min(length, max(0, source.size - source_offset))
            assert (done == 0) == (source_offset >= source.size)
            if writer.record.layer != before.layer:
                source.flushed()
            if (writer.record.layer, writer.record.visible) != (before.layer, before.visible):
                assert writer.record.size == offset + done
                expected.share(source, offset, done)
            else:
                expected.change(offset, source.content(source_offset, done))

        self.using(name, lambda reader: self.using(target, lambda writer: copy(reader, writer)))
        return done

    @rule(number=pick, new_name=names)
    def rename(self, number: int, new_name: str) -> None:
        name = self.choose(number)
        if name is None or name == new_name:
            return
        self.composer.rename(name, new_name, replace=True)
        self.expected[new_name] = self.expected.pop(name)
        self.lose_name(new_name)
        if name in self.opened:
            self.opened[new_name] = self.opened.pop(name)

    @rule(number=pick)
    def remove(self, number: int) -> None:
        name = self.choose(number)
        if name is None or len(self.expected) < 3:
            return
        self.composer.remove(name, even_if_open=True)
        del self.expected[name]
        self.lose_name(name)

    def lose_name(self, name: str) -> None:
        """Who has a removed volume open goes on using it to the end."""
        removed = self.opened.pop(name, None)
        if removed is not None:
            if removed.record.writable:
                data = self.stamp(SECTOR_BYTES)
                removed.write(0, data)
                removed.flush()
                assert removed.read(0, SECTOR_BYTES) == data
            self.composer.release(removed)

    @rule()
    def reclaim(self) -> None:
        self.composer.reclaim()

    @rule(number=pick, live=st.booleans())
    def seal(self, number: int, live: bool) -> None:
        name = self.choose(number)
        if name is None:
            return
        self.composer.seal(name, live=live, threads=1)
        if self.expected[name].writable:
            self.expected[name].flushed()

    @rule()
    def collect_garbage(self) -> None:
        self.composer.reclaim()
        self.collect(self.composer)

    def collect(self, composer: Composer) -> None:
        mapper, store = composer.mapper(), composer.sealed_store(composer.mapper())
        chunks, node = store.chunks, mapper.node.id
        # A seal that a crash cut short left its intent, and nobody else has any.
        Collector(mapper.catalog, mapper.blocker, chunks, node, store.forget, intent_seconds=0.0).collect()

    @rule()
    def process_crash(self) -> None:
        self.start_again(power_lost=False)

    @rule(seed=seeds)
    def power_crash(self, seed: int) -> None:
        self.start_again(power_lost=True, seed=seed)
        self.adopt_all()

    @rule(number=pick, calls=st.integers(1, 16), seed=seeds, power=st.booleans(), snapshot=names)
    def crash_in_a_snapshot(self, number: int, calls: int, seed: int, power: bool, snapshot: str) -> None:
        name = self.choose(number, writable=True)
        if name is None or not self.free(snapshot):
            return

        def take(composer: Composer) -> None:
            composer.snapshot(name, snapshot)

        self.crash_in(take, calls, seed)
        frozen = self.expected[name].frozen()
        self.start_again(power_lost=power, seed=seed)
        try:
            self.composer.find(snapshot)
        except NotFound:
            pass
        else:
            self.expected[name].flushed()
            self.expected[snapshot] = frozen
        if power:
            self.adopt_all()

    @rule(number=pick, copy=names, first=sizes, calls=st.integers(1, 24), seed=seeds, power=st.booleans())
    def crash_in_a_copy(self, number: int, copy: str, first: int, calls: int, seed: int, power: bool) -> None:
        """Two pieces into a new volume: it is empty, or has one of them, or both."""
        name = self.choose(number)
        if name is None or not self.free(copy):
            return
        size = self.expected[name].size
        pieces = [0, min(first, size), size]

        def take(composer: Composer) -> None:
            composer.create(copy, 0)
            with composer.using(composer.find(name)) as reader, composer.using(composer.find(copy)) as writer:
                for begin in pieces[:2]:
                    composer.copy_range(reader, begin, writer, begin, first if begin == 0 else 2 * BIG)

        self.crash_in(take, calls, seed)
        self.start_again(power_lost=power, seed=seed)
        try:
            copied = self.composer.find(copy).record.size
        except NotFound:
            copied = 0
        else:
            assert copied in pieces
            if copied == 0:
                self.composer.remove(copy)
            else:
                source = self.expected[name]
                source.flushed()
                self.expected[copy] = Expected(0, True)
                self.expected[copy].share(source, 0, copied)
        if power:
            self.adopt_all()

    @rule(number=pick, calls=st.integers(1, 30), seed=seeds, power=st.booleans(), live=st.booleans())
    def crash_in_a_seal(self, number: int, calls: int, seed: int, power: bool, live: bool) -> None:
        name = self.choose(number)
        if name is None:
            return

        def seal(composer: Composer) -> None:
            composer.seal(name, live=live, threads=1)

        self.crash_in(seal, calls, seed)
        self.start_again(power_lost=power, seed=seed)
        if power:
            self.adopt_all()

    @rule(calls=st.integers(1, 30), seed=seeds, power=st.booleans())
    def crash_in_a_collection(self, calls: int, seed: int, power: bool) -> None:
        self.crash_in(self.collect, calls, seed)
        self.start_again(power_lost=power, seed=seed)
        if power:
            self.adopt_all()

    @rule(number=pick, calls=st.integers(1, 8), seed=seeds, power=st.booleans())
    def crash_in_a_flush(self, number: int, calls: int, seed: int, power: bool) -> None:
        if not self.opened:
            return
        opened = list(self.opened.values())[number % len(self.opened)]
        self.crash_in(lambda composer: opened.flush(), calls, seed)
        self.start_again(power_lost=power, seed=seed)
        if power:
            self.adopt_all()

    def crash_in(self, action: Callable[[Composer], None], calls: int, seed: int) -> None:
        self.blocker.arm(calls, seed=seed)
        try:
            action(self.composer)
        except SimulatedCrash:
            return
        self.blocker.disarm()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes_module, "CLOSING_SECONDS", 0.0)


TestComposerModel = ComposerModel.TestCase
TestComposerModel.settings = searching(
    100, stateful_step_count=100 if is_long() else 40, suppress_health_check=list(HealthCheck)
)
