"""What counts as needed where, against a model that knows whole digests; prefixes collide on purpose."""

from hypothesis import given
from hypothesis import strategies as st

from archipfs.map.census import take_census
from archipfs.map.marking import Marks, prefixes
from archipfs.map.packs import Coding, Entry, Kind, PackIndex
from archipfs.types import Digest, PackId


def digest_of(number: int) -> Digest:
    """Numbers that differ by 8 or 16 have the same first eight bytes."""
    return Digest(bytes([number % 8]) * 8 + bytes([number]) * 8)


def index_of(pack: PackId, numbers: list[int]) -> PackIndex:
    entries = [
        Entry(digest_of(number), Kind.CHUNK, Coding.RAW, 4096, 4096 * (1 + place), 4096 + number)
        for place, number in enumerate(numbers)
    ]
    return PackIndex(pack, "node", 0, 4096, entries)


packs_of_numbers = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(0, 23), unique=True, min_size=1, max_size=8), max_size=6
)


@given(packs_of_numbers, st.sets(st.sampled_from("abcdef")), st.data())
def test_every_needed_digest_is_live_somewhere_and_in_the_place_that_the_rule_says(
    contents: dict[str, list[int]], condemned_names: set[str], data: st.DataObject
) -> None:
    contents_by_pack = {PackId(name): numbers for name, numbers in contents.items()}
    condemned = {PackId(name) for name in condemned_names}
    needed = data.draw(st.sets(st.integers(0, 23)))
    bad = {
        pack: frozenset(digest_of(number) for number in data.draw(st.sets(st.sampled_from(numbers))))
        for pack, numbers in contents_by_pack.items()
        if data.draw(st.booleans())
    }
    marks = Marks()
    marks.add(prefixes(digest_of(number) for number in needed))
    uses = take_census(
        contents_by_pack,
        condemned,
        bad,
        marks.sorted(),
        lambda pack: index_of(pack, contents_by_pack[pack]),
    )
    assert uses.keys() == contents_by_pack.keys()
    live = {
        pack: [number for number, counts in zip(numbers, uses[pack].live, strict=True) if counts]
        for pack, numbers in contents_by_pack.items()
    }
    for pack, numbers in contents_by_pack.items():
        assert uses[pack].live_bytes == sum(4096 + number for number in live[pack])
        assert uses[pack].entry_bytes == sum(4096 + number for number in numbers)
        assert uses[pack].damaged == bool(bad.get(pack))
    marked_slots = {number % 8 for number in needed}
    for number in range(24):
        holders = [pack for pack, numbers in contents_by_pack.items() if number in numbers]
        chosen = [pack for pack in holders if number in live[pack]]
        if number % 8 not in marked_slots:
            assert chosen == []
        elif holders:
            assert chosen, "what is needed must not be dead everywhere"
            best = min(holders, key=lambda pack: (digest_of(number) in bad.get(pack, ()), pack in condemned, pack))
            assert best in chosen
            alone = all(
                other % 8 != number % 8 for numbers in contents_by_pack.values() for other in numbers if other != number
            )
            if alone:
                assert chosen == [best]


def test_of_damaged_copies_the_first_counts_though_a_later_pack_holds_another_digest_of_the_same_prefix() -> None:
    first, second = PackId("a"), PackId("b")
    contents = {first: [17, 1], second: [17, 1]}
    damage = {first: frozenset({digest_of(17), digest_of(1)}), second: frozenset({digest_of(17)})}
    marks = Marks()
    marks.add(prefixes([digest_of(1)]))
    uses = take_census(contents, (), damage, marks.sorted(), lambda pack: index_of(pack, contents[pack]))
    assert list(uses[first].live) == [True, False]
    assert list(uses[second].live) == [False, True]


def test_nothing_marked_is_nothing_live() -> None:
    pack = PackId("a")
    uses = take_census([pack], (), {}, Marks().sorted(), lambda _: index_of(pack, [1, 2]))
    assert uses[pack].dead
    assert not uses[pack].live.any()
