"""The ``memory`` driver against the contract."""

import pytest

from archipfs.blockers.contract import Blocker
from archipfs.blockers.memory import MemoryBlocker, MemoryStore
from archipfs.errors import InvalidInput, NotSupported, StoreError
from tests.blockers.claims import Call, ClaimConformance
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


class TestMemoryOfSeveralClients(Conformance, ClaimConformance):
    @pytest.fixture
    def store(self) -> Store:
        store = MemoryStore()
        return Store(lambda: MemoryBlocker(store))

    def test_closing_ends_what_waits(self, here: Blocker, there: Blocker) -> None:
        here.create_data("layer/a").close()
        there.claim("lock/a", "there/1")
        data = there.open_data("layer/a", writable=True, claim="lock/a")
        here.shut_out("lock/a")
        waiting = Call(lambda: data.pwrite(0, b"a"))
        assert waiting.waits
        data.close()
        assert isinstance(waiting.end(), StoreError)

    def test_only_a_client_of_the_same_store_can_be_adopted(self) -> None:
        with pytest.raises(InvalidInput):
            MemoryBlocker(MemoryStore()).adopt(MemoryBlocker(MemoryStore()))


def test_a_store_with_one_client_shuts_nobody_out() -> None:
    blocker = MemoryBlocker()
    assert not blocker.shuts_out
    blocker.create_data("layer/a").close()
    blocker.claim("lock/a", "here/1")
    blocker.shut_out("lock/a")
    data = blocker.open_data("layer/a", writable=True, claim="lock/a")
    blocker.disclaim("lock/a")
    data.pwrite(0, b"x")
    with pytest.raises(NotSupported):
        blocker.reconnect()
