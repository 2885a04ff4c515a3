"""The object cache: what is in it is what was put there, or it is not in it."""

import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.compose.object_cache import SLOT_BYTES, ObjectCache
from archipfs.types import Digest
from tests.lib.searching import searching

CHUNK_BYTES = 3 * SLOT_BYTES + 4096


def digest(number: int, size: int = 32) -> Digest:
    return Digest(bytes([number]) * size)


def chunk(number: int) -> bytes:
    return random.Random(number).randbytes(CHUNK_BYTES)


class Store:
    """Where the chunks come from, counting how often."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def read(self, cache: ObjectCache, number: int, offset: int = 0, length: int = CHUNK_BYTES) -> bytes:
        def fetch() -> bytes:
            self.fetched.append(number)
            return chunk(number)

        return cache.read(digest(number), offset, length, fetch)


@pytest.fixture
def store() -> Store:
    return Store()


@searching(60)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, CHUNK_BYTES - 1), st.integers(1, CHUNK_BYTES)), max_size=30)
)
def test_any_range_of_any_chunk_is_right(
    tmp_path_factory: pytest.TempPathFactory, reads: list[tuple[int, int, int]]
) -> None:
    """Also when there is room for two or three of them only."""
    store = Store()
    cache = ObjectCache(tmp_path_factory.mktemp("cache") / "objects", 10 * SLOT_BYTES)
    for number, offset, length in reads:
        length = min(length, CHUNK_BYTES - offset)
        assert store.read(cache, number, offset, length) == chunk(number)[offset : offset + length]
    cache.close()


def test_a_chunk_is_fetched_once(tmp_path: Path, store: Store) -> None:
    cache = ObjectCache(tmp_path / "objects", 1 << 20)
    for _ in range(3):
        assert store.read(cache, 1, 70000, 100) == chunk(1)[70000:70100]
    cache.close()
    again = ObjectCache(tmp_path / "objects", 1 << 20)
    assert store.read(again, 1) == chunk(1)
    again.close()
    assert store.fetched == [1]


def test_it_is_bounded_and_the_one_used_longest_ago_goes(tmp_path: Path, store: Store) -> None:
    cache = ObjectCache(tmp_path / "objects", 8 * SLOT_BYTES)
    for number in (1, 2, 1, 3):
        store.read(cache, number)
    store.fetched.clear()
    store.read(cache, 1)
    store.read(cache, 2)
    cache.close()
    assert store.fetched == [2]
    assert (tmp_path / "objects").stat().st_size <= 10 * SLOT_BYTES


def test_what_is_damaged_is_fetched_again(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "objects"
    cache = ObjectCache(path, 1 << 20)
    store.read(cache, 1)
    damage = random.Random(2)
    for _ in range(200):
        with open(path, "r+b") as stream:
            stream.seek(damage.randrange(path.stat().st_size))
            stream.write(bytes([damage.randrange(256)]))
    assert store.read(cache, 1) == chunk(1)
    cache.close()
    again = ObjectCache(path, 1 << 20)
    assert store.read(again, 1) == chunk(1)
    again.close()


def test_of_another_size_it_begins_anew(tmp_path: Path, store: Store) -> None:
    for bytes_max in (1 << 20, 2 << 20, 1 << 20):
        cache = ObjectCache(tmp_path / "objects", bytes_max)
        assert store.read(cache, 1) == chunk(1)
        cache.close()
    assert store.fetched == [1, 1, 1]


def test_it_may_be_deleted_while_it_is_in_use(tmp_path: Path, store: Store) -> None:
    cache = ObjectCache(tmp_path / "objects", 1 << 20)
    store.read(cache, 1)
    (tmp_path / "objects").unlink()
    assert store.read(cache, 1) == chunk(1)
    assert store.read(cache, 2) == chunk(2)
    cache.close()


def test_short_digests_are_kept_apart(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "objects", 1 << 20)
    for size in (16, 32):
        assert cache.read(digest(1, size), 0, 4, lambda size=size: b"%4d" % size) == b"%4d" % size  # type: ignore[misc]
    cache.close()
    again = ObjectCache(tmp_path / "objects", 1 << 20)
    assert again.read(digest(1, 16), 0, 4, lambda: b"none") == b"  16"
    again.close()


def test_a_disk_without_room_costs_nothing_but_speed(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ObjectCache(tmp_path / "objects", 1 << 20)

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(3):
        assert store.read(cache, 1) == chunk(1)
    monkeypatch.undo()
    store.read(cache, 1)
    store.fetched.clear()
    assert store.read(cache, 1) == chunk(1)
    assert store.fetched == []
    cache.close()


def test_threads_read_at_once(tmp_path: Path, store: Store) -> None:
    cache = ObjectCache(tmp_path / "objects", 12 * SLOT_BYTES)
    wrong: list[int] = []

    def read(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(200):
            number = choose.randrange(6)
            if store.read(cache, number, 60000, 9000) != chunk_parts[number]:
                wrong.append(number)

    chunk_parts = [chunk(number)[60000:69000] for number in range(6)]
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    assert wrong == []
