"""The ``file`` driver: a store in a directory, which several hosts may share (NFS).

::

    objects/<kind>/<2 hex digits>/<ident>       immutable objects; the digits are the first of sha256(ident)
    data/<kind>/<ident>                         data objects: sparse files
    records/<kind>/<ident>/<version>            records: 20 decimal digits, the content is a tag byte and the value
    tmp/                                        what is not finished yet, cleared after a day
    reserve                                     room kept back: taking something away from a full store needs some too

There is no lock anywhere. link(2) and rename(2) are the atomic steps, on a local disk and on an NFS server. Durable
means: the file is synced under a temporary name, gets its name, and then the directory that holds the name is synced.

Records
=======

A record is a directory. The file with the highest version in it is the record; ``=`` and the value is a live one, ``-``
alone is a tombstone, and then there is no record. A directory without a version is no record either.

Writing over version v
    1. Create an *intent* in the directory: a file named ``w<v>.<unique>``, which will become the new version.
    2. List the directory. If v is not the highest or is a tombstone: Conflict.
    3. Write the intent, sync it, link it to the name v+1. EEXIST (somebody was faster) or ENOENT (our intent has been
       taken away, see 5): Conflict. **Whose link succeeds has won.**
    4. Sync the directory. The new version is durable.
    5. List the directory. Remove the intents over versions below ours, *then* the versions below ours, lowest first,
       then our intent.

Deleting version v
    1.-4. As above, with a tombstone. When it is durable, the record is gone for good.
    5. *Clear* the directory: sync it, list it, remove the intents, *then* all versions below the tombstone, sync it,
       remove the tombstone. Then rmdir(2), which takes away only what is empty.

Creating (there must be no record)
    1. List the directory. If the highest is live: Conflict. If there is one, clear it as above.
    2. Make a directory in tmp/ that holds the first version; sync both. Its number is the time in nanoseconds, or one
       more than the tombstone if that is higher, so that an earlier life of the key never had it.
    3. Rename that directory to the record's name. rename(2) replaces an empty directory and nothing else. **Whose
       rename succeeds has won.** ENOTEMPTY: begin again.
    4. Sync the directory of the kind.

Reading
    List, open the highest; ENOENT means that it was just overtaken: list again.

Why this is right:

(a) *A version's name never comes back*, so a link that succeeds was made over the newest version, and what a reader
    opens under a name is what it saw listed. Take a writer W over v that is about to link v+1, however long after its
    step 2. For the link to succeed wrongly, somebody must have linked v+1 and somebody, C, removed it since. C removes
    versions only below one, c > v+1, that it saw or linked before it listed the directory. If W's intent was there for
    that list, C removed the intent first, and W's link fails, because its source is gone. If it was not, then W made
    it, and did step 2, after c existed; so W saw c and not v, and never came to step 3. Removing an intent is thus safe
    at any time, also that of a writer that died; and nobody has to wait for one.
(b) *Two writers* over the same v link the same name: one wins.
(c) *Writer and deleter*: the tombstone is a version like any other. The tombstone itself is removed after the intents,
    so (a) holds for it as well; a writer that comes later sees a tombstone or no version at all, and leaves.
(d) *Deleter and creator*: a deleter that was slow works in the directory of the next life, by names. All names it
    knows are of the earlier life and do not exist in this one (versions: creating, 2; intents: unique). Its rmdir
    fails, for a live record's directory is not empty.
(e) *Two creators* rename onto the same name: the second finds it not empty.
(f) *Writer and creator*: an intent of a writer from the earlier life keeps the directory from being empty. It is no
    version, so the creator clears it.
(g) *A crash of a process* before the link or rename leaves an intent or something in tmp/: nobody sees it as a record.
    After it, the new version is what everybody sees; left over are intents and lower versions, which the next put or
    delete removes, or a tombstone, which means "no record" to all and is cleared by the next creator or deleter.
(h) *Power loss*: the new version's content is synced before its name exists. Older versions are removed only after the
    new name is synced; a tombstone only after the removal of what it buries is. So one of the two is found. What else
    comes back is lower and does not count. A version that was linked and not synced yet may vanish: its caller had no
    answer. Others may have read it meanwhile; what they then put *on the same record* syncs the same directory.
(i) *NFS*: a client that changed a directory lists it afresh afterwards, and all the lists that (a) leans on come after
    a change by the same client. A plain read may see the past for as long as the mount's attribute cache lasts
    (acdirmax); a put on top of that past is a Conflict.
(j) *A look without a list* (``version_paths``): nothing is named v+1, and after that something is named v. As versions
    go lowest first, v+1 was not there yet and gone again; so nobody had replaced v when we began to look. A writer
    that failed or died within step 5 may leave v beside v+1, so v alone would not do. Over NFS, whoever asks the
    server for v (statx with AT_STATX_FORCE_SYNC) sees what a plain read sees, or later: v is gone before a put of v+1
    returns.
(k) *Lists are atomic* while they fit into one getdents(2) call, some 400 names: kernels hold the directory's lock for
    that long. A record's directory holds one version and an intent for each writer that is at it or died at it.
"""

import ctypes
import errno
import hashlib
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import structlog

from archipfs.blockers.contract import (
    Blocker,
    DataObject,
    Record,
    Space,
    VersionPaths,
    check_key,
    check_kind,
    check_range,
)
from archipfs.blockers.direct import WORTHWHILE_BYTES, write_direct
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Conflict,
    NotSupported,
    ObjectDamaged,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)
from archipfs.types import SECTOR_BYTES, VOLUME_BYTES_MAX

log = structlog.get_logger()

_AREAS = ("objects", "data", "records", "tmp")
_LIVE = b"="
_DELETED = b"-"
_INTENT = "w"
_VERSION_DIGITS = 20

RESERVE_BYTES = 1 << 20
PACK_BYTES = 64 << 20
_TMP_AGE_MAX_S = 24 * 3600
_READ_BYTES = 64 << 10
_PIECES_MAX = os.sysconf("SC_IOV_MAX")
_ZEROS = bytes(1 << 20)

# A step that was overtaken is begun again at once, and after some tries with a pause: more than this is no bad luck.
_TRIES_MAX = 1000
_TRIES_AT_ONCE = 10
_TRY_PAUSE_S = 0.005

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_LOCAL_FILE_SYSTEMS = {
    *(0xEF53, 0x58465342, 0x9123683E, 0xF2F52010),  # ext2 to ext4, XFS, btrfs, f2fs
    *(0x2FC12FC1, 0xCA451A4E, 0x01021994, 0x794C7630),  # ZFS, bcachefs, tmpfs, overlayfs
}
"""As statfs(2) numbers those that one host alone has mounted, which keep a deleted file for whoever has it open."""
_STATFS_BYTES = 256
_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_fstatfs.restype = ctypes.c_int
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int

_UNREACHABLE = frozenset(
    {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENXIO}
)
_ERRORS: dict[int, tuple[type[ArchipError], str]] = {
    errno.ENOSPC: (StoreFull, "free some space in the store and try again"),
    errno.EDQUOT: (StoreFull, "raise the quota or free some space, and try again"),
    errno.EFBIG: (TooLarge, "keep it within what the store's file system can hold in one file"),
    errno.ENOENT: (ObjectMissing, "check the store with `archip check`"),
    errno.EEXIST: (AlreadyExists, "use another key"),
    errno.EROFS: (StoreError, "mount the store's file system read-write"),
    errno.EACCES: (StoreError, "check owner and mode of the store's files"),
    errno.EPERM: (StoreError, "check owner, mode and attributes of the store's files"),
    errno.EMFILE: (StoreError, "raise the limit of open files"),
    errno.EIO: (StoreError, "look into the kernel log for a failing disk"),
    errno.EBADF: (StoreError, "it was closed, or opened for reading only"),
} | dict.fromkeys(_UNREACHABLE, (StoreUnavailable, "check that the store's file server answers"))


def store_error(error: OSError, doing: str) -> ArchipError:
    """The error of the tree for a failed system call; ``doing`` names the operation and the object."""
    number = error.errno or errno.EIO
    cls, hint = _ERRORS.get(number, (StoreError, "see the kernel log"))
    return cls(f"{doing}: {os.strerror(number)} ({errno.errorcode.get(number, number)}); {hint}")


@contextmanager
def _errors_as(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise store_error(error, doing) from error


class FileDataObject(DataObject):
    """A sparse file. Its descriptor may be used directly."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path

    def pread(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        try:
            data = os.pread(self._fd, length, offset)
            if len(data) == length:
                return data
            parts = [data]
            done = len(data)
            while data and done < length:
                data = os.pread(self._fd, length - done, offset + done)
                parts.append(data)
                done += len(data)
        except OSError as error:
            raise store_error(error, f"reading {self._path} at {offset}") from error
        parts.append(bytes(length - done))
        return b"".join(parts)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        check_range(offset)
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(self._fd, view[done:] if done else view, offset + done)
        except OSError as error:
            raise store_error(error, f"writing {self._path} at {offset}") from error

    def punch(self, offset: int, length: int) -> None:
        check_range(offset, length)
        length = min(length, self.size() - offset)
        if length <= 0:
            return
        while _fallocate(self._fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in (errno.EOPNOTSUPP, errno.ENOSYS):
                # Zeros read the same; the space is not given back.
                self._write_zeros(offset, length)
                return
            raise store_error(OSError(number, ""), f"punching {self._path} at {offset}")

    def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            count = min(len(_ZEROS), end - offset)
            self.pwrite(offset, memoryview(_ZEROS)[:count])
            offset += count

    def truncate(self, size: int) -> None:
        check_range(size)
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            if error.errno == errno.EINVAL:
                # ftruncate(2) on a descriptor that cannot write says EINVAL, where pwrite(2) says EBADF.
                error.errno = errno.EBADF
            raise store_error(error, f"resizing {self._path} to {size}") from error

    def flush(self) -> None:
        with _errors_as(f"syncing {self._path}"):
            if self._fd < 0:
                # Python refuses -1 here by a ValueError, before the kernel says EBADF as it does elsewhere.
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            os.fdatasync(self._fd)

    def size(self) -> int:
        return self._stat().st_size

    def allocated(self) -> int:
        return self._stat().st_blocks * 512

    def _stat(self) -> os.stat_result:
        with _errors_as(f"asking for the size of {self._path}"):
            return os.fstat(self._fd)

    def next_data(self, offset: int) -> int | None:
        return self._seek(offset, os.SEEK_DATA)

    def next_hole(self, offset: int) -> int:
        found = self._seek(offset, os.SEEK_HOLE)
        return offset if found is None else found

    def _seek(self, offset: int, whence: int) -> int | None:
        """``None`` at or past the end, and where only a hole follows. The descriptor's own position means nothing."""
        check_range(offset)
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise store_error(error, f"looking for holes in {self._path}") from error

    def fileno(self) -> int | None:
        return self._fd if self._fd >= 0 else None

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with _errors_as(f"closing {self._path}"):
                os.close(fd)


class _Look(NamedTuple):
    """What one list of a record's directory showed."""

    names: tuple[str, ...]
    version: int
    """The highest; 0 where there is none."""
    value: bytes | None
    """``None`` for a tombstone and where there is no version."""


class FileBlocker(Blocker):
    """A store in the directory ``path``, which :meth:`create` has laid out.

    Raises ``StoreUnavailable`` where there is no such store.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(path)
        # Not the areas themselves: below a mount point whose file system is gone nothing may be made.
        self._made = {f"{self._root}/{area}" for area in _AREAS}
        self._data_bytes_max = 0
        try:
            # Held open so that the file system cannot be unmounted under us, which would look like an empty store.
            self._root_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            why = os.strerror(error.errno or errno.EIO)
            raise StoreUnavailable(f"store {self._root}: {why}; mount its file system, or correct the path") from error
        self._is_local = _file_system(self._root_fd) in _LOCAL_FILE_SYSTEMS
        try:
            for area in _AREAS:
                if not os.path.isdir(f"{self._root}/{area}"):
                    raise StoreUnavailable(
                        f"store {self._root}: no archipfs store here ({area}/ is missing); "
                        "mount its file system, or make it with `archip backend-create`"
                    )
            self._clear_tmp()
            self._keep_reserve()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> "FileBlocker":
        """Lay out a store, durably, and open it. On one that exists already it changes nothing.

        Raises ``StoreUnavailable`` where no directory can be made, ``NotSupported`` where the file system has no hard
        links.
        """
        root = os.path.abspath(path)
        try:
            _make_directories(root)
            for area in _AREAS:
                with suppress(FileExistsError):
                    os.mkdir(f"{root}/{area}")
            _sync_directory(root)
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreUnavailable(f"store {root}: {error.filename} is not a directory; choose another path") from error
        except OSError as error:
            raise StoreUnavailable(
                f"store {root}: cannot be made: {os.strerror(error.errno or errno.EIO)}; "
                "choose a directory that can be written"
            ) from error
        blocker = cls(root)
        try:
            blocker._check_links()
        except BaseException:
            blocker.close()
            raise
        return blocker

    def _check_links(self) -> None:
        first, second = self._tmp_path(), self._tmp_path()
        with _errors_as(f"trying out store {self._root}"):
            os.close(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
            try:
                os.link(first, second)
                os.unlink(second)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise NotSupported(
                        f"store {self._root}: its file system has no hard links, which records need; choose another one"
                    ) from error
                raise
            finally:
                os.unlink(first)

    def _clear_tmp(self) -> None:
        """Remove what crashed processes left a day ago. Not being able to is no reason not to open the store."""
        oldest_s = time.time() - _TMP_AGE_MAX_S
        for name in os.listdir(f"{self._root}/tmp"):
            path = f"{self._root}/tmp/{name}"
            try:
                found = os.lstat(path)
                if found.st_mtime >= oldest_s:
                    continue
                if stat.S_ISDIR(found.st_mode):
                    for inner in os.listdir(path):
                        os.unlink(f"{path}/{inner}")
                    os.rmdir(path)
                else:
                    os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                log.warning("could not remove what a crash left", path=path, error=str(error))

    def _keep_reserve(self) -> None:
        """Have the reserve, if there is room for it. A store that is full, or only read, goes on without."""
        path = self._reserve_path
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError:
            return
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError:
            with suppress(FileNotFoundError):
                os.unlink(path)
        finally:
            os.close(fd)

    def relieve(self) -> bool:
        with _errors_as(f"giving up {self._reserve_path}"):
            try:
                os.unlink(self._reserve_path)
            except FileNotFoundError:
                return False
            return True

    # Paths

    @property
    def _reserve_path(self) -> str:
        return f"{self._root}/reserve"

    def _tmp_path(self) -> str:
        return f"{self._root}/tmp/{_unique()}"

    def _object_path(self, key: str) -> tuple[str, str]:
        """Directory and file of an immutable object."""
        kind, ident = check_key(key)
        directory = f"{self._root}/objects/{kind}/{hashlib.sha256(ident.encode()).hexdigest()[:2]}"
        return directory, f"{directory}/{ident}"

    def _data_path(self, key: str) -> tuple[str, str]:
        kind, ident = check_key(key)
        directory = f"{self._root}/data/{kind}"
        return directory, f"{directory}/{ident}"

    def _record_path(self, key: str) -> tuple[str, str]:
        """Directory of the kind, and of the record."""
        kind, ident = check_key(key)
        directory = f"{self._root}/records/{kind}"
        return directory, f"{directory}/{ident}"

    def _ensure_directory(self, directory: str) -> None:
        """Make it and what is above it, durably. Nobody ever removes such a directory, so it is remembered.

        One that exists already may have been made by a process that has not synced it yet: it is synced too.
        """
        if directory in self._made:
            return
        parent = os.path.dirname(directory)
        self._ensure_directory(parent)
        with suppress(FileExistsError):
            os.mkdir(directory)
        _sync_directory(parent)
        self._made.add(directory)

    def _check_there(self) -> None:
        """A path that is missing says nothing if the whole store is: raises ``StoreUnavailable`` then."""
        if not os.path.isdir(f"{self._root}/records"):
            raise StoreUnavailable(f"store {self._root}: it has gone away; mount its file system again")

    # Immutable objects

    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        directory, path = self._object_path(key)
        with _errors_as(f"storing {path}"):
            self._ensure_directory(directory)
            if not _is_there(path):
                tmp = self._tmp_path()
                try:
                    _write_file(tmp, *([data] if isinstance(data, bytes) else data))
                    with suppress(FileExistsError):
                        os.link(tmp, path)
                finally:
                    _unlink_if_there(tmp)
            # Also where it was there: who put it may not have come to this point.
            _sync_directory(directory)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        check_range(offset, length or 0)
        _, path = self._object_path(key)
        with _errors_as(f"reading {path}"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                end = os.fstat(fd).st_size
                if length is not None:
                    end = min(end, offset + length)
                parts = []
                while offset < end:
                    part = os.pread(fd, end - offset, offset)
                    if not part:
                        raise ObjectDamaged(f"reading {path}: it ends at {offset}, not at {end}; see `archip check`")
                    parts.append(part)
                    offset += len(part)
            finally:
                os.close(fd)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def open(self, key: str) -> DataObject:
        _, path = self._object_path(key)
        with _errors_as(f"opening {path}"):
            return FileDataObject(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path)

    def exists(self, key: str) -> bool:
        _, path = self._object_path(key)
        with _errors_as(f"looking for {path}"):
            if _is_there(path):
                return True
            self._check_there()
            return False

    def delete(self, key: str) -> None:
        directory, path = self._object_path(key)
        self._remove_file(directory, path)
        self._keep_reserve()

    def list(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        for fan in self._names(f"{self._root}/objects/{kind}"):
            for ident in self._names(f"{self._root}/objects/{kind}/{fan}"):
                yield f"{kind}/{ident}"

    def _names(self, directory: str) -> tuple[str, ...]:
        """What is in a directory, none if it is missing. A leading dot is an NFS client's file that is still open."""
        with _errors_as(f"listing {directory}"):
            try:
                return tuple(name for name in os.listdir(directory) if not name.startswith("."))
            except FileNotFoundError:
                self._check_there()
                return ()

    def _remove_file(self, directory: str, path: str) -> None:
        with _errors_as(f"removing {path}"):
            _unlink_if_there(path)
            try:
                # Also where it was gone: who removed it may not have come to this point.
                _sync_directory(directory)
            except FileNotFoundError:
                self._check_there()

    @property
    def pack_bytes(self) -> int:
        return PACK_BYTES

    # Data objects

    def create_data(self, key: str) -> DataObject:
        directory, path = self._data_path(key)
        with _errors_as(f"creating {path}"):
            self._ensure_directory(directory)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.fsync(fd)
                _sync_directory(directory)
            except BaseException:
                os.close(fd)
                _unlink_if_there(path)
                raise
        return FileDataObject(fd, path)

    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        _, path = self._data_path(key)
        with _errors_as(f"opening {path}"):
            return FileDataObject(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC), path)

    def delete_data(self, key: str) -> None:
        directory, path = self._data_path(key)
        self._remove_file(directory, path)
        self._keep_reserve()

    def list_data(self, kind: str) -> Iterator[str]:
        check_kind(kind)
        for ident in self._names(f"{self._root}/data/{kind}"):
            yield f"{kind}/{ident}"

    @property
    def keeps_deleted(self) -> bool:
        """A local file system does; one that other hosts mount too may not (NFS: ESTALE)."""
        return self._is_local

    @property
    def data_bytes_max(self) -> int:
        """As the contract says. Found once by trying on an empty file, for no call tells.

        16 TiB less a block on ext4, 64 TiB (our own bound) on XFS.
        """
        if self._data_bytes_max == 0:
            path = self._tmp_path()
            with _errors_as(f"trying out store {self._root}"):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                try:
                    os.unlink(path)
                    self._data_bytes_max = _largest_size(fd)
                finally:
                    os.close(fd)
        return self._data_bytes_max

    # Records: the numbers are those of the text at the head of this file

    def get_record(self, key: str) -> Record | None:
        _, directory = self._record_path(key)
        try:
            look = _look_into(directory)
        except OSError as error:
            raise store_error(error, f"reading record {key} in {self._root}") from error
        if look.value is None:
            if not look.names:
                self._check_there()
            return None
        return Record(look.value, look.version)

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        with _errors_as(f"writing record {key} in {self._root}"):
            if expected is None:
                return self._create_record(key, value)
            version = self._link_version(key, expected, _LIVE + value)
            _remove_older(self._record_path(key)[1], version)
            return version

    def delete_record(self, key: str, expected: int) -> None:
        _, directory = self._record_path(key)
        with _errors_as(f"deleting record {key} in {self._root}"):
            try:
                self._link_version(key, expected, _DELETED)
            except Conflict:
                # Gone is what was wanted. A tombstone that another deleter linked may not be durable yet: clearing
                # syncs it.
                if _look_into(directory).value is not None:
                    raise
                self._check_there()
            _clear(directory)
            _rmdir_if_empty(directory)

    def version_paths(self, key: str, version: int) -> VersionPaths:
        _, directory = self._record_path(key)
        names = (f"{number:0{_VERSION_DIGITS}d}" for number in (version, version + 1))
        present, following = (f"{directory}/{name}" for name in names)
        return VersionPaths(present, following)

    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        check_kind(kind)
        directory = f"{self._root}/records/{kind}"
        for ident in self._names(directory):
            try:
                look = _look_into(f"{directory}/{ident}")
            except OSError as error:
                raise store_error(error, f"reading record {kind}/{ident} in {self._root}") from error
            if look.value is not None:
                yield f"{kind}/{ident}", Record(look.value, look.version)

    def _link_version(self, key: str, expected: int, content: bytes) -> int:
        """Steps 1 to 4 of writing and deleting. Returns the new version, which is durable."""
        _, directory = self._record_path(key)
        version = expected + 1
        intent = f"{directory}/{_INTENT}{expected:0{_VERSION_DIGITS}d}.{_unique()}"
        conflict = Conflict(f"record {key} is not at version {expected} any more; read it again")
        try:
            fd = os.open(intent, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            self._check_there()
            raise conflict from None
        try:
            try:
                look = _look_into(directory)
                if look.version != expected or look.value is None:
                    raise conflict
                _write_all(fd, content)
                os.fsync(fd)
            finally:
                os.close(fd)
            try:
                os.link(intent, f"{directory}/{version:0{_VERSION_DIGITS}d}")
            except FileNotFoundError:
                raise conflict from None
            except FileExistsError:
                # An NFS server that restarts may be asked twice and answer the second time: our own link stands then.
                if not _has_second_name(intent):
                    raise conflict from None
        except Conflict:
            _unlink_if_there(intent)
            # A deleter may have found our intent in its way.
            _rmdir_if_empty(directory)
            raise
        except OSError:
            _unlink_if_there(intent)
            raise
        # Gone already: somebody who read our version deleted it, and made that durable.
        with suppress(FileNotFoundError):
            _sync_directory(directory)
        _unlink_if_there(intent)
        return version

    def _create_record(self, key: str, value: bytes) -> int:
        parent, directory = self._record_path(key)
        for tries in _tries(f"record {key} in {self._root}"):
            look = _look_into(directory)
            if look.value is not None:
                raise Conflict(f"record {key} exists already; read it")
            if tries == 0:
                self._ensure_directory(parent)
            if look.names:
                _clear(directory)
            version = max(time.time_ns(), look.version + 1)
            if self._rename_into_place(directory, version, value):
                break
        _sync_directory(parent)
        return version

    def _rename_into_place(self, directory: str, version: int, value: bytes) -> bool:
        """Steps 2 and 3 of creating: whether it won."""
        tmp = self._tmp_path()
        os.mkdir(tmp)
        path = f"{tmp}/{version:0{_VERSION_DIGITS}d}"
        try:
            _write_file(path, _LIVE + value)
            _sync_directory(tmp)
            os.rename(tmp, directory)
        except OSError as error:
            _unlink_if_there(path)
            with suppress(FileNotFoundError):
                os.rmdir(tmp)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        return True

    # The whole

    def space(self) -> Space:
        with _errors_as(f"asking for the space of store {self._root}"):
            found = os.statvfs(self._root)
        return Space(
            total_bytes=found.f_blocks * found.f_frsize,
            free_bytes=found.f_bfree * found.f_frsize,
            available_bytes=found.f_bavail * found.f_frsize,
        )

    def describe(self) -> str:
        return self._root

    def close(self) -> None:
        fd, self._root_fd = self._root_fd, -1
        if fd >= 0:
            os.close(fd)


# Records


def _is_version(name: str) -> bool:
    return len(name) == _VERSION_DIGITS and name.isdigit()


def _look_into(directory: str) -> _Look:
    for _ in _tries(directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return _Look((), 0, None)
        newest = max(filter(_is_version, names), default=None)
        if newest is None:
            return _Look(tuple(names), 0, None)
        try:
            content = _read_file(f"{directory}/{newest}")
        except FileNotFoundError:
            continue
        if content.startswith(_LIVE):
            return _Look(tuple(names), int(newest), content[len(_LIVE) :])
        if content != _DELETED:
            raise ObjectDamaged(f"{directory}/{newest}: not a record; restore the file from a copy, or remove it")
        return _Look(tuple(names), int(newest), None)
    raise AssertionError("the tries end in an error")


def _remove_older(directory: str, version: int) -> bool:
    """Step 5 of writing. Whether it removed a version.

    Only where ``version`` is listed beside them: else this is the next life, whose versions are lower if it was created
    by a host whose clock is behind.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return False
    newest = f"{version:0{_VERSION_DIGITS}d}"
    if newest not in names:
        return False
    for name in names:
        if name.startswith(_INTENT) and name[len(_INTENT) :] < newest:
            _unlink_if_there(f"{directory}/{name}")
    older = sorted(name for name in names if _is_version(name) and name < newest)
    for name in older:
        _unlink_if_there(f"{directory}/{name}")
    return bool(older)


def _clear(directory: str) -> None:
    """Empty the directory of a record that is deleted; does nothing to one that is live."""
    look = _look_into(directory)
    if look.value is not None:
        return
    if not look.version:
        # No version comes into such a directory any more.
        for name in look.names:
            if name.startswith(_INTENT):
                _unlink_if_there(f"{directory}/{name}")
        return
    with suppress(FileNotFoundError):
        _sync_directory(directory)
        if _remove_older(directory, look.version):
            _sync_directory(directory)
    _unlink_if_there(f"{directory}/{look.version:0{_VERSION_DIGITS}d}")


def _rmdir_if_empty(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _tries(what: str) -> Iterator[int]:
    """Numbers of attempts at a step that others may overtake."""
    for tries in range(_TRIES_MAX):
        if tries >= _TRIES_AT_ONCE:
            time.sleep(_TRY_PAUSE_S)
        yield tries
    raise StoreUnavailable(f"{what}: still changing after {_TRIES_MAX} attempts; try again")


# System calls


def _unique() -> str:
    """A name that no other host, process or thread takes."""
    return f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}"


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _has_second_name(path: str) -> bool:
    try:
        return os.stat(path).st_nlink > 1
    except FileNotFoundError:
        return False


def _unlink_if_there(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _write_all(fd: int, *pieces: bytes) -> None:
    for first in range(0, len(pieces), _PIECES_MAX):
        batch = pieces[first : first + _PIECES_MAX]
        written = os.writev(fd, batch) if len(batch) > 1 else 0
        for piece in batch:
            # What is left where a write came short.
            view = memoryview(piece)[written:]
            written = max(0, written - len(piece))
            while view:
                view = view[os.write(fd, view) :]


def _write_file(path: str, *pieces: bytes) -> None:
    """A new file, synced; its name is not."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if sum(map(len, pieces)) < WORTHWHILE_BYTES:
            _write_all(fd, *pieces)
        else:
            write_direct(fd, pieces)
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_file(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _READ_BYTES)
        if len(data) < _READ_BYTES:
            return data
        parts = [data]
        while data := os.read(fd, _READ_BYTES):
            parts.append(data)
        return b"".join(parts)
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directories(path: str) -> None:
    """Like ``os.makedirs``, and durable: the store's own directory is for its owner alone."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directories(parent)
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    _sync_directory(parent)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def _largest_size(fd: int) -> int:
    """The largest size in whole sectors, up to ``VOLUME_BYTES_MAX``, that the file can be given."""

    def fits(sectors: int) -> bool:
        try:
            os.ftruncate(fd, sectors * SECTOR_BYTES)
        except OSError as error:
            if error.errno in (errno.EFBIG, errno.EINVAL):
                return False
            raise
        return True

    low, high = 0, VOLUME_BYTES_MAX // SECTOR_BYTES + 1
    if fits(high - 1):
        return VOLUME_BYTES_MAX
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low * SECTOR_BYTES


def _file_system(fd: int) -> int:
    """Its number, 0 if it does not say."""
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _fstatfs(fd, answer) < 0:
        return 0
    return int.from_bytes(answer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
