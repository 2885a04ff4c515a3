"""SIGKILL of the daemon at any moment: every acknowledged write is there after one ``archip mount``."""

import json
import os
import random
import re
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.lib.instance import Instance
from tests.lib.stream import Stream, streams_of
from tests.lib.volumes import SECTOR_BYTES, clone, create, opened, read_all, rollback, snapshot
from tests.lib.waiting import Task, threads, wait_until
from tests.lib.ways import FRONT, PLAIN, POOL, Way

pytestmark = [pytest.mark.mount, pytest.mark.ways(FRONT, PLAIN, POOL)]


MIB = 1 << 20
VOLUME_BYTES = 16 * MIB


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


def write_until_killed(path: Path, stream: Stream, flags: int, flush_every: int) -> Task:
    def task(stop: threading.Event) -> None:
        with suppress(OSError), opened(path, os.O_RDWR | flags) as descriptor:
            while not stop.is_set():
                stream.write(descriptor)
                if flush_every and stream.issued % flush_every == 0:
                    stream.flush(descriptor)

    return task


@pytest.mark.parametrize(("flags", "writers"), [(os.O_DIRECT, 16), (0, 4)], ids=["direct", "buffered"])
def test_every_acknowledged_write_outlives_the_daemon(mount: Instance, way: Way, flags: int, writers: int) -> None:
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    streams = streams_of(VOLUME_BYTES, writers, 40, (SECTOR_BYTES, 512, 3 * SECTOR_BYTES))
    for round_number in (1, 2) if way is POOL else range(4):
        # In odd rounds the writes go to a fresh head: what it does not hold comes from below. The later half flushes.
        if round_number % 2:
            snapshot(volume, f"s{round_number}")
        flush_every = (0, 30)[round_number // 2]
        wanted = [stream.acknowledged + 60 for stream in streams]
        with threads([write_until_killed(volume, stream, flags, flush_every) for stream in streams]):
            wait_until(
                lambda wanted=wanted: all(  # type: ignore[misc]
                    stream.acknowledged >= least for stream, least in zip(streams, wanted, strict=True)
                ),
                "all writers are at it",
            )
            mount.kill()
        mount.mount()
        mount.check()
        content = read_all(volume)
        with opened(volume, os.O_RDWR) as descriptor:
            for stream in streams:
                stream.expect_survivors(content, stream.acknowledged, stream.issued)
                stream.repeat(descriptor)


def test_a_size_that_writing_gave_outlives_the_daemon(mount: Instance) -> None:
    volume = create(mount.path / "vm1", 0)
    with opened(volume, os.O_RDWR | os.O_APPEND) as descriptor:
        for _ in range(300):
            os.write(descriptor, b"x" * 1000)
        mount.kill()
    mount.mount()
    assert volume.stat().st_size == 300_000
    assert read_all(volume) == b"x" * 300_000


@pytest.mark.directory("st_blocks says how far fio has got; of a pool it counts stripes of 4 MiB")
@pytest.mark.parametrize(
    "engine",
    [
        ["--ioengine=libaio", "--direct=1", "--iodepth=16"],
        ["--ioengine=psync", "--direct=0", "--numjobs=1"],
    ],
    ids=["libaio-direct", "psync-buffered"],
)
def test_fio_verifies_what_it_wrote_before_the_daemon_was_killed(
    mount: Instance, tmp_path: Path, engine: list[str]
) -> None:
    """fio verifies all that it had issued. What it finds missing must not be in its log of completed writes."""
    # Far more than it gets to before it is noticed that it is at it.
    volume = create(mount.path / "vm1", 1024 * MIB)
    job = ["fio", "--name=job", f"--filename={volume}", "--size=1G", "--rw=randwrite", "--bs=4k", "--randseed=7"]
    job += ["--verify=crc32c", "--output-format=json", *engine]
    log_options = ["--write_lat_log=job", "--log_offset=1"]
    writing = subprocess.Popen(
        [*job, "--do_verify=0", "--verify_state_save=1", *log_options],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: volume.stat().st_blocks * 512 > 8 * MIB or writing.poll() is not None, "fio is at it")
    mount.kill()
    assert writing.wait(timeout=60) != 0, "fio ended before the kill"
    lines = (tmp_path / "job_clat.1.log").read_text().splitlines()
    acknowledged = {int(line.split(",")[4]) for line in lines}
    assert len(acknowledged) >= 8 * MIB // SECTOR_BYTES // 2

    mount.mount()
    verifying = subprocess.run(
        [*job, "--verify_only=1", "--verify_state_load=1", "--continue_on_error=verify"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    verified = json.loads(verifying.stdout[verifying.stdout.index("{") :])["jobs"][0]["read"]["total_ios"]
    assert verified >= len(acknowledged), verifying.stderr
    missing = {int(offset) for offset in re.findall(r"requested block: offset=(\d+)", verifying.stderr)}
    assert not missing & acknowledged, verifying.stderr


def test_one_mount_command_heals_the_stale_mount(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    volume.write_bytes(b"here")
    mount.kill()
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.statvfs(mount.path)
    mount.archip("mount", mount.path)
    assert read_all(volume) == b"here"


@pytest.mark.directory("what recovery removes is the same in every store")
def test_a_removed_volume_that_was_open_at_the_kill_gives_its_space_back(
    make_instance: MakeInstance, front: bool
) -> None:
    mount = make_instance(front=front).mount()
    volume = create(mount.path / "vm1", 8 * MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, os.urandom(8 * MIB), 0)
        os.unlink(volume)
        mount.kill()
    mount.mount()
    wait_until(lambda: mount.stored_bytes() < MIB, "the space has come back")
    assert mount.check() == []


# Kill while names and layers change

World = dict[str, bytes]
"""What each name holds."""


@dataclass
class Step:
    """One operation: what it does on the mount, and what it makes of the world."""

    do: Callable[[], object]
    after: World
    free_names: tuple[str, ...] = ()
    """Prefixes of names that the operation makes up by itself."""


def content_of(number: int, size: int = 8 * SECTOR_BYTES) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def a_snapshot(root: Path, world: World, number: int) -> Step:
    return Step(lambda: snapshot(root / "vm", f"s{number}"), {**world, f"s{number}": world["vm"]})


def a_clone(root: Path, world: World, number: int) -> Step:
    return Step(lambda: clone(root / "vm", f"c{number}"), {**world, f"c{number}": world["vm"]})


def a_resize(root: Path, world: World, number: int) -> Step:
    size = (3 + number % 7) * SECTOR_BYTES + number % 100
    resized = world["vm"][:size] + bytes(max(0, size - len(world["vm"])))
    return Step(lambda: os.truncate(root / "vm", size), {**world, "vm": resized})


def a_rename(root: Path, world: World, number: int) -> Step:
    """To a free name, or onto another volume, which it replaces."""
    old = next(name for name in sorted(world) if name != "vm")
    new = f"r{number}" if number % 2 else max(name for name in world if name != "vm")
    return Step(lambda: os.rename(root / old, root / new), {**without(world, old), new: world[old]})


def a_rollback(root: Path, world: World, number: int) -> Step:
    to = "base"
    after = {**world, "vm": world[to]}
    return Step(lambda: rollback(root / "vm", to), after, free_names=("vm@before-rollback-",))


def a_removal(root: Path, world: World, number: int) -> Step:
    name = max(name for name in world if name not in ("vm", "base"))
    return Step(lambda: os.unlink(root / name), without(world, name))


def a_write(root: Path, world: World, number: int) -> Step:
    after = {**world, "vm": content_of(number, len(world["vm"]) & ~3).ljust(len(world["vm"]), b"\0")}
    return Step(lambda: (root / "vm").open("r+b").write(after["vm"]), after)


def without(world: World, name: str) -> World:
    return {key: value for key, value in world.items() if key != name}


OPERATIONS: Mapping[str, Callable[[Path, World, int], Step]] = {
    "snapshot": a_snapshot,
    "clone": a_clone,
    "resize": a_resize,
    "rename": a_rename,
    "rollback": a_rollback,
    "remove": a_removal,
}


def look(root: Path, made_up: tuple[str, ...] = ()) -> World:
    """The world as it is, without names that an operation has made up."""
    return {name: read_all(root / name) for name in os.listdir(root) if not made_up or not name.startswith(made_up)}


@pytest.mark.directory("records change in the same order in every store; tests/compose stops after each")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_leaves_the_state_before_or_after(mount: Instance, operation: str) -> None:
    chance = random.Random(operation)
    create(mount.path / "vm", 8 * SECTOR_BYTES).write_bytes(content_of(0))
    snapshot(mount.path / "vm", "base")
    world: World = {"vm": content_of(0), "base": content_of(0)}
    number = 0
    rollbacks = ("vm@before-rollback-",)
    for _ in range(3):
        # Enough to rename and to remove, made before the clock runs.
        for _ in range(5):
            number += 1
            create(mount.path / f"n{number:03}", SECTOR_BYTES).write_bytes(content_of(number, SECTOR_BYTES))
            world[f"n{number:03}"] = content_of(number, SECTOR_BYTES)
        timer = threading.Timer(chance.uniform(0.02, 0.15), mount.kill)
        timer.start()
        step = Step(lambda: None, world)
        try:
            while True:
                number += 1
                makes_room = operation in ("rename", "remove") and len(world) < 5
                make = a_clone if makes_room else OPERATIONS[operation]
                step = make(mount.path, world, number)
                repeat_while_busy(step.do)
                world = step.after
        except OSError:
            pass
        timer.join()
        mount.mount()
        mount.check()
        found = look(mount.path, rollbacks)
        assert found in (world, step.after), f"{operation} {number}: {differences(found, world, step.after)}"
        world = found
    mount.remount()
    assert look(mount.path, rollbacks) == world


def repeat_while_busy(do: Callable[[], object]) -> None:
    """A volume that was just closed may still be busy for a moment."""

    def done() -> bool:
        try:
            do()
        except BlockingIOError:
            return False
        return True

    wait_until(done, "it is done")


def differences(found: World, before: World, after: World) -> str:
    def shown(world: World) -> dict[str, str]:
        return {name: f"{len(content)} bytes of {content[:4].hex()}" for name, content in sorted(world.items())}

    return f"found {shown(found)}, neither before {shown(before)} nor after {shown(after)}"
