"""The one error tree, and the one table from errors to errnos.

Every message is a single line that says what went wrong, which thing it was, and what to do about it.
An endpoint turns an error into a reply with :func:`errno_of`; the CLI prints ``str(error)`` and leaves with
:func:`exit_code_of`.
"""

import errno


class ArchipError(Exception):
    """The root: anything archipfs raises on purpose. On its own it means "failed" (EIO)."""


class InvalidInput(ArchipError):
    """What the caller gave cannot be meant."""


class InvalidName(InvalidInput):
    """A volume, backend or attribute name breaks the naming rule."""


class InvalidSize(InvalidInput):
    """A size is not a number, not positive, or out of range."""


class InvalidConfig(InvalidInput):
    """The configuration has an unknown key, a wrong type or a missing value."""


class NotFound(ArchipError):
    """There is no volume, backend or attribute of that name."""


class AlreadyExists(ArchipError):
    """The name is taken."""


class Busy(ArchipError):
    """Somebody uses it: an open volume, a mount point, a running daemon."""


class LockHeld(Busy):
    """Another owner holds the volume's lock."""


class ReadOnlyVolume(ArchipError):
    """A snapshot does not change."""


class TooLarge(ArchipError):
    """Beyond what the backend's driver can keep in one data object."""


class NotSupported(ArchipError):
    """The driver, or this step of archipfs, has no such ability."""


class Conflict(ArchipError):
    """A record is not at the version the caller expected; nothing was changed. Read it again."""


class StoreError(ArchipError):
    """The store failed; what the failed call should have changed is either as before or changed."""


class StoreFull(StoreError):
    """No space. Works again once there is some."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, or did not answer in time."""


class StoreAway(StoreUnavailable):
    """Asking again at once is of no use: it did not answer in all the time that it is given, or it was deleted."""


class ShutOut(StoreError):
    """The store takes nothing from this process any more, since somebody has broken a lock that it had."""


class ObjectMissing(StoreError):
    """An object that something refers to is not in the store."""


class ObjectDamaged(StoreError):
    """An object or a record fails its checksum, or its content contradicts itself."""


class FormatTooNew(StoreError):
    """Written by a later archipfs than this one."""


class Fenced(StoreError):
    """Our lock was broken by somebody else: this process never writes to the volume again."""


class DaemonError(ArchipError):
    """The daemon could not be started, reached or understood."""


ERRNOS: dict[type[ArchipError], int] = {
    ArchipError: errno.EIO,
    InvalidInput: errno.EINVAL,
    InvalidName: errno.EINVAL,
    NotFound: errno.ENOENT,
    AlreadyExists: errno.EEXIST,
    Busy: errno.EBUSY,
    ReadOnlyVolume: errno.EROFS,
    TooLarge: errno.EFBIG,
    NotSupported: errno.EOPNOTSUPP,
    Conflict: errno.EBUSY,
    StoreFull: errno.ENOSPC,
}

USAGE_EXIT_CODE = 2
FAILED_EXIT_CODE = 1


def errno_of(error: BaseException) -> int:
    """The errno a kernel reply carries for ``error``: that of its nearest ancestor in the table, else EIO.

    An ``OSError`` from below keeps the errno it came with.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    for cls in type(error).__mro__:
        if issubclass(cls, ArchipError) and cls in ERRNOS:
            return ERRNOS[cls]
    return errno.EIO


def exit_code_of(error: ArchipError) -> int:
    """2 when the input was wrong, 1 when the work failed."""
    return USAGE_EXIT_CODE if isinstance(error, InvalidInput) else FAILED_EXIT_CODE


def from_errno(number: int, doing: str) -> ArchipError:
    """The error for a failed system call or engine call; ``doing`` names the operation and the object."""
    cls = {
        errno.ENOSPC: StoreFull,
        errno.EDQUOT: StoreFull,
        errno.EROFS: ReadOnlyVolume,
        errno.EFBIG: TooLarge,
        errno.EINVAL: InvalidInput,
        errno.EOPNOTSUPP: NotSupported,
        errno.ENOENT: ObjectMissing,
        errno.ESHUTDOWN: ShutOut,
        errno.ESTALE: ObjectMissing,  # NFS: another client has deleted it
    }.get(number, StoreError)
    hint = "free some space in the store and try again" if cls is StoreFull else "see the log of the store's system"
    return cls(f"{doing}: {errno.errorcode.get(number, number)}; {hint}")
