"""Extended attributes: commands that are set, facts that are read, and whatever users keep there.

One table for each of the first two. Commands are never listed, or ``cp -a`` and rsync would replay them.
"""

import json
import time
from collections.abc import Callable

import msgspec

from archipfs.compose.composer import Composer, Found
from archipfs.compose.describe import describe, describe_lock, origin_of, state_of
from archipfs.endpoints.fuse.commands import Caller, clone, name_of, snapshot
from archipfs.errors import InvalidInput, NotSupported, StoreFull
from archipfs.map.records import VolumeRecord

PREFIX = "user.archip."
USER_PREFIX = "user."
USER_BYTES_MAX = 64 << 10
"""Of all the user's attributes of one volume together: they are part of its record."""

Command = Callable[[Composer, Found, str, Caller], None]
Fact = Callable[[Composer, Found], str]


def _rollback(composer: Composer, found: Found, value: str, caller: Caller) -> None:
    composer.rollback(name_of(found), value, request=caller.request)


def _lock(composer: Composer, found: Found, value: str, caller: Caller) -> None:
    if value:
        raise InvalidInput(f"{PREFIX}lock takes no value, not {value!r}; set it to an empty one")
    composer.lock(name_of(found))


def _unlock(composer: Composer, found: Found, value: str, caller: Caller) -> None:
    if value not in ("", "force"):
        raise InvalidInput(f"{PREFIX}unlock takes no value or 'force', not {value!r}")
    composer.unlock(name_of(found), force=value == "force")


def _seal(composer: Composer, found: Found, value: str, caller: Caller) -> None:
    if value not in ("", "live"):
        raise InvalidInput(f"{PREFIX}seal takes no value or 'live', not {value!r}")
    composer.seal(name_of(found), live=value == "live")


COMMANDS: dict[str, Command] = {
    "snapshot": snapshot,
    "clone": clone,
    "rollback": _rollback,
    "lock": _lock,
    "unlock": _unlock,
    "seal": _seal,
}


def _info(composer: Composer, found: Found) -> str:
    return json.dumps(describe(composer, found))


def _held(composer: Composer, found: Found) -> str:
    lock = composer.lock_of(found)
    return json.dumps(describe_lock(lock)) if lock is not None else ""


FACTS: dict[str, Fact] = {
    "info": _info,
    "uuid": lambda composer, found: found.record.id,
    "kind": lambda composer, found: found.record.kind.value,
    "parent": lambda composer, found: origin_of(found) or "",
    "lock": _held,
    "state": state_of,
}


def is_ours(name: str) -> bool:
    return name.startswith(PREFIX)


def get(composer: Composer, found: Found, name: str) -> bytes | None:
    """The attribute's value, or ``None`` if there is none of that name."""
    if is_ours(name):
        fact = FACTS.get(name.removeprefix(PREFIX))
        return fact(composer, found).encode() if fact is not None else None
    return found.record.xattrs.get(name)


def set_(composer: Composer, found: Found, name: str, value: bytes, caller: Caller) -> None:
    """Carry out a command, or keep a user's attribute.

    Raises ``InvalidInput`` for an unknown command, ``NotSupported`` for other than ``user.*``, ``StoreFull`` for too
    much of them, and what the command raises.
    """
    if is_ours(name):
        command = COMMANDS.get(name.removeprefix(PREFIX))
        if command is None:
            known = ", ".join(PREFIX + command for command in COMMANDS)
            raise InvalidInput(f"unknown command {name} on {found.record.name}; the commands are {known}")
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the value of {name} is not UTF-8: {value[:40]!r}") from error
        command(composer, found, text, caller)
        return
    if not name.startswith(USER_PREFIX):
        raise NotSupported(f"attribute {name} of {found.record.name}: only user.* attributes are kept")

    def with_attribute(record: VolumeRecord) -> VolumeRecord:
        xattrs = {**record.xattrs, name: value}
        if sum(len(key) + len(kept) for key, kept in xattrs.items()) > USER_BYTES_MAX:
            raise StoreFull(f"attributes of {record.name} would exceed {USER_BYTES_MAX} bytes; remove some")
        return msgspec.structs.replace(record, xattrs=xattrs, ctime_ns=time.time_ns())

    composer.set_attributes(found.record.id, with_attribute)


def remove(composer: Composer, found: Found, name: str) -> bool:
    """Whether there was such an attribute of the user's."""
    if name not in found.record.xattrs:
        return False
    composer.set_attributes(
        found.record.id,
        lambda record: msgspec.structs.replace(
            record,
            xattrs={key: value for key, value in record.xattrs.items() if key != name},
            ctime_ns=time.time_ns(),
        ),
    )
    return True
