"""Claims: who changes what a lock record is the lock of, and how he is shut out for good.

A claim on ``lock/x`` is a shared lock of the OSDs' class ``lock``, called ``archipfs``, on the object ``claim/lock/x``,
with the owner as its tag and as its cookie, and without an end. Both clients of a process take it; so the object names
the addresses of all that may write under it. (``rados -N archipfs lock info claim/lock/x archipfs`` shows them.)

Shutting out
    1. Read who holds the lock, with the version of its object.
    2. Put all their addresses on the cluster's blocklist, and wait until both our clients have a map that says so.
    3. Remove the object, if it is still at that version. If not, somebody else has done the same, or claims it: again.

Claiming
    1. Take the lock with both clients. EBUSY: somebody has it as another owner.
    2. Read who holds it. Only our two, as this owner: done.
    3. Shut the others out as above (and with them goes what we held as another owner), and begin again.

Giving up
    1. The native client ends what is under way, and gives its lock up. Where a write of it may still arrive, it keeps
       it, so that whoever claims next shuts it out.
    2. Read who holds the lock. Nobody but us (the native client does not count where it keeps it) and those on the
       blocklist: remove the object, if it is still at that version. Else, give our lock up.

Why nothing of who was shut out arrives any more
    An OSD refuses what comes from an address that its map has on the blocklist. OSDs learn of a new map at different
    times; but whatever our clients send from step 2 on carries the number of theirs, and a placement group that gets it
    waits for that map before it looks at it. So for each object: once we have read or written it, the other one's
    requests are refused, and what it had sent before is in what we read. The same is true of everybody who learns from
    us, as in RADOS nobody goes back to an older map.

    Blocklisting has an end in Ceph; ours comes after ten years. A process may be stopped and go on much later: it then
    sends once more all that it had under way.

The claim's object being removed without a lock of ours on it, between 3 and beginning again, matters to nobody: that we
are the owner is what the lock record says, and nobody else claims it without having changed that first.
"""

import errno
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from archipfs.blockers.rados.connection import ALSO_WHEN_FULL, Connection, errno_of, plain_address
from archipfs.blockers.rados.data import NativeClient
from archipfs.blockers.rados.lock_class import ANSWER_BYTES_MAX, GET_INFO, LockInfo, get_info
from archipfs.errors import Busy, InvalidInput, ObjectMissing, ShutOut, StoreError

LOCK = "archipfs"
BLOCKLIST_S = 10 * 365 * 24 * 3600
_MAY_RENEW = 1
"""LIBRADOS_LOCK_FLAG_RENEW: taking what one has is no error."""
_TRIES_MAX = 20


@dataclass(frozen=True, slots=True)
class _Claimed:
    """A claim's lock at some moment."""

    lock: LockInfo
    version: int | None
    """Of its object; ``None``: there is none."""

    def addresses(self) -> set[str]:
        return {locker.address for locker in self.lock.lockers}


class Claims:
    """The claims of this process, by its two clients. Thread-safe."""

    def __init__(self, connection: Connection, native: NativeClient, gone: frozenset[str] = frozenset()) -> None:
        self._connection = connection
        self._native = native
        self._gone = set(gone)
        """Addresses that are on the blocklist already."""

    def claim(self, key: str, owner: str) -> None:
        for _ in range(_TRIES_MAX):
            taken = self._take(key, owner)
            found = self._read(key)
            if taken and all(self._is_ours(locker.address) and locker.cookie == owner for locker in found.lock.lockers):
                return
            self._shut_out(found.addresses())
            self._remove(key, found)
        raise StoreError(f"claiming {key}: others claim it again and again; see who else is {owner}")

    def disclaim(self, key: str) -> None:
        try:
            kept = self._native.disclaim(key)
            found = self._read(key)
            # The native client's lock is still there where giving it up was not answered.
            ours = {self._connection.address} | set(() if kept else map(plain_address, self._native.addresses()))
            if found.addresses() <= ours | self._gone:
                self._remove(key, found)
                return
            for locker in found.lock.lockers:
                if locker.address == self._connection.address:
                    self._give_up(key, locker.cookie)
        except ShutOut:
            # Then nothing is ours any more, and whoever claims it next finds us on the blocklist.
            return

    def shut_out(self, key: str) -> None:
        for _ in range(_TRIES_MAX):
            found = self._read(key)
            if any(self._is_ours(address) for address in found.addresses()):
                raise InvalidInput(f"{key} is claimed by this process itself; have it give the claim up instead")
            self._shut_out(found.addresses())
            if self._remove(key, found):
                return
        raise StoreError(f"shutting out who has claimed {key}: it is claimed again and again; stop that node first")

    def _is_ours(self, address: str) -> bool:
        return address == self._connection.address or address in map(plain_address, self._native.addresses())

    def _take(self, key: str, owner: str) -> bool:
        """Take the lock with both clients, unless it is held as another owner."""
        with self._connection.call(f"claiming {key}"):
            try:
                self._connection.main.lock_shared(_name(key), LOCK, owner, owner, flags=_MAY_RENEW)
            except self._connection.rados.Error as error:
                number = errno_of(error)
                if number in (errno.EBUSY, errno.EEXIST):
                    return False
                if number not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # There is no such object, and no room for one. But one claims what is to be removed, too.
                self._make(key)
                self._connection.main.lock_shared(_name(key), LOCK, owner, owner, flags=_MAY_RENEW)
        try:
            self._native.claim(key, owner)
        except Busy:
            return False
        return True

    def _make(self, key: str) -> None:
        rados = self._connection.rados
        with rados.WriteOpCtx() as operation:
            operation.new(rados.LIBRADOS_CREATE_IDEMPOTENT)
            self._connection.main.operate_write_op(operation, _name(key), flags=ALSO_WHEN_FULL)

    def _give_up(self, key: str, cookie: str) -> None:
        with self._connection.call(f"giving up {key}"):
            try:
                self._connection.main.unlock(_name(key), LOCK, cookie)
            except self._connection.rados.ObjectNotFound:
                return

    def _read(self, key: str) -> _Claimed:
        doing = f"reading who has claimed {key}"
        try:
            with self._connection.call(doing):
                # A handle of its own: the version is that of the last call by the same one.
                ioctx = self._connection.open_ioctx(self._connection.settings.namespace)
                try:
                    _, answer = ioctx.execute(_name(key), "lock", GET_INFO, get_info(LOCK), ANSWER_BYTES_MAX)
                    return _Claimed(LockInfo.decode(answer), ioctx.get_last_version())
                finally:
                    ioctx.close()
        except ObjectMissing:
            return _Claimed(LockInfo(), None)

    def _remove(self, key: str, found: _Claimed) -> bool:
        """Remove the claim's object if it is still as found. Returns whether it was."""
        if found.version is None:
            return True
        rados = self._connection.rados
        with self._connection.call(f"removing the claim on {key}"), rados.WriteOpCtx() as operation:
            operation.assert_version(found.version)
            operation.remove()
            try:
                self._connection.main.operate_write_op(operation, _name(key))
            except rados.ObjectNotFound:
                return True
            except rados.Error as error:
                if errno_of(error) not in (errno.ERANGE, errno.EOVERFLOW):
                    raise
                return False
        return True

    def _shut_out(self, addresses: Iterable[str]) -> None:
        """Put these on the blocklist, but for our own and those that are there already."""
        strangers = [each for each in addresses if not self._is_ours(each) and each not in self._gone]
        if not strangers:
            return
        # At once, since the monitors take a second for a change, and several changes together.
        with ThreadPoolExecutor(len(strangers), "archipfs-blocklist") as threads:
            for _ in threads.map(lambda address: self._connection.blocklist(address, BLOCKLIST_S), strangers):
                continue
        self._native.wait_for_latest_map()
        self._gone.update(strangers)


def _name(key: str) -> str:
    return f"claim/{key}"
