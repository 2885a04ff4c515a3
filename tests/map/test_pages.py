"""Map pages as bytes, there and back and never back to something else; and extents laid over extents."""

import struct

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.errors import FormatTooNew, ObjectDamaged
from archipfs.map.pages import (
    Extent,
    Slot,
    decode_leaf,
    decode_node,
    encode_leaf,
    encode_node,
    find_slot,
    leaf_digests,
    level_of,
    node_digests,
    overlay,
)
from archipfs.types import CHUNK_SECTORS_MAX, REGION_SECTORS, Digest

DIGEST_BYTES = 32
digest_sizes = st.sampled_from([16, 32])

Sectors = dict[int, tuple[Digest, int]]
"""What each sector of a region is: which sector of which chunk."""


def called(number: int, digest_bytes: int = DIGEST_BYTES) -> Digest:
    return Digest(number.to_bytes(2, "big") * (digest_bytes // 2))


@st.composite
def extent_lists(
    draw: st.DrawFn, first: int = 0, end: int = REGION_SECTORS, digest_bytes: int = DIGEST_BYTES, max_size: int = 12
) -> list[Extent]:
    """Extents in [first, end), of a few chunks, so that neighbours often go on in the same one."""
    extents: list[Extent] = []
    for _ in range(draw(st.integers(0, max_size))):
        first += draw(st.sampled_from([0, 0, 1, 5, 200]))
        count = min(draw(st.integers(1, CHUNK_SECTORS_MAX)), end - first)
        if count < 1:
            break
        if draw(st.booleans()) and extents and extents[-1].inner + extents[-1].count + count <= CHUNK_SECTORS_MAX:
            digest, inner = extents[-1].digest, extents[-1].inner + extents[-1].count
        else:
            digest = called(draw(st.integers(1, 4)), digest_bytes)
            inner = draw(st.integers(0, CHUNK_SECTORS_MAX - count))
        extents.append(Extent(first, count, digest, inner))
        first += count
    return extents


@st.composite
def leaves(draw: st.DrawFn) -> tuple[list[Extent], int]:
    digest_bytes = draw(digest_sizes)
    return draw(extent_lists(digest_bytes=digest_bytes).filter(bool)), digest_bytes


@st.composite
def nodes(draw: st.DrawFn) -> tuple[int, list[Slot], int]:
    level = draw(st.integers(1, 3))
    digest_bytes = draw(digest_sizes)
    numbers = draw(st.sets(st.integers(0, 255), min_size=0 if level == 3 else 1, max_size=30))
    return level, [Slot(number, called(number * 7, digest_bytes)) for number in sorted(numbers)], digest_bytes


def sectors_of(extents: list[Extent]) -> Sectors:
    return {
        extent.first + index: (extent.digest, extent.inner + index)
        for extent in extents
        for index in range(extent.count)
    }


def same_or_damage(changed: bytes) -> None:
    """A page has no checksum: its digest, by which it is read, is one. But no byte of it is passed over: what is read
    as a page is encoded to just that."""
    try:
        level = level_of(changed)
        if level == 0:
            encoded = encode_leaf(decode_leaf(changed), changed[11])
        else:
            encoded = encode_node(*decode_node(changed), changed[11])
    except (ObjectDamaged, FormatTooNew):
        return
    assert encoded == changed


LEAF = encode_leaf(
    [Extent(0, 5, called(1, 16), 0), Extent(5, 1, called(2, 16), 127), Extent(1023, 1, called(1, 16), 3)], 16
)
NODE = encode_node(2, [Slot(0, called(1, 16)), Slot(255, called(2, 16))], 16)
ROOT = encode_node(3, [], 32)


@given(leaves())
def test_a_leaf_there_and_back(leaf: tuple[list[Extent], int]) -> None:
    page = encode_leaf(*leaf)
    assert decode_leaf(page) == leaf[0]
    assert level_of(page) == 0


@given(nodes())
def test_a_node_there_and_back(node: tuple[int, list[Slot], int]) -> None:
    page = encode_node(*node)
    assert decode_node(page) == node[:2]
    assert level_of(page) == node[0]
    assert node_digests(page) == [slot.digest for slot in node[1]]


@given(nodes())
def test_one_slot_of_a_node(node: tuple[int, list[Slot], int]) -> None:
    level, slots, digest_bytes = node
    page = encode_node(level, slots, digest_bytes)
    expected = {slot.slot: slot.digest for slot in slots}
    assert [find_slot(page, slot) for slot in range(256)] == [(level, expected.get(slot)) for slot in range(256)]


@given(leaves())
def test_the_digests_of_a_leaf_at_one_go(leaf: tuple[list[Extent], int]) -> None:
    found = leaf_digests(encode_leaf(*leaf))
    assert found.dtype == numpy.uint64
    assert found.tolist() == [int.from_bytes(extent.digest[:8], "little") for extent in leaf[0]]


@pytest.mark.parametrize("page", [LEAF, NODE, ROOT], ids=["leaf", "node", "empty root"])
def test_every_changed_byte_matters(page: bytes) -> None:
    for place in range(len(page)):
        for other in set(range(256)) - {page[place]}:
            same_or_damage(page[:place] + bytes([other]) + page[place + 1 :])


@pytest.mark.parametrize("page", [LEAF, NODE, ROOT], ids=["leaf", "node", "empty root"])
def test_every_truncation_and_every_trailing_byte_is_damage(page: bytes) -> None:
    decode = decode_leaf if page is LEAF else decode_node
    for changed in [page[:length] for length in range(len(page))] + [page + b"\0", page + page, page + bytes(40)]:
        for read in (decode, level_of, leaf_digests if page is LEAF else node_digests):
            with pytest.raises(ObjectDamaged):
                read(changed)


@given(leaves().map(lambda leaf: encode_leaf(*leaf)) | nodes().map(lambda node: encode_node(*node)), st.data())
def test_damage_is_noticed(page: bytes, data: st.DataObject) -> None:
    """Any piece replaced by any other."""
    begin = data.draw(st.integers(0, len(page)))
    end = data.draw(st.integers(begin, len(page)))
    same_or_damage(page[:begin] + data.draw(st.binary(max_size=60)) + page[end:])


@given(st.binary(max_size=100))
def test_nonsense_is_damage(content: bytes) -> None:
    same_or_damage(content)
    same_or_damage(b"archpage\1\0" + content)


@pytest.mark.parametrize(
    "extents",
    [
        [],
        [(0, 0, 0)],
        [(1024, 1, 0)],
        [(1000, 25, 0)],
        [(0, 129, 0)],
        [(0, 28, 101)],
        [(0, 1, 128)],
        [(5, 1, 0), (4, 1, 0)],
        [(5, 2, 0), (6, 1, 0)],
        [(5, 1, 0), (5, 1, 0)],
    ],
)
def test_extents_that_cannot_be_are_damage_when_read_and_a_bug_when_written(
    extents: list[tuple[int, int, int]],
) -> None:
    page = struct.pack("<8sHBBI", b"archpage", 1, 0, 32, len(extents)) + b"".join(
        struct.pack("<HHHH32s", first, count, inner, 0, called(1)) for first, count, inner in extents
    )
    with pytest.raises(ObjectDamaged):
        decode_leaf(page)
    with pytest.raises(AssertionError):
        encode_leaf([Extent(first, count, called(1), inner) for first, count, inner in extents], 32)


@pytest.mark.parametrize(
    ("level", "slots"), [(0, [1]), (4, [1]), (1, []), (2, []), (3, [256]), (1, [1, 1]), (1, [2, 1])]
)
def test_slots_that_cannot_be_are_damage_when_read_and_a_bug_when_written(level: int, slots: list[int]) -> None:
    page = struct.pack("<8sHBBI", b"archpage", 1, level, 32, len(slots)) + b"".join(
        struct.pack("<H32s", slot, called(1)) for slot in slots
    )
    with pytest.raises(ObjectDamaged):
        decode_node(page)
    with pytest.raises(AssertionError):
        encode_node(level, [Slot(slot, called(1)) for slot in slots], 32)


def test_a_page_of_another_level_is_damage() -> None:
    for read in (decode_leaf, leaf_digests):
        with pytest.raises(ObjectDamaged, match="a leaf was expected"):
            read(NODE)
    # 17 entries of a leaf are as long as 20 of a node; 16 are as long as no number of them.
    for entries in (16, 17):
        leaf = encode_leaf([Extent(first, 1, called(1), 0) for first in range(entries)], 32)
        for read in (decode_node, node_digests, lambda page: find_slot(page, 0)):
            with pytest.raises(ObjectDamaged, match="where a leaf lies"):
                read(leaf)


def test_a_later_format_is_named_as_such() -> None:
    for read in (level_of, decode_leaf, leaf_digests):
        with pytest.raises(FormatTooNew, match=r"format 2.*upgrade archipfs"):
            read(LEAF[:8] + b"\2" + LEAF[9:])


def test_the_layout_is_the_documented_one() -> None:
    """Field by field, by docs/format.md alone."""
    assert LEAF[:8] == b"archpage"
    assert struct.unpack_from("<HBBI", LEAF, 8) == (1, 0, 16, 3)
    assert struct.unpack_from("<HHHH16s", LEAF, 16 + 24) == (5, 1, 127, 0, called(2, 16))
    assert len(LEAF) == 16 + 3 * 24
    assert struct.unpack_from("<HBBI", NODE, 8) == (1, 2, 16, 2)
    assert struct.unpack_from("<H16s", NODE, 16 + 18) == (255, called(2, 16))
    assert len(NODE) == 16 + 2 * 18


ranges = st.tuples(st.integers(0, REGION_SECTORS), st.integers(0, REGION_SECTORS)).map(sorted)


@given(extent_lists(), ranges, st.data())
def test_overlay_replaces_just_the_range(below: list[Extent], where: list[int], data: st.DataObject) -> None:
    first, end = where
    above = data.draw(extent_lists(first, end))
    result = overlay(below, first, end - first, above)
    outside = {sector: what for sector, what in sectors_of(below).items() if not first <= sector < end}
    assert sectors_of(result) == outside | sectors_of(above)
    assert not result or decode_leaf(encode_leaf(result, DIGEST_BYTES)) == result
    assert len(result) <= len(below) + len(above) + 1


@given(extent_lists(), ranges)
def test_what_is_cut_out_and_put_back_leaves_no_trace(extents: list[Extent], where: list[int]) -> None:
    """Neighbours at the borders are joined again, so pages do not depend on how their content came about."""
    first, end = where
    whole: list[Extent] = []
    for extent in extents:
        whole = overlay(whole, extent.first, extent.count, [extent])
    without = overlay(whole, first, end - first, [])
    piece = overlay(overlay(whole, 0, first, []), end, REGION_SECTORS - end, [])
    assert overlay(without, first, end - first, piece) == whole


def test_overlay_does_not_touch_its_arguments() -> None:
    below = [Extent(0, 100, called(1), 0), Extent(100, 100, called(2), 0)]
    before = list(below)
    overlay(below, 50, 100, [Extent(60, 5, called(3), 0)])
    assert below == before


def test_overlay_splits_an_extent_in_two() -> None:
    assert overlay([Extent(10, 100, called(1), 20)], 15, 1, [Extent(15, 1, called(2), 0)]) == [
        Extent(10, 5, called(1), 20),
        Extent(15, 1, called(2), 0),
        Extent(16, 94, called(1), 26),
    ]


def test_overlay_outside_its_range_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        overlay([], 10, 5, [Extent(9, 2, called(1), 0)])
