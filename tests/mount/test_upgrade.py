"""An upgrade under the mount: whatever is under way goes on with the next daemon."""

import os
import threading
from collections.abc import Callable

import pytest

from tests.lib.instance import Instance
from tests.lib.volumes import SECTOR_BYTES, create, opened, snapshot
from tests.lib.waiting import threads, wait_until

pytestmark = pytest.mark.mount

UPGRADES = 2
SNAPSHOTS_BETWEEN = 3


def test_requests_under_way_outlive_upgrades(make_instance: Callable[..., Instance]) -> None:
    """Snapshots pass through pyfuse3, so that there is always something that it has not answered yet."""
    mount = make_instance(supervised=True).mount()
    volume = create(mount.path / "vm1", SECTOR_BYTES)
    made: list[str] = []

    def take_snapshots(stop: threading.Event) -> None:
        while not stop.is_set():
            name = f"s{len(made)}"
            snapshot(volume, name)
            made.append(name)

    with opened(volume) as descriptor, threads([take_snapshots]):
        for _ in range(UPGRADES):
            wanted = len(made) + SNAPSHOTS_BETWEEN
            wait_until(lambda wanted=wanted: len(made) >= wanted, "snapshots are being taken")  # type: ignore[misc]
            before = mount.daemon_pid()
            mount.archip("upgrade")
            assert mount.daemon_pid() != before
            os.pwrite(descriptor, b"still there", 0)
            os.fsync(descriptor)
    assert {*made, "vm1"} == set(os.listdir(mount.path))
