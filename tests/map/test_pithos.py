"""Pithos' hashes against its definition, worked out here by hand with hashlib."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.map.pithos import BLOCK_BYTES, HASH_BYTES, HOLE, HashMap, block_count, block_hash, top_hash

ZEROS = bytes(HASH_BYTES)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


ONE, TWO, THREE, FOUR, FIVE = (sha256(f"block {number}".encode()) for number in range(1, 6))


def test_a_block_is_hashed_without_the_zeros_at_its_end() -> None:
    assert block_hash(b"data" + bytes(BLOCK_BYTES - 4)) == sha256(b"data")
    assert block_hash(b"\0data") == sha256(b"\0data")
    assert block_hash(b"da\0ta\0") == sha256(b"da\0ta")


@pytest.mark.parametrize("size", [0, 1, 4096, BLOCK_BYTES])
def test_zeros_have_the_hash_of_nothing(size: int) -> None:
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert block_hash(bytes(size)).hex() == HOLE.hex() == nothing


TOPS = {
    "no block": ([], sha256(b"")),
    "one": ([ONE], ONE),
    "two": ([ONE, TWO], sha256(ONE + TWO)),
    "three": ([ONE, TWO, THREE], sha256(sha256(ONE + TWO) + sha256(THREE + ZEROS))),
    "five": (
        [ONE, TWO, THREE, FOUR, FIVE],
        sha256(
            sha256(sha256(ONE + TWO) + sha256(THREE + FOUR)) + sha256(sha256(FIVE + ZEROS) + sha256(ZEROS + ZEROS)),
        ),
    ),
}


@pytest.mark.parametrize(("hashes", "top"), TOPS.values(), ids=TOPS)
def test_the_top_hash(hashes: list[bytes], top: bytes) -> None:
    assert top_hash(hashes) == top


def padded_tree(hashes: list[bytes]) -> bytes:
    """The definition to the letter: pad to a power of two, then hash pair by pair."""
    if len(hashes) < 2:
        return hashes[0] if hashes else sha256(b"")
    leaves = 2
    while leaves < len(hashes):
        leaves *= 2
    level = hashes + [ZEROS] * (leaves - len(hashes))
    while len(level) > 1:
        level = [sha256(level[at] + level[at + 1]) for at in range(0, len(level), 2)]
    return level[0]


@given(st.integers(0, 70))
def test_the_top_hash_of_any_number_of_blocks(count: int) -> None:
    hashes = [sha256(b"%d" % number) for number in range(count)]
    assert top_hash(hashes) == padded_tree(hashes)


@given(st.integers(0, 1 << 46))
def test_the_blocks_cover_the_volume(size: int) -> None:
    assert (block_count(size) - 1) * BLOCK_BYTES < size <= block_count(size) * BLOCK_BYTES or size == 0 == block_count(
        0
    )


def test_the_json_is_what_pithos_takes() -> None:
    assert HashMap(BLOCK_BYTES + 1, [ONE, TWO]).as_json() == {
        "block_hash": "sha256",
        "block_size": 4194304,
        "bytes": 4194305,
        "hashes": [ONE.hex(), TWO.hex()],
    }
