"""stress-ng's file stressors, many at once, on file systems on volumes.

Each stressor makes a directory for its files first, which a mount of volumes refuses; so they run on a file system on a
loop device. What reaches the mount is what that device makes of it: reads, writes, flushes and holes at any depth.
"""

import os
from pathlib import Path

import pytest

from tests.lib.disks import check_file_system, loop_device, make_file_system, mounted
from tests.lib.instance import Instance
from tests.lib.programs import run
from tests.lib.volumes import create

pytestmark = [pytest.mark.mount, pytest.mark.outside]

SECONDS = int(os.environ.get("ARCHIPFS_STRESS_SECONDS", "12"))
VOLUME_BYTES = 2 << 30

BYTES = [
    *("aio", "aiol", "copy-file", "fallocate", "fiemap", "fpunch", "fsize", "hdd", "iomix", "mmap"),
    *("readahead", "revio", "seek", "sendfile", "splice", "sync-file"),
]
BOUNDS = [
    *("--fallocate-bytes", "64M", "--hdd-bytes", "64M", "--iomix-bytes", "64M", "--mmap-bytes", "16M", "--mmap-file"),
    *("--readahead-bytes", "32M", "--revio-bytes", "64M", "--seek-size", "32M", "--sync-file-bytes", "32M"),
    *("--copy-file-bytes", "128M", "--hdd-opts", "direct,dsync,fadv-rnd", "--fiemap-bytes", "32M"),
]
NAMES = [
    *("access", "chmod", "chown", "dentry", "dir", "dirmany", "fcntl", "filename", "flock", "fstat", "getdent"),
    *("inotify", "lease", "link", "locka", "lockf", "lockofd", "open", "rename", "symlink", "touch", "utime", "xattr"),
]


def stress(directory: Path, stressors: list[str], *options: str) -> None:
    chosen = [word for name in stressors for word in (f"--{name}", "1")]
    common = ["--timeout", str(SECONDS), "--verify", "--temp-path", directory, "--no-rand-seed", "--oom-avoid"]
    run("stress-ng", *chosen, *options, *common, seconds=SECONDS + 120)


@pytest.mark.parametrize(
    ("kind", "direct", "stressors", "options"),
    [
        ("xfs", True, BYTES, BOUNDS),
        ("ext4", False, BYTES, BOUNDS),
        ("ext4", True, NAMES, []),
        ("btrfs", True, NAMES, []),
    ],
    ids=["bytes-xfs-direct", "bytes-ext4-buffered", "names-ext4", "names-btrfs"],
)
def test_stressors_find_no_error_and_leave_a_sound_file_system(
    mount: Instance, tmp_path: Path, kind: str, direct: bool, stressors: list[str], options: list[str]
) -> None:
    volume = create(mount.path / "vm1", VOLUME_BYTES)
    with loop_device(volume, direct=direct) as device:
        make_file_system(kind, device)
        with mounted(device, tmp_path / "disk") as disk:
            stress(disk, stressors, *options)
            run("fstrim", disk)
        check_file_system(kind, device)
    mount.check()
