"""A cluster that does not answer: what waits, what fails after its time, and that nothing need be mounted again."""

import errno
import os
import threading

import pytest

from tests.conftest import MakeInstance
from tests.lib.ceph import Cluster
from tests.lib.instance import Instance
from tests.lib.volumes import SECTOR_BYTES, create, opened, read_all, snapshot

pytestmark = [pytest.mark.mount, pytest.mark.ceph]

MIB = 1 << 20
OPERATION_SECONDS = 1


@pytest.fixture
def node(make_instance: MakeInstance, ceph_backend: dict[str, str]) -> Instance:
    options = {**ceph_backend, "operation_timeout": str(OPERATION_SECONDS)}
    return make_instance(rados=options).mount()


def test_what_the_cluster_does_not_answer_fails_in_time_and_works_again(ceph_cluster: Cluster, node: Instance) -> None:
    node.expect_log("Connection timed out")
    volume = create(node.path / "vm1", MIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"f" * SECTOR_BYTES, 0)
        os.fsync(descriptor)
        taking = threading.Thread(target=snapshot, args=(volume, "monday"), daemon=True)
        with ceph_cluster.paused("osd.0"):
            taking.start()
            with pytest.raises(OSError, match="Input/output error") as caught:
                os.pwrite(descriptor, b"x" * SECTOR_BYTES, SECTOR_BYTES)
            assert caught.value.errno == errno.EIO
            assert taking.is_alive(), "it has not waited"
        taking.join(60)
        assert not taking.is_alive(), "it still waits"
        os.pwrite(descriptor, b"g" * SECTOR_BYTES, SECTOR_BYTES)
        os.fsync(descriptor)
    content = read_all(volume)
    assert content[:SECTOR_BYTES] == b"f" * SECTOR_BYTES
    assert content[SECTOR_BYTES : 2 * SECTOR_BYTES] == b"g" * SECTOR_BYTES
    assert read_all(node.path / "monday")[:SECTOR_BYTES] == b"f" * SECTOR_BYTES
