"""A lock broken on a store that shuts nobody out: what the old owner had under way comes late, and overwrites nothing.

The old head's objects are written to behind everybody's back, with all that an owner could have had under way.
"""

import pytest

from archipfs.blockers.contract import DataObject
from archipfs.blockers.fault import FaultPlan, Moment
from archipfs.compose.composer import Composer
from archipfs.map.check import Severity
from archipfs.map.mapper import bitmap_key, data_key
from archipfs.types import SECTOR_BYTES, LayerId
from tests.compose.world import World, content_of, crashing, fill, pattern

SECTORS = 64
SIZE = SECTORS * SECTOR_BYTES
JUNK = b"\xa5"
BITMAP_PAGE = 4096


class Late:
    """Whoever still writes to a head."""

    def __init__(self, world: World, head: LayerId) -> None:
        self._data = world.store.open_data(data_key(head), writable=True)
        self._bitmap = world.store.open_data(bitmap_key(head), writable=True)

    def write_data(self) -> None:
        self._data.pwrite(0, JUNK * 2 * SIZE)

    def write_bits(self, page: bytes) -> None:
        """A page of the bitmap as the old owner has it in memory."""
        self._bitmap.pwrite(BITMAP_PAGE, page)

    def punch(self) -> None:
        self._data.punch(0, SIZE)

    def close(self) -> None:
        both: tuple[DataObject, ...] = (self._data, self._bitmap)
        for data in both:
            data.close()


@pytest.fixture
def broken(world: World) -> tuple[Composer, Late]:
    """The second node, after it broke the lock of vm1, which the first one has flushed sector 0 of."""
    one, two = world.composer(host="one"), world.composer(host="two")
    one.create("vm1", SIZE)
    opened = one.open(one.find("vm1"))
    opened.write(0, pattern(1))
    opened.flush()
    late = Late(world, opened.record.layer)
    two.unlock("vm1", force=True)
    assert one.verify_leases() == [opened.id]
    return two, late


@pytest.mark.parametrize("closes", [False, True], ids=["open", "closed in between"])
def test_nothing_that_arrives_late_overwrites_what_the_new_owner_has_flushed(
    broken: tuple[Composer, Late], closes: bool
) -> None:
    two, late = broken
    opened = two.open(two.find("vm1"))
    opened.write(SECTOR_BYTES, pattern(2, 3))
    opened.discard(8 * SECTOR_BYTES, SECTOR_BYTES)
    opened.flush()
    if closes:
        two.release(opened)
        opened = two.open(two.find("vm1"))
    late.write_data()
    late.write_bits(bytes(BITMAP_PAGE))  # takes away the bits of all that was written since
    assert opened.read(SECTOR_BYTES, 3 * SECTOR_BYTES) == pattern(2, 3)
    late.write_bits(b"\xff" * BITMAP_PAGE)
    late.punch()
    late.write_data()
    two.release(opened)
    late.close()
    content = content_of(two, "vm1")
    assert content[SECTOR_BYTES : 4 * SECTOR_BYTES] == pattern(2, 3)
    assert content[8 * SECTOR_BYTES : 9 * SECTOR_BYTES] == bytes(SECTOR_BYTES)


def test_what_was_flushed_before_the_break_is_there(broken: tuple[Composer, Late]) -> None:
    two, _ = broken
    assert content_of(two, "vm1")[:SECTOR_BYTES] == pattern(1)


def test_what_arrives_late_beyond_the_end_never_comes_to_light(broken: tuple[Composer, Late]) -> None:
    two, late = broken
    fill(two, "vm1", pattern(2))
    late.write_data()
    late.write_bits(b"\xff" * BITMAP_PAGE)
    two.resize(two.find("vm1"), 2 * SIZE)
    assert content_of(two, "vm1")[SIZE:] == bytes(SIZE)
    two.snapshot("vm1", "monday")
    assert content_of(two, "monday")[SIZE:] == bytes(SIZE)


def test_what_the_volume_did_not_show_of_its_parent_stays_hidden(world: World) -> None:
    one, two = world.composer(host="one"), world.composer(host="two")
    one.create("vm1", SIZE)
    fill(one, "vm1", pattern(1, SECTORS))
    one.snapshot("vm1", "monday")
    one.resize(one.find("vm1"), SIZE // 2)
    opened = one.open(one.find("vm1"))
    two.unlock("vm1", force=True)
    one.verify_leases()
    two.resize(two.find("vm1"), SIZE)
    assert content_of(two, "vm1") == pattern(1, SECTORS // 2) + bytes(SIZE // 2)
    assert opened.fenced


def test_once_sealed_what_arrives_late_is_not_even_seen(broken: tuple[Composer, Late]) -> None:
    two, late = broken
    fill(two, "vm1", pattern(2), SECTOR_BYTES)
    two.seal("vm1")
    content = content_of(two, "vm1")
    late.write_data()
    late.write_bits(b"\xff" * BITMAP_PAGE)
    assert content_of(two, "vm1") == content


def test_a_head_is_put_on_top_once(broken: tuple[Composer, Late]) -> None:
    two, _ = broken
    fill(two, "vm1", pattern(2))
    head = two.find("vm1").record.layer
    fill(two, "vm1", pattern(3))
    assert two.find("vm1").record.layer == head


def test_a_crash_while_the_head_is_put_on_top_leaves_a_volume_that_opens(world: World) -> None:
    for crash_at in range(1, 40):
        here = World(world.directory / str(crash_at))
        one, two = here.composer(host="one"), here.composer(host="two")
        one.create("vm1", SIZE)
        opened = one.open(one.find("vm1"))
        opened.write(0, pattern(1))
        opened.flush()
        late = Late(here, opened.record.layer)
        two.unlock("vm1", force=True)
        blocker = here.mortal(FaultPlan(crash_at=crash_at, moment=Moment.AFTER), host="two")
        dying = here.composer(blocker, host="two")
        with crashing(dying):
            fill(dying, "vm1", pattern(2), SECTOR_BYTES)
        blocker.crash()
        blocker.bury()
        following = here.recovered(host="two")
        fill(following, "vm1", pattern(3), 2 * SECTOR_BYTES)
        late.write_bits(bytes(BITMAP_PAGE))
        assert content_of(following, "vm1")[2 * SECTOR_BYTES : 3 * SECTOR_BYTES] == pattern(3)
        assert not [found for found in here.check() if found.severity is Severity.ERROR]
        if blocker.calls < crash_at:
            break
    assert 5 < crash_at < 39
