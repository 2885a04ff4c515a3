"""`archip volume-hash` and `archip volume-diff`, on a private instance without a daemon."""

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
