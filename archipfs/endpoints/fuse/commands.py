"""What can be had made of a volume through its file: by ioctl, or by setting an attribute. Who may is decided here.

With ``default_permissions`` the kernel compares a file's mode before it asks us anything, but not for an ioctl, and
before an attribute is set it looks at the permission to write only.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from archipfs.compose.composer import Composer, Found
from archipfs.errors import NotFound
from archipfs.map.mapper import Attributes
from archipfs.map.records import VolumeRecord
from archipfs.types import RequestId

CLONE_MODE = 0o600

_READ, _WRITE = 4, 2


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, by the numbers that his request came with."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    """Supplementary ones, as far as they are known."""
    writes: bool = False
    """The kernel has looked, at all his groups: he may write the volume."""
    request: RequestId | None = None
    """The request, if it may come again."""

    def may_write(self, record: VolumeRecord) -> bool:
        return self.writes or self._has(_WRITE, record)

    def may_read(self, record: VolumeRecord) -> bool:
        return self._has(_READ, record) or (self.writes and self._reads_as_writer(record))

    def _has(self, access: int, record: VolumeRecord) -> bool:
        if self.uid == 0:
            return True
        if self.uid == record.uid:
            given = record.mode >> 6
        elif record.gid == self.gid or record.gid in self.groups:
            given = record.mode >> 3
        else:
            given = record.mode
        return bool(given & access)

    def _reads_as_writer(self, record: VolumeRecord) -> bool:
        """Whether everybody who is not the owner and may write may read as well: he is one of them."""
        group, others = record.mode >> 3, record.mode
        return self.uid != record.uid and all(given & _READ or not given & _WRITE for given in (group, others))


def groups_of(pid: int) -> frozenset[int]:
    """The supplementary groups of a process or thread that waits for us; none if it cannot be seen from here."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    line = next((line for line in status.splitlines() if line.startswith("Groups:")), "")
    return frozenset(int(group) for group in line.split()[1:])


def name_of(found: Found) -> str:
    """Raises ``NotFound`` for a volume that was removed."""
    if found.record.name is None:
        raise NotFound(f"the volume {found.record.id} has been removed")
    return found.record.name


def snapshot(composer: Composer, found: Found, name: str, caller: Caller) -> None:
    """Whoever may write a volume may snapshot it. Raises ``PermissionError``, and what the composer raises."""
    called = name_of(found)
    if not caller.may_write(found.record):
        raise _refused(caller, f"snapshot {called}", "write permission")
    composer.snapshot(called, name, request=caller.request)


def clone(composer: Composer, found: Found, name: str, caller: Caller) -> None:
    """The clone is the caller's. He may read the source, and is not a mere reader: those may not make files here.

    Raises ``PermissionError``, and what the composer raises.
    """
    called = name_of(found)
    record = found.record
    if not caller.may_read(record) or not (caller.uid == record.uid or caller.may_write(record)):
        raise _refused(caller, f"clone {called}", "read permission, and to own it or write permission")
    attributes = Attributes(CLONE_MODE, caller.uid, caller.gid)
    composer.clone(called, name, attributes=attributes, request=caller.request)


def _refused(caller: Caller, doing: str, needed: str) -> PermissionError:
    return PermissionError(errno.EACCES, f"user {caller.uid} must not {doing}: it takes {needed}")
