"""Records and the index of the ``rados`` driver, without a cluster: several operations at once, step by step."""

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.blockers.rados import index as index_module
from archipfs.blockers.rados import records as records_module
from archipfs.blockers.rados.index import Index
from archipfs.blockers.rados.records import Records, decode
from archipfs.errors import AlreadyExists, Conflict, ObjectDamaged
from tests.blockers.fake_omap import CONNECTION, FakeOmap
from tests.lib.searching import searching

SCHEDULES = st.lists(st.integers(0, 3), max_size=40)
DEATHS = st.dictionaries(st.integers(0, 3), st.integers(0, 6), max_size=2)


@searching(300)
@given(
    kinds=st.lists(st.sampled_from(["put", "delete", "replace"]), min_size=2, max_size=4),
    clock=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    schedule=SCHEDULES,
    deaths=DEATHS,
)
def test_no_version_comes_back_whatever_the_clocks_show(
    kinds: list[str], clock: list[int], schedule: list[int], deaths: dict[int, int]
) -> None:
    """Two records of one shard, so that their floor is one; and a clock that jumps back and forth at each look."""
    highest = {"a": 0, "b": 0}
    looks = 0

    def watch(name: str, value: bytes) -> None:
        if name in highest:
            version = decode(name, value).version
            assert version > highest[name]
            highest[name] = version

    def time_ns() -> int:
        nonlocal looks
        looks += 1
        return clock[looks % len(clock)]

    def operation(kind: str, ident: str) -> Callable[[], None]:
        def run() -> None:
            with suppress(Conflict):
                found = records.get("volume", ident)
                expected = found.version if found else None
                if kind == "delete" and expected is not None:
                    records.delete("volume", ident, expected)
                    records.put("volume", ident, b"anew", None)
                else:
                    made = records.put("volume", ident, b"x", expected)
                    if kind == "replace":
                        records.put("volume", ident, b"", made)

        return run

    omap = FakeOmap(watch=watch)
    with pytest.MonkeyPatch.context() as patch:
        omap.put_into(patch, records_module)
        patch.setattr(records_module, "SHARDS", 1)
        patch.setattr(records_module.time, "time_ns", time_ns)
        records = Records(CONNECTION)
        omap.interleave(
            [operation(kind, "ab"[number % 2]) for number, kind in enumerate(kinds * 2)], schedule, deaths=deaths
        )
        assert {ident for ident, _ in records.list("volume")} <= {"a", "b"}


def test_a_delete_that_comes_late_leaves_the_next_life_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    omap = FakeOmap()
    omap.put_into(monkeypatch, records_module)
    records = Records(CONNECTION)
    first = records.put("volume", "a", b"1", None)
    records.delete("volume", "a", first)
    second = records.put("volume", "a", b"2", None)
    with pytest.raises(Conflict):
        records.delete("volume", "a", first)
    with pytest.raises(Conflict):
        records.put("volume", "a", b"late", first)
    found = records.get("volume", "a")
    assert found is not None
    assert (found.value, found.version) == (b"2", second)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"1" * 20, b"1" * 19 + b"=x", b"1" * 20 + b"-x", b"+" + b"1" * 19 + b"="]
)
def test_a_record_without_a_version_is_damaged(content: bytes) -> None:
    with pytest.raises(ObjectDamaged, match="volume/a"):
        decode("volume/a", content)


@searching(300)
@given(
    kinds=st.lists(st.sampled_from(["make", "remove"]), min_size=2, max_size=4),
    there=st.booleans(),
    schedule=SCHEDULES,
    deaths=DEATHS,
)
def test_the_index_has_what_is_there(
    kinds: list[str], there: bool, schedule: list[int], deaths: dict[int, int]
) -> None:
    objects: set[str] = set()
    omap = FakeOmap()

    def make() -> None:
        omap.step()
        objects.add("a")

    def remove() -> None:
        omap.step()
        objects.discard("a")

    with pytest.MonkeyPatch.context() as patch:
        omap.put_into(patch, index_module)
        index = Index(CONNECTION, "packs", 1)
        if there:
            index.make("pack", "a", make)
        operations: dict[str, Callable[[], None]] = {
            "make": lambda: index.make("pack", "a", make),
            "remove": lambda: index.remove("pack", "a", remove),
        }
        omap.interleave([operations[kind] for kind in kinds], schedule, deaths=deaths)
        listed = dict(index.list("pack"))
        deadly = {kinds[number] for number in deaths if number < len(kinds)}
        if "make" not in deadly and objects:
            assert listed.keys() == objects
        if "remove" not in deadly and not objects:
            assert listed in ({}, {"a": False})
        index.remove("pack", "a", remove)
        assert dict(index.list("pack")) == {}


def test_who_dies_while_making_leaves_an_entry_that_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    omap = FakeOmap()
    omap.put_into(monkeypatch, index_module)
    index = Index(CONNECTION, "packs", 4)

    def die() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        index.make("pack", "a", die)
    assert dict(index.list("pack")) == {"a": False}
    index.make("pack", "a", lambda: None)
    assert dict(index.list("pack")) == {"a": True}
    with pytest.raises(OSError, match="gone"):
        index.remove("pack", "a", die)
    assert dict(index.list("pack")) == {"a": False}
    index.remove("pack", "a", lambda: None)
    assert dict(index.list("pack")) == {}


def test_what_exists_already_is_noted_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    omap = FakeOmap()
    omap.put_into(monkeypatch, index_module)
    index = Index(CONNECTION, "data", 4)

    def exists() -> None:
        raise AlreadyExists("creating layer/a: there is one; use another key")

    with pytest.raises(AlreadyExists):
        index.make("layer", "a", exists)
    assert dict(index.list("layer")) == {"a": True}


def test_an_entry_without_a_state_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    omap = FakeOmap()
    omap.put_into(monkeypatch, index_module)
    for content in (b"", b"x1", b"\xff1"):
        omap.shards["data.layer.0"] = {"a": content}
        with pytest.raises(ObjectDamaged, match="layer/a"):
            list(Index(CONNECTION, "data", 1).list("layer"))
