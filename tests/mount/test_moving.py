"""Several backends under one mount: they come and go, and volumes move between them while programs write to them."""

import random
import threading
import time
from pathlib import Path

import pytest

from archipfs.errors import ArchipError
from tests.conftest import MakeInstance
from tests.lib.instance import Instance
from tests.lib.stream import Stream
from tests.lib.volumes import SECTOR_BYTES, create, opened, read_all
from tests.lib.waiting import Task, threads, wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 24 * MIB
KILLS = 3


def add_backend(instance: Instance, name: str) -> Path:
    place = instance.directory / name
    assert instance.archip("backend-create", name, "--driver", "file", "--path", place).stderr == ""
    return place


def where(instance: Instance) -> dict[str, str]:
    return {each["name"]: each["backend"] for each in instance.call("volume-list")}


def move(instance: Instance, name: str, origin: str, target: str) -> None:
    instance.call("volume-move", name=name, origin=origin, target=target)


def writer(stream: Stream, path: Path) -> Task:
    """Write, and flush now and then, until told to stop."""

    def task(stop: threading.Event) -> None:
        with opened(path) as descriptor:
            while not stop.is_set():
                stream.write(descriptor)
                if stream.issued % 50 == 0:
                    stream.flush(descriptor)

    return task


def test_backends_come_and_go(mount: Instance) -> None:
    add_backend(mount, "fast")
    assert [each["name"] for each in mount.call("backend-list")] == ["default", "fast"]
    mount.archip("volume-create", "--name", "vm1", "--size", "1M", "--backend", "fast")
    (mount.path / "vm1").write_bytes(b"here")
    assert "holds a volume or snapshot, vm1 for one" in mount.refused("backend-remove", "fast")
    with opened(mount.path / "vm1"):
        assert "vm1 in backend fast is open" in mount.refused("backend-remove", "fast", "--keep-data")
    wait_until(lambda: not mount.call("status")["open_volumes"], "vm1 is closed")
    mount.archip("backend-remove", "fast", "--keep-data")
    assert [each["name"] for each in mount.call("volume-list")] == []
    assert list(mount.path.iterdir()) == []
    add_backend(mount, "fast")
    assert read_all(mount.path / "vm1")[:4] == b"here"


def test_a_copy_does_not_show_beside_its_original(mount: Instance) -> None:
    add_backend(mount, "fast")
    create(mount.path / "vm1", MIB)
    (mount.path / "vm1").write_bytes(b"here")
    mount.archip("backend-sync", "--origin", "default", "--target", "fast")
    assert [path.name for path in mount.path.iterdir()] == ["vm1"]
    (mount.path / "vm1").unlink()
    assert list(mount.path.iterdir()) == []
    (mount.path / "vm1").write_bytes(b"another")
    (mount.path / "vm1").unlink()
    mount.archip("backend-sync", "--origin", "fast", "--target", "default")
    assert read_all(mount.path / "vm1")[:4] == b"here"
    assert where(mount) == {"vm1": "default"}


def test_a_volume_moves_while_it_is_written(mount: Instance) -> None:
    add_backend(mount, "fast")
    path = create(mount.path / "vm1", SIZE)
    streams = [Stream(1, 0, 1500), Stream(2, 8 * MIB, 400, 8 * SECTOR_BYTES)]
    inode = path.stat().st_ino
    with threads([writer(stream, path) for stream in streams]):
        wait_until(lambda: streams[0].issued > 200, "it is being written")
        mount.snapshot("vm1", "vm1@monday")
        for origin, target in (("default", "fast"), ("fast", "default"), ("default", "fast")):
            before = streams[0].acknowledged
            move(mount, "vm1", origin, target)
            wait_until(lambda before=before: streams[0].acknowledged > before + 20, "it goes on")
            assert where(mount) == {"vm1": target, "vm1@monday": "default"}
    assert path.stat().st_ino == inode
    for stream in streams:
        stream.expect_prefix(read_all(path), stream.acknowledged, stream.issued)
    mount.remount()
    content = read_all(path)
    for stream in streams:
        stream.expect_prefix(content, stream.acknowledged, stream.issued)
    assert where(mount)["vm1"] == "fast"


def test_kills_of_the_daemon_while_a_volume_moves(make_instance: MakeInstance) -> None:
    instance = make_instance(supervised=True).mount()
    if instance.json("status")[0]["supervisor_pid"] is None:
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND")
    add_backend(instance, "fast")
    path = create(instance.path / "vm1", SIZE)
    stream = Stream(1, 0, 1500)
    chance = random.Random(3)
    ended = threading.Event()

    def mover(stop: threading.Event) -> None:
        place = "default"
        while not stop.is_set() and not ended.is_set():
            target = "fast" if place == "default" else "default"
            try:
                move(instance, "vm1", place, target)
            except (ArchipError, OSError):
                continue  # killed again while it was asked once more
            place = target

    with threads([writer(stream, path), mover]):
        wait_until(lambda: stream.issued > 200, "it is being written")
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.2, 0.8))
            instance.wait_for_another_daemon(instance.kill_daemon())
        before = stream.acknowledged
        wait_until(lambda: stream.acknowledged > before + 100, "it goes on")
        ended.set()
    stream.expect_prefix(read_all(path), stream.acknowledged, stream.issued)
    [place] = where(instance).values()
    if place == "default":
        move(instance, "vm1", "default", "fast")
    stream.expect_prefix(read_all(path), stream.acknowledged, stream.issued)
    wait_until(lambda: not list((instance.store / "data" / "layer").iterdir()), "nothing is left where it was")


@pytest.mark.ceph
def test_from_a_directory_to_ceph_and_back(mount: Instance, ceph_backend: dict[str, str]) -> None:
    options = [each for name, value in ceph_backend.items() for each in (f"--{name}", value)]
    assert mount.archip("backend-create", "ceph", "--driver", "rados", *options).stderr == ""
    path = create(mount.path / "vm1", SIZE)
    stream = Stream(1, 0, 1500)
    with threads([writer(stream, path)]):
        wait_until(lambda: stream.issued > 200, "it is being written")
        mount.snapshot("vm1", "vm1@monday")
        mount.archip("volume-seal", "vm1@monday")
        first = mount.json("backend-sync", "--origin", "default", "--target", "ceph")
        assert (sorted(first["copied"]), first["passed_over"]) == (["vm1", "vm1@monday"], [])
        for origin, target in (("default", "ceph"), ("ceph", "default"), ("default", "ceph")):
            before = stream.acknowledged
            move(mount, "vm1", origin, target)
            wait_until(lambda before=before: stream.acknowledged > before + 20, "it goes on")
    stream.expect_prefix(read_all(path), stream.acknowledged, stream.issued)
    monday = read_all(mount.path / "vm1@monday")
    mount.remount()
    stream.expect_prefix(read_all(path), stream.acknowledged, stream.issued)
    mount.archip("volume-move", "vm1@monday", "--from", "default", "--to", "ceph")
    assert read_all(mount.path / "vm1@monday") == monday
    assert where(mount) == {"vm1": "ceph", "vm1@monday": "ceph"}
    again = mount.json("backend-sync", "--origin", "ceph", "--target", "default")
    assert again["passed_over"] == []
    assert mount.json("backend-sync", "--origin", "ceph", "--target", "default")["copied"] == []
