"""A plain user, who is not root: mounts with fusermount3, works, unmounts, and nobody else looks in."""

import fcntl
import os
import pwd
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import archipfs
from tests.lib.instance import TEMPORARY, mount_type, process_lives
from tests.lib.programs import run
from tests.lib.volumes import SECTOR_BYTES
from tests.lib.waiting import wait_until

pytestmark = pytest.mark.mount

USER = pwd.getpwnam("nobody").pw_uid
"""fusermount3 wants an account, and that one is everywhere."""
STRANGER = 61235
DEVICE = Path("/dev/fuse")
SECONDS = 120.0
INTERPRETER = os.path.realpath(sys.executable)
"""Not that of a virtual environment, which may lie in a private directory."""


def as_user(uid: int, *arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with no more rights than the user has, and nothing of our environment."""
    return subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", *map(str, arguments)],
        cwd=cwd,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(cwd), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[None]:
    """udev gives /dev/fuse to everybody. Where there is no udev, our user gets it for these tests, and nobody else.

    Tests of this module may run in several processes: the last one to end takes it away again.
    """
    if os.stat(DEVICE).st_mode & stat.S_IWOTH:
        yield
        return
    with open(DEVICE, "rb") as in_use:
        fcntl.flock(in_use, fcntl.LOCK_SH)
        run("setfacl", "--modify", f"user:{USER}:rw", DEVICE)
        try:
            yield
        finally:
            with suppress(BlockingIOError):
                fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                run("setfacl", "--remove", f"user:{USER}", DEVICE)


@pytest.fixture(scope="module")
def code() -> Iterator[str]:
    """A PYTHONPATH with archipfs and all it imports, where every user may read it: a checkout may be private."""
    directory = Path(os.path.realpath(TEMPORARY)) / f"archipfs-code-{os.getpid()}"
    packages = Path(sysconfig.get_path("platlib"))
    directory.mkdir(mode=0o755)
    try:
        ignored = shutil.ignore_patterns("__pycache__", "*.c", "*.h", "*.o")
        shutil.copytree(Path(archipfs.__file__).parent, directory / "archipfs", ignore=ignored)
        if as_user(USER, "test", "-r", packages / "pyfuse3", cwd=Path("/")).returncode != 0:
            shutil.copytree(packages, directory / "packages", ignore=ignored)
            packages = directory / "packages"
        run("chmod", "-R", "go=u,go-w", directory)
        yield f"{directory}:{packages}"
    finally:
        shutil.rmtree(directory)


class User:
    """One user with a home, a private instance in it and the command ``archip``."""

    def __init__(self, uid: int, home: Path, code: str) -> None:
        self.uid = uid
        self.home = home
        self.path = home / "mnt"
        self._python_path = code

    def archip(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run(INTERPRETER, "-m", "archipfs.cli.main", "--root", self.home / "root", *arguments)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return as_user(self.uid, *arguments, cwd=self.home, PYTHONPATH=self._python_path)

    def check(self, *arguments: str | Path) -> str:
        return succeeded(self.run(*arguments))


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def user(code: str) -> Iterator[User]:
    home = Path(os.path.realpath(TEMPORARY)) / f"archipfs-user-{os.getpid()}"
    home.mkdir(mode=0o755)
    try:
        user = User(USER, home, code)
        for path in (user.path, home / "root"):
            path.mkdir(mode=0o755)
            os.chown(path, USER, USER)
        os.chown(home, USER, USER)
        yield user
        user.archip("umount")
    finally:
        if mount_type(home / "mnt") is not None:
            subprocess.run(["umount", "-l", home / "mnt"], check=False)
        shutil.rmtree(home, ignore_errors=True)


def processes_of(user: User) -> list[int]:
    """Those that know of the user's home."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            ours = str(user.home).encode() in (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ours and process_lives(int(directory.name)):
            found.append(int(directory.name))
    return found


@pytest.mark.parametrize("front", [True, False], ids=["front", "plain"])
def test_a_plain_user_mounts_works_and_unmounts_and_leaves_nothing(user: User, front: bool) -> None:
    succeeded(user.archip("mount", "-o", f"front={'on' if front else 'off'}", user.path))
    assert mount_type(user.path) == "fuse.archipfs"
    if front:
        assert '"front": "on"' in succeeded(user.archip("status", "--format", "json"))
    work = """
        set -e
        truncate -s 1G vm1
        printf monday | dd of=vm1 conv=notrunc,fsync status=none
        dd if=/dev/zero of=vm1 bs=1M count=4 seek=1 conv=notrunc oflag=direct status=none
        setfattr -n user.archip.snapshot -v vm1-monday vm1
        printf tuesday | dd of=vm1 conv=notrunc status=none
        setfattr -n user.archip.clone -v vm2 vm1
        head -c 7 vm1; echo; head -c 6 vm1-monday; echo; head -c 7 vm2; echo
        mv vm2 vm3
        chmod 600 vm3
        stat -c %u:%a vm3
    """
    said = user.check("sh", "-c", f"cd {user.path} && {work}")
    assert said.split() == ["tuesday", "monday", "tuesday", f"{USER}:600"]
    if front:
        user.check("fallocate", "--punch-hole", "-o", "0", "-l", str(SECTOR_BYTES), user.path / "vm3")
        assert user.check("head", "-c", "6", user.path / "vm3") == "\0" * 6
    succeeded(user.archip("volume-clone", "vm3", "--name", "vm4"))
    assert "vm4" in succeeded(user.archip("volume-list"))
    succeeded(user.archip("check"))

    stranger = as_user(STRANGER, "ls", user.path, cwd=Path("/"))
    assert stranger.returncode != 0, "another user looks into the mount"
    # Not even root, to whom it is none of its business unless it was mounted so.
    with pytest.raises(PermissionError):
        os.listdir(user.path)

    succeeded(user.archip("umount"))
    assert mount_type(user.path) is None
    wait_until(lambda: processes_of(user) == [], "no process is left")
    assert list((user.home / "root" / "run" / "live").iterdir()) == []


def test_a_user_clones_a_snapshot_by_command_for_the_kernel_lets_no_attribute_of_it_be_set(user: User) -> None:
    succeeded(user.archip("mount", user.path))
    user.check("sh", "-c", f"cd {user.path} && echo monday >vm1 && setfattr -n user.archip.snapshot -v vm1-monday vm1")
    refused = user.run("setfattr", "-n", "user.archip.clone", "-v", "vm2", user.path / "vm1-monday")
    assert "Permission denied" in refused.stderr  # the kernel's check of mode 0444; root passes it
    succeeded(user.archip("volume-clone", "vm1-monday", "--name", "vm2"))
    assert user.check("cat", user.path / "vm2") == "monday\n"


def test_what_a_user_stores_is_nobody_elses(user: User) -> None:
    succeeded(user.archip("mount", user.path))
    user.check("sh", "-c", f"echo secret >{user.path / 'vm1'}; chmod 644 {user.path / 'vm1'}")
    succeeded(user.archip("umount"))
    for directory, _, names in os.walk(user.home / "root" / "state"):
        for name in names:
            path = Path(directory) / name
            if stat.S_ISREG(path.lstat().st_mode):
                looked = as_user(STRANGER, "cat", path, cwd=Path("/"))
                assert "secret" not in looked.stdout, f"{path} can be read by anybody"


def test_a_user_cannot_have_what_is_roots(user: User) -> None:
    done = user.archip("mount", "-o", "allow_other", user.path)
    assert done.returncode != 0
    assert "allow_other" in done.stderr
    assert mount_type(user.path) is None
    foreign = user.home / "foreign"
    foreign.mkdir(mode=0o755)
    done = user.archip("mount", foreign)
    assert done.returncode != 0
    assert str(foreign) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert mount_type(foreign) is None
    wait_until(lambda: processes_of(user) == [], "no process is left")
