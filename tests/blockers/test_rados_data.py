"""Data objects in a real cluster: what only a cluster can show. What all drivers do is in the conformance suite."""

import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from archipfs.blockers.rados.data import STRIPE_BYTES, NativeClient, NativeDataObject
from archipfs.blockers.rados.settings import Settings
from archipfs.errors import Busy, ObjectDamaged, ObjectMissing, ShutOut, StoreError, StoreUnavailable
from archipfs.types import SECTOR_BYTES
from tests.lib.ceph import Cluster
from tests.lib.waiting import wait_until

pytestmark = pytest.mark.ceph

OPERATION_TIMEOUT_S = 4


def settings_of(options: dict[str, str], operation_timeout_s: int = 60) -> Settings:
    return Settings(**options, timeout_s=60, operation_timeout_s=operation_timeout_s)  # type: ignore[arg-type]


@pytest.fixture
def settings(ceph_backend: dict[str, str]) -> Settings:
    return settings_of(ceph_backend)


@pytest.fixture
def client(settings: Settings) -> Iterator[NativeClient]:
    client = NativeClient(settings)
    yield client
    client.close()


def names(cluster: Cluster, settings: Settings) -> list[str]:
    """The RADOS objects that data objects consist of."""
    return cluster.rados("--namespace", f"{settings.namespace}.data", "ls").split()


def blocklist(cluster: Cluster, client: NativeClient) -> None:
    for address in client.addresses():
        cluster.ceph("osd", "blocklist", "add", address)


class Call:
    """A call on a thread of its own."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error

    @property
    def is_under_way(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> None:
        self._thread.join(60)
        assert not self.is_under_way
        if self._error is not None:
            raise self._error


# Bytes

SPAN_BYTES = 4 * STRIPE_BYTES + STRIPE_BYTES // 2


def change(data: NativeDataObject, model: bytearray, draw: random.Random) -> None:
    """Do something at random, near or across the borders of stripes, to the object and to the model of it."""
    border = draw.randrange(5) * STRIPE_BYTES
    offset = min(max(0, border + draw.choice([-1, 0, 1, -5000, 777])), SPAN_BYTES)
    length = draw.choice([1, 2, 6000, STRIPE_BYTES - 1, STRIPE_BYTES, 2 * STRIPE_BYTES + 3])
    kind = draw.choice(["pwrite", "pwrite", "punch", "punch", "truncate"])
    if kind == "pwrite":
        content = draw.randbytes(1) * length
        data.pwrite(offset, content)
        model.extend(bytes(max(0, offset + length - len(model))))
        model[offset : offset + length] = content
    elif kind == "punch":
        data.punch(offset, length)
        end = min(offset + length, len(model))
        model[offset:end] = bytes(max(0, end - offset))
    else:
        data.truncate(offset)
        del model[offset:]
        model.extend(bytes(offset - len(model)))


@pytest.mark.parametrize("seed", range(3))
def test_stripes_are_one_array_of_bytes(
    client: NativeClient, ceph_cluster: Cluster, settings: Settings, seed: int
) -> None:
    """Of two who have it open and change it in turn, neither needs to know what the other did."""
    draw = random.Random(seed)
    handles = [client.create("layer/a"), client.open("layer/a", writable=True)]
    model = bytearray()
    for _ in range(12):
        change(draw.choice(handles), model, draw)
        other = draw.choice(handles)
        assert other.size() == len(model)
        assert other.pread(0, SPAN_BYTES + 1000) == bytes(model).ljust(SPAN_BYTES + 1000, b"\0")[: SPAN_BYTES + 1000]
        hole = other.next_hole(0)
        assert hole <= len(model)
        data = other.next_data(hole)
        assert not any(model[hole : len(model) if data is None else data])
    client.delete("layer/a")
    assert names(ceph_cluster, settings) == []


def test_many_stripes_at_once(client: NativeClient) -> None:
    """More than there are operations under way at a time."""
    content = random.Random(1).randbytes(1 << 20) * 150
    data = client.create("layer/a")
    data.pwrite(12345, content)
    assert data.size() == 12345 + len(content)
    assert data.pread(12345, len(content)) == content
    assert data.allocated() <= data.size()
    data.punch(0, len(content))
    assert data.pread(0, len(content)) == bytes(len(content))
    assert data.size() == 12345 + len(content)


def test_first_writes_of_many_threads(client: NativeClient, ceph_cluster: Cluster, settings: Settings) -> None:
    """Each to a stripe of its own, so that all wait for a byte in the header."""
    data = client.create("layer/a")
    calls = [Call(lambda n=n: data.pwrite(n * STRIPE_BYTES, bytes([n + 1]))) for n in range(40)]  # type: ignore[misc]
    for call in calls:
        call.result()
    other = NativeClient(settings)
    found = other.open("layer/a", writable=False)
    assert [found.pread(n * STRIPE_BYTES, 1)[0] for n in range(40)] == list(range(1, 41))
    assert found.size() == 39 * STRIPE_BYTES + 1
    other.delete("layer/a")
    other.close()
    assert names(ceph_cluster, settings) == []


def test_what_was_deleted_never_reads_as_zeros(client: NativeClient) -> None:
    data = client.create("layer/a")
    data.pwrite(0, b"abc")
    data.punch(0, STRIPE_BYTES)
    assert data.pread(0, 3) == bytes(3)
    client.delete("layer/a")
    for reading in (lambda: data.pread(0, 3), data.size, lambda: data.pwrite(STRIPE_BYTES, b"x")):
        with pytest.raises(ObjectMissing):
            reading()
    assert not client.exists("layer/a")
    client.delete("layer/a")


def test_a_deletion_that_was_cut_short_is_finished(
    client: NativeClient, ceph_cluster: Cluster, settings: Settings
) -> None:
    """The header says that it is being deleted: nobody opens it, and whoever deletes it again removes all of it."""
    client.create("layer/a").pwrite(STRIPE_BYTES, b"abc")
    header = header_of(ceph_cluster, settings)
    client.create("layer/b").close()
    client.delete("layer/b")
    marked = bytearray(header[:SECTOR_BYTES])
    marked[12] = 2
    put_header(ceph_cluster, settings, seal_header(marked) + header[SECTOR_BYTES:])
    assert client.exists("layer/a")
    with pytest.raises(ObjectMissing):
        client.open("layer/a", writable=False)
    assert len(names(ceph_cluster, settings)) == 2
    client.delete("layer/a")
    assert names(ceph_cluster, settings) == []


def test_a_damaged_header_is_said_and_can_be_deleted(
    client: NativeClient, ceph_cluster: Cluster, settings: Settings
) -> None:
    client.create("layer/a").pwrite(2 * STRIPE_BYTES, b"abc")
    header = bytearray(header_of(ceph_cluster, settings))
    header[17] ^= 1
    put_header(ceph_cluster, settings, bytes(header))
    with pytest.raises(ObjectDamaged, match="layer/a"):
        client.open("layer/a", writable=False)
    client.delete("layer/a")
    assert names(ceph_cluster, settings) == []


def header_of(cluster: Cluster, settings: Settings) -> bytes:
    path = cluster.directory / "header"
    cluster.rados("--namespace", f"{settings.namespace}.data", "get", "layer/a", str(path))
    return path.read_bytes()


def put_header(cluster: Cluster, settings: Settings, content: bytes) -> None:
    path = cluster.directory / "header"
    path.write_bytes(content)
    cluster.rados("--namespace", f"{settings.namespace}.data", "put", "layer/a", str(path))


def seal_header(header: bytes | bytearray) -> bytes:
    return bytes(header[:-8]) + xxhash.xxh3_64_intdigest(bytes(header[:-8])).to_bytes(8, "little")


# A writer that is killed

WRITER = """
import itertools, json, random, sys
from archipfs.blockers.rados.data import NativeClient
from archipfs.blockers.rados.settings import Settings
data = NativeClient(Settings(**json.loads(sys.argv[1]))).open("layer/a", writable=True)
draw = random.Random(int(sys.argv[2]))
for number in itertools.count():
    if number == 20:
        print("begun", flush=True)
    stripe, sector = draw.randrange(64), draw.randrange(4)
    if draw.randrange(8) == 0:
        data.punch(stripe << 22, 1 << 22)
    data.pwrite((stripe << 22) + sector * 4096, bytes([stripe + 1]) * 4096 * draw.randrange(1, 3))
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_writer_that_is_killed_leaves_a_whole_object(
    client: NativeClient, ceph_cluster: Cluster, settings: Settings, seed: int
) -> None:
    data = client.create("layer/a")
    fields = {name: getattr(settings, name) for name in Settings.__slots__}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, json.dumps(fields), str(seed)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        time.sleep(0.2 + 0.1 * seed)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    found = client.open("layer/a", writable=True)
    for stripe, sector in itertools.product(range(64), range(5)):
        content = found.pread((stripe << 22) + sector * SECTOR_BYTES, SECTOR_BYTES)
        assert content in (bytes(SECTOR_BYTES), bytes([stripe + 1]) * SECTOR_BYTES)
    there = {int(name.rpartition("/")[2], 16) for name in names(ceph_cluster, settings) if name.count("/") == 2}
    assert there
    assert all(found.next_data(stripe << 22) == stripe << 22 for stripe in there)
    assert found.size() >= max(there) << 22
    data.close()
    client.delete("layer/a")
    assert names(ceph_cluster, settings) == []


# Claims, and being shut out


def test_a_claim_is_one_owners(client: NativeClient, settings: Settings) -> None:
    other = NativeClient(settings)
    client.claim("lock/a", "node/1")
    client.claim("lock/a", "node/1")
    with pytest.raises(Busy):
        other.claim("lock/a", "else/2")
    client.disclaim("lock/a")
    client.disclaim("lock/a")
    other.claim("lock/a", "else/2")
    other.close()


def test_a_claim_that_is_given_up_ends_what_was_opened_under_it(client: NativeClient) -> None:
    client.create("layer/a").close()
    with pytest.raises(StoreError, match="EIO"):
        client.open("layer/a", writable=True, claim="lock/a")
    client.claim("lock/a", "node/1")
    data = client.open("layer/a", writable=True, claim="lock/a")
    data.pwrite(0, b"abc")
    client.disclaim("lock/a")
    with pytest.raises(StoreError, match="EIO"):
        data.pwrite(0, b"xyz")
    assert client.open("layer/a", writable=False).pread(0, 3) == b"abc"


def test_being_shut_out_and_going_on(client: NativeClient, ceph_cluster: Cluster, settings: Settings) -> None:
    """What was opened under a claim waits, and goes on or fails; the rest fails until there is a new connection."""
    client.claim("lock/kept", "node/1")
    client.claim("lock/lost", "node/1")
    free = client.create("layer/a")
    free.pwrite(0, b"abc")
    client.create("layer/b").close()
    kept = client.open("layer/a", writable=True, claim="lock/kept")
    lost = client.open("layer/b", writable=True, claim="lock/lost")
    blocklist(ceph_cluster, client)
    assert not client.is_shut_out
    calls = [Call(lambda: kept.pwrite(1, b"XY")), Call(lambda: lost.pwrite(0, b"never"))]
    wait_until(lambda: client.is_shut_out, "the client knows")
    with pytest.raises(ShutOut):
        free.pread(0, 3)
    with pytest.raises(ShutOut):
        client.claim("lock/more", "node/1")

    successor = NativeClient(settings)
    assert not set(successor.addresses()) & set(client.addresses())
    assert successor.open("layer/a", writable=False).pread(0, 3) == b"abc"
    client.adopt(successor)
    assert not client.is_shut_out
    assert free.pread(0, 3) == b"abc"
    assert all(call.is_under_way for call in calls)
    client.disclaim("lock/lost")
    with pytest.raises(StoreError, match="EIO"):
        calls[1].result()
    assert calls[0].is_under_way
    client.claim("lock/kept", "node/1")
    calls[0].result()
    successor.close()
    assert free.pread(0, 3) == b"aXY"
    assert client.open("layer/b", writable=False).size() == 0


# What the cluster does not answer


def test_an_operation_that_is_not_answered(ceph_cluster: Cluster, ceph_backend: dict[str, str]) -> None:
    """It fails in time, the claim stays noted since the write may still arrive, and then all goes on by itself."""
    client = NativeClient(settings_of(ceph_backend, OPERATION_TIMEOUT_S))
    client.claim("lock/a", "node/1")
    client.create("layer/a").pwrite(0, b"abc")
    data = client.open("layer/a", writable=True, claim="lock/a")
    with ceph_cluster.paused("osd.0"):
        begun = time.monotonic()
        calls = [Call(lambda: data.pwrite(0, b"new")), Call(lambda: data.pread(0, 3))]
        for call in calls:
            with pytest.raises(StoreUnavailable, match="ceph status"):
                call.result()
        assert time.monotonic() - begun < 10 * OPERATION_TIMEOUT_S
    wait_until(lambda: answers(data), "the cluster answers again")
    assert data.pread(0, 3) in (b"abc", b"new")
    client.disclaim("lock/a")
    lockers = ceph_cluster.rados("--namespace", ceph_backend["namespace"], "lock", "info", "claim/lock/a", "archipfs")
    assert "node/1" in lockers
    client.close()


def answers(data: NativeDataObject) -> bool:
    try:
        data.pread(0, 1)
    except StoreUnavailable:
        return False
    return True


def test_a_cluster_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        conf = tmp_path / "ceph.conf"
        conf.write_text(
            f"[global]\nmon host = v2:127.0.0.1:{nobody.getsockname()[1]}\nauth client required = none\n"
            "auth service required = none\nauth cluster required = none\n"
        )
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable, match="does not answer"):
            NativeClient(Settings(pool="archip", conf=str(conf), timeout_s=1))
        assert time.monotonic() - begun < 60, "librados by itself waits for five minutes"


def test_what_is_not_there_is_named(ceph_cluster: Cluster, ceph_backend: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"none/ceph\.conf cannot be read"):
        NativeClient(Settings(pool="archip", conf=str(tmp_path / "none/ceph.conf"), timeout_s=1))
    with pytest.raises(StoreUnavailable, match="pool elsewhere"):
        NativeClient(settings_of(ceph_backend | {"pool": "elsewhere"}))
    with pytest.raises(StoreUnavailable, match=r"librados\.so\.1"):
        NativeClient(settings_of(ceph_backend), library="librados.so.1")


# Packs


def test_a_pack_is_read(client: NativeClient, ceph_cluster: Cluster, settings: Settings, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(100_000)
    path = tmp_path / "pack"
    path.write_bytes(content)
    space = ("--namespace", f"{settings.namespace}.packs")
    ceph_cluster.rados(*space, "put", "pack/a", str(path))
    pack = client.open_immutable("pack/a")
    assert pack.size() == pack.next_hole(0) == 100_000
    assert pack.pread(99_000, 2_000) == content[99_000:] + bytes(1_000)
    assert pack.next_data(5) == 5
    assert pack.next_data(100_000) is None
    with pytest.raises(StoreError):
        pack.pwrite(0, b"x")
    ceph_cluster.rados(*space, "rm", "pack/a")
    with pytest.raises(ObjectMissing):
        pack.pread(0, 1)
    with pytest.raises(ObjectMissing):
        client.open_immutable("pack/a")
    pack.close()
    with pytest.raises(StoreError):
        pack.pread(0, 1)
