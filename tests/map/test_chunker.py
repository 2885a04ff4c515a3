"""The chunker against the rule in plain Python, and what the rule is for: content is cut alike wherever it lies."""

import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from archipfs.map.chunker import Piece, cut, is_zero
from archipfs.types import CHUNK_SECTORS_MAX, REGION_BYTES, REGION_SECTORS, SECTOR_BYTES

ZEROS = bytes(SECTOR_BYTES)
DEFAULT_BITS = 3


def sector(number: int) -> bytes:
    """Another content for each number; zeros for 0."""
    return number.to_bytes(8, "little") * (SECTOR_BYTES // 8)


def ends_chunk(content: bytes, mask_bits: int) -> bool:
    return xxhash.xxh3_64_intdigest(content) % (1 << mask_bits) == 0


ENDING = next(sector(number) for number in range(1, 1000) if ends_chunk(sector(number), 6))
GOING_ON = next(sector(number) for number in range(1, 1000) if not ends_chunk(sector(number), 1))

bits = st.integers(0, 6)
numbers = st.integers(0, 40)
some_sectors = st.lists(numbers.map(sector) | st.sampled_from([ZEROS, GOING_ON]), max_size=60)


def expected(sectors: list[bytes], mask_bits: int) -> list[Piece]:
    """The rule, as docs/format.md has it."""
    pieces = []
    first = None
    for index, content in enumerate(sectors):
        if content == ZEROS:
            if first is not None:
                pieces.append(Piece(first, index - first))
            first = None
            continue
        if first is None:
            first = index
        if ends_chunk(content, mask_bits) or index + 1 - first == CHUNK_SECTORS_MAX:
            pieces.append(Piece(first, index + 1 - first))
            first = None
    if first is not None:
        pieces.append(Piece(first, len(sectors) - first))
    return pieces


def contents(sectors: list[bytes], pieces: list[Piece]) -> list[bytes]:
    return [b"".join(sectors[piece.first : piece.first + piece.count]) for piece in pieces]


@given(some_sectors, bits)
def test_it_cuts_by_the_rule(sectors: list[bytes], mask_bits: int) -> None:
    assert cut(b"".join(sectors), mask_bits) == expected(sectors, mask_bits)


@given(some_sectors, st.integers(0, 400), some_sectors, bits)
def test_long_runs_are_cut_by_the_rule(before: list[bytes], length: int, after: list[bytes], mask_bits: int) -> None:
    sectors = [*before, *[GOING_ON] * length, *after]
    assert cut(b"".join(sectors), mask_bits) == expected(sectors, mask_bits)


@given(some_sectors, some_sectors, some_sectors, bits)
def test_a_shift_changes_at_most_the_first_and_the_last_chunk(
    before: list[bytes], body: list[bytes], after: list[bytes], mask_bits: int
) -> None:
    """As long as no chunk is cut for its length alone: no run here is that long but those that ``after`` ends."""
    alone = expected(body, mask_bits)
    shifted = cut(b"".join([*before, *body, *after]), mask_bits)
    moved = {Piece(len(before) + piece.first, piece.count) for piece in alone[1:-1]}
    assert moved <= set(shifted)


@pytest.mark.parametrize("shift", [1, 7, 200, REGION_SECTORS - 1])
def test_a_large_file_is_found_again_behind_other_data(shift: int) -> None:
    source = random.Random(shift)
    body = [source.randbytes(SECTOR_BYTES) for _ in range(REGION_SECTORS)]
    before = [source.randbytes(SECTOR_BYTES) for _ in range(shift)]
    here = contents(body, cut(b"".join(body), DEFAULT_BITS))
    there = contents(before + body, cut(b"".join(before + body), DEFAULT_BITS))
    assert set(here[1:]) <= set(there)
    assert len(here) > 50


@given(some_sectors, some_sectors, numbers.map(sector), bits)
def test_a_change_of_one_sector_changes_at_most_two_chunks_and_those_it_falls_into(
    before: list[bytes], after: list[bytes], middle: bytes, mask_bits: int
) -> None:
    """Before and behind the chunk that has it, all stays as it is."""
    one, other = [[*before, content, *after] for content in (GOING_ON, middle)]
    kept = {piece for piece in expected(one, mask_bits) if not piece.first <= len(before) <= piece.first + piece.count}
    assert kept <= set(cut(b"".join(other), mask_bits))


def test_chunks_have_the_average_that_is_asked_for() -> None:
    data = random.Random(0).randbytes(4 * REGION_BYTES)
    for mask_bits in range(5):
        sectors = len(data) // SECTOR_BYTES
        assert sectors / len(cut(data, mask_bits)) == pytest.approx(1 << mask_bits, rel=0.12)


@pytest.mark.parametrize(
    ("sectors", "pieces"),
    [
        ([], []),
        ([ZEROS], []),
        ([ZEROS] * 300, []),
        ([GOING_ON], [Piece(0, 1)]),
        ([ENDING], [Piece(0, 1)]),
        ([ZEROS, GOING_ON, ZEROS], [Piece(1, 1)]),
        ([GOING_ON] * 127, [Piece(0, 127)]),
        ([GOING_ON] * 128, [Piece(0, 128)]),
        ([GOING_ON] * 129, [Piece(0, 128), Piece(128, 1)]),
        ([GOING_ON] * 127 + [ENDING, GOING_ON], [Piece(0, 128), Piece(128, 1)]),
        ([GOING_ON, ENDING, GOING_ON], [Piece(0, 2), Piece(2, 1)]),
    ],
)
def test_borders(sectors: list[bytes], pieces: list[Piece]) -> None:
    assert cut(b"".join(sectors), 6) == pieces


def test_it_takes_any_buffer_and_leaves_it_as_it_was() -> None:
    content = GOING_ON * 3 + ZEROS + ENDING
    writable = bytearray(content)
    for buffer in (content, writable, memoryview(b"x" + content)[1:]):
        assert cut(buffer, DEFAULT_BITS) == cut(content, DEFAULT_BITS)
    writable.extend(b"which fails while somebody holds the buffer")
    assert writable.startswith(content)


def test_a_part_of_a_sector_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        cut(bytes(SECTOR_BYTES + 1), DEFAULT_BITS)


@given(st.integers(0, 70), st.data())
def test_zeros_are_told_from_all_else(length: int, data: st.DataObject) -> None:
    assert is_zero(bytes(length))
    if length > 0:
        changed = bytearray(length)
        changed[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(1, 255))
        assert not is_zero(changed)


def test_one_bit_in_a_sector_is_enough_not_to_be_zeros() -> None:
    for place in range(SECTOR_BYTES):
        content = bytearray(SECTOR_BYTES)
        content[place] = 1
        assert not is_zero(content)
        assert cut(content, DEFAULT_BITS) == [Piece(0, 1)]
