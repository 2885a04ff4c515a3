"""Sealing beside a mount in use: what is read stays the same, whatever happens meanwhile."""

import os
import random
import shutil
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from archipfs.config import load_config
from archipfs.daemon.client import DaemonClient, connect_daemon
from archipfs.errors import DaemonError
from tests.conftest import MakeInstance
from tests.lib.instance import Instance, kill_process
from tests.lib.volumes import SECTOR_BYTES, create, opened, read_all
from tests.lib.waiting import Task, threads, wait_until
from tests.lib.ways import FRONT, PLAIN, POOL, Way

pytestmark = [pytest.mark.mount, pytest.mark.ways(FRONT, PLAIN, POOL)]

VOLUME_BYTES = 24 << 20


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def write(path: Path, offset: int, data: bytes) -> None:
    with opened(path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, data, offset)


def seal(path: Path, value: bytes = b"") -> None:
    os.setxattr(path, "user.archip.seal", value)


def state(path: Path) -> str:
    return os.getxattr(path, "user.archip.state").decode()


def test_a_snapshot_is_sealed_by_its_attribute(mount: Instance, way: Way) -> None:
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    content = noise(1, 5 << 20)
    write(volume, 1 << 20, content)
    snap = mount.snapshot("vm1", "snap")
    expected = read_all(snap)
    blocks = snap.stat().st_blocks
    wait_until(lambda: state(snap) == "frozen", "it is closed")
    seal(snap)
    assert state(snap) == "sealed"
    assert mount.call("volume-info", name="snap")["sealed"]
    assert abs(snap.stat().st_blocks - blocks) < blocks // 10
    if way is not POOL:  # which keeps it for a minute, as other nodes may be reading it
        assert mount.stored_bytes() < 1 << 20
    assert read_all(snap) == expected
    assert read_all(volume) == expected
    seal(volume, b"live")
    mount.remount()
    assert read_all(snap) == expected
    assert read_all(volume) == expected


def test_the_same_data_is_stored_once(mount: Instance) -> None:
    content = noise(1, 5 << 20)
    for name in ("vm1", "vm2"):
        write(create(mount.path / name, VOLUME_BYTES), 0, content)
        seal(mount.path / name, b"live")
    assert mount.packed_bytes() < 6 << 20


@pytest.mark.directory("the prefixes of test_snapshots_under_load say as much of a pool, in less time")
def test_sealing_beside_verified_writes(mount: Instance) -> None:
    """fio writes and verifies all the time, and a snapshot is taken and sealed again and again."""
    fio = shutil.which("fio")
    assert fio is not None, "install fio"
    size = 12 << 20
    volume = create(mount.path / "vm1", size)
    arguments = ["--name=job", f"--filename={volume}", "--rw=randwrite", "--bs=4k", "--direct=1", "--iodepth=4"]
    arguments += ["--ioengine=libaio", f"--size={size}", "--verify=crc32c", "--verify_fatal=1", "--loops=2"]
    arguments += ["--rate_iops=3000", "--verify_backlog=256", "--verify_state_save=0"]
    process = subprocess.Popen([fio, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    contents: dict[Path, int] = {}
    try:
        number = 0
        while process.poll() is None:
            snap = mount.snapshot("vm1", f"snap{number}")
            contents[snap] = hash(read_all(snap))
            mount.call("volume-seal", name=snap.name)
            number += 1
    finally:
        process.kill()
        out, _ = process.communicate()
    assert process.returncode == 0, out
    assert number > 1
    assert {snap: hash(read_all(snap)) for snap in contents} == contents
    wait_until(lambda: all(state(snap) == "sealed" for snap in contents), "they are closed, and sealed")
    mount.remount()
    assert {snap: hash(read_all(snap)) for snap in contents} == contents


@pytest.mark.directory("what is merged into what is the same in every store")
def test_many_snapshots_sealed_leave_a_chain_of_one(mount: Instance) -> None:
    count = 40
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    write(volume, 0, noise(0, 1 << 20))
    for number in range(count):
        write(volume, number * SECTOR_BYTES, noise(number + 1, SECTOR_BYTES))
        mount.snapshot("vm1", f"vm1@{number}")
    expected = read_all(volume)
    assert mount.call("volume-info", name="vm1")["layers"] == count + 1
    mount.call("volume-seal", name="vm1")
    assert mount.call("volume-info", name="vm1")["layers"] == 2
    assert read_all(volume) == expected
    for number in (0, 17, count - 1):
        content = read_all(mount.path / f"vm1@{number}")
        assert content[: (number + 1) * SECTOR_BYTES] == expected[: (number + 1) * SECTOR_BYTES]


def test_a_daemon_that_is_killed_while_it_seals(make_instance: MakeInstance, front: bool) -> None:
    """Again and again at other moments; then LMDB and the object cache are deleted."""
    mount = make_instance(front=front, supervised=front).mount()
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    write(volume, 0, noise(1, VOLUME_BYTES // 2))
    expected = read_all(volume)
    for number in range(3):
        write(volume, number << 20, noise(number + 2, 1 << 20))
        expected = expected[: number << 20] + noise(number + 2, 1 << 20) + expected[(number + 1) << 20 :]
        mount.snapshot("vm1", f"vm1@{number}")
        daemon = connect_daemon(load_config(root=mount.root))
        assert daemon is not None
        with threads([sealer(daemon, f"vm1@{number}")]):
            threading.Event().wait(0.01 + 0.06 * number)
            pid = mount.daemon_pid()
            assert pid is not None
            kill_process(pid)
            if front:
                mount.wait_for_another_daemon(pid)
        if not front:
            mount.mount()
        assert read_all(volume) == expected
    mount.umount()
    shutil.rmtree(mount.root / "state" / "cache")
    mount.mount()
    mount.call("volume-seal", name="vm1")
    assert read_all(volume) == expected
    assert mount.call("volume-info", name="vm1")["layers"] == 2


def sealer(daemon: DaemonClient, name: str) -> Task:
    def task(stop: threading.Event) -> None:
        with daemon, suppress(DaemonError):
            daemon.call("volume-seal", name=name)

    return task


@pytest.mark.directory("when something is sealed does not depend on the store")
def test_old_snapshots_are_sealed_in_the_background(make_instance: MakeInstance, front: bool) -> None:
    mount = make_instance(front=front)
    (mount.root / "archipfs.toml").write_text("[seal]\nafter = 0.1\nlive_after = 1\n")
    mount.mount()
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    write(volume, 0, noise(1, 1 << 20))
    snap = mount.snapshot("vm1", "snap")
    write(volume, 0, noise(2, 4096))
    expected = read_all(volume)
    wait_until(lambda: state(snap) == "sealed", "the snapshot is sealed")
    wait_until(lambda: mount.stored_bytes() < 64 << 10, "the volume that nobody writes is sealed")
    assert read_all(volume) == expected


@pytest.mark.directory("what is imported is sealed as everything else")
def test_a_sparse_file_is_imported(mount: Instance, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as stream:
        stream.truncate(VOLUME_BYTES)
        stream.seek(9 << 20)
        stream.write(noise(1, 3 << 20))
    mount.archip("volume-import", image, "--name", "vm1")
    assert read_all(mount.path / "vm1") == image.read_bytes()
    assert "exists already" in mount.refused("volume-import", image, "--name", "vm1")
    assert "there is no file" in mount.refused("volume-import", tmp_path / "none", "--name", "vm2")
