"""Errnos of librados as errors of the tree: the same for both clients."""

import errno
import os

from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Busy,
    FormatTooNew,
    InvalidInput,
    NotSupported,
    ObjectDamaged,
    ObjectMissing,
    ShutOut,
    StoreAway,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)

UNREACHABLE = (
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EAGAIN,
)
_ANSWERS = "check with `ceph status` that the cluster answers"
_ERRORS: dict[int, tuple[type[ArchipError], str]] = {
    errno.ENOENT: (ObjectMissing, "check the store with `archip check`"),
    errno.EEXIST: (AlreadyExists, "use another key"),
    errno.ENOSPC: (StoreFull, "add OSDs or remove something, and try again"),
    errno.EDQUOT: (StoreFull, "raise the pool's quota or remove something, and try again"),
    errno.ESHUTDOWN: (ShutOut, "another node has broken a lock of this one; wait until it has connected again"),
    errno.EBUSY: (Busy, "another owner has it claimed"),
    errno.EFBIG: (TooLarge, "keep it within what the driver can store"),
    errno.EMSGSIZE: (TooLarge, "an object that is written at once is at most osd_max_write_size, 90 MiB by default"),
    errno.EINVAL: (InvalidInput, "this is a bug in the caller, please report it"),
    errno.EOPNOTSUPP: (NotSupported, "use a replicated pool"),
    errno.EACCES: (StoreError, "give the user the capabilities that docs/operations.md names"),
    errno.EPERM: (StoreError, "give the user the capabilities that docs/operations.md names"),
    errno.EBADF: (StoreError, "it was closed, or opened for reading only; open it again"),
    errno.EUCLEAN: (ObjectDamaged, "its header is damaged; check the store with `archip check`"),
    errno.EPROTONOSUPPORT: (FormatTooNew, "it was written by a later archipfs; use that one"),
    errno.ENOPKG: (StoreUnavailable, "apt install librados2"),
}
_ERRORS |= dict.fromkeys(UNREACHABLE, (StoreUnavailable, _ANSWERS))
# librados has asked again and again until then, as long as the backend's options say.
_ERRORS[errno.ETIMEDOUT] = (StoreAway, _ANSWERS)


def store_error(number: int, doing: str) -> ArchipError:
    """The error for an errno; ``doing`` names the operation and the object."""
    cls, hint = _ERRORS.get(number, (StoreError, "see `ceph status` and the log of the OSDs"))
    return cls(f"{doing}: {os.strerror(number)} ({errno.errorcode.get(number, number)}); {hint}")
