"""The hash map of a volume is that of its bytes, whatever layers they lie in."""

import hashlib

import pytest

from archipfs.compose.composer import Composer
from archipfs.compose.hashing import hash_volume
from archipfs.errors import LockHeld
from archipfs.map.pithos import BLOCK_BYTES, HashMap
from tests.compose.world import World, content_of, fill, pattern

SIZE = 3 * BLOCK_BYTES + 5000


def expected(content: bytes) -> HashMap:
    blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
    return HashMap(len(content), [hashlib.sha256(block.rstrip(b"\0")).digest() for block in blocks])


def hash_of(composer: Composer, name: str) -> HashMap:
    with composer.using(composer.find(name)) as opened, opened.reading_frozen() as engine:
        return hash_volume(engine, lambda done, total: None)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, SIZE])
def test_holes_only(world: World, size: int) -> None:
    composer = world.composer()
    composer.create("vm1", size)
    assert hash_of(composer, "vm1") == expected(bytes(size))


def test_a_snapshot_a_clone_and_a_volume_that_was_shrunk(world: World) -> None:
    composer = world.composer()
    composer.create("vm1", SIZE)
    fill(composer, "vm1", pattern(1, 3), BLOCK_BYTES - 4096)
    fill(composer, "vm1", b"end", SIZE - 3)
    composer.snapshot("vm1", "vm1@monday")
    composer.clone("vm1@monday", "vm2")
    fill(composer, "vm2", bytes(4096), BLOCK_BYTES)
    composer.resize(composer.find("vm1"), BLOCK_BYTES)
    composer.resize(composer.find("vm1"), SIZE)
    names = ("vm1@monday", "vm2", "vm1")
    contents = {name: content_of(composer, name) for name in names}
    assert len(set(contents.values())) == len(names)
    for name in names:
        assert hash_of(composer, name) == expected(contents[name])
        assert content_of(composer, name) == contents[name]


def test_what_is_written_meanwhile_is_not_in_it(world: World) -> None:
    composer = world.composer()
    composer.create("vm1", SIZE)
    fill(composer, "vm1", pattern(1, 2))
    before = content_of(composer, "vm1")
    with composer.using(composer.find("vm1")) as writer:

        def write(done: int, total: int) -> None:
            writer.write(done, pattern(2))

        with composer.using(composer.find("vm1")) as opened, opened.reading_frozen() as engine:
            writer.write(0, pattern(3))
            writer.write(2 * BLOCK_BYTES, pattern(3))
            assert hash_volume(engine, write) == expected(before)
        assert writer.read(0, 4096) == pattern(3)


def test_progress_ends_at_the_end_and_may_end_the_hashing(world: World) -> None:
    class EnoughError(Exception):
        pass

    def enough(done: int, total: int) -> None:
        raise EnoughError

    composer = world.composer()
    composer.create("vm1", SIZE)
    for block in range(4):
        fill(composer, "vm1", pattern(block), block * BLOCK_BYTES)
    said: list[tuple[int, int]] = []
    with composer.using(composer.find("vm1")) as opened, opened.reading_frozen() as engine:
        hash_volume(engine, lambda done, total: said.append((done, total)))
        with pytest.raises(EnoughError):
            hash_volume(engine, enough)
    assert said == [(BLOCK_BYTES, SIZE), (2 * BLOCK_BYTES, SIZE), (3 * BLOCK_BYTES, SIZE), (SIZE, SIZE)]


def test_a_volume_that_another_node_writes_is_refused(world: World) -> None:
    one, two = world.composer(), world.composer(host="two")
    one.create("vm1", SIZE)
    with one.using(one.find("vm1")), pytest.raises(LockHeld, match="vm1"):
        hash_of(two, "vm1")


def test_only_what_was_written_is_frozen(world: World) -> None:
    composer = world.composer()
    composer.create("vm1", SIZE)
    fill(composer, "vm1", pattern(1, 2))

    def layers() -> int:
        found = composer.find("vm1")
        return sum(1 for _ in found.mapper.catalog.chain(found.record.layer))

    first = hash_of(composer, "vm1")
    assert layers() == 2
    assert hash_of(composer, "vm1") == first
    assert layers() == 2
    composer.resize(composer.find("vm1"), 4096)
    composer.resize(composer.find("vm1"), SIZE)
    assert hash_of(composer, "vm1") == expected(pattern(1).ljust(SIZE, b"\0"))
    assert layers() == 3
