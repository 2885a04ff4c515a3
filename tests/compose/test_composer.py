"""What the composer refuses and in which words, who may do what at the same time, and who is fenced."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from archipfs.blockers.fault import Moment
from archipfs.compose import volumes as volumes_module
from archipfs.compose.composer import Composer
from archipfs.compose.engine import EngineVolume
from archipfs.compose.volume import OpenVolume
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Busy,
    Fenced,
    InvalidInput,
    InvalidName,
    InvalidSize,
    LockHeld,
    NotFound,
    ObjectDamaged,
    ReadOnlyVolume,
    StoreError,
    StoreFull,
    TooLarge,
)
from archipfs.map.check import Severity
from archipfs.map.mapper import Mapper
from archipfs.map.records import Hold, Kind, VolumeRecord
from archipfs.types import SECTOR_BYTES, SIZE_BYTES_MAX, VOLUME_BYTES_MAX, VolumeId
from tests.compose.interleave import NEVER, Schedule, SteppedBlocker
from tests.compose.world import World, content_of, fill, pattern, see

SIZE = 4 * SECTOR_BYTES
CONTENT = pattern(1, 4)


@pytest.fixture
def composer(world: World) -> Composer:
    """A volume ``vm`` with ``CONTENT``, and a snapshot ``snap`` of it."""
    composer = world.composer()
    composer.create("vm", SIZE)
    fill(composer, "vm", CONTENT)
    composer.snapshot("vm", "snap")
    return composer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes_module, "CLOSING_SECONDS", 0.05)


def errors_of(world: World) -> list[str]:
    return [f"{found.which}: {found.what}" for found in world.check() if found.severity is Severity.ERROR]


# One clear line each


def empty_volume(composer: Composer) -> None:
    composer.create("empty", 0)
    composer.snapshot("empty", "nothing")


def foreign_snapshot(composer: Composer) -> None:
    composer.create("other", SIZE)
    composer.rollback("other", "snap")


def while_open(action: Callable[[Composer], object]) -> Callable[[Composer], object]:
    def operation(composer: Composer) -> None:
        composer.open(composer.find("vm"))
        action(composer)

    return operation


def while_held(action: Callable[[Composer], object]) -> Callable[[Composer], object]:
    def operation(composer: Composer) -> None:
        composer.hold_open("vm")
        action(composer)

    return operation


def while_locked(action: Callable[[Composer], object]) -> Callable[[Composer], object]:
    def operation(composer: Composer) -> None:
        composer.lock("vm")
        action(composer)

    return operation


REFUSALS: dict[str, tuple[Callable[[Composer], object], type[ArchipError], str]] = {
    "create: name exists": (
        lambda composer: composer.create("vm", SIZE),
        AlreadyExists,
        "vm exists already; choose another name or remove it first",
    ),
    "create: invalid name": (lambda composer: composer.create("a/b", SIZE), InvalidName, "invalid name 'a/b'"),
    "create: negative size": (lambda composer: composer.create("new", -1), InvalidSize, "size -1 is not positive"),
    "create: too large": (
        lambda composer: composer.create("new", VOLUME_BYTES_MAX + 1),
        TooLarge,
        "is more than backend default can keep in one volume; 64 TiB is the most",
    ),
    "create: over 8 EiB": (lambda composer: composer.create("new", SIZE_BYTES_MAX + 1), InvalidSize, "over 8 EiB"),
    "create: no such backend": (
        lambda composer: composer.create("new", SIZE, backend="tape"),
        NotFound,
        "no backend is called tape",
    ),
    "find: nothing of that name": (lambda composer: composer.find("nothing"), NotFound, "no volume is called nothing"),
    "find: not even a name": (lambda composer: composer.find(".."), InvalidName, "begins with a dot"),
    "find by id: nothing": (lambda composer: composer.find_by_id("0" * 32), NotFound, "no volume has the id"),  # type: ignore[arg-type]
    "snapshot of nothing": (
        lambda composer: composer.snapshot("nothing", "new"),
        NotFound,
        "no volume is called nothing",
    ),
    "snapshot of an empty volume": (empty_volume, InvalidInput, "empty has no size yet"),
    "snapshot: name exists": (lambda composer: composer.snapshot("vm", "snap"), AlreadyExists, "snap exists already"),
    "snapshot: its own name": (lambda composer: composer.snapshot("vm", "vm"), AlreadyExists, "vm exists already"),
    "snapshot: invalid name": (lambda composer: composer.snapshot("vm", ".x"), InvalidName, "begins with a dot"),
    "snapshot smaller than its source": (
        lambda composer: composer.snapshot("vm", "new", size=SIZE - 1),
        InvalidSize,
        "is smaller than vm, which has 16 KiB; give at least that",
    ),
    "snapshot of a snapshot, smaller": (
        lambda composer: composer.snapshot("snap", "new", size=1),
        InvalidSize,
        "is smaller than snap",
    ),
    "clone of nothing": (lambda composer: composer.clone("nothing", "new"), NotFound, "no volume is called nothing"),
    "clone: name exists": (lambda composer: composer.clone("snap", "vm"), AlreadyExists, "vm exists already"),
    "clone smaller than its source": (
        lambda composer: composer.clone("snap", "new", size=SECTOR_BYTES),
        InvalidSize,
        "size 4 KiB is smaller than snap, which has 16 KiB; give at least that",
    ),
    "clone too large": (
        lambda composer: composer.clone("snap", "new", size=VOLUME_BYTES_MAX + 1),
        TooLarge,
        "is the most",
    ),
    "rename of nothing": (lambda composer: composer.rename("nothing", "new"), NotFound, "no volume is called nothing"),
    "rename onto a taken name": (lambda composer: composer.rename("vm", "snap"), AlreadyExists, "snap exists already"),
    "rename to no name": (lambda composer: composer.rename("vm", ""), InvalidName, "it is empty"),
    "resize of a snapshot": (
        lambda composer: composer.resize(composer.find("snap"), SIZE),
        ReadOnlyVolume,
        "snap is a snapshot and does not change; clone it to write",
    ),
    "resize: negative": (
        lambda composer: composer.resize(composer.find("vm"), -1),
        InvalidSize,
        "size -1 is not positive",
    ),
    "resize: too large": (
        lambda composer: composer.resize(composer.find("vm"), VOLUME_BYTES_MAX + 1),
        TooLarge,
        "is the most",
    ),
    "rollback of nothing": (lambda composer: composer.rollback("nothing", "snap"), NotFound, "called nothing"),
    "rollback to nothing": (lambda composer: composer.rollback("vm", "nothing"), NotFound, "called nothing"),
    "rollback to a volume": (lambda composer: composer.rollback("vm", "vm"), InvalidInput, "vm is not a snapshot"),
    "rollback of a snapshot": (
        lambda composer: composer.rollback("snap", "snap"),
        ReadOnlyVolume,
        "snap is a snapshot and does not change",
    ),
    "rollback to a foreign snapshot": (
        foreign_snapshot,
        InvalidInput,
        "snap is not a snapshot of other; clone it instead",
    ),
    "rollback of an open volume": (
        while_open(lambda composer: composer.rollback("vm", "snap")),
        Busy,
        "vm is open; close it before you roll back it",
    ),
    "rollback of a volume held open": (
        while_held(lambda composer: composer.rollback("vm", "snap")),
        Busy,
        "vm is held by one; `archip volume-close vm`",
    ),
    "remove of nothing": (lambda composer: composer.remove("nothing"), NotFound, "no volume is called nothing"),
    "remove of an open volume": (
        while_open(lambda composer: composer.remove("vm")),
        Busy,
        "vm is open; close it before you remove it",
    ),
    "remove of a volume held open": (
        while_held(lambda composer: composer.remove("vm")),
        Busy,
        "vm is held by one; `archip volume-close vm` before you remove it",
    ),
    "remove of a locked volume": (
        while_locked(lambda composer: composer.remove("vm")),
        Busy,
        "vm is held by one; `archip volume-unlock vm` before you remove it",
    ),
    "unlink of a volume held open": (
        while_held(lambda composer: composer.remove("vm", even_if_open=True)),
        Busy,
        "vm is held by one",
    ),
    "replacing a volume held open": (
        while_held(lambda composer: composer.rename("snap", "vm", replace=True)),
        Busy,
        "vm is held by one; `archip volume-close vm` before you replace it",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_is_refused_is_refused_in_one_clear_line(world: World, composer: Composer, refusal: str) -> None:
    operation, error, message = REFUSALS[refusal]
    before = {name: seen for name, seen in see(composer).items() if name in ("vm", "snap")}
    with pytest.raises(error) as caught:
        operation(composer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    composer.close_all()
    after = see(composer)
    assert {name: after[name] for name in before} == before, "nothing was changed"
    composer.close_all()
    composer.mapper().reclaim()
    assert world.problems() == []


def test_a_snapshot_takes_no_writes(composer: Composer) -> None:
    with composer.using(composer.find("snap")) as opened:
        for write in (
            lambda: opened.write(0, b"x"),
            lambda: opened.discard(0, 1),
            lambda: opened.write_zeros(0, 1),
            lambda: opened.resize(1),
            opened.freeze,
        ):
            with pytest.raises(ReadOnlyVolume, match="snap is a snapshot and does not change"):
                write()
    assert content_of(composer, "snap") == CONTENT


# What the operations do


def test_names_are_changed_under_an_open_volume(composer: Composer) -> None:
    with composer.using(composer.find("vm")) as opened:
        composer.rename("vm", "new")
        assert opened.name == "new"
        opened.write(0, pattern(2))
        assert composer.find("new").record.id == opened.id
    assert content_of(composer, "new")[:SECTOR_BYTES] == pattern(2)


def test_an_open_volume_can_be_replaced_and_used_to_the_end(world: World, composer: Composer) -> None:
    composer.create("other", SIZE)
    opened = composer.open(composer.find("vm"))
    composer.rename("other", "vm", replace=True)
    assert content_of(composer, "vm") == bytes(SIZE)
    opened.write(0, pattern(2))
    opened.flush()
    assert opened.read(0, SECTOR_BYTES) == pattern(2)
    assert composer.find_by_id(opened.id).record.name is None
    composer.release(opened)
    composer.reclaim()
    assert world.check() == []
    with pytest.raises(NotFound):
        composer.find_by_id(opened.id)


def test_a_rollback_keeps_what_it_leaves(composer: Composer) -> None:
    fill(composer, "vm", pattern(2, 2), SIZE)
    rolled_back = composer.rollback("vm", "snap")
    assert content_of(composer, "vm") == CONTENT
    assert content_of(composer, str(rolled_back.kept.name)) == CONTENT + pattern(2, 2)
    assert (rolled_back.record.name, rolled_back.record.size) == ("vm", SIZE)
    composer.rollback("vm", str(rolled_back.kept.name))
    assert content_of(composer, "vm") == CONTENT + pattern(2, 2)


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127])
def test_a_volume_with_the_longest_name_can_be_rolled_back_again_and_again(world: World, name: str) -> None:
    composer = world.composer()
    composer.create(name, SIZE)
    composer.snapshot(name, "snap")
    kept = {str(composer.rollback(name, "snap").kept.name) for _ in range(3)}
    assert len(kept) == 3
    assert all(found.startswith(name[:50]) for found in kept)


def test_growing_shows_zeros_whatever_was_there(composer: Composer) -> None:
    composer.resize(composer.find("vm"), SECTOR_BYTES + 100)
    composer.resize(composer.find("vm"), SIZE)
    assert content_of(composer, "vm") == CONTENT[: SECTOR_BYTES + 100] + bytes(SIZE - SECTOR_BYTES - 100)
    composer.clone("vm", "copy", size=2 * SIZE)
    assert content_of(composer, "copy") == content_of(composer, "vm") + bytes(SIZE)
    assert content_of(composer, "snap") == CONTENT


def test_a_snapshot_may_be_larger_than_its_source(composer: Composer) -> None:
    composer.snapshot("vm", "large", size=2 * SIZE)
    composer.snapshot("snap", "larger", size=3 * SIZE)
    assert content_of(composer, "large") == CONTENT + bytes(SIZE)
    assert content_of(composer, "larger") == CONTENT + bytes(2 * SIZE)


def test_what_was_cut_off_stays_hidden_in_a_larger_snapshot(composer: Composer) -> None:
    composer.resize(composer.find("vm"), SECTOR_BYTES)
    composer.snapshot("vm", "large", size=SIZE)
    assert content_of(composer, "large") == CONTENT[:SECTOR_BYTES] + bytes(SIZE - SECTOR_BYTES)


def test_attributes_of_an_open_volume_change_and_its_size_stays(composer: Composer) -> None:
    with composer.using(composer.find("vm")) as opened:
        opened.write(SIZE, pattern(2))
        record = composer.set_attributes(
            opened.id, lambda record: msgspec.structs.replace(record, xattrs={"user.a": b"1"})
        )
        assert (record.size, record.xattrs) == (SIZE + SECTOR_BYTES, {"user.a": b"1"})
        assert composer.find("vm").record.size == SIZE + SECTOR_BYTES
    record = composer.find("vm").record
    assert (record.size, record.xattrs) == (SIZE + SECTOR_BYTES, {"user.a": b"1"})


def test_each_name_is_listed_once(composer: Composer) -> None:
    composer.clone("snap", "copy")
    listed = {str(found.record.name): found.record.kind for found in composer.volumes()}
    assert listed == {"vm": Kind.VOLUME, "snap": Kind.SNAPSHOT, "copy": Kind.CLONE}


def test_statistics_count_what_was_done(composer: Composer) -> None:
    with composer.using(composer.find("vm")) as opened:
        opened.write(0, pattern(2, 2))
        opened.write(10, b"x")
        opened.read(0, SIZE)
        opened.discard(SECTOR_BYTES, SECTOR_BYTES)
        opened.flush()
        counts = opened.engine.statistics()
    assert (counts.writes, counts.written_bytes) == (2, 2 * SECTOR_BYTES + 1)
    assert (counts.reads, counts.read_bytes) == (1, SIZE)
    assert (counts.discards, counts.discarded_bytes) == (1, SECTOR_BYTES)
    assert (counts.flushes, counts.layers, counts.failed) == (1, 2, 0)


def test_operations_tell_how_long_they_took(composer: Composer) -> None:
    assert 0 < composer.create("new", SIZE).seconds < 60
    assert 0 < composer.snapshot("new", "new@1").seconds < 60
    assert 0 < composer.clone("new@1", "copy").seconds < 60


def test_what_takes_space_is_the_last_layer(composer: Composer) -> None:
    assert composer.stored_bytes(composer.find("snap")) == SIZE
    assert composer.stored_bytes(composer.find("vm")) == 0
    fill(composer, "vm", pattern(2))
    assert composer.stored_bytes(composer.find("vm")) == SECTOR_BYTES


# Locks


@pytest.mark.parametrize("operation", [lambda one: one.rollback("vm", "snap"), lambda one: one.remove("vm")])
def test_who_wants_a_closed_volume_alone_waits_for_its_last_flush(
    composer: Composer, operation: Callable[[Composer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = composer.open(composer.find("vm"))
    opened.write(0, pattern(2))
    closing, may_close = threading.Event(), threading.Event()
    stop = OpenVolume.stop

    def stop_slowly(volume: OpenVolume) -> None:
        if volume is opened:
            closing.set()
            assert may_close.wait(60)
        stop(volume)

    monkeypatch.setattr(OpenVolume, "stop", stop_slowly)
    with ThreadPoolExecutor(2) as threads:
        released = threads.submit(composer.release, opened)
        assert closing.wait(60)
        done = threads.submit(operation, composer)
        try:
            with pytest.raises(TimeoutError):
                done.result(4 * volumes_module.CLOSING_SECONDS)
        finally:
            may_close.set()
        released.result(60)
        done.result(60)
    assert composer.open_volumes() == []


def test_closing_gives_the_lock_back(world: World, composer: Composer) -> None:
    found = composer.find("vm")
    one, two = composer.open(found), composer.open(found)
    assert one is two
    lock = composer.lock_of(found)
    assert lock is not None
    assert lock.holds == (Hold.IO,)
    composer.release(one)
    assert composer.lock_of(found) is not None
    assert composer.is_open(found.record.id)
    composer.release(two)
    assert composer.lock_of(found) is None
    assert not composer.is_open(found.record.id)
    assert composer.open_volumes() == []
    assert list((world.directory / "one").iterdir()) == []


@pytest.mark.parametrize(
    "operation",
    [
        lambda composer: composer.snapshot("vm", "new"),
        lambda composer: composer.clone("vm", "new"),
        lambda composer: composer.rename("vm", "new"),
        lambda composer: composer.rename("snap", "vm", replace=True),
        lambda composer: composer.resize(composer.find("vm"), SIZE),
        lambda composer: composer.rollback("vm", "snap"),
        lambda composer: composer.remove("vm"),
        lambda composer: composer.remove("vm", even_if_open=True),
        lambda composer: composer.lock("vm"),
        lambda composer: composer.unlock("vm"),
        lambda composer: composer.hold_open("vm"),
        lambda composer: composer.close("vm"),
    ],
    ids=[
        "snapshot",
        "clone",
        "rename",
        "replace",
        "resize",
        "rollback",
        "remove",
        "unlink",
        "lock",
        "unlock",
        "open",
        "close",
    ],
)
def test_a_volume_that_another_node_holds_is_left_alone(
    world: World, composer: Composer, operation: Callable[[Composer], object]
) -> None:
    """At once, and naming who has it."""
    opened = composer.open(composer.find("vm"))
    other = world.composer(host="two")
    begun = time.monotonic()
    with pytest.raises(LockHeld, match=r"vm is locked by one \(node"):
        operation(other)
    assert time.monotonic() - begun < 2
    opened.write(0, pattern(2))
    composer.release(opened)
    assert content_of(composer, "vm") == pattern(2) + CONTENT[SECTOR_BYTES:]
    other.mapper().reclaim()
    composer.mapper().reclaim()
    assert world.problems() == []


def test_another_nodes_volume_is_read_as_flushed_and_written_once_it_is_free(world: World, composer: Composer) -> None:
    opened = composer.open(composer.find("vm"))
    other = world.composer(host="two")
    reader = other.open(other.find("vm"))
    assert not reader.owned
    opened.write(0, pattern(2))
    assert reader.read(0, SECTOR_BYTES) == CONTENT[:SECTOR_BYTES]
    opened.flush()
    assert reader.read(0, SECTOR_BYTES) == pattern(2)
    with pytest.raises(LockHeld):
        reader.write(0, pattern(3))
    composer.release(opened)
    reader.write(0, pattern(3))
    lock = other.lock_of(other.find("vm"))
    assert lock is not None
    assert lock.host == "two"
    other.release(reader)
    assert content_of(composer, "vm")[:SECTOR_BYTES] == pattern(3)


def test_a_reader_keeps_no_lock_of_an_operation(world: World, composer: Composer) -> None:
    """It opened the volume when another node had the lock, which has given it back since."""
    opened = composer.open(composer.find("vm"))
    other = world.composer(host="two")
    reader = other.open(other.find("vm"))
    composer.release(opened)
    other.rename("vm", "new")
    other.release(reader)
    assert composer.lock_of(composer.find("new")) is None
    fill(composer, "new", pattern(2))


def test_a_reader_does_not_purge_what_its_owner_removed_and_still_uses(world: World, composer: Composer) -> None:
    opened = composer.open(composer.find("vm"))
    other = world.composer(host="two")
    reader = other.open(other.find("vm"))
    composer.remove("vm", even_if_open=True)
    reader.read(0, SECTOR_BYTES)
    other.release(reader)
    other.reclaim()
    other.recover()
    opened.write(0, pattern(2))
    opened.flush()
    assert opened.read(0, SIZE) == pattern(2) + CONTENT[SECTOR_BYTES:]
    composer.release(opened)
    composer.reclaim()
    assert world.check() == []


def test_a_broken_lock_fences_its_owner(world: World, composer: Composer) -> None:
    """It writes no more, loses only what it had not flushed, and can open the volume anew afterwards."""
    opened = composer.open(composer.find("vm"))
    opened.write(0, pattern(2))
    opened.flush()
    opened.write(SECTOR_BYTES, pattern(3))
    other = world.composer(host="two")
    other.unlock("vm", force=True)
    fill(other, "vm", pattern(4), 2 * SECTOR_BYTES)
    for act in (opened.flush, opened.freeze, lambda: opened.resize(SIZE * 2)):
        with pytest.raises(Fenced):
            act()
    with pytest.raises(StoreError):
        opened.write(0, pattern(5))
    with pytest.raises(Fenced):
        composer.release(opened)
    for host in (composer, other):
        content = content_of(host, "vm")
        assert content[:SECTOR_BYTES] == pattern(2)
        assert content[SECTOR_BYTES : 2 * SECTOR_BYTES] in (CONTENT[SECTOR_BYTES : 2 * SECTOR_BYTES], pattern(3))
        assert content[2 * SECTOR_BYTES : 3 * SECTOR_BYTES] == pattern(4)
    assert errors_of(world) == []


def test_fenced_volumes_are_found_by_looking_at_the_leases(world: World, composer: Composer) -> None:
    opened = composer.open(composer.find("vm"))
    composer.verify_leases()
    opened.write(0, pattern(2))
    world.composer(host="two").unlock("vm", force=True)
    composer.verify_leases()
    with pytest.raises(StoreError):
        opened.write(0, pattern(3))


def test_what_a_fenced_node_remembers_is_not_believed(world: World, composer: Composer) -> None:
    """It is killed, another node breaks its lock and writes; then its live bitmap is out of date."""
    opened = composer.open(composer.find("vm"))
    opened.write(0, pattern(2, 2))
    composer.abandon()
    other = world.composer(host="two")
    with pytest.raises(LockHeld):
        other.resize(other.find("vm"), SIZE)
    other.unlock("vm", force=True)
    fill(other, "vm", pattern(3, 4))
    assert content_of(world.recovered(), "vm") == pattern(3, 4)


def test_our_own_lock_is_given_back_and_not_broken(composer: Composer) -> None:
    opened = composer.open(composer.find("vm"))
    composer.lock("vm")
    composer.unlock("vm", force=True)
    opened.write(0, pattern(2))
    opened.flush()
    lock = composer.lock_of(composer.find("vm"))
    assert lock is not None
    assert lock.holds == (Hold.IO,)
    composer.release(opened)


def test_a_lock_that_is_free_can_be_broken_and_given_back(composer: Composer) -> None:
    for force in (False, True):
        composer.unlock("vm", force=force)
    composer.close("vm")
    assert composer.lock_of(composer.find("vm")) is None


def test_a_crash_keeps_the_lock_and_the_same_node_goes_on(world: World, composer: Composer) -> None:
    composer.open(composer.find("vm")).write(0, pattern(2))
    composer.abandon()
    with pytest.raises(LockHeld):
        world.composer(host="two").snapshot("vm", "new")
    again = world.recovered()
    assert content_of(again, "vm") == pattern(2) + CONTENT[SECTOR_BYTES:]
    assert again.lock_of(again.find("vm")) is None


def test_a_volume_that_is_removed_while_it_is_to_be_recovered_is_just_gone(
    world: World, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer.open(composer.find("vm")).write(0, pattern(2))
    composer.abandon()
    again = world.composer()
    is_hidden = again.is_hidden

    def remove_it_first(mapper: Mapper, record: VolumeRecord) -> bool:
        monkeypatch.undo()
        again.remove("vm")
        return is_hidden(mapper, record)

    monkeypatch.setattr(again, "is_hidden", remove_it_first)
    with capture_logs() as logged:
        again.recover()
    assert not [entry for entry in logged if entry["log_level"] == "error"]
    assert [found.record.name for found in again.volumes()] == ["snap"]
    assert world.check() == []


# A store that fails


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("error", [StoreFull, StoreError])
@pytest.mark.parametrize("operation", ["snapshot", "clone", "resize", "rollback", "rename", "remove", "create"])
def test_a_store_that_fails_once_loses_nothing(
    tmp_path: Path, operation: str, error: type[StoreError], moment: Moment
) -> None:
    """At any call: the same process goes on with what it had, and so does the next one."""
    operations: dict[str, Callable[[Composer], object]] = {
        "snapshot": lambda composer: composer.snapshot("vm", "new"),
        "clone": lambda composer: composer.clone("vm", "new"),
        "resize": lambda composer: composer.resize(composer.find("vm"), 6 * SECTOR_BYTES),
        "rollback": lambda composer: composer.rollback("vm", "snap"),
        "rename": lambda composer: composer.rename("vm", "vm2"),
        "remove": lambda composer: composer.remove("snap"),
        "create": lambda composer: composer.create("new", SIZE),
    }
    failed, number = True, 0
    while failed:
        number += 1
        world = World(tmp_path / str(number))
        setting_up = world.composer()
        setting_up.create("vm", SIZE)
        setting_up.snapshot("vm", "snap")
        fill(setting_up, "vm", CONTENT)
        blocker = world.mortal()
        composer = world.composer(blocker)
        opened = composer.open(composer.find("vm")) if operation in ("snapshot", "clone", "resize") else None
        last = blocker.calls + number
        blocker.arm_error(number, error, moment)
        try:
            operations[operation](composer)
            failed = blocker.calls >= last
        except StoreError:
            pass
        blocker.disarm()
        name = (
            "vm"
            if operation != "rename"
            else next(name for name in ("vm", "vm2") if composer.mapper().find(name) is not None)
        )
        if opened is not None:
            try:
                opened.write(0, pattern(2))
                opened.flush()
                fresh = pattern(2)
            except StoreError:
                fresh = None  # its flush failed before: it takes no more writes
            try:
                composer.release(opened)
            except StoreError:
                composer.abandon()
            content = content_of(world.recovered(), name)
            assert content[SECTOR_BYTES:SIZE] == CONTENT[SECTOR_BYTES:]
            assert content[:SECTOR_BYTES] == fresh or fresh is None
        else:
            content = content_of(composer, name)
            assert content in (CONTENT, bytes(SIZE))
            assert content == CONTENT or operation == "rollback"
            content_of(world.recovered(), name)
        world.recovered()
        assert errors_of(world) == []


def test_a_damaged_record_harms_only_its_own_volume(world: World, composer: Composer) -> None:
    """Not the start of a node, and not the others; and nothing is swept that might be needed."""
    composer.create("good", SIZE)
    fill(composer, "good", CONTENT)
    composer.close_all()
    key = f"volume/{composer.find('vm').record.id}"
    record = world.store.get_record(key)
    assert record is not None
    layers = sorted(world.store.list_data("layer"))
    world.store.put_record(key, b"nonsense", record.version)
    again = world.recovered()
    assert content_of(again, "good") == CONTENT
    assert content_of(again, "snap") == CONTENT
    with pytest.raises(ObjectDamaged, match=f"record {key} is damaged"):
        again.open(again.find("vm"))
    again.remove("good")
    again.reclaim()
    world.store.put_record(key, record.value, again.mapper().blocker.get_record(key).version)  # type: ignore[union-attr]
    assert set(layers) >= set(world.store.list_data("layer"))
    assert content_of(world.recovered(), "vm") == CONTENT


def test_a_damaged_bitmap_is_an_error_of_that_volume(world: World, composer: Composer) -> None:
    layer = composer.find("vm").record.layer
    data = world.store.open_data(f"bitmap/{layer}", writable=True)
    data.pwrite(0, b"\xff" * 16)
    with pytest.raises(ObjectDamaged):
        composer.open(composer.find("vm"))
    assert composer.lock_of(composer.find("vm")) is None
    assert content_of(composer, "snap") == CONTENT


# Many at once


def test_removing_takes_only_the_volume_that_had_the_name(world: World, composer: Composer) -> None:
    """It is renamed, and another takes its name, between the look at the name and the lock."""
    composer.close_all()
    for calls in range(12):
        other = World(world.directory / str(calls))
        setting_up = other.composer()
        setting_up.create("vm", SIZE)
        fill(setting_up, "vm", CONTENT)
        blocker = SteppedBlocker(other.store)
        both = other.composer(blocker)
        removal, renaming, _ = Schedule(calls, NEVER).run(
            blocker, partial(both.remove, "vm"), partial(both.rename, "vm", "kept")
        )
        names = {str(found.record.name) for found in both.volumes()}
        assert names == ({"kept"} if renaming.succeeded else set())
        assert removal.succeeded != renaming.succeeded
        if renaming.succeeded:
            assert content_of(both, "kept") == CONTENT
            assert isinstance(removal.error, NotFound)


def test_of_two_renames_onto_one_name_both_are_done_in_some_order(tmp_path: Path) -> None:
    for calls in range(40):
        world = World(tmp_path / str(calls))
        setting_up = world.composer()
        for name in ("a", "b", "x"):
            setting_up.create(name, SIZE)
        fill(setting_up, "a", CONTENT)
        fill(setting_up, "b", CONTENT)
        blocker = SteppedBlocker(world.store)
        both = world.composer(blocker)
        one, two, whole = Schedule(calls, NEVER).run(
            blocker,
            partial(both.rename, "a", "x", replace=True),
            partial(both.rename, "b", "x", replace=True),
        )
        assert [one.error, two.error] == [None, None]
        assert [str(found.record.name) for found in both.volumes()] == ["x"]
        assert content_of(both, "x") == CONTENT
        both.reclaim()
        both.mapper().forget_stray_locks()
        assert world.problems() == []
        if whole:
            break


class Crowd:
    """Threads that do what they like with the same few names."""

    NAMES = ("a", "b", "c", "d")

    def __init__(self, composer: Composer, seconds: float) -> None:
        self.composer = composer
        self.deadline = time.monotonic() + seconds
        self.surprises: list[BaseException] = []
        self.done = 0
        self.threads = [threading.Thread(target=self.run, args=(seed,), daemon=True) for seed in range(6)]

    def run(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.deadline:
            action = draw.choice(
                (self.create, self.use, self.use, self.snapshot, self.rename, self.remove, self.clone, self.resize,
                 self.roll_back, self.reclaim, self.look)
            )  # fmt: skip
            try:
                action(draw)
                self.done += 1
            except (NotFound, AlreadyExists, Busy, InvalidInput, ReadOnlyVolume):
                continue
            except BaseException as error:
                self.surprises.append(error)
                return

    def name(self, draw: random.Random) -> str:
        return draw.choice(self.NAMES)

    def create(self, draw: random.Random) -> None:
        self.composer.create(self.name(draw), SIZE)

    def use(self, draw: random.Random) -> None:
        """Each sector holds one byte value: whoever finds two in one has found a torn one."""
        with self.composer.using(self.composer.find(self.name(draw))) as opened:
            for _ in range(3):
                place = draw.randrange(4) * SECTOR_BYTES
                if opened.record.writable:
                    opened.write(place, bytes([draw.randrange(256)]) * SECTOR_BYTES)
                data = opened.read(place, SECTOR_BYTES)
                assert len(set(data)) <= 1
            opened.flush()

    def snapshot(self, draw: random.Random) -> None:
        self.composer.snapshot(self.name(draw), self.name(draw))

    def clone(self, draw: random.Random) -> None:
        self.composer.clone(self.name(draw), self.name(draw))

    def rename(self, draw: random.Random) -> None:
        self.composer.rename(self.name(draw), self.name(draw), replace=draw.random() < 0.5)

    def remove(self, draw: random.Random) -> None:
        self.composer.remove(self.name(draw), even_if_open=draw.random() < 0.5)

    def resize(self, draw: random.Random) -> None:
        self.composer.resize(self.composer.find(self.name(draw)), draw.choice((SIZE, SIZE * 2)))

    def roll_back(self, draw: random.Random) -> None:
        kept = self.composer.rollback(self.name(draw), self.name(draw)).kept
        self.composer.remove(str(kept.name))

    def reclaim(self, draw: random.Random) -> None:
        self.composer.reclaim()

    def look(self, draw: random.Random) -> None:
        for found in self.composer.volumes():
            self.composer.lock_of(found)
        self.composer.verify_leases()

    def finish(self) -> None:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads), "they wait for each other"
        if self.surprises:
            raise self.surprises[0]


@pytest.mark.timeout(120)
def test_a_crowd_comes_to_an_end_and_leaves_a_whole_store(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes_module, "CLOSING_SECONDS", 0.02)
    composer = world.composer()
    crowd = Crowd(composer, seconds=4)
    crowd.finish()
    assert crowd.done > 50
    assert composer.open_volumes() == []
    assert errors_of(world) == []
    for name in see(composer):
        assert composer.lock_of(composer.find(name)) is None
    composer.close_all()
    world.recovered()
    assert world.problems() == []


def test_the_record_of_a_volume_is_not_lost_to_attributes_set_at_the_same_time(composer: Composer) -> None:
    """A thread snapshots, others set modes: every snapshot's layer stays in the chain."""
    with composer.using(composer.find("vm")) as opened:
        stop = threading.Event()

        def set_modes() -> None:
            mode = 0
            while not stop.is_set():
                mode = (mode + 1) % 0o777

                def edit(record: VolumeRecord, mode: int = mode) -> VolumeRecord:
                    return msgspec.structs.replace(record, mode=mode)

                composer.set_attributes(opened.id, edit)

        threads = [threading.Thread(target=set_modes) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(20):
            opened.write(0, pattern(number))
            composer.snapshot("vm", f"vm@{number}")
        stop.set()
        for thread in threads:
            thread.join()
    for number in range(20):
        assert content_of(composer, f"vm@{number}") == pattern(number) + CONTENT[SECTOR_BYTES:]


# Endpoints that call engines past us


class User:
    """Notes what it is told, and looks whether that is so."""

    def __init__(self) -> None:
        self.serving: dict[VolumeId, EngineVolume] = {}
        self.told = 0

    def engine_opened(self, volume: VolumeId, engine: EngineVolume, size_max: int) -> None:
        assert volume not in self.serving
        assert engine.size <= size_max
        self.serving[volume] = engine
        self.told += 1

    def engine_closing(self, volume: VolumeId) -> None:
        assert self.serving.pop(volume).address()  # raises, once it is closed


def test_an_engine_is_announced_before_it_is_used_and_withdrawn_before_it_is_closed(composer: Composer) -> None:
    user = User()
    composer.add_engine_user(user)
    with composer.using(composer.find("vm")) as opened:
        assert list(user.serving) == [opened.id]
        # What C code writes past us counts as any other write.
        user.serving[opened.id].write(opened.size, b"grown")
        assert composer.find("vm").record.size == opened.size
    assert user.serving == {}
    composer.snapshot("vm", "later")
    with composer.using(composer.find("snap")) as opened:
        assert list(user.serving) == [opened.id]
    composer.rollback("vm", "snap")
    assert user.serving == {}
    # Also a rollback leaves it the engine that it was opened with.
    assert user.told == 4
    composer.open(composer.find("vm"))
    composer.close_all()
    assert user.serving == {}
