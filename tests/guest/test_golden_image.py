"""Many guests boot from clones of one image that lies in a pool: a node fetches what they all read once."""

import os
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.guest.machine import Guest, build_image
from tests.lib.instance import Instance
from tests.lib.volumes import clone
from tests.lib.waiting import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.guest, pytest.mark.ceph, pytest.mark.slow]

CLONES = int(os.environ.get("ARCHIPFS_GUEST_CLONES", "3"))


def settled_pack_cache(node: Instance) -> dict[str, int]:
    """Its statistics, when all that was fetched is in its files."""

    def statistics() -> dict[str, int]:
        found: dict[str, int] = node.call("status")["pack_cache"]
        return found

    wait_until(lambda: not statistics()["landed_bytes"], "all that was fetched is in the files")
    return statistics()


@pytest.mark.timeout(900)
def test_what_clones_of_an_image_boot_from_is_fetched_once(
    make_instance: MakeInstance, ceph_backend: dict[str, str], tmp_path: Path
) -> None:
    image = build_image()
    node = make_instance(rados=ceph_backend).mount()
    node.archip("volume-import", image.root, "--name", "golden")
    node.archip("volume-snapshot", "golden", "--name", "golden-1")
    node.archip("volume-seal", "golden-1")
    fetched_bytes: list[int] = []
    for number in range(CLONES):
        volume = clone(node.path / "golden-1", f"vm{number}")
        with Guest(volume, image, console=tmp_path / f"console-{number}") as guest:
            guest.check(f"echo {number} >/mine; sync")
            guest.shutdown()
        cache = settled_pack_cache(node)
        fetched_bytes.append(cache["fetched_bytes"])
        assert cache["fetched_bytes"] <= cache["bytes"], "more was fetched than is kept: something was fetched twice"
    print(f"{CLONES} clones, fetched after each, in bytes: {fetched_bytes}")
    assert fetched_bytes[0] > 10_000_000, "it booted from something else"
    assert fetched_bytes[-1] < 1.25 * fetched_bytes[0], "guests read a little more now and then, not everything anew"
