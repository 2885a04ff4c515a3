"""Volumes as disks: a loop device over one, and file systems on it."""

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lib.programs import run
from tests.lib.waiting import wait_until

MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
CHECK = {
    "ext4": ("e2fsck", "-f", "-n"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}
XFS_IOC_GOINGDOWN, XFS_GOING_NOLOGFLUSH = 0x8004587D, 2


def make_file_system(kind: str, device: Path) -> None:
    run(*MAKE[kind], device)


def check_file_system(kind: str, device: Path) -> None:
    """Fails the test unless the file system's own checker finds nothing to mend."""
    run(*CHECK[kind], device)


@contextmanager
def loop_device(volume: Path, *, direct: bool = True) -> Iterator[Path]:
    """A block device over the volume; it bypasses the page cache of the mount if ``direct``."""
    on_off = "on" if direct else "off"
    device = Path(run("losetup", "--find", "--show", f"--direct-io={on_off}", volume).strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        # It is detached when the last who has it open closes it, which may be udev.
        wait_until(lambda: not run("losetup", "--list", "--noheadings", "--associated", volume).strip(), "it is free")


@contextmanager
def mounted(device: Path, at: Path, *options: str) -> Iterator[Path]:
    """The device's file system, mounted; a test that fails leaves nothing there either."""
    at.mkdir(exist_ok=True)
    run("mount", *(["-o", ",".join(options)] if options else []), device, at)
    try:
        yield at
    except BaseException:
        subprocess.run(["umount", "-l", at], check=False, capture_output=True)
        raise
    run("umount", at)


def lose_power(path: Path) -> None:
    """What was not flushed to the XFS there is gone.

    As xfs_io's ``shutdown`` does it, which looks at every mount of the machine first, also at one that hangs.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, XFS_IOC_GOINGDOWN, struct.pack("I", XFS_GOING_NOLOGFLUSH))
    finally:
        os.close(descriptor)
