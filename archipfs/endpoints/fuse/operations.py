"""The pyfuse3 operations over a composer.

Whatever may wait runs in a worker thread. A read that the page cache can answer is answered at once; everything else
goes to a thread. All who have a volume open share one ``OpenVolume`` and its count.

With a session, everything here may happen twice, in one process and in the next: a handle is the number of the request
that opened it, and what must not be done twice is done under the request's id.
"""

import errno
import functools
import itertools
import os
import stat
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import msgspec
import pyfuse3
import structlog
import trio

from archipfs.compose.composer import Composer, Found
from archipfs.compose.engine import EngineVolume
from archipfs.compose.volume import OpenVolume
from archipfs.endpoints.fuse import xattrs
from archipfs.endpoints.fuse.commands import Caller
from archipfs.endpoints.fuse.inodes import ROOT, Inodes, inode_of
from archipfs.endpoints.fuse.session import Handle, Session
from archipfs.errors import (
    ArchipError,
    InvalidInput,
    InvalidName,
    LockHeld,
    NotFound,
    NotSupported,
    ObjectMissing,
    ReadOnlyVolume,
    StoreUnavailable,
    errno_of,
)
from archipfs.map.mapper import Attributes
from archipfs.map.names import check_name
from archipfs.map.records import VolumeRecord
from archipfs.types import NAME_BYTES_MAX, SECTOR_BYTES, RequestId, VolumeId

log = structlog.get_logger()

CACHE_SECONDS = 1.0
"""How long the kernel may believe names and attributes: other nodes change them without telling it."""
BLOCK_BYTES = 512
"""The unit of st_blocks, whatever st_blksize says."""
THREADS_MAX = 64
LOCK_RETRY_SECONDS_MAX = 1.0
IDLE_CHECK_SECONDS = 0.002
DOTS = 2
"""The places of the two entries that every directory has are 1 and 2."""
READDIR_ENTRIES = 32
"""At most so many in one answer; the kernel's page holds about as many."""
QUIET = frozenset({errno.ENOENT, errno.ENODATA, errno.ENOTTY})
"""Answers so common that they are not worth a line in the log."""

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[Concatenate["VolumeOperations", P], Coroutine[Any, Any, T]]


def replies(handler: Handler[P, T]) -> Handler[P, T]:
    """Turn an error into the errno that the kernel gets, and its sentence into a line of the log.

    What is no error of ours is a bug: the requester gets EIO, the log the traceback, and the mount lives on.
    """

    @functools.wraps(handler)
    async def guarded(self: "VolumeOperations", *args: P.args, **kwargs: P.kwargs) -> T:
        self.under_way += 1
        try:
            return await handler(self, *args, **kwargs)
        except (pyfuse3.FUSEError, trio.Cancelled):
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(refusal(handler.__name__, error)) from error
        finally:
            self.under_way -= 1

    return cast("Handler[P, T]", guarded)


def refusal(operation: str, error: Exception) -> int:
    """The errno to answer with. The sentence goes to the log; of what is no error of ours, a bug, the traceback."""
    if isinstance(error, ArchipError | OSError):
        number = errno_of(error)
        if number not in QUIET:
            log.warning("refused", operation=operation, errno=errno.errorcode.get(number), error=str(error))
        return number
    log.error("bug", operation=operation, exc_info=error)
    return errno.EIO


@dataclass(frozen=True, slots=True)
class Numbering:
    """How requests are known by their numbers: with the front, which hands them on in the header's ``pid``."""

    session: Session
    number_of: Callable[[int], tuple[int, bool]]
    """From ``pid`` to the number, and whether the kernel sends the request again."""


@dataclass(slots=True)
class _Listing:
    """What an open directory shows, in the order in which the volumes were made."""

    found: list[Found] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Of each, what a reader goes on behind: it follows from when the volume was made, so that whatever comes or goes,
    and in the time of another process too, nothing is shown twice or left out."""
    error: StoreUnavailable | None = None
    """To be told at the end: a backend is away, and what lies in it is missing here. Whoever compares (rsync --delete)
    must not take it for removed."""


class VolumeOperations(pyfuse3.Operations):
    enable_writeback_cache = False
    supports_dot_lookup = True

    def __init__(self, composer: Composer, uid: int, gid: int) -> None:
        """``uid`` and ``gid`` own the root directory."""
        super().__init__()
        self.numbering: Numbering | None = None
        """Set before the first request, where there is one."""
        self.under_way = 0
        """Requests that have no answer yet."""
        self._composer = composer
        self._owner = (uid, gid)
        self._inodes = Inodes()
        self._open: dict[int, OpenVolume] = {}
        self._opened_times: Counter[str] = Counter()
        self._listings: dict[int, _Listing] = {}
        # Not from 1: the kernel may have directories open from the time of an earlier process.
        self._numbers = itertools.count(time.time_ns())
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        # Of its own: others wait for it while they hold a thread of theirs.
        self._invalidating = trio.CapacityLimiter(1)
        self._root_changed_ns = time.time_ns()

    # Names

    @replies
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name in (b".", b".."):
            return self._root_attributes()
        try:
            found = await self._run(self._composer.find, _decode(name))
        except InvalidName as error:
            raise NotFound(str(error)) from error  # nothing can be called so
        return await self._entry(found)

    @replies
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, lookups in inode_list:
            self._inodes.forget(inode, lookups)

    @replies
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        handle = next(self._numbers)
        self._listings[handle] = await self._run(self._listing)
        return handle

    def _listing(self) -> "_Listing":
        listing = _Listing()
        try:
            for found in self._composer.volumes():
                listing.found.append(found)
        except StoreUnavailable as error:
            listing.error = error
        listing.found.sort(key=lambda each: (each.record.created_ns, each.record.id))
        place = DOTS
        for found in listing.found:
            place = max(place + 1, found.record.created_ns)
            listing.places.append(place)
        return listing

    @replies
    async def readdir(self, handle: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if handle not in self._listings:  # opened in the time of an earlier process
            self._listings[handle] = await self._run(self._listing)
        known = self._listings[handle]
        listing, places, error = known.found, known.places, known.error
        for index, dots in enumerate((b".", b"..")):
            if start_id <= index and not pyfuse3.readdir_reply(token, dots, self._root_attributes(), index + 1):
                return
        position, answered = bisect_right(places, start_id), False
        while position < len(listing) and not answered:  # an empty answer would mean the end
            entries = listing[position : position + READDIR_ENTRIES]
            attributes = await self._run(self._attributes_again, entries)
            for found, entry in zip(entries, attributes, strict=True):
                place = places[position]
                position += 1
                if entry is None:
                    continue
                if not pyfuse3.readdir_reply(token, str(found.record.name).encode(), entry, place):
                    return
                self._inodes.remember(found.record.id)
                answered = True
        if error is not None and not answered and start_id >= DOTS:
            raise error

    @replies
    async def releasedir(self, handle: int) -> None:
        self._listings.pop(handle, None)

    @replies
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        found = await self._make(name, mode, ctx)
        handle = await self._open_handle(found, ctx)
        return handle, await self._entry(found)

    @replies
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if not stat.S_ISREG(mode):
            raise pyfuse3.FUSEError(errno.EPERM)
        return await self._entry(await self._make(name, mode, ctx))

    @replies
    async def unlink(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._remove(_decode(name), ctx)
        self._root_changed_ns = time.time_ns()

    async def _remove(self, name: str, ctx: pyfuse3.RequestContext) -> None:
        remove = functools.partial(self._composer.remove, name, even_if_open=True)
        if self.numbering is None:
            await self._run(remove)
            return
        number, again = self.numbering.number_of(ctx.pid)
        noted = self.numbering.session.removal(number) if again else None
        try:
            volume = noted or (await self._run(self._composer.find, name)).record.id
            # What has the name when this request comes again may be another volume by then.
            self.numbering.session.note_removal(number, volume)
            await self._run(functools.partial(remove, only=volume))
        except NotFound:
            if noted is None:  # else it was removed when the request came first
                raise

    @replies
    async def rename(
        self,
        parent_old: int,
        name_old: bytes,
        parent_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise InvalidInput(f"cannot exchange {name_old!r} and {name_new!r}; rename them one after the other")
        replace = not flags & pyfuse3.RENAME_NOREPLACE
        rename = functools.partial(self._composer.rename, replace=replace, request=self._request(ctx))
        await self._run(rename, _decode(name_old), check_name(_decode(name_new)))
        self._root_changed_ns = time.time_ns()

    @replies
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)  # volumes lie in one flat namespace

    @replies
    async def rmdir(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._run(self._composer.find, _decode(name))
        raise pyfuse3.FUSEError(errno.ENOTDIR)

    @replies
    async def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)

    @replies
    async def link(self, inode: int, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        raise pyfuse3.FUSEError(errno.EPERM)

    # Attributes

    @replies
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if inode == ROOT:
            return self._root_attributes()
        return await self._run(lambda: self._attributes(self.found(inode)))

    @replies
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        handle: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if inode == ROOT:
            raise pyfuse3.FUSEError(errno.EPERM)
        found = await self._run(self.found, inode)
        if fields.update_size:
            await self._run(self._composer.resize, found, attr.st_size)
        changes: dict[str, int] = {}
        if fields.update_mode:
            changes["mode"] = stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_atime:
            changes["atime_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["mtime_ns"] = attr.st_mtime_ns
        if changes:
            changes["ctime_ns"] = time.time_ns()

            def changed(record: VolumeRecord) -> VolumeRecord:
                return msgspec.structs.replace(record, **changes)

            set_attributes = functools.partial(self._composer.set_attributes, sets_mtime=fields.update_mtime)
            await self._run(set_attributes, found.record.id, changed)
        return await self._run(lambda: self._attributes(self.found(inode)))

    @replies
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        space = await self._run(self._composer.space)
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = SECTOR_BYTES
        answer.f_blocks = space.total_bytes // SECTOR_BYTES
        answer.f_bfree = space.free_bytes // SECTOR_BYTES
        answer.f_bavail = space.available_bytes // SECTOR_BYTES
        answer.f_namemax = 255
        return answer

    @replies
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        # The kernel asks for security.capability before each write: answer that without a detour.
        if inode == ROOT or not name.startswith(xattrs.USER_PREFIX.encode()):
            raise pyfuse3.FUSEError(errno.ENODATA)
        value = await self._run(lambda: xattrs.get(self._composer, self.found(inode), _decode(name)))
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @replies
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        if inode == ROOT:
            raise NotSupported("the mount's root keeps no attributes; set them on a volume")
        caller = Caller(ctx.uid, ctx.gid, writes=True, request=self._request(ctx))
        await self._run(lambda: xattrs.set_(self._composer, self.found(inode), _decode(name), bytes(value), caller))
        if xattrs.is_ours(_decode(name)):
            self.names_changed()
            await self.invalidate(inode)

    @replies
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        if inode == ROOT:
            return []
        found = await self._run(self.found, inode)
        return [name.encode() for name in found.record.xattrs]

    @replies
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if inode == ROOT or not await self._run(
            lambda: xattrs.remove(self._composer, self.found(inode), _decode(name))
        ):
            raise pyfuse3.FUSEError(errno.ENODATA)

    # Bytes

    @replies
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        found = await self._run(self.found, inode)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and not found.record.writable:
            raise ReadOnlyVolume(f"{found.record.name} is a snapshot and does not change; clone it to write")
        if flags & os.O_TRUNC:
            await self._run(self._composer.resize, found, 0)
        return await self._open_handle(found, ctx)

    @replies
    async def read(self, handle: int, offset: int, size: int) -> bytes:
        volume = await self.opened(handle)
        data = volume.read_nowait(offset, size)
        return data if data is not None else await self._run(volume.read, offset, size)

    @replies
    async def write(self, handle: int, offset: int, data: bytes) -> int:
        volume = await self.opened(handle)
        pause_seconds = 0.05
        while True:
            try:
                return await self._run(volume.write, offset, data)
            except LockHeld:
                # Another node has the lock: a write waits until it is given back.
                await trio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LOCK_RETRY_SECONDS_MAX)

    @replies
    async def fsync(self, handle: int, datasync: bool) -> None:
        volume = await self.opened(handle)
        await self._run(volume.flush)

    @replies
    async def flush(self, handle: int) -> None:
        """close(2) makes nothing durable, as on any file system; writes are with the store already."""

    @replies
    async def release(self, handle: int) -> None:
        known = self.numbering.session.get(handle) if self.numbering is not None else None
        if known is not None and handle not in self._open:
            await self._take_up(known)  # to be closed in order: flushed, and its lock given back
        volume = self._open.pop(handle, None)
        if self.numbering is not None:
            self.numbering.session.remove(handle)
        if volume is not None:
            self._opened_times[volume.id] -= 1
            if not self._opened_times[volume.id]:
                del self._opened_times[volume.id]
            await self._run(self._composer.release, volume)
        elif known is not None and not self._handles_of(known.volume):
            self._composer.await_no_more(known.volume)

    # For the composer: as an EngineUser

    def engine_opened(self, volume: VolumeId, engine: EngineVolume, size_max: int) -> None:
        """We hold the volume's lock now, which who had it open before may not have had."""
        try:
            for handle, opened in list(self._open.items()):
                if opened.id == volume:
                    self._remember(handle, opened)
        except OSError as error:
            log.error("a later daemon will not know under which lock it is open", volume=volume, error=str(error))

    def engine_closing(self, volume: VolumeId) -> None:
        """The handles stay open."""

    # For the daemon

    def names_changed(self) -> None:
        """A name came or went: the root directory's time follows."""
        self._root_changed_ns = time.time_ns()

    async def idle(self) -> None:
        """Return when every request has its answer."""
        while self.under_way:
            await trio.sleep(IDLE_CHECK_SECONDS)

    async def take_up(self) -> None:
        """Open again what the kernel has open since the time of an earlier process.

        What cannot be opened now is tried again when it is used.
        """
        if self.numbering is None:
            return
        handles = self.numbering.session.handles()
        self._composer.await_reopening(handle.volume for handle in handles)
        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(self._take_up, handle)

    async def _take_up(self, handle: Handle) -> None:
        try:
            volume = await self.opened(handle.number)
            if volume.fenced:
                await self.invalidate(inode_of(volume.id))
        except (ArchipError, OSError) as error:
            log.error("not opened again", volume=handle.volume, error=str(error))

    async def invalidate(self, inode: int) -> None:
        """Have the kernel forget what it caches of the volume: its content changed other than by writing."""
        with suppress(FileNotFoundError):  # it caches nothing
            await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode, limiter=self._invalidating)

    # Helpers

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._threads)

    def found(self, inode: int) -> Found:
        """The volume with that inode number. Raises ``NotFound``. Blocks."""
        volume = self._inodes.volume(inode)
        if volume is None:
            # Looked up in the time of an earlier process, as others may have been.
            listing = self._listing()
            for each in listing.found:
                self._inodes.learn(each.record.id)
            volume = self._inodes.volume(inode)
            if volume is None and listing.error is not None:
                raise listing.error
        if volume is None:
            raise NotFound(f"no volume has the inode number {inode}")
        return self._composer.find_by_id(volume)

    async def opened(self, handle: int) -> OpenVolume:
        """The volume behind an open file. Raises what opening it again does, where that is needed and fails."""
        volume = self._open.get(handle)
        if volume is not None:
            return volume
        known = self.numbering.session.get(handle) if self.numbering is not None else None
        if known is None:
            raise NotFound(f"no file is open under the handle {handle}; this is a bug, please report it")
        generation = max(handle.generation for handle in self._handles_of(known.volume))
        volume = await self._run(self._composer.reopen, known.volume, generation)
        if handle in self._open or self.numbering is None or self.numbering.session.get(handle) is None:
            await self._run(self._composer.release, volume)  # somebody was faster, or closed it meanwhile
        else:
            self._inodes.learn(volume.id)
            self._keep_open(handle, volume)
        return await self.opened(handle)

    def request_id(self, number: int) -> RequestId | None:
        """Who the request of that number is; ``None`` where no request can come again."""
        return self.numbering.session.request_id(number) if self.numbering is not None else None

    def _request(self, ctx: pyfuse3.RequestContext) -> RequestId | None:
        if self.numbering is None:
            return None
        number, _ = self.numbering.number_of(ctx.pid)
        return self.request_id(number)

    def _handles_of(self, volume: VolumeId) -> list[Handle]:
        """Those that the session knows."""
        handles = self.numbering.session.handles() if self.numbering is not None else []
        return [handle for handle in handles if handle.volume == volume]

    def _keep_open(self, handle: int, volume: OpenVolume) -> None:
        self._remember(handle, volume)
        self._open[handle] = volume
        self._opened_times[volume.id] += 1

    def _remember(self, handle: int, volume: OpenVolume) -> None:
        """Have the session know the handle, and under which lock it is open."""
        if self.numbering is None:
            return
        now = Handle(handle, volume.id, volume.generation)
        if self.numbering.session.get(handle) != now:
            self.numbering.session.put(now)

    async def _make(self, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> Found:
        attributes = Attributes(stat.S_IMODE(mode), ctx.uid, ctx.gid)
        make = functools.partial(self._composer.create, attributes=attributes, request=self._request(ctx))
        made = await self._run(make, _decode(name), 0)
        self._root_changed_ns = time.time_ns()
        return await self._run(self._composer.find_by_id, made.record.id)

    async def _open_handle(self, found: Found, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        handle = next(self._numbers) if self.numbering is None else self.numbering.number_of(ctx.pid)[0]
        if handle not in self._open:  # else it was opened when the request came first
            volume = await self._run(self._composer.open, found)
            try:
                self._keep_open(handle, volume)
            except OSError:
                await self._run(self._composer.release, volume)  # the kernel will not: it has no handle
                raise
        volume = self._open[handle]
        # What another node writes, or wrote while we had it closed, must not be answered from our page cache.
        keep_cache = volume.owned and self._opened_times[volume.id] > 1
        return pyfuse3.FileInfo(fh=handle, direct_io=not volume.owned, keep_cache=keep_cache)

    async def _entry(self, found: Found) -> pyfuse3.EntryAttributes:
        attributes = await self._run(self._attributes, found)
        self._inodes.remember(found.record.id)
        return attributes

    def _attributes_again(self, listed: Sequence[Found]) -> list[pyfuse3.EntryAttributes | None]:
        """Of volumes listed a while ago, as they are now: an old size would have the kernel cut an open file.

        ``None`` for one that is not called so any more. One whose layer is lost is listed all the same.
        """
        return [self._attributes_of_listed(found) for found in listed]

    def _attributes_of_listed(self, listed: Found) -> pyfuse3.EntryAttributes | None:
        found = listed
        try:
            found = self._composer.find_again(listed)
            return self._attributes(found) if found.record.name == listed.record.name else None
        except NotFound:
            return None
        except ObjectMissing as error:
            try:
                found = self._composer.find_by_id(listed.record.id)
            except NotFound:
                return None
            log.warning("damaged", volume=found.record.name, error=str(error))
            return self._attributes(found, stored_bytes=0)

    def _attributes(self, found: Found, stored_bytes: int | None = None) -> pyfuse3.EntryAttributes:
        record = found.record
        entry = _new_attributes()
        entry.st_ino = inode_of(record.id)
        entry.st_mode = stat.S_IFREG | record.mode
        entry.st_nlink = 1 if record.name is not None else 0
        entry.st_uid, entry.st_gid = record.uid, record.gid
        entry.st_size = record.size
        if stored_bytes is None:
            stored_bytes = self._composer.stored_bytes(found)
        # Programs (tar --sparse) take a file without any blocks for a hole and do not look: what a volume shows may be
        # its parents'.
        least_bytes = SECTOR_BYTES if record.size else 0
        entry.st_blocks = max(stored_bytes, least_bytes) // BLOCK_BYTES
        entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns = record.atime_ns, record.mtime_ns, record.ctime_ns
        return entry

    def _root_attributes(self) -> pyfuse3.EntryAttributes:
        entry = _new_attributes()
        entry.st_ino = ROOT
        entry.st_mode = stat.S_IFDIR | 0o755
        entry.st_nlink = 2
        entry.st_uid, entry.st_gid = self._owner
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._root_changed_ns
        return entry


def _new_attributes() -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_blksize = SECTOR_BYTES
    entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
    return entry


def _decode(name: bytes) -> str:
    if len(name) > NAME_BYTES_MAX:
        raise OSError(
            errno.ENAMETOOLONG, f"invalid name {name[:24]!r}…: {len(name)} bytes; {NAME_BYTES_MAX} is the most"
        )
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise InvalidName(f"invalid name {name!r}: not UTF-8; choose another") from error
