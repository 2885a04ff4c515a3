"""A node that the network has left: it goes on by itself for a while, and must not harm what others do meanwhile."""

import errno
import os
from collections.abc import Iterator

import pytest

from tests.lib.ceph import cluster
from tests.lib.instance import Instance, instances
from tests.lib.namespaces import Host, network
from tests.lib.stream import Stream
from tests.lib.volumes import SECTOR_BYTES, create, opened, read_all
from tests.lib.waiting import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.ceph, pytest.mark.slow]

MIB = 1 << 20
OPERATION_SECONDS = "8"


@pytest.fixture
def hosts() -> Iterator[list[tuple[Host, Instance]]]:
    """Two hosts, each with a node that is mounted, over one pool."""
    with network(2) as (address, found), cluster(address=address) as ceph, instances() as make:
        options = {**ceph.options(), "operation_timeout": OPERATION_SECONDS, "timeout": "60"}
        yield [(host, make(rados=options, prefix=host.prefix).mount()) for host in found]


def test_a_node_that_was_cut_off_writes_nothing_when_it_is_back(hosts: list[tuple[Host, Instance]]) -> None:
    (host, first), (_, second) = hosts
    first.expect_log("fenced|broke|our lock|no more|timed out|shut|answer|ETIMEDOUT|EIO")
    lost, kept = create(first.path / "lost", MIB), create(first.path / "kept", MIB)
    before, after, beside = Stream(1, 0, 32), Stream(2, 0, 32), Stream(3, 0, 32)
    wait_until((second.path / "lost").exists, "the other node sees the volume")
    with opened(lost) as mine, opened(kept) as other:
        for _ in range(64):
            before.write(mine)
            beside.write(other)
        before.flush(mine)
        beside.flush(other)
        with host.cut_off():
            with pytest.raises(OSError, match="Input/output error"):
                before.write(mine)
            second.archip("volume-unlock", "-f", "lost")
            with opened(second.path / "lost") as theirs:
                before.expect_survivors(read_all(second.path / "lost"), before.durable, before.issued)
                for _ in range(64):
                    after.write(theirs)
                after.flush(theirs)
        wait_until(lambda: _goes_on(beside, other), "the volume that nobody took is written again")
        with pytest.raises(OSError, match="Input/output error") as caught:
            os.pwrite(mine, b"l" * SECTOR_BYTES, 0)
        assert caught.value.errno == errno.EIO
        after.expect_prefix(read_all(second.path / "lost"), 64, 64)
        for _ in range(8):
            beside.write(other)
        beside.flush(other)
    beside.expect_prefix(read_all(kept), beside.issued, beside.issued)
    after.expect_prefix(read_all(first.path / "lost"), 64, 64)


def _goes_on(stream: Stream, descriptor: int) -> bool:
    """What was not acknowledged is written once more; whether it was this time."""
    try:
        stream.repeat(descriptor)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False
    return True
