"""The cache in LMDB: what it gives back, when it is believed, and what bounds it."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import archipfs.map.cache as cache_module
from archipfs.errors import Busy, StoreError, StoreFull
from archipfs.map.cache import Cache, Location
from archipfs.map.packs import Coding, Entry, Kind, PackIndex
from archipfs.types import Digest, PackId
from tests.blockers.conformance import run_threads
from tests.lib.disks import mounted
from tests.lib.programs import run
from tests.lib.searching import searching

MIB = 1 << 20


def digest(number: int) -> Digest:
    return Digest(random.Random(number).randbytes(32))


def pack_id(number: int) -> PackId:
    return PackId(f"{number:064x}")


def pack(number: int, digests: list[int]) -> PackIndex:
    entries = [
        Entry(digest(each), Kind.CHUNK, Coding.RAW, 4096, 8192 + 4096 * at, 4096) for at, each in enumerate(digests)
    ]
    return PackIndex(pack_id(number), "0" * 32, 1, 8192 + 4096 * len(digests), entries)


def places(cache: Cache, number: int) -> set[tuple[PackId, int]]:
    return {(place.pack, place.offset) for place in cache.find([digest(number)])[0]}


def file_bytes(path: Path) -> int:
    return sum(found.stat().st_blocks * 512 for found in path.rglob("*") if found.is_file())


def test_places_come_back_whole(tmp_path: Path) -> None:
    entries = [
        Entry(digest(1), Kind.CHUNK, Coding.RAW, 524288, 4096, 524288),
        Entry(digest(2), Kind.PAGE, Coding.ZSTD, 9999, (1 << 30) - 1, 77),
    ]
    with Cache(tmp_path) as cache:
        cache.add_pack(PackIndex(pack_id(7), "0" * 32, 1, 1 << 30, entries))
        assert cache.find([digest(2), digest(3), digest(1), digest(2)]) == [
            [Location(pack_id(7), Kind.PAGE, Coding.ZSTD, (1 << 30) - 1, 77, 9999)],
            [],
            [Location(pack_id(7), Kind.CHUNK, Coding.RAW, 4096, 524288, 524288)],
            [Location(pack_id(7), Kind.PAGE, Coding.ZSTD, (1 << 30) - 1, 77, 9999)],
        ]
        assert cache.packs() == {pack_id(7)}
        assert cache.pack_bytes(pack_id(7)) == 1 << 30
        assert cache.pack_bytes(pack_id(8)) is None


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("forget"), st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@searching(40)
@given(STEPS)
def test_the_index_is_what_its_packs_say(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Packs share digests; sweeping, made to happen soon here, changes nothing that can be seen."""
    content = {number: [random.Random(f"{number} {at}").randrange(30) for at in range(12)] for number in range(10)}
    path = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setattr(cache_module, "_SWEEP_ENTRIES", 5)
    cache = Cache(path)
    model: set[int] = set()
    try:
        for step, first, second in steps:
            if step == "add":
                cache.add_pack(pack(first, content[first]))
                model.add(first)
            elif step == "forget":
                cache.forget_packs([pack_id(first), pack_id(second)])
                model -= {first, second}
            else:
                cache.close()
                cache = Cache(path)
            assert cache.packs() == {pack_id(number) for number in model}
        found = cache.find([digest(each) for each in range(30)])
        for each in range(30):
            assert {(place.pack, place.offset) for place in found[each]} == {
                (pack_id(number), 8192 + 4096 * at)
                for number in model
                for at, what in enumerate(content[number])
                if what == each
            }
    finally:
        patch.undo()
        cache.close()
        shutil.rmtree(path)


def test_what_is_forgotten_makes_room(tmp_path: Path) -> None:
    """Packs come and go for long: the index does not grow with those that are gone."""
    with Cache(tmp_path) as cache:
        sizes = []
        for round_ in range(12):
            number = 1000 * round_
            for each in range(5):
                first = 10_000 * (number + each)
                cache.add_pack(pack(number + each, list(range(first, first + 4000))))
            cache.forget_packs(pack_id(number + each) for each in range(5))
            sizes.append(file_bytes(tmp_path / "index"))
        assert cache.packs() == set()
        assert max(sizes) <= 2 * sizes[2]


def test_pages_and_regions_are_bounded_and_keep_what_is_new(tmp_path: Path) -> None:
    with Cache(tmp_path, pages_bytes_max=2 * MIB, regions_bytes_max=MIB) as cache:
        for number in range(2000):
            cache.page_put(digest(number), number.to_bytes(4, "big") * 1200)
            cache.region_put(digest(number), number.to_bytes(4, "big") * 500, cache.regions_ticket())
        assert file_bytes(tmp_path / "pages") < 5 * MIB
        for number in range(1950, 2000):
            assert cache.page_get(digest(number)) == number.to_bytes(4, "big") * 1200
            assert cache.region_get(digest(number)) == number.to_bytes(4, "big") * 500
        assert cache.page_get(digest(0)) is None
        assert cache.region_get(digest(0)) is None


def test_a_page_put_again_is_the_newest(tmp_path: Path) -> None:
    with Cache(tmp_path, regions_bytes_max=64 << 10) as cache:
        for between in range(30):
            cache.region_put(digest(0), b"old", cache.regions_ticket())
            for number in range(between):
                cache.region_put(digest(1000 * between + number), bytes(2000), cache.regions_ticket())
            cache.region_put(digest(0), b"new", cache.regions_ticket())
            assert cache.region_get(digest(0)) == b"new"


def test_regions_are_forgotten_alone(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        cache.page_put(digest(1), b"page")
        cache.region_put(digest(1), b"region", cache.regions_ticket())
        cache.regions_forget()
        assert cache.region_get(digest(1)) is None
        assert cache.page_get(digest(1)) == b"page"


def test_it_grows_beyond_its_first_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside readers, and no transaction is lost."""
    monkeypatch.setattr(cache_module, "_MAP_BYTES", 256 << 10)
    with Cache(tmp_path) as cache:

        def write(part: int) -> None:
            for number in range(part, 40, 2):
                cache.add_pack(pack(number, list(range(1000 * number, 1000 * number + 500))))

        def read() -> None:
            for number in range(300):
                assert len(cache.find([digest(number)])) == 1

        run_threads([lambda: write(0), lambda: write(1), read, read])
        assert file_bytes(tmp_path / "index") > 4 * (256 << 10)
        assert cache.packs() == {pack_id(number) for number in range(40)}
        for number in range(40):
            assert places(cache, 1000 * number + 499) == {(pack_id(number), 8192 + 4096 * 499)}
    with Cache(tmp_path) as cache:
        assert len(cache.packs()) == 40


# Whether to believe it


FILLING = """
import os, sys
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, os.getcwd())
from archipfs.map.cache import Cache
from tests.map.test_cache import digest, pack
cache = Cache(Path(sys.argv[1]))
cache.add_pack(pack(1, [1, 2, 3]))
cache.page_put(digest(1), b"page")
print("filled", flush=True)
sys.stdin.read()
"""


def killed_with_cache(path: Path) -> None:
    """A process that is killed while it has the cache open."""
    with subprocess.Popen(
        [sys.executable, "-c", FILLING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "filled\n"
            with pytest.raises(Busy, match="another process"):
                Cache(path)
        finally:
            process.send_signal(signal.SIGKILL)


def test_after_a_kill_it_is_believed_and_after_power_loss_it_is_not(tmp_path: Path) -> None:
    killed_with_cache(tmp_path)
    with Cache(tmp_path) as cache:
        assert cache.packs() == {pack_id(1)}
        assert cache.page_get(digest(1)) == b"page"
    # Closed: it was synced, and is good whatever happens.
    state = tmp_path / "state"
    assert state.read_text() == "clean\n"
    killed_with_cache(tmp_path)
    opened, boot, mount = state.read_text().split()
    for other in (
        f"{opened} {'0' * len(boot)} {mount}\n",
        f"{opened} {boot} {int(mount) + 1}\n",
        state.read_text()[:-1],
        "",
    ):
        state.write_text(other)
        with Cache(tmp_path) as cache:
            assert cache.packs() == set()
            assert cache.page_get(digest(1)) is None
            cache.add_pack(pack(1, [1, 2, 3]))
            cache.page_put(digest(1), b"page")


def test_opened_again_after_a_close_under_another_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(tmp_path) as cache:
        cache.add_pack(pack(1, [1]))
    other = tmp_path / "boot_id"
    other.write_text("another boot\n")
    monkeypatch.setattr(cache_module, "_BOOT_ID_PATH", other)
    with Cache(tmp_path) as cache:
        assert cache.packs() == {pack_id(1)}
        assert (tmp_path / "state").read_text().startswith("open another boot ")


@pytest.mark.parametrize("name", ["index", "pages"])
@pytest.mark.parametrize(
    "how", ["no LMDB", "cut", "cut on a page's border", "another format", "gone", "a file in its place"]
)
def test_what_is_damaged_begins_anew(tmp_path: Path, name: str, how: str) -> None:
    with Cache(tmp_path) as cache:
        cache.add_pack(pack(1, [1]))
        cache.page_put(digest(1), b"page")
    data = tmp_path / name / "data.mdb"
    if how == "no LMDB":
        with open(data, "r+b") as stream:
            stream.write(b"x" * 8192)
    elif how == "cut":
        os.truncate(data, 100)
    elif how == "cut on a page's border":
        os.truncate(data, data.stat().st_size // 8192 * 4096)  # what LMDB believes to be behind it would be a SIGBUS
    elif how == "another format":
        content = data.read_bytes()
        assert b"archipfs-cache 1" in content
        data.write_bytes(content.replace(b"archipfs-cache 1", b"archipfs-cache 9"))
    elif how == "gone":
        shutil.rmtree(tmp_path / name)
    else:
        shutil.rmtree(tmp_path / name)
        (tmp_path / name).write_text("x")
        with pytest.raises(StoreError, match=name):
            Cache(tmp_path)
        return
    with Cache(tmp_path) as cache:
        assert cache.packs() == (set() if name == "index" else {pack_id(1)})
        assert cache.page_get(digest(1)) == (None if name == "pages" else b"page")
        cache.add_pack(pack(2, [2]))
        cache.page_put(digest(2), b"more")
    with Cache(tmp_path) as cache:
        assert pack_id(2) in cache.packs()
        assert cache.page_get(digest(2)) == b"more"


def test_it_may_be_deleted_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache = Cache(path)
    cache.add_pack(pack(1, [1]))
    shutil.rmtree(path)
    cache.add_pack(pack(2, [2]))
    assert cache.packs() == {pack_id(1), pack_id(2)}
    cache.close()
    with Cache(path) as cache:
        assert cache.packs() == set()


def test_damage_that_lmdb_finds_in_use_begins_anew_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cache_module._Txn.put
    failing = [0]

    def put(self: cache_module._Txn, database: str, key: bytes, value: bytes) -> None:
        if database == "packs" and failing[0]:
            failing[0] -= 1
            raise cache_module.lmdb.CorruptedError("made up")
        real(self, database, key, value)

    monkeypatch.setattr(cache_module._Txn, "put", put)
    with Cache(tmp_path) as cache:
        cache.add_pack(pack(1, [1]))
        failing[0] = 1

        def read() -> None:
            for _ in range(200):
                assert places(cache, 1) in (set(), {(pack_id(1), 8192)})

        run_threads([lambda: cache.add_pack(pack(2, [2])), read, read])
        assert cache.packs() == {pack_id(2)}
        # Again and again is no damage of the file.
        failing[0] = 5
        with pytest.raises(StoreError, match="disk"):
            cache.add_pack(pack(3, [3]))


def test_damage_that_two_find_at_once_is_mended_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(tmp_path) as cache:
        cache.add_pack(pack(1, [1]))
        real = cache_module._Txn.cursor
        both = threading.Barrier(2)
        failed = []

        def cursor(self: cache_module._Txn, database: str) -> object:
            if len(failed) < 2:
                failed.append(database)
                both.wait(60)
                raise cache_module.lmdb.CorruptedError("made up")
            return real(self, database)

        def find_and_add(number: int) -> None:
            assert cache.find([digest(1)]) == [[]]
            cache.add_pack(pack(number, [number]))

        monkeypatch.setattr(cache_module._Txn, "cursor", cursor)
        run_threads([lambda: find_and_add(2), lambda: find_and_add(3)])
        assert cache.packs() == {pack_id(2), pack_id(3)}
        assert cache._index._generation == 1


def test_where_it_cannot_begin_anew_it_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, full = [True], [True]
    put, remove = cache_module._Txn.put, cache_module._remove

    def put_or_fail(self: cache_module._Txn, database: str, key: bytes, value: bytes) -> None:
        if database == "packs" and damaged and damaged.pop():
            raise cache_module.lmdb.CorruptedError("made up")
        put(self, database, key, value)

    def remove_or_fail(path: Path) -> None:
        if full:
            raise StoreFull("made up")
        remove(path)

    with Cache(tmp_path) as cache:
        monkeypatch.setattr(cache_module._Txn, "put", put_or_fail)
        monkeypatch.setattr(cache_module, "_remove", remove_or_fail)
        for _ in range(2):
            with pytest.raises(StoreFull):
                cache.add_pack(pack(1, [1]))
        full.clear()
        cache.add_pack(pack(2, [2]))
        assert cache.packs() == {pack_id(2)}
    with Cache(tmp_path) as cache:
        assert cache.packs() == {pack_id(2)}


def test_where_it_cannot_grow_it_is_touched_no_more_and_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRoom:
        def __init__(self, env: object) -> None:
            self._env = env

        def __getattr__(self, name: str) -> object:
            return getattr(self._env, name)

        def set_mapsize(self, size: int) -> None:
            raise cache_module.lmdb.MemoryError("made up")

    monkeypatch.setattr(cache_module, "_MAP_BYTES", 1 << 16)
    with Cache(tmp_path) as cache:
        env = cache._index._env
        cache._index._env = NoRoom(env)  # type: ignore[assignment]
        with pytest.raises(StoreError, match="made up"):
            cache.add_pack(pack(1, list(range(2000))))
        with pytest.raises(cache_module.lmdb.Error, match="closed"):
            env.info()
        cache.add_pack(pack(2, [2]))
        assert cache.packs() == {pack_id(2)}


def test_a_cache_that_could_not_begin_anew_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise cache_module.lmdb.CorruptedError("made up")

    def full(path: Path) -> None:
        raise StoreFull("made up")

    with Cache(tmp_path) as cache:
        monkeypatch.setattr(cache_module._Txn, "put", fail)
        monkeypatch.setattr(cache_module, "_remove", full)
        with pytest.raises(StoreFull):
            cache.add_pack(pack(1, [1]))
        monkeypatch.undo()
    with Cache(tmp_path) as cache:
        assert cache.packs() == set()


def test_a_region_that_was_looked_up_before_regions_were_forgotten_is_not_kept(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        ticket = cache.regions_ticket()
        cache.regions_forget()
        cache.region_put(digest(1), b"out of date", ticket)
        assert cache.region_get(digest(1)) is None


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="owner"):
        Cache(tmp_path / "file" / "cache")


def test_one_process_has_it(tmp_path: Path) -> None:
    with Cache(tmp_path), pytest.raises(Busy, match="state_dir"):
        Cache(tmp_path)
    Cache(tmp_path).close()


def test_a_full_disk_is_said_and_loses_only_what_did_not_fit(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path)
    try:
        with Cache(tmp_path / "cache") as cache:
            count = 0
            with suppress(StoreError):
                while count < 1000:
                    cache.add_pack(pack(count, list(range(1000 * count, 1000 * count + 500))))
                    count += 1
            with pytest.raises(StoreError, match="space"):
                cache.add_pack(pack(1000, list(range(500))))
            with pytest.raises(StoreFull, match="free some"):
                cache.page_put(digest(1), bytes(2 * MIB))
            assert cache.packs() == {pack_id(number) for number in range(count)}
            assert places(cache, 499) == {(pack_id(0), 8192 + 4096 * 499)}
    finally:
        run("umount", tmp_path)


def test_after_a_kill_it_is_not_believed_if_its_file_system_was_mounted_anew(tmp_path: Path) -> None:
    """Within one boot a file system may lose what was not synced, and come back."""
    disk = tmp_path / "disk"
    image = tmp_path / "image"
    disk.mkdir()
    with open(image, "wb") as stream:
        stream.truncate(32 * MIB)
    run("mkfs.ext4", "-q", "-F", image)
    with mounted(image, disk, "loop"):
        killed_with_cache(disk / "cache")
        with Cache(disk / "cache") as cache:
            assert cache.packs() == {pack_id(1)}
        killed_with_cache(disk / "cache")
    with mounted(image, disk, "loop"), Cache(disk / "cache") as cache:
        assert cache.packs() == set()
