"""What people and disks do wrong: one clear line where it was done, and nothing else is harmed."""

import errno
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import xxhash

from tests.conftest import MakeInstance
from tests.lib.instance import Instance, mount_type, process_lives
from tests.lib.volumes import SECTOR_BYTES, closes, create, fact, opened, read_all, snapshot
from tests.lib.waiting import wait_until

pytestmark = pytest.mark.mount

MIB = 1 << 20

both_ways = pytest.mark.parametrize("front", [True, False], ids=["front", "plain"])
"""For what passes another way through the daemon; most of what is here does not."""

# Mounting


def test_a_second_daemon_on_one_root_names_the_first(mount: Instance) -> None:
    other = mount.directory / "other"
    other.mkdir()
    line = mount.refused("mount", other)
    assert f"process {mount.daemon_pid()}" in line
    assert str(mount.path) in line
    assert mount_type(other) is None
    (mount.path / "vm1").touch()


def test_a_mount_point_in_use_is_refused(mount: Instance, make_instance: MakeInstance) -> None:
    line = make_instance().refused("mount", mount.path)
    assert f"{mount.path} is in use" in line
    (mount.path / "vm1").touch()


@pytest.mark.parametrize("what", ["missing", "a file"])
def test_a_mount_point_that_is_no_directory_is_refused(make_instance: MakeInstance, what: str) -> None:
    instance = make_instance()
    place = instance.directory / "place"
    if what == "a file":
        place.touch()
    line = instance.refused("mount", place)
    assert str(place) in line
    assert ("does not exist" if what == "missing" else "is not a directory") in line


def test_a_stale_mount_is_taken_away_by_umount_and_replaced_by_mount(mount: Instance) -> None:
    (mount.path / "vm1").write_bytes(b"here")
    mount.kill()
    mount.archip("umount", mount.path)
    assert mount_type(mount.path) is None
    mount.mount()
    mount.kill()
    mount.mount()
    assert read_all(mount.path / "vm1") == b"here"
    mounts = Path("/proc/self/mountinfo").read_text()
    assert mounts.count(f" {mount.path} ") == 1, "one mount lies on another"


def test_umount_of_what_is_in_use_is_refused_and_harms_nothing(mount: Instance) -> None:
    with opened(create(mount.path / "vm1", MIB)) as descriptor:
        line = mount.refused("umount")
        assert "in use" in line
        os.pwrite(descriptor, b"still here", 0)
        assert os.pread(descriptor, 10, 0) == b"still here"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[nodes]\n", "unknown key nodes"),
        ('[node]\nstatedir = "/tmp"\n', "unknown key node.statedir"),
        ('[backend.default]\ndriver = "file"\npath = "/tmp/x"\ncolour = "red"\n', "colour"),
        ('[backend.default]\npath = "/tmp/x"\n', "has no driver"),
        ('[backend.default]\ndriver = "floppy"\n', "floppy"),
        ("[node\n", "is not TOML"),
    ],
)
def test_a_configuration_with_a_mistake_is_refused_by_name(
    make_instance: MakeInstance, text: str, complaint: str
) -> None:
    instance = make_instance()
    instance.checked_at_end = False  # check reads the configuration too
    (instance.root / "archipfs.toml").write_text(text)
    for command in (("mount", instance.path), ("volume-list",)):
        assert complaint in instance.refused(*command)
    assert mount_type(instance.path) is None


# The store


def records(instance: Instance, kind: str) -> list[Path]:
    """The newest version of every record of a kind."""
    places = [place for place in (instance.store / "records" / kind).iterdir() if any(place.glob("[0-9]*"))]
    return [max(place.glob("[0-9]*")) for place in places]


def record_of(instance: Instance, name: str) -> Path:
    [found] = [path for path in records(instance, "volume") if f'"name":"{name}"'.encode() in path.read_bytes()]
    return found


def test_a_store_of_a_newer_format_is_refused_as_such(make_instance: MakeInstance) -> None:
    instance = make_instance().mount()
    (instance.path / "vm1").write_bytes(b"here")
    instance.umount()
    [path] = records(instance, "store")
    original = path.read_bytes()
    header, _, payload = original[1:].partition(b"\n")  # a byte of the driver's comes first
    fields = header.split(b" ")
    newer = payload.replace(b'{"id"', b'{"colour":"red","id"')
    fields[1], fields[4] = b"5", xxhash.xxh3_64_hexdigest(newer).encode()
    path.write_bytes(original[:1] + b" ".join(fields) + b"\n" + newer)
    for command in (("mount", instance.path), ("volume-list",), ("check",)):
        line = instance.refused(*command)
        assert "has format 5" in line
        assert "upgrade archipfs" in line
    path.write_bytes(original)
    instance.mount()
    assert read_all(instance.path / "vm1") == b"here"


@pytest.fixture
def damaged(mount: Instance) -> Instance:
    """A mount with two volumes, the record of one of which, ``bad``, has a bit wrong."""
    (mount.path / "good").write_bytes(b"good")
    (mount.path / "bad").write_bytes(b"bad")
    closes(mount.path / "bad")
    mount.umount()
    path = record_of(mount, "bad")
    original = path.read_bytes()
    path.write_bytes(original[:-3] + bytes([original[-3] ^ 1]) + original[-2:])
    mount.expect_log("damaged")
    mount.checked_at_end = False
    mount.mount()
    return mount


def test_a_damaged_record_fails_its_volume_alone(damaged: Instance) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        os.stat(damaged.path / "bad")
    assert caught.value.errno == errno.EIO
    assert "bad checksum" in damaged.refused("volume-info", "bad")
    assert read_all(damaged.path / "good") == b"good"
    with opened(damaged.path / "good") as descriptor:
        os.pwrite(descriptor, b"GOOD", 0)
    snapshot(damaged.path / "good", "monday")
    assert read_all(damaged.path / "monday") == b"GOOD"
    (damaged.path / "new").write_bytes(b"new")
    os.unlink(damaged.path / "new")


def test_a_damaged_record_hides_no_other_volume_from_listings(damaged: Instance) -> None:
    assert "good" in os.listdir(damaged.path)
    assert "good" in [volume["name"] for volume in damaged.json("volume-list")]


def test_check_names_a_damaged_record(damaged: Instance) -> None:
    done = damaged.archip("check", check=False)
    assert done.returncode == 1
    assert re.search(r"record volume/\w+", done.stdout), done.stdout
    assert "bad checksum" in done.stdout


def test_what_lies_below_a_damaged_record_is_kept(damaged: Instance) -> None:
    """Nobody can tell which layer it leads to, so no layer may be taken for one that nothing leads to."""
    (damaged.path / "other").write_bytes(b"x" * MIB)
    os.unlink(damaged.path / "other")
    damaged.remount()
    path = max(
        (path for path in records(damaged, "volume") if b'"name":"good"' not in path.read_bytes()),
        key=lambda path: path.stat().st_mtime_ns,
    )
    damaged.umount()
    broken = path.read_bytes()
    path.write_bytes(broken[:-3] + bytes([broken[-3] ^ 1]) + broken[-2:])
    damaged.mount()
    assert read_all(damaged.path / "bad") == b"bad"


def test_a_lost_layer_fails_its_volume_alone_and_is_found_by_check(mount: Instance) -> None:
    (mount.path / "good").write_bytes(b"good")
    (mount.path / "bad").write_bytes(b"bad")
    mount.remount()
    layer = mount.json("volume-info", "bad")["layer"]
    [path] = (mount.store / "data" / "layer").rglob(layer)
    kept = path.rename(mount.directory / "kept")
    assert "good" in os.listdir(mount.path)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        read_all(mount.path / "bad")
    assert caught.value.errno == errno.EIO
    assert read_all(mount.path / "good") == b"good"
    assert mount.archip("check", check=False).returncode == 1
    kept.rename(path)
    assert read_all(mount.path / "bad") == b"bad"


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with open(image, "wb") as stream:
        stream.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", image, place], check=True, timeout=60)
    yield place
    subprocess.run(["umount", place], check=True, timeout=60)


@both_ways
def test_a_full_disk_is_enospc_to_the_writer_and_harms_nobody_else(
    small_disk: Path, make_instance: MakeInstance, front: bool
) -> None:
    instance = make_instance(store=small_disk / "store", front=front).mount()
    instance.expect_log("ENOSPC|No space|StoreFull")
    other = create(instance.path / "other", MIB)
    other.write_bytes(b"o" * MIB)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"b" * 16 * MIB)
    volume = create(instance.path / "vm1", 256 * MIB)
    written: list[int] = []
    with opened(volume, os.O_RDWR | os.O_DIRECT) as descriptor:
        with pytest.raises(OSError) as caught:  # noqa: PT011, PT012 - which one is checked below
            for offset in range(0, 256 * MIB, 64 << 10):
                os.pwrite(descriptor, offset.to_bytes(8, "big") * 8192, offset)
                written.append(offset)
        assert caught.value.errno == errno.ENOSPC
        assert len(written) > 100
        os.pwrite(descriptor, b"again" * 13, written[0])  # there is room where something is already
        assert read_all(other) == b"o" * MIB
        with pytest.raises(OSError) as caught:  # noqa: PT011, PT012 - which one is checked below
            for number in range(2000):
                snapshot(volume, f"s{number}")
        assert caught.value.errno == errno.ENOSPC
        instance.check()

        os.unlink(ballast)
        wait_until(lambda: os.statvfs(small_disk).f_bavail * SECTOR_BYTES > 8 * MIB, "the space has come back")
        snapshot(volume, "works-again")
        offset = 200 * MIB
        os.pwrite(descriptor, b"works again!" * 1000, offset)
        os.fsync(descriptor)
        assert os.pread(descriptor, 12, offset) == b"works again!"
    with opened(instance.path / "works-again", os.O_RDONLY) as descriptor:
        for offset in written[1:]:
            assert os.pread(descriptor, 64 << 10, offset) == offset.to_bytes(8, "big") * 8192
    instance.umount()
    instance.check()


@both_ways
def test_a_full_store_is_emptied_by_removing_a_volume(
    small_disk: Path, make_instance: MakeInstance, front: bool
) -> None:
    """Also when there is no block left to write down that it is removed: how else should room be made."""
    instance = make_instance(store=small_disk / "store", front=front).mount()
    instance.expect_log("ENOSPC|No space|StoreFull")
    volume = create(instance.path / "vm1", 256 * MIB)
    with opened(volume) as descriptor:
        for step in (MIB, SECTOR_BYTES):
            offset = step
            with suppress(OSError):
                while True:
                    os.pwrite(descriptor, b"x" * step, offset)
                    offset += 2 * step
    with suppress(OSError):
        for number in range(2000):
            (instance.path / f"n{number}").touch()
    os.unlink(volume)
    wait_until(lambda: os.statvfs(small_disk).f_bavail * SECTOR_BYTES > 8 * MIB, "the space has come back")
    (instance.path / "vm2").write_bytes(b"works again")


# Who is at work with it


def test_a_volume_that_is_open_is_not_removed_by_a_command(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    with opened(volume) as descriptor:
        assert "vm1 is open" in mount.refused("volume-remove", "vm1")
        os.pwrite(descriptor, b"still here", 0)
    wait_until(lambda: fact(volume, "state") == "closed", "it is closed")
    mount.archip("volume-remove", "vm1")
    assert os.listdir(mount.path) == []


def test_sigterm_flushes_unmounts_and_gives_the_locks_back(mount: Instance) -> None:
    volume = create(mount.path / "vm1", MIB)
    pid = mount.daemon_pid()
    assert pid is not None
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"acknowledged", 0)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not process_lives(pid), "the daemon has ended")
    assert mount_type(mount.path) is None
    assert list((mount.root / "run" / "live").iterdir()) == []
    assert mount.json("volume-info", "vm1")["lock"] is None
    mount.mount()
    assert read_all(volume)[:12] == b"acknowledged"
