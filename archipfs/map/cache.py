"""What a node remembers of one store, in LMDB: where each digest lies, and what was made of map pages.

::

    <path>/state        who has it open, and since when
    <path>/index/       index: digest → place, one for each pack that has it; packs, numbers: pack ↔ number
    <path>/pages/       pages: digest → map page; regions: digest of a leaf page → what was made of it, opaque here

The store is the truth: all of this can be deleted at any time, and is deleted here where it cannot be believed.

Whether to believe it
=====================

LMDB runs without syncing, for that makes it fast and a cache needs no promise. What a killed process wrote is with the
kernel, and good. After a power loss LMDB's pages may be of different times, which it would not notice. So ``state``
says ``open``, the boot and the mount of the file system, synced before LMDB's first write; and ``clean``, written after
LMDB was synced, when it is closed. Found to be ``clean``, or opened under this boot and this mount, the cache is
believed; else it begins empty. (Before Linux 6.8 mounts have no id that is theirs alone, and count as one: there,
remove the cache if its file system was lost and came back within one boot.) An error that LMDB itself finds has the
same effect.

What bounds it
==============

``index``: 100 to 160 bytes on disk for a chunk or page, so 3 to 5 GiB for a tebibyte of chunks of 32 KiB. A pack
that is forgotten only loses its number: its places mean nothing from then on, numbers never come back, and all such
places are swept out once they are the greater part. ``pages`` and ``regions`` have two halves each: what is new goes
into the young one; when that is full, the old one is emptied and becomes the young one.

Memory: LMDB maps its files, so what it uses is the kernel's page cache. Nothing here grows with the store but what
``packs`` returns.

Transactions are short, except that they may wait for the disk: never call this from the event loop.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition, Lock
from types import TracebackType
from typing import NamedTuple, TypeVar

import lmdb
import structlog

from archipfs.errors import ArchipError, Busy, StoreError, StoreFull
from archipfs.map.packs import Coding, Kind, PackIndex
from archipfs.types import Digest, PackId

log = structlog.get_logger()

T = TypeVar("T")

PAGES_BYTES_MAX = 256 << 20
REGIONS_BYTES_MAX = 512 << 20

_FORMAT = b"archipfs-cache 1"
_MAP_BYTES = 64 << 20
"""Of address space at first; doubled when it is full."""
_READERS_MAX = 1024
_SWEEP_ENTRIES = 20_000
"""In one transaction; and fewer dead ones than that are let lie."""

_PLACE = struct.Struct(">IIIIBB")
"""Number of the pack, offset, stored bytes, raw bytes, kind, coding."""
_PACK = struct.Struct(">IIQ")
"""Number, entries, size."""
_NUMBER = struct.Struct(">I")
_KINDS = {kind.value: kind for kind in Kind}
_CODINGS = {coding.value: coding for coding in Coding}
"""What ``Kind`` and ``Coding`` find out for themselves, in a fifth of the time."""
_COUNT = struct.Struct(">Q")

_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")
_CLEAN = b"clean\n"

_AT_EMPTY_PATH = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_BYTES = 256
_STX_MNT_ID_OFFSET = 144
_statx = ctypes.CDLL(None, use_errno=True).statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_statx.restype = ctypes.c_int


class Location(NamedTuple):
    """Where a chunk or a page lies. Sizes and offsets are bytes."""

    pack: PackId
    kind: Kind
    coding: Coding
    offset: int
    """From the start of the pack."""
    stored_bytes: int
    raw_bytes: int


# One environment


class _Gate:
    """Many go through it at once, or one alone; who wants to be alone goes first."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._inside = 0
        self._wanting_alone = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            while self._wanting_alone:
                self._condition.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._wanting_alone += 1
            while self._inside:
                self._condition.wait()
            try:
                yield
            finally:
                self._wanting_alone -= 1
                self._condition.notify_all()


class _Txn:
    """A transaction and the environment's databases."""

    def __init__(self, txn: lmdb.Transaction, databases: Mapping[str, lmdb._Database]) -> None:
        self._txn = txn
        self._databases = databases

    def get(self, database: str, key: bytes) -> bytes | None:
        found = self._txn.get(key, db=self._databases[database])
        return None if found is None else bytes(found)

    def put(self, database: str, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._databases[database])

    def delete(self, database: str, key: bytes, value: bytes = b"") -> None:
        """Of a key with several values, only ``value``."""
        self._txn.delete(key, value, db=self._databases[database])

    def empty(self, database: str) -> None:
        self._txn.drop(self._databases[database], delete=False)

    def cursor(self, database: str) -> lmdb.Cursor:
        return self._txn.cursor(db=self._databases[database])

    def entries(self, database: str) -> int:
        return self._txn.stat(self._databases[database])["entries"]

    def bytes_taken(self, database: str) -> int:
        found = self._txn.stat(self._databases[database])
        return (found["branch_pages"] + found["leaf_pages"] + found["overflow_pages"]) * found["psize"]


class _Unbelievable(Exception):
    """What is in the environment is not ours, or of another format."""


_DAMAGE = (
    _Unbelievable,
    lmdb.BadRslotError,
    lmdb.BadTxnError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)


class _Env:
    """One LMDB environment, which begins anew, empty, when it is found damaged, and grows when it is full.

    Whoever closes or resizes it is alone in it: LMDB allows neither beside a transaction.
    """

    def __init__(self, path: Path, *, single: Sequence[str], several: Sequence[str] = ()) -> None:
        """``single`` and ``several`` name its databases; in the latter a key has several values, all of one size."""
        self._path = path
        self._several = {name: name in several for name in (*single, *several, "meta")}
        self._gate = _Gate()
        self._generation = 0
        self._failed = False
        """It could not begin anew: whoever comes next tries again."""
        try:
            self._env, self._databases = self._open()
        except _DAMAGE as error:
            self._env, self._databases = self._anew(error)
        except lmdb.Error as error:
            raise self._error(error) from error

    def read(self, action: Callable[[_Txn], T]) -> T:
        return self._run(action, write=False)

    def write(self, action: Callable[[_Txn], T]) -> T:
        """All of what ``action`` changes, or nothing. Raises ``StoreFull`` if there is no room on the cache's disk."""
        return self._run(action, write=True)

    def close(self) -> None:
        """On return, what it holds is durable."""
        with self._gate.alone():
            if self._failed:
                return
            try:
                self._env.sync(True)
            except lmdb.Error as error:
                raise self._error(error) from error
            finally:
                self._env.close()

    def _run(self, action: Callable[[_Txn], T], *, write: bool) -> T:
        damages = 0
        while True:
            generation = self._generation
            try:
                with self._gate.shared(), self._env.begin(write=write) as txn:
                    return action(_Txn(txn, self._databases))
            except lmdb.MapFullError:
                self._grow()
            except _DAMAGE as error:
                damages += 1
                if damages > 1:
                    raise StoreError(f"cache {self._path}: {error}; look into the kernel log for its disk") from error
                self._replace(generation, error)
            except lmdb.Error as error:
                if not self._failed:
                    raise self._error(error) from error
                self._replace(generation, error)

    def _replace(self, generation: int, error: Exception) -> None:
        """Begin anew, unless somebody else did since ``generation`` was read."""
        with self._gate.alone():
            if generation != self._generation and not self._failed:
                return
            self._env.close()
            self._failed = True
            self._env, self._databases = self._anew(error)
            self._failed = False

    def _grow(self) -> None:
        """Somebody else may have grown it just before: then it has room for long."""
        with self._gate.alone():
            try:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            except lmdb.Error as error:
                # LMDB has unmapped the file, and would touch it nevertheless.
                self._env.close()
                self._failed = True
                raise self._error(error) from error

    def _open(self) -> tuple[lmdb.Environment, dict[str, lmdb._Database]]:
        with _errors_of(self._path):
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        env = lmdb.open(
            str(self._path),
            map_size=_MAP_BYTES,
            max_dbs=len(self._several),
            max_readers=_READERS_MAX,
            mode=0o600,
            sync=False,
            metasync=False,
            readahead=False,
        )
        try:
            if self._is_cut_off(env):
                raise _Unbelievable("cut off")
            databases = {
                name: env.open_db(name.encode(), dupsort=several, dupfixed=several)
                for name, several in self._several.items()
            }
            with env.begin(write=True) as txn:
                found = _Txn(txn, databases)
                if found.entries("meta") == 0:
                    found.put("meta", b"format", _FORMAT)
                elif found.get("meta", b"format") != _FORMAT:
                    raise _Unbelievable("another format")
        except BaseException:
            env.close()
            raise
        return env, databases

    def _is_cut_off(self, env: lmdb.Environment) -> bool:
        """Whether the file is shorter than LMDB believes: to touch what is not there would kill the process."""
        expected_bytes = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        with _errors_of(self._path):
            return (self._path / "data.mdb").stat().st_size < expected_bytes

    def _anew(self, reason: Exception) -> tuple[lmdb.Environment, dict[str, lmdb._Database]]:
        log.warning("cache is damaged and begins anew", path=str(self._path), error=str(reason))
        _remove(self._path)
        self._generation += 1
        try:
            return self._open()
        except lmdb.Error as error:
            raise self._error(error) from error

    def _error(self, error: lmdb.Error) -> ArchipError:
        if isinstance(error, lmdb.DiskError):
            return _full(self._path)
        # LMDB says EIO where a write came short, as it does on a disk that is just filling up.
        return StoreError(
            f"cache {self._path}: {error}; check its disk for space and errors, and the directory's owner"
        )


# The cache


class Cache:
    """What this node remembers of one store. Thread-safe; one process at a time.

    Any method may find that LMDB is damaged, and then goes on with an empty one: who misses something asks the store.
    All raise ``StoreFull`` if the cache's disk has no room, ``StoreError`` if it fails.
    """

    def __init__(
        self, path: Path, *, pages_bytes_max: int = PAGES_BYTES_MAX, regions_bytes_max: int = REGIONS_BYTES_MAX
    ) -> None:
        """Open it, or make it. Raises ``Busy`` if another process has it."""
        self._path = path
        self._counting = Lock()
        self._regions_forgotten = 0
        self._bytes_max = {"pages": pages_bytes_max, "regions": regions_bytes_max}
        with _errors_of(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._state_fd = os.open(path / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _take(self._state_fd, path):
                _remove(path / "index")
                _remove(path / "pages")
            with _errors_of(path):
                _write_state(self._state_fd, _opened_state(self._state_fd))
                _sync(path)
            self._index = _Env(path / "index", single=("packs", "numbers"), several=("index",))
            try:
                self._pages = _Env(path / "pages", single=[half for name in self._bytes_max for half in _halves(name)])
            except BaseException:
                self._index.close()
                raise
        except BaseException:
            os.close(self._state_fd)
            raise

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nobody may be using it any more. Closing twice is allowed."""
        fd, self._state_fd = self._state_fd, -1
        if fd < 0:
            return
        try:
            try:
                self._index.close()
            finally:
                self._pages.close()
            with _errors_of(self._path):
                _write_state(fd, _CLEAN)
        finally:
            os.close(fd)

    # Packs and their index

    def packs(self) -> set[PackId]:
        """All packs whose places are known."""
        return self._index.read(lambda txn: {PackId(key.hex()) for key in txn.cursor("packs").iternext(values=False)})

    def pack_bytes(self, pack: PackId) -> int | None:
        """The size of a pack, ``None`` if it is not known."""
        found = self._index.read(lambda txn: txn.get("packs", bytes.fromhex(pack)))
        return None if found is None else int(_PACK.unpack(found)[2])

    def add_pack(self, pack: PackIndex) -> None:
        """As ``add_packs``."""
        self.add_packs([pack])

    def add_packs(self, packs: Sequence[PackIndex]) -> None:
        """Remember where everything in them lies. Only for packs that are durable in the store.

        When the file grows for them, they are gone over once more.
        """

        def add(txn: _Txn) -> None:
            places: list[tuple[bytes, bytes]] = []
            for pack in packs:
                ident = bytes.fromhex(pack.id)
                if txn.get("packs", ident) is not None:
                    continue
                number = _count(txn, b"next")
                _set_count(txn, b"next", number + 1)
                _set_count(txn, b"live", _count(txn, b"live") + len(pack.entries))
                txn.put("packs", ident, _PACK.pack(number, len(pack.entries), pack.total_bytes))
                txn.put("numbers", _NUMBER.pack(number), ident)
                places += [
                    (digest, _PLACE.pack(number, offset, stored_bytes, raw_bytes, kind, coding))
                    for digest, kind, coding, raw_bytes, offset, stored_bytes in pack.entries
                ]
            # In order, what goes into one page of the tree goes there at once.
            places.sort()
            txn.cursor("index").putmulti(places, dupdata=True)

        self._index.write(add)

    def find(self, digests: Sequence[Digest]) -> list[list[Location]]:
        """For each digest the places where it lies, in no order; none if it is not known."""

        def find(txn: _Txn) -> list[list[Location]]:
            places: dict[bytes, list[Location]] = {}
            idents: dict[int, PackId | None] = {}
            for key, value in txn.cursor("index").getmulti(sorted(set(digests)), dupdata=True):
                number, offset, stored_bytes, raw_bytes, kind, coding = _PLACE.unpack(value)
                if number not in idents:
                    ident = txn.get("numbers", _NUMBER.pack(number))
                    idents[number] = None if ident is None else PackId(ident.hex())
                pack = idents[number]
                if pack is not None:
                    location = Location(pack, _KINDS[kind], _CODINGS[coding], offset, stored_bytes, raw_bytes)
                    places.setdefault(bytes(key), []).append(location)
            return [places.get(digest, []) for digest in digests]

        return self._index.read(find)

    def forget_packs(self, packs: Iterable[PackId]) -> None:
        """They are gone: nothing is found in them any more."""
        idents = [bytes.fromhex(pack) for pack in packs]

        def forget(txn: _Txn) -> bool:
            for ident in idents:
                found = txn.get("packs", ident)
                if found is not None:
                    number, entries, _ = _PACK.unpack(found)
                    txn.delete("packs", ident)
                    txn.delete("numbers", _NUMBER.pack(number))
                    _set_count(txn, b"live", _count(txn, b"live") - entries)
            live = _count(txn, b"live")
            return txn.entries("index") > 2 * live + _SWEEP_ENTRIES

        mostly_dead = self._index.write(forget)
        if mostly_dead:
            self._sweep()

    def _sweep(self) -> None:
        """Take the places of forgotten packs out of the index, a piece at a time.

        What ends it early is made good by the next sweep. Numbers are never used again, so that a pack that comes
        meanwhile is not taken for a dead one.
        """
        begin: bytes | None = b""
        while begin is not None:
            begin = self._index.write(lambda txn, begin=begin: _sweep_from(txn, begin))  # type: ignore[misc]

    # Pages, and what was made of them

    def page_get(self, digest: Digest) -> bytes | None:
        return self._bounded_get("pages", digest)

    def page_put(self, digest: Digest, page: bytes) -> None:
        self.pages_put([(digest, page)])

    def pages_put(self, pages: Sequence[tuple[Digest, bytes]]) -> None:
        """Keep several, in one transaction."""
        self._bounded_put("pages", pages)

    def region_get(self, leaf: Digest) -> bytes | None:
        return self._bounded_get("regions", leaf)

    def regions_ticket(self) -> int:
        """For ``region_put``, drawn before looking up what goes into the region."""
        return self._regions_forgotten

    def region_put(self, leaf: Digest, blob: bytes, ticket: int) -> None:
        """Does nothing if regions were forgotten since the ticket was drawn: what was looked up may be out of date."""
        self._bounded_put("regions", [(leaf, blob)], lambda: ticket == self._regions_forgotten)

    def regions_forget(self) -> None:
        """Forget all regions: places that they name may be gone."""
        # Before the transaction: whoever comes into one after it must not put what was looked up before.
        with self._counting:
            self._regions_forgotten += 1

        def forget(txn: _Txn) -> None:
            for half in _halves("regions"):
                txn.empty(half)

        self._pages.write(forget)

    def _bounded_get(self, name: str, key: bytes) -> bytes | None:
        def get(txn: _Txn) -> bytes | None:
            return next((found for half in _halves(name) if (found := txn.get(half, key)) is not None), None)

        return self._pages.read(get)

    def _bounded_put(
        self, name: str, entries: Sequence[tuple[bytes, bytes]], still: Callable[[], bool] = lambda: True
    ) -> None:
        def put(txn: _Txn) -> None:
            if not still():
                return
            young = _count(txn, name.encode())
            if txn.bytes_taken(_halves(name)[young]) >= self._bytes_max[name] // 2:
                young = 1 - young
                _set_count(txn, name.encode(), young)
                txn.empty(_halves(name)[young])
            for key, value in entries:
                txn.put(_halves(name)[young], key, value)
                # One value for a key, wherever it is looked for first.
                txn.delete(_halves(name)[1 - young], key)

        self._pages.write(put)


def _halves(name: str) -> tuple[str, str]:
    return f"{name}0", f"{name}1"


def _count(txn: _Txn, key: bytes) -> int:
    found = txn.get("meta", key)
    return 0 if found is None else int(_COUNT.unpack(found)[0])


def _set_count(txn: _Txn, key: bytes, count: int) -> None:
    txn.put("meta", key, _COUNT.pack(count))


def _sweep_from(txn: _Txn, begin: bytes) -> bytes | None:
    """Sweep some keys from ``begin`` on. Where to go on, ``None`` at the end."""
    live = set(txn.cursor("numbers").iternext(values=False))
    dead: list[tuple[bytes, bytes]] = []
    following = None
    cursor = txn.cursor("index")
    if cursor.set_range(begin):
        last = b""
        for seen, (key, value) in enumerate(cursor.iternext()):
            if seen >= _SWEEP_ENTRIES and key != last:
                following = bytes(key)
                break
            last = bytes(key)
            if value[: _NUMBER.size] not in live:
                dead.append((bytes(key), bytes(value)))
    for key, value in dead:
        txn.delete("index", key, value)
    return following


# Whether to believe it


def _take(state_fd: int, path: Path) -> bool:
    """Be the one who has the cache open; whether what lies in it can be believed. Raises ``Busy``."""
    try:
        fcntl.flock(state_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(
            f"cache {path}: another process has it open; stop that one, or give each its own state_dir"
        ) from None
    return os.pread(state_fd, 4096, 0) in (_CLEAN, _opened_state(state_fd))


def _opened_state(state_fd: int) -> bytes:
    return f"open {_BOOT_ID_PATH.read_text().strip()} {_mount_id(state_fd)}\n".encode()


def _mount_id(fd: int) -> int:
    """Which mount, of all since the boot, ``fd`` lies in; 0 where the kernel cannot say (see statx(2))."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    if _statx(fd, b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, found) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", found)
    return int(struct.unpack_from("=Q", found, _STX_MNT_ID_OFFSET)[0]) if mask & _STATX_MNT_ID_UNIQUE else 0


def _write_state(state_fd: int, state: bytes) -> None:
    """Durably. One that is torn is neither of the two, and has the cache begin anew."""
    os.ftruncate(state_fd, 0)
    os.pwrite(state_fd, state, 0)
    os.fsync(state_fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    with _errors_of(path), suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from error
        why = os.strerror(error.errno or errno.EIO)
        raise StoreError(f"cache {path}: {why}; check the directory's owner, mode and disk, or remove it") from error


def _full(path: Path) -> StoreFull:
    return StoreFull(f"cache {path}: no space; free some on its disk and try again")
