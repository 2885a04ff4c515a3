"""The main job with a real guest: it runs on a volume, is snapshotted while it writes, its clone boots beside it."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.guest.machine import Guest, Image, build_image, fill
from tests.lib.waiting import wait_until

VOLUME_BYTES = 2 << 30
TRIMMED_BYTES = 40_000_000

# Numbers go to a file, each made durable before it is acknowledged in memory.
WRITER = """
(n=0; while true; do
    n=$((n + 1)); echo $n >>/data/numbers; sync /data/numbers; echo $n >/run/acknowledged
done) >/dev/null 2>&1 &
"""

pytestmark = [pytest.mark.mount, pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="session")
def image() -> Image:
    return build_image()


@pytest.fixture
def volume(mount: Any, image: Image) -> Path:
    """A volume with a guest on it that never ran."""
    path: Path = mount.path / "vm1"
    path.touch()
    os.truncate(path, VOLUME_BYTES)
    fill(path, image)
    return path


def snapshot(volume: Path, name: str) -> Path:
    os.setxattr(volume, "user.archip.snapshot", name.encode())
    return volume.with_name(name)


def clone(source: Path, name: str) -> Path:
    os.setxattr(source, "user.archip.clone", name.encode())
    return source.with_name(name)


def acknowledged(guest: Guest) -> int:
    return int(guest.check("cat /run/acknowledged"))


def start_writer(guest: Guest, numbers: int) -> None:
    """Start it, and wait until it got as far as ``numbers``."""
    guest.check("mkdir -p /data; echo 0 >/run/acknowledged")
    guest.check(WRITER)
    guest.check(f"while [ $(cat /run/acknowledged) -lt {numbers} ]; do sleep 0.1; done")


def assert_numbers(guest: Guest, at_least: int) -> int:
    """Every number up to ``at_least`` is there, in order; returns how many there are."""
    guest.check(f"seq {at_least} >/run/wanted; head -n {at_least} /data/numbers | cmp - /run/wanted")
    return int(guest.check("wc -l </data/numbers"))


def assert_file_system_clean(volume: Path) -> None:
    """The journal replays, as a boot would do it, and then there is nothing left to mend."""
    subprocess.run(["e2fsck", "-E", "journal_only", "-p", volume], check=True, capture_output=True, text=True)
    checked = subprocess.run(["e2fsck", "-f", "-n", volume], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_clone_of_a_running_guest_boots_beside_it(volume: Path, image: Image, tmp_path: Path) -> None:
    with Guest(volume, image, console=tmp_path / "first") as first:
        first.check("mkdir /data; head -c 20000000 /dev/urandom | split -b 1000000 - /data/part.")
        first.check("cd /data; sha256sum part.* >sums; sync")
        start_writer(first, 20)

        before = acknowledged(first)
        monday = snapshot(volume, "vm1-monday")
        after = acknowledged(first)
        first.check("echo late >/data/late; sync")

        with Guest(clone(monday, "vm2"), image, console=tmp_path / "second") as second:
            second.check("cd /data; sha256sum --check --quiet sums")
            assert before <= assert_numbers(second, before) <= after + 1
            assert second.run("test -e /data/late")[0] == 1

            second.check("rm /data/part.*; echo mine >/data/second; sync")
            assert acknowledged(first) > after, "the writer in the first guest stopped"
            second.shutdown()

        first.check("cd /data; sha256sum --check --quiet sums; test -e late")
        assert first.run("test -e /data/second")[0] == 1
        first.shutdown()

    assert_file_system_clean(clone(monday, "vm3"))
    assert_file_system_clean(volume)


def test_every_snapshot_of_a_writing_guest_is_a_moment_of_it(volume: Path, image: Image, tmp_path: Path) -> None:
    bounds = []
    with Guest(volume, image, console=tmp_path / "console") as guest:
        start_writer(guest, 10)
        for count in range(5):
            before = acknowledged(guest)
            snapshot(volume, f"vm1-{count}")
            bounds.append((before, acknowledged(guest) + 1))
            time.sleep(0.5)

    for count, (least, most) in enumerate(bounds):
        assert_file_system_clean(clone(volume.with_name(f"vm1-{count}"), f"check-{count}"))
        with Guest(volume.with_name(f"check-{count}"), image, console=tmp_path / f"console-{count}") as guest:
            assert least <= assert_numbers(guest, least) <= most


def test_a_guest_boots_again_after_its_daemon_was_killed(
    mount: Any, volume: Path, image: Image, tmp_path: Path
) -> None:
    with Guest(volume, image, console=tmp_path / "before") as guest:
        start_writer(guest, 20)
        durable = acknowledged(guest)
        mount.kill()
    mount.remount()
    with Guest(volume, image, console=tmp_path / "after") as guest:
        assert_numbers(guest, durable)
        trim_gives_space_back(mount, volume, guest)
        guest.shutdown()
    assert_file_system_clean(volume)


def trim_gives_space_back(mount: Any, volume: Path, guest: Guest) -> None:
    """What the guest deletes and trims is gone from the host: by ``du``, and by what archip says is written."""

    def on_host_bytes() -> int:
        return 1024 * int(
            subprocess.run(["du", "-k", volume], check=True, capture_output=True, text=True).stdout.split()[0]
        )

    def written_bytes() -> int:
        return int(mount.json("volume-info", "vm1")["written"])

    guest.check("fstrim /; sync")  # what was free before this test began
    before = on_host_bytes(), written_bytes()
    guest.check(f"head -c {TRIMMED_BYTES} /dev/urandom >/data/large; sync")
    wait_until(lambda: on_host_bytes() > before[0] + TRIMMED_BYTES * 3 // 4, "it is on the host")
    assert written_bytes() > before[1] + TRIMMED_BYTES * 3 // 4
    guest.check("rm /data/large; sync; fstrim /")
    wait_until(lambda: on_host_bytes() < before[0] + TRIMMED_BYTES // 4, "the space is back")
    assert written_bytes() < before[1] + TRIMMED_BYTES // 4
