"""Garbage collection, scrub and repair beside a mount whose volumes are open and read all the while."""

import errno
import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MakeInstance
from tests.lib.instance import Instance
from tests.lib.volumes import SECTOR_BYTES, create, opened, read_all
from tests.lib.waiting import threads, wait_until

pytestmark = pytest.mark.mount

VOLUME_BYTES = 8 << 20


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def sealed_volume(mount: Instance, name: str, content: bytes) -> Path:
    path = create(mount.path / name, VOLUME_BYTES)
    with opened(path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, content, 0)
    os.setxattr(path, "user.archip.seal", b"live")
    return path


def packs(mount: Instance) -> list[Path]:
    return sorted((mount.store / "objects" / "pack").glob("*/*"))


def flip_first_sector_of(mount: Instance, sector: bytes) -> Path:
    """Damage a sector in the pack that has it, in place as a disk does."""
    for pack in packs(mount):
        at = pack.read_bytes().find(sector)
        if at >= 0:
            pack.chmod(0o600)
            descriptor = os.open(pack, os.O_RDWR)
            try:
                os.pwrite(descriptor, bytes([sector[0] ^ 1]), at)
            finally:
                os.close(descriptor)
            return pack
    raise AssertionError("no pack has that sector")


def drop_cache(path: Path) -> None:
    with opened(path, os.O_RDONLY) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def test_volumes_are_read_while_the_packs_under_them_are_repacked(mount: Instance) -> None:
    """What is read lies in a pack of which most is garbage, and is copied to another one."""
    kept = noise(1, 512 << 10)
    doomed = sealed_volume(mount, "doomed", kept + noise(2, 4 << 20))
    reader = sealed_volume(mount, "reader", kept)
    doomed.unlink()
    before = packs(mount)

    def read_again_and_again(stop: threading.Event) -> None:
        while not stop.is_set():
            with opened(reader, os.O_RDONLY | os.O_DIRECT) as descriptor:
                assert read_whole(descriptor, len(kept)) == kept

    with threads([read_again_and_again, read_again_and_again]):
        done = json.loads(mount.archip("gc", "--format", "json").stdout)
        again = json.loads(mount.archip("gc", "--format", "json").stdout)
    assert done[0]["repacked"] >= 1
    assert done[0]["freed"] > 3 << 20
    assert again[0]["packs"] == 0
    assert len(set(before) - set(packs(mount))) == done[0]["packs"]
    drop_cache(reader)
    assert read_all(reader)[: len(kept)] == kept
    mount.remount()
    assert read_all(reader)[: len(kept)] == kept


def read_whole(descriptor: int, size: int) -> bytes:
    return b"".join(os.pread(descriptor, 1 << 16, at) for at in range(0, size, 1 << 16))


def test_a_damaged_chunk_gives_eio_there_and_nowhere_else_until_it_is_mended(mount: Instance) -> None:
    content = noise(3, 1 << 20)
    at = 50 * SECTOR_BYTES
    sector = content[at : at + SECTOR_BYTES]
    volume = sealed_volume(mount, "vm1", content)
    with opened(volume, os.O_RDONLY | os.O_DIRECT) as descriptor:
        assert read_whole(descriptor, len(content)) == content
        bad = flip_first_sector_of(mount, sector)
        found = mount.archip("check", "--data", "--format", "json", check=False)
        assert found.returncode == 1
        (finding,) = json.loads(found.stdout)
        assert finding["which"].startswith("volume vm1 ")
        begin, end = (int(word) for word in finding["what"].split() if word.isdigit())
        assert begin <= at < end
        for offset in range(0, len(content), SECTOR_BYTES):
            if begin <= offset < end:
                with pytest.raises(OSError, match="Input/output error") as failed:
                    os.pread(descriptor, SECTOR_BYTES, offset)
                assert failed.value.errno == errno.EIO
            else:
                assert os.pread(descriptor, SECTOR_BYTES, offset) == content[offset : offset + SECTOR_BYTES]
        copy = create(mount.path / "copy", VOLUME_BYTES)
        with opened(copy, os.O_RDWR) as target:
            os.pwrite(target, content[begin:end], 3 * SECTOR_BYTES)
            os.fsync(target)
        mended = mount.archip("check", "--data", "--repair")
        assert "1 mended, 0 without" in mended.stderr
        assert read_whole(descriptor, len(content)) == content
        assert bad not in packs(mount)


@contextmanager
def configured(make_instance: MakeInstance, front: bool, text: str) -> Iterator[Instance]:
    instance = make_instance(front=front)
    (instance.root / "archipfs.toml").write_text(text)
    yield instance.mount()


def test_garbage_goes_by_itself(make_instance: MakeInstance, front: bool) -> None:
    with configured(make_instance, front, "[gc]\nevery = 1\n") as mount:
        sealed_volume(mount, "vm1", noise(4, 2 << 20)).unlink()
        wait_until(lambda: not packs(mount), "the packs are gone")
        wait_until(lambda: mount.logged("garbage collected"), "that is in the log")
