"""A crash at every blocker call of every operation leaves the state before it or the state after it.

Each operation is run again and again in a fresh world, and crashes before, after, or in the middle of its first call
to the store, its second, and so on until it gets through. Afterwards the store is opened as a new process does it, with
the live bitmaps (the process was killed) or without them and with a part of what was not flushed lost (the power went).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment
from archipfs.compose.composer import Composer
from archipfs.map.records import Kind, VolumeRecord
from archipfs.types import SECTOR_BYTES
from tests.compose.world import Seen, World, crashing, cut_power, fill, pattern, see

POWER_SEEDS = range(2)
CALLS_MAX = 200

OLD = pattern(1, 8)
NEW = OLD[: 2 * SECTOR_BYTES] + pattern(2, 3) + OLD[5 * SECTOR_BYTES :] + pattern(3, 1.5)
"""What an open volume holds that was flushed as ``OLD``: overwritten in its middle, and longer."""
FIRST = pattern(4, 6)
OTHER = pattern(5, 3)


@dataclass(frozen=True, slots=True)
class Case:
    """An operation, the world it begins in, and what may be seen after it."""

    set_up: Callable[[Composer], object]
    operation: Callable[[Composer], object]
    before: Mapping[str, Seen]
    after: Mapping[str, Seen]
    prepare: Callable[[Composer], object] = lambda composer: None
    """Done by the process that crashes later, such as writes that nobody flushed."""
    flushed: Mapping[str, bytes] = field(default_factory=dict)
    """Where ``before`` has content that was not flushed: what it was at the last flush."""
    between: Sequence[Mapping[str, Seen]] = ()
    """What may be seen where the operation is more than one."""
    may_keep: Seen | None = None
    """A snapshot that may be there besides."""
    repeatable: bool = False
    """It changes nothing that can be seen, and is done once more to the end."""


def volume(content: bytes, kind: Kind = Kind.VOLUME, mode: int = 0o600) -> Seen:
    return Seen(kind, mode, content)


def snapshot(content: bytes) -> Seen:
    return Seen(Kind.SNAPSHOT, 0o444, content)


def clone(content: bytes) -> Seen:
    return Seen(Kind.CLONE, 0o600, content)


def make(composer: Composer, name: str, content: bytes) -> None:
    composer.create(name, len(content))
    fill(composer, name, content)


def one_volume(composer: Composer) -> None:
    make(composer, "vm", OLD)


def volume_with_snapshot(composer: Composer) -> None:
    """Two layers: a part of ``OLD`` shines through from the snapshot."""
    make(composer, "vm", FIRST)
    composer.snapshot("vm", "vm@first")
    with composer.using(composer.find("vm")) as opened:
        opened.resize(len(OLD))
        opened.write(0, OLD)


def two_volumes(composer: Composer) -> None:
    one_volume(composer)
    make(composer, "other", OTHER)


def write_without_flush(composer: Composer) -> None:
    opened = composer.open(composer.find("vm"))
    opened.write(2 * SECTOR_BYTES, pattern(2, 3))
    opened.write(8 * SECTOR_BYTES, pattern(3, 1.5))


def rename_case(*, replace: bool) -> Case:
    before = {"vm": volume(OLD)} | ({"other": volume(OTHER)} if replace else {})
    return Case(
        two_volumes if replace else one_volume,
        lambda composer: composer.rename("vm", "other", replace=replace),
        before,
        {"other": volume(OLD)},
    )


def replace_snapshot_case() -> Case:
    def set_up(composer: Composer) -> None:
        two_volumes(composer)
        composer.snapshot("other", "taken")

    return Case(
        set_up,
        lambda composer: composer.rename("vm", "taken", replace=True),
        {"vm": volume(OLD), "other": volume(OTHER), "taken": snapshot(OTHER)},
        {"taken": volume(OLD), "other": volume(OTHER)},
    )


def resize_case(size: int, content: bytes) -> Case:
    return Case(
        volume_with_snapshot,
        lambda composer: resize(composer, size),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST)},
        {"vm": volume(content), "vm@first": snapshot(FIRST)},
    )


def resize(composer: Composer, *sizes: int) -> None:
    for size in sizes:
        composer.resize(composer.find("vm"), size)


def remove_open(composer: Composer) -> None:
    opened = composer.open(composer.find("vm"))
    composer.remove("vm", even_if_open=True)
    opened.write(0, pattern(6))
    composer.release(opened)
    composer.reclaim()


def remove_closed(composer: Composer) -> None:
    composer.remove("vm")
    composer.reclaim()


def change_mode(composer: Composer) -> None:
    def edit(record: VolumeRecord) -> VolumeRecord:
        return msgspec.structs.replace(record, mode=0o640)

    composer.set_attributes(composer.find("vm").record.id, edit)


def copy_range(composer: Composer, source: str, target: str, offset: int, length: int) -> None:
    with composer.using(composer.find(source)) as reader, composer.using(composer.find(target)) as writer:
        composer.copy_range(reader, offset, writer, offset, length)


def volume_and_empty_one(composer: Composer) -> None:
    one_volume(composer)
    composer.create("copy", 0)


def copied_in_part(composer: Composer) -> None:
    """A clone of the first two and a half sectors; the source has another head since."""
    volume_and_empty_one(composer)
    copy_range(composer, "vm", "copy", 0, PART)


def sealed_in_part(composer: Composer) -> None:
    """Two snapshots, the first of which is sealed."""
    volume_with_snapshot(composer)
    composer.snapshot("vm", "vm@second")
    composer.seal("vm@first")


def sealing_case(name: str) -> Case:
    seen = {"vm": volume(OLD), "vm@first": snapshot(FIRST)}
    return Case(volume_with_snapshot, lambda composer: composer.seal(name, threads=1), seen, seen, repeatable=True)


@dataclass(frozen=True, slots=True)
class Bytes:
    """Something to import."""

    content: bytes

    def next_change(self, offset: int, end: int) -> tuple[int, int] | None:
        return (offset, end) if offset < end else None

    def next_data(self, offset: int) -> int:
        return offset

    def next_hole(self, offset: int) -> int:
        return len(self.content)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]


def import_sealed(composer: Composer) -> None:
    content = OLD + FIRST
    composer.import_sealed("new", len(content), Bytes(content), about_bytes=len(content), threads=1)


def remove_snapshot(composer: Composer, name: str) -> None:
    composer.remove(name)
    composer.reclaim()


PART = int(2.5 * SECTOR_BYTES)
SHRUNK = int(2.5 * SECTOR_BYTES)
GROWN = 12 * SECTOR_BYTES

CASES = {
    "create": Case(
        one_volume,
        lambda composer: composer.create("new", SECTOR_BYTES),
        {"vm": volume(OLD)},
        {"vm": volume(OLD), "new": volume(bytes(SECTOR_BYTES))},
    ),
    "snapshot of a closed volume": Case(
        one_volume,
        lambda composer: composer.snapshot("vm", "snap"),
        {"vm": volume(OLD)},
        {"vm": volume(OLD), "snap": snapshot(OLD)},
    ),
    "snapshot of an open volume": Case(
        one_volume,
        lambda composer: composer.snapshot("vm", "snap"),
        {"vm": volume(NEW)},
        {"vm": volume(NEW), "snap": snapshot(NEW)},
        write_without_flush,
        {"vm": OLD},
    ),
    "snapshot of a snapshot": Case(
        volume_with_snapshot,
        lambda composer: composer.snapshot("vm@first", "again"),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST)},
        {"vm": volume(OLD), "vm@first": snapshot(FIRST), "again": snapshot(FIRST)},
    ),
    "clone of a snapshot": Case(
        volume_with_snapshot,
        lambda composer: composer.clone("vm@first", "copy", size=GROWN),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST)},
        {
            "vm": volume(OLD),
            "vm@first": snapshot(FIRST),
            "copy": clone(FIRST + bytes(GROWN - len(FIRST))),
        },
    ),
    "clone of a live volume": Case(
        one_volume,
        lambda composer: composer.clone("vm", "copy"),
        {"vm": volume(NEW)},
        {"vm": volume(NEW), "copy": clone(NEW)},
        write_without_flush,
        {"vm": OLD},
    ),
    "copy of a live volume into an empty one": Case(
        volume_and_empty_one,
        lambda composer: copy_range(composer, "vm", "copy", 0, len(NEW)),
        {"vm": volume(NEW), "copy": volume(b"")},
        {"vm": volume(NEW), "copy": clone(NEW)},
        write_without_flush,
        {"vm": OLD},
    ),
    "copy of a snapshot's beginning into an empty volume": Case(
        lambda composer: (volume_with_snapshot(composer), composer.create("copy", 0)),
        lambda composer: copy_range(composer, "vm@first", "copy", 0, PART),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST), "copy": volume(b"")},
        {"vm": volume(OLD), "vm@first": snapshot(FIRST), "copy": clone(FIRST[:PART])},
    ),
    "copy of what follows": Case(
        copied_in_part,
        lambda composer: copy_range(composer, "vm", "copy", PART, len(OLD)),
        {"vm": volume(OLD), "copy": clone(OLD[:PART])},
        {"vm": volume(OLD), "copy": clone(OLD)},
    ),
    "copy of what follows, to a volume that shrank": Case(
        lambda composer: (
            copied_in_part(composer),
            copy_range(composer, "vm", "copy", PART, len(OLD)),
            composer.resize(composer.find("copy"), SECTOR_BYTES),
        ),
        lambda composer: copy_range(composer, "vm", "copy", SECTOR_BYTES, PART),
        {"vm": volume(OLD), "copy": clone(OLD[:SECTOR_BYTES])},
        {"vm": volume(OLD), "copy": clone(OLD[: SECTOR_BYTES + PART])},
    ),
    "rename": rename_case(replace=False),
    "rename onto a volume": rename_case(replace=True),
    "rename onto a snapshot": replace_snapshot_case(),
    "shrink": resize_case(SHRUNK, OLD[:SHRUNK]),
    "shrink to nothing": resize_case(0, b""),
    "grow": resize_case(GROWN, OLD + bytes(GROWN - len(OLD))),
    "shrink, then grow": Case(
        volume_with_snapshot,
        lambda composer: resize(composer, SHRUNK, GROWN),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST)},
        {"vm": volume(OLD[:SHRUNK] + bytes(GROWN - SHRUNK)), "vm@first": snapshot(FIRST)},
        between=[{"vm": volume(OLD[:SHRUNK]), "vm@first": snapshot(FIRST)}],
    ),
    "shrink, then grow, an open volume": Case(
        volume_with_snapshot,
        lambda composer: resize(composer, SHRUNK, GROWN),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST)},
        {"vm": volume(OLD[:SHRUNK] + bytes(GROWN - SHRUNK)), "vm@first": snapshot(FIRST)},
        lambda composer: composer.open(composer.find("vm")),
        between=[{"vm": volume(OLD[:SHRUNK]), "vm@first": snapshot(FIRST)}],
    ),
    "rollback": Case(
        volume_with_snapshot,
        lambda composer: composer.rollback("vm", "vm@first"),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST)},
        {"vm": volume(FIRST), "vm@first": snapshot(FIRST)},
        may_keep=snapshot(OLD),
    ),
    "remove a closed volume": Case(
        two_volumes, remove_closed, {"vm": volume(OLD), "other": volume(OTHER)}, {"other": volume(OTHER)}
    ),
    "remove an open volume": Case(
        two_volumes, remove_open, {"vm": volume(OLD), "other": volume(OTHER)}, {"other": volume(OTHER)}
    ),
    "seal a snapshot": sealing_case("vm@first"),
    "seal what lies below a volume": sealing_case("vm"),
    "seal an open volume": Case(
        sealed_in_part,
        lambda composer: composer.seal("vm", live=True, threads=1),
        {"vm": volume(NEW), "vm@first": snapshot(FIRST), "vm@second": snapshot(OLD)},
        {"vm": volume(NEW), "vm@first": snapshot(FIRST), "vm@second": snapshot(OLD)},
        write_without_flush,
        {"vm": OLD},
        repeatable=True,
    ),
    "import": Case(
        two_volumes,
        import_sealed,
        {"vm": volume(OLD), "other": volume(OTHER)},
        {"vm": volume(OLD), "other": volume(OTHER), "new": volume(OLD + FIRST)},
    ),
    "remove a sealed snapshot": Case(
        sealed_in_part,
        lambda composer: remove_snapshot(composer, "vm@first"),
        {"vm": volume(OLD), "vm@first": snapshot(FIRST), "vm@second": snapshot(OLD)},
        {"vm": volume(OLD), "vm@second": snapshot(OLD)},
    ),
    "chmod": Case(one_volume, change_mode, {"vm": volume(OLD)}, {"vm": volume(OLD, mode=0o640)}),
}


@dataclass(slots=True)
class Run:
    """One crash: its world, and the process that it happened in."""

    world: World
    blocker: FaultBlocker
    crashed: bool


def crash_at(world: World, case: Case, plan: FaultPlan) -> Run:
    """Set up, prepare, and run the operation until the crash; its calls are numbered from those of ``prepare`` on."""
    set_up = world.composer()
    case.set_up(set_up)
    set_up.close_all()
    blocker = world.mortal(plan)
    composer = world.composer(blocker)
    with crashing(composer):
        case.prepare(composer)
        case.operation(composer)
    crashed = blocker.crashed
    blocker.crash()
    composer.abandon()
    blocker.bury()
    return Run(world, blocker, crashed)


def calls_before(world: World, case: Case) -> int:
    """How many calls ``prepare`` takes."""
    case.set_up(world.composer())
    blocker = FaultBlocker(world.store)
    composer = world.composer(blocker)
    case.prepare(composer)
    composer.abandon()
    return blocker.calls


def runs(directory: Path, case: Case, moment: Moment) -> Iterator[Run]:
    """The operation, crashing at each of its calls, and at last not at all."""
    first = calls_before(World(directory / "counting"), case) + 1
    for number in range(first, first + CALLS_MAX):
        run = crash_at(World(directory / str(number)), case, FaultPlan(number, crash_at=number, moment=moment))
        yield run
        if not run.crashed:
            return
    raise AssertionError(f"the operation takes more than {CALLS_MAX} calls")


def without_kept(case: Case, seen: dict[str, Seen]) -> dict[str, Seen]:
    """What was seen, but for the snapshot that a rollback keeps, which has to be whole."""
    if case.may_keep is None:
        return seen
    rest = {name: found for name, found in seen.items() if "before-rollback" not in name}
    assert all(found == case.may_keep for name, found in seen.items() if name not in rest)
    return rest


def is_mixture(content: bytes, old: bytes, new: bytes) -> bool:
    """Whether each sector is that of ``old`` or that of ``new``, as far as the content goes."""
    if len(content) not in (len(old), len(new)):
        return False
    old, new = (side[: len(content)].ljust(len(content), b"\0") for side in (old, new))
    cuts = range(0, len(content), SECTOR_BYTES)
    return all(
        content[cut : cut + SECTOR_BYTES] in (old[cut : cut + SECTOR_BYTES], new[cut : cut + SECTOR_BYTES])
        for cut in cuts
    )


def is_before(case: Case, seen: Mapping[str, Seen], *, power_lost: bool) -> bool:
    if not power_lost or not case.flushed:
        return seen == case.before
    return seen.keys() == case.before.keys() and all(
        found == case.before[name]
        or (
            name in case.flushed
            and (found.kind, found.mode) == (case.before[name].kind, case.before[name].mode)
            and is_mixture(found.content, case.flushed[name], case.before[name].content)
        )
        for name, found in seen.items()
    )


def judge(case: Case, run: Run, *, power_lost: bool) -> None:
    """The state is the one before or the one after, nothing is wrong or left over, and the operation can be done."""
    composer = run.world.recovered()
    assert run.world.problems() == []
    seen = without_kept(case, see(composer))
    is_after = seen == case.after
    assert is_after or (seen in case.between) or is_before(case, seen, power_lost=power_lost)
    assert is_after or run.crashed
    if not is_after or case.repeatable:
        case.operation(composer)
        again = without_kept(case, see(composer))
        assert again.keys() == case.after.keys()
        assert power_lost or again == case.after
    composer.close_all()
    composer.reclaim()
    assert run.world.problems() == []


@pytest.mark.parametrize("moment", Moment, ids=lambda moment: moment.value)
@pytest.mark.parametrize("name", CASES)
def test_process_crash_leaves_before_or_after(name: str, moment: Moment, tmp_path: Path) -> None:
    crashes = 0
    for run in runs(tmp_path, CASES[name], moment):
        crashes += run.crashed
        judge(CASES[name], run, power_lost=False)
    assert crashes >= 1


@pytest.mark.parametrize("moment", Moment, ids=lambda moment: moment.value)
@pytest.mark.parametrize("name", CASES)
def test_power_crash_leaves_before_or_after(name: str, moment: Moment, tmp_path: Path) -> None:
    for seed in POWER_SEEDS:
        for run in runs(tmp_path / str(seed), CASES[name], moment):
            cut_power(run.world, run.blocker, seed)
            judge(CASES[name], run, power_lost=True)


@pytest.mark.parametrize("name", CASES)
def test_crash_in_the_recovery_from_a_crash(name: str, tmp_path: Path) -> None:
    """Recovery too may be cut short at any of its calls, and is begun anew."""
    for run in runs(tmp_path, CASES[name], Moment.AFTER):
        for number in itertools.count(1):
            blocker = run.world.mortal(FaultPlan(number, crash_at=number, moment=Moment.TORN))
            composer = run.world.composer(blocker)
            with crashing(composer):
                composer.recover()
            if not blocker.crashed:
                break
            blocker.bury()
        judge(CASES[name], run, power_lost=False)


@pytest.mark.parametrize("moment", list(Moment))
def test_what_was_written_beyond_the_end_before_power_was_lost_stays_hidden_from_snapshots(
    tmp_path: Path, moment: Moment
) -> None:
    """Power is lost at any call of a snapshot of a volume that had just grown. It is as large as before then, and what
    its frozen layer holds beyond that must not come to light, neither in it nor in a later snapshot."""
    size = 4 * SECTOR_BYTES
    hidden = 0
    for crash_at in itertools.count(1):
        world = World(tmp_path / str(crash_at))
        first = world.composer()
        make(first, "vm", pattern(1, 4))
        blocker = world.mortal(FaultPlan(crash_at=crash_at, moment=moment))
        composer = world.composer(blocker)
        with crashing(composer):
            composer.open(composer.find("vm")).write(size, pattern(2, 4))
            composer.snapshot("vm", "early")
        if not blocker.crashed:
            break
        cut_power(world, blocker, seed=crash_at)
        after = world.recovered()
        with after.using(after.find("vm")) as opened:
            if opened.size != size:
                continue
            hidden += 1
            opened.write(3 * size, pattern(3))
            shown = opened.read(0, opened.size)
            assert shown[size : 3 * size] == bytes(2 * size)
            after.snapshot("vm", "later")
        assert see(after)["later"].content == shown, f"crash at call {crash_at}"
        assert see(after)["vm"].content == shown, f"crash at call {crash_at}"
    assert hidden > 5, "hardly anything was tried"
