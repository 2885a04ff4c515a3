"""Packs as bytes: there and back, every byte of the head guarded, and no index that contradicts itself believed."""

import hashlib
import struct
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from archipfs.errors import ArchipError, FormatTooNew, InvalidInput, ObjectDamaged
from archipfs.map.packs import HEADER_BYTES, RAW_BYTES_MAX, Coding, Entry, Kind, PackBuilder, index_bytes, parse
from archipfs.types import SECTOR_BYTES, Digest, PackId

NODE = "0123456789abcdef" * 2
CREATED_NS = 1_700_000_000_123_456_789

Thing = tuple[Kind, Coding, int, bytes]
"""Kind, coding, raw bytes, and the stored bytes."""

things = st.one_of(
    st.builds(
        lambda sectors, fill: (Kind.CHUNK, Coding.RAW, sectors * SECTOR_BYTES, bytes([fill]) * sectors * SECTOR_BYTES),
        st.integers(1, 3),
        st.integers(0, 255),
    ),
    st.builds(
        lambda sectors, stored: (Kind.CHUNK, Coding.ZSTD, sectors * SECTOR_BYTES, stored),
        st.integers(1, 128),
        st.binary(min_size=1, max_size=50),
    ),
    st.binary(min_size=1, max_size=50).map(lambda stored: (Kind.PAGE, Coding.RAW, len(stored), stored)),
    st.builds(
        lambda raw, stored: (Kind.PAGE, Coding.ZSTD, max(raw, len(stored)), stored),
        st.integers(1, RAW_BYTES_MAX),
        st.binary(min_size=1, max_size=50),
    ),
)
digest_sizes = st.sampled_from([16, 32])


def named(index: int, digest_bytes: int) -> Digest:
    return Digest(hashlib.sha256(str(index).encode()).digest()[:digest_bytes])


def built(content: list[Thing], digest_bytes: int = 32) -> tuple[PackId, bytes]:
    builder = PackBuilder(digest_bytes, NODE, CREATED_NS)
    for index, thing in enumerate(content):
        builder.add(named(index, digest_bytes), *thing)
    pack, value = builder.build()
    assert len(value) == builder.stored_bytes or not content
    return pack, value


def head_of(value: bytes) -> bytes:
    return value[: index_bytes(value[:HEADER_BYTES])]


SMALL = built(
    [
        (Kind.PAGE, Coding.RAW, 5, b"page!"),
        (Kind.CHUNK, Coding.RAW, SECTOR_BYTES, b"c" * SECTOR_BYTES),
        (Kind.CHUNK, Coding.ZSTD, 2 * SECTOR_BYTES, b"compressed"),
    ],
    16,
)
ENTRIES = HEADER_BYTES
"""Where the index begins; the entries of ``SMALL`` are a raw chunk, the page, a compressed chunk."""


@given(st.lists(things, max_size=100), digest_sizes)
def test_there_and_back(content: list[Thing], digest_bytes: int) -> None:
    pack, value = built(content, digest_bytes)
    index = parse(pack, head_of(value))
    assert (index.id, index.node, index.created_ns, index.total_bytes) == (pack, NODE, CREATED_NS, len(value))
    found = {
        entry.digest: (
            entry.kind,
            entry.coding,
            entry.raw_bytes,
            value[entry.offset : entry.offset + entry.stored_bytes],
        )
        for entry in index.entries
    }
    assert found == {named(number, digest_bytes): thing for number, thing in enumerate(content)}


@given(st.lists(things, max_size=100))
def test_data_begins_behind_the_head_and_raw_chunks_lie_on_sector_borders(content: list[Thing]) -> None:
    pack, value = built(content)
    head = head_of(value)
    assert len(head) % SECTOR_BYTES == 0
    place = len(head)
    for entry in parse(pack, head).entries:
        assert entry.offset == place
        assert (entry.kind, entry.coding) != (Kind.CHUNK, Coding.RAW) or place % SECTOR_BYTES == 0
        place += entry.stored_bytes
    assert place == len(value)


@pytest.mark.parametrize("entries", [0, 1, 84, 85, 86, 170, 171])
def test_the_head_has_room_for_the_index_and_no_more_than_a_sector_too_much(entries: int) -> None:
    pack, value = built([(Kind.PAGE, Coding.RAW, 1, b"p")] * entries)
    assert index_bytes(value[:HEADER_BYTES]) == HEADER_BYTES + -(-entries * 48 // SECTOR_BYTES) * SECTOR_BYTES
    assert len(parse(pack, head_of(value)).entries) == entries


def test_a_builder_without_anything_says_so() -> None:
    assert PackBuilder(32, NODE, CREATED_NS).stored_bytes == 0


def test_what_is_added_is_copied() -> None:
    builder = PackBuilder(32, NODE, CREATED_NS)
    data = bytearray(b"a" * SECTOR_BYTES)
    builder.add(named(0, 32), Kind.CHUNK, Coding.RAW, SECTOR_BYTES, memoryview(data))
    data[:] = b"b" * SECTOR_BYTES
    _, value = builder.build()
    assert value.endswith(b"a" * SECTOR_BYTES)


def test_the_name_stands_for_the_digests() -> None:
    one = PackBuilder(32, NODE, CREATED_NS)
    one.add(named(1, 32), Kind.PAGE, Coding.RAW, 4, b"page")
    other = PackBuilder(32, NODE, CREATED_NS)
    other.add(named(2, 32), Kind.PAGE, Coding.RAW, 4, b"page")
    assert one.build()[0] != other.build()[0]
    assert one.build() == one.build()


@pytest.mark.parametrize("node", ["", "node", NODE[:-2], NODE + "00", "g" * 32])
def test_a_node_that_is_none_is_refused(node: str) -> None:
    with pytest.raises(InvalidInput, match="32 hexadecimal digits"):
        PackBuilder(32, node, CREATED_NS)


@pytest.mark.parametrize(
    "thing",
    [
        (Kind.CHUNK, Coding.RAW, 100, b"c" * 100),
        (Kind.CHUNK, Coding.RAW, SECTOR_BYTES, b"c"),
        (Kind.CHUNK, Coding.RAW, RAW_BYTES_MAX + SECTOR_BYTES, bytes(RAW_BYTES_MAX + SECTOR_BYTES)),
        (Kind.PAGE, Coding.RAW, 0, b""),
        (Kind.PAGE, Coding.ZSTD, 5, b""),
    ],
)
def test_what_no_reader_would_believe_is_a_bug_of_the_caller(thing: Thing) -> None:
    with pytest.raises(AssertionError):
        built([thing])


def test_every_changed_byte_of_the_head_is_noticed() -> None:
    pack, value = SMALL
    head = head_of(value)
    for place in range(len(head)):
        for flipped in (0x01, 0x80, 0xFF):
            changed = bytearray(head)
            changed[place] ^= flipped
            with pytest.raises((ObjectDamaged, FormatTooNew)):
                parse(pack, bytes(changed))


def test_every_truncation_and_every_trailing_byte_of_the_head_is_noticed() -> None:
    pack, value = SMALL
    head = head_of(value)
    for length in range(len(head)):
        with pytest.raises(ObjectDamaged):
            parse(pack, head[:length])
    for trailing in (b"\0", bytes(SECTOR_BYTES), head):
        with pytest.raises(ObjectDamaged):
            parse(pack, head + trailing)


@given(st.lists(things, max_size=20), st.data())
def test_damage_is_noticed(content: list[Thing], data: st.DataObject) -> None:
    """Any piece of a head replaced by any other."""
    pack, value = built(content)
    head = head_of(value)
    begin = data.draw(st.integers(0, len(head)))
    end = data.draw(st.integers(begin, len(head)))
    changed = head[:begin] + data.draw(st.binary(max_size=60)) + head[end:]
    try:
        assert parse(pack, changed) == parse(pack, head)
    except (ObjectDamaged, FormatTooNew):
        assert changed != head
    else:
        assert changed == head


@given(st.binary(max_size=100))
def test_nonsense_is_damage(start: bytes) -> None:
    for content in (start, start.ljust(HEADER_BYTES, b"\0"), (b"archpack" + start).ljust(HEADER_BYTES, b"\0")):
        with pytest.raises((ObjectDamaged, FormatTooNew)) as caught:
            parse(PackId("0" * 64), content)
        assert "\n" not in str(caught.value)


def test_the_head_of_another_pack_is_damage() -> None:
    (pack, _), (_, value) = SMALL, built([])
    with pytest.raises(ObjectDamaged, match="another pack"):
        parse(pack, head_of(value))


def signed(value: bytes, change: Callable[[bytearray], None]) -> tuple[PackId, bytes]:
    """The head of ``value``, changed, with a checksum and a name that are right for it."""
    head = bytearray(head_of(value))
    change(head)
    struct.pack_into("<Q", head, 64, 0)
    struct.pack_into("<Q", head, 64, xxhash.xxh3_64_intdigest(head))
    return PackId(hashlib.blake2b(head, digest_size=32).hexdigest()), bytes(head)


def put(layout: str, place: int, *numbers: int) -> Callable[[bytearray], None]:
    return lambda head: struct.pack_into(layout, head, place, *numbers)


def test_what_is_signed_here_is_believed_if_nothing_is_changed() -> None:
    pack, value = SMALL
    assert signed(value, lambda head: None) == (pack, head_of(value))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("version 0", put("<I", 8, 0)),
        ("no digest", put("<I", 12, 0)),
        ("a digest too long", put("<I", 12, 33)),
        ("a digest that leaves zeros out", put("<I", 12, 15)),
        ("something behind a digest", put("<B", ENTRIES + 31, 1)),
        ("an entry less", put("<I", 16, 2)),
        ("an entry more", put("<I", 16, 4)),
        ("more entries than there is room for", put("<I", 16, 1000)),
        ("the reserved field", put("<I", 20, 1)),
        ("a size too small", put("<Q", 32, SECTOR_BYTES)),
        ("another size", put("<Q", 32, 2 * SECTOR_BYTES + SECTOR_BYTES + 16)),
        ("a size beyond all packs", put("<Q", 32, 1 << 40)),
        ("data within the index", put("<Q", 40, SECTOR_BYTES)),
        ("data elsewhere", put("<Q", 40, 3 * SECTOR_BYTES)),
        ("an unknown kind", put("<B", ENTRIES + 32, 2)),
        ("an unknown coding", put("<B", ENTRIES + 33, 2)),
        ("the reserved field of an entry", put("<H", ENTRIES + 34, 1)),
        ("raw, but of two sizes", put("<I", ENTRIES + 36, 2 * SECTOR_BYTES)),
        ("an offset with a gap", put("<I", ENTRIES + 48 + 40, SECTOR_BYTES + 1)),
        ("an offset that overlaps", put("<I", ENTRIES + 48 + 40, 0)),
        ("a page longer as stored than raw", put("<BBHI", ENTRIES + 2 * 48 + 32, Kind.PAGE, Coding.ZSTD, 0, 9)),
        ("nothing stored", put("<I", ENTRIES + 2 * 48 + 44, 0)),
        ("a chunk of part of a sector", put("<I", ENTRIES + 2 * 48 + 36, SECTOR_BYTES + 1)),
        ("a chunk too long", put("<I", ENTRIES + 2 * 48 + 36, RAW_BYTES_MAX + SECTOR_BYTES)),
        ("a chunk of nothing", put("<I", ENTRIES + 2 * 48 + 36, 0)),
    ],
)
def test_an_index_that_contradicts_itself_is_damage(what: str, change: Callable[[bytearray], None]) -> None:
    pack, head = signed(SMALL[1], change)
    with pytest.raises(ObjectDamaged):
        parse(pack, head)


def test_a_raw_chunk_beside_the_sector_borders_is_damage() -> None:
    def swap(head: bytearray) -> None:
        chunk, page = head[ENTRIES : ENTRIES + 48], head[ENTRIES + 48 : ENTRIES + 96]
        head[ENTRIES : ENTRIES + 96] = page + chunk
        struct.pack_into("<I", head, ENTRIES + 40, 0)
        struct.pack_into("<I", head, ENTRIES + 48 + 40, 5)

    pack, head = signed(SMALL[1], swap)
    with pytest.raises(ObjectDamaged, match="sector borders"):
        parse(pack, head)


def test_a_later_format_is_named_as_such() -> None:
    pack, head = signed(SMALL[1], put("<I", 8, 2))
    for read in (lambda: parse(pack, head), lambda: index_bytes(head[:HEADER_BYTES])):
        with pytest.raises(FormatTooNew, match=r"format 2.*upgrade archipfs"):
            read()


def test_the_layout_is_the_documented_one() -> None:
    """Field by field, by docs/format.md alone."""
    pack, value = SMALL
    assert value[:8] == b"archpack"
    assert struct.unpack_from("<IIIIQQQ", value, 8) == (1, 16, 3, 0, CREATED_NS, len(value), 2 * SECTOR_BYTES)
    assert value[48:64].hex() == NODE
    assert value[72:HEADER_BYTES] == bytes(HEADER_BYTES - 72)
    assert value[ENTRIES : ENTRIES + 32] == named(1, 16) + bytes(16)
    assert struct.unpack_from("<BBHIII", value, ENTRIES + 48 + 32) == (1, 0, 0, 5, SECTOR_BYTES, 5)
    assert struct.unpack_from("<BBHIII", value, ENTRIES + 96 + 32) == (0, 1, 0, 2 * SECTOR_BYTES, SECTOR_BYTES + 5, 10)
    assert value[2 * SECTOR_BYTES :] == b"c" * SECTOR_BYTES + b"page!compressed"
    assert pack == hashlib.blake2b(value[: 2 * SECTOR_BYTES], digest_size=32).hexdigest()


def test_entries_say_where_in_the_object_they_lie() -> None:
    pack, value = SMALL
    assert parse(pack, head_of(value)).entries[1] == Entry(named(0, 16), Kind.PAGE, Coding.RAW, 5, 3 * SECTOR_BYTES, 5)


def test_errors_name_the_pack() -> None:
    pack, value = SMALL
    with pytest.raises(ArchipError, match=f"pack {pack} is damaged"):
        parse(pack, head_of(value)[:-1])
