"""A Ceph cluster that fails under a mount: requests wait, or fail after the configured time; what was flushed stays.

Nothing here mounts again to get well: one mount, and the files that are open in it, outlive every fault.
"""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.lib.ceph import CEPH_DEV, POOL, Cluster, cluster
from tests.lib.instance import Instance, kill_process
from tests.lib.stream import Stream
from tests.lib.volumes import SECTOR_BYTES, create, opened, read_all, snapshot
from tests.lib.waiting import WAIT_SECONDS, Task, threads, wait_until

pytestmark = [pytest.mark.ceph, pytest.mark.mount]

MIB = 1 << 20
VOLUME_BYTES = 16 * MIB
PATIENT, IMPATIENT = 60, 4
"""Seconds. Who is not patient is so only where a test has that end: a busy cluster may take a second or two as well."""
MORE_SECONDS = 30.0
"""What anything may take beyond its timeout, on a machine that others use too; less than who is patient waits."""
AWAY = "ETIMEDOUT|ENOENT|was deleted|no monitor of"


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[Cluster]:
    """A cluster that nobody else uses."""
    with cluster() as made:
        yield made


@pytest.fixture
def faulty(own_cluster: Cluster) -> Iterator[Cluster]:
    """One in which nothing is wrong when a test begins, nor when what it has mounted is taken away."""
    yield own_cluster
    own_cluster.dev("mon-start")
    if POOL in own_cluster.ceph("osd", "pool", "ls"):
        own_cluster.ceph("osd", "pool", "set-quota", POOL, "max_bytes", "0")
    own_cluster.restore()


def options(faulty: Cluster, *, for_osds: int = PATIENT, for_monitors: int = PATIENT) -> Mapping[str, str]:
    return {**faulty.options(), "operation_timeout": str(for_osds), "timeout": str(for_monitors)}


def expect_errno(number: int, do: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is checked below
        do()
    assert caught.value.errno == number, f"{caught.value}, not {errno.errorcode[number]}"


def _fails(do: Callable[[], object]) -> bool:
    try:
        do()
    except OSError:
        return True
    return False


@contextmanager
def within(most: float, least: float = 0.0) -> Iterator[None]:
    """The block takes so many seconds."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert least <= took <= most, f"it took {took:.1f} s, not {least:.1f} to {most:.1f}"


@contextmanager
def restoring(faulty: Cluster) -> Iterator[Callable[[], None]]:
    """A function that has the cluster started again, by a process that is there already.

    One that is started when no daemon serves would wait for it: it closes the files that it has from us.
    """
    command = ["sh", "-c", 'read -r _ && exec "$0" up "$1"', CEPH_DEV, faulty.directory]
    shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert shell.stdin is not None
    pipe = shell.stdin

    def restore() -> None:
        pipe.write(b"\n")
        pipe.flush()

    try:
        yield restore
    finally:
        pipe.close()
        shell.wait(WAIT_SECONDS)


def write_on(descriptor: int, stream: Stream) -> Task:
    """Write and flush until told to stop. No error is expected."""

    def task(stop: threading.Event) -> None:
        while not stop.is_set():
            stream.write(descriptor)
            if stream.issued % 20 == 0:
                stream.flush(descriptor)

    return task


def goes_on(stream: Stream) -> None:
    before = stream.acknowledged
    wait_until(lambda: stream.acknowledged > before + 20, "writes go on")


def expect_whole(path: Path, stream: Stream) -> None:
    """Of writes that got no answer, any sector may be there: a cluster may carry them out late."""
    stream.expect_survivors(read_all(path, os.O_DIRECT), stream.acknowledged, stream.issued)


def works(mount: Instance, volume: Path, descriptor: int, stream: Stream, number: int) -> None:
    """All of it: writes, reads, flushes, snapshots and seals, on the file that is open since before the fault."""
    # A client may learn only by this that the OSD is another process now.
    wait_until(lambda: not _fails(lambda: stream.repeat(descriptor)), "writes succeed again")
    for _ in range(20):
        stream.write(descriptor)
    stream.flush(descriptor)
    frozen = snapshot(volume, f"{volume.name}-{number}")
    stream.write(descriptor)
    mount.call("volume-seal", name=frozen.name)
    stream.expect_survivors(read_all(frozen), stream.durable, stream.durable)
    expect_whole(volume, stream)
    assert not [finding for finding in mount.findings() if finding["severity"] == "error"]


def test_an_osd_that_is_stopped_is_a_pause_for_who_waits_and_eio_for_who_does_not(
    make_instance: MakeInstance, faulty: Cluster
) -> None:
    patient = make_instance(rados=options(faulty)).mount()
    impatient = make_instance(rados=options(faulty, for_osds=IMPATIENT)).mount()
    impatient.expect_log(AWAY)
    waits, fails = (create(each.path / "vm", VOLUME_BYTES) for each in (patient, impatient))
    waiting, failing = Stream(1, 0, 1000), Stream(2, 0, 1000)
    with opened(waits) as one, opened(fails) as other:
        for number, stop in enumerate((lambda: faulty.dev("osd-stop", 0), lambda: faulty.kill("osd.0"))):
            for _ in range(50):
                failing.write(other)
            failing.flush(other)
            with threads([write_on(one, waiting)]):
                goes_on(waiting)
                stop()
                with within(IMPATIENT + MORE_SECONDS, IMPATIENT - 0.5):
                    expect_errno(errno.EIO, lambda: failing.write(other))
                with within(2 * IMPATIENT + MORE_SECONDS, IMPATIENT - 0.5):  # the kernel asks twice
                    expect_errno(errno.EIO, lambda: os.stat(impatient.path / "nobody"))
                faulty.restore()
                goes_on(waiting)
            works(impatient, fails, other, failing, number)
            works(patient, waits, one, waiting, number)
    assert not patient.log_problems()


def test_a_daemon_that_is_killed_while_the_cluster_is_away_goes_on_when_it_is_back(
    make_instance: MakeInstance, faulty: Cluster
) -> None:
    mount = make_instance(rados=options(faulty), supervised=True).mount()
    if mount.logged("is not restarted"):
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND")
    volume = create(mount.path / "vm", VOLUME_BYTES)
    stream = Stream(1, 0, 1000)
    osd = faulty.daemons()["osd.0"]
    with restoring(faulty) as restore, opened(volume) as descriptor:
        with threads([write_on(descriptor, stream)]):
            goes_on(stream)
            mount.kill_daemon()
            goes_on(stream)
            kill_process(osd)
            mount.kill_daemon()
            restore()
            goes_on(stream)
            mount.archip("upgrade")
            goes_on(stream)
        works(mount, volume, descriptor, stream, 0)


@pytest.mark.slow
def test_of_three_osds_one_may_die_for_good(make_instance: MakeInstance) -> None:
    with cluster(osds=3) as three:
        three.wait_until_clean()
        mount = make_instance(rados=options(three)).mount()
        volume = create(mount.path / "vm", VOLUME_BYTES)
        stream = Stream(1, 0, 1000)
        with opened(volume) as descriptor:
            with threads([write_on(descriptor, stream)]):
                goes_on(stream)
                three.kill("osd.2")
                goes_on(stream)
            works(mount, volume, descriptor, stream, 0)
        # What is looked at behind the test is the store in this cluster.
        assert not mount.take_down() + mount.verdict()
        mount.checked_at_end = False


def test_in_a_full_cluster_writers_get_enospc_and_others_remove_and_read_on(
    make_instance: MakeInstance, faulty: Cluster
) -> None:
    mount = make_instance(rados=options(faulty)).mount()
    volume, ballast = (create(mount.path / name, 64 * MIB) for name in ("vm", "ballast"))
    with opened(ballast) as descriptor:
        os.pwrite(descriptor, os.urandom(48 * MIB), 0)
        snapshot(ballast, "kept")
    mount.archip("volume-seal", "kept")
    stream = Stream(1, 0, 1000)
    with opened(volume) as descriptor:
        for _ in range(50):
            stream.write(descriptor)
        stream.flush(descriptor)
        faulty.ceph("osd", "pool", "set-quota", POOL, "max_bytes", str(20 * MIB))
        wait_until(lambda: "POOL_FULL" in faulty.ceph("health")["checks"], "the pool is full")
        with within(MORE_SECONDS):
            # What lies in a stripe that is there already may still be accepted.
            expect_errno(
                errno.ENOSPC,
                lambda: [os.pwrite(descriptor, b"x" * MIB, at) for at in range(16 * MIB, 64 * MIB, 4 * MIB)],
            )
            assert "raise the pool's quota or remove something" in mount.refused(
                "volume-snapshot", "vm", "--name", "more"
            )
        expect_whole(volume, stream)
        os.unlink(ballast)
        os.unlink(mount.path / "kept")
        mount.archip("gc")
        faulty.ceph("osd", "pool", "set-quota", POOL, "max_bytes", "0")
        wait_until(lambda: "POOL_FULL" not in faulty.ceph("health")["checks"], "there is room again")
        os.pwrite(descriptor, b"x" * MIB, 32 * MIB)
        works(mount, volume, descriptor, stream, 0)


def tells_its_size(mountpoint: Path) -> bool:
    with suppress(OSError):
        return os.statvfs(mountpoint).f_blocks > 0
    return False


def test_without_a_monitor_volumes_go_on_and_whoever_needs_it_is_told_in_time(
    make_instance: MakeInstance, faulty: Cluster
) -> None:
    mount = make_instance(rados=options(faulty, for_monitors=IMPATIENT)).mount()
    other = make_instance(rados=options(faulty, for_monitors=IMPATIENT))
    volume = create(mount.path / "vm", VOLUME_BYTES)
    stream = Stream(1, 0, 1000)
    with opened(volume) as descriptor:
        with threads([write_on(descriptor, stream)]):
            goes_on(stream)
            faulty.kill("mon.a")
            goes_on(stream)
            snapshot(volume, "without")
            with within(IMPATIENT + MORE_SECONDS):
                expect_errno(errno.EIO, lambda: os.statvfs(mount.path))
            with within(IMPATIENT + MORE_SECONDS):
                assert "no monitor of" in other.refused("mount", other.path)
            goes_on(stream)
            faulty.restore()
            goes_on(stream)
        # A client that has lost its monitor looks for one every few seconds only.
        wait_until(lambda: tells_its_size(mount.path), "the mount tells its size again")
        other.mount()
        works(mount, volume, descriptor, stream, 0)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("user", "stranger", "the cluster refuses client.stranger"),
        ("keyring", "other-key", "the cluster refuses client.archip"),
        ("keyring", "nowhere", "nowhere is not there"),
        ("conf", "nowhere", "nowhere is not there"),
        ("pool", "nowhere", "the cluster has no pool nowhere"),
    ],
)
def test_what_is_wrong_with_a_backend_is_one_line(
    make_instance: MakeInstance, faulty: Cluster, tmp_path: Path, option: str, value: str, said: str
) -> None:
    (tmp_path / "other-key").write_text("[client.archip]\nkey = AQBTxUNlAAAAABAA1gY3ZsQ8ccDLf8ZhfTS/Tg==\n")
    instance = make_instance()
    instance.checked_at_end = False
    wrong = str(tmp_path / value) if option in ("keyring", "conf") else value
    words = {**options(faulty), option: wrong, "driver": "rados"}
    lines = "".join(f'{name} = "{each}"\n' for name, each in words.items())
    (instance.root / "archipfs.toml").write_text(f"[backend.default]\n{lines}")
    with within(MORE_SECONDS):
        assert said in instance.refused("mount", instance.path)


def test_a_backend_that_is_away_at_the_start_keeps_nobody_from_the_others(
    make_instance: MakeInstance, faulty: Cluster
) -> None:
    mount = make_instance()
    mount.expect_log(AWAY)
    mount.archip("backend-create", "default", "--driver", "file", "--path", mount.directory / "store")
    settings = options(faulty, for_monitors=IMPATIENT)
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    mount.archip("backend-create", "ceph", "--driver", "rados", *words)
    mount.archip("volume-create", "--name", "far", "--size", "1M", "--backend", "ceph")
    mount.archip("volume-create", "--name", "near", "--size", "1M")
    faulty.kill("mon.a")
    said = mount.archip("mount", "-o", "supervisor=off", mount.path)
    assert "backend ceph" in said.stdout + said.stderr
    (mount.path / "near").write_bytes(b"here")
    expect_errno(errno.EIO, lambda: (mount.path / "far").stat())
    expect_errno(errno.EIO, lambda: os.listdir(mount.path))
    assert "no monitor of" in mount.refused("volume-create", "--name", "far", "--size", "1M")
    backends = {each["name"]: each["available"] for each in mount.json("backend-list")}
    assert backends["default"] > 0
    assert backends["ceph"] is None
    faulty.restore()
    wait_until(lambda: not _fails(lambda: os.listdir(mount.path)), "the backend is back")
    assert sorted(os.listdir(mount.path)) == ["far", "near"]
    (mount.path / "far").write_bytes(b"there")


def test_a_pool_that_is_deleted_harms_no_other_backend(make_instance: MakeInstance, faulty: Cluster) -> None:
    mount = make_instance(rados=options(faulty))
    mount.checked_at_end = False
    mount.expect_log(AWAY)
    mount.archip("backend-create", "local", "--driver", "file", "--path", mount.directory / "local")
    mount.mount()
    mount.archip("volume-create", "--name", "near", "--size", "16M", "--backend", "local")
    lost, near = create(mount.path / "lost", VOLUME_BYTES), mount.path / "near"
    stream = Stream(1, 0, 1000)
    with opened(near) as descriptor:
        with opened(lost) as doomed:
            os.pwrite(doomed, b"x" * SECTOR_BYTES, 0)
            os.fsync(doomed)
            faulty.ceph("osd", "pool", "delete", POOL, POOL, "--yes-i-really-really-mean-it")
            expect_errno(errno.EIO, lambda: os.pwrite(doomed, b"y" * SECTOR_BYTES, 0))
            with opened(near):  # looked for by name once more
                stream.write(descriptor)
            assert "the pool archip was deleted" in mount.refused("volume-list")
            assert "the pool archip was deleted" in mount.refused("check")
        stream.flush(descriptor)
        # Nobody knows any more whether the name is free.
        expect_errno(errno.EIO, lambda: snapshot(near, "monday"))
        mount.archip("backend-remove", "default", "--keep-data")
        snapshot(near, "monday")
        assert sorted(os.listdir(mount.path)) == ["monday", "near"]
        stream.write(descriptor)
    with within(MORE_SECONDS):
        mount.umount()


def test_over_an_encrypted_connection_reads_of_any_length_succeed(
    make_instance: MakeInstance, ceph_cluster: Cluster, tmp_path: Path
) -> None:
    """librados hands what was read then over in pieces."""
    conf = tmp_path / "ceph.conf"
    conf.write_text(f"{ceph_cluster.conf.read_text()}\n[client]\nms_client_mode = secure\n")
    mount = make_instance(rados={**ceph_cluster.options(), "conf": str(conf)}).mount()
    content = os.urandom(5 * MIB)
    volume = create(mount.path / "vm", VOLUME_BYTES)
    with opened(volume, os.O_RDWR | os.O_DIRECT) as descriptor:
        os.pwrite(descriptor, content, 0)
        for length in (1, 15, 16, 17, 1000, 4095, 65537):
            for offset in (0, 7, SECTOR_BYTES, 4 * MIB - 3):
                assert os.pread(descriptor, length, offset) == content[offset : offset + length]
