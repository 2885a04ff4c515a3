"""Sizes as people write and read them: binary units, ``20G`` is 20 × 2³⁰ bytes."""

import re

from archipfs.errors import InvalidSize
from archipfs.types import SIZE_BYTES_MAX

_UNITS = ("", "K", "M", "G", "T", "P", "E")
_SIZE_PATTERN = re.compile(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)\s*(?:([KMGTPE])(?:I?B)?|B)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by ``text``: ``4096``, ``512MiB``, ``20G``, ``1.5T``. Always a positive whole number of bytes.

    Raises ``InvalidSize`` for what is not a number, not positive, not whole, or over 8 EiB.
    """
    match = _SIZE_PATTERN.fullmatch(text.strip())
    if match is None:
        raise InvalidSize(
            f"not a size: {text[:40]!r}; give bytes or a number with K, M, G, T, P or E, like 20G or 512MiB"
        )
    number, unit = match.groups()
    factor = 1024 ** _UNITS.index((unit or "").upper())
    whole, _, fraction = number.partition(".")
    scaled = int(whole + fraction) * factor
    size, rest = divmod(scaled, 10 ** len(fraction))
    if rest:
        raise InvalidSize(f"not a whole number of bytes: {text!r}; give a size in whole bytes")
    return check_size(size)


def check_size(size: int) -> int:
    """``size`` if a volume may be that large as far as numbers go; else ``InvalidSize``."""
    if size <= 0:
        raise InvalidSize(f"size {size} is not positive; give at least one byte, like 20G or 512MiB")
    if size > SIZE_BYTES_MAX:
        raise InvalidSize(f"size {size} is over 8 EiB; give a smaller one")
    return size


def format_size(size: int) -> str:
    """``size`` bytes in the largest binary unit that keeps it at least 1: ``20 GiB``, ``1.5 KiB``, ``17 B``."""
    value = float(size)
    for unit in _UNITS:
        if value < 1024 or unit == "E":
            text = f"{value:.1f}".removesuffix(".0")
            return f"{text} {unit}iB" if unit else f"{size} B"
        value /= 1024
    raise AssertionError("unreachable: the last unit returns")
