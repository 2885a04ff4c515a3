"""qemu's own tools on the mount: images converted, compared, mapped, resized and benchmarked; qemu-io's scripts."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib.instance import Instance
from tests.lib.programs import run
from tests.lib.volumes import create, read_all, snapshot
from tests.lib.waiting import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.outside]

KIB, MIB = 1 << 10, 1 << 20
SIZE_MIB = 24


@pytest.fixture(scope="module", params=[True, False], ids=["front", "plain"])
def front(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def content() -> bytes:
    """Data, zeros that were written and holes, with borders on sectors and off them."""
    numbers = random.Random(5)
    made = bytearray(SIZE_MIB * MIB)
    for _ in range(40):
        length = numbers.choice((512, 4 * KIB, 100 * KIB, 700 * KIB))
        offset = numbers.randrange((len(made) - length) // 512) * 512
        made[offset : offset + length] = numbers.randbytes(length) if numbers.random() < 0.7 else bytes(length)
    return bytes(made)


@pytest.fixture
def image(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "image"
    path.write_bytes(content)
    run("fallocate", "--dig-holes", path)
    return path


def qemu_img(*arguments: str | int | Path) -> str:
    return run("qemu-img", *arguments)


def same(one: Path, form: str, other: Path, other_form: str) -> None:
    qemu_img("compare", "-q", "-f", form, "-F", other_form, one, other)


# qemu-img


@pytest.mark.parametrize("cache", ["none", "writeback", "directsync", "unsafe"])
@pytest.mark.parametrize("order", [[], ["-W", "-m", "8"]], ids=["in order", "any order"])
def test_convert_from_raw_to_a_volume_and_back(
    mount: Instance, image: Path, tmp_path: Path, content: bytes, cache: str, order: list[str]
) -> None:
    options = ["-t", cache, *order]
    qemu_img("convert", *options, "-f", "raw", "-O", "raw", image, mount.path / "vm1")
    assert read_all(mount.path / "vm1") == content
    qemu_img("convert", "-T", cache, *order, "-f", "raw", "-O", "raw", mount.path / "vm1", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.parametrize("sparse", ["0", "4k", "64k"])
def test_convert_onto_a_volume_that_is_there(mount: Instance, image: Path, content: bytes, sparse: str) -> None:
    volume = create(mount.path / "vm1", len(content))
    volume.write_bytes(b"x" * len(content))
    qemu_img("convert", "-n", "-S", sparse, "-f", "raw", "-O", "raw", image, volume)
    assert read_all(volume) == content


def test_qcow2_in_a_volume_is_sound_through_all_that_qemu_img_does(mount: Instance, image: Path) -> None:
    """A qcow2 file grows while it is written, and is read and written where it likes."""
    qcow2, grown = mount.path / "vm1.qcow2", mount.path / "vm2.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", image, qcow2)
    qemu_img("check", "-q", "-f", "qcow2", qcow2)
    same(image, "raw", qcow2, "qcow2")
    qemu_img("convert", "-W", "-c", "-f", "qcow2", "-O", "qcow2", qcow2, grown)
    qemu_img("snapshot", "-c", "first", grown)
    qemu_img("resize", "-q", "-f", "qcow2", grown, f"{2 * SIZE_MIB}M")
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {SIZE_MIB}M 1M", grown)
    qemu_img("check", "-q", "-f", "qcow2", grown)
    qemu_img("snapshot", "-a", "first", grown)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", grown, mount.path / "vm3")
    same(image, "raw", mount.path / "vm3", "raw")
    qemu_img("check", "-q", "-f", "qcow2", grown)


def test_an_overlay_over_a_snapshot_is_committed_into_a_clone(mount: Instance, image: Path, content: bytes) -> None:
    volume = mount.path / "vm1"
    qemu_img("convert", "-f", "raw", "-O", "raw", image, volume)
    monday = snapshot(volume, "monday")
    overlay = mount.path / "overlay"
    qemu_img("create", "-q", "-f", "qcow2", "-b", monday, "-F", "raw", overlay)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 1M 64k", "-c", "write -z 2M 1M", overlay)
    os.setxattr(monday, "user.archip.clone", b"vm2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", mount.path / "vm2", "-F", "raw", overlay)
    qemu_img("commit", "-q", "-f", "qcow2", overlay)
    wanted = bytearray(content)
    wanted[MIB : MIB + 64 * KIB] = b"\x09" * (64 * KIB)
    wanted[2 * MIB : 3 * MIB] = bytes(MIB)
    assert read_all(mount.path / "vm2") == wanted
    assert read_all(monday) == content


def test_resize_makes_a_volume_larger_and_smaller(mount: Instance, content: bytes) -> None:
    volume = mount.path / "vm1"
    volume.write_bytes(content)
    qemu_img("resize", "-q", "-f", "raw", volume, f"{3 * SIZE_MIB}M")
    assert volume.stat().st_size == 3 * SIZE_MIB * MIB
    qemu_img("resize", "-q", "-f", "raw", "--shrink", volume, "1M")
    qemu_img("resize", "-q", "-f", "raw", volume, f"{SIZE_MIB}M")
    assert read_all(volume) == content[:MIB] + bytes(len(content) - MIB)


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_create_with_preallocation_makes_a_volume_of_zeros(mount: Instance, preallocation: str) -> None:
    qemu_img("create", "-q", "-f", "raw", "-o", f"preallocation={preallocation}", mount.path / "vm1", "5M")
    assert read_all(mount.path / "vm1") == bytes(5 * MIB)


def test_map_and_measure_see_the_holes(mount: Instance, front: bool) -> None:
    if not front:
        pytest.skip("plain pyfuse3 has no handler for LSEEK")
    volume = create(mount.path / "vm1", 16 * MIB)
    run("qemu-io", "-f", "raw", "-c", "write -P 1 4M 1M", "-c", "write -P 2 9M 64k", volume)
    mapped = json.loads(qemu_img("map", "--output=json", "-f", "raw", volume))
    data = [(piece["start"], piece["length"]) for piece in mapped if piece["data"]]
    assert data == [(4 * MIB, MIB), (9 * MIB, 64 * KIB)]
    assert sum(piece["length"] for piece in mapped) == 16 * MIB
    measured = json.loads(qemu_img("measure", "--output=json", "-f", "raw", "-O", "qcow2", volume))
    assert measured["required"] < 3 * MIB


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_bench_ends_without_an_error(mount: Instance, aio: str, cache: str) -> None:
    if (aio, cache) == ("native", "writeback"):
        pytest.skip("qemu takes aio=native with O_DIRECT only")
    volume = create(mount.path / "vm1", 16 * MIB)
    common = ["bench", "-f", "raw", "-t", cache, "-i", aio, "-d", "16"]
    qemu_img(*common, "-w", "-c", 2000, "-s", 4096, "-S", 12288, "--flush-interval=100", volume)
    qemu_img(*common, "-c", 2000, "-s", 65536, volume)
    qemu_img(*common, "-w", "-c", 500, "-s", 1536, "-o", 512, "-S", 2560, volume)


# qemu-io

Operation = tuple[str, Callable[[bytearray], None]]


def filled(byte: int, offset: int, length: int) -> Callable[[bytearray], None]:
    def apply(content: bytearray) -> None:
        content[offset : offset + length] = bytes([byte]) * length

    return apply


def a_script(seed: int, *, punches: bool, size: int) -> list[Operation]:
    """Writes, zeros, discards, reads with a pattern to be found, whole sectors and parts of them."""
    numbers = random.Random(seed)
    content = bytearray(size)
    script: list[Operation] = []
    for _ in range(120):
        unit = numbers.choice((512, 4 * KIB, 64 * KIB))
        length = unit * numbers.randint(1, 12)
        offset = numbers.randrange((size - length) // unit + 1) * unit
        byte = numbers.randint(1, 255)
        kinds = ["write", "aio_write", "write -f", "writev", "write -z", "aio_write -z", "read", "flush"]
        kinds += ["write -z -u", "aio_write -z -u", "discard"] if punches else []
        kind = numbers.choice(kinds)
        if kind == "read":
            if content[offset : offset + length].count(content[offset]) != length:
                continue
            script.append((f"read -P {content[offset]} {offset} {length}", lambda content: None))
        elif kind == "flush":
            script.append(("aio_flush", lambda content: None))
        elif "-z" in kind or kind == "discard":
            script.append((f"{kind} {offset} {length}", filled(0, offset, length)))
        else:
            script.append((f"{kind} -P {byte} {offset} {length}", filled(byte, offset, length)))
        if kind.startswith("aio"):
            script.append(("aio_flush", lambda content: None))
        for _, apply in script[-2:]:
            apply(content)
    return script


def qemu_io(volume: Path, script: list[str], *, aio: str, cache: str) -> None:
    commands = [word for line in script for word in ("-c", line)]
    said = run("qemu-io", "-f", "raw", "-d", "unmap", "-t", cache, "-i", aio, *commands, volume)
    assert "verification failed" not in said, said
    assert "failed" not in said, said


@pytest.mark.parametrize(
    ("cache", "aio"),
    [
        ("none", "threads"),
        ("none", "native"),
        ("none", "io_uring"),
        ("writeback", "threads"),
        ("writeback", "io_uring"),
    ],
)
def test_a_script_of_writes_zeros_and_discards_leaves_what_it_says(
    mount: Instance, front: bool, cache: str, aio: str
) -> None:
    # With O_DIRECT qemu takes whole sectors only.
    size = 4 * MIB + (512 if cache == "writeback" else 0)
    for seed in range(3):
        script = a_script(seed, punches=front, size=size)
        volume = create(mount.path / f"vm{seed}", size)
        content = bytearray(size)
        for line in range(0, len(script), 40):
            piece = script[line : line + 40]
            qemu_io(volume, [command for command, _ in piece], aio=aio, cache=cache)
            for _, apply in piece:
                apply(content)
            snapshot(volume, f"vm{seed}-{line}")
        assert read_all(volume) == content, f"seed {seed}"


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_discard_and_zeros_with_unmap_give_space_back(mount: Instance, front: bool, cache: str) -> None:
    if not front:
        pytest.skip("plain pyfuse3 has no handler for FALLOCATE")
    volume = create(mount.path / "vm1", 16 * MIB)
    qemu_io(volume, ["write -P 5 0 16M", "flush"], aio="threads", cache=cache)
    qemu_io(volume, ["discard 1M 4M", "write -z -u 8M 4M", "write -z 13M 1M", "flush"], aio="threads", cache=cache)
    wait_until(lambda: volume.stat().st_blocks * 512 <= 8 * MIB, "the space is back")
    mapped = json.loads(qemu_img("map", "--output=json", "-f", "raw", volume))
    assert [(piece["start"], piece["length"]) for piece in mapped if piece["data"]] == [
        (0, MIB),
        (5 * MIB, 3 * MIB),
        (12 * MIB, MIB),
        (14 * MIB, 2 * MIB),
    ]
    checks = ["read -P 5 0 1M", "read -P 0 1M 4M", "read -P 5 5M 3M", "read -P 0 8M 4M", "read -P 0 13M 1M"]
    qemu_io(volume, checks, aio="threads", cache=cache)


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_requests_that_are_not_aligned_read_and_write_what_they_say(mount: Instance, cache: str) -> None:
    volume = create(mount.path / "vm1", MIB)
    script = ["write -P 3 100 5000", "read -P 0 0 100", "read -P 3 100 5000", "read -P 0 5100 3000"]
    script += [f"write -P 4 {MIB - 700} 700", f"read -P 4 {MIB - 700} 700", "write -z 200 4097", "read -P 0 200 4097"]
    qemu_io(volume, [*script, "read -P 3 4297 803"], aio="threads", cache=cache)
    assert volume.stat().st_size == MIB
