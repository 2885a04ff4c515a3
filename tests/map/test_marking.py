"""Marking holds against sets of whole digests, and reads each page once."""

import hashlib

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.errors import ObjectDamaged, ObjectMissing
from archipfs.map import marking as marking_module
from archipfs.map.marking import Marking, Marks, look_up, prefixes
from archipfs.map.pages import Extent, encode_leaf
from archipfs.map.tree import updated
from archipfs.types import Digest, LayerId

DIGEST_BYTES = 32
LAYER = LayerId("0" * 32)


def digest_of(what: object) -> Digest:
    return Digest(hashlib.sha256(str(what).encode()).digest())


class Pages:
    """Pages in memory, and how often they were asked for."""

    def __init__(self) -> None:
        self.pages: dict[Digest, bytes] = {}
        self.fetched: list[Digest] = []

    def store(self, page: bytes) -> Digest:
        digest = Digest(hashlib.sha256(page).digest())
        self.pages[digest] = page
        return digest

    def fetch(self, digest: Digest) -> bytes:
        self.fetched.append(digest)
        if digest not in self.pages:
            raise ObjectMissing(f"page {digest.hex()} is not in the store; restore it")
        return self.pages[digest]

    def map_of(self, regions: dict[int, list[int]], base: Digest | None = None) -> Digest:
        """A map on top of ``base``: by region the chunks, each given by a number, a sector long."""
        leaves = {
            region: self.store(
                encode_leaf([Extent(2 * at, 1, digest_of(chunk), 0) for at, chunk in enumerate(chunks)], DIGEST_BYTES)
            )
            for region, chunks in regions.items()
        }
        return updated(self.fetch, self.store, base, leaves, DIGEST_BYTES)


def marked(marking: Marking, digests: list[Digest]) -> list[bool]:
    return look_up(marking.marks.sorted(), prefixes(digests))[0].tolist()


@given(st.lists(st.lists(st.integers(0, 60))), st.integers(1, 20))
def test_marks_are_a_set(additions: list[list[int]], buffered: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marking_module, "_BUFFERED_MIN", buffered)
        marks = Marks()
        for some in additions:
            marks.add(numpy.array(some, numpy.uint64))
        expected = sorted({number for some in additions for number in some})
        assert marks.sorted().tolist() == expected
        assert len(marks) == len(expected)
        mask, places = look_up(marks.sorted(), numpy.arange(64, dtype=numpy.uint64))
        assert [number for number in range(64) if mask[number]] == expected
        assert all(marks.sorted()[places[number]] == number for number in expected)


def test_all_that_a_map_leads_to_is_marked_and_nothing_else() -> None:
    pages = Pages()
    root = pages.map_of({0: [1, 2], 300: [2, 3], 70_000: [4]})
    other = pages.map_of({0: [5]})
    marking = Marking(pages.fetch)
    marking.mark(root, LAYER, lambda: None)
    assert marked(marking, [digest_of(chunk) for chunk in range(1, 6)]) == [True] * 4 + [False]
    assert marked(marking, [root, other]) == [True, False]
    assert marking.pages == 1 + 2 + 3 + 3


def test_what_maps_have_in_common_is_read_once() -> None:
    pages = Pages()
    first = pages.map_of({region: [region] for region in range(300)})
    second = pages.map_of({7: [1000]}, first)
    pages.fetched.clear()
    marking = Marking(pages.fetch)
    marking.mark(first, LAYER, lambda: None)
    marking.mark(second, LAYER, lambda: None)
    marking.mark(first, LAYER, lambda: None)
    assert len(pages.fetched) == len(set(pages.fetched)) == (300 + 2 + 1 + 1) + (1 + 1 + 1 + 1)
    assert marked(marking, [digest_of(1000), digest_of(7)]) == [True, True]


def test_a_page_that_is_missing_is_named_with_its_layer() -> None:
    pages = Pages()
    root = pages.map_of({0: [1]})
    leaf = next(digest for digest in pages.pages if digest != root and pages.pages[digest][10] == 0)
    del pages.pages[leaf]
    with pytest.raises(ObjectMissing, match=rf"map of layer {LAYER} .* nothing is deleted.*{leaf.hex()}"):
        Marking(pages.fetch).mark(root, LAYER, lambda: None)


def test_a_page_in_the_wrong_place_is_damage() -> None:
    pages = Pages()
    leaf = pages.store(encode_leaf([Extent(0, 1, digest_of(1), 0)], DIGEST_BYTES))
    with pytest.raises(ObjectDamaged, match=f"map of layer {LAYER}"):
        Marking(pages.fetch).mark(leaf, LAYER, lambda: None)


def test_whoever_is_asked_to_stop_stops() -> None:
    pages = Pages()
    root = pages.map_of({region: [region] for region in range(50)})
    pages.fetched.clear()

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        Marking(pages.fetch).mark(root, LAYER, stop)
    assert len(pages.fetched) == 1


def test_memory_stays_near_eight_bytes_a_mark() -> None:
    """Of the same million digests over and over, no more than two copies are ever there."""
    marks = Marks()
    some = numpy.random.default_rng(1).integers(0, 1 << 63, 1 << 16, dtype=numpy.uint64)
    for _ in range(200):
        marks.add(some)
        assert marks._buffered <= marking_module._BUFFERED_MIN + len(some)
    assert len(marks) == len(set(some.tolist()))
