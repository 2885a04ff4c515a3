"""Snapshots of a volume that is being written: each holds an exact prefix of every ordered stream of writes."""

import os
import threading
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from tests.lib.instance import Instance
from tests.lib.stream import Stream, streams_of
from tests.lib.volumes import SECTOR_BYTES, clone, create, opened, read_all, snapshot
from tests.lib.waiting import Task, threads, wait_until
from tests.lib.ways import FRONT, PLAIN, POOL, Way

pytestmark = [pytest.mark.mount, pytest.mark.ways(FRONT, PLAIN, POOL)]


VOLUME_BYTES = 8 << 20
SLOTS = 96
SNAPSHOTS = 20
SNAPSHOTS_ON_A_POOL = 5
WRITES_BETWEEN = 40
FLUSH_EVERY = 50
SEALED = 8


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


def writer(path: Path, stream: Stream, flags: int) -> Task:
    def task(stop: threading.Event) -> None:
        with opened(path, os.O_RDWR | flags) as descriptor:
            while not stop.is_set():
                stream.write(descriptor)
                if stream.issued % FLUSH_EVERY == 0:
                    stream.flush(descriptor)

    return task


def two_writers_in_turn(path: Path, stream: Stream, flags: int) -> list[Task]:
    """The order of the stream then spans threads and descriptors."""
    return [writer(path, stream, flags), writer(path, stream, flags)]


Bounds = list[tuple[int, int]]


def ways(mount: Instance) -> list[Callable[[Path, str], Path]]:
    """By attribute, during which the kernel holds writes to the file back, and by command, during which it does not."""
    return [
        snapshot,
        lambda path, name: mount.snapshot(path.name, name),
        lambda path, name: mount.clone(path.name, name),
        lambda path, name: mount.snapshot(path.name, name),
        clone,
    ]


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_every_snapshot_and_clone_holds_a_prefix_of_every_stream(mount: Instance, way: Way, flags: int) -> None:
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    sizes = (512, SECTOR_BYTES, 3 * SECTOR_BYTES if flags else SECTOR_BYTES)
    streams = streams_of(VOLUME_BYTES, 6, SLOTS, sizes)
    tasks = [task for stream in streams for task in two_writers_in_turn(volume, stream, flags)]
    taken: dict[Path, Bounds] = {}
    with threads(tasks):
        for number, make in zip(
            range(SNAPSHOTS_ON_A_POOL if way is POOL else SNAPSHOTS), cycle(ways(mount)), strict=False
        ):
            wait_for_writes(streams, WRITES_BETWEEN)
            at_least = [stream.acknowledged for stream in streams]
            path = make(volume, f"taken{number}")
            taken[path] = list(zip(at_least, [stream.issued for stream in streams], strict=True))
    expect(taken, streams)
    for stream in streams:
        stream.expect_prefix(read_all(volume), stream.acknowledged, stream.issued)
    mount.remount()
    expect(taken, streams)


@pytest.mark.directory("which layers a clone has does not depend on the store")
def test_snapshots_of_snapshotted_clones_under_load(mount: Instance) -> None:
    """Two volumes with a common past are written and snapshotted beside each other: neither shows in the other."""
    first = create(mount.path / "vm1", VOLUME_BYTES)
    streams = streams_of(VOLUME_BYTES, 3, SLOTS, (512, SECTOR_BYTES))
    with threads([writer(first, stream, os.O_DIRECT) for stream in streams]):
        wait_for_writes(streams, 200)
    second = clone(first, "vm2")
    apart = streams_of(VOLUME_BYTES, 3, SLOTS, (512, SECTOR_BYTES))
    for one, other in zip(streams, apart, strict=True):
        other.restart(one.acknowledged)
    taken: dict[Path, Bounds] = {}
    taken_apart: dict[Path, Bounds] = {}
    tasks = [writer(first, stream, os.O_DIRECT) for stream in streams]
    tasks += [writer(second, stream, os.O_DIRECT) for stream in apart[:2]]  # the third stays as it was
    with threads(tasks):
        for number in range(8):
            for volume, written, into in ((first, streams, taken), (second, apart, taken_apart)):
                wait_for_writes(written[:2], 10)
                at_least = [stream.acknowledged for stream in written]
                path = mount.snapshot(volume.name, f"{volume.name}-{number}")
                into[path] = list(zip(at_least, [stream.issued for stream in written], strict=True))
    expect(taken, streams)
    expect(taken_apart, apart)


@pytest.mark.directory("a pool has no garbage for the first minute, as other nodes may be reading what was removed")
def test_two_seals_a_collection_and_writers_at_once(mount: Instance) -> None:
    """Snapshots come, are sealed two at a time, and go, so that there is garbage, which is collected all the time."""
    volumes = [create(mount.path / name, VOLUME_BYTES) for name in ("vm1", "vm2")]
    written = {volume: streams_of(VOLUME_BYTES, 2, SLOTS, (512, SECTOR_BYTES)) for volume in volumes}
    taken: dict[Path, dict[Path, Bounds]] = {volume: {} for volume in volumes}
    collected: list[int] = []

    def collect(stop: threading.Event) -> None:
        while not stop.is_set():
            collected.extend(done["packs"] for done in mount.call("gc"))

    def take_seal_and_remove(volume: Path) -> Task:
        def task(stop: threading.Event) -> None:
            for number in range(SEALED):
                wait_for_writes(written[volume], WRITES_BETWEEN)
                at_least = [stream.acknowledged for stream in written[volume]]
                path = mount.snapshot(volume.name, f"{volume.name}-{number}")
                at_most = [stream.issued for stream in written[volume]]
                taken[volume][path] = list(zip(at_least, at_most, strict=True))
                mount.call("volume-seal", name=path.name)
                if number % 3:
                    mount.call("volume-remove", name=path.name)
                    del taken[volume][path]

        return task

    writers = [writer(volume, stream, os.O_DIRECT) for volume in volumes for stream in written[volume]]
    with (
        threads([*writers, collect]),
        threads([take_seal_and_remove(each) for each in volumes]),
    ):
        pass
    assert sum(collected), "there was no garbage"
    for volume in volumes:
        expect(taken[volume], written[volume])
        for stream in written[volume]:
            stream.expect_prefix(read_all(volume), stream.acknowledged, stream.issued)


def wait_for_writes(streams: list[Stream], count: int) -> None:
    wanted = [stream.acknowledged + count for stream in streams]
    wait_until(
        lambda: all(stream.acknowledged >= least for stream, least in zip(streams, wanted, strict=True)),
        f"every stream has got {count} writes further",
    )


def expect(taken: dict[Path, Bounds], streams: list[Stream]) -> None:
    for path, bounds in taken.items():
        content = read_all(path)
        for stream, (at_least, at_most) in zip(streams, bounds, strict=True):
            try:
                stream.expect_prefix(content, at_least, at_most)
            except AssertionError as error:
                raise AssertionError(f"{path.name}: {error}") from error
