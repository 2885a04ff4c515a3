"""/dev/fuse, mounted: as root by mount(2), else by fusermount3, which hands the descriptor over a socket."""

import errno
import os
import socket
import stat
import subprocess
from pathlib import Path

from archipfs.endpoints.fuse._front import ffi, lib
from archipfs.errors import DaemonError

FS_NAME = "archipfs"
FS_TYPE = "fuse.archipfs"

_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_FORCE, _MNT_DETACH = 1, 2


def open_mounted(mountpoint: Path, *, read_bytes_max: int) -> int:
    """Mount at ``mountpoint``; a descriptor of /dev/fuse on which its requests come. Raises ``DaemonError``."""
    return _mount(mountpoint, read_bytes_max) if os.geteuid() == 0 else _fusermount(mountpoint, read_bytes_max)


def unmount(mountpoint: Path) -> None:
    """Take it away, also while files are open: who has them gets ENOTCONN. What is not mounted any more, stays so."""
    if os.geteuid() == 0:
        target = os.fsencode(mountpoint)
        if lib.umount2(target, _MNT_FORCE | _MNT_DETACH) < 0 and ffi.errno not in (errno.EINVAL, errno.ENOENT):
            raise DaemonError(f"cannot unmount {mountpoint}: {os.strerror(ffi.errno)}")
    else:
        subprocess.run(["fusermount3", "-u", "-q", "-z", "--", mountpoint], stdin=subprocess.DEVNULL, check=False)


def _mount(mountpoint: Path, read_bytes_max: int) -> int:
    try:
        mode = stat.S_IFMT(os.stat(mountpoint).st_mode)
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise DaemonError(f"cannot mount at {mountpoint}: {error}") from error
    options = (
        f"fd={device},rootmode={mode:o},user_id={os.getuid()},group_id={os.getgid()},"
        f"default_permissions,allow_other,max_read={read_bytes_max}"
    )
    flags = _MS_NOSUID | _MS_NODEV
    data = ffi.new("char[]", options.encode())
    if lib.mount(FS_NAME.encode(), os.fsencode(mountpoint), FS_TYPE.encode(), flags, data) < 0:
        number = ffi.errno
        os.close(device)
        raise DaemonError(f"cannot mount at {mountpoint}: {os.strerror(number)}; look for /dev/fuse, and be root")
    return device


def _fusermount(mountpoint: Path, read_bytes_max: int) -> int:
    """fusermount3 answers on the socket that _FUSE_COMMFD names, with one byte and the descriptor."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = f"fsname={FS_NAME},subtype={FS_NAME},default_permissions,max_read={read_bytes_max}"
        try:
            done = subprocess.run(
                ["fusermount3", "-o", options, "--", mountpoint],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            )
        except FileNotFoundError as error:
            raise DaemonError(f"cannot mount at {mountpoint}: fusermount3 is not installed; install fuse3") from error
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if done.returncode != 0 or not descriptors:
        raise DaemonError(f"cannot mount at {mountpoint}: {done.stderr.strip() or 'fusermount3 gave no descriptor'}")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]
