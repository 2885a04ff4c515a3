"""Copies of ranges: what becomes a clone, what is extended and what is copied, and what others see meanwhile.

And flushes by the engine alone: when it may, and when it has to ask.
"""

import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from archipfs.blockers.fault import Moment
from archipfs.blockers.file import FileBlocker
from archipfs.compose.composer import Composer
from archipfs.compose.volume import OpenVolume
from archipfs.errors import (
    ArchipError,
    Fenced,
    InvalidInput,
    LockHeld,
    ReadOnlyVolume,
    StoreError,
    StoreFull,
    TooLarge,
)
from archipfs.map.mapper import Mapper
from archipfs.map.records import Kind, VolumeRecord
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX
from tests.compose.world import World, content_of, fill, pattern
from tests.lib.disks import lose_power

SIZE = 8 * SECTOR_BYTES
CONTENT = pattern(1, 8)
HALF = 4 * SECTOR_BYTES


@dataclass(slots=True)
class Pair:
    """``vm``, which holds ``CONTENT``, and ``copy``, which is empty; both open."""

    composer: Composer
    source: OpenVolume
    target: OpenVolume

    def copy(self, offset: int, length: int) -> int:
        return self.composer.copy_range(self.source, offset, self.target, offset, length)

    def whole(self) -> bytes:
        return self.target.read(0, self.target.size)

    def stored(self) -> int:
        """What the target's own layer takes."""
        return self.composer.stored_bytes(self.composer.find("copy"))


def open_pair(composer: Composer) -> Pair:
    composer.create("vm", SIZE)
    fill(composer, "vm", CONTENT)
    composer.create("copy", 0)
    return Pair(composer, composer.open(composer.find("vm")), composer.open(composer.find("copy")))


@pytest.fixture
def pair(world: World) -> Iterator[Pair]:
    made = open_pair(world.composer())
    yield made
    made.composer.close_all()
    made.composer.reclaim()
    assert world.problems() == []


# Clones


def test_a_copy_into_an_empty_volume_makes_it_a_clone_and_keeps_what_it_is_called(pair: Pair) -> None:
    composer = pair.composer

    def edit(record: VolumeRecord) -> VolumeRecord:
        return msgspec.structs.replace(record, mode=0o640, uid=7, xattrs={"a": b"b"})

    before = composer.set_attributes(pair.target.id, edit)
    engine = pair.target.engine
    assert pair.copy(0, VOLUME_BYTES_MAX) == SIZE
    after = composer.find("copy").record
    assert (after.kind, after.origin, after.size) == (Kind.CLONE, pair.source.id, SIZE)
    kept = ("id", "name", "mode", "uid", "gid", "xattrs", "created_ns")
    assert [getattr(after, name) for name in kept] == [getattr(before, name) for name in kept]
    assert after.mtime_ns > before.mtime_ns
    assert pair.target.engine is engine
    assert pair.whole() == CONTENT
    assert pair.stored() == 0
    pair.source.write(0, pattern(2))
    pair.target.write(SECTOR_BYTES, pattern(3))
    assert (
        pair.target.read(0, 3 * SECTOR_BYTES)
        == CONTENT[:SECTOR_BYTES] + pattern(3) + CONTENT[2 * SECTOR_BYTES :][:SECTOR_BYTES]
    )
    assert pair.source.read(SECTOR_BYTES, SECTOR_BYTES) == CONTENT[SECTOR_BYTES:][:SECTOR_BYTES]


def test_the_head_that_a_clone_leaves_is_reclaimed(pair: Pair) -> None:
    composer = pair.composer
    head = pair.target.record.layer
    pair.copy(0, SIZE)
    composer.reclaim()
    assert head not in {layer.partition("/")[2] for layer in composer.mapper().blocker.list_data("layer")}


def test_a_volume_that_was_cut_to_nothing_is_as_empty_as_a_new_one(pair: Pair) -> None:
    pair.target.write(0, pattern(9, 12))
    pair.composer.snapshot("copy", "before")
    pair.composer.resize(pair.composer.find("copy"), 0)
    assert pair.copy(0, SIZE) == SIZE
    assert pair.target.record.kind is Kind.CLONE
    assert pair.whole() == CONTENT
    assert content_of(pair.composer, "before") == pattern(9, 12)


def test_a_source_that_was_removed_is_copied_and_not_shared(pair: Pair) -> None:
    pair.composer.remove("vm", even_if_open=True)
    assert pair.copy(0, SIZE) == SIZE
    assert pair.target.record.kind is Kind.VOLUME
    assert pair.whole() == CONTENT


def test_a_write_that_comes_just_before_the_switch_keeps_it_from_being_a_clone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def still_there(mapper: Mapper, source: VolumeRecord) -> None:
        pair.target.write(SIZE, b"first")

    monkeypatch.setattr(Mapper, "still_there", still_there)
    assert pair.copy(0, SIZE) == SIZE
    assert pair.target.record.kind is Kind.VOLUME
    assert pair.whole() == CONTENT + b"first"
    pair.composer.recover()


def test_a_snapshot_of_the_source_that_is_removed_meanwhile_is_copied_and_not_shared(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    still_there = Mapper.still_there

    def remove_first(mapper: Mapper, source: VolumeRecord) -> None:
        mapper.remove(source.id)
        still_there(mapper, source)

    monkeypatch.setattr(Mapper, "still_there", remove_first)
    snapshot = snapshot_of(pair)
    assert pair.composer.copy_range(snapshot, 0, pair.target, 0, SIZE) == SIZE
    assert pair.target.record.kind is Kind.VOLUME
    assert pair.whole() == CONTENT
    pair.composer.release(snapshot)
    pair.composer.recover()


def test_requests_during_the_switch_neither_fail_nor_get_lost(pair: Pair) -> None:
    """The one write that comes at any time before, in or after it is there in the end, or was overwritten whole."""
    composer = pair.composer
    stop = threading.Event()
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> threading.Thread:
        def repeat() -> None:
            try:
                while not stop.is_set():
                    action()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=repeat)
        thread.start()
        return thread

    def look() -> None:
        record = pair.target.present_record()
        assert record is not None
        assert record.size in (0, 2 * SECTOR_BYTES, SIZE)
        composer.stored_bytes(composer.find("copy"))

    threads = [run(look), run(pair.target.flush), run(lambda: pair.target.read(0, SIZE)), run(composer.reclaim)]
    try:
        for number in range(40):
            data = pattern(100 + number)
            writing = threading.Thread(target=pair.target.write, args=(SECTOR_BYTES, data))
            if number % 2:
                writing.start()
            copied = pair.copy(0, SIZE)
            if not number % 2:
                writing.start()
            writing.join()
            assert copied == SIZE
            found = pair.whole()
            sector = found[SECTOR_BYTES : 2 * SECTOR_BYTES]
            assert found == CONTENT[:SECTOR_BYTES] + sector + CONTENT[2 * SECTOR_BYTES :]
            assert sector == data or (number % 2 and sector == CONTENT[SECTOR_BYTES : 2 * SECTOR_BYTES])
            composer.resize(composer.find("copy"), 0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


# Extensions


def test_pieces_extend_a_clone_up_to_what_the_source_has_written_since(pair: Pair) -> None:
    assert pair.copy(0, 2 * SECTOR_BYTES) == 2 * SECTOR_BYTES
    assert pair.copy(2 * SECTOR_BYTES, 100) == 100
    assert pair.copy(2 * SECTOR_BYTES + 100, SECTOR_BYTES) == SECTOR_BYTES
    end = 3 * SECTOR_BYTES + 100
    assert pair.whole() == CONTENT[:end]
    changed = pattern(2)
    pair.source.write(5 * SECTOR_BYTES, changed)
    assert pair.copy(end, SIZE) == 5 * SECTOR_BYTES - end
    assert pair.stored() == 0
    assert pair.target.record.visible == 5 * SECTOR_BYTES
    assert pair.copy(5 * SECTOR_BYTES, SIZE) == 3 * SECTOR_BYTES
    assert pair.whole() == CONTENT[: 5 * SECTOR_BYTES] + changed + CONTENT[6 * SECTOR_BYTES :]
    assert pair.target.record.visible == 5 * SECTOR_BYTES


def test_a_snapshot_between_pieces_holds_what_was_there(pair: Pair) -> None:
    pair.copy(0, HALF)
    pair.composer.snapshot("copy", "between")
    assert pair.copy(HALF, SIZE) == SIZE - HALF
    assert pair.whole() == CONTENT
    assert content_of(pair.composer, "between") == CONTENT[:HALF]
    pair.composer.clone("between", "larger", size=SIZE)
    assert content_of(pair.composer, "larger") == CONTENT[:HALF] + bytes(SIZE - HALF)


def test_a_snapshot_that_a_crash_cut_short_between_pieces_limits_the_layer(pair: Pair) -> None:
    pair.copy(0, HALF)
    pair.composer.mapper().limit_parent(pair.target.record.layer, HALF)
    assert pair.copy(HALF, SIZE) == SIZE - HALF
    pair.composer.release(pair.target)
    assert content_of(pair.composer, "copy") == CONTENT


def test_growth_between_pieces_shows_zeros(pair: Pair) -> None:
    pair.copy(0, HALF)
    pair.target.write(SIZE - 1, b"x")
    assert pair.target.read(HALF, SIZE) == bytes(SIZE - HALF - 1) + b"x"
    pair.target.flush()
    assert pair.target.record.visible <= HALF
    # Cut off again, but the head still has its bit for the last sector: that one cannot shine through.
    pair.composer.resize(pair.composer.find("copy"), HALF)
    assert pair.copy(HALF, SIZE) == SIZE - HALF
    assert pair.whole() == CONTENT


def test_an_extension_after_a_shrink_shows_the_source_and_nothing_that_was_cut(pair: Pair) -> None:
    pair.copy(0, SIZE)
    pair.composer.resize(pair.composer.find("copy"), SECTOR_BYTES)
    assert pair.copy(SECTOR_BYTES, SECTOR_BYTES) == SECTOR_BYTES
    assert pair.stored() == 0
    pair.composer.resize(pair.composer.find("copy"), SIZE)
    assert pair.whole() == CONTENT[: 2 * SECTOR_BYTES] + bytes(SIZE - 2 * SECTOR_BYTES)


# Copies


def test_a_copy_within_a_volume(pair: Pair) -> None:
    composer, source = pair.composer, pair.source
    assert composer.copy_range(source, 100, source, SIZE - 50, HALF) == HALF
    assert source.read(0, source.size) == CONTENT[:-50] + CONTENT[100 : HALF + 100]
    assert composer.copy_range(source, 0, source, 0, 0) == 0
    assert composer.copy_range(source, source.size, source, 0, 10) == 0
    # As far as the source goes, they do not overlap.
    assert composer.copy_range(source, source.size - 1, source, 0, SIZE) == 1


REFUSED: dict[str, tuple[Callable[[Pair], object], type[ArchipError], str]] = {
    "a negative offset": (lambda pair: pair.copy(-1, 1), InvalidInput, "negative"),
    "a negative length": (lambda pair: pair.copy(0, -1), InvalidInput, "negative"),
    "a range onto itself": (
        lambda pair: pair.composer.copy_range(pair.source, 0, pair.source, 10, 11),
        InvalidInput,
        "onto itself",
    ),
    "more than a volume can hold": (
        lambda pair: pair.composer.copy_range(pair.source, 0, pair.target, VOLUME_BYTES_MAX - 10, 11),
        TooLarge,
        "larger than 64 TiB",
    ),
    "a target that is a snapshot": (
        lambda pair: pair.composer.copy_range(pair.target, 0, snapshot_of(pair), 0, 1),
        ReadOnlyVolume,
        "is a snapshot",
    ),
}


def snapshot_of(pair: Pair) -> OpenVolume:
    pair.composer.snapshot("vm", "snap")
    return pair.composer.open(pair.composer.find("snap"))


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_and_changes_nothing(pair: Pair, what: str) -> None:
    action, error, words = REFUSED[what]
    with pytest.raises(error, match=words) as caught:
        action(pair)
    assert "\n" not in str(caught.value)
    assert pair.source.read(0, SIZE) == CONTENT
    assert pair.target.size == 0


def test_volumes_of_another_node_are_read_as_flushed_there_and_not_written(world: World) -> None:
    pair = open_pair(world.composer())
    pair.source.flush()
    other = world.composer(host="two")
    with other.using(other.find("vm")) as foreign, other.using(other.find("copy")) as foreign_target:
        with pytest.raises(LockHeld):
            other.copy_range(foreign, 0, foreign_target, 0, SIZE)
        other.create("mine", 0)
        with other.using(other.find("mine")) as mine:
            assert other.copy_range(foreign, 0, mine, 0, SIZE) == SIZE
            assert mine.record.kind is Kind.VOLUME
            assert mine.read(0, SIZE) == CONTENT
    pair.composer.close_all()


def test_crossing_copies_and_snapshots_end(pair: Pair) -> None:
    """Both take both volumes' ``control``."""
    composer = pair.composer

    def cross(source: OpenVolume, target: OpenVolume) -> None:
        for _ in range(60):
            composer.resize(composer.find(target.name), 0)
            for _ in range(3):
                composer.copy_range(source, target.size, target, target.size, HALF)

    ends = [(pair.source, pair.target), (pair.target, pair.source)]
    threads = [threading.Thread(target=cross, args=end, daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("error", [StoreFull, StoreError])
@pytest.mark.parametrize("offset", [0, HALF])
def test_a_store_that_fails_once_loses_nothing(
    tmp_path: Path, offset: int, error: type[StoreError], moment: Moment
) -> None:
    """At any call of a clone or an extension: this process goes on with what it has, and so does the next."""
    for number in itertools.count(1):
        world = World(tmp_path / str(number))
        blocker = world.mortal()
        pair = open_pair(world.composer(blocker))
        if offset:
            pair.copy(0, offset)
        last = blocker.calls + number
        blocker.arm_error(number, error, moment)
        with suppress(StoreError):
            pair.copy(offset, SIZE)
        failed = blocker.calls >= last
        blocker.disarm()
        before = pair.whole()
        assert before in (CONTENT[:offset], CONTENT)
        after = pattern(5) + before[SECTOR_BYTES:]
        try:
            pair.target.write(0, pattern(5))
            pair.target.flush()
            allowed = [after]
        except StoreError:
            # The store did not say what it had recorded, and the engine refused.
            allowed = [before, after, CONTENT]
        pair.composer.abandon()
        recovered = world.recovered()
        assert content_of(recovered, "copy") in allowed
        assert content_of(recovered, "vm") == CONTENT
        assert world.problems() == []
        if not failed:
            return


# Flushes by the engine alone


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[World]:
    """On a directory, where a lock's record has paths."""
    store = FileBlocker.create(tmp_path / "store")
    yield World(tmp_path / "nodes", store)
    store.close()


def test_an_engine_flushes_alone_once_its_lock_was_seen_to_hold(shared: World) -> None:
    composer = shared.composer()
    composer.create("vm", SIZE)
    with composer.using(composer.find("vm")) as opened:
        engine = opened.engine
        assert not engine.sync()
        opened.flush()
        opened.write(0, CONTENT)
        assert engine.sync()
        # The record has to get a new size.
        opened.write(SIZE, b"x")
        assert not engine.sync()
        opened.flush()
        assert engine.sync()
        composer.resize(composer.find("vm"), SIZE)
        assert engine.sync()
        opened.write(SIZE, b"x")
        assert not engine.sync()
        opened.flush()
        # Another reason to hold it is another version of the same lock.
        composer.lock("vm")
        assert not engine.sync()
        opened.flush()
        assert engine.sync()
        composer.snapshot("vm", "snap")
        assert engine.sync()
        composer.verify_leases()
        assert engine.sync()
    with composer.using(composer.find("snap")) as snapshot, snapshot.reading() as reader:
        snapshot.flush()
        assert not reader.sync()


@pytest.mark.parametrize("then", ["broken", "taken", "removed"])
def test_an_engine_whose_lock_was_broken_flushes_no_more(shared: World, then: str) -> None:
    composer, other = shared.composer(), shared.composer(host="two")
    composer.create("vm", SIZE)
    opened = composer.open(composer.find("vm"))
    opened.flush()
    assert opened.engine.sync()
    other.unlock("vm", force=True)
    if then != "broken":
        other.lock("vm")
    if then == "removed":
        other.mapper().locks.forget(opened.id)
    assert not opened.engine.sync()
    with pytest.raises(Fenced):
        opened.flush()
    with pytest.raises(StoreError):
        opened.engine.flush()
    assert not opened.engine.sync()
    composer.abandon()


def test_an_engine_over_a_store_without_paths_never_flushes_alone(pair: Pair) -> None:
    pair.source.flush()
    assert not pair.source.engine.sync()


# Reflinks


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that shares blocks among files."""
    image, path = tmp_path / "image", tmp_path / "disk"
    path.mkdir()
    with open(image, "wb") as stream:
        stream.truncate(512 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, path], check=True)
    yield path
    # Lazily: a test that failed may have files open.
    subprocess.run(["umount", "--lazy", path], check=True)


def test_a_copy_shares_blocks_where_the_file_system_can(xfs: Path, tmp_path: Path) -> None:
    megabytes = 64 << 20
    store = FileBlocker.create(xfs / "store")
    world = World(tmp_path / "nodes", store)
    composer = world.composer()
    composer.create("vm", megabytes)
    composer.create("other", megabytes)
    data = os.urandom(megabytes)
    with composer.using(composer.find("vm")) as source, composer.using(composer.find("other")) as target:
        source.write(0, data)
        source.flush()
        used = used_bytes(xfs)
        # Not from the beginning, so that it is no clone; the edges go through memory.
        assert composer.copy_range(source, 5000, target, 5000, megabytes) == megabytes - 5000
        target.flush()
        assert used_bytes(xfs) - used < 4 << 20
        assert target.read(0, megabytes) == bytes(5000) + data[5000:]
        source.write(8192, bytes(8192))
        assert target.read(8192, 8192) == data[8192:16384]
    with composer.using(composer.find("other")) as target:
        assert target.read(0, megabytes) == bytes(5000) + data[5000:]
    store.close()


@pytest.mark.power
def test_shared_blocks_that_were_flushed_survive_power_loss(xfs: Path, tmp_path: Path) -> None:
    size = 16 << 20
    world = World(tmp_path / "nodes", FileBlocker.create(xfs / "store"))
    composer = world.composer()
    composer.create("vm", size)
    composer.create("other", size)
    data = os.urandom(size)
    source, target = composer.open(composer.find("vm")), composer.open(composer.find("other"))
    source.write(0, data)
    assert composer.copy_range(source, SECTOR_BYTES, target, SECTOR_BYTES, size) == size - SECTOR_BYTES
    target.flush()
    assert target.engine.sync()
    lost = pattern(1, 1)
    target.write(0, lost)
    lose_power(xfs)
    composer.abandon()
    world.store.close()
    subprocess.run(["umount", xfs], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "image", xfs], check=True)
    world.lose_live_bitmaps()
    world.store = FileBlocker(xfs / "store")
    assert content_of(world.recovered(), "other") == bytes(SECTOR_BYTES) + data[SECTOR_BYTES:]
    world.store.close()


def used_bytes(path: Path) -> int:
    os.sync()
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize
