"""The fault wrapper: transparent without a plan, exact with one."""

import itertools
import time
from collections.abc import Callable

import pytest

from archipfs.blockers.contract import Blocker, Record
from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment, SimulatedCrash
from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import Conflict, ObjectMissing, StoreError, StoreFull, StoreUnavailable
from archipfs.types import SECTOR_BYTES
from tests.blockers.conformance import Conformance, Store

OLD = b"o" * SECTOR_BYTES
NEW = b"n" * SECTOR_BYTES


class TestFaultless(Conformance):
    @pytest.fixture
    def store(self) -> Store:
        blocker = FaultBlocker(MemoryBlocker())
        return Store(lambda: blocker)


def work(blocker: Blocker) -> None:
    """Six calls that change something."""
    blocker.put("pack/a", b"x")
    data = blocker.create_data("layer/a")
    data.pwrite(0, b"x")
    data.flush()
    version = blocker.put_record("volume/a", b"x", None)
    blocker.get_record("volume/a")
    blocker.delete_record("volume/a", version)


def state(blocker: Blocker) -> tuple[object, ...]:
    data = [blocker.open_data(key, writable=False).pread(0, 1) for key in blocker.list_data("layer")]
    return list(blocker.list("pack")), data, [record.value for _, record in blocker.list_records("volume")]


def states() -> list[tuple[object, ...]]:
    """After 0, 1, … calls of ``work``."""
    return [
        ([], [], []),
        (["pack/a"], [], []),
        (["pack/a"], [b"\0"], []),
        (["pack/a"], [b"x"], []),
        (["pack/a"], [b"x"], []),
        (["pack/a"], [b"x"], [b"x"]),
        (["pack/a"], [b"x"], []),
    ]


@pytest.mark.parametrize("moment", list(Moment))
def test_crash_at_each_call(moment: Moment) -> None:
    for number in itertools.count(1):
        store = MemoryBlocker()
        blocker = FaultBlocker(store, FaultPlan(seed=number, crash_at=number, moment=moment))
        try:
            work(blocker)
        except SimulatedCrash:
            assert blocker.crashed
            assert blocker.calls == number
            before, after = states()[number - 1 : number + 1]
            allowed = {Moment.BEFORE: [before], Moment.AFTER: [after], Moment.TORN: [before, after]}[moment]
            assert state(store) in allowed
            for call in (lambda: work(blocker), lambda: blocker.get_record("volume/a"), blocker.space):  # noqa: B023
                with pytest.raises(SimulatedCrash):
                    call()
        else:
            assert not blocker.crashed
            assert number == 7
            assert blocker.calls == 6
            break


def test_a_crash_is_no_exception() -> None:
    assert not issubclass(SimulatedCrash, Exception)


def test_crash_prevails_over_the_error_of_the_call() -> None:
    blocker = FaultBlocker(MemoryBlocker(), FaultPlan(crash_at=1, moment=Moment.AFTER))
    with pytest.raises(SimulatedCrash):
        blocker.put_record("volume/a", b"x", 5)


def test_error_of_the_call_prevails_over_a_fault() -> None:
    blocker = FaultBlocker(MemoryBlocker(), FaultPlan(error_at=1, moment=Moment.AFTER))
    with pytest.raises(Conflict):
        blocker.put_record("volume/a", b"x", 5)


def test_crash_between_calls() -> None:
    blocker = FaultBlocker(MemoryBlocker())
    data = blocker.create_data("layer/a")
    blocker.crash()
    calls: list[Callable[[], object]] = [
        lambda: data.pread(0, 1),
        data.size,
        data.flush,
        lambda: list(blocker.list("pack")),
    ]
    for call in calls:
        with pytest.raises(SimulatedCrash):
            call()
    data.close()


def test_reads_are_counted_on_demand() -> None:
    blocker = FaultBlocker(MemoryBlocker(), FaultPlan(count_reads=True, error_at=2))
    assert blocker.get_record("volume/a") is None
    with pytest.raises(StoreUnavailable):
        blocker.get_record("volume/a")
    assert blocker.get_record("volume/a") is None
    assert blocker.calls == 3


def test_torn_write_is_torn_at_sectors() -> None:
    seen = set()
    for seed in range(200):
        store = MemoryBlocker()
        store.create_data("layer/a").pwrite(0, OLD * 3)
        blocker = FaultBlocker(store, FaultPlan(seed=seed, crash_at=1, moment=Moment.TORN))
        with pytest.raises(SimulatedCrash):
            blocker.open_data("layer/a", writable=True).pwrite(100, b"n" * (2 * SECTOR_BYTES))
        content = store.open_data("layer/a", writable=False).pread(0, 3 * SECTOR_BYTES)
        pieces = [
            content[100:SECTOR_BYTES],
            content[SECTOR_BYTES : 2 * SECTOR_BYTES],
            content[2 * SECTOR_BYTES : 2 * SECTOR_BYTES + 100],
        ]
        assert all(len(set(piece)) == 1 for piece in pieces)
        assert content[:100] == OLD[:100]
        assert content[2 * SECTOR_BYTES + 100 :] == OLD[100:]
        seen.add(bytes(piece[0] for piece in pieces))
    assert len(seen) == 8


def test_errors() -> None:
    store = MemoryBlocker()
    blocker = FaultBlocker(store, FaultPlan(error_at=1, error=StoreFull))
    with pytest.raises(StoreFull) as caught:
        blocker.put("pack/a", b"x")
    assert "\n" not in str(caught.value)
    assert not store.exists("pack/a")
    blocker.put("pack/a", b"x")
    assert store.exists("pack/a")


def test_error_after_the_effect() -> None:
    store = MemoryBlocker()
    blocker = FaultBlocker(store, FaultPlan(error_at=1, moment=Moment.AFTER))
    with pytest.raises(StoreUnavailable):
        blocker.put_record("volume/a", b"x", None)
    assert store.get_record("volume/a") == Record(b"x", 1)


def test_error_rate_is_of_the_seed() -> None:
    def run(seed: int) -> list[bool]:
        blocker = FaultBlocker(MemoryBlocker(), FaultPlan(seed=seed, error_rate=0.3, error=StoreError))
        failed = []
        for number in range(200):
            try:
                blocker.put(f"pack/{number}", b"")
                failed.append(False)
            except StoreError:
                failed.append(True)
        return failed

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert 30 < sum(run(1)) < 90


def test_delay() -> None:
    blocker = FaultBlocker(MemoryBlocker(), FaultPlan(delay_s=0.02))
    begin_s = time.monotonic()
    blocker.put("pack/a", b"")
    assert time.monotonic() - begin_s >= 0.02


def test_no_way_around() -> None:
    assert FaultBlocker(MemoryBlocker()).create_data("layer/a").fileno() is None


# Power loss


def lose(
    change: Callable[[FaultBlocker], object], seed: int, prepare: Callable[[MemoryBlocker], object] | None = None
) -> MemoryBlocker:
    store = MemoryBlocker()
    data = store.create_data("layer/a")
    data.pwrite(0, OLD * 4)
    if prepare:
        prepare(store)
    blocker = FaultBlocker(store)
    change(blocker)
    blocker.power_loss(seed)
    with pytest.raises(SimulatedCrash):
        blocker.get_record("volume/a")
    return store


def sectors(store: MemoryBlocker, count: int = 4) -> str:
    data = store.open_data("layer/a", writable=False)
    names = {OLD: "o", NEW: "n", bytes(SECTOR_BYTES): "0"}
    return "".join(names[data.pread(number * SECTOR_BYTES, SECTOR_BYTES)] for number in range(count))


def test_power_loss_keeps_each_sector_old_or_new() -> None:
    def change(blocker: FaultBlocker) -> None:
        blocker.open_data("layer/a", writable=True).pwrite(SECTOR_BYTES, NEW * 2)

    assert {sectors(lose(change, seed)) for seed in range(100)} == {"oooo", "onoo", "oono", "onno"}


def test_power_loss_after_flush_loses_nothing() -> None:
    def change(blocker: FaultBlocker) -> None:
        data = blocker.open_data("layer/a", writable=True)
        data.pwrite(0, NEW * 2)
        data.flush()
        data.pwrite(SECTOR_BYTES, OLD)

    assert {sectors(lose(change, seed)) for seed in range(50)} == {"nnoo", "nooo"}


def test_power_loss_goes_back_to_the_flush_not_to_the_last_write() -> None:
    def change(blocker: FaultBlocker) -> None:
        data = blocker.open_data("layer/a", writable=True)
        data.pwrite(0, bytes(SECTOR_BYTES))
        data.pwrite(0, NEW)

    assert {sectors(lose(change, seed)) for seed in range(50)} == {"oooo", "nooo"}


def test_a_flush_counts_for_all_who_have_it_open() -> None:
    def change(blocker: FaultBlocker) -> None:
        first = blocker.open_data("layer/a", writable=True)
        second = blocker.open_data("layer/a", writable=True)
        first.pwrite(0, NEW)
        second.flush()
        second.pwrite(SECTOR_BYTES, NEW)
        first.close()

    assert {sectors(lose(change, seed)) for seed in range(50)} == {"nooo", "nnoo"}


def test_a_flush_that_failed_makes_nothing_durable() -> None:
    store = MemoryBlocker()
    store.create_data("layer/a").pwrite(0, OLD * 4)
    found = set()
    for seed in range(50):
        blocker = FaultBlocker(store, FaultPlan(error_at=2))
        data = blocker.open_data("layer/a", writable=True)
        data.pwrite(0, NEW)
        with pytest.raises(StoreUnavailable):
            data.flush()
        blocker.power_loss(seed)
        found.add(sectors(store))
        store.open_data("layer/a", writable=True).pwrite(0, OLD)
    assert found == {"oooo", "nooo"}


def test_power_loss_of_a_punch() -> None:
    def change(blocker: FaultBlocker) -> None:
        blocker.open_data("layer/a", writable=True).punch(SECTOR_BYTES, 2 * SECTOR_BYTES)

    assert {sectors(lose(change, seed)) for seed in range(100)} == {"oooo", "o0oo", "oo0o", "o00o"}


def test_power_loss_of_truncate() -> None:
    def change(blocker: FaultBlocker) -> None:
        blocker.open_data("layer/a", writable=True).truncate(2 * SECTOR_BYTES)

    found = {
        (sectors(store), store.open_data("layer/a", writable=False).size() // SECTOR_BYTES)
        for store in (lose(change, seed) for seed in range(200))
    }
    assert found == {("oo00", 2), ("oooo", 4), ("oo0o", 4), ("ooo0", 4), ("oo00", 4)}


def test_power_loss_of_growing() -> None:
    def change(blocker: FaultBlocker) -> None:
        blocker.open_data("layer/a", writable=True).pwrite(5 * SECTOR_BYTES, NEW)

    found = {
        (sectors(store, 6), store.open_data("layer/a", writable=False).size() // SECTOR_BYTES)
        for store in (lose(change, seed) for seed in range(200))
    }
    assert found == {("oooo00", 4), ("oooo0n", 6), ("oooo00", 6)}


def test_power_loss_of_a_far_hole_is_quick() -> None:
    def change(blocker: FaultBlocker) -> None:
        data = blocker.open_data("layer/a", writable=True)
        data.truncate(1 << 40)
        data.punch(0, 1 << 40)

    assert {sectors(lose(change, seed)) for seed in range(200)} > {"oooo", "0000"}


def test_holes_come_back_as_holes() -> None:
    def change(blocker: FaultBlocker) -> None:
        data = blocker.open_data("layer/a", writable=True)
        data.pwrite(8 * SECTOR_BYTES, NEW)

    allocated = {lose(change, seed).open_data("layer/a", writable=False).allocated() for seed in range(50)}
    assert allocated == {4 * SECTOR_BYTES, 5 * SECTOR_BYTES}


def test_power_loss_leaves_records_and_objects() -> None:
    def change(blocker: FaultBlocker) -> None:
        blocker.put("pack/a", b"x")
        blocker.put_record("volume/a", b"x", None)
        blocker.create_data("layer/b")

    for seed in range(10):
        store = lose(change, seed)
        assert store.get("pack/a") == b"x"
        assert store.get_record("volume/a") is not None
        assert store.open_data("layer/b", writable=False).size() == 0


def test_power_loss_of_a_deleted_object() -> None:
    def change(blocker: FaultBlocker) -> None:
        data = blocker.open_data("layer/a", writable=True)
        data.pwrite(0, NEW)
        blocker.delete_data("layer/a")
        data.pwrite(0, NEW)

    with pytest.raises(ObjectMissing):
        lose(change, 1).open_data("layer/a", writable=False)
