"""Large files written past the page cache: the same bytes, whatever the pieces and whatever the disk will have."""

import errno
import fcntl
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from archipfs.blockers.direct import ALIGNMENT, STAGING_BYTES, WORTHWHILE_BYTES, write_direct
from archipfs.blockers.file import FileBlocker

SIZES = [
    1,
    ALIGNMENT - 1,
    ALIGNMENT,
    WORTHWHILE_BYTES + 1,
    STAGING_BYTES - 1,
    STAGING_BYTES,
    STAGING_BYTES + 1,
    2 * STAGING_BYTES + ALIGNMENT + 17,
]


@pytest.fixture(params=["/var/tmp", "/dev/shm"])
def fresh(request: pytest.FixtureRequest) -> Iterator[int]:
    """An empty file, on a disk and in memory."""
    descriptor = os.open(request.param, os.O_TMPFILE | os.O_RDWR, 0o600)
    yield descriptor
    os.close(descriptor)


def pieces_of(content: bytes, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    cuts = sorted(chance.randrange(len(content) + 1) for _ in range(20))
    return [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]


def content_of(descriptor: int) -> bytes:
    return Path(f"/proc/self/fd/{descriptor}").read_bytes()  # opened anew: not past the cache, which wants whole blocks


@pytest.mark.parametrize("size", SIZES)
def test_the_file_is_what_the_pieces_are(fresh: int, size: int) -> None:
    content = random.Random(size).randbytes(size)
    write_direct(fresh, pieces_of(content, size))
    assert content_of(fresh) == content


def test_a_disk_that_refuses_is_written_through_the_cache(fresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes O_DIRECT and then wants another alignment than ours."""
    content = random.Random(1).randbytes(STAGING_BYTES + 5)
    pwrite = os.pwrite
    refused = []

    def choosy(descriptor: int, data: memoryview, place: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(place)
            raise OSError(errno.EINVAL, "no")
        return pwrite(descriptor, data[: len(data) // 2 + 1], place)  # and comes short

    monkeypatch.setattr(os, "pwrite", choosy)
    write_direct(fresh, pieces_of(content, 1))
    assert content_of(fresh) == content
    assert len(refused) <= 1


def test_other_errors_are_raised(fresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, place: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="full"):
        write_direct(fresh, [bytes(WORTHWHILE_BYTES)])


def test_a_large_object_of_a_directory_reads_as_it_was_put(tmp_path: Path) -> None:
    store = FileBlocker.create(tmp_path)
    content = random.Random(2).randbytes(3 * WORTHWHILE_BYTES + 11)
    store.put("pack/one", pieces_of(content, 2))
    assert store.get("pack/one") == content
    store.close()
