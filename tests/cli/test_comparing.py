"""`archip volume-hash` and `archip volume-diff`, on a private instance without a daemon."""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from archipfs.config import load_config
from archipfs.daemon.node import exclusive, open_node
from tests.cli.conftest import Cli
from tests.compose.world import fill

MIB = 1 << 20
NOTHING = hashlib.sha256(b"").hexdigest()

Write = Callable[[str, int, bytes], None]


@pytest.fixture
def write(root: Path) -> Write:
    """Write to a volume, as its node."""

    def write(name: str, offset: int, data: bytes) -> None:
        config = load_config(root=root)
        with exclusive(config, holder={}), open_node(config) as node:
            fill(node.composer, name, data, offset)

    return write


class TestHash:
    def test_blocks_and_top(self, cli: Cli, write: Write) -> None:
        cli("volume-create", "--name", "vm1", "--size", "9M")
        write("vm1", 4 * MIB, b"data")
        first, last = bytes.fromhex(NOTHING), hashlib.sha256(b"data").digest()
        left, right = hashlib.sha256(first + last).digest(), hashlib.sha256(first + bytes(32)).digest()
        top = hashlib.sha256(left + right).hexdigest()
        assert cli("volume-hash", "vm1").lines == [
            f"  0  {NOTHING}",
            f"  1  {last.hex()}",
            f"  2  {NOTHING}",
            f"top  {top}",
        ]
        assert cli("volume-hash", "vm1", "--json").json == {
            "block_hash": "sha256",
            "block_size": 4 * MIB,
            "bytes": 9 * MIB,
            "hashes": [NOTHING, last.hex(), NOTHING],
            "top_hash": top,
        }

    def test_a_snapshot_is_hashed_without_being_changed(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        before = cli("volume-info", "vm1@monday", "--format", "json").json
        assert cli("volume-hash", "vm1@monday").lines[-1].startswith("top")
        assert cli("volume-info", "vm1@monday", "--format", "json").json == before

    def test_no_such_volume(self, cli: Cli, vm1: str) -> None:
        cli("volume-hash", "vm2").failed(1, "vm2")


class TestDiff:
    @pytest.fixture
    def changed(self, cli: Cli, vm1: str, write: Write) -> None:
        """vm1 after vm1@monday: another sector at 1 MiB, and three of which the last two were written before."""
        write(vm1, 8 * MIB, b"x" * 12288)
        cli("volume-snapshot", "vm1@monday")
        write(vm1, MIB + 5, b"y")
        write(vm1, 8 * MIB - 4096, b"z" * 12288)

    RANGES = ((MIB, 4096), (8 * MIB - 4096, 12288))

    def test_ranges(self, cli: Cli, changed: None) -> None:
        assert cli("volume-diff", "vm1@monday", "vm1").lines == [
            " OFFSET  LENGTH",
            "1048576   4 KiB",
            "8384512  12 KiB",
        ]
        assert cli("volume-diff", "-Hp", "vm1", "vm1@monday").lines == [f"{at}\t{length}" for at, length in self.RANGES]
        listed = cli("volume", "diff", "vm1@monday", "vm1", "--format", "json").json
        assert listed == [{"offset": at, "length": length} for at, length in self.RANGES]

    def test_bitmap(self, cli: Cli, changed: None) -> None:
        bits = bytearray((1 << 30) // (64 << 10) // 8)
        for block in (16, 127, 128):
            bits[block // 8] |= 0x80 >> block % 8
        text = base64.b64encode(bits).decode()
        assert cli("volume-diff", "vm1@monday", "vm1", "--bitmap").lines == [text]
        assert cli("volume-diff", "vm1@monday", "vm1", "--bitmap", "--format", "json").json == {
            "size": 1 << 30,
            "granularity": 64 << 10,
            "bitmap": text,
        }
        coarse = cli("volume-diff", "vm1@monday", "vm1", "--bitmap", "--granularity", "4M").out
        assert base64.b64decode(coarse) == bytes([0b11100000, *bytes(31)])

    def test_what_is_the_same(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-diff", vm1, vm1, "-H").out == ""
        assert cli("volume-diff", vm1, vm1, "--format", "json").json == []

    def test_volumes_of_two_backends_and_sizes(self, cli: Cli, vm1: str, write: Write, tmp_path: Path) -> None:
        cli("backend-create", "other", "--driver", "file", "--path", str(tmp_path / "other"))
        cli("volume-create", "--name", "vm2", "--size", "5000", "--backend", "other")
        write("vm2", 4999, b"x")
        assert cli("volume-diff", "-Hp", vm1, "vm2").lines == ["4096\t4096"]
        write(vm1, 4999, b"x")
        assert cli("volume-diff", "-Hp", vm1, "vm2").lines == []

    def test_wrong_input(self, cli: Cli, vm1: str) -> None:
        cli("volume-diff", vm1, "vm2").failed(1, "vm2")
        cli("volume-diff", vm1, vm1, "--granularity", "64K").failed(2, "--bitmap")
        cli("volume-diff", vm1, vm1, "--bitmap", "--granularity", "5000").failed(2, "5000")
        cli("volume-diff", vm1, vm1, "--bitmap", "--granularity", "none").failed(2, "none")
