"""Maps as trees against dictionaries: what they hold, that they are canonical, and that nothing equal is ever read."""

import hashlib
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.errors import ObjectDamaged
from archipfs.map.pages import Extent, Slot, decode_node, encode_leaf, encode_node
from archipfs.map.tree import REGIONS_MAX, Tree, differing, updated
from archipfs.types import Digest

DIGEST_BYTES = 32
EMPTY_ROOT = encode_node(3, [], DIGEST_BYTES)

Leaves = dict[int, Digest]
Path = tuple[int, int]
"""Level of a page, and the region where what it stands for begins."""


class Pages:
    """A store of pages that counts what is fetched from it and given to it."""

    def __init__(self) -> None:
        self.pages: dict[Digest, bytes] = {}
        self.fetched: Counter[Digest] = Counter()
        self.stored: list[Digest] = []

    def store(self, page: bytes) -> Digest:
        digest = Digest(hashlib.sha256(page).digest())
        self.pages[digest] = page
        self.stored.append(digest)
        return digest

    def fetch(self, digest: Digest) -> bytes:
        self.fetched[digest] += 1
        return self.pages[digest]

    def leaf(self, number: int) -> Digest:
        return self.store(encode_leaf([Extent(0, 1, Digest(bytes([number]) * DIGEST_BYTES), 0)], DIGEST_BYTES))

    def put(self, root: Digest | None, change: dict[int, int | None]) -> Digest:
        leaves = {region: None if number is None else self.leaf(number) for region, number in change.items()}
        return updated(self.fetch, self.store, root, leaves, DIGEST_BYTES)

    def nodes(self, root: Digest | None) -> dict[Path, Digest]:
        """Every page above the leaves, by its place."""
        found: dict[Path, Digest] = {}

        def walk(digest: Digest, level: int, base: int) -> None:
            found[level, base] = digest
            if level > 1:
                for slot, below in decode_node(self.pages[digest])[1]:
                    walk(below, level - 1, base + (slot << 8 * (level - 1)))

        if root is not None:
            walk(root, 3, 0)
        return found

    def leaves(self, root: Digest | None) -> Leaves:
        return dict(Tree(self.pages.__getitem__, root).regions())


# Regions that share pages of every level, or none, and the borders of them.
regions = st.one_of(
    st.integers(0, REGIONS_MAX - 1),
    st.sampled_from([0, 1, 255, 256, 257, 65535, 65536, 65537, REGIONS_MAX - 1]),
    st.integers(0, 600),
)
changes = st.dictionaries(regions, st.none() | st.integers(1, 3), max_size=12)
histories = st.lists(changes, max_size=4)


def played(pages: Pages, history: list[dict[int, int | None]]) -> tuple[Digest | None, dict[int, int]]:
    """The map that comes of one change after the other, and the dictionary that does."""
    root: Digest | None = None
    model: dict[int, int] = {}
    for change in history:
        root = pages.put(root, change)
        for region, number in change.items():
            if number is None:
                model.pop(region, None)
            else:
                model[region] = number
    return root, model


@given(histories, st.lists(regions, max_size=5))
def test_it_holds_what_a_dictionary_holds(history: list[dict[int, int | None]], others: list[int]) -> None:
    pages = Pages()
    root, model = played(pages, history)
    tree = Tree(pages.fetch, root)
    expected = {region: pages.leaf(number) for region, number in model.items()}
    assert list(tree.regions()) == sorted(expected.items())
    for region in {*others, *expected, *(region for change in history for region in change)}:
        assert tree.leaf(region) == expected.get(region)


@given(histories, regions)
def test_regions_begin_where_they_are_asked_to(history: list[dict[int, int | None]], first: int) -> None:
    pages = Pages()
    root, _ = played(pages, history)
    expected = [(region, leaf) for region, leaf in pages.leaves(root).items() if region >= first]
    pages.fetched.clear()
    assert list(Tree(pages.fetch, root).regions(first)) == expected
    passed = {
        digest for (level, base), digest in pages.nodes(root).items() if level < 3 and base + (1 << 8 * level) <= first
    }
    needed = {digest for (level, base), digest in pages.nodes(root).items() if base + (1 << 8 * level) > first}
    assert not pages.fetched.keys() & (passed - needed)


@given(histories)
def test_equal_maps_have_equal_roots_whatever_came_before(history: list[dict[int, int | None]]) -> None:
    pages = Pages()
    root, model = played(pages, history)
    if root is not None:
        assert root == pages.put(None, dict(model))
        assert root == pages.put(pages.put(None, dict.fromkeys(model, 9)), dict(model))


@given(histories)
def test_what_is_taken_away_leaves_the_empty_root(history: list[dict[int, int | None]]) -> None:
    pages = Pages()
    root, model = played(pages, history)
    assert pages.pages[pages.put(root, dict.fromkeys(model))] == EMPTY_ROOT


@given(histories, changes)
def test_an_update_reads_and_stores_only_the_pages_above_what_it_changes(
    history: list[dict[int, int | None]], change: dict[int, int | None]
) -> None:
    pages = Pages()
    root, _ = played(pages, history)
    before = pages.nodes(root)
    leaves = {region: None if number is None else pages.leaf(number) for region, number in change.items()}
    pages.fetched.clear()
    pages.stored.clear()
    made = updated(pages.fetch, pages.store, root, leaves, DIGEST_BYTES)
    above = {(3, 0)} | {(level, region >> 8 * level << 8 * level) for region in change for level in (1, 2, 3)}
    assert pages.fetched == Counter(before[path] for path in above if path in before)
    after = pages.nodes(made)
    assert Counter(pages.stored) == Counter(digest for path, digest in after.items() if before.get(path) != digest)


@given(histories, histories)
def test_differing_finds_what_differs_and_reads_nothing_that_is_equal(
    one_history: list[dict[int, int | None]], other_history: list[dict[int, int | None]]
) -> None:
    pages = Pages()
    base, _ = played(pages, one_history)
    one, other = base, base
    for change in other_history:
        other = pages.put(other, change)
    check_differing(pages, one, other)


@given(histories, histories)
def test_differing_of_unrelated_maps(
    one_history: list[dict[int, int | None]], other_history: list[dict[int, int | None]]
) -> None:
    pages = Pages()
    check_differing(pages, played(pages, one_history)[0], played(pages, other_history)[0])


def check_differing(pages: Pages, one: Digest | None, other: Digest | None) -> None:
    mine, theirs = pages.leaves(one), pages.leaves(other)
    nodes = [pages.nodes(one), pages.nodes(other)]
    pages.fetched.clear()
    found = list(differing(pages.fetch, one, other))
    assert found == sorted(region for region in mine.keys() | theirs.keys() if mine.get(region) != theirs.get(region))
    unequal = {path for path in nodes[0].keys() | nodes[1].keys() if nodes[0].get(path) != nodes[1].get(path)}
    assert pages.fetched == Counter(side[path] for side in nodes for path in unequal if path in side)
    assert list(differing(pages.fetch, other, one)) == found


def test_differing_stops_reading_when_it_is_not_asked_any_more() -> None:
    pages = Pages()
    one = pages.put(None, {region << 16: 1 for region in range(200)})
    other = pages.put(None, {region << 16: 2 for region in range(200)})
    pages.fetched.clear()
    assert next(differing(pages.fetch, one, other)) == 0
    assert pages.fetched.total() == 6


@given(histories, histories)
def test_pages_are_gone_through_once_parents_first(
    one_history: list[dict[int, int | None]], other_history: list[dict[int, int | None]]
) -> None:
    pages = Pages()
    one, _ = played(pages, one_history)
    other = one
    for change in other_history:
        other = pages.put(other, change)
    reached = [{*pages.nodes(root).values(), *pages.leaves(root).values()} for root in (one, other)]
    seen: set[Digest] = set()
    found = list(Tree(pages.fetch, one).pages(seen))
    assert seen == reached[0]
    assert len(found) == len(seen)
    assert all(pages.pages[digest] == page for digest, page in found)
    assert found[:1] == ([] if one is None else [(one, pages.pages[one])])
    more = [digest for digest, _ in Tree(pages.fetch, other).pages(seen)]
    assert len(more) == len(set(more))
    assert set(more) == reached[1] - reached[0]


def test_pages_passes_over_what_was_seen_without_reading_it() -> None:
    pages = Pages()
    root = pages.put(None, {0: 1, 70000: 2})
    seen = {root}
    pages.fetched.clear()
    assert list(Tree(pages.fetch, root).pages(seen)) == []
    assert not pages.fetched


def test_a_page_that_could_not_be_read_is_not_seen() -> None:
    pages = Pages()
    root = pages.put(None, {0: 1})
    lost = pages.leaves(root)[0]
    page = pages.pages.pop(lost)
    seen: set[Digest] = set()
    with pytest.raises(KeyError):
        list(Tree(pages.fetch, root).pages(seen))
    assert lost not in seen
    pages.pages[lost] = page
    assert [digest for digest, _ in Tree(pages.fetch, root).pages(seen - {*pages.nodes(root).values()})][-1] == lost


def test_a_full_page_at_every_level() -> None:
    pages = Pages()
    change: dict[int, int | None] = {slot << 8 * level: 1 for level in range(3) for slot in range(256)}
    root = pages.put(None, change)
    assert [region for region, _ in Tree(pages.fetch, root).regions()] == sorted(change)
    assert all(one < other for one, other in pairwise(differing(pages.fetch, None, root)))


def test_nothing_is_the_empty_root() -> None:
    pages = Pages()
    root = pages.put(None, {})
    assert pages.pages[root] == EMPTY_ROOT
    assert list(differing(pages.fetch, None, root)) == []
    assert list(Tree(pages.fetch, None).regions()) == []
    assert list(Tree(pages.fetch, None).pages(set())) == []
    assert Tree(pages.fetch, None).leaf(5) is None


@pytest.mark.parametrize("wrong_level", [0, 1, 2, 3])
def test_a_page_at_a_level_where_it_does_not_belong_is_damage(wrong_level: int) -> None:
    """Also when all its digests are right: a tree that somebody made, or a bug."""
    pages = Pages()
    leaf = pages.leaf(1)
    wrong = leaf if wrong_level == 0 else pages.store(encode_node(wrong_level, [Slot(0, leaf)], DIGEST_BYTES))
    for level in {0, 1, 2, 3} - {wrong_level}:
        root = wrong
        for above in range(level + 1, 4):
            root = pages.store(encode_node(above, [Slot(0, root)], DIGEST_BYTES))
        with pytest.raises(ObjectDamaged):
            list(Tree(pages.fetch, root).pages(set()))
        if level > 0:
            with pytest.raises(ObjectDamaged):
                Tree(pages.fetch, root).leaf(0)
            with pytest.raises(ObjectDamaged):
                list(differing(pages.fetch, None, root))
            with pytest.raises(ObjectDamaged):
                updated(pages.fetch, pages.store, root, {0: None}, DIGEST_BYTES)


@pytest.mark.parametrize("region", [-1, REGIONS_MAX])
def test_a_region_that_no_volume_has_is_a_bug_of_the_caller(region: int) -> None:
    pages = Pages()
    with pytest.raises(AssertionError):
        Tree(pages.fetch, None).leaf(region)
    with pytest.raises(AssertionError):
        pages.put(None, {region: 1})
