"""Maps copied from one store to another: whole afterwards, and at the price of what the other one lacks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import ObjectDamaged, ObjectMissing, StoreError
from archipfs.map.chunks import Session, pack_key
from archipfs.map.replicate import copy_map
from archipfs.types import Digest, LayerId
from tests.map.sealing import NODE, OTHER_NODE, Content, Sealer, expected, sealer

Stores = tuple[Sealer, Sealer]

REGIONS = st.sampled_from([0, 1, 255, 256, 300, 70_000])
CONTENTS = st.dictionaries(REGIONS, st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=4)


@contextmanager
def two_stores(directory: Path, *, hash_name: str = "blake3", compression: str = "none") -> Iterator[Stores]:
    origin = sealer(MemoryBlocker(), directory / "a", node=NODE, hash_name=hash_name)
    target = sealer(MemoryBlocker(), directory / "b", node=OTHER_NODE, hash_name=hash_name, compression=compression)
    with origin as mine, target as theirs:
        yield mine, theirs


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Stores]:
    with two_stores(tmp_path) as both:
        yield both


def copy(stores: Stores, layer: LayerId, base: Digest | None = None) -> int:
    """Copy what is sealed; how many bytes were read for it, as progress is told."""
    with stores[1].store.session() as session:
        copied = copy_into(session, stores, layer, base)
        session.flush()
    return copied


def copy_into(session: Session, stores: Stores, layer: LayerId, base: Digest | None) -> int:
    origin, target = stores
    copied: list[int] = []
    root = origin.root(layer)
    copy_map(origin.store, target.store.page, session, root, base, threads=2, progress=copied.append)
    return sum(copied)


def adopt(stores: Stores, layer: LayerId) -> LayerId:
    """A layer of the target with the same map, once that is there."""
    origin, target = stores
    made = target.new_layer()
    found = target.catalog.layer(made)
    record = type(found.record)(
        made, None, 0, target.node, 0, sealed=origin.catalog.layer(layer).record.sealed, original=layer
    )
    target.catalog.put(record, made, found.version)
    return made


@given(first=CONTENTS, second=CONTENTS, with_base=st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_is_copied_is_whole_without_the_origin(first: Content, second: Content, with_base: bool) -> None:
    """Also on top of a base that shares some of it, and in a store that has some of its chunks already."""
    with TemporaryDirectory() as directory, two_stores(Path(directory)) as stores:
        origin, target = stores
        one = origin.seal(first)
        two = origin.seal(second, base=origin.root(one))
        base = None
        if with_base:
            copy(stores, one)
            adopt(stores, one)
            base = origin.root(one)
        else:
            target.seal(first)
        copy(stores, two, base)
        found = target.content(adopt(stores, two))
        assert found == origin.content(two)
        assert found.items() >= expected(second).items()


def test_a_second_copy_reads_no_chunk(stores: Stores) -> None:
    origin, _ = stores
    layer = origin.seal({0: [1, 2, 3], 300: [4]})
    assert copy(stores, layer) == sum(
        map(len, (chunk for chunks in origin.content(layer).values() for chunk in chunks))
    )
    assert copy(stores, layer) == 0


def test_below_a_page_that_the_base_has_nothing_is_read(stores: Stores) -> None:
    """The chunks need not be in the origin any more, where a map in the target has them."""
    origin, target = stores
    one = origin.seal({0: [1, 2], 300: [3]})
    copy(stores, one)
    adopt(stores, one)
    two = origin.seal({300: [4]}, base=origin.root(one))
    needed = origin.store.locate(origin.store.hash.digest(_chunk(origin, one, 0)))
    kept = {place.pack for place in origin.store.cache.find([origin.root(two)])[0]}
    assert needed.pack not in kept
    origin.blocker.delete(pack_key(needed.pack))
    copy(stores, two, origin.root(one))
    assert target.content(adopt(stores, two)).keys() == {0, 300}


def _chunk(side: Sealer, layer: LayerId, region: int) -> bytes:
    return side.content(layer)[region][0]


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("hash_name", ["blake3", "xxh3-128"])
def test_every_hash_and_compression(tmp_path: Path, hash_name: str, compression: str) -> None:
    with two_stores(tmp_path, hash_name=hash_name, compression=compression) as stores:
        origin, target = stores
        layer = origin.seal({0: [1, 1, 2], 5: [2]})
        copy(stores, layer)
        assert target.content(adopt(stores, layer)) == origin.content(layer)
        copy(stores, layer)


def test_other_bytes_under_the_same_digest_are_not_taken_for_these(tmp_path: Path) -> None:
    """With a hash that is not trusted, bytes are compared although the target knows the digest."""
    with two_stores(tmp_path, hash_name="xxh3-128") as stores:
        origin, target = stores
        layer = origin.seal({0: [1]})
        digest = target.store.hash.digest(_chunk(origin, layer, 0))
        with target.store.session() as session:
            assert session.lacks([digest, digest]) == [digest]
            session.add_chunk(digest, _chunk(origin, layer, 0)[:-1] + b"?")
            with pytest.raises(StoreError, match="two contents have the hash"):
                copy_map(
                    origin.store,
                    target.store.page,
                    session,
                    origin.root(layer),
                    None,
                    threads=1,
                    progress=lambda more: None,
                )


def test_what_is_damaged_or_missing_in_the_origin_is_said_and_not_copied(stores: Stores) -> None:
    origin, target = stores
    layer = origin.seal({0: [1]})
    place = origin.store.locate(origin.store.hash.digest(_chunk(origin, layer, 0)))
    data = bytearray(origin.blocker.get(pack_key(place.pack)))
    data[place.offset] ^= 1
    origin.blocker.delete(pack_key(place.pack))
    origin.blocker.put(pack_key(place.pack), bytes(data))
    with pytest.raises(ObjectDamaged, match="should have chunk"):
        copy(stores, layer)
    origin.blocker.delete(pack_key(place.pack))
    with pytest.raises(ObjectMissing):
        copy(stores, layer)
    assert list(target.blocker.list("pack")) == []


def test_a_session_relies_on_what_it_does_not_lack(stores: Stores) -> None:
    """So garbage collection leaves it alone, and the commit notices if another node's does not."""
    origin, target = stores
    digest = origin.store.hash.digest(_chunk(origin, origin.seal({0: [1]}), 0))
    target.seal({7: [1]})
    [pack] = target.store.packs()
    with target.store.session() as session:
        assert session.lacks([digest]) == []
        assert session.relied_upon() == {pack}
        assert target.store.pinned() == {pack}
