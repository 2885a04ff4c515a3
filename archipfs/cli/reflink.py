"""``archip-reflink``: a copy of a volume or snapshot in an instant, where source and target lie on one mount.

The kernel answers FICLONE by itself for any FUSE file system, so ``cp --reflink`` never reaches us; an ioctl of our own
does. What cannot be cloned is copied as any file is, with its holes, and we say so.
"""

import errno
import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from archipfs.cli.output import printable
from archipfs.cli.program import make_output_safe, run_program
from archipfs.cli.sparse_copy import copy_sparse, replacing, temporary_beside
from archipfs.endpoints.fuse import ioctls
from archipfs.endpoints.fuse.ioctls import Info
from archipfs.errors import AlreadyExists, InvalidInput, NotSupported
from archipfs.map.names import check_name
from archipfs.map.records import Kind

NAME = "archip-reflink"
NOT_A_VOLUME = "{} is not a volume on an archipfs mount that has the front"
INFO_BYTES = ioctls.INFO >> 16 & 0x3FFF

_NO_SUCH_IOCTL = frozenset({errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
"""What a file system says that is not ours."""


@click.command()
@click.option("-f", "--force", is_flag=True, help="Replace DST if it exists: at any moment it is the old or the new.")
@click.option(
    "--reflink",
    type=click.Choice(["auto", "always"]),
    default="auto",
    show_default=True,
    help="What to do where nothing can be cloned: copy as usual, or refuse.",
)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
def archip_reflink(src: Path, dst: Path, force: bool, reflink: str) -> None:
    """Copy the volume or snapshot SRC to DST in an instant. If DST is a directory: into it, under SRC's name.

    The copy is writable, belongs to you, and has SRC's mode less your umask.
    """
    target = dst / src.name if dst.is_dir() else dst
    with _opened(src) as source:
        _refuse(source, src, target, force=force)
        info = _info(source, src)
        cloneable = info is not None and _same_mount(source, target)
        if cloneable and info is not None and info.size_bytes:
            _clone(source, info, src, target, replace=force)
            return
        if not cloneable:
            why_not = f"{target} does not lie on the mount of {src}" if info is not None else NOT_A_VOLUME.format(src)
            if reflink == "always":
                raise NotSupported(f"cannot clone: {why_not}; give --reflink=auto for an ordinary copy")
            click.echo(f"{NAME}: {printable(why_not)}: making an ordinary copy", err=True)
        _copy(source, src, target, replace=force)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    # A FIFO would have open(2) wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidInput(f"{path} is not a regular file; only those are copied")
        yield descriptor
    finally:
        os.close(descriptor)


def _refuse(source: int, src: Path, target: Path, *, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.exists() and os.path.samestat(os.fstat(source), os.stat(target)):
        raise InvalidInput(f"{src} and {target} are the same file")
    if target.is_dir():
        raise AlreadyExists(f"{target} is a directory; choose another name")
    if not force:
        raise _exists(target)


def _exists(target: Path) -> AlreadyExists:
    return AlreadyExists(f"{target} exists already; choose another name, or give -f to replace it")


def _info(source: int, src: Path) -> Info | None:
    """``None`` for what is not a volume."""
    try:
        return ioctls.decode_info(fcntl.ioctl(source, ioctls.INFO, bytes(INFO_BYTES)))
    except OSError as error:
        if error.errno in _NO_SUCH_IOCTL:
            return None
        raise OSError(error.errno, error.strerror, str(src)) from error


def _same_mount(source: int, target: Path) -> bool:
    return os.stat(target.parent).st_dev == os.fstat(source).st_dev


def _clone(source: int, info: Info, src: Path, target: Path, *, replace: bool) -> None:
    check_name(target.name)  # else a rename in the end would say EINVAL, and no more
    # A clone is there to be written, also that of a snapshot, whose mode lets nobody write.
    mode = _mode(source) | (stat.S_IWUSR if info.kind is Kind.SNAPSHOT else 0)
    if not replace:
        _make_clone(source, src, target, mode)
        return
    temporary = temporary_beside(target)
    with replacing(temporary, target, replace=True):
        _make_clone(source, src, temporary, mode)


def _make_clone(source: int, src: Path, path: Path, mode: int) -> None:
    name = ioctls.encode_name(path.name)
    try:
        fcntl.ioctl(source, ioctls.CLONE, name)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(src)) from error
    os.chmod(path, mode)


def _copy(source: int, src: Path, target: Path, *, replace: bool) -> None:
    temporary = temporary_beside(target)
    try:
        with replacing(temporary, target, replace=replace):
            _copy_to_new(source, src, temporary, target.name)
    except FileExistsError as error:
        raise _exists(target) from error
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _copy_to_new(source: int, src: Path, path: Path, later_called: str) -> None:
    copy = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if _info(copy, path) is not None:
            check_name(later_called)  # before all is copied
        with _progress(src.name, os.fstat(source).st_size) as advanced:
            copy_sparse(source, copy, advanced)
        os.fchmod(copy, _mode(source))
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    finally:
        os.close(copy)


def _mode(source: int) -> int:
    """The permissions that cp(1) gives a copy."""
    umask = os.umask(0o077)
    os.umask(umask)
    return stat.S_IMODE(os.fstat(source).st_mode) & 0o777 & ~umask


@contextmanager
def _progress(doing: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda done_bytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(printable(doing)), total=total_bytes)
        yield lambda done_bytes: progress.update(task, completed=done_bytes)


def main() -> NoReturn:
    """The console script."""
    make_output_safe()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # what is not finished is taken away
    sys.exit(run_program(archip_reflink, NAME, sys.argv[1:]))


if __name__ == "__main__":
    main()
