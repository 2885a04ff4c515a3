"""The southbound contract: what a store must do, in three kinds of things.

A *blocker* is synchronous and thread-safe: any method may be called from any thread at any time, and different
objects never wait for each other. Callers keep it off the event loop.

=====================  ==========================================================  ==========================
kind                   what it is for                                              how it changes
=====================  ==========================================================  ==========================
immutable object       packs                                                       never, once put
data object            a layer's bytes and its bitmap                              in place, durable on flush
record                 volumes, layers, names, locks                               compare-and-swap
=====================  ==========================================================  ==========================

Keys are ``kind/ident``: lower-case letters, digits, ``-``, ``.`` and one slash, 200 bytes at most; idents carry uuids
or hashes, never what a user typed. A data object's key is not used again after its delete.

Missing things: ``get_record`` returns ``None``; everything else raises ``ObjectMissing``, except that deleting what is
not there succeeds (so that a delete may be repeated). ``StoreFull`` is raised for no space and ``StoreUnavailable`` for
a store that cannot be reached; any other failure is a ``StoreError``.

Retries: every call may be repeated after a ``StoreError``, with three exceptions. ``put_record`` and ``delete_record``
may have taken effect although they raised: read the record before deciding. ``create_data`` may have left the empty
object: repeating it can raise ``AlreadyExists``. ``flush`` must not be repeated: see there. (The ``retry`` wrapper
knows all three.) ``Conflict``, ``AlreadyExists``, ``ObjectMissing`` and ``InvalidInput`` mean that nothing was changed.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from archipfs.errors import InvalidInput, NotSupported, ShutOut

KEY_BYTES_MAX = 200
KEY_PATTERN = re.compile(r"[a-z0-9][a-z0-9.-]*/[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True, slots=True)
class Record:
    """A record as stored.

    ``version`` grows with every change of this key, and is never used twice for it, not even when the record is deleted
    and made again. It means nothing else: the step from one to the next is the driver's affair.
    """

    value: bytes
    version: int


@dataclass(frozen=True, slots=True)
class VersionPaths:
    """A record is at a version if nothing is at ``following`` and, looked for after that, something at ``present``.

    Both are needed: only for a moment, or after a crash, are old and new version there together; and once the new one
    is replaced in its turn, neither is.
    """

    present: str
    following: str


@dataclass(frozen=True, slots=True)
class Space:
    """Room in the store, in bytes. A driver that cannot know reports zeros."""

    total_bytes: int
    free_bytes: int
    available_bytes: int
    """Free for us: less than ``free_bytes`` where the file system reserves some."""


class DataObject(ABC):
    """An open sparse object, written in place. Several may be open on one object at once, in several processes.

    A negative offset, length or size is ``InvalidInput``; an end beyond ``Blocker.data_bytes_max`` is ``TooLarge``.
    Changing one that was opened for reading, or using one that was closed, is a ``StoreError``.
    """

    @abstractmethod
    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes; holes and what lies beyond the end read as zeros."""

    @abstractmethod
    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data``, growing the object where needed.

        On return it is visible to every reader but durable only after ``flush``. After an error any part of it may
        have been written. A crash before the flush leaves each sector old or new.
        """

    @abstractmethod
    def punch(self, offset: int, length: int) -> None:
        """Make the range read as zeros and give its space back. Never changes the size. Durable after ``flush``."""

    @abstractmethod
    def truncate(self, size: int) -> None:
        """Cut or extend (with a hole) to ``size`` bytes. Durable after ``flush``."""

    @abstractmethod
    def flush(self) -> None:
        """Everything that returned before this call is durable when it returns.

        After an error nobody knows what is: the object must not be trusted until it is opened again, and what was
        not flushed before is lost or not, sector by sector.
        """

    @abstractmethod
    def size(self) -> int:
        """Bytes from the start to the end of the object, holes included."""

    @abstractmethod
    def allocated(self) -> int:
        """Bytes it takes in the store; ``size()`` where the driver cannot know."""

    @abstractmethod
    def next_data(self, offset: int) -> int | None:
        """The first offset at or after ``offset`` that may hold more than a hole, ``None`` if there is none."""

    @abstractmethod
    def next_hole(self, offset: int) -> int:
        """The first offset at or after ``offset`` that lies in a hole; from the object's end on, all is one."""

    def fileno(self) -> int | None:
        """A file descriptor that means the same object, for the engine to use directly, or ``None``."""
        return None

    def native(self) -> int | None:
        """The address of a ``struct ae_object`` (object.h) that means the same object, for the engine to call without
        coming through Python, or ``None``.

        What stands there is copied at once, and its ``close`` called once, whatever happens to this object.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of it, without making anything durable. Closing twice is allowed."""


class Blocker(ABC):
    """One backend's store."""

    # Immutable objects

    @abstractmethod
    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        """Store an immutable object: durable, and visible whole or not at all. Putting the same again succeeds.

        Several pieces are stored one behind the other, so that nobody needs a second copy to join them.
        """

    @abstractmethod
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """A range of it in bytes (to its end for ``None``); less than ``length`` where it ends before."""

    @abstractmethod
    def open(self, key: str) -> DataObject:
        """Open one for reading, at once or piece by piece. Raises ``ObjectMissing``.

        Changing it is a ``StoreError``. When it is deleted, those who have it open go on reading it or get
        ``ObjectMissing``, never other bytes.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether it is there."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove it, durably."""

    @abstractmethod
    def list(self, kind: str) -> Iterator[str]:
        """Keys of all immutable objects of a kind, in no order. What comes or goes meanwhile may be in it or not."""

    @property
    @abstractmethod
    def pack_bytes(self) -> int:
        """How large an immutable object should be that may be of any size: the driver's wish, not a bound."""

    # Data objects

    @abstractmethod
    def create_data(self, key: str) -> DataObject:
        """An empty data object, durable in its emptiness. ``AlreadyExists`` if there is one."""

    @abstractmethod
    def open_data(self, key: str, *, writable: bool, claim: str | None = None) -> DataObject:
        """Open one that exists. ``claim``: under which it is written; it must have been made, see :meth:`claim`."""

    @abstractmethod
    def delete_data(self, key: str) -> None:
        """Remove it, durably.

        Those who have it open go on reading it or get ``ObjectMissing``, never other bytes, unless somebody still
        writes to it.
        """

    @abstractmethod
    def list_data(self, kind: str) -> Iterator[str]:
        """Keys of all data objects of a kind, in no order. What a ``delete_data`` that was cut short has left of one is
        among them, though nobody can open it: so that somebody deletes it again."""

    @property
    def keeps_deleted(self) -> bool:
        """Whether a data object that is deleted stays for those who have it open, wherever they are, until they close
        it. Where it does not, their calls raise ``ObjectMissing``, and never give zeros for what was there."""
        return False

    @property
    @abstractmethod
    def data_bytes_max(self) -> int:
        """The largest size a data object can have. Larger is ``TooLarge``, or works, as the store under it will."""

    # Records

    @abstractmethod
    def get_record(self, key: str) -> Record | None:
        """The newest version, or ``None``.

        It may be one whose ``put_record`` is just under way, and so a moment before it is durable.
        """

    @abstractmethod
    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        """Replace the version ``expected`` (``None``: there must be no record) and return the new version.

        Durable and atomic: a reader sees the old or the new value. Raises ``Conflict``, and changes nothing, if the
        record is at another version; of several racing callers exactly one wins.
        """

    @abstractmethod
    def delete_record(self, key: str, expected: int) -> None:
        """Remove the version ``expected``, durably. ``Conflict`` if it is at another one; nothing if it is gone."""

    @abstractmethod
    def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
        """All records of a kind with their values, in no order."""

    def version_paths(self, key: str, version: int) -> VersionPaths | None:
        """How to see with two system calls that the record is still at that version; ``None`` where the driver has no
        such way."""
        return None

    # Claims: how a store that knows its clients shuts one out

    @property
    def shuts_out(self) -> bool:
        """Whether claims mean anything here. Where they do not, the calls on them do nothing."""
        return False

    def claim(self, key: str, owner: str) -> None:  # noqa: B027  # a store without clients has nothing to do
        """Say that ``owner`` changes, from this process, what the record ``key`` is the lock of.

        Called once the record says that we are that owner; so whoever else has it claimed, another owner or this one's
        process of before, is not any more, and is shut out first. Claiming again what we have changes nothing. Raises
        ``StoreUnavailable``: nobody knows whether it is claimed, and it may be claimed again or given up.
        """

    def disclaim(self, key: str) -> None:  # noqa: B027
        """Give the claim up, if we have it. Calls under way on what was opened under it fail."""

    def shut_out(self, key: str) -> None:  # noqa: B027
        """From its return on, nothing that those who have it claimed have sent or will send has any effect.

        They lose all that they have claimed in this store, and get it back by :meth:`reconnect`. Nothing happens to us:
        if it is we who have it, that is ``InvalidInput``.
        """

    @property
    def is_shut_out(self) -> bool:
        """Whether somebody has shut us out. Then every call raises ``ShutOut``, except calls on data objects that were
        opened under a claim: those wait until it is claimed anew, or given up, and fail with EIO in the latter case."""
        return False

    def while_shut_out(self, wait: Callable[[ShutOut], None]) -> None:  # noqa: B027
        """Have a call that would raise ``ShutOut`` run ``wait`` instead, and be repeated once that returns.

        ``wait`` raises what it is given, or another error, if the call is to fail after all. It is the ``retry``
        wrapper that does this.
        """

    def reconnect(self) -> "Blocker":
        """The same store by a new client of it, without any claims, beside this one, which stays as it is.

        For whoever was shut out to see what he still has a right to. :meth:`adopt` ends it.
        """
        raise NotSupported(f"{self.describe()} never shuts anybody out; this is a bug, please report it")

    def adopt(self, successor: "Blocker") -> None:
        """Go on as ``successor``, which ``reconnect`` returned. Claims are still to be made anew, or given up."""
        raise NotSupported(f"{self.describe()} never shuts anybody out; this is a bug, please report it")

    # The whole

    @abstractmethod
    def space(self) -> Space:
        """Room in the store now."""

    def relieve(self) -> bool:
        """Give up the room that is kept back so that things can be removed from a full store; whether there was any.

        It is kept back anew once something was deleted. A store that cannot be full in that way keeps none.
        """
        return False

    @abstractmethod
    def describe(self) -> str:
        """Where it is, for people: a path, a pool."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store."""


def check_key(key: str) -> tuple[str, str]:
    """Split a key into kind and ident. Raises ``InvalidInput`` for anything that is not a key."""
    if len(key) > KEY_BYTES_MAX or not KEY_PATTERN.fullmatch(key):
        raise InvalidInput(f"not a store key: {key!r}; this is a bug in the caller, please report it")
    kind, ident = key.split("/")
    return kind, ident


def check_kind(kind: str) -> None:
    """Raises ``InvalidInput`` for what cannot stand before the slash of a key."""
    check_key(f"{kind}/0")


def check_range(offset: int, length: int = 0) -> None:
    """Raises ``InvalidInput`` for a range of bytes that begins or ends before it can."""
    if offset < 0 or length < 0:
        raise InvalidInput(
            f"not a range: offset {offset}, length {length}; this is a bug in the caller, please report it"
        )
