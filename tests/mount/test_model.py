"""Volumes on a mount against plain byte arrays: single operations in any order, and threads beside each other."""

import mmap
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.lib.instance import Instance
from tests.lib.searching import searching
from tests.lib.volumes import SECTOR_BYTES, clone, create, fact, opened, read_all, rollback, snapshot
from tests.lib.waiting import Task, threads, wait_until
from tests.lib.ways import FRONT, PLAIN, POOL, Way

pytestmark = [pytest.mark.mount, pytest.mark.ways(FRONT, PLAIN, POOL)]


SIZE_MAX = 48 * SECTOR_BYTES
EXAMPLES, EXAMPLES_ON_A_POOL = 20, 5


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


borders = st.integers(0, SIZE_MAX // SECTOR_BYTES).map(lambda sector: sector * SECTOR_BYTES)
offsets = st.one_of(
    borders,
    st.tuples(borders, st.integers(-600, 600)).map(lambda pair: max(0, pair[0] + pair[1])),
    st.integers(0, SIZE_MAX),
)
lengths = st.one_of(st.sampled_from([1, 511, 512, 4095, SECTOR_BYTES, 4097, 3 * SECTOR_BYTES]), st.integers(1, 40_000))
ways = st.sampled_from([0, os.O_DIRECT])


class Model(RuleBasedStateMachine):
    """One volume that is written, and whatever is made of it. ``mount`` is set by the test."""

    mount: Instance
    number = 0

    def __init__(self) -> None:
        super().__init__()
        Model.number += 1
        self.path = create(self.mount.path / f"vm{Model.number}", 5 * SECTOR_BYTES + 100)
        self.content = bytearray(5 * SECTOR_BYTES + 100)
        self.others: dict[Path, bytes] = {}
        self.made = 0
        self.descriptors: dict[int, int] = {}

    def descriptor(self, way: int) -> int:
        if way not in self.descriptors:
            self.descriptors[way] = os.open(self.path, os.O_RDWR | way)
        return self.descriptors[way]

    def new_name(self, kind: str) -> str:
        self.made += 1
        return f"{self.path.name}-{kind}{self.made}"

    @rule(offset=offsets, length=lengths, byte=st.integers(1, 255), way=ways)
    def write(self, offset: int, length: int, byte: int, way: int) -> None:
        data = bytes([byte]) * length
        assert os.pwrite(self.descriptor(way), data, offset) == length
        self.content.extend(bytes(max(0, offset + length - len(self.content))))
        self.content[offset : offset + length] = data

    @rule(offset=offsets, length=lengths, way=ways)
    def read(self, offset: int, length: int, way: int) -> None:
        assert os.pread(self.descriptor(way), length, offset) == self.content[offset : offset + length]

    @precondition(lambda self: len(self.content) > 0)
    @rule(offset=offsets, length=lengths, byte=st.integers(1, 255))
    def write_mapped(self, offset: int, length: int, byte: int) -> None:
        offset %= len(self.content)
        length = min(length, len(self.content) - offset)
        with mmap.mmap(self.descriptor(0), len(self.content), mmap.MAP_SHARED) as mapping:
            mapping[offset : offset + length] = bytes([byte]) * length
            mapping.flush()
        self.content[offset : offset + length] = bytes([byte]) * length

    @rule(size=offsets, by_path=st.booleans())
    def truncate(self, size: int, by_path: bool) -> None:
        os.truncate(self.path if by_path else self.descriptor(0), size)
        self.content = self.content[:size] + bytes(max(0, size - len(self.content)))

    @rule(way=ways)
    def sync(self, way: int) -> None:
        os.fsync(self.descriptor(way))

    @rule()
    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    @rule()
    def look_at_size(self) -> None:
        assert self.path.stat().st_size == len(self.content)

    @precondition(lambda self: len(self.content) > 0)
    @rule()
    def take_snapshot(self) -> None:
        self.others[snapshot(self.path, self.new_name("s"))] = bytes(self.content)

    @precondition(lambda self: len(self.content) > 0)
    @rule()
    def make_clone(self) -> None:
        self.others[clone(self.path, self.new_name("c"))] = bytes(self.content)

    @precondition(lambda self: self.others)
    @rule(data=st.data(), offset=offsets, byte=st.integers(1, 255))
    def write_to_a_clone(self, data: st.DataObject, offset: int, byte: int) -> None:
        source = data.draw(st.sampled_from(sorted(self.others)))
        path = source
        if fact(source, "kind") == "snapshot":
            path = clone(source, self.new_name("c"))
        with opened(path) as descriptor:
            os.pwrite(descriptor, bytes([byte]) * 700, offset)
        content = bytearray(self.others[source])
        content.extend(bytes(max(0, offset + 700 - len(content))))
        content[offset : offset + 700] = bytes([byte]) * 700
        self.others[path] = bytes(content)

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def change_places_with_a_clone(self, data: st.DataObject) -> None:
        """What was a clone is the volume from now on: chains become long."""
        other = data.draw(st.sampled_from(sorted(self.others)))
        if fact(other, "kind") != "snapshot":
            self.close()
            content = self.others.pop(other)
            self.others[self.path] = bytes(self.content)
            self.path, self.content = other, bytearray(content)

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        to = data.draw(st.sampled_from(sorted(self.others)))
        if fact(to, "kind") == "snapshot" and fact(to, "parent") == self.path.name:
            self.close()
            wait_until(lambda: fact(self.path, "state") == "closed", "the volume is closed")
            rollback(self.path, to.name)
            self.content = bytearray(self.others[to])

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def remove_another(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.others)))
        os.unlink(path)
        del self.others[path]

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def compare_another(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(sorted(self.others)))
        assert read_all(path) == self.others[path]

    def teardown(self) -> None:
        self.close()
        assert read_all(self.path) == self.content
        assert read_all(self.path, os.O_DIRECT) == self.content
        for path, content in self.others.items():
            assert read_all(path) == content, path.name
        assert [finding for finding in self.mount.findings() if finding["severity"] == "error"] == []
        for path in self.mount.path.iterdir():
            os.unlink(path)


def test_any_order_of_operations_does_what_a_byte_array_does(mount: Instance, way: Way) -> None:
    Model.mount = mount
    run_state_machine_as_test(
        Model,
        settings=searching(
            EXAMPLES_ON_A_POOL if way is POOL else EXAMPLES,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
        ),
    )


VOLUME_BYTES = 4 << 20
THREADS = 4
ROUNDS = 4
OPERATIONS = 120


class Region:
    """What one thread owns of a volume: its border lies inside a sector, the other side of which is another's."""

    def __init__(self, path: Path, start: int, length: int, flags: int, seed: int) -> None:
        self.path = path
        self.start = start
        self.content = bytearray(length)
        self._flags = flags
        self._random = random.Random(seed)

    def work(self, stop: threading.Event) -> None:
        with opened(self.path, os.O_RDWR | self._flags) as descriptor:
            for _ in range(OPERATIONS):
                offset = self._random.randrange(len(self.content))
                if self._random.random() < 0.5:
                    offset -= (self.start + offset) % SECTOR_BYTES  # aligned in the volume, if that is still ours
                offset = max(0, offset)
                wanted = self._random.choice((100, 512, SECTOR_BYTES, 10_000, 3 * SECTOR_BYTES, 200_000))
                length = min(wanted, len(self.content) - offset)
                action = self._random.random()
                if action < 0.55:
                    data = self._random.randbytes(length)
                    assert os.pwrite(descriptor, data, self.start + offset) == length
                    self.content[offset : offset + length] = data
                elif action < 0.95:
                    found = os.pread(descriptor, length, self.start + offset)
                    assert found == self.content[offset : offset + length], f"{self.path.name} at {self.start + offset}"
                else:
                    os.fsync(descriptor)


@pytest.mark.directory("the streams of test_snapshots_under_load are as many threads on a pool, in less time")
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_threads_beside_each_other_on_several_volumes(mount: Instance, flags: int) -> None:
    """Between rounds the volumes are snapshotted and cloned; in the end everything made is compared."""
    volumes = [create(mount.path / f"vm{number}", VOLUME_BYTES) for number in range(2)]
    share = VOLUME_BYTES // THREADS - 1000
    regions = [
        Region(path, 777 + thread * share, share, flags, seed=thread) for path in volumes for thread in range(THREADS)
    ]
    expected: dict[Path, bytes] = {}
    for round_number in range(ROUNDS):
        tasks: list[Task] = [region.work for region in regions]
        with threads(tasks):
            pass
        for path in volumes:
            content = bytearray(VOLUME_BYTES)
            for region in regions:
                if region.path == path:
                    content[region.start : region.start + share] = region.content
            expected[snapshot(path, f"{path.name}-s{round_number}")] = bytes(content)
            expected[clone(path, f"{path.name}-c{round_number}")] = bytes(content)
            expected[path] = bytes(content)
    for path, wanted in expected.items():
        assert read_all(path) == wanted, path.name
    mount.remount()
    for path, wanted in expected.items():
        assert read_all(path, os.O_DIRECT) == wanted, path.name


@pytest.mark.directory("what the kernel takes from a listing is the same over every store")
def test_a_listing_never_makes_a_growing_volume_smaller(mount: Instance) -> None:
    """The kernel takes sizes from a listing: an old one would have O_APPEND write over what is there."""
    volume = create(mount.path / "vm1", 0)
    for number in range(20):
        create(mount.path / f"other{number:02}", 4096)
    lines = [f"{number:07}\n".encode() for number in range(1500)]

    def list_all(stop: threading.Event) -> None:
        while not stop.is_set():
            list(os.scandir(mount.path))
            os.listdir(mount.path)

    with threads([list_all, list_all]), opened(volume, os.O_WRONLY | os.O_APPEND) as descriptor:
        for number, line in enumerate(lines, 1):
            os.write(descriptor, line)
            assert os.fstat(descriptor).st_size == 8 * number
    assert read_all(volume) == b"".join(lines)


@pytest.mark.directory("a pool takes half a minute for it, and deletes layers only a minute later")
def test_volumes_made_and_removed_at_once_harm_nobody(mount: Instance) -> None:
    """What is removed leaves layers to delete: that must not take those of volumes which are just being made."""

    def churn(thread: int) -> Task:
        def task(stop: threading.Event) -> None:
            for number in range(60):
                path = create(mount.path / f"{thread}-{number}", 64 << 10)
                with opened(path) as descriptor:
                    os.pwrite(descriptor, f"{thread} {number}".encode(), 0)
                if number % 3 == 0:
                    os.unlink(path)
                elif number % 3 == 1:
                    clone(snapshot(path, f"{path.name}-s"), f"{path.name}-c")
                    os.unlink(path)

        return task

    with threads([churn(thread) for thread in range(4)]):
        pass
    for thread in range(4):
        for number in range(60):
            made = {0: (), 1: ("-s", "-c"), 2: ("",)}[number % 3]
            for suffix in made:
                content = read_all(mount.path / f"{thread}-{number}{suffix}")
                assert content.rstrip(b"\0") == f"{thread} {number}".encode()
    assert len(os.listdir(mount.path)) == 4 * 60
    mount.check()
