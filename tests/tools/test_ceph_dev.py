"""``tools/ceph-dev``: a cluster is made, stopped, killed and started again without losing a byte, and taken away."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.ceph import CEPH_DEV, POOL, Cluster, cluster
from tests.lib.instance import process_lives
from tests.lib.programs import run
from tests.lib.waiting import WAIT_SECONDS, wait_until

pytestmark = pytest.mark.ceph


def put(cluster: Cluster, name: str, content: Path, user: str = "admin") -> None:
    cluster.rados("put", name, str(content), user=user)


def get(cluster: Cluster, name: str, user: str = "admin") -> bytes:
    got = cluster.directory / "got"
    cluster.rados("get", name, str(got), user=user)
    return got.read_bytes()


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(os.urandom(100_000))
    return path


@pytest.fixture(scope="module")
def open_cluster() -> Iterator[Cluster]:
    """One without authentication, for whatever should not happen to the one that others use."""
    with cluster(auth=False) as made:
        yield made


def test_up_on_a_cluster_that_is_up_changes_nothing(ceph_cluster: Cluster) -> None:
    before = ceph_cluster.daemons()
    assert sorted(before) == ["mgr.a", "mon.a", "osd.0"]
    ceph_cluster.dev("up")
    assert ceph_cluster.daemons() == before


def test_other_options_than_it_was_made_with_are_refused(ceph_cluster: Cluster) -> None:
    said = refused("up", ceph_cluster.directory, "--osds", 3)
    assert f"{ceph_cluster.directory} holds a cluster made with other options: 1 OSD, cephx" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "d", "--osds", "0"), "--osds takes a number"),
        (("up", "d", "--osds"), "--osds takes a number"),
        (("up", "d", "--address", "localhost"), "--address takes an IPv4 address"),
        (("up", "a name"), "has a space in it"),
        (("status", "nowhere"), "there is no cluster in"),
        (("down", "nowhere"), "there is no cluster in"),
        (("osd-stop", "nowhere", "0"), "there is no cluster in"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    command, directory, *rest = arguments
    assert said in refused(command, tmp_path / directory, *rest)
    assert not list(tmp_path.iterdir())


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    for name in ("mon", "run", "log"):
        (tmp_path / name).mkdir()
    assert "is not empty" in refused("up", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "mon", "run"]


def test_the_restricted_user_has_the_pool_and_nothing_else(ceph_cluster: Cluster, content: Path) -> None:
    put(ceph_cluster, "restricted", content, user="archip")
    assert get(ceph_cluster, "restricted", user="archip") == content.read_bytes()
    ceph_cluster.ceph("osd", "pool", "create", "private", "1")
    try:
        denied = run(*client(ceph_cluster, "rados", "archip"), "--pool", "private", "put", "x", content, fine=(1,))
        assert denied == ""
        run(*client(ceph_cluster, "ceph", "archip"), "auth", "ls", fine=(13,))
    finally:
        ceph_cluster.ceph("osd", "pool", "rm", "private", "private", "--yes-i-really-really-mean-it")


def test_without_its_key_nobody_gets_in(ceph_cluster: Cluster, tmp_path: Path) -> None:
    nobody = tmp_path / "keyring"
    nobody.write_text(f"[client.archip]\nkey = {run('ceph-authtool', '--gen-print-key').strip()}\n")
    run(*client(ceph_cluster, "rados", "archip"), "--keyring", nobody, "--pool", POOL, "ls", fine=(1,))


def test_what_is_written_while_the_osd_is_stopped_waits_for_it(ceph_cluster: Cluster, content: Path) -> None:
    ceph_cluster.dev("osd-stop", 0)
    try:
        assert "osd.0 does not run" in ceph_cluster.dev("status", fine=(1,))
        arguments = [*client(ceph_cluster, "rados", "admin"), "--pool", POOL, "put", "waiting", content]
        with subprocess.Popen(list(map(str, arguments))) as writer:
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(1)
            ceph_cluster.dev("osd-start", 0)
            assert writer.wait(WAIT_SECONDS) == 0
    finally:
        ceph_cluster.restore()
    assert get(ceph_cluster, "waiting") == content.read_bytes()


def test_data_outlives_stopping_and_killing(open_cluster: Cluster, content: Path) -> None:
    put(open_cluster, "kept", content, user="anyone")
    open_cluster.dev("down")
    assert open_cluster.daemons() == {}
    open_cluster.dev("down")
    open_cluster.dev("up")
    assert get(open_cluster, "kept") == content.read_bytes()
    for name in open_cluster.daemons():
        open_cluster.kill(name)
    assert (open_cluster.directory / "run" / "osd.0.pid").exists()
    assert open_cluster.daemons() == {}
    open_cluster.dev("up")
    assert get(open_cluster, "kept") == content.read_bytes()


def test_the_number_of_another_process_in_a_pid_file_is_not_believed(open_cluster: Cluster) -> None:
    manager = open_cluster.daemons()["mgr.a"]
    pid_file = open_cluster.directory / "run" / "mgr.a.pid"
    open_cluster.kill("mgr.a")
    with subprocess.Popen(["sleep", "100"]) as other:
        try:
            pid_file.write_text(f"{other.pid}\n")
            assert "mgr.a" not in open_cluster.daemons()
            open_cluster.restore()
            assert open_cluster.daemons()["mgr.a"] not in (manager, other.pid)
            assert other.poll() is None
        finally:
            other.kill()


def test_no_monitor_no_answer_until_it_is_back(open_cluster: Cluster) -> None:
    open_cluster.dev("mon-stop")
    try:
        assert sorted(open_cluster.daemons()) == ["mgr.a", "osd.0"]
    finally:
        open_cluster.dev("mon-start")
    assert open_cluster.ceph("osd", "stat")["num_up_osds"] == 1


ASKING = f"""
import signal, sys
sys.path.append({str(CEPH_DEV.parents[1])!r})
from tests.lib.ceph import cluster
with cluster() as made:
    print(made.directory, *made.daemons().values(), flush=True)
    signal.pause()
"""


def test_a_cluster_ends_with_the_process_that_asked_for_it() -> None:
    command = [sys.executable, "-c", ASKING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        directory, *pids = process.stdout.readline().split()
        assert all(process_lives(int(pid)) for pid in pids)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not Path(directory).exists(), "the cluster is gone")
    assert not any(process_lives(int(pid)) for pid in pids)


def client(cluster: Cluster, program: str, user: str) -> tuple[str | Path, ...]:
    return program, "--conf", cluster.conf, "--name", f"client.{user}"


def refused(command: str, directory: Path, *arguments: str | int) -> str:
    """Run a command that has to fail, with one line on standard error, which is returned."""
    done = subprocess.run(
        [CEPH_DEV, command, directory, *map(str, arguments)], capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.returncode == 1, done
    assert len(done.stderr.splitlines()) == 1, done
    return done.stderr
