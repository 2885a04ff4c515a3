"""Ordered streams of stamped writes, and what may be found of them after a snapshot, a kill or a power failure.

A stream owns a range of a volume, cut into slots. Its write number n goes to slot ``place(n)`` and fills it with stamps
that say so; number n + 1 begins after n was acknowledged. So for any number m it is known what every slot holds once
the first m writes have happened, and the content of a range tells which m that is.
"""

import os
import struct
import threading
from dataclasses import dataclass, field

from archipfs.types import SECTOR_BYTES

_UNIT = struct.Struct("<8sQQQ")
_STEP = 7919
"""A prime: with a number of slots that it does not divide, consecutive writes visit all slots, far from each other."""


@dataclass
class Stream:
    ident: int
    offset: int
    slots: int
    slot_bytes: int = SECTOR_BYTES
    """A multiple of 512: parts of sectors, or some sectors at once."""
    issued: int = 0
    acknowledged: int = 0
    durable: int = 0
    """The last write that a flush which returned has covered."""
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        assert self.slots % _STEP, "every slot is to be visited"
        assert self.offset % SECTOR_BYTES == 0, "a sector belongs to one stream"
        self._back = pow(_STEP, -1, self.slots)

    @property
    def end(self) -> int:
        return self.offset + -(-self.slots * self.slot_bytes // SECTOR_BYTES) * SECTOR_BYTES

    # Writing

    def write(self, descriptor: int) -> None:
        """The next write. Several threads may take turns."""
        with self._turn:
            number = self.issued + 1
            slot = self.place(number)
            data = self.stamps(slot, number)
            self.issued = number
            written = os.pwrite(descriptor, data, self.offset + slot * self.slot_bytes)
            assert written == len(data), f"wrote {written} of {len(data)} bytes"
            self.acknowledged = number

    def flush(self, descriptor: int) -> None:
        covered = self.acknowledged
        os.fsync(descriptor)
        with self._turn:
            self.durable = max(self.durable, covered)

    def repeat(self, descriptor: int) -> None:
        """The last write once more: what nobody acknowledged may be there in part, sector by sector."""
        with self._turn:
            slot = self.place(self.issued)
            data = self.stamps(slot, self.issued)
            assert os.pwrite(descriptor, data, self.offset + slot * self.slot_bytes) == len(data)
            self.acknowledged = self.issued

    def restart(self, found: int) -> None:
        """Go on behind a crash that left the first ``found`` writes, all of which are durable by now."""
        self.issued = self.acknowledged = self.durable = found

    # Expecting

    def place(self, number: int) -> int:
        return number * _STEP % self.slots

    def last_in(self, slot: int, number: int) -> int:
        """The last write to the slot among the first ``number``, 0 if there is none."""
        first = slot * self._back % self.slots or self.slots
        return 0 if first > number else first + (number - first) // self.slots * self.slots

    def stamps(self, slot: int, number: int) -> bytes:
        return _UNIT.pack(b"archipfs", self.ident, slot, number) * (self.slot_bytes // _UNIT.size)

    def expect_prefix(self, content: bytes, at_least: int, at_most: int) -> int:
        """The range holds the first m writes and nothing else; returns m, which is within the bounds."""
        found = [number for slot in range(self.slots) for _, number in self._numbers(content, slot)]
        last = max(found)
        assert at_least <= last <= at_most, f"stream {self.ident}: {last} writes, not {at_least} to {at_most}"
        for slot in range(self.slots):
            wanted = self.last_in(slot, last)
            for position, number in self._numbers(content, slot):
                assert number == wanted, (
                    f"stream {self.ident}, slot {slot} at byte {position}: write {number} instead of {wanted}, "
                    f"among the first {last}"
                )
        return last

    def expect_survivors(self, content: bytes, at_least: int, at_most: int) -> int:
        """Every sector is as after some number of writes within the bounds, each sector for itself.

        Returns the last write that is found.
        """
        newest = 0
        for slots in self._slots_by_sector():
            numbers = [(slot, *found) for slot in slots for found in self._numbers(content, slot)]
            sectors = {position // SECTOR_BYTES for _, position, _ in numbers}
            for sector in sectors:
                within = [(slot, number) for slot, at, number in numbers if at // SECTOR_BYTES == sector]
                last = max(number for _, number in within)
                newest = max(newest, last)
                for slot, number in within:
                    which = f"stream {self.ident}, slot {slot}, sector {sector}"
                    least, most = self.last_in(slot, at_least), self.last_in(slot, at_most)
                    assert least <= number <= most, f"{which}: write {number}, not {least} to {most}"
                    wanted = self.last_in(slot, last)
                    assert number == wanted, f"{which}: write {number} instead of {wanted} beside write {last}"
        return newest

    def _slots_by_sector(self) -> list[range]:
        each = max(1, SECTOR_BYTES // self.slot_bytes)
        return [range(first, min(first + each, self.slots)) for first in range(0, self.slots, each)]

    def _numbers(self, content: bytes, slot: int) -> list[tuple[int, int]]:
        """Position and number of what is in the slot, for each sector that it touches."""
        start = self.offset + slot * self.slot_bytes
        piece_bytes = min(SECTOR_BYTES, self.slot_bytes)
        return [
            (start + done, self._number(content[start + done : start + done + piece_bytes], slot))
            for done in range(0, self.slot_bytes, piece_bytes)
        ]

    def _number(self, piece: bytes, slot: int) -> int:
        if not piece.strip(b"\0"):
            return 0
        magic, ident, place, number = _UNIT.unpack_from(piece)
        where = f"stream {self.ident}, slot {slot}"
        assert (magic, ident, place) == (b"archipfs", self.ident, slot), f"{where} holds {piece[:32]!r}"
        assert piece == piece[: _UNIT.size] * (len(piece) // _UNIT.size), f"{where} is torn: {number} and other things"
        return int(number)


def streams_of(
    volume_bytes: int, count: int, slots: int, slot_sizes: tuple[int, ...] = (SECTOR_BYTES,)
) -> list[Stream]:
    """``count`` streams beside each other, with the slot sizes in turn, which have to fit."""
    made: list[Stream] = []
    offset = 0
    for ident in range(1, count + 1):
        made.append(Stream(ident, offset, slots, slot_sizes[(ident - 1) % len(slot_sizes)]))
        offset = made[-1].end
    assert offset <= volume_bytes, f"{offset} bytes do not fit into {volume_bytes}"
    return made
