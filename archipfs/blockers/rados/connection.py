"""One client of the cluster by python3-rados: how it connects, and what its errors mean."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Any, Self

from archipfs.blockers.rados.binding import load_rados
from archipfs.blockers.rados.failures import UNREACHABLE, store_error
from archipfs.blockers.rados.settings import Settings
from archipfs.errors import ArchipError, StoreAway, StoreError, StoreUnavailable

ALSO_WHEN_FULL = 128
"""LIBRADOS_OPERATION_FULL_FORCE, which the binding has no name for: not refused by a full pool, only by a full OSD."""


class Connection:
    """A client. Thread-safe.

    Shared by those who hold a reference: :meth:`share` makes one more, :meth:`close` ends one. The last one waits for
    what is under way, and then the cluster forgets us.
    """

    def __init__(self, settings: Settings) -> None:
        """Connect. Raises ``StoreUnavailable`` within the settings' timeout, and then says what to do."""
        self.settings = settings
        self.rados = load_rados()
        self.is_shut_out = False
        """Whether an operation was refused because somebody has shut us out."""
        self._references = 1
        self._calls = 0
        self._changed = Condition()
        self._cluster = self._connect()
        try:
            self.fsid: str = self._cluster.get_fsid()
            self.address = plain_address(self._cluster.get_addrs())
            """Under which the cluster knows us."""
            self.main = self.open_ioctx(settings.namespace)
            """The store's namespace."""
            self.packs = self.open_ioctx(f"{settings.namespace}.packs")
            self._pool_id = self._cluster.pool_lookup(settings.pool)
        except BaseException:
            self._cluster.shutdown()
            raise

    def _connect(self) -> Any:
        """A connected cluster handle."""
        settings, rados = self.settings, self.rados
        for what, path in (("conf", settings.conf), ("keyring", settings.keyring)):
            if path is not None and not os.access(path, os.R_OK):
                problem = "cannot be read" if os.path.exists(path) else "is not there"
                raise StoreUnavailable(
                    f"{self._whole()}: {path} {problem}; copy it from the cluster, or set the backend's option {what}"
                )
        options = {
            "client_mount_timeout": str(settings.timeout_s),
            "rados_mon_op_timeout": str(settings.timeout_s),
            "rados_osd_op_timeout": str(settings.operation_timeout_s),
            "objecter_timeout": str(settings.patience_s),
            "objecter_tick_interval": str(settings.patience_s),
            # What goes wrong comes back as an error; nothing else is for the terminal of whoever uses us.
            "log_to_stderr": "false",
            "err_to_stderr": "false",
        }
        if settings.keyring is not None:
            options["keyring"] = settings.keyring
        try:
            cluster = rados.Rados(rados_id=settings.user, conffile=settings.conf, conf=options)
        except rados.Error as error:
            raise StoreUnavailable(
                f"{self._whole()}: {settings.conf} is not understood ({_name(error)}); mend it there"
            ) from error
        try:
            cluster.connect()
        except rados.Error as error:
            cluster.shutdown()
            raise StoreUnavailable(f"{self._whole()}: {self._why_not(error)}") from error
        return cluster

    def _why_not(self, error: Any) -> str:
        """Why we could not connect, and what to do."""
        settings = self.settings
        number = errno_of(error)
        if number == errno.ENOENT:
            where = settings.keyring or "the keyring that the conf file names"
            return f"there is no key of client.{settings.user} in {where}; see `ceph auth get client.{settings.user}`"
        if number in (errno.EACCES, errno.EPERM):
            return (
                f"the cluster refuses client.{settings.user} ({_name(error)}); compare its key and its permissions "
                f"with `ceph auth get client.{settings.user}`"
            )
        if number in UNREACHABLE:
            return (
                f"no monitor of {settings.conf} answered within {settings.timeout_s} s; see whether `ceph -s` does, "
                "and whether the network is there"
            )
        return f"connecting failed ({_name(error)}); see whether `ceph -s` works"

    def open_ioctx(self, namespace: str) -> Any:
        """A handle for objects of one namespace, all of whose writes fail at once when the cluster is full."""
        rados, pool = self.rados, self.settings.pool
        try:
            ioctx = self._cluster.open_ioctx(pool)
        except rados.ObjectNotFound as error:
            raise StoreUnavailable(
                f"{self._whole()}: the cluster has no pool {pool}; make it with `ceph osd pool create {pool} && "
                f"ceph osd pool application enable {pool} archipfs`"
            ) from error
        except rados.Error as error:
            raise self.store_error(error, f"opening the pool {pool}") from error
        ioctx.set_namespace(namespace)
        ioctx.set_osdmap_full_try()
        return ioctx

    def share(self) -> Self:
        with self._changed:
            self._references += 1
        return self

    def close(self) -> None:
        with self._changed:
            self._references -= 1
            if self._references > 0:
                return
            while self._calls > 0:
                self._changed.wait()
        self.main.close()
        self.packs.close()
        self._cluster.shutdown()

    def close_replaced(self) -> None:
        """As :meth:`close`, since another connection came in the place of this one: who still comes is told that we are
        shut out, and so comes again by that one."""
        self.is_shut_out = True
        self.close()

    @contextmanager
    def call(self, doing: str) -> Iterator[None]:
        """Around whatever uses a handle of this connection: the binding's errors become ours.

        ``doing`` names the operation and its object. Raises ``ShutOut`` without asking the cluster if that is known.
        """
        with self._changed:
            if self.is_shut_out:
                raise store_error(errno.ESHUTDOWN, doing)
            if self._references <= 0:
                raise StoreError(f"{doing}: the store was closed; open it again")
            self._calls += 1
        try:
            yield
        except self.rados.Error as error:
            raise self.store_error(error, doing) from error
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def store_error(self, error: Any, doing: str) -> ArchipError:
        """What an error of the binding means, or the negative result of an asynchronous call."""
        number = -error if isinstance(error, int) else errno_of(error)
        if number == errno.ESHUTDOWN:
            self.is_shut_out = True
        if number == errno.ENOENT and not self._has_pool():
            return self._pool_deleted(doing)
        return store_error(number, doing)

    def require_pool(self, doing: str) -> None:
        """To be asked wherever a missing object is no error: of a pool that was deleted, all are missing.

        Raises ``StoreAway``.
        """
        if not self._has_pool():
            raise self._pool_deleted(doing)

    def _has_pool(self) -> bool:
        """By the newest map of the cluster that we have seen, without asking it. Whoever is told of a missing object
        has seen one that is new enough."""
        return self._cluster.pool_reverse_lookup(self._pool_id) is not None

    def _pool_deleted(self, doing: str) -> StoreAway:
        return StoreAway(
            f"{doing}: the pool {self.settings.pool} was deleted, and what was in it is lost; unless there is a copy, "
            "take the backend out with `archip backend-remove --keep-data`"
        )

    # The monitors

    def command(self, doing: str, command: str) -> bytes:
        """Have the monitors carry out a command, given as JSON, and return its output."""
        with self.call(doing):
            result, output, said = self._cluster.mon_command(command, b"")
        if result < 0:
            error = self.store_error(result, doing)
            raise type(error)(f"{error} ({said})" if said else str(error))
        return bytes(output)

    def wait_for_latest_map(self) -> None:
        """From then on, who was shut out before is refused wherever we have been: see ``claims``."""
        with self.call("waiting for the cluster's newest map"):
            self._cluster.wait_for_latest_osdmap()

    def blocklist(self, address: str, expire_s: int) -> None:
        """Have all OSDs refuse whatever comes from ``address``, and wait until this client's map says so.

        From then on an OSD that gets anything from us waits until its own map does so too.
        """
        with self.call(f"shutting {address} out"):
            self._cluster.blocklist_add(address, expire_s)
            self._cluster.wait_for_latest_osdmap()

    def _whole(self) -> str:
        return f"pool {self.settings.pool} as client.{self.settings.user}"


def plain_address(address: str) -> str:
    """An address as ``osd blocklist add`` takes it, and as the lock class names it: without the protocol."""
    return re.sub(r"^(any|v1|v2):", "", address)


def errno_of(error: Any) -> int:
    """Of an error that the binding raised; EIO for one that has none."""
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) else errno.EIO


def _name(error: Any) -> str:
    return errno.errorcode.get(errno_of(error), str(error))
