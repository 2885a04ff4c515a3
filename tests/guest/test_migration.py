"""A guest goes from one node to another while it runs, by qemu's live migration; and a node is lost with its guest."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.machine import Guest, Image, build_image, fill
from tests.guest.test_guest import (
    VOLUME_BYTES,
    acknowledged,
    assert_file_system_clean,
    assert_numbers,
    snapshot,
    start_writer,
)
from tests.lib.ceph import cluster
from tests.lib.instance import Instance, instances
from tests.lib.namespaces import network
from tests.lib.volumes import create, fact
from tests.lib.waiting import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.guest, pytest.mark.slow]


@pytest.fixture(scope="session")
def image() -> Image:
    return build_image()


@contextmanager
def on_a_directory() -> Iterator[list[Instance]]:
    with instances() as make:
        first = make()
        yield [first.mount(), make(store=first.store).mount()]


@contextmanager
def on_a_pool() -> Iterator[list[Instance]]:
    """Each on a host of its own."""
    with network(2) as (address, hosts), cluster(address=address) as ceph, instances() as make:
        options = ceph.options()
        yield [make(rados=options, prefix=host.prefix).mount() for host in hosts]


@pytest.fixture(params=[on_a_directory, pytest.param(on_a_pool, marks=pytest.mark.ceph)], ids=["directory", "pool"])
def nodes(request: pytest.FixtureRequest) -> Iterator[list[Instance]]:
    """Two nodes that have the same store."""
    with request.param() as made:
        yield made


def holds(node: Instance, volume: Path) -> bool:
    """Whether the node has the volume's lock, as seen there."""
    lock = fact(node.path / volume.name, "lock")
    return bool(lock) and json.loads(lock)["node"] == (node.root / "state" / "node-id").read_text().strip()


@pytest.mark.timeout(900)
def test_a_guest_moves_to_another_node_and_back_and_is_lost_there_but_for_what_it_has_flushed(
    nodes: list[Instance], image: Image, tmp_path: Path
) -> None:
    here, there = nodes
    volume = create(here.path / "vm1", VOLUME_BYTES)
    fill(volume, image)
    wait_until((there.path / "vm1").exists, "the other node sees the volume")
    with Guest(volume, image, console=tmp_path / "first") as guest:
        start_writer(guest, 20)
        moved = Guest(there.path / "vm1", image, console=tmp_path / "second")
        guest.move_to(moved, tmp_path / "migration")
    try:
        reached = acknowledged(moved)
        wait_until(lambda: acknowledged(moved) > reached + 10, "the guest goes on there")
        assert holds(there, volume)
        snapshot(there.path / "vm1", "moved")
        back = Guest(volume, image, console=tmp_path / "third")
        moved.move_to(back, tmp_path / "migration-back")
    finally:
        moved.kill()
    try:
        last = acknowledged(back)
        wait_until(lambda: acknowledged(back) > last, "the guest goes on here again")
        assert holds(here, volume)
        assert_numbers(back, acknowledged(back))
        complaints = back.run("dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|remount|blocked for more'")[1]
        assert complaints == ""
        durable = acknowledged(back)
        here.kill()
    finally:
        back.kill()
    survivor = there.path / "vm1"
    there.archip("volume-unlock", "-f", "vm1")
    with Guest(survivor, image, console=tmp_path / "fourth") as guest:
        assert_numbers(guest, durable)
        guest.check("head -c 4000000 /dev/urandom >/data/later; sha256sum /data/later >/data/sum; sync")
        here.mount()  # it finds that the volume is not its own any more
        assert holds(there, volume)
        guest.check("echo 3 >/proc/sys/vm/drop_caches; sha256sum --check --quiet /data/sum")
        guest.shutdown()
    assert_file_system_clean(survivor)
