"""File systems on volumes, through a loop device: filled, emptied, trimmed and checked by their own tools."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from tests.lib.disks import MAKE, check_file_system, loop_device, make_file_system, mounted
from tests.lib.instance import Instance
from tests.lib.programs import run
from tests.lib.volumes import clone, create, snapshot
from tests.lib.waiting import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.outside]

MIB = 1 << 20
VOLUME_BYTES = 512 * MIB
FILLED_BYTES = 96 * MIB


def fill(directory: Path, seed: int, total_bytes: int) -> dict[str, str]:
    """Files of many sizes with content that does not compress; their digests."""
    numbers = random.Random(seed)
    digests = {}
    written = 0
    while written < total_bytes:
        data = os.urandom(numbers.choice((100, 5000, 64 << 10, MIB + 77, 4 * MIB)))
        name = f"{seed}-{len(digests)}"
        (directory / name).write_bytes(data)
        digests[name] = hashlib.blake2b(data).hexdigest()
        written += len(data)
    return digests


def expect_files(directory: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        assert hashlib.blake2b((directory / name).read_bytes()).hexdigest() == digest, name


def stored_bytes(volume: Path) -> int:
    return volume.stat().st_blocks * 512


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("kind", MAKE)
def test_what_is_deleted_and_trimmed_gives_its_space_back_and_the_rest_stays(
    mount: Instance, tmp_path: Path, kind: str, direct: bool
) -> None:
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    with loop_device(volume, direct=direct) as device:
        make_file_system(kind, device)
        with mounted(device, tmp_path / "disk") as disk:
            kept, deleted = fill(disk, 1, FILLED_BYTES // 4), fill(disk, 2, FILLED_BYTES)
            os.sync()
            filled = stored_bytes(volume)
            assert filled > FILLED_BYTES
            for name in deleted:
                (disk / name).unlink()
            os.sync()
            run("fstrim", "-v", disk)
            wait_until(lambda: stored_bytes(volume) < filled - FILLED_BYTES // 2, "the space is back")
            expect_files(disk, kept)
        check_file_system(kind, device)
        with mounted(device, tmp_path / "disk") as disk:
            expect_files(disk, kept)
        check_file_system(kind, device)


@pytest.mark.parametrize("kind", MAKE)
def test_a_snapshot_of_a_frozen_file_system_is_clean_and_holds_what_was_there(
    mount: Instance, tmp_path: Path, kind: str
) -> None:
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    with loop_device(volume) as device:
        make_file_system(kind, device)
        with mounted(device, tmp_path / "disk") as disk:
            before = fill(disk, 1, 16 * MIB)
            run("fsfreeze", "--freeze", disk)
            try:
                monday = snapshot(volume, "monday")
            finally:
                run("fsfreeze", "--unfreeze", disk)
            for name in before:
                (disk / name).write_bytes(b"later")
        with loop_device(clone(monday, "vm2")) as copied:
            # The journal replays, as after a power failure.
            with mounted(copied, tmp_path / "copy", *(["nouuid"] if kind == "xfs" else [])) as disk:
                expect_files(disk, before)
            check_file_system(kind, copied)


def test_discard_while_files_are_deleted_gives_space_back(mount: Instance, tmp_path: Path) -> None:
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    with loop_device(volume) as device:
        make_file_system("ext4", device)
        with mounted(device, tmp_path / "disk", "discard") as disk:
            names = fill(disk, 3, 32 * MIB)
            os.sync()
            filled = stored_bytes(volume)
            for name in names:
                (disk / name).unlink()
            os.sync()
            wait_until(lambda: stored_bytes(volume) < filled - 16 * MIB, "the space is back")
        check_file_system("ext4", device)


def test_a_grown_volume_gives_its_file_system_room(mount: Instance, tmp_path: Path) -> None:
    volume = create(mount.path / "vm1", 64 * MIB)
    with loop_device(volume) as device:
        make_file_system("ext4", device)
        with mounted(device, tmp_path / "disk") as disk:
            digests = fill(disk, 4, 8 * MIB)
        os.truncate(volume, VOLUME_BYTES)
        run("losetup", "--set-capacity", device)
        run(
            "e2fsck", "-f", "-p", device
        )  # resize2fs wants it to be written down that the last check is newer than the mount
        run("resize2fs", device)
        with mounted(device, tmp_path / "disk") as disk:
            digests |= fill(disk, 5, 100 * MIB)
            expect_files(disk, digests)
        check_file_system("ext4", device)
