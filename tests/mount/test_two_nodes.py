"""Two nodes on one store, a directory or a pool: locks decide who writes, and who lost one writes no more."""

import errno
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.lib.ceph import Cluster
from tests.lib.instance import Instance, instances
from tests.lib.stream import Stream
from tests.lib.volumes import SECTOR_BYTES, clone, closes, create, fact, opened, read_all, rollback, snapshot
from tests.lib.waiting import Task, threads, wait_until

pytestmark = pytest.mark.mount


MIB = 1 << 20
CACHED_SECONDS = 30.0
"""How long a node may believe names and attributes that another one has changed: a second, more if it is busy."""


@pytest.fixture(scope="module")
def pool_pair(ceph_cluster: Cluster) -> Iterator[tuple[Instance, Instance]]:
    with instances() as make:
        pool = ceph_cluster.options()
        yield make(rados=pool).mount(), make(rados=pool).mount()


@pytest.fixture
def pool_nodes(pool_pair: tuple[Instance, Instance]) -> Iterator[tuple[Instance, Instance]]:
    """Two nodes on a pool: the same for all tests, emptied between them."""
    first, second = pool_pair
    yield first, second
    names = os.listdir(second.path)
    for name in names:
        closes(second.path / name)
    problems = [problem for node in (first, second) for problem in node.empty()]
    for name in names:
        wait_until(lambda name=name: not (second.path / name).exists(), f"{name} is gone", CACHED_SECONDS)  # type: ignore[misc]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture(params=["front", "plain", pytest.param("rados", marks=pytest.mark.ceph)])
def nodes(request: pytest.FixtureRequest, make_instance: MakeInstance) -> tuple[Instance, Instance]:
    """Two nodes, both mounted, whose default backend is the same: a directory, with the front or without, or a pool."""
    if request.param == "rados":
        pair: tuple[Instance, Instance] = request.getfixturevalue("pool_nodes")
        return pair
    first = make_instance(front=request.param == "front")
    second = make_instance(store=first.store, front=first.front)
    first.mount()
    return first, second.mount()


def expect_errno(number: int, do: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        do()
    assert caught.value.errno == number, f"{caught.value}, not {errno.errorcode[number]}"


def appears(path: Path) -> Path:
    wait_until(path.exists, f"{path.name} is seen on the other node", CACHED_SECONDS)
    return path


def test_what_one_node_makes_the_other_sees(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    (first.path / "vm1").write_bytes(b"from the first")
    closes(first.path / "vm1")
    assert read_all(appears(second.path / "vm1")) == b"from the first"
    with opened(second.path / "vm1") as descriptor:
        os.pwrite(descriptor, b"by the second!", 0)
    closes(second.path / "vm1")
    wait_until(lambda: read_all(first.path / "vm1") == b"by the second!", "the first sees it", CACHED_SECONDS)


def test_a_volume_that_another_node_writes_is_read_as_it_was_flushed(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    volume = create(first.path / "vm1", MIB)
    with opened(volume) as writing, opened(appears(second.path / "vm1"), os.O_RDONLY) as reading:
        for number in range(1, 6):
            os.pwrite(writing, bytes([number]) * SECTOR_BYTES, 0)
            os.fsync(writing)
            assert os.pread(reading, SECTOR_BYTES, 0) == bytes([number]) * SECTOR_BYTES
        snapshot(volume, "monday")
        os.pwrite(writing, b"x" * SECTOR_BYTES, SECTOR_BYTES)
        os.fsync(writing)
        assert os.pread(reading, 2 * SECTOR_BYTES, 0) == bytes([5]) * SECTOR_BYTES + b"x" * SECTOR_BYTES
        assert json.loads(fact(second.path / "vm1", "lock"))["node"] == json.loads(fact(volume, "lock"))["node"]


def test_a_write_waits_until_the_other_node_has_closed(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    create(first.path / "vm1", MIB)
    appears(second.path / "vm1")
    holds, written = threading.Event(), threading.Event()

    def write(stop: threading.Event) -> None:
        assert holds.wait(60)
        with opened(second.path / "vm1") as descriptor:
            os.pwrite(descriptor, b"second", SECTOR_BYTES)
            os.fsync(descriptor)
        written.set()

    tasks: list[Task] = [write]
    with threads(tasks):
        with opened(first.path / "vm1") as descriptor:
            os.pwrite(descriptor, b"first!", 0)
            holds.set()
            assert not written.wait(1.0), "it was written under another node's lock"
            os.pwrite(descriptor, b"FIRST!", 0)
        assert written.wait(60), "the write still waits although the lock is free"
    closes(second.path / "vm1")
    content = read_all(second.path / "vm1")
    assert (content[:6], content[SECTOR_BYTES : SECTOR_BYTES + 6]) == (b"FIRST!", b"second")


def test_what_changes_a_volume_fails_at_once_while_another_node_holds_it(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    volume = create(first.path / "vm1", MIB)
    snapshot(volume, "monday")
    theirs = appears(second.path / "vm1")
    appears(second.path / "monday")
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"x", 0)
        expect_errno(errno.EBUSY, lambda: snapshot(theirs, "tuesday"))
        expect_errno(errno.EBUSY, lambda: clone(theirs, "copy"))
        expect_errno(errno.EBUSY, lambda: os.truncate(theirs, 2 * MIB))
        expect_errno(errno.EBUSY, lambda: os.rename(theirs, second.path / "vm2"))
        expect_errno(errno.EBUSY, lambda: rollback(theirs, "monday"))
        expect_errno(errno.EBUSY, lambda: os.unlink(theirs))
        for command in (["volume-remove", "vm1"], ["volume-resize", "vm1", "--size", "2M"]):
            assert "vm1 is locked by" in second.refused(*command)
    assert sorted(os.listdir(first.path)) == ["monday", "vm1"]
    closes(volume)
    snapshot(theirs, "tuesday")
    appears(first.path / "tuesday")


def test_a_snapshot_that_another_node_reads_can_be_cloned_there(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    volume = create(first.path / "vm1", MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"frozen", 0)
        snapshot(volume, "monday")
        os.pwrite(descriptor, b"later!", 0)
        copy = clone(appears(second.path / "monday"), "copy")
        with opened(copy) as writing:
            os.pwrite(writing, b"second", 100)
        assert read_all(copy)[:106] == b"frozen" + bytes(94) + b"second"
        assert read_all(second.path / "monday")[:6] == b"frozen"


def test_who_lost_its_lock_gets_eio_and_writes_no_more(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    first.expect_log("lock of vm1 was broken|our lock was broken|fenced|writes? .*no more")
    volume = create(first.path / "vm1", MIB)
    before = Stream(1, 0, 32)
    after = Stream(2, 64 * SECTOR_BYTES, 32)
    with opened(volume) as descriptor:
        for _ in range(20):
            before.write(descriptor)
        before.flush(descriptor)
        assert "vm1" in second.refused("volume-unlock", "vm1")
        second.archip("volume-unlock", "-f", "vm1")
        with opened(appears(second.path / "vm1")) as theirs:
            for _ in range(20):
                after.write(theirs)
            after.flush(theirs)
            with suppress(OSError):  # it may have noticed or not; a flush with nothing to flush need not
                os.pwrite(descriptor, b"stale" * 1000, 64 * SECTOR_BYTES)
            expect_errno(errno.EIO, lambda: os.fsync(descriptor))
            expect_errno(errno.EIO, lambda: os.pwrite(descriptor, b"stale" * 1000, 64 * SECTOR_BYTES))
            expect_errno(errno.EIO, lambda: os.fsync(descriptor))
            assert snapshot(second.path / "vm1", "monday").exists()
    closes(second.path / "vm1")
    content = read_all(second.path / "vm1")
    before.expect_prefix(content, before.durable, before.issued)
    after.expect_prefix(content, after.durable, after.issued)
    assert read_all(second.path / "monday") == content
    # It is welcome again once it opens the volume anew.
    wait_until(lambda: first.path.joinpath("monday").exists(), "the first sees it", CACHED_SECONDS)
    with opened(volume) as descriptor:
        after.write(descriptor)
        after.flush(descriptor)
    after.expect_prefix(read_all(volume), after.durable, after.issued)


def test_a_broken_lock_is_noticed_without_a_flush(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    first.expect_log("fenced")
    volume = create(first.path / "vm1", MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"mine", 0)
        second.archip("volume-unlock", "-f", "vm1")
        wait_until(lambda: first.logged('"fenced"'), "the first node has noticed")
        expect_errno(errno.EIO, lambda: os.pwrite(descriptor, b"no", 0))


def test_a_node_takes_its_own_lock_again_after_a_crash(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    volume = create(first.path / "vm1", MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"acknowledged", 0)
        first.kill()
    theirs = appears(second.path / "vm1")
    expect_errno(errno.EBUSY, lambda: snapshot(theirs, "monday"))
    first.mount()
    with opened(volume) as descriptor:
        assert os.pread(descriptor, 12, 0) == b"acknowledged"
        os.pwrite(descriptor, b"ACKNOWLEDGED", 0)
    closes(volume)
    snapshot(theirs, "monday")
    assert read_all(second.path / "monday")[:12] == b"ACKNOWLEDGED"


def test_a_lock_that_is_held_by_hand_keeps_other_nodes_away(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    create(first.path / "vm1", MIB)
    appears(second.path / "vm1")
    first.archip("volume-lock", "vm1")
    first.umount()
    assert "vm1 is locked by" in second.refused("volume-snapshot", "vm1", "--name", "monday")
    assert "vm1" in second.refused("volume-unlock", "vm1")
    first.archip("volume-unlock", "vm1")
    second.archip("volume-snapshot", "vm1", "--name", "monday")


def test_a_node_is_lost_and_another_one_finds_all_that_was_flushed(nodes: tuple[Instance, Instance]) -> None:
    first, second = nodes
    volume = create(first.path / "vm1", MIB)
    before, after = Stream(1, 0, 32), Stream(2, 64 * SECTOR_BYTES, 32)
    with opened(volume) as descriptor:
        for number in range(200):
            before.write(descriptor)
            if number % 50 == 0:
                before.flush(descriptor)
        first.kill()
    second.archip("volume-unlock", "-f", "vm1")
    with opened(appears(second.path / "vm1")) as theirs:
        found = before.expect_survivors(read_all(second.path / "vm1"), before.durable, before.issued)
        for _ in range(40):
            after.write(theirs)
        after.flush(theirs)
        # The first one comes back, with all that it had in its live bitmaps, and writes nothing.
        first.mount()
        assert read_all(first.path / "vm1") == read_all(second.path / "vm1")
        expect_errno(errno.EBUSY, lambda: snapshot(first.path / "vm1", "monday"))
        after.write(theirs)
    closes(second.path / "vm1")
    content = read_all(second.path / "vm1")
    before.expect_survivors(content, before.durable, found)
    after.expect_prefix(content, after.issued, after.issued)
    assert read_all(first.path / "vm1") == content


def fio(volume: Path, directory: Path, *options: str) -> subprocess.Popen[str]:
    """Reads and writes at random in a process of its own, which a daemon that is stopped may hold up."""
    words = ["fio", f"--name={volume.name}", f"--filename={volume}", "--time_based", "--rw=randrw", "--bs=4k"]
    words += ["--ioengine=libaio", "--direct=1", "--output-format=terse", *options]
    return subprocess.Popen(words, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def writing(*volumes: Path) -> Iterator[None]:
    """Behind the block all of them have been written to since before it."""
    before = [volume.stat().st_mtime_ns for volume in volumes]
    yield
    for volume, then in zip(volumes, before, strict=True):
        wait_until(lambda volume=volume, then=then: volume.stat().st_mtime_ns > then, f"{volume.name} is written")  # type: ignore[misc]


@contextmanager
def ended(jobs: Iterable[subprocess.Popen[str]]) -> Iterator[None]:
    try:
        yield
    finally:
        for job in jobs:
            job.kill()
            job.communicate(timeout=60)


def test_a_node_that_wakes_up_overwrites_nothing(nodes: tuple[Instance, Instance]) -> None:
    """It was stopped in the middle of writes and flushes, which go on as if nothing had happened."""
    first, second = nodes
    first.expect_log("fenced|broke|our lock|not back in the store|no more")
    volume = create(first.path / "vm1", MIB)
    theirs = Stream(2, 0, 64)
    pid = first.daemon_pid()
    assert pid is not None
    with writing(volume):
        job = fio(volume, first.directory, "--size=1M", "--runtime=300", "--iodepth=8", "--fsync=8", "--rwmixwrite=100")
    with ended([job]):
        os.kill(pid, signal.SIGSTOP)
        try:
            second.archip("volume-unlock", "-f", "vm1")
            with opened(appears(second.path / "vm1")) as descriptor:
                for _ in range(64):
                    theirs.write(descriptor)
                theirs.flush(descriptor)
                os.kill(pid, signal.SIGCONT)
                # By a look at the lock, or by a flush: then fio ends, and closes what nobody looks at any more.
                wait_until(lambda: first.logged('"fenced"') or job.poll() is not None, "the first node has noticed")
                theirs.expect_prefix(read_all(second.path / "vm1"), 64, 64)
        finally:
            os.kill(pid, signal.SIGCONT)
        said, _ = job.communicate(timeout=60)
    assert job.returncode != 0, said
    closes(second.path / "vm1")
    theirs.expect_prefix(read_all(second.path / "vm1"), 64, 64)


@pytest.mark.ceph
def test_of_three_volumes_one_is_lost_and_the_others_only_pause(pool_nodes: tuple[Instance, Instance]) -> None:
    first, second = pool_nodes
    first.expect_log("fenced|broke|our lock|no more")
    options = ["--size=16M", "--runtime=8", "--iodepth=8", "--fsync=32", "--verify=crc32c", "--verify_backlog=256"]
    volumes = [create(first.path / name, 16 * MIB) for name in ("vm1", "vm2", "vm3")]
    jobs: list[subprocess.Popen[str]] = []
    with ended(jobs):
        with writing(*volumes):
            jobs += [fio(volume, first.directory, *options) for volume in volumes]
        second.call("volume-unlock", name="vm1", force=True)
        assert all(job.poll() is None for job in jobs), "fio does not run"
        said = [job.communicate(timeout=60) for job in jobs]
    assert "Input/output error" in "".join(said[0]), said[0]
    assert [job.returncode for job in jobs[1:]] == [0, 0], said[1:]
    closes(second.path / "vm2")
    with opened(second.path / "vm1") as descriptor:
        os.pwrite(descriptor, b"ours now", 0)
        os.fsync(descriptor)
