"""The ``memory`` driver against the contract."""

import pytest

from archipfs.blockers.memory import MemoryBlocker
from tests.blockers.conformance import Conformance, Store


class TestMemory(Conformance):
    @pytest.fixture
    def store(self) -> Store:
        blocker = MemoryBlocker()
        return Store(lambda: blocker)

    def test_packs_may_be_small(self) -> None:
        assert MemoryBlocker(pack_bytes=9_000).pack_bytes == 9_000

    def test_holes_are_exact(self) -> None:
        data = MemoryBlocker().create_data("layer/a")
        data.pwrite(8192, b"x")
        data.pwrite(1 << 40, b"x")
        assert (data.next_data(0), data.next_hole(8192), data.next_data(12288)) == (8192, 12288, 1 << 40)
        assert data.allocated() == 8192
        data.punch(8192, 4096)
        assert data.next_data(0) == 1 << 40
