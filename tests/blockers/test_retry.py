"""The retry wrapper: transparent where nothing fails, and right where an answer was lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from archipfs.blockers.contract import Blocker, DataObject, Record
from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment
from archipfs.blockers.file import FileBlocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.blockers.retry import RetryBlocker, RetryPolicy
from archipfs.errors import AlreadyExists, Conflict, StoreAway, StoreError, StoreFull, StoreUnavailable
from tests.blockers.conformance import Conformance, Store


def no_sleep(_: float) -> None:
    return


AT_ONCE = RetryPolicy(sleep=no_sleep)


class TestRetryOverFile(Conformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        FileBlocker.create(tmp_path).close()
        return Store(lambda: RetryBlocker(FileBlocker(tmp_path)))


def faulty(store: Blocker, plan: FaultPlan) -> RetryBlocker:
    return RetryBlocker(FaultBlocker(store, plan), AT_ONCE)


def every_call(blocker: Blocker) -> Iterator[object]:
    """All but ``flush``."""
    blocker.put("pack/a", b"abc")
    yield blocker.get("pack/a", 1)
    yield blocker.exists("pack/a")
    yield list(blocker.list("pack"))
    opened = blocker.open("pack/a")
    yield opened.pread(1, 2), opened.size()
    blocker.delete("pack/a")
    yield list(blocker.list("pack"))
    data = blocker.create_data("layer/a")
    data.pwrite(0, b"x" * 10_000)
    data.truncate(9_000)
    data.punch(0, 5_000)
    yield data.pread(4_998, 5)
    yield data.size(), data.allocated(), data.next_data(0), data.next_hole(5_000)
    yield blocker.open_data("layer/a", writable=False).pread(8_999, 2)
    yield list(blocker.list_data("layer"))
    blocker.delete_data("layer/a")
    yield list(blocker.list_data("layer"))
    first = blocker.put_record("volume/a", b"1", None)
    second = blocker.put_record("volume/a", b"2", first)
    yield blocker.get_record("volume/a")
    yield list(blocker.list_records("volume"))
    blocker.delete_record("volume/a", second)
    yield blocker.get_record("volume/a")
    yield blocker.space()


@pytest.mark.parametrize("moment", list(Moment))
def test_one_fault_anywhere_goes_unseen(moment: Moment) -> None:
    expected = list(every_call(MemoryBlocker()))
    number = 0
    while True:
        number += 1
        inner = FaultBlocker(MemoryBlocker(), FaultPlan(seed=number, count_reads=True, error_at=number, moment=moment))
        assert list(every_call(RetryBlocker(inner, AT_ONCE))) == expected
        if inner.calls < number:
            break
    assert number > 20


@pytest.mark.parametrize("seed", range(20))
def test_many_faults_go_unseen(seed: int) -> None:
    plan = FaultPlan(seed=seed, count_reads=True, error_rate=0.2, moment=Moment.TORN)
    assert list(every_call(faulty(MemoryBlocker(), plan))) == list(every_call(MemoryBlocker()))


def test_flush_is_never_repeated() -> None:
    inner = FaultBlocker(MemoryBlocker(), FaultPlan(error_at=3))
    data = RetryBlocker(inner, AT_ONCE).create_data("layer/a")
    data.pwrite(0, b"x")
    with pytest.raises(StoreUnavailable):
        data.flush()
    assert inner.calls == 3


@pytest.mark.parametrize("error", [StoreError, StoreFull, StoreAway])
def test_only_what_may_help_is_repeated(error: type[StoreError]) -> None:
    inner = FaultBlocker(MemoryBlocker(), FaultPlan(error_at=1, error=error))
    with pytest.raises(error):
        RetryBlocker(inner, AT_ONCE).put("pack/a", b"x")
    assert inner.calls == 1


def test_pauses_double_and_end() -> None:
    pauses: list[float] = []
    policy = RetryPolicy(attempts=6, delay_s=1, delay_max_s=5, time_limit_s=1000, sleep=pauses.append)
    inner = FaultBlocker(MemoryBlocker(), FaultPlan(error_rate=1))
    with pytest.raises(StoreUnavailable):
        RetryBlocker(inner, policy).put("pack/a", b"x")
    assert pauses == [1, 2, 4, 5, 5]
    assert inner.calls == 6


def test_time_limit() -> None:
    now_s = [0.0]

    def sleep(pause_s: float) -> None:
        now_s[0] += pause_s

    policy = RetryPolicy(attempts=100, delay_s=1, delay_max_s=8, time_limit_s=20, sleep=sleep, clock=lambda: now_s[0])
    with pytest.raises(StoreUnavailable):
        RetryBlocker(FaultBlocker(MemoryBlocker(), FaultPlan(error_rate=1)), policy).put("pack/a", b"x")
    assert 10 <= now_s[0] <= 20


class Overtaken(FaultBlocker):
    """Loses the answer of the first ``put_record``; then somebody else acts, before the caller can look."""

    def __init__(self, store: MemoryBlocker, moment: Moment, *, then: str) -> None:
        super().__init__(store, FaultPlan(error_at=1, moment=moment))
        self._store = store
        self._then = then

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        try:
            return super().put_record(key, value, expected)
        except StoreUnavailable:
            found = self._store.get_record(key)
            if self._then == "replace":
                self._store.put_record(key, b"theirs", found.version if found else None)
            elif found is not None:
                self._store.delete_record(key, found.version)
            raise


@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
@pytest.mark.parametrize("created", [False, True])
def test_overtaken_is_a_conflict(moment: Moment, created: bool) -> None:
    store = MemoryBlocker()
    expected = None if created else store.put_record("volume/a", b"old", None)
    with pytest.raises(Conflict):
        RetryBlocker(Overtaken(store, moment, then="replace"), AT_ONCE).put_record("volume/a", b"ours", expected)
    found = store.get_record("volume/a")
    assert found is not None
    assert found.value == b"theirs"


def test_deleted_meanwhile_is_a_conflict() -> None:
    store = MemoryBlocker()
    version = store.put_record("volume/a", b"old", None)
    with pytest.raises(Conflict):
        RetryBlocker(Overtaken(store, Moment.AFTER, then="delete"), AT_ONCE).put_record("volume/a", b"ours", version)
    assert store.get_record("volume/a") is None


class Late(MemoryBlocker):
    """The first ``put_record`` times out and takes effect only when the second one arrives."""

    def __init__(self) -> None:
        super().__init__()
        self._late: tuple[str, bytes, int | None] | None = None

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        if self._late is None:
            self._late = (key, value, expected)
            raise StoreUnavailable("timed out; try again")
        super().put_record(*self._late)
        return super().put_record(key, value, expected)


def test_an_effect_that_comes_late_is_ours() -> None:
    store = Late()
    assert RetryBlocker(store, AT_ONCE).put_record("volume/a", b"ours", None) == 1
    assert store.get_record("volume/a") == Record(b"ours", 1)


def test_a_first_conflict_is_a_conflict_even_with_our_value() -> None:
    store = MemoryBlocker()
    store.put_record("volume/a", b"ours", None)
    with pytest.raises(Conflict):
        RetryBlocker(store, AT_ONCE).put_record("volume/a", b"ours", None)


def test_create_data_that_exists() -> None:
    store = MemoryBlocker()
    store.create_data("layer/a").pwrite(0, b"x")
    with pytest.raises(AlreadyExists):
        RetryBlocker(store, AT_ONCE).create_data("layer/a")
    with pytest.raises(AlreadyExists):
        faulty(store, FaultPlan(error_at=1)).create_data("layer/a")
    data = faulty(store, FaultPlan(error_at=1, moment=Moment.AFTER)).create_data("layer/b")
    assert isinstance(data, DataObject)
    assert data.size() == 0


def test_passes_through(tmp_path: Path) -> None:
    blocker = RetryBlocker(FileBlocker.create(tmp_path))
    data = blocker.create_data("layer/a")
    assert data.fileno() is not None
    data.close()
    assert blocker.describe() == str(tmp_path)
    blocker.close()
