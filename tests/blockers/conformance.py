"""What every driver must do: each sentence of the contract, as a test.

A driver's test module subclasses :class:`Conformance` and gives the fixture ``store``.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from archipfs.blockers.contract import KEY_BYTES_MAX, Blocker, VersionPaths
from archipfs.errors import AlreadyExists, Conflict, InvalidInput, ObjectMissing, StoreError, TooLarge
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX

BAD_KEYS = [
    "",
    "pack",
    "pack/",
    "/a",
    "pack//a",
    "pack/a/b",
    "Pack/a",
    "pack/A",
    "pack/a b",
    "pack/.a",
    "../a",
    "pack/..",
    "pack/a\n",
    "pack/a\0",
    "pack/ä",
    "pack/a_b",
    "pack/" + "a" * KEY_BYTES_MAX,
]


@dataclass
class Store:
    """A store, and how to open it once more, as another process would."""

    open: Callable[[], Blocker]


@dataclass
class History:
    """What one writer of a record did: the versions it made, and those it replaced."""

    made: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)


def churn(blocker: Blocker, key: str, rounds: int, seed: int) -> History:
    """Create, replace and delete one record over and over, beside others who do the same."""
    draw = random.Random(seed)
    history = History()
    for number in range(rounds):
        found = blocker.get_record(key)
        expected = found.version if found else None
        try:
            if found is not None and draw.random() < 0.3:
                blocker.delete_record(key, found.version)
                # Not counted as used: of two who delete the same version, both succeed.
                continue
            history.made.append(blocker.put_record(key, b"%d %d" % (seed, number), expected))
        except Conflict:
            continue
        if expected is not None:
            history.used.append(expected)
    return history


def run_threads(actions: list[Callable[[], None]]) -> None:
    """Run all at once; the first error of any is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], None]) -> None:
        try:
            barrier.wait()
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def stands(paths: VersionPaths) -> bool:
    """Whether the record is still at that version, as C code sees it."""
    return not os.path.exists(paths.following) and os.path.exists(paths.present)


class Conformance:
    """Needs a fixture ``store`` that gives a fresh :class:`Store`."""

    @pytest.fixture
    def blocker(self, store: Store) -> Iterator[Blocker]:
        blocker = store.open()
        yield blocker
        blocker.close()

    # Keys

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys(self, blocker: Blocker, key: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: blocker.put(key, b""),
            lambda: blocker.get(key),
            lambda: blocker.open(key),
            lambda: blocker.exists(key),
            lambda: blocker.delete(key),
            lambda: blocker.create_data(key),
            lambda: blocker.open_data(key, writable=False),
            lambda: blocker.delete_data(key),
            lambda: blocker.get_record(key),
            lambda: blocker.put_record(key, b"", None),
            lambda: blocker.delete_record(key, 1),
        ]
        for call in calls:
            with pytest.raises(InvalidInput):
                call()

    @pytest.mark.parametrize("kind", ["", "..", "a/b", "A", "a\n"])
    def test_bad_kinds(self, blocker: Blocker, kind: str) -> None:
        for call in (blocker.list, blocker.list_data, blocker.list_records):
            with pytest.raises(InvalidInput):
                list(call(kind))

    def test_the_longest_key(self, blocker: Blocker) -> None:
        key = "pack/" + "a" * (KEY_BYTES_MAX - 5)
        blocker.put(key, b"x")
        blocker.create_data(key).close()
        version = blocker.put_record(key, b"x", None)
        blocker.put_record(key, b"y", version)
        assert list(blocker.list("pack")) == list(blocker.list_data("pack")) == [key]
        assert [found for found, _ in blocker.list_records("pack")] == [key]

    # Immutable objects

    def test_object_round_trip(self, blocker: Blocker, store: Store) -> None:
        data = random.Random(1).randbytes(100_000)
        blocker.put("pack/a-1.b", data)
        for reader in (blocker, store.open()):
            assert reader.exists("pack/a-1.b")
            assert reader.get("pack/a-1.b") == data
            assert reader.get("pack/a-1.b", 99_000) == data[99_000:]
            assert reader.get("pack/a-1.b", 4096, 100) == data[4096:4196]
            assert reader.get("pack/a-1.b", 99_999, 100) == data[-1:]
            assert reader.get("pack/a-1.b", 100_000, 100) == b""
            assert reader.get("pack/a-1.b", 200_000) == b""
            assert reader.get("pack/a-1.b", 5, 0) == b""

    def test_object_in_pieces(self, blocker: Blocker) -> None:
        pieces = [random.Random(number).randbytes(number % 7) for number in range(5000)]
        pieces[1] = random.Random(1).randbytes(300_000)
        blocker.put("pack/a", pieces)
        assert blocker.get("pack/a") == b"".join(pieces)
        blocker.put("pack/b", [])
        assert blocker.get("pack/b") == b""

    def test_empty_object(self, blocker: Blocker) -> None:
        blocker.put("pack/a", b"")
        assert blocker.exists("pack/a")
        assert blocker.get("pack/a") == b""

    def test_object_range_must_be_one(self, blocker: Blocker) -> None:
        blocker.put("pack/a", b"abc")
        with pytest.raises(InvalidInput):
            blocker.get("pack/a", -1)
        with pytest.raises(InvalidInput):
            blocker.get("pack/a", 0, -1)

    def test_put_again_succeeds(self, blocker: Blocker) -> None:
        blocker.put("pack/a", b"abc")
        blocker.put("pack/a", b"abc")
        assert blocker.get("pack/a") == b"abc"
        assert list(blocker.list("pack")) == ["pack/a"]

    def test_put_by_many_at_once(self, blocker: Blocker) -> None:
        data = bytes(200_000)
        run_threads([lambda: blocker.put("pack/a", data)] * 8)
        assert blocker.get("pack/a") == data
        assert list(blocker.list("pack")) == ["pack/a"]

    def test_missing_object(self, blocker: Blocker) -> None:
        assert not blocker.exists("pack/a")
        with pytest.raises(ObjectMissing):
            blocker.get("pack/a")
        blocker.delete("pack/a")
        blocker.put("pack/b", b"")
        with pytest.raises(ObjectMissing):
            blocker.get("pack/a")

    def test_delete_object(self, blocker: Blocker, store: Store) -> None:
        blocker.put("pack/a", b"abc")
        blocker.put("pack/b", b"abc")
        blocker.delete("pack/a")
        blocker.delete("pack/a")
        assert not store.open().exists("pack/a")
        assert list(store.open().list("pack")) == ["pack/b"]

    def test_open_object_reads_ranges(self, blocker: Blocker) -> None:
        content = random.Random(2).randbytes(100_000)
        blocker.put("pack/a", content)
        data = blocker.open("pack/a")
        try:
            assert data.size() == 100_000
            assert data.pread(0, 100_000) == content
            assert data.pread(4_097, 50_000) == content[4_097:54_097]
            assert data.pread(99_990, 20) == content[99_990:] + bytes(10)
            assert data.pread(200_000, 3) == bytes(3)
            assert data.pread(5, 0) == b""
            with pytest.raises(InvalidInput):
                data.pread(-1, 1)
            fd = data.fileno()
            if fd is not None:
                assert os.pread(fd, 200_000, 0) == content
        finally:
            data.close()
        assert data.fileno() is None
        with pytest.raises(StoreError):
            data.pread(0, 1)

    def test_open_object_that_is_empty(self, blocker: Blocker) -> None:
        blocker.put("pack/a", b"")
        data = blocker.open("pack/a")
        assert data.size() == 0
        assert data.pread(0, 2) == bytes(2)
        data.close()

    def test_open_object_never_changes(self, blocker: Blocker) -> None:
        blocker.put("pack/a", b"abc")
        data = blocker.open("pack/a")
        for change in (lambda: data.pwrite(0, b"x"), lambda: data.truncate(0), lambda: data.punch(0, 2)):
            with pytest.raises(StoreError):
                change()
        assert data.pread(0, 3) == b"abc"
        assert blocker.get("pack/a") == b"abc"
        data.close()

    def test_open_object_that_is_missing(self, blocker: Blocker) -> None:
        blocker.create_data("pack/a").close()
        with pytest.raises(ObjectMissing):
            blocker.open("pack/a")

    def test_open_object_that_is_deleted_is_what_it_was_or_missing(self, blocker: Blocker) -> None:
        content = b"abc" * 5_000
        blocker.put("pack/a", content)
        data = blocker.open("pack/a")
        blocker.delete("pack/a")
        try:
            assert data.pread(0, 15_000) == content
        except ObjectMissing:
            assert not blocker.exists("pack/a")
        with pytest.raises(ObjectMissing):
            blocker.open("pack/a")
        data.close()

    def test_pack_bytes_is_a_size(self, blocker: Blocker) -> None:
        assert blocker.pack_bytes >= SECTOR_BYTES

    def test_list_objects(self, blocker: Blocker) -> None:
        keys = {f"pack/{number:x}" for number in range(300)}
        for key in keys:
            blocker.put(key, b"x")
        blocker.put("page/1", b"x")
        blocker.put("pac/1", b"x")
        found = list(blocker.list("pack"))
        assert len(found) == 300
        assert set(found) == keys
        assert list(blocker.list("none")) == []

    def test_list_objects_while_changing(self, blocker: Blocker) -> None:
        kept = {f"pack/k{number}" for number in range(20)}
        for key in kept:
            blocker.put(key, b"x")
        for number in range(20):
            blocker.put(f"pack/d{number}", b"x")
        found = []
        for number, key in enumerate(blocker.list("pack")):
            found.append(key)
            if number < 20:
                blocker.delete(f"pack/d{number}")
        assert kept <= set(found)
        assert len(set(found)) == len(found)

    # Data objects

    def test_data_round_trip(self, blocker: Blocker, store: Store) -> None:
        with_data = blocker.create_data("layer/a")
        assert with_data.size() == 0
        with_data.pwrite(5000, b"hello")
        with_data.flush()
        assert with_data.size() == 5005
        other = store.open().open_data("layer/a", writable=False)
        assert other.pread(4998, 9) == b"\0\0hello\0\0"
        assert other.size() == 5005
        with_data.pwrite(5000, b"j")
        assert other.pread(5000, 5) == b"jello"
        with_data.close()
        other.close()

    def test_data_takes_any_buffer(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")
        data.pwrite(0, b"ab")
        data.pwrite(2, bytearray(b"cd"))
        data.pwrite(4, memoryview(b"xefx")[1:3])
        data.pwrite(6, b"")
        assert data.pread(0, 6) == b"abcdef"
        assert data.size() == 6
        data.pwrite(100, b"")
        assert data.size() == 6

    def test_empty_data_is_durable(self, blocker: Blocker, store: Store) -> None:
        blocker.create_data("layer/a").close()
        data = store.open().open_data("layer/a", writable=True)
        assert data.size() == 0
        assert data.pread(0, 10) == bytes(10)
        assert data.pread(0, 0) == b""
        assert data.next_data(0) is None
        assert data.next_hole(0) == 0
        assert data.allocated() == 0

    def test_data_exists_already(self, blocker: Blocker) -> None:
        blocker.create_data("layer/a").pwrite(0, b"x")
        with pytest.raises(AlreadyExists):
            blocker.create_data("layer/a")
        assert blocker.open_data("layer/a", writable=False).pread(0, 1) == b"x"

    def test_create_data_by_many_at_once(self, blocker: Blocker) -> None:
        won = []

        def create() -> None:
            try:
                won.append(blocker.create_data("layer/a"))
            except AlreadyExists:
                return

        run_threads([create] * 8)
        assert len(won) == 1

    def test_missing_data(self, blocker: Blocker) -> None:
        for writable in (False, True):
            with pytest.raises(ObjectMissing):
                blocker.open_data("layer/a", writable=writable)
        blocker.delete_data("layer/a")

    def test_delete_data_that_is_open_is_what_it_was_or_missing(self, blocker: Blocker, store: Store) -> None:
        data = blocker.create_data("layer/a")
        data.pwrite(0, b"abc")
        blocker.delete_data("layer/a")
        blocker.delete_data("layer/a")
        with pytest.raises(ObjectMissing):
            store.open().open_data("layer/a", writable=False)
        try:
            assert data.pread(0, 5) == b"abc\0\0"
        except ObjectMissing:
            with pytest.raises(ObjectMissing):
                data.size()

    def test_list_data(self, blocker: Blocker) -> None:
        for number in range(30):
            blocker.create_data(f"layer/{number}").close()
        blocker.create_data("bitmap/1").close()
        assert set(blocker.list_data("layer")) == {f"layer/{number}" for number in range(30)}
        assert list(blocker.list_data("none")) == []

    def test_kinds_of_things_are_apart(self, blocker: Blocker) -> None:
        blocker.put("a/1", b"object")
        blocker.create_data("a/1").pwrite(0, b"data")
        blocker.put_record("a/1", b"record", None)
        blocker.delete("a/1")
        assert blocker.open_data("a/1", writable=False).pread(0, 4) == b"data"
        record = blocker.get_record("a/1")
        assert record is not None
        assert record.value == b"record"

    def test_data_read_only(self, blocker: Blocker) -> None:
        blocker.create_data("layer/a").pwrite(0, b"abc")
        data = blocker.open_data("layer/a", writable=False)
        with pytest.raises(StoreError):
            data.pwrite(0, b"x")
        with pytest.raises(StoreError):
            data.truncate(0)
        with pytest.raises(StoreError):
            data.punch(0, 2)
        assert data.pread(0, 3) == b"abc"

    def test_data_closed(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")
        data.close()
        data.close()
        assert data.fileno() is None
        for call in (data.size, data.flush, lambda: data.pread(0, 1), lambda: data.pwrite(0, b"x")):
            with pytest.raises(StoreError):
                call()

    def test_data_ranges_must_be_ranges(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")
        calls: list[Callable[[], object]] = [
            lambda: data.pread(-1, 1),
            lambda: data.pread(0, -1),
            lambda: data.pwrite(-1, b"x"),
            lambda: data.punch(-1, 1),
            lambda: data.punch(0, -1),
            lambda: data.truncate(-1),
            lambda: data.next_data(-1),
            lambda: data.next_hole(-1),
        ]
        for call in calls:
            with pytest.raises(InvalidInput):
                call()

    def test_truncate(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")
        data.pwrite(0, b"x" * 10_000)
        data.truncate(5_000)
        assert data.size() == 5_000
        assert data.pread(4_990, 20) == b"x" * 10 + bytes(10)
        data.truncate(10_000)
        assert data.size() == 10_000
        assert data.pread(4_990, 5_010) == b"x" * 10 + bytes(5_000)

    def test_punch(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")
        data.pwrite(0, b"x" * 10 * SECTOR_BYTES)
        data.flush()
        full = data.allocated()
        data.punch(SECTOR_BYTES + 100, 4 * SECTOR_BYTES)
        data.flush()
        assert data.size() == 10 * SECTOR_BYTES
        model = bytearray(b"x" * 10 * SECTOR_BYTES)
        model[SECTOR_BYTES + 100 : 5 * SECTOR_BYTES + 100] = bytes(4 * SECTOR_BYTES)
        assert data.pread(0, 10 * SECTOR_BYTES) == model
        assert data.allocated() <= full

    def test_punch_never_changes_the_size(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")
        data.punch(0, 100_000)
        assert data.size() == 0
        data.pwrite(0, b"x" * 10_000)
        data.punch(9_000, 100_000)
        data.punch(50_000, 100_000)
        data.punch(0, 0)
        assert data.size() == 10_000
        assert data.pread(8_990, 1_010) == b"x" * 10 + bytes(1_000)

    def test_holes(self, blocker: Blocker) -> None:
        """A driver that cannot know may call all of it data, but never the other way round."""
        data = blocker.create_data("layer/a")
        data.pwrite(1 << 20, b"x" * SECTOR_BYTES)
        data.truncate(2 << 20)
        data.flush()
        found = data.next_data(0)
        assert found is not None
        assert found <= 1 << 20
        assert data.next_hole(1 << 20) >= (1 << 20) + SECTOR_BYTES
        assert data.next_data((1 << 20) + 10) == (1 << 20) + 10
        assert data.next_hole(0) in (0, 2 << 20)
        for past in (2 << 20, 3 << 20):
            assert data.next_data(past) is None
            assert data.next_hole(past) == past

    def test_far_offsets(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")
        data.pwrite(1 << 40, b"far")
        assert data.size() == (1 << 40) + 3
        assert data.pread((1 << 40) - 2, 8) == b"\0\0far\0\0\0"
        assert data.allocated() < 10 << 20
        data.punch(0, 2 << 40)
        assert data.pread(1 << 40, 3) == bytes(3)
        data.truncate(1)
        assert data.size() == 1

    def test_data_bytes_max(self, blocker: Blocker) -> None:
        assert SECTOR_BYTES <= blocker.data_bytes_max <= VOLUME_BYTES_MAX
        assert blocker.data_bytes_max == blocker.data_bytes_max
        data = blocker.create_data("layer/a")
        data.truncate(blocker.data_bytes_max)
        assert data.size() == blocker.data_bytes_max
        data.pwrite(blocker.data_bytes_max - 1, b"x")
        with suppress(TooLarge):
            data.truncate((1 << 63) - 1)
        with suppress(TooLarge):
            data.pwrite((1 << 63) - 2, b"x")

    def test_data_of_many_threads(self, blocker: Blocker) -> None:
        data = blocker.create_data("layer/a")

        def fill(number: int) -> None:
            for sector in range(number, 200, 4):
                data.pwrite(sector * SECTOR_BYTES, bytes([number + 1]) * SECTOR_BYTES)
                assert data.pread(sector * SECTOR_BYTES, SECTOR_BYTES) == bytes([number + 1]) * SECTOR_BYTES

        run_threads([lambda number=number: fill(number) for number in range(4)])  # type: ignore[misc]
        for sector in range(200):
            assert data.pread(sector * SECTOR_BYTES, 1) == bytes([sector % 4 + 1])

    # Records

    @pytest.mark.parametrize("value", [b"", b"x", b"-", b"=", b"x" * 65_535, b"x" * 65_536, b"x" * 300_000])
    def test_record_round_trip(self, blocker: Blocker, store: Store, value: bytes) -> None:
        assert blocker.get_record("volume/a") is None
        first = blocker.put_record("volume/a", value, None)
        second = blocker.put_record("volume/a", value + b"2", first)
        assert second > first
        found = store.open().get_record("volume/a")
        assert found is not None
        assert (found.value, found.version) == (value + b"2", second)
        third = blocker.put_record("volume/a", value, second)
        assert dict(store.open().list_records("volume")) == {"volume/a": blocker.get_record("volume/a")}
        assert third > second

    def test_record_conflicts_change_nothing(self, blocker: Blocker) -> None:
        with pytest.raises(Conflict):
            blocker.put_record("volume/a", b"x", 1)
        assert blocker.get_record("volume/a") is None
        first = blocker.put_record("volume/a", b"1", None)
        second = blocker.put_record("volume/a", b"2", first)
        before = blocker.get_record("volume/a")
        for expected in (None, first, first - 1, second + 1, 0):
            with pytest.raises(Conflict):
                blocker.put_record("volume/a", b"x", expected)
        for expected in (first, first - 1, second + 1, 0):
            with pytest.raises(Conflict):
                blocker.delete_record("volume/a", expected)
        assert blocker.get_record("volume/a") == before

    def test_version_paths_tell_of_every_change(self, blocker: Blocker, store: Store) -> None:
        first = blocker.put_record("lock/a", b"1", None)
        paths = blocker.version_paths("lock/a", first)
        if paths is None:
            return  # a driver without files
        assert stands(paths)
        other = store.open()
        second = other.put_record("lock/a", b"2", first)
        assert not stands(paths)
        later = blocker.version_paths("lock/a", second)
        assert later is not None
        assert stands(later)
        other.put_record("lock/a", b"3", second)
        assert not stands(paths)
        assert not stands(later)

    def test_version_paths_tell_of_a_delete_and_a_new_life(self, blocker: Blocker, store: Store) -> None:
        version = blocker.put_record("lock/a", b"1", None)
        paths = blocker.version_paths("lock/a", version)
        if paths is None:
            return
        other = store.open()
        other.delete_record("lock/a", version)
        assert not stands(paths)
        other.put_record("lock/a", b"1", None)
        assert not stands(paths)

    def test_delete_record(self, blocker: Blocker, store: Store) -> None:
        blocker.delete_record("volume/a", 1)
        version = blocker.put_record("volume/a", b"1", None)
        blocker.delete_record("volume/a", version)
        blocker.delete_record("volume/a", version)
        other = store.open()
        assert other.get_record("volume/a") is None
        assert list(other.list_records("volume")) == []
        for expected in (version, version + 1, version + 2):
            with pytest.raises(Conflict):
                other.put_record("volume/a", b"x", expected)

    def test_versions_are_never_used_twice(self, blocker: Blocker) -> None:
        seen = [0]
        for _ in range(5):
            version = None
            for _ in range(4):
                version = blocker.put_record("volume/a", b"x", version)
                assert version > seen[-1]
                seen.append(version)
            assert version is not None
            blocker.delete_record("volume/a", version)

    def test_list_records(self, blocker: Blocker) -> None:
        for number in range(50):
            version = blocker.put_record(f"volume/{number}", b"old", None)
            if number % 3 == 0:
                blocker.put_record(f"volume/{number}", b"%d" % number, version)
            elif number % 3 == 1:
                blocker.delete_record(f"volume/{number}", version)
        blocker.put_record("lock/1", b"x", None)
        found = list(blocker.list_records("volume"))
        assert {key: record.value for key, record in found} == {
            f"volume/{number}": b"%d" % number if number % 3 == 0 else b"old" for number in range(50) if number % 3 != 1
        }
        assert all(blocker.get_record(key) == record for key, record in found)
        assert list(blocker.list_records("none")) == []

    def test_list_records_while_changing(self, blocker: Blocker) -> None:
        stop = threading.Event()
        for number in range(10):
            blocker.put_record(f"volume/k{number}", b"kept", None)

        def change() -> None:
            version = blocker.put_record("volume/moving", b"x", None)
            while not stop.is_set():
                version = blocker.put_record("volume/moving", b"x", version)
                passing = blocker.put_record("volume/passing", b"x", None)
                blocker.delete_record("volume/passing", passing)

        def read() -> None:
            try:
                for _ in range(60):
                    found = [key for key, _ in blocker.list_records("volume")]
                    assert len(set(found)) == len(found)
                    assert {f"volume/k{number}" for number in range(10)} <= set(found)
            finally:
                stop.set()

        run_threads([change, read])

    def test_one_creator_wins(self, blocker: Blocker) -> None:
        for _ in range(5):
            won: list[int] = []

            def create(won: list[int] = won) -> None:
                try:
                    won.append(blocker.put_record("volume/a", b"x", None))
                except Conflict:
                    return

            run_threads([create] * 6)
            assert len(won) == 1
            blocker.delete_record("volume/a", won[0])

    def test_one_writer_wins(self, blocker: Blocker) -> None:
        version = blocker.put_record("volume/a", b"x", None)
        for _ in range(10):
            won: list[tuple[int, bytes]] = []

            def write(value: bytes, expected: int, won: list[tuple[int, bytes]] = won) -> None:
                try:
                    won.append((blocker.put_record("volume/a", value, expected), value))
                except Conflict:
                    return

            run_threads([lambda n=n, v=version: write(b"%d" % n, v) for n in range(6)])  # type: ignore[misc]
            assert len(won) == 1
            found = blocker.get_record("volume/a")
            assert found is not None
            assert (found.version, found.value) == won[0]
            version = found.version

    def test_increments_are_not_lost(self, blocker: Blocker, store: Store) -> None:
        blocker.put_record("counter/a", b"0", None)

        def add(each: Blocker) -> None:
            for _ in range(20):
                while True:
                    found = each.get_record("counter/a")
                    assert found is not None, "a record that is only replaced is never absent"
                    try:
                        each.put_record("counter/a", b"%d" % (int(found.value) + 1), found.version)
                        break
                    except Conflict:
                        continue

        others = [store.open() for _ in range(4)]
        run_threads([lambda each=each: add(each) for each in others])  # type: ignore[misc]
        found = blocker.get_record("counter/a")
        assert found is not None
        assert found.value == b"80"

    def test_create_replace_delete_by_many_at_once(self, blocker: Blocker, store: Store) -> None:
        histories: list[History] = []
        others = [store.open() for _ in range(4)]
        run_threads(
            [
                lambda each=each, seed=seed: histories.append(churn(each, "volume/a", 40, seed))  # type: ignore[misc]
                for seed, each in enumerate(others)
            ]
        )
        check_churn(histories, blocker, "volume/a")

    # The whole

    def test_space(self, blocker: Blocker) -> None:
        space = blocker.space()
        assert 0 <= space.available_bytes <= space.free_bytes <= space.total_bytes

    def test_describe(self, blocker: Blocker) -> None:
        assert blocker.describe()
        assert "\n" not in blocker.describe()

    def test_reopen_finds_everything(self, store: Store) -> None:
        first = store.open()
        first.put("pack/a", b"object")
        data = first.create_data("layer/a")
        data.pwrite(0, b"data")
        data.flush()
        data.close()
        version = first.put_record("volume/a", b"record", None)
        first.close()
        second = store.open()
        assert second.get("pack/a") == b"object"
        assert second.open_data("layer/a", writable=False).pread(0, 4) == b"data"
        record = second.get_record("volume/a")
        assert record is not None
        assert (record.value, record.version) == (b"record", version)


def check_churn(histories: list[History], blocker: Blocker, key: str) -> None:
    """Each version was made by one and replaced by one at most; what is there now was made and not replaced."""
    made = [version for history in histories for version in history.made]
    used = [version for history in histories for version in history.used]
    assert made
    assert len(set(made)) == len(made)
    assert len(set(used)) == len(used)
    assert set(used) <= set(made)
    found = blocker.get_record(key)
    if found is not None:
        assert found.version in set(made) - set(used)
    version = blocker.put_record(key, b"end", found.version if found else None)
    assert version > max(made)
