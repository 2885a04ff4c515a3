"""A killed daemon is a pause: nothing that uses the mount sees an error, and nothing happens twice or not at all."""

import ctypes
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.lib.instance import Instance
from tests.lib.stream import Stream, streams_of
from tests.lib.volumes import SECTOR_BYTES, clone, create, opened, read_all, rollback, snapshot
from tests.lib.waiting import Task, threads, wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20
KILLS = int(os.environ.get("ARCHIPFS_RESTART_KILLS", "20"))
MOUNTS = 2
"""The kills are divided among so many mounts beside each other: one alone cannot be killed any faster."""
GAP_SECONDS = (7.6, 8.2)
"""Between two kills: five deaths in thirty seconds would be one too many."""
PAUSE_SECONDS_MAX = 60.0
"""A bound for a machine that is busy with other things; what it really takes stands in docs/benchmarks.md."""

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
libc = ctypes.CDLL(None, use_errno=True)


def punch(descriptor: int, offset: int, length: int) -> None:
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    if libc.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "punch")


@dataclass
class Pauses:
    """How long calls took, the longest of each kind. Every call of this test goes through here."""

    longest: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def call(self, kind: str, do: Callable[..., object], *arguments: object) -> None:
        begun = time.monotonic()
        do(*arguments)
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - begun)
        self.counts[kind] = self.counts.get(kind, 0) + 1


def write_stream(path: Path, stream: Stream, flags: int, pauses: Pauses) -> Task:
    def task(stop: threading.Event) -> None:
        with opened(path, os.O_RDWR | flags) as descriptor:
            while not stop.is_set():
                pauses.call("write", stream.write, descriptor)
                if stream.issued % 200 == 0:
                    pauses.call("fsync", stream.flush, descriptor)

    return task


def snapshot_and_clone(path: Path, pauses: Pauses, made: list[str]) -> Task:
    """Every call has to succeed: a snapshot that is taken twice would find its own name taken."""

    def task(stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            pauses.call("snapshot", snapshot, path, f"s{number}")
            pauses.call("clone", clone, path.with_name(f"s{number}"), f"c{number}")
            made.append(f"c{number}")
            if number % 3 == 0:
                pauses.call("unlink", os.unlink, path.with_name(f"s{number}"))
            else:
                made.append(f"s{number}")

    return task


def make_rename_remove(root: Path, pauses: Pauses) -> Task:
    """A volume is made, filled, renamed to a free name and onto another one, and removed while it is open."""

    def task(stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            content = number.to_bytes(4, "big") * (SECTOR_BYTES // 2)
            first, second = root / f"first{number % 5}", root / f"second{number % 5}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(first, flags, 0o600)
            try:
                pauses.call("small write", os.pwrite, descriptor, content, 0)
                pauses.call("rename", os.rename, first, second)
                other = os.open(first, flags, 0o600)
                pauses.call("small write", os.pwrite, other, b"replaced", 0)
                pauses.call("rename", os.rename, second, first)
                assert os.pread(other, 100, 0) == b"replaced", "what was replaced is there for who has it open"
                pauses.call("close", os.close, other)
                pauses.call("unlink", os.unlink, first)
                assert os.pread(descriptor, len(content), 0) == content, "what was removed is there while it is open"
                assert os.fstat(descriptor).st_size == len(content)
            finally:
                os.close(descriptor)
            assert not first.exists()
            assert not second.exists()

    return task


def resize_discard_copy(root: Path, pauses: Pauses) -> Task:
    """Sizes, holes and copies of ranges, against a byte array, in a volume of its own."""

    def task(stop: threading.Event) -> None:
        chance = random.Random(5)
        size = 2 * MIB
        path = create(root / "ranges", size)
        model = bytearray(size)
        with opened(path) as descriptor:
            while not stop.is_set():
                offset = chance.randrange(0, size // 2, 512)
                length = chance.randrange(512, size // 4, 512)
                match chance.randrange(4):
                    case 0:
                        data = chance.randbytes(length)
                        pauses.call("write", os.pwrite, descriptor, data, offset)
                        model[offset : offset + length] = data
                    case 1:
                        pauses.call("discard", punch, descriptor, offset, length)
                        model[offset : offset + length] = bytes(length)
                    case 2:
                        pauses.call("truncate", os.ftruncate, descriptor, offset + length)
                        pauses.call("truncate", os.ftruncate, descriptor, size)
                        model[offset + length :] = bytes(size - offset - length)
                    case 3:
                        to = chance.randrange(size // 2, size - size // 4, 512)
                        length = min(length, to - offset)
                        copy = os.copy_file_range
                        pauses.call("copy", copy_whole, copy, descriptor, offset, to, length)
                        model[to : to + length] = model[offset : offset + length]
                assert os.pread(descriptor, size, 0) == model

    return task


def copy_whole(copy: Callable[..., int], descriptor: int, offset: int, to: int, length: int) -> None:
    done = 0
    while done < length:
        done += copy(descriptor, descriptor, length - done, offset + done, to + done)


def roll_back(root: Path, pauses: Pauses) -> Task:
    def task(stop: threading.Event) -> None:
        path = create(root / "rolled", 64 * SECTOR_BYTES)
        path.write_bytes(b"base" * 1024)
        os.truncate(path, 64 * SECTOR_BYTES)
        base = read_all(path)
        snapshot(path, "rolled@base")
        while not stop.is_set():
            with opened(path) as descriptor:
                os.pwrite(descriptor, os.urandom(SECTOR_BYTES), 0)
            pauses.call("rollback", roll_back_once, path)
            assert read_all(path) == base
            for kept in root.glob("rolled@before-rollback-*"):
                kept.unlink()

    return task


def roll_back_once(path: Path) -> None:
    """It was closed a moment ago, and may still be in use for as long as its last flush takes."""

    def done() -> bool:
        try:
            rollback(path, "rolled@base")
        except BlockingIOError:
            return False
        return True

    wait_until(done, "the volume is closed")


def list_and_look(root: Path, pauses: Pauses) -> Task:
    def task(stop: threading.Event) -> None:
        while not stop.is_set():
            names: list[str] = []
            pauses.call("list", lambda names=names: names.extend(os.listdir(root)))
            assert "stream" in names
            pauses.call("stat", os.stat, root / "stream")
            pauses.call("statfs", os.statvfs, root)

    return task


def command_line(mount: Instance, pauses: Pauses) -> Task:
    """Commands by the control socket: they wait, and what was cut short is asked again and done once."""

    def task(stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"cli{number}"
            pauses.call("command", lambda name=name: mount.archip("volume-create", "--name", name, "--size", "1M"))
            pauses.call("command", lambda name=name: mount.archip("volume-remove", name))

    return task


def verify_by_fio(path: Path, tmp_path: Path, depth: int, *options: str) -> subprocess.Popen[str]:
    """Writes all over the volume and reads back what it wrote, again and again, until it is told to stop."""
    return subprocess.Popen(
        [
            *("fio", "--name=job", f"--filename={path}", "--size=64M", "--rw=randwrite", "--bs=4k"),
            *(f"--iodepth={depth}", "--verify=crc32c", "--verify_backlog=1024", "--verify_fatal=1"),
            *("--time_based", "--runtime=100000", "--output-format=json", "--eta=never", *options),
        ],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it works in processes of its own, and they all have to end
    )


def expect_no_error(fio: subprocess.Popen[str]) -> float:
    """Have it end, and look at what it found; the longest request in seconds."""
    fio.terminate()
    out, err = fio.communicate(timeout=60)
    job = json.loads(out[out.index("{") :])["jobs"][0]
    assert job["error"] == 0, err
    assert "verify" not in err, err
    assert job["write"]["total_ios"] > 1000
    return max(float(job[kind]["clat_ns"]["max"]) for kind in ("read", "write")) / 1e9


def test_a_store_that_is_away_when_the_daemon_dies_is_waited_for(make_instance: Callable[..., Instance]) -> None:
    mount = make_instance(supervised=True).mount()
    mount.expect_log("cannot go on yet")
    volume = create(mount.path / "vm1", MIB)
    away = mount.store.with_name("away")
    with opened(volume, os.O_RDWR | os.O_DIRECT) as descriptor:
        os.pwrite(descriptor, b"x" * SECTOR_BYTES, 0)
        mount.store.rename(away)
        mount.kill_daemon()
        writer = threading.Thread(target=lambda: os.pwrite(descriptor, b"y" * SECTOR_BYTES, SECTOR_BYTES), daemon=True)
        writer.start()
        wait_until(lambda: mount.logged("cannot go on yet"), "the daemon has seen that its store is away")
        assert writer.is_alive(), "a write was answered without a store"
        away.rename(mount.store)
        writer.join(timeout=60)
        assert not writer.is_alive()
        os.fsync(descriptor)
    assert read_all(volume)[: 2 * SECTOR_BYTES] == b"x" * SECTOR_BYTES + b"y" * SECTOR_BYTES


def test_a_directory_that_is_being_read_when_the_daemon_dies_shows_everything_once(
    make_instance: Callable[..., Instance],
) -> None:
    mount = make_instance(supervised=True).mount()
    there = {f"m{number}-{'x' * 200}" for number in range(300)}
    for name in there:
        create(mount.path / name, 0)
    gone = {name for name in there if name.startswith("m1")}
    with os.scandir(mount.path) as entries:
        seen = [next(entries).name]
        pid = mount.kill_daemon()
        mount.wait_for_another_daemon(pid)
        for number in range(50):
            create(mount.path / f"a{number}", 0)  # before the others in order of names
        for name in gone - set(seen):
            os.unlink(mount.path / name)
        seen += [entry.name for entry in entries]
    assert len(seen) == len(set(seen))
    assert there - gone <= set(seen)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments_are_pauses(make_instance: Callable[..., Instance], tmp_path: Path) -> None:
    mounts = [make_instance(supervised=True).mount() for _ in range(MOUNTS)]
    with ThreadPoolExecutor(MOUNTS) as pool:
        places = [tmp_path / str(number) for number in range(MOUNTS)]
        list(pool.map(expect_pauses, mounts, places, range(MOUNTS), [KILLS // MOUNTS] * MOUNTS))


def expect_pauses(mount: Instance, place: Path, seed: int, kills: int) -> None:
    """Everything that can be under way on a mount is, while its daemon is killed so many times."""
    root, pauses, made = mount.path, Pauses(), list[str]()
    stream_bytes = 4 * MIB
    create(root / "stream", stream_bytes)
    streams = streams_of(stream_bytes, 6, 40, (SECTOR_BYTES, 512, 3 * SECTOR_BYTES))
    direct, buffered = create(root / "direct", 64 * MIB), create(root / "buffered", 64 * MIB)
    chance = random.Random(seed)
    jobs: list[subprocess.Popen[str]] = []
    try:
        (place / "direct").mkdir(parents=True)
        (place / "buffered").mkdir()
        jobs.append(verify_by_fio(direct, place / "direct", 16, "--ioengine=libaio", "--direct=1"))
        jobs.append(verify_by_fio(buffered, place / "buffered", 1, "--ioengine=psync", "--direct=0"))
        tasks = [
            *(write_stream(root / "stream", stream, os.O_DIRECT, pauses) for stream in streams if aligned(stream)),
            *(write_stream(root / "stream", stream, 0, pauses) for stream in streams if not aligned(stream)),
            snapshot_and_clone(root / "stream", pauses, made),
            make_rename_remove(root, pauses),
            resize_discard_copy(root, pauses),
            roll_back(root, pauses),
            list_and_look(root, pauses),
            command_line(mount, pauses),
        ]
        with threads(tasks):
            for _ in range(kills):
                time.sleep(chance.uniform(*GAP_SECONDS))
                assert all(job.poll() is None for job in jobs), "fio has stopped"
                before = mount.daemon_pid()
                mount.kill_daemon()
                wait_until(lambda before=before: mount.daemon_pid() not in (None, before), "there is another daemon")
            time.sleep(2.0)
        longest = {"fio": max(expect_no_error(job) for job in jobs), **pauses.longest}
    finally:
        for job in jobs:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
    print({kind: round(seconds, 3) for kind, seconds in longest.items()}, pauses.counts)
    assert max(longest.values()) < PAUSE_SECONDS_MAX, longest
    assert all(pauses.counts[kind] > kills for kind in ("snapshot", "rename", "discard", "copy", "rollback")), (
        "some operation was hardly ever under way"
    )
    expect_streams(root / "stream", streams, exact=True)
    names = set(os.listdir(root))
    assert set(made) <= names
    assert not [name for name in names if name.startswith(("first", "second", "cli", "rolled@before"))], (
        "something was made twice, or not removed"
    )
    for name in made[-6:]:
        expect_streams(root / name, streams, exact=False)
    mount.remount()
    expect_streams(root / "stream", streams, exact=True)


def aligned(stream: Stream) -> bool:
    return stream.slot_bytes % SECTOR_BYTES == 0


def expect_streams(path: Path, streams: list[Stream], *, exact: bool) -> None:
    """Every write that returned is there; a snapshot holds a prefix of each stream."""
    content = read_all(path)
    for stream in streams:
        stream.expect_prefix(content, stream.acknowledged if exact else 0, stream.issued)
