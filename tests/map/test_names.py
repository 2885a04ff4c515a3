"""Names: the rule, and the two records that hold one, whoever takes it at the same time."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment, SimulatedCrash
from archipfs.errors import AlreadyExists, Conflict, InvalidName, NotFound
from archipfs.map.mapper import Attributes, Mapper
from archipfs.map.names import check_name, name_ident
from archipfs.map.records import NameRecord, VolumeRecord
from archipfs.types import NAME_BYTES_MAX, VolumeId, new_volume_id
from tests.compose.interleave import NEVER, Schedule, SteppedBlocker, every_second, schedules
from tests.compose.world import World

SIZE = 4096


def make(mapper: Mapper, name: str) -> VolumeRecord:
    return mapper.create(name, SIZE, Attributes()).record


def names_of(mapper: Mapper) -> list[str]:
    return sorted(str(found.record.name) for found in mapper.volumes())


# The rule


@pytest.mark.parametrize(
    "name", ["a", "vm 1", "a" * 255, "é" * 127, "vm@monday", "-", "a.b", "日本", "%2e", "a\\b", "UPPER"]
)
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        (".", "dot"),
        ("..", "dot"),
        (".hidden", "dot"),
        ("a/b", "'/'"),
        ("/", "'/'"),
        ("a\0b", "NUL"),
        ("a" * 256, "256 bytes"),
        ("é" * 128, "256 bytes"),
        ("\udc80", "UTF-8"),
    ],
)
def test_bad_names_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(InvalidName, match=reason) as caught:
        check_name(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@given(st.text(st.characters(codec=None), max_size=300))
def test_a_name_is_what_can_be_one_file_of_a_directory(name: str) -> None:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        good = False
    else:
        good = 1 <= len(encoded) <= NAME_BYTES_MAX and not set("/\0") & set(name) and name[0] != "."
    if good:
        assert check_name(name) == name
    else:
        with pytest.raises(InvalidName):
            check_name(name)


@given(st.text(), st.text())
def test_name_idents_are_keys_and_differ(one: str, other: str) -> None:
    assert set(name_ident(one)) <= set("0123456789abcdef")
    assert len(name_ident(one)) == 32
    assert (name_ident(one) == name_ident(other)) == (one == other)


# Taking and giving up


def test_a_name_is_taken_once(world: World) -> None:
    mapper = world.mapper()
    make(mapper, "vm")
    with pytest.raises(AlreadyExists, match="vm exists already"):
        make(mapper, "vm")


def test_a_removed_name_is_free_again(world: World) -> None:
    mapper = world.mapper()
    mapper.purge(mapper.remove(make(mapper, "vm").id))
    assert mapper.find("vm") is None
    again = make(mapper, "vm")
    assert mapper.find("vm") is not None
    assert names_of(mapper) == ["vm"]
    assert again.name == "vm"


def test_a_name_whose_maker_failed_is_free_again(world: World) -> None:
    mapper = world.mapper()
    with pytest.raises(ZeroDivisionError), mapper.reserve("vm"):
        raise ZeroDivisionError
    assert mapper.find("vm") is None
    make(mapper, "vm")
    assert world.problems() == []


def test_a_name_that_is_being_made_here_is_taken(world: World) -> None:
    mapper = world.mapper()
    with mapper.reserve("vm"), pytest.raises(AlreadyExists, match="just being made"):
        make(mapper, "vm")


def test_a_rename_leaves_no_trace_of_the_old_name(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper, "old")
    assert mapper.rename(volume.id, "new", replace=None) is None
    assert names_of(mapper) == ["new"]
    assert mapper.catalog.name("old") is None
    assert world.check() == []


def test_a_rename_to_the_same_name_changes_nothing(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper, "vm")
    assert mapper.rename(volume.id, "vm", replace=None) is None
    assert mapper.find("vm") == mapper.catalog.volume(volume.id)
    assert world.check() == []


def test_a_rename_onto_a_taken_name_is_refused(world: World) -> None:
    mapper = world.mapper()
    volume, _ = make(mapper, "vm"), make(mapper, "other")
    with pytest.raises(AlreadyExists, match="other exists already"):
        mapper.rename(volume.id, "other", replace=None)
    assert names_of(mapper) == ["other", "vm"]
    assert world.check() == []


def test_a_rename_replaces_only_whom_it_was_told_to(world: World) -> None:
    mapper = world.mapper()
    volume, other, third = make(mapper, "vm"), make(mapper, "other"), make(mapper, "third")
    with pytest.raises(Conflict):
        mapper.rename(volume.id, "other", replace=third.id)
    displaced = mapper.rename(volume.id, "other", replace=other.id)
    assert displaced is not None
    assert (displaced.id, displaced.name) == (other.id, None)
    assert names_of(mapper) == ["other", "third"]


def test_a_rename_of_a_removed_volume_does_not_bring_it_back(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper, "vm")
    mapper.remove(volume.id)
    with pytest.raises(NotFound):
        mapper.rename(volume.id, "again", replace=None)
    assert names_of(mapper) == []


def test_a_rename_to_a_bad_name_is_refused(world: World) -> None:
    mapper = world.mapper()
    with pytest.raises(InvalidName):
        mapper.rename(make(mapper, "vm").id, ".vm", replace=None)
    assert names_of(mapper) == ["vm"]


@pytest.mark.parametrize("volume", [new_volume_id(), None], ids=["volume gone", "volume with another name"])
def test_a_dangling_name_is_taken_over(world: World, volume: VolumeId | None) -> None:
    """Its record speaks of a volume that is gone, or of one with another name."""
    mapper = world.mapper()
    other = make(mapper, "other")
    mapper.catalog.put_name(NameRecord("vm", volume or other.id), None)
    assert mapper.find("vm") is None
    assert [found.what for found in world.check()] == ["name leads to no volume"]
    made = make(mapper, "vm")
    found = mapper.find("vm")
    assert found is not None
    assert found.record.id == made.id
    assert names_of(mapper) == ["other", "vm"]
    assert world.check() == []


def test_a_rename_takes_a_dangling_name_over(world: World) -> None:
    mapper = world.mapper()
    volume = make(mapper, "vm")
    mapper.catalog.put_name(NameRecord("new", new_volume_id(), new_volume_id()), None)
    mapper.rename(volume.id, "new", replace=None)
    assert names_of(mapper) == ["new"]
    assert world.check() == []


# Crashes


def crash_in_rename(world: World, number: int, replace: bool) -> tuple[bool, VolumeRecord, VolumeRecord]:
    mapper = world.mapper()
    volume, other = make(mapper, "old"), make(mapper, "other")
    blocker = FaultBlocker(world.store, FaultPlan(crash_at=number, moment=Moment.BEFORE))
    try:
        target = "other" if replace else "new"
        world.mapper(blocker).rename(volume.id, target, replace=other.id if replace else None)
    except SimulatedCrash:
        pass
    return blocker.crashed, volume, other


@pytest.mark.parametrize("replace", [False, True])
def test_a_rename_happens_at_one_point(tmp_path: Path, replace: bool) -> None:
    """However many calls were made before the crash, the volume has exactly one of both names, and so has the other."""
    seen = []
    for number in itertools.count(1):
        world = World(tmp_path / str(number))
        crashed, volume, other = crash_in_rename(world, number, replace)
        mapper = world.mapper()
        names = {name: found.record.id for name in ("old", "new", "other") if (found := mapper.find(name)) is not None}
        assert names == {str(found.record.name): found.record.id for found in mapper.volumes()}
        before = {"old": volume.id, "other": other.id}
        after = {"other": volume.id} if replace else {"new": volume.id, "other": other.id}
        assert names in (before, after)
        seen.append(names == after)
        if not crashed:
            break
    assert seen == sorted(seen), "a rename that happened does not unhappen"
    assert seen[0] is False
    assert seen[-1] is True


def test_whom_a_rename_replaced_does_not_come_back(tmp_path: Path) -> None:
    """The crash left both with the same name; then the winner gives it up before anybody recovered."""
    for number, give_up in itertools.product(range(1, 12), ("remove", "rename")):
        world = World(tmp_path / f"{number}-{give_up}")
        _, volume, other = crash_in_rename(world, number, True)
        mapper = world.mapper()
        found = mapper.find("other")
        assert found is not None
        if found.record.id != volume.id:
            continue
        if give_up == "remove":
            mapper.remove(volume.id)
            assert names_of(mapper) == []
        else:
            mapper.rename(volume.id, "elsewhere", replace=None)
            assert names_of(mapper) == ["elsewhere"]
        assert mapper.find("other") is None
        assert [record.id for record in mapper.removed()] in ([other.id], [volume.id, other.id], [other.id, volume.id])


# Two at once

Operation = Callable[[Mapper], object]


def create_x(mapper: Mapper) -> object:
    return make(mapper, "x")


def rename_to_x(name: str) -> Operation:
    def operation(mapper: Mapper) -> object:
        found = mapper.find(name)
        assert found is not None
        return mapper.rename(found.record.id, "x", replace=None)

    return operation


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize(
    ("one", "two"),
    [
        (create_x, create_x),
        (create_x, rename_to_x("b")),
        (rename_to_x("a"), create_x),
        (rename_to_x("a"), rename_to_x("b")),
    ],
    ids=["create-create", "create-rename", "rename-create", "rename-rename"],
)
def test_of_two_nodes_taking_one_name_one_wins(tmp_path: Path, one: Operation, two: Operation, dangling: bool) -> None:
    """In every order of their calls; and nothing that has a name is lost, or taken for removed."""
    for number, schedule in enumerate(schedules(every_second(12))):
        world = World(tmp_path / str(number))
        blocker = SteppedBlocker(world.store)
        mappers = [world.mapper(blocker, host) for host in ("one", "two")]
        untouched = {name: make(mappers[0], name).id for name in ("a", "b")}
        if dangling:
            mappers[0].catalog.put_name(NameRecord("x", new_volume_id()), None)
        *outcomes, whole = schedule.run(blocker, partial(one, mappers[0]), partial(two, mappers[1]))
        assert sorted(outcome.succeeded for outcome in outcomes) == [False, True], schedule
        loser = next(outcome for outcome in outcomes if not outcome.succeeded)
        assert isinstance(loser.error, AlreadyExists)
        assert mappers[0].removed() == []
        winner = mappers[0].find("x")
        assert winner is not None
        expected = dict(untouched)
        if winner.record.id in untouched.values():
            expected = {name: volume for name, volume in untouched.items() if volume != winner.record.id}
        expected["x"] = winner.record.id
        assert {str(found.record.name): found.record.id for found in mappers[1].volumes()} == expected
        assert [found for found in world.problems() if found.which.split()[0] in ("volume", "name")] == []
        if whole:
            return


def test_a_name_that_is_replaced_is_never_without_a_volume(tmp_path: Path) -> None:
    """Whoever looks it up finds the one or the other, wherever the rename stands and wherever the look-up does."""
    for number, schedule in enumerate(schedules(every_second(5))):
        world = World(tmp_path / str(number))
        blocker = SteppedBlocker(world.store)
        mapper = world.mapper(blocker)
        volume, other = make(mapper, "vm"), make(mapper, "other")

        def replace(mapper: Mapper = mapper, volume: VolumeRecord = volume, other: VolumeRecord = other) -> None:
            displaced = mapper.rename(volume.id, "other", replace=other.id)
            assert displaced is not None
            mapper.purge(displaced)

        _, look, whole = schedule.run(blocker, replace, partial(mapper.find, "other"))
        assert look.result is not None, schedule
        if whole:
            return


@pytest.mark.parametrize("calls", range(6))
def test_a_look_up_that_a_whole_replacement_overtakes_finds_the_new_one(world: World, calls: int) -> None:
    blocker = SteppedBlocker(world.store)
    mapper = world.mapper(blocker)
    volume, other = make(mapper, "vm"), make(mapper, "other")

    def replace() -> None:
        displaced = mapper.rename(volume.id, "other", replace=other.id)
        assert displaced is not None
        mapper.purge(displaced)

    look, _, _ = Schedule(calls, NEVER).run(blocker, partial(mapper.find, "other"), replace)
    assert look.result is not None


def test_a_snapshot_renamed_while_another_takes_its_name_keeps_its_own(tmp_path: Path) -> None:
    """Snapshots have no locks: one node replaces it by a rename, while another node renames it away."""
    for number, schedule in enumerate(schedules(every_second(12))):
        world = World(tmp_path / str(number))
        blocker = SteppedBlocker(world.store)
        mappers = [world.mapper(blocker, host) for host in ("one", "two")]
        volume, snapshot = make(mappers[0], "vm"), make(mappers[0], "snap")
        one, two, whole = schedule.run(
            blocker,
            partial(mappers[0].rename, volume.id, "snap", replace=snapshot.id),
            partial(mappers[1].rename, snapshot.id, "kept", replace=None),
        )
        names = {str(found.record.name): found.record.id for found in mappers[0].volumes()}
        assert volume.id in names.values()
        assert two.succeeded or isinstance(two.error, NotFound)
        assert not two.succeeded or names.get("kept") == snapshot.id or one.result is not None
        for name, volume_id in names.items():
            found = mappers[0].find(name)
            assert found is not None
            assert found.record.id == volume_id
        if whole:
            return
