"""A supervised mount: the daemon is killed or replaced under it, the supervisor is killed, told to stop, or gives up.

What twenty kills do to everything that can go on meanwhile is in ``test_restart``.
"""

import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from archipfs.daemon.supervisor import DEATHS_MAX
from archipfs.endpoints.fuse.operations import CACHE_SECONDS
from tests.conftest import MakeInstance
from tests.lib.instance import Instance, kill_process, mount_type, process_lives
from tests.lib.volumes import SECTOR_BYTES, clone, create, opened, read_all, snapshot
from tests.lib.waiting import threads, wait_until
from tests.lib.ways import also_on_a_pool

pytestmark = pytest.mark.mount

MIB = 1 << 20
KILLS = DEATHS_MAX - 1
"""As many as a supervisor bears within half a minute."""
PAUSE_SECONDS_MAX = 60.0
"""What the tests stand for on a busy machine; the pauses themselves are logged, and far shorter."""


@pytest.fixture
def supervised(make_instance: MakeInstance) -> Instance:
    instance = make_instance(supervised=True).mount()
    if instance.json("status")[0]["supervisor_pid"] is None or instance.logged("is not restarted"):
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND")
    return instance


@contextmanager
def fio_verifying(volume: Path, seconds: int) -> Iterator[subprocess.Popen[str]]:
    """fio writes at depth 16 and reads back what it wrote, all the time; any error or wrong byte fails the test."""
    job = ["fio", "--name=job", f"--filename={volume}", "--size=32M", "--rw=randwrite", "--bs=4k", "--randseed=7"]
    job += ["--ioengine=libaio", "--direct=1", "--iodepth=16", "--time_based", f"--runtime={seconds}"]
    job += ["--verify=crc32c", "--verify_backlog=512", "--verify_fatal=1", "--verify_state_save=0"]
    fio = subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until(lambda: volume.stat().st_blocks * 512 > MIB or fio.poll() is not None, "fio is at it")
        yield fio
        said, _ = fio.communicate(timeout=seconds + 60)
        assert fio.returncode == 0, said
    finally:
        fio.kill()
        fio.communicate()


class Pauses:
    """How long a program waits for one small write after the other; the longest wait is what a guest would see."""

    def __init__(self, volume: Path) -> None:
        self._volume = volume
        self.longest_seconds = 0.0

    def task(self, stop: threading.Event) -> None:
        with mmap.mmap(-1, SECTOR_BYTES) as page, opened(self._volume, os.O_RDWR | os.O_DIRECT) as descriptor:
            while not stop.is_set():
                began = time.monotonic()
                os.pwrite(descriptor, page, 0)
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                time.sleep(0.001)


def logged_pauses(instance: Instance) -> list[float]:
    """Milliseconds from a daemon's end until the next one serves, as the daemons logged them."""
    return [json.loads(line)["pause_ms"] for line in instance.log_lines() if '"went on"' in line]


def wait_for_child(instance: Instance, than: int) -> int:
    """Until the supervisor has started a daemon that is not process ``than``, which need not have got far; its id."""
    supervisor = instance.supervisor_pid()
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    started: list[int] = []

    def is_started() -> bool:
        started[:] = [pid for pid in map(int, children.read_text().split()) if pid != than and process_lives(pid)]
        return bool(started)

    wait_until(is_started, "the next daemon is started")
    return started[0]


# Data


def test_fio_does_not_notice_kills_close_together(supervised: Instance) -> None:
    chance = random.Random(KILLS)
    volume = create(supervised.path / "vm1", 32 * MIB)
    pauses = Pauses(create(supervised.path / "probe", SECTOR_BYTES))
    with threads([pauses.task]), fio_verifying(volume, 6):
        for count in range(1, KILLS + 1):
            time.sleep(chance.uniform(0, 0.5))
            supervised.kill_daemon()
            # It answers before it says so, and not every one that dies has got so far.
            wait_until(lambda count=count: len(logged_pauses(supervised)) == count, "the next daemon says so")  # type: ignore[misc]
    logged = logged_pauses(supervised)
    print(f"{KILLS} kills: pauses of {min(logged):.0f} to {max(logged):.0f} ms, {pauses.longest_seconds:.3f} s seen")
    assert len(logged) == KILLS
    assert pauses.longest_seconds < PAUSE_SECONDS_MAX


def test_fio_does_not_notice_an_upgrade(supervised: Instance) -> None:
    volume = create(supervised.path / "vm1", 32 * MIB)
    pauses = Pauses(create(supervised.path / "probe", SECTOR_BYTES))
    with threads([pauses.task]), fio_verifying(volume, 6):
        for _ in range(3):
            old = supervised.daemon_pid()
            done = json.loads(supervised.archip("upgrade", "--format", "json").stdout)
            assert done["old_pid"] == old
            assert done["new_pid"] == supervised.call("status")["daemon_pid"]
    print(f"upgrades: pauses of {logged_pauses(supervised)} ms, {pauses.longest_seconds:.3f} s seen")
    assert len(logged_pauses(supervised)) == 3
    assert pauses.longest_seconds < PAUSE_SECONDS_MAX


def test_a_daemon_that_is_killed_while_it_takes_up_the_mount_is_started_once_more(supervised: Instance) -> None:
    volume = create(supervised.path / "vm1", MIB)
    with opened(volume) as descriptor:
        pid = supervised.daemon_pid()
        for delay in (0.0, 0.2, 0.35):
            assert pid is not None
            kill_process(pid)
            pid = wait_for_child(supervised, pid)
            time.sleep(delay)
        kill_process(pid)
        os.pwrite(descriptor, b"here", 0)
        os.fsync(descriptor)
    assert read_all(volume)[:4] == b"here"


def test_files_that_were_open_stay_so_removed_ones_too(supervised: Instance) -> None:
    kept = create(supervised.path / "kept", MIB)
    removed = create(supervised.path / "removed", MIB)
    with opened(kept) as one, opened(removed) as other:
        os.pwrite(one, b"one", 0)
        os.pwrite(other, b"other", 0)
        removed.unlink()
        pid = supervised.kill_daemon()
        assert os.pread(one, 3, 0) == b"one"
        assert os.pread(other, 5, 0) == b"other"
        os.pwrite(other, b"again", 5)
        assert os.pread(other, 10, 0) == b"otheragain"
        inode = os.fstat(one).st_ino
        supervised.wait_for_another_daemon(pid)
    assert kept.stat().st_ino == inode
    assert not removed.exists()


# Names


@also_on_a_pool
def test_no_operation_is_lost_or_done_twice(supervised: Instance) -> None:
    """Programs that make names while the daemon dies: each call succeeds, once."""
    base = create(supervised.path / "base", MIB)
    snapshot(base, "snap")
    made = 0

    def work(stop: threading.Event) -> None:
        nonlocal made
        while not stop.is_set():
            made += 1
            name = f"n{made:04}"
            create(supervised.path / name, SECTOR_BYTES)
            snapshot(supervised.path / name, f"{name}-snap")
            clone(supervised.path / "snap", f"{name}-clone")
            os.rename(supervised.path / f"{name}-clone", supervised.path / f"{name}-moved")
            os.unlink(supervised.path / f"{name}-snap")

    with threads([work]):
        for _ in range(3):
            time.sleep(0.3)
            supervised.wait_for_another_daemon(supervised.kill_daemon())
    expected = {"base", "snap"} | {f"n{number:04}{kind}" for number in range(1, made + 1) for kind in ("", "-moved")}
    assert set(os.listdir(supervised.path)) == expected


def test_commands_wait_for_the_next_daemon_and_are_done_once(supervised: Instance) -> None:
    create(supervised.path / "vm1", MIB)
    made = 0

    def work(stop: threading.Event) -> None:
        nonlocal made
        while not stop.is_set():
            made += 1
            supervised.call("volume-snapshot", name="vm1", snapshot=f"s{made}")
            supervised.call("volume-rename", name=f"s{made}", new_name=f"t{made}")
            if made % 2:
                supervised.call("volume-remove", name=f"t{made}")

    with threads([work]):
        for _ in range(3):
            time.sleep(0.3)
            supervised.wait_for_another_daemon(supervised.kill_daemon())
    assert set(os.listdir(supervised.path)) == {"vm1"} | {f"t{number}" for number in range(2, made + 1, 2)}


# The supervisor


def test_five_deaths_in_a_row_end_the_mount_with_an_error_and_it_can_be_mounted_again(supervised: Instance) -> None:
    supervised.expect_log("the mount is given up")
    volume = create(supervised.path / "vm1", MIB)
    supervisor = supervised.supervisor_pid()
    assert supervisor is not None
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"here", 0)
        pid = supervised.kill_daemon()
        for _ in range(DEATHS_MAX - 1):
            # At once: they have to lie close together on a slow machine too.
            pid = wait_for_child(supervised, pid)
            kill_process(pid)
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.pwrite(descriptor, b"more", 4)
    wait_until(lambda: not process_lives(supervisor), "the supervisor has ended")
    assert mount_type(supervised.path) is None
    assert supervised.logged("died 5 times in 30 s (SIGKILL, SIGKILL, SIGKILL, SIGKILL, SIGKILL)")
    supervised.mount()
    assert read_all(volume)[:4] == b"here"


def test_a_killed_supervisor_leaves_the_mount_served(supervised: Instance) -> None:
    volume = create(supervised.path / "vm1", MIB)
    supervised.kill_supervisor()
    volume.write_bytes(b"here")
    assert supervised.json("status")[0]["supervisor_pid"] is None
    assert "has no supervisor" in supervised.refused("upgrade")
    supervised.umount()
    supervised.mount()
    assert read_all(volume)[:4] == b"here"
    assert supervised.supervisor_pid() is not None


def test_umount_returns_when_daemon_and_supervisor_are_gone(supervised: Instance) -> None:
    pids = supervised.daemon_pid(), supervised.supervisor_pid()
    supervised.umount()
    assert not any(pid is not None and process_lives(pid) for pid in pids)
    supervised.mount()


def test_a_signal_to_the_supervisor_ends_the_mount_in_order(supervised: Instance) -> None:
    volume = create(supervised.path / "vm1", MIB)
    supervisor = supervised.supervisor_pid()
    assert supervisor is not None
    with opened(volume) as descriptor:
        os.pwrite(descriptor, b"here", 0)
        os.kill(supervisor, signal.SIGTERM)
        wait_until(lambda: not process_lives(supervisor), "the supervisor has ended")
    assert mount_type(supervised.path) is None
    assert supervised.json("volume-info", "vm1")["lock"] is None
    supervised.mount()
    assert read_all(volume)[:4] == b"here"


def test_a_failed_upgrade_leaves_the_old_daemon_serving(
    make_instance: MakeInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = make_instance(supervised=True)
    instance.expect_log("not upgraded")
    with monkeypatch.context() as environment:
        environment.setenv("PYTHONPATH", str(tmp_path))
        instance.mount()
    broken = tmp_path / "sitecustomize.py"  # what Python imports before everything else
    broken.write_text("import os; os._exit(7)\n")
    pid = instance.daemon_pid()
    said = instance.refused("upgrade")
    assert "exit code 7" in said
    assert f"{instance.path} is still served, by daemon {pid}" in said
    broken.unlink()
    create(instance.path / "vm1", MIB)
    assert json.loads(instance.archip("upgrade", "--format", "json").stdout)["old_pid"] == pid


def test_upgrade_without_a_mount_says_so(make_instance: MakeInstance) -> None:
    assert "nothing is mounted" in make_instance().refused("upgrade")


# Service managers


def test_in_the_foreground_the_supervisor_is_the_process_that_was_started(make_instance: MakeInstance) -> None:
    instance = make_instance()
    process = instance.start("mount", "--foreground", instance.path)
    try:
        wait_until(lambda: mount_type(instance.path) is not None, "it is mounted")
        wait_until(lambda: instance.daemon_pid() is not None, "the daemon has the node")
        assert instance.json("status")[0]["supervisor_pid"] == process.pid
        create(instance.path / "vm1", MIB)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert mount_type(instance.path) is None
    finally:
        process.kill()
        process.communicate()


def test_in_the_foreground_a_failed_start_is_one_line(make_instance: MakeInstance) -> None:
    first = make_instance().mount()
    said = first.refused("mount", "--foreground", first.directory)
    assert said.startswith("archip: ")
    assert f"mounted at {first.path}" in said


class Manager:
    """A service manager with a descriptor store, as systemd is one."""

    def __init__(self) -> None:
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.listening.bind("")
        self.listening.settimeout(60)
        self.stored: dict[str, int] = {}

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """The shell puts the descriptors where they belong, and becomes the command with LISTEN_PID."""
        redirections = " ".join(f"{3 + index}<&{each}" for index, each in enumerate(self.stored.values()))
        manager = {"NOTIFY_SOCKET": "@" + self.listening.getsockname()[1:].decode()}
        if self.stored:
            manager |= {"LISTEN_FDS": str(len(self.stored)), "LISTEN_FDNAMES": ":".join(self.stored)}
        script = f'export LISTEN_PID=$$; exec "$@" {redirections}'
        return subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            env={**environment, **manager},
            pass_fds=list(self.stored.values()),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait_for(self, state: str) -> None:
        """Until it is said; what is to be stored before that is stored."""
        while True:
            message, descriptors, _, _ = socket.recv_fds(self.listening, 1024, 4)
            said = dict(line.partition("=")[::2] for line in message.decode().splitlines())
            if "FDSTORE" in said:
                replaced = self.stored.get(said["FDNAME"])
                self.stored[said["FDNAME"]] = descriptors[0]
                if replaced is not None:
                    os.close(replaced)
            elif "FDSTOREREMOVE" in said:
                os.close(self.stored.pop(said["FDNAME"]))
            if state in said:
                return

    def close(self) -> None:
        self.listening.close()
        for descriptor in self.stored.values():
            os.close(descriptor)


HOLDER = """
exec 5<>"$0"
printf here >&5
echo begun
read -r go_on
printf more >&5 && head -c 8 "$0"
"""
"""Has a file open in a process of its own: a manager that had would wait for the daemon that it is about to start."""


def test_systemd_can_play_the_supervisors_part(supervised: Instance) -> None:
    supervised.umount()
    manager = Manager()
    command = [sys.executable, "-m", "archipfs.cli.main", "--root", str(supervised.root)]
    command += ["mount", "--foreground", "-o", "supervisor=off", str(supervised.path)]
    processes = [manager.start(command, supervised.environment())]
    try:
        manager.wait_for("READY")
        volume = create(supervised.path / "vm1", MIB)
        processes.append(
            holder := subprocess.Popen(["bash", "-c", HOLDER, volume], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"begun\n"
        processes[0].kill()
        processes[0].wait(timeout=60)
        time.sleep(1.5 * CACHE_SECONDS)  # the kernel knows nothing of the mount point any more: who asks it waits
        processes.append(second := manager.start(command, supervised.environment()))
        manager.wait_for("READY")
        assert holder.communicate(b"go on\n", timeout=60)[0] == b"heremore"
        second.terminate()
        manager.wait_for("STOPPING")
        assert second.wait(timeout=60) == 0
        manager.listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            manager.wait_for("nothing more")
        assert manager.stored == {}, "nothing is kept of a mount that is gone"
        assert mount_type(supervised.path) is None
    finally:
        # All of them, before any is waited for: one that has a file open waits for whoever has the device.
        manager.close()
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
