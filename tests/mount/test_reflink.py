"""archip-reflink: an instant copy where that can be, an ordinary one where it cannot, and never half a file."""

import os
import pty
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.lib.instance import Instance
from tests.lib.volumes import SECTOR_BYTES, create, fact, opened, read_all, snapshot
from tests.lib.waiting import wait_until

pytestmark = pytest.mark.mount

MIB, GIB = 1 << 20, 1 << 30
COMMAND = [sys.executable, "-m", "archipfs.cli.reflink"]


@pytest.fixture
def mount(shared_mount: Instance) -> Instance:
    return shared_mount


def run(*arguments: str | Path, umask: int = 0o022, code: int = 0) -> str:
    """What ``archip-reflink`` says on standard error: at most one line, under its name."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, umask=umask, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.count("\n") == (1 if done.stderr else 0)
    assert not done.stderr or done.stderr.startswith("archip-reflink: ")
    return done.stderr.removeprefix("archip-reflink: ").strip()


def names(directory: Path) -> Sequence[str]:
    return sorted(os.listdir(directory))


# Clones


def test_a_copy_on_the_mount_shares_everything_and_stands_by_itself(mount: Instance) -> None:
    volume = create(mount.path / "vm1", 100 * GIB)
    with opened(volume) as descriptor:
        os.pwrite(descriptor, os.urandom(8 * MIB), 50 * GIB)
    before = mount.stored_bytes()
    assert run("--reflink=always", volume, mount.path / "vm2") == ""
    assert mount.stored_bytes() - before < MIB
    assert fact(mount.path / "vm2", "parent") == "vm1"
    with opened(volume) as one, opened(mount.path / "vm2") as other:
        assert os.fstat(other).st_size == 100 * GIB
        assert os.pread(other, 8 * MIB, 50 * GIB) == os.pread(one, 8 * MIB, 50 * GIB)
        os.pwrite(one, b"only here", 0)
        os.pwrite(other, b"only there", 0)
        assert os.pread(one, 10, 0) == b"only here\0"


@pytest.mark.parametrize(
    ("mode", "umask", "copied"), [(0o644, 0o022, 0o644), (0o666, 0o027, 0o640), (0o600, 0o000, 0o600)]
)
def test_the_copy_is_ours_with_the_mode_that_cp_would_give_it(
    mount: Instance, mode: int, umask: int, copied: int
) -> None:
    volume = create(mount.path / "vm1", MIB)
    os.chown(volume, 1234, 5678)
    volume.chmod(mode)
    run(volume, mount.path / "vm2", umask=umask)
    status = (mount.path / "vm2").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (copied, 0, 0)


def test_the_copy_of_a_snapshot_may_be_written_by_its_owner(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"x" * MIB)
    monday = snapshot(volume, "monday")
    volume.write_bytes(b"y" * MIB)
    run(monday, mount.path / "vm2")
    assert stat.S_IMODE((mount.path / "vm2").stat().st_mode) == 0o644
    assert read_all(mount.path / "vm2") == b"x" * MIB


def test_a_directory_as_target_takes_the_sources_name(mount: Instance, tmp_path: Path) -> None:
    outside = tmp_path / "vm1"
    outside.write_bytes(b"x" * 5000)
    assert "ordinary copy" in run(outside, mount.path)
    assert read_all(mount.path / "vm1") == b"x" * 5000
    assert "vm1 are the same file" in run(mount.path / "vm1", mount.path, code=2)


def test_an_empty_volume_is_copied_too(mount: Instance) -> None:
    (mount.path / "vm1").touch()
    assert run("--reflink=always", mount.path / "vm1", mount.path / "vm2") == ""
    assert (mount.path / "vm2").stat().st_size == 0


# What exists already


def test_what_exists_is_refused_and_stays(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"new")
    (mount.path / "vm2").write_bytes(b"old")
    assert "vm2 exists already" in run(volume, mount.path / "vm2", code=1)
    assert read_all(mount.path / "vm2") == b"old"
    assert names(mount.path) == ["vm1", "vm2"]


def test_with_force_it_is_replaced_and_who_has_it_open_keeps_it(mount: Instance) -> None:
    volume, old = mount.path / "vm1", mount.path / "vm2"
    volume.write_bytes(b"new")
    old.write_bytes(b"old")
    with opened(old, os.O_RDONLY) as descriptor:
        assert run("-f", volume, old) == ""
        assert os.pread(descriptor, 3, 0) == b"old"
    assert read_all(old) == b"new"
    assert fact(old, "parent") == "vm1"
    assert names(mount.path) == ["vm1", "vm2"]


def test_the_same_file_is_refused_also_with_force(mount: Instance) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(b"here")
    assert "are the same file" in run("-f", volume, volume, code=2)
    assert read_all(volume) == b"here"


@pytest.mark.parametrize("force", [[], ["-f"]], ids=["new", "replaced"])
def test_a_bad_name_is_one_line_and_leaves_nothing(mount: Instance, force: list[str]) -> None:
    volume = create(mount.path / "vm1", MIB)
    assert "begins with a dot" in run(*force, volume, mount.path / ".hidden", code=2)
    run(*force, volume, mount.path / "nowhere" / "vm2", code=1)
    run(*force, mount.path / "missing", mount.path / "vm2", code=1)
    run(*force, mount.path, mount.path / "vm2", code=2)
    assert names(mount.path) == ["vm1"]


# Ordinary copies


def test_from_and_to_outside_it_is_an_ordinary_copy_with_its_holes_and_says_so(mount: Instance, tmp_path: Path) -> None:
    outside = tmp_path / "image"
    with open(outside, "wb") as stream:
        stream.truncate(2 * GIB + 5)
        os.pwrite(stream.fileno(), b"x" * MIB, GIB)
    before = mount.stored_bytes()
    assert "not a volume on an archipfs mount" in run(outside, mount.path / "vm1")
    assert MIB <= mount.stored_bytes() - before < 2 * MIB
    assert "does not lie on the mount" in run(mount.path / "vm1", tmp_path / "back")
    for path in (mount.path / "vm1", tmp_path / "back"):
        with opened(path, os.O_RDONLY) as descriptor:
            assert os.fstat(descriptor).st_size == 2 * GIB + 5
            assert os.pread(descriptor, MIB + 2, GIB - 1) == b"\0" + b"x" * MIB + b"\0"
    assert (tmp_path / "back").stat().st_blocks * 512 < 2 * MIB
    assert names(tmp_path) == ["back", "image"]


def test_an_ordinary_copy_to_a_name_that_no_volume_may_have_is_refused_at_once(mount: Instance) -> None:
    done = subprocess.run(
        [*COMMAND, __file__, mount.path / ".hidden"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "begins with a dot" in done.stderr.splitlines()[-1]
    assert names(mount.path) == []


def test_always_refuses_an_ordinary_copy(mount: Instance, tmp_path: Path) -> None:
    volume = create(mount.path / "vm1", MIB)
    assert "cannot clone" in run("--reflink=always", volume, tmp_path / "copy", code=1)
    assert "cannot clone" in run("--reflink=always", Path(__file__), mount.path / "copy", code=1)
    assert names(tmp_path) == []
    assert names(mount.path) == ["vm1"]


def test_without_the_front_it_is_an_ordinary_copy(make_instance: MakeInstance) -> None:
    instance = make_instance(front=False).mount()
    (instance.path / "vm1").write_bytes(b"x" * 5000)
    assert "ordinary copy" in run(instance.path / "vm1", instance.path / "vm2")
    assert read_all(instance.path / "vm2") == b"x" * 5000
    assert "exists already" in run(instance.path / "vm1", instance.path / "vm2", code=1)


def test_an_ordinary_copy_is_there_as_a_whole_or_not_at_all(mount: Instance, tmp_path: Path) -> None:
    outside, target = tmp_path / "image", tmp_path / "copy"
    with open(outside, "wb") as stream:
        for _ in range(256):
            stream.write(b"x" * MIB)
    target.write_bytes(b"old")
    with subprocess.Popen([*COMMAND, "-f", outside, target], stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(names(tmp_path)) == 3, "the copy has begun")
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted" in said
    assert names(tmp_path) == ["copy", "image"]
    assert target.read_bytes() == b"old"


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(SECTOR_BYTES))
    terminal, end = pty.openpty()
    try:
        subprocess.run([*COMMAND, tmp_path / "image", tmp_path / "copy"], stderr=end, check=True, timeout=60)
        os.close(end)
        said = b""
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(terminal, 65536):
                said += piece
    finally:
        os.close(terminal)
    assert b"\x1b[" in said
    assert b"image" in said
    assert "\x1b" not in run(tmp_path / "image", tmp_path / "again")
