"""A guest does not notice that the daemon under its disk is killed, again and again."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.machine import Guest, Image, build_image, fill
from tests.guest.test_guest import (
    VOLUME_BYTES,
    acknowledged,
    assert_file_system_clean,
    assert_numbers,
    clone,
    snapshot,
    start_writer,
)
from tests.lib.instance import Instance
from tests.lib.volumes import create
from tests.lib.waiting import wait_until
from tests.mount.test_restart import GAP_SECONDS

pytestmark = [pytest.mark.mount, pytest.mark.guest, pytest.mark.slow]

KILLS = int(os.environ.get("ARCHIPFS_GUEST_KILLS", "5"))

# Beside the numbers: files are made, made durable, compared and removed, and what they took is discarded.
CHURN = """
(n=0; while true; do
    n=$((n + 1)); head -c 300000 /dev/urandom >/data/a; cp /data/a /data/b; sync; cmp /data/a /data/b || touch /data/bad
    rm /data/a /data/b; [ $((n % 10)) = 0 ] && fstrim /
done) >/dev/null 2>/run/churn &
"""


@pytest.fixture(scope="session")
def image() -> Image:
    return build_image()


@pytest.mark.timeout(900)
def test_a_guest_does_not_notice_kills_of_the_daemon(
    make_instance: Callable[..., Instance], image: Image, tmp_path: Path
) -> None:
    mount = make_instance(supervised=True).mount()
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    fill(volume, image)
    chance = random.Random(3)
    with Guest(volume, image, console=tmp_path / "console") as guest:
        start_writer(guest, 10)
        guest.check(CHURN)
        for number in range(KILLS):
            time.sleep(chance.uniform(*GAP_SECONDS))
            killed, reached = mount.daemon_pid(), acknowledged(guest)
            mount.kill_daemon()
            snapshot(volume, f"vm1-{number}")
            wait_until(lambda killed=killed: mount.daemon_pid() not in (None, killed), "there is another daemon")
            wait_until(lambda reached=reached: acknowledged(guest) > reached, "the guest goes on")
        assert guest.run("test -e /data/bad")[0] == 1
        complaints = guest.run("dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|remount|blocked for more'")[1]
        assert complaints == ""
        last = acknowledged(guest)
        assert_numbers(guest, last)
        guest.check("pkill -f /data/a; true")
        guest.shutdown()
    assert_file_system_clean(volume)
    for number in range(KILLS):
        assert_file_system_clean(clone(volume.with_name(f"vm1-{number}"), f"check-{number}"))
