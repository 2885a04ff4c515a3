"""The one rule for names of volumes, snapshots and backends, and where a name's entry lies in the store."""

import hashlib

from archipfs.errors import InvalidName
from archipfs.types import NAME_BYTES_MAX


def check_name(name: str) -> str:
    """``name`` if a volume may be called that. Raises ``InvalidName`` with the rule it breaks.

    A name is 1 to 255 bytes of UTF-8 without ``/`` and NUL, and does not begin with a dot.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise InvalidName(f"invalid name {name!r}: not UTF-8; choose another") from None
    if not encoded:
        raise InvalidName("invalid name '': it is empty; give at least one character")
    if len(encoded) > NAME_BYTES_MAX:
        raise InvalidName(f"invalid name {name[:24]!r}…: {len(encoded)} bytes; {NAME_BYTES_MAX} is the most")
    if "/" in name or "\0" in name:
        raise InvalidName(f"invalid name {name!r}: it has a '/' or a NUL; choose another")
    if name.startswith("."):
        raise InvalidName(f"invalid name {name!r}: it begins with a dot; choose another")
    return name


def name_ident(name: str) -> str:
    """What identifies a name's record: 128 bits of BLAKE2b, so that a store key is never user input."""
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
