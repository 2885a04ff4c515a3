"""Power loss for real: the store lies on XFS on a loop device, and the file system is shut down under load.

That ends it without writing anything more: what was synced is there afterwards, the rest is gone, as after pulling the
plug. The daemon is killed, its run directory is deleted as a reboot would do, the file system is
mounted anew, its log replayed, and one ``archip mount`` must do. Then every sector holds its old or its new content,
what a returned fsync covered is new, and what a returned snapshot froze is exactly there.
"""

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from archipfs.errors import ArchipError
from tests.conftest import MakeInstance
from tests.lib.disks import lose_power
from tests.lib.instance import Instance, mount_type
from tests.lib.stream import Stream, streams_of
from tests.lib.volumes import SECTOR_BYTES, clone, create, opened, read_all, snapshot
from tests.lib.waiting import Task, threads

pytestmark = [pytest.mark.power, pytest.mark.mount, pytest.mark.slow]

ROUNDS = int(os.environ.get("ARCHIPFS_POWER_ROUNDS", "20"))
SEED = os.environ.get("ARCHIPFS_POWER_SEED", "archipfs")
LOAD_SECONDS = (0.1, 0.8)
MIB = 1 << 20
DISK_BYTES = 1 << 30
VOLUME_BYTES = 8 * MIB
SLOTS = 64


def run(*arguments: str | Path) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}: {done.stderr}"


class Disk:
    """An XFS of its own that can lose power."""

    def __init__(self, directory: Path) -> None:
        self._image = directory / "image"
        self.path = directory / "disk"
        self.path.mkdir()
        with open(self._image, "wb") as stream:
            stream.truncate(DISK_BYTES)
        run("mkfs.xfs", "-q", self._image)
        self.mount()

    def mount(self) -> None:
        run("mount", "-o", "loop", self._image, self.path)

    def umount(self) -> None:
        run("umount", self.path)

    def lose_power(self) -> None:
        lose_power(self.path)

    def remove(self) -> None:
        while mount_type(self.path) is not None:
            run("umount", "-l", self.path)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.remove()


@pytest.fixture
def instance(disk: Disk, make_instance: MakeInstance) -> Instance:
    made = make_instance(store=disk.path / "store")
    # A store that vanishes under the daemon is an error that it has to report.
    made.expect_log("EIO|Input/output error|failed|fenced|damaged|shut down|gone away")
    return made.mount()


class Load:
    """What is written to a mount at once, and how much of it has been promised to be there afterwards."""

    def __init__(self, instance: Instance, chance: random.Random) -> None:
        self._instance = instance
        self._root = instance.path
        self._chance = chance
        self.volume = create(self._root / "vm1", VOLUME_BYTES)
        self.growing = create(self._root / "growing", 0)
        self.streams = streams_of(VOLUME_BYTES, 4, SLOTS, (SECTOR_BYTES, 512, 3 * SECTOR_BYTES, SECTOR_BYTES))
        self.appended = Stream(9, 0, 1 << 20)
        self.snapshots: dict[str, list[int]] = {}
        """Of each that was acknowledged, how many writes of every stream it holds."""
        self.created: list[str] = []
        self.forgotten = 0
        """Writes that were acknowledged and not synced, and are gone. None at all would mean that no power was lost."""
        self._made = 0

    # Under way

    def tasks(self, *, flush: bool) -> list[Task]:
        """Without ``flush``, all that is promised of the volume is what ``take_snapshot`` froze."""
        writers: list[Task] = [
            self._writer(stream, direct=number % 2 == 0, flush=flush) for number, stream in enumerate(self.streams)
        ]
        return [*writers, self._append, *([self._snapshot_and_create] if flush else [])]

    def _writer(self, stream: Stream, *, direct: bool, flush: bool) -> Task:
        def task(stop: threading.Event) -> None:
            chance = random.Random(self._chance.random())
            with suppress(OSError), opened(self.volume, os.O_RDWR | (os.O_DIRECT if direct else 0)) as descriptor:
                while not stop.is_set():
                    stream.write(descriptor)
                    if flush and chance.random() < 0.05:
                        stream.flush(descriptor)

        return task

    def _append(self, stop: threading.Event) -> None:
        """Here the place of write n is behind that of write n - 1, and the size grows with it."""
        stream = self.appended
        with suppress(OSError), opened(self.growing, os.O_WRONLY) as descriptor:
            while not stop.is_set():
                number = stream.issued + 1
                stream.issued = number
                os.pwrite(descriptor, stream.stamps(number, number), (number - 1) * SECTOR_BYTES)
                stream.acknowledged = number
                if number % 16 == 0:
                    stream.flush(descriptor)

    def take_snapshot(self) -> str:
        """What it holds when it is looked at now is what it has to hold afterwards."""
        self._made += 1
        at_least = [stream.acknowledged for stream in self.streams]
        path = self._instance.snapshot(self.volume.name, f"s{self._made}")
        at_most = [stream.issued for stream in self.streams]
        content = read_all(path)
        self.snapshots[path.name] = [
            stream.expect_prefix(content, *bounds)
            for stream, bounds in zip(self.streams, zip(at_least, at_most, strict=True), strict=True)
        ]
        return path.name

    def _snapshot_and_create(self, stop: threading.Event) -> None:
        with suppress(OSError, ArchipError):
            while not stop.wait(0.03):
                taken = self.take_snapshot()
                if self._made % 4 == 0:
                    name = f"n{self._made}"
                    create(self._root / name, MIB)
                    self.created.append(name)
                if self._made % 4 == 2:
                    name = f"c{self._made}"
                    clone(self._root / taken, name)
                    self.snapshots[name] = self.snapshots[taken]

    # Afterwards

    def expect(self) -> None:
        """All that was promised is there, and nothing that was never written. Goes on from what is there."""
        present = set(os.listdir(self._root))
        assert present >= {*self.created, *self.snapshots}, f"missing: {({*self.created, *self.snapshots}) - present}"
        for name, frozen in self.snapshots.items():
            content = read_all(self._root / name)
            for stream, writes in zip(self.streams, frozen, strict=True):
                try:
                    stream.expect_prefix(content, writes, writes)
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from error
        content = read_all(self.volume)
        for stream, covered in zip(self.streams, self._covered(), strict=True):
            newest = stream.expect_survivors(content, covered, stream.issued)
            self.forgotten += stream.acknowledged - newest
        self._expect_appended()

    def _covered(self) -> list[int]:
        """How much of each stream is promised: by its own flushes, and by every snapshot that returned."""
        least = [stream.durable for stream in self.streams]
        for frozen in self.snapshots.values():
            least = list(map(max, least, frozen))
        return least

    def _expect_appended(self) -> None:
        stream = self.appended
        content = read_all(self.growing)
        assert stream.durable * SECTOR_BYTES <= len(content) <= stream.issued * SECTOR_BYTES
        for number in range(1, len(content) // SECTOR_BYTES + 1):
            piece = content[(number - 1) * SECTOR_BYTES : number * SECTOR_BYTES]
            allowed = [stream.stamps(number, number)] + ([] if number <= stream.durable else [bytes(SECTOR_BYTES)])
            assert piece in allowed, (
                f"appended sector {number} of {len(content) // SECTOR_BYTES} is neither old nor new"
            )

    def start_anew(self) -> None:
        """Fresh volumes for the next round, over a past that remains: what is old then comes from below."""
        for name in os.listdir(self._root):
            if name not in (self.volume.name, self.growing.name):
                os.unlink(self._root / name)
        self.snapshots.clear()
        self.created.clear()
        with opened(self.volume) as descriptor:
            for stream in self.streams:
                # Whatever mixture the crash has left is written over, in order.
                for _ in range(stream.slots):
                    stream.write(descriptor)
            os.fsync(descriptor)
        for stream in self.streams:
            stream.restart(stream.issued)
        os.truncate(self.growing, 0)
        self.appended = Stream(9, 0, 1 << 20)
        snapshot(self.volume, "base")


def reboot(instance: Instance, disk: Disk) -> None:
    """The power is back: nothing of the run directory is left."""
    shutil.rmtree(instance.root / "run")
    disk.umount()
    disk.mount()
    instance.mount()


def test_power_loss_under_load(instance: Instance, disk: Disk) -> None:
    chance = random.Random(SEED)
    load = Load(instance, chance)
    for round_number in range(ROUNDS):
        load.start_anew()
        flush = round_number % 3 != 0
        with threads(load.tasks(flush=flush)) as stop:
            stop.wait(chance.uniform(*LOAD_SECONDS))
            if not flush:
                load.take_snapshot()
            disk.lose_power()
            if round_number % 2:
                stop.wait(0.05)  # the daemon meets a store that fails before it dies itself
            instance.kill()
        reboot(instance, disk)
        try:
            load.expect()
            instance.check()
        except AssertionError as error:
            raise AssertionError(f"round {round_number}: {error}") from error
    assert load.forgotten > 0


def test_a_store_that_failed_under_a_living_daemon_is_believed_no_further_than_it_was_synced(
    instance: Instance, disk: Disk
) -> None:
    """The live bitmap says what was written, but the store forgot it: after a flush has failed it must not count."""
    load = Load(instance, random.Random(SEED))
    for round_number in range(4):
        load.start_anew()
        with threads(load.tasks(flush=True)) as stop:
            stop.wait(0.4)
            disk.lose_power()
            with suppress(OSError), opened(load.volume) as descriptor:
                os.fsync(descriptor)
                raise AssertionError("an fsync was answered although the store is gone")
        if round_number % 2:
            instance.kill()
        else:
            instance.archip("umount", check=False)
            if instance.daemon_pid() is not None:
                instance.kill()
        disk.umount()
        disk.mount()
        instance.mount()
        try:
            load.expect()
            instance.check()
        except AssertionError as error:
            raise AssertionError(f"round {round_number}: {error}") from error
