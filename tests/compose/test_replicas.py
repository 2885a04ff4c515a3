"""What is copied from one backend to another: all of it, once, and found again; and what the copies are to users."""

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment
from archipfs.compose.composer import Composer, Found, Synced
from archipfs.compose.sealing import unheeded
from archipfs.errors import InvalidInput, NotFound, StoreError, StoreUnavailable
from archipfs.map.mapper import FOREIGN_GRACE_NS, StoreOptions
from archipfs.map.records import Kind
from archipfs.types import REGION_BYTES, SECTOR_BYTES
from tests.compose.world import Seen, TwoStores, content_of, crashing, fill, pattern, see

SIZE = 2 * REGION_BYTES + 5 * SECTOR_BYTES


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


def noise(seed: int, sectors: int) -> bytes:
    return random.Random(seed).randbytes(sectors * SECTOR_BYTES)


def volume(composer: Composer, name: str, *pieces: tuple[int, bytes]) -> None:
    composer.create(name, SIZE, backend="a")
    write(composer, name, *pieces)


def write(composer: Composer, name: str, *pieces: tuple[int, bytes]) -> None:
    with composer.using(composer.find(name)) as opened:
        for sector, data in pieces:
            opened.write(sector * SECTOR_BYTES, data)


def sync(composer: Composer, origin: str = "a", target: str = "b") -> Synced:
    done = composer.sync(origin, target, progress=unheeded)
    composer.reclaim()
    return done


def family(composer: Composer) -> None:
    """A volume with two snapshots, one of them sealed, and a clone of the first."""
    volume(composer, "vm", (3, noise(1, 200)), (1500, noise(2, 30)))
    composer.snapshot("vm", "vm@1")
    write(composer, "vm", (10, noise(3, 20)), (1024, noise(4, 3)))
    composer.snapshot("vm", "vm@2")
    composer.clone("vm@1", "clone")
    write(composer, "clone", (0, noise(5, 2)))
    write(composer, "vm", (2000, noise(6, 7)))
    composer.seal("vm@1")


HASHES = {"the same hash": "blake3", "another hash": "sha256", "one that is not trusted": "xxh3-128"}


@pytest.mark.parametrize("options", HASHES.values(), ids=HASHES)
def test_all_that_the_origin_shows_is_in_the_target(tmp_path: Path, options: str) -> None:
    origin = "xxh3-128" if options == "xxh3-128" else "blake3"
    world = TwoStores(tmp_path / "nodes", StoreOptions(hash=origin), StoreOptions(hash=options))
    composer = world.composer()
    family(composer)
    before = see(composer)
    done = sync(composer)
    assert sorted(done.copied) == ["clone", "vm", "vm@1", "vm@2"]
    assert done.passed_over == []
    assert see(world.composer(only="b")) == before
    assert world.problems() == []
    composer.close_all()


def test_it_takes_as_little_room_as_in_the_origin(world: TwoStores, composer: Composer) -> None:
    family(composer)
    done = sync(composer)
    assert 262 * SECTOR_BYTES < done.added_bytes < 300 * SECTOR_BYTES


def test_a_second_sync_copies_nothing(world: TwoStores, composer: Composer) -> None:
    family(composer)
    sync(composer)
    stored = world.contents("b")
    again = sync(composer)
    assert (again.copied, sorted(again.current), again.added_bytes) == ([], ["clone", "vm", "vm@1", "vm@2"], 0)
    assert world.contents("b") == stored


def test_also_when_the_origin_was_sealed_meanwhile(world: TwoStores, composer: Composer) -> None:
    family(composer)
    sync(composer)
    for name in ("vm", "vm@2", "clone"):
        composer.seal(name)
    assert sync(composer).copied == []


def test_what_was_written_since_costs_what_it_is(world: TwoStores, composer: Composer) -> None:
    family(composer)
    sync(composer)
    write(composer, "vm", (5, noise(7, 1)))
    done = sync(composer)
    assert done.copied == ["vm"]
    assert 0 < done.added_bytes < 40 * SECTOR_BYTES
    assert see(world.composer(only="b"))["vm"].content == content_of(composer, "vm")


def test_an_open_volume_is_copied_as_it_is_now(world: TwoStores, composer: Composer) -> None:
    volume(composer, "vm", (0, noise(1, 4)))
    with composer.using(composer.find("vm")) as opened:
        opened.write(0, pattern(1, 2))
        assert sync(composer).copied == ["vm"]
        assert see(world.composer(only="b"))["vm"].content[: 2 * SECTOR_BYTES] == pattern(1, 2)
        opened.write(0, pattern(2))
        assert sync(composer).copied == ["vm"]
        assert (
            see(world.composer(only="b"))["vm"].content[: 2 * SECTOR_BYTES] == pattern(2) + pattern(1, 2)[SECTOR_BYTES:]
        )


@pytest.mark.parametrize("size", [SECTOR_BYTES // 2, 3 * REGION_BYTES])
def test_a_size_that_changed_comes_along(world: TwoStores, composer: Composer, size: int) -> None:
    family(composer)
    sync(composer)
    composer.resize(composer.find("vm"), SECTOR_BYTES // 2)
    composer.resize(composer.find("vm"), size)
    sync(composer)
    assert see(world.composer(only="b"))["vm"].content == content_of(composer, "vm")


def test_a_name_and_attributes_that_changed_come_along(world: TwoStores, composer: Composer) -> None:
    family(composer)
    sync(composer)
    composer.rename("vm@1", "first")
    composer.set_attributes(composer.find("clone").record.id, lambda each: msgspec.structs.replace(each, mode=0o640))
    assert sorted(sync(composer).copied) == ["clone", "first"]
    assert see(world.composer(only="b")) == see(composer)


def test_names_that_were_exchanged_are_exchanged(world: TwoStores, composer: Composer) -> None:
    family(composer)
    sync(composer)
    for name, new_name in (("vm@1", "other"), ("vm@2", "vm@1"), ("other", "vm@2")):
        composer.rename(name, new_name)
    assert sorted(sync(composer).copied) == ["vm@1", "vm@2"]
    assert see(world.composer(only="b")) == see(composer)


def test_a_new_snapshot_with_the_name_of_one_that_is_gone(world: TwoStores, composer: Composer) -> None:
    """Neither keeps the other from being there."""
    family(composer)
    before = see(composer)
    sync(composer)
    composer.remove("vm@1")
    composer.snapshot("vm", "vm@1")
    assert sync(composer).passed_over == []
    seen = see(world.composer(only="b"))
    [aside] = seen.keys() - before.keys()
    assert aside.startswith("vm@1@replaced-")
    assert seen[aside] == before["vm@1"]
    assert seen["vm@1"].content == before["vm"].content
    removed = composer.sync("a", "b", progress=unheeded, delete=True).removed
    assert removed == [aside]
    assert see(world.composer(only="b")) == see(composer)


def test_what_a_dead_node_flushed_is_copied(world: TwoStores, composer: Composer) -> None:
    """It did not get to write down when it wrote, and its lock was broken: the records say nothing of it."""
    family(composer)
    sync(composer)
    dead = world.composer(host="two")
    opened = dead.open(dead.find("vm"))
    opened.write(0, pattern(9))
    opened.flush()
    dead.abandon()
    composer.unlock("vm", force=True)
    assert sync(composer).copied == ["vm"]
    assert see(world.composer(only="b"))["vm"].content[:SECTOR_BYTES] == pattern(9)


def test_nothing_resolves_to_a_replica_beside_its_original(world: TwoStores, composer: Composer) -> None:
    family(composer)
    names = sorted(each.record.name or "" for each in composer.volumes())
    sync(composer)
    assert sorted(each.record.name or "" for each in composer.volumes()) == names
    composer.remove("vm@2")
    with pytest.raises(NotFound):
        composer.find("vm@2")
    composer.create("vm@2", SECTOR_BYTES, backend="a")
    assert composer.find("vm@2").record.kind is Kind.VOLUME
    world.composer().recover()
    assert see(world.composer(only="b")).keys() >= set(names)


def test_a_replica_that_was_opened_is_a_volume_of_its_own(world: TwoStores, composer: Composer) -> None:
    family(composer)
    sync(composer)
    other = world.composer(only="b", host="two")
    write(other, "vm", (0, noise(9, 1)))
    other.close_all()
    write(composer, "vm", (0, noise(8, 1)))
    [(name, why)] = sync(composer).passed_over
    assert name == "vm"
    assert "a volume of its own in backend b" in why
    assert content_of(other, "vm").startswith(noise(9, 1))
    other.close_all()


def test_a_replica_that_was_only_read_stays_one(world: TwoStores, composer: Composer) -> None:
    family(composer)
    sync(composer)
    assert see(world.composer(only="b")) == see(composer)
    write(composer, "vm", (0, noise(8, 1)))
    assert sync(composer).copied == ["vm"]


def test_a_volume_that_is_written_on_another_node_is_passed_over(world: TwoStores, composer: Composer) -> None:
    family(composer)
    other = world.composer(host="two")
    with other.using(other.find("vm")):
        done = sync(composer)
    assert [name for name, _ in done.passed_over] == ["vm"]
    assert "locked by two" in done.passed_over[0][1]
    assert sorted(done.copied) == ["clone", "vm@1", "vm@2"]
    assert sync(composer).copied == ["vm"]


def test_another_volume_of_that_name_is_left_alone(world: TwoStores, composer: Composer) -> None:
    composer.create("vm", SECTOR_BYTES, backend="b")
    fill(composer, "vm", pattern(1))
    only_a = world.composer(only="a")
    volume(only_a, "vm", (0, noise(1, 1)))
    only_a.close_all()
    done = sync(composer)
    assert "another volume called vm" in done.passed_over[0][1]
    assert see(world.composer(only="b"))["vm"].content == pattern(1)


def test_what_was_removed_comes_back_from_its_replica(world: TwoStores, composer: Composer) -> None:
    family(composer)
    before = see(composer)
    sync(composer)
    composer.remove("vm@1")
    composer.remove("vm")
    composer.reclaim()
    back = sync(composer, "b", "a")
    assert sorted(back.copied) == ["vm", "vm@1"]
    assert see(composer) == before
    assert composer.find("vm").mapper.backend == "a"
    assert sync(composer).copied == []


def test_a_replica_can_be_removed_while_its_original_is_in_use(world: TwoStores, composer: Composer) -> None:
    family(composer)
    before = see(composer)
    sync(composer)
    with composer.using(composer.find("vm")) as opened:
        for name in before:
            composer.remove_in("b", name)
        assert opened.read(0, opened.size) == before["vm"].content
    assert see(composer) == before
    assert list(composer.volumes_in("b")) == []
    with pytest.raises(NotFound, match="no volume in backend b is called vm"):
        composer.remove_in("b", "vm")
    composer.remove_in("a", "vm@1")
    assert "vm@1" not in see(composer)


def test_the_one_that_comes_first_is_used_where_two_are_of_their_own(world: TwoStores, composer: Composer) -> None:
    """The origin was thought to be lost, and came back behind what had been its replica."""
    family(composer)
    sync(composer)
    mapper, sealed = composer.drop_backend("a")
    write(composer, "vm", (0, pattern(9)))
    composer.add_backend(mapper, sealed)
    assert composer.find("vm").mapper.backend == "b"
    assert content_of(composer, "vm")[:SECTOR_BYTES] == pattern(9)
    stale = Found(mapper, mapper.catalog.volume(composer.find("vm").record.id).record)
    with composer.using(composer.find("vm")) as opened, composer.using(stale) as other:
        assert other is opened
        assert opened.mapper.backend == "b"
    assert "of its own" in dict(sync(composer, "b", "a").passed_over)["vm"]
    composer.remove_in("a", "vm")
    assert "vm" in sync(composer, "b", "a").copied


def test_a_damaged_volume_does_not_keep_others_from_being_copied(world: TwoStores, composer: Composer) -> None:
    family(composer)
    layer = composer.find("clone").record.layer
    composer.sync("a", "b", progress=unheeded)
    volume(composer, "bad", (0, noise(7, 3)))
    composer.snapshot("bad", "bad@1")
    layer = composer.find("bad@1").record.layer
    world.stores["a"].delete_data(f"bitmap/{layer}")
    volume(composer, "good", (0, noise(8, 3)))
    done = composer.sync("a", "b", progress=unheeded)
    assert done.copied == ["good"]
    assert {name for name, _ in done.passed_over} == {"bad", "bad@1"}
    for name in ("bad", "bad@1"):
        composer.remove(name)


def test_a_record_of_the_origin_that_is_damaged_does_not_cost_the_replica(world: TwoStores, composer: Composer) -> None:
    """Nobody can say that the origin has no such volume any more: the replica may be all that is left of it."""
    family(composer)
    sync(composer)
    before = see(world.composer(only="b"))
    key = f"volume/{composer.find('vm@1').record.id}"
    found = world.stores["a"].get_record(key)
    assert found is not None
    version = world.stores["a"].put_record(key, found.value[:-1], found.version)
    done = composer.sync("a", "b", progress=unheeded, delete=True)
    assert done.removed == []
    assert "is damaged" in dict(done.passed_over)["vm@1"]
    assert see(world.composer(only="b")) == before
    world.stores["a"].put_record(key, found.value, version)


def test_a_copy_that_nothing_leads_to_for_long_is_not_relied_upon(
    world: TwoStores, composer: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other nodes take it for left behind after an hour."""
    volume(composer, "vm", (3, noise(1, 200)))
    composer.snapshot("vm", "vm@1")
    record = composer.find("vm@1").record
    with composer._copier(composer.mapper("a"), composer.mapper("b")) as copier:
        copied = copier.layer(record.layer)
        assert copier.still_kept(record.layer, record)
        assert copier.layer(record.layer) == copied
        now_ns = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now_ns + FOREIGN_GRACE_NS)
        assert not copier.still_kept(record.layer, record)
        again = copier.layer(record.layer)
        assert again.id != copied.id
        assert again.sealed is not None
        assert copied.sealed is not None
        assert again.sealed.root == copied.sealed.root
    composer.recover()


def test_as_long_as_the_origin_is_away_nothing_resolves_to_a_replica(world: TwoStores, composer: Composer) -> None:
    """It may be older than the volume, and whoever wrote to it would have two of them."""
    family(composer)
    composer.create("other", SECTOR_BYTES, backend="b")
    sync(composer)
    composer.close_all()
    only_b = world.composer(only="b")
    only_b.away = {"a": StoreUnavailable("backend a is away")}
    volume = composer.find("vm").record.id
    for look in (lambda: only_b.find("vm"), lambda: only_b.find_by_id(volume), lambda: list(only_b.volumes())):
        with pytest.raises(StoreUnavailable, match="backend a is away"):
            look()
    assert only_b.find("other").mapper.backend == "b"
    only_b.away = {}
    assert only_b.find("vm").mapper.backend == "b"


def test_a_dry_run_changes_nothing(world: TwoStores, composer: Composer) -> None:
    family(composer)
    before = world.contents("b")
    done = composer.sync("a", "b", progress=unheeded, dry_run=True)
    assert sorted(done.copied) == ["clone", "vm", "vm@1", "vm@2"]
    assert done.added_bytes > 200 * SECTOR_BYTES
    assert world.contents("b") == before


def test_a_backend_is_not_its_own_replica(composer: Composer) -> None:
    with pytest.raises(InvalidInput, match="give two backends"):
        composer.sync("a", "a", progress=unheeded)
    with pytest.raises(NotFound, match="no backend is called c"):
        composer.sync("a", "c", progress=unheeded)


def test_a_sync_that_was_cut_short_is_gone_on_with(world: TwoStores, composer: Composer) -> None:
    family(composer)

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 235 * SECTOR_BYTES:
            raise Enough

    with pytest.raises(Enough):
        composer.sync("a", "b", progress=stop)
    done = sync(composer)
    assert done.added_bytes < 100 * SECTOR_BYTES, "nothing was found of what was copied before"
    assert see(world.composer(only="b")) == see(composer)


Change = Callable[[Composer], object]


def first_sync(composer: Composer) -> None:
    make_small(composer)


def later_sync(composer: Composer) -> None:
    make_small(composer)
    sync(composer)
    write(composer, "vm", (1, pattern(3)))
    composer.rename("vm@1", "first")


def make_small(composer: Composer) -> None:
    composer.create("vm", 4 * SECTOR_BYTES, backend="a")
    fill(composer, "vm", pattern(1, 4))
    composer.snapshot("vm", "vm@1")
    composer.seal("vm@1")
    write(composer, "vm", (2, pattern(2)))


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("moment", [Moment.AFTER, Moment.TORN], ids=lambda moment: moment.value)
@pytest.mark.parametrize("set_up", [first_sync, later_sync])
def test_a_crash_leaves_each_replica_as_it_was_or_as_it_is_to_be(
    tmp_path: Path, set_up: Change, moment: Moment, side: str
) -> None:
    for number in itertools.count(1):
        world = TwoStores(tmp_path / str(number))
        composer = world.composer()
        set_up(composer)
        composer.close_all()
        before, old = see(composer), see(world.composer(only="b"))
        blocker = world.mortal(side, FaultPlan(number, crash_at=number, moment=moment))
        dying = world.composer({side: blocker})
        with crashing(dying):
            dying.sync("a", "b", progress=unheeded)
        if not blocker.crashed:
            dying.close_all()
            assert number >= 10
            break
        dying.abandon()
        blocker.bury()
        after = world.composer()
        after.recover()
        assert world.problems() == [], number
        assert see(after) == before, number
        _whole(see(world.composer(only="b")), old, before)
        sync(after)
        assert see(world.composer(only="b")) == before, number
        after.close_all()
        after.reclaim()
        assert world.problems() == [], number


def _whole(seen: dict[str, Seen], old: dict[str, Seen], new: dict[str, Seen]) -> None:
    for name, found in seen.items():
        assert found in (old.get(name), new.get(name)), name
    assert len(seen) >= len(old)


def test_an_error_of_the_store_ends_it_and_the_next_goes_on(world: TwoStores, composer: Composer) -> None:
    make_small(composer)
    before = see(composer)
    for number in itertools.count(1):
        failing = FaultBlocker(world.stores["b"], FaultPlan(number, error_at=number))
        trying = world.composer({"b": failing}, host="one")
        try:
            done = trying.sync("a", "b", progress=unheeded)
        except StoreError:
            done = None
        trying.close_all()
        if done is not None and not done.passed_over:
            break
    assert see(world.composer(only="b")) == before
    world.composer().recover()
