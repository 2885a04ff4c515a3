"""The process is killed and its successor goes on for the same clients: requests come again, open volumes stay open."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from archipfs.blockers.fault import FaultPlan, Moment
from archipfs.compose.composer import Backends, Composer
from archipfs.compose.engine import EngineVolume
from archipfs.compose.layers import LiveBitmaps
from archipfs.errors import AlreadyExists, Busy, Fenced, LockHeld, NotFound, StoreUnavailable
from archipfs.types import SECTOR_BYTES, RequestId, VolumeId
from tests.compose.world import BACKEND, World, content_of, crashing, fill, pattern, see

SIZE = 4 * SECTOR_BYTES
CONTENT = pattern(1, 4)
LATER = pattern(2, 4)
REQUEST = RequestId("session:42")
OTHER_REQUEST = RequestId("session:44")

OPERATIONS: dict[str, Callable[[Composer, RequestId], object]] = {
    "create": lambda composer, request: composer.create("new", SIZE, request=request),
    "snapshot": lambda composer, request: composer.snapshot("vm", "new", request=request),
    "snapshot of a snapshot": lambda composer, request: composer.snapshot("snap", "new", request=request),
    "clone": lambda composer, request: composer.clone("vm", "new", request=request),
    "clone of a snapshot": lambda composer, request: composer.clone("snap", "new", request=request),
    "rename": lambda composer, request: composer.rename("vm", "new", request=request),
    "rename onto another": lambda composer, request: composer.rename("vm", "other", replace=True, request=request),
    "rollback": lambda composer, request: composer.rollback("vm", "snap", request=request),
}


def set_up(world: World) -> None:
    composer = world.composer()
    composer.create("vm", SIZE)
    fill(composer, "vm", CONTENT)
    composer.snapshot("vm", "snap")
    fill(composer, "vm", LATER)
    composer.create("other", SIZE)
    composer.close_all()


def without_kept(composer: Composer) -> dict[str, object]:
    """What is seen, but for what rollbacks have kept: one that is cut short leaves one more of those."""
    return {name: seen for name, seen in see(composer).items() if "@before-rollback" not in name}


@pytest.mark.parametrize("moment", list(Moment))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_request_that_comes_again_after_a_crash_is_done_once(tmp_path: Path, operation: str, moment: Moment) -> None:
    """Whichever call to the store the crash came before, after, or in the middle of."""
    carry_out = OPERATIONS[operation]
    plain = World(tmp_path / "plain")
    set_up(plain)
    carry_out(plain.composer(), REQUEST)
    wanted = without_kept(plain.recovered())
    for crash_at in itertools.count(1):
        world = World(tmp_path / str(crash_at))
        set_up(world)
        blocker = world.mortal(FaultPlan(crash_at=crash_at, moment=moment))
        composer = world.composer(blocker)
        with crashing(composer):
            carry_out(composer, REQUEST)
        if not blocker.crashed:
            break
        blocker.bury()
        successor = world.composer(blocker.next_process())
        carry_out(successor, REQUEST)
        successor.recover()
        assert without_kept(successor) == wanted, f"crash at call {crash_at}"
        assert world.problems() == []
    assert crash_at > 2, "nothing was tried"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_request_is_recognised_only_by_its_own_id(world: World, operation: str) -> None:
    set_up(world)
    composer = world.composer()
    carry_out = OPERATIONS[operation]
    carry_out(composer, REQUEST)
    before = see(composer)
    carry_out(composer, REQUEST)
    assert see(composer) == before
    if operation == "rollback":
        carry_out(composer, OTHER_REQUEST)
        assert len(see(composer)) == len(before) + 1, "a second rollback keeps what it leaves, as ever"
    else:
        with pytest.raises((AlreadyExists, NotFound)):
            carry_out(composer, OTHER_REQUEST)
        assert see(composer) == before


def test_an_open_volume_goes_on_where_it_was(world: World) -> None:
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("vm"))
    opened.write(0, pattern(3))
    generation = opened.generation
    first.abandon()
    second = world.composer()
    again = second.reopen(opened.id, generation)
    second.recover()
    assert again.read(0, SIZE) == pattern(3) + LATER[SECTOR_BYTES:]
    again.write(SECTOR_BYTES, pattern(4))
    again.flush()
    assert again.generation == generation
    second.release(again)
    assert second.lock_of(second.find("vm")) is None
    assert content_of(second, "vm")[: 2 * SECTOR_BYTES] == pattern(3) + pattern(4)


def test_a_removed_volume_lives_until_who_has_it_open_closes_it(world: World) -> None:
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("other"))
    opened.write(0, pattern(3))
    generation = opened.generation
    first.remove("other", even_if_open=True)
    first.abandon()
    second = world.composer()
    again = second.reopen(opened.id, generation)
    second.recover()
    assert again.read(0, SECTOR_BYTES) == pattern(3)
    again.write(0, pattern(4))
    again.flush()
    second.release(again)
    second.reclaim()
    assert world.check() == []
    with pytest.raises(NotFound):
        second.reopen(opened.id, generation)


def test_what_was_replaced_while_open_is_purged_when_it_is_closed(world: World) -> None:
    """The crash came after the rename that took its name, and before its record lost that name."""
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("other"))
    opened.write(0, pattern(3))
    generation = opened.generation
    found = first.find("vm")
    first.abandon()
    mapper = world.mapper()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapper, "_displace", lambda volume, name: None)
        mapper.rename(found.record.id, "other", replace=opened.id)
    second = world.composer()
    again = second.reopen(opened.id, generation)
    second.recover()
    assert content_of(second, "other") == LATER
    assert again.read(0, SECTOR_BYTES) == pattern(3)
    second.release(again)
    second.reclaim()
    assert world.problems() == []


def test_a_volume_that_cannot_be_opened_again_yet_is_not_purged(world: World) -> None:
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("other"))
    opened.write(0, pattern(3))
    generation = opened.generation
    first.remove("other", even_if_open=True)
    first.abandon()
    second = world.composer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(second.mapper().locks), "take", _refuse)
        with pytest.raises(StoreUnavailable):
            second.reopen(opened.id, generation)
    second.recover()
    again = second.reopen(opened.id, generation)
    assert again.read(0, SECTOR_BYTES) == pattern(3)
    second.release(again)


def _refuse(*arguments: object, **options: object) -> None:
    raise StoreUnavailable("not now")


@pytest.mark.parametrize("takes", [False, True], ids=["free", "taken"])
def test_a_lock_that_was_broken_meanwhile_fences_who_had_it(world: World, takes: bool) -> None:
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("vm"))
    generation = opened.generation
    first.abandon()
    other = world.composer(host="two")
    other.unlock("vm", force=True)
    if takes:
        fill(other, "vm", pattern(5))
    second = world.composer()
    again = second.reopen(opened.id, generation)
    second.recover()
    for act in (lambda: again.read(0, 1), lambda: again.write(0, b"x"), again.flush, lambda: again.resize(SIZE)):
        with pytest.raises(Fenced):
            act()
    second.release(again)
    assert content_of(second, "vm") == (pattern(5) + LATER[SECTOR_BYTES:] if takes else LATER)


def test_a_reader_stays_a_reader(world: World) -> None:
    """It had no lock; the owner's is none of its business."""
    set_up(world)
    owner = world.composer(host="two")
    held = owner.open(owner.find("vm"))
    first = world.composer()
    opened = first.open(first.find("vm"))
    assert opened.generation == 0
    first.abandon()
    second = world.composer()
    again = second.reopen(opened.id, 0)
    assert again.read(0, SIZE) == LATER
    with pytest.raises(LockHeld):
        again.write(0, b"x")
    second.release(again)
    owner.release(held)


def test_what_is_about_to_be_opened_again_counts_as_open(world: World) -> None:
    """Recovery and other people's requests may come before it: neither may take the volume from who has it open."""
    set_up(world)
    first = world.composer()
    opened = {name: first.open(first.find(name)) for name in ("vm", "other")}
    for volume in opened.values():
        volume.write(0, pattern(3))
    first.remove("other", even_if_open=True)
    generations = {volume.id: volume.generation for volume in opened.values()}
    first.abandon()
    second = world.composer()
    second.await_reopening(volume.id for volume in opened.values())
    second.recover()
    with pytest.raises(Busy):
        second.rollback("vm", "snap")
    with pytest.raises(Busy):
        second.remove("vm")
    for volume in opened.values():
        again = second.reopen(volume.id, generations[volume.id])
        assert again.read(0, SECTOR_BYTES) == pattern(3)
        again.write(0, pattern(4))
        again.flush()
        second.release(again)
    second.remove("vm")
    second.reclaim()
    assert world.problems() == []


def test_a_volume_removed_before_it_is_opened_again_stays_for_who_has_it_open(world: World) -> None:
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("other"))
    opened.write(0, pattern(3))
    generation = opened.generation
    first.abandon()
    second = world.composer()
    second.await_reopening([opened.id])
    second.remove("other", even_if_open=True)
    again = second.reopen(opened.id, generation)
    assert again.read(0, SECTOR_BYTES) == pattern(3)
    second.release(again)
    second.reclaim()
    assert world.problems() == []


def test_a_volume_used_and_closed_before_it_is_opened_again_is_not_fenced(world: World) -> None:
    """Its lock was given back in order, and nobody else had it since."""
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("vm"))
    generation = opened.generation
    first.abandon()
    second = world.composer()
    second.await_reopening([opened.id])
    second.snapshot("vm", "between")
    assert second.lock_of(second.find("vm")) is None
    again = second.reopen(opened.id, generation)
    again.write(0, pattern(4))
    again.flush()
    second.release(again)
    assert content_of(second, "vm")[:SECTOR_BYTES] == pattern(4)


def test_a_lock_that_another_node_had_and_gave_back_fences_who_had_it_before(world: World) -> None:
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("vm"))
    generation = opened.generation
    first.abandon()
    second = world.composer()
    second.await_reopening([opened.id])
    second.snapshot("vm", "between")
    fill(world.composer(host="two"), "vm", pattern(5))
    again = second.reopen(opened.id, generation)
    assert again.fenced
    with pytest.raises(Fenced):
        again.read(0, 1)
    second.release(again)


def test_a_rename_that_comes_again_leaves_alone_who_has_the_old_name_by_now(world: World) -> None:
    set_up(world)
    composer = world.composer()
    composer.rename("vm", "new", request=REQUEST)
    composer.create("vm", SIZE)
    composer.rename("vm", "new", replace=True, request=REQUEST)
    assert content_of(composer, "new") == LATER
    assert content_of(composer, "vm") == bytes(SIZE)


class _Counted:
    """An engine user that, as the front does, waits for those who are inside."""

    def __init__(self) -> None:
        self.inside: list[threading.Thread] = []
        self.left_behind = False

    def engine_opened(self, volume: VolumeId, engine: EngineVolume, size_max: int) -> None:
        pass

    def engine_closing(self, volume: VolumeId) -> None:
        for thread in self.inside:
            thread.join(60)
            self.left_behind |= thread.is_alive()


def test_a_fence_behind_a_closed_gate_lets_out_who_waits_there(world: World) -> None:
    set_up(world)
    first, other, user = world.composer(), world.composer(host="two"), _Counted()
    first.add_engine_user(user)
    opened = first.open(first.find("vm"))
    engine = opened.engine
    pause = engine.pause

    def pause_and_lose_the_lock() -> None:
        pause()
        user.inside.append(threading.Thread(target=engine.read, args=(0, 1)))
        user.inside[0].start()
        other.unlock("vm", force=True)
        other.snapshot("vm", "theirs")  # so that the volume has another head

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "pause", pause_and_lose_the_lock)
        with pytest.raises(Fenced):
            opened.resize(2 * SIZE)
    assert not user.left_behind
    with pytest.raises(Fenced):
        first.release(opened)


def test_a_lock_that_nobody_gave_back_is_given_back_by_the_next_process(world: World) -> None:
    """The crash came between the end of the live bitmap and that of the lock."""
    set_up(world)
    first = world.composer()
    opened = first.open(first.find("vm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opened.mapper.locks, "give_back", lambda *arguments, **options: None)
        first.release(opened)
    assert world.composer(host="two").lock_of(first.find("vm")) is not None
    second = world.recovered()
    assert second.lock_of(second.find("vm")) is None


def test_what_was_written_to_a_store_that_is_not_configured_just_now_is_kept(world: World, tmp_path: Path) -> None:
    set_up(world)
    first = world.composer()
    first.open(first.find("vm")).write(0, pattern(3))
    first.abandon()
    elsewhere = World(tmp_path / "elsewhere")
    mapper = elsewhere.mapper()
    live = LiveBitmaps(world.directory / "one")
    stores, close = elsewhere.sealed_stores(mapper)
    Composer(Backends({BACKEND: mapper}, stores, live, BACKEND)).recover()
    close()
    assert content_of(world.recovered(), "vm")[:SECTOR_BYTES] == pattern(3)


def test_live_bitmaps_of_the_version_before_are_believed(world: World) -> None:
    """It gave them the layer's name alone."""
    set_up(world)
    first = world.composer()
    first.open(first.find("vm")).write(0, pattern(3))
    first.abandon()
    [path] = (world.directory / "one").iterdir()
    path.rename(path.with_name(path.name.partition("-")[2]))
    assert content_of(world.recovered(), "vm")[:SECTOR_BYTES] == pattern(3)


def test_a_removal_that_comes_again_spares_the_volume_that_has_the_name_by_now(world: World) -> None:
    set_up(world)
    composer = world.composer()
    removed = composer.find("other").record.id
    composer.remove("other", only=removed)
    composer.create("other", SIZE)
    with pytest.raises(NotFound, match="another volume"):
        composer.remove("other", only=removed)
    assert "other" in see(composer)
