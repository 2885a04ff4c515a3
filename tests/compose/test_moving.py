"""Moving volumes and snapshots between backends: in use or not, and cut short at any call."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from archipfs.blockers.contract import Blocker
from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment
from archipfs.compose import copy
from archipfs.compose.composer import Composer, Moved
from archipfs.compose.replicas import Copier, PassedOver
from archipfs.compose.sealing import unheeded
from archipfs.compose.volume import OpenVolume
from archipfs.errors import Busy, Conflict, Fenced, InvalidInput, LockHeld, NotFound, StoreError, StoreUnavailable
from archipfs.map.mapper import Mapper
from archipfs.map.records import Hold, Kind, Replica, VolumeRecord
from archipfs.types import REGION_BYTES, SECTOR_BYTES, LayerId, VolumeId
from tests.compose.world import Seen, TwoStores, content_of, crashing, fill, pattern, see

SIZE = 8 * SECTOR_BYTES
OLD = pattern(1, 8)
NEW = OLD[: 2 * SECTOR_BYTES] + pattern(2, 3) + OLD[5 * SECTOR_BYTES :]


@pytest.fixture
def world(tmp_path: Path) -> TwoStores:
    return TwoStores(tmp_path / "nodes")


@pytest.fixture
def composer(world: TwoStores) -> Iterator[Composer]:
    composer = world.composer()
    yield composer
    composer.close_all()
    composer.reclaim()
    assert world.problems() == []


def make(composer: Composer) -> None:
    """A volume, two snapshots of which it has one below it, and a clone."""
    composer.create("vm", SIZE, backend="a")
    fill(composer, "vm", pattern(3, 8))
    composer.snapshot("vm", "vm@1")
    composer.seal("vm@1")
    fill(composer, "vm", OLD)
    composer.snapshot("vm", "vm@2")
    composer.clone("vm@1", "clone")
    fill(composer, "vm", NEW[: 5 * SECTOR_BYTES])


def move(composer: Composer, name: str, origin: str = "a", target: str = "b") -> Moved:
    return composer.move(name, origin=origin, target=target, progress=unheeded)


def where(composer: Composer) -> dict[str, str]:
    return {str(each.record.name): each.mapper.backend for each in composer.volumes()}


@pytest.mark.parametrize("name", ["vm", "vm@1", "vm@2", "clone"])
def test_what_was_moved_is_the_same_elsewhere(world: TwoStores, composer: Composer, name: str) -> None:
    make(composer)
    before, record = see(composer), composer.find(name).record
    moved = move(composer, name)
    assert where(composer) == {each: "b" if each == name else "a" for each in before}
    assert (moved.record.id, moved.record.created_ns, moved.record.origin) == (
        record.id,
        record.created_ns,
        record.origin,
    )
    assert see(composer) == before
    assert see(world.composer(only="b")) == {name: before[name]}
    assert name not in see(world.composer(only="a"))


def test_there_and_back(world: TwoStores, composer: Composer) -> None:
    make(composer)
    before = see(composer)
    for origin, target in (("a", "b"), ("b", "a"), ("a", "b")):
        for name in before:
            move(composer, name, origin, target)
        assert set(where(composer).values()) == {target}
        assert see(composer) == before
    composer.reclaim()
    assert see(world.composer(only="a")) == {}
    assert list(world.stores["a"].list_data("layer")) == []


def test_moving_again_says_that_it_is_there(composer: Composer) -> None:
    make(composer)
    assert not move(composer, "vm").was_there
    assert move(composer, "vm").was_there


def test_a_volume_in_use_goes_on_being_used(world: TwoStores, composer: Composer) -> None:
    make(composer)
    with composer.using(composer.find("vm")) as opened:
        opened.write(0, pattern(7))
        generation = opened.generation
        move(composer, "vm")
        assert (opened.mapper.backend, opened.generation) == ("b", generation)
        expected = pattern(7) + NEW[SECTOR_BYTES:]
        assert opened.read(0, opened.size) == expected
        opened.write(SECTOR_BYTES, pattern(8))
        opened.flush()
        expected = pattern(7) + pattern(8) + NEW[2 * SECTOR_BYTES :]
        composer.snapshot("vm", "vm@3")
        assert composer.find("vm@3").mapper.backend == "b"
        composer.resize(composer.find("vm"), 2 * SIZE)
    assert content_of(composer, "vm") == expected + bytes(SIZE)
    assert see(world.composer(only="b"))["vm@3"].content == expected


def test_nothing_is_lost_of_what_is_written_meanwhile(world: TwoStores, composer: Composer) -> None:
    """A writer counts up in every sector in turn, while the volume goes to and fro."""
    composer.create("vm", 2 * REGION_BYTES, backend="a")
    written = 0
    ended = threading.Event()
    with composer.using(composer.find("vm")) as opened:

        def write() -> None:
            nonlocal written
            while not ended.is_set():
                opened.write(written % 512 * SECTOR_BYTES, (written + 1).to_bytes(8, "little") * (SECTOR_BYTES // 8))
                written += 1
                if written % 97 == 0:
                    opened.flush()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for origin, target in (("a", "b"), ("b", "a"), ("a", "b")):
                move(composer, "vm", origin, target)
        finally:
            ended.set()
            writer.join()
        assert written > 512
        for sector in range(512):
            newest = (written - 1 - sector) // 512 * 512 + sector
            found = opened.read(sector * SECTOR_BYTES, SECTOR_BYTES)
            assert found == (newest + 1).to_bytes(8, "little") * (SECTOR_BYTES // 8), sector


def test_a_daemon_that_is_killed_afterwards_goes_on_in_the_other_backend(world: TwoStores) -> None:
    dying = world.composer()
    make(dying)
    opened = dying.open(dying.find("vm"))
    volume, generation = opened.id, opened.generation
    move(dying, "vm")
    opened.write(0, pattern(9))
    dying.abandon()
    after = world.composer()
    after.await_reopening([volume])
    again = after.reopen(volume, generation)
    after.recover()
    assert (again.mapper.backend, again.fenced) == ("b", False)
    assert again.read(0, SECTOR_BYTES) == pattern(9)
    after.close_all()


def test_a_lock_that_somebody_asked_for_comes_along(composer: Composer) -> None:
    make(composer)
    composer.lock("vm")
    move(composer, "vm")
    lock = composer.lock_of(composer.find("vm"))
    assert lock is not None
    assert lock.holds == (Hold.LOCKED,)


def test_a_replica_takes_over(world: TwoStores, composer: Composer) -> None:
    """What a sync has copied is not copied again."""
    make(composer)
    composer.sync("a", "b", progress=unheeded)
    assert move(composer, "vm").added_bytes == 0
    assert where(composer)["vm"] == "b"
    before = see(composer)
    assert composer.sync("a", "b", progress=unheeded).passed_over == []
    assert see(composer) == before


def test_refusals(world: TwoStores, composer: Composer) -> None:
    make(composer)
    with composer.using(composer.find("vm@1")), pytest.raises(Busy, match="vm@1 is open; close it before you move it"):
        move(composer, "vm@1")
    assert move(composer, "clone", "b", "a").was_there
    with pytest.raises(NotFound, match="no volume is called other"):
        move(composer, "other")
    with pytest.raises(InvalidInput, match="give two backends"):
        move(composer, "vm", "a", "a")
    other = world.composer(host="two")
    with other.using(other.find("vm")), pytest.raises(LockHeld, match="locked by two"):
        move(composer, "vm")
    other.close_all()
    fill(other, "vm", pattern(3))
    assert where(composer)["vm"] == "a"


def test_a_lock_that_was_broken_meanwhile_keeps_it_where_it_is(world: TwoStores, composer: Composer) -> None:
    """What the new owner writes must not be left behind."""
    make(composer)
    other = world.composer(host="two")

    def take_over(done: int, total: int) -> None:
        if not taken:
            taken.append(other)
            other.unlock("vm", force=True)
            fill(other, "vm", pattern(9))

    taken: list[Composer] = []
    opened = composer.open(composer.find("vm"))
    with pytest.raises((Fenced, LockHeld)):
        composer.move("vm", origin="a", target="b", progress=take_over)
    with pytest.raises(Fenced):
        composer.release(opened)
    assert where(composer)["vm"] == "a"
    assert content_of(composer, "vm")[:SECTOR_BYTES] == pattern(9)
    move(composer, "vm")
    assert content_of(composer, "vm")[:SECTOR_BYTES] == pattern(9)
    other.recover()  # the head that it has made is its own to take away


def test_who_has_another_head_by_now_is_not_moved(world: TwoStores, composer: Composer) -> None:
    make(composer)
    mapper, found = composer.mapper("a"), composer.find("vm")
    with composer.using(found) as opened:
        opened.freeze()
    with pytest.raises(Fenced, match="it is not moved"):
        mapper.leave(found.record.id, found.record.layer, composer.mapper("b").store.id)
    assert where(composer)["vm"] == "a"


def test_another_volume_in_the_way(world: TwoStores, composer: Composer) -> None:
    make(composer)
    only_b = world.composer(only="b")
    only_b.create("vm", SECTOR_BYTES)
    with pytest.raises(PassedOver, match="another volume called vm"):
        move(composer, "vm")
    assert where(composer)["vm"] == "a"
    assert content_of(composer, "vm") == NEW


def records_of(store: Blocker) -> set[str]:
    return {key for key, _ in store.list_records("volume")}


CASES = {"a closed volume": ("vm", False), "an open volume": ("vm", True), "a snapshot": ("vm@2", False)}


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("moment", [Moment.AFTER, Moment.TORN], ids=lambda moment: moment.value)
@pytest.mark.parametrize("case", CASES)
def test_a_crash_leaves_it_whole_in_the_one_or_in_the_other(
    tmp_path: Path, case: str, moment: Moment, side: str
) -> None:
    name, is_open = CASES[case]
    places = set()
    for number in itertools.count(1):
        world = TwoStores(tmp_path / str(number))
        composer = world.composer()
        small(composer)
        composer.close_all()
        before = see(composer)
        composer.close_all()
        blocker = world.mortal(side, FaultPlan(number, crash_at=number, moment=moment))
        dying = world.composer({side: blocker})
        volume, generation = VolumeId(""), 0
        with crashing(dying):
            if is_open:
                opened = dying.open(dying.find(name))
                volume, generation = opened.id, opened.generation
            move(dying, name)
        crashed = blocker.crashed
        blocker.crash()
        dying.abandon()
        blocker.bury()
        after = world.composer()
        if generation:
            after.await_reopening([volume])
            again = after.reopen(volume, generation)
            assert not again.fenced, number
            assert again.read(0, again.size) == before[name].content, number
            again.write(0, pattern(9))
            after.recover()
            after.release(again)
            expected = {**before, name: changed(before[name])}
        else:
            after.recover()
            expected = before
        assert world.problems() == [], number
        assert see(after) == expected, number
        places.add(where(after)[name])
        if where(after)[name] == "a":
            move(after, name)
        assert see(after) == expected, number
        assert where(after)[name] == "b"
        after.close_all()
        after.reclaim()
        assert world.problems() == [], number
        assert see(world.composer(only="b"))[name] == expected[name]
        assert len(records_of(world.stores["a"])) == len(before) - 1, number
        if not crashed:
            break
    assert "b" in places


def small(composer: Composer) -> None:
    composer.create("vm", SIZE, backend="a")
    fill(composer, "vm", OLD)
    composer.snapshot("vm", "vm@2")
    fill(composer, "vm", NEW[: 5 * SECTOR_BYTES])


def changed(seen: Seen) -> Seen:
    return Seen(seen.kind, seen.mode, pattern(9) + seen.content[SECTOR_BYTES:])


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("moment", [Moment.AFTER, Moment.TORN], ids=lambda moment: moment.value)
def test_an_error_of_a_store_leaves_an_open_volume_whole(tmp_path: Path, moment: Moment, side: str) -> None:
    """It goes on being used, or takes no more writes; the next move brings it there."""
    for number in itertools.count(1):
        world = TwoStores(tmp_path / str(number))
        composer = world.composer()
        small(composer)
        composer.close_all()
        plan = FaultPlan(number, error_at=number, error=StoreError, moment=moment)
        failing = FaultBlocker(world.stores[side], plan)
        trying = world.composer({side: failing})
        done = False
        try:
            opened = trying.open(trying.find("vm"))
        except StoreError:
            continue
        try:
            move(trying, "vm")
            done = True
        except (StoreError, PassedOver):
            pass
        content = NEW
        try:
            opened.write(0, pattern(9))
            opened.flush()
            content = pattern(9) + NEW[SECTOR_BYTES:]
        except Fenced:
            raise
        except StoreError:
            pass
        try:
            trying.release(opened)
        except StoreError:
            trying.abandon()
        after = world.composer()
        after.recover()
        assert content_of(after, "vm")[SECTOR_BYTES:] == content[SECTOR_BYTES:], number
        if content is not NEW:
            assert content_of(after, "vm") == content, number
        move(after, "vm")
        assert where(after)["vm"] == "b"
        after.close_all()
        after.reclaim()
        assert world.problems() == [], number
        if done and failing.calls < number:
            break


def test_another_node_finds_it_where_it_is(world: TwoStores, composer: Composer) -> None:
    make(composer)
    other = world.composer(host="two")
    before = see(other)
    move(composer, "vm")
    assert see(other) == before
    assert where(other)["vm"] == "b"
    other.close_all()


def unsettled(composer: Composer, name: str) -> None:
    """Have it moved, but for the last step, as a crash or an error of a store leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composer, "_settle", lambda copier, original: None)
        move(composer, name)


@pytest.mark.parametrize("name", ["vm", "vm@2"])
def test_a_sync_does_not_take_what_has_just_moved_for_a_replica(
    world: TwoStores, composer: Composer, name: str
) -> None:
    make(composer)
    before = see(composer)
    unsettled(composer, name)
    assert composer.sync("a", "b", progress=unheeded, delete=True).removed == []
    assert see(composer) == before
    composer.recover()
    assert see(composer) == before
    assert where(composer)[name] == "b"


def test_nor_where_another_sync_has_just_called_it_one(composer: Composer) -> None:
    """One that had found it arriving, and wrote its record when it had moved."""
    make(composer)
    before, volume = see(composer), composer.find("vm@2").record.id
    unsettled(composer, "vm@2")
    only_a = Replica(composer.mapper("a").store.id)
    composer.mapper("b").change(volume, lambda record: msgspec.structs.replace(record, replica_of=only_a))
    assert composer.sync("a", "b", progress=unheeded, delete=True).removed == []
    composer.recover()
    assert see(composer) == before
    assert where(composer)["vm@2"] == "b"


def test_who_reads_it_on_another_node_does_not_go_on_with_what_was_left(world: TwoStores, composer: Composer) -> None:
    make(composer)
    other = world.composer(host="two")
    with composer.using(composer.find("vm")) as opened, other.using(other.find("vm")) as reader:
        opened.flush()
        assert reader.read(0, SECTOR_BYTES) == NEW[:SECTOR_BYTES]
        unsettled(composer, "vm")
        opened.write(0, pattern(9))
        opened.flush()
        with pytest.raises(NotFound, match="moved to another backend; open it again"):
            reader.read(0, SECTOR_BYTES)
    with composer.using(composer.find("vm")), other.using(other.find("vm")) as reader:
        assert reader.read(0, SECTOR_BYTES) == pattern(9)
    composer.recover()


def test_what_it_is_made_on_there_may_be_removed_meanwhile(world: TwoStores, composer: Composer) -> None:
    """By a node whose reclaim has looked for users of that layer before the volume became one."""
    make(composer)
    composer.remove("clone")
    composer.sync("a", "b", progress=unheeded)
    replicate, put_arriving = composer._replicate, composer.put_arriving
    only_b = world.composer(only="b", host="two")

    def replicate_and_roll_back(copier: Copier, record: VolumeRecord) -> bool:
        changed = replicate(copier, record)
        composer.rollback("vm", "vm@1")
        return changed

    def remove_and_put(copier: Copier, head: LayerId, wanted: VolumeRecord) -> VolumeRecord:
        only_b.remove("vm@1")
        return put_arriving(copier, head, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composer, "_replicate", replicate_and_roll_back)
        patch.setattr(composer, "put_arriving", remove_and_put)
        with pytest.raises(Conflict, match="has just been removed"):
            move(composer, "vm")
    assert where(composer)["vm"] == "a"
    assert content_of(composer, "vm") == pattern(3, 8)
    move(composer, "vm")
    assert content_of(composer, "vm") == pattern(3, 8)


@pytest.mark.parametrize("when", ["before it has moved", "just afterwards"])
def test_a_recovery_beside_it_leaves_lock_and_live_bitmap_alone(world: TwoStores, when: str) -> None:
    """As one that begins because a third backend is back."""
    composer = world.composer()
    make(composer)
    opened = composer.open(composer.find("vm"))
    leave, is_hidden = composer._leave, composer.is_hidden
    recovering = threading.Thread(target=composer.recover)
    found_hidden, has_moved = threading.Event(), threading.Event()

    def recover_and_leave(copier: Copier, volume: VolumeRecord) -> VolumeRecord:
        recovering.start()
        if when == "before it has moved":
            recovering.join()
        else:
            assert found_hidden.wait(60)
        return leave(copier, volume)

    def look_early(mapper: Mapper, record: VolumeRecord) -> bool:
        hidden = is_hidden(mapper, record)
        if when == "just afterwards" and hidden and threading.current_thread() is recovering and record.name == "vm":
            found_hidden.set()
            assert has_moved.wait(60)
        return hidden

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composer, "_leave", recover_and_leave)
        patch.setattr(composer, "is_hidden", look_early)
        move(composer, "vm")
        has_moved.set()
        recovering.join()
    lock = composer.mapper("b").locks.holder(opened.id)
    assert lock is not None
    assert Hold.IO in lock.holds
    opened.write(0, pattern(9))
    composer.abandon()
    after = world.composer()
    after.recover()
    assert content_of(after, "vm") == pattern(9) + NEW[SECTOR_BYTES:]
    after.close_all()
    after.reclaim()
    assert world.problems() == []


@pytest.mark.parametrize("moved", ["vm", "copy"])
def test_a_copy_that_begins_just_before_it_is_made(composer: Composer, moved: str) -> None:
    """As a clone it could not be, for the layers of the two lie in different backends by then."""
    make(composer)
    composer.sync("a", "b", progress=unheeded)
    composer.create("copy", 0, backend="a")
    both_controlled = copy._both_controlled

    @contextmanager
    def move_first(one: OpenVolume, other: OpenVolume) -> Iterator[None]:
        move(composer, moved)
        with both_controlled(one, other):
            yield

    with (
        composer.using(composer.find("vm")) as source,
        composer.using(composer.find("copy")) as target,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(copy, "_both_controlled", move_first)
        assert composer.copy_range(source, 0, target, 0, SIZE) == SIZE
        assert target.read(0, SIZE) == NEW
    assert where(composer)[moved] == "b"


def test_what_was_removed_while_in_use_is_not_moved(composer: Composer) -> None:
    make(composer)
    replicate = composer._replicate

    def replicate_and_remove(copier: Copier, record: VolumeRecord) -> bool:
        changed = replicate(copier, record)
        composer.remove("vm", even_if_open=True)
        return changed

    with composer.using(composer.find("vm")) as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(composer, "_replicate", replicate_and_remove)
        with pytest.raises(NotFound, match="removed"):
            move(composer, "vm")
        assert opened.read(0, opened.size) == NEW
    assert "vm" not in where(composer)


def test_while_a_backend_is_away_a_moved_volume_keeps_what_only_memory_has_of_it(world: TwoStores) -> None:
    """A daemon that was killed before the move was settled; the backend that it came from does not answer the next."""
    composer = world.composer()
    make(composer)
    opened = composer.open(composer.find("vm"))
    unsettled(composer, "vm")
    opened.write(0, pattern(9))
    composer.abandon()
    after = world.composer()
    mapper, sealed = after.drop_backend("a")
    after.away = {"a": StoreUnavailable("backend a is away")}
    after.recover()
    after.add_backend(mapper, sealed)
    after.recover()
    assert content_of(after, "vm") == pattern(9) + NEW[SECTOR_BYTES:]
    after.close_all()
    after.reclaim()
    assert world.problems() == []


def test_the_record_that_was_left_says_where_it_went(world: TwoStores) -> None:
    """A node that has only the first backend does not purge what it cannot see to have arrived."""
    composer = world.composer()
    make(composer)
    mapper = composer.mapper("a")
    record = composer.find("vm").record
    mapper.leave(record.id, record.layer, composer.mapper("b").store.id)
    alone = world.composer(only="a")
    alone.recover()
    found = mapper.catalog.get(VolumeRecord, record.id)
    assert found is not None
    assert found.record.kind is Kind.VOLUME
