"""Content hashes: they are the ones their names say."""

import pytest

from archipfs.errors import InvalidInput
from archipfs.map.hashes import content_hash

OF_NOTHING = {
    "blake3": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "xxh3-128": "99aa06d3014798d86001c324468d497f",
}
"""As their specifications have it."""


@pytest.mark.parametrize("name", OF_NOTHING)
def test_it_is_the_hash_of_that_name(name: str) -> None:
    assert content_hash(name).name == name
    assert content_hash(name).digest(b"").hex() == OF_NOTHING[name]


@pytest.mark.parametrize("name", OF_NOTHING)
def test_digests_are_as_long_as_it_says_whatever_holds_the_bytes(name: str) -> None:
    content = bytes(range(256)) * 16
    digest = content_hash(name).digest(content)
    assert len(digest) == content_hash(name).digest_bytes
    for other in (bytearray(content), memoryview(b"x" + content)[1:], memoryview(bytearray(content))):
        assert content_hash(name).digest(other) == digest


def test_only_hashes_that_resist_collisions_are_trusted() -> None:
    assert {name for name in OF_NOTHING if content_hash(name).trusted} == {"blake3", "sha256"}


@pytest.mark.parametrize("name", ["", "md5", "BLAKE3"])
def test_another_name_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(InvalidInput, match="choose one of blake3, sha256, xxh3-128"):
        content_hash(name)
