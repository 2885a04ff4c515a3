"""What every driver must do whose store knows its clients: the contract's claims, as tests.

A driver's test module subclasses :class:`ClaimConformance` and gives the fixture ``store``, whose every ``open`` is
another client.
"""

import threading
from collections.abc import Callable, Iterator

import pytest

from archipfs.blockers.contract import Blocker
from archipfs.errors import InvalidInput, ShutOut, StoreError
from tests.blockers.conformance import Store

WAITS_S = 0.3
"""A call that has not come back by then is taken to wait."""
COMES_BACK_S = 30.0


class Call:
    """A call in a thread of its own."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.error: StoreError | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except StoreError as error:
            self.error = error

    @property
    def waits(self) -> bool:
        self._thread.join(WAITS_S)
        return self._thread.is_alive()

    def end(self) -> StoreError | None:
        """What it raised."""
        self._thread.join(COMES_BACK_S)
        assert not self._thread.is_alive()
        return self.error


def check_is_shut_out(blocker: Blocker) -> None:
    calls: list[Callable[[], object]] = [
        lambda: blocker.get_record("volume/a"),
        lambda: blocker.put_record("volume/a", b"late", None),
        lambda: blocker.delete_record("volume/a", 1),
        lambda: list(blocker.list_records("volume")),
        lambda: blocker.put("pack/late", b"late"),
        lambda: blocker.get("pack/a"),
        lambda: blocker.open("pack/a"),
        lambda: blocker.exists("pack/a"),
        lambda: blocker.delete("pack/a"),
        lambda: list(blocker.list("pack")),
        lambda: blocker.create_data("layer/late"),
        lambda: blocker.open_data("layer/a", writable=True, claim="lock/a"),
        lambda: blocker.delete_data("layer/a"),
        lambda: list(blocker.list_data("layer")),
        lambda: blocker.claim("lock/a", "late/1"),
        lambda: blocker.shut_out("lock/b"),
    ]
    for call in calls:
        with pytest.raises(ShutOut):
            call()
    assert blocker.is_shut_out


class ClaimConformance:
    """Needs a fixture ``store`` that gives a fresh :class:`Store`."""

    @pytest.fixture
    def here(self, store: Store) -> Iterator[Blocker]:
        blocker = store.open()
        yield blocker
        blocker.close()

    @pytest.fixture
    def there(self, store: Store) -> Iterator[Blocker]:
        blocker = store.open()
        yield blocker
        blocker.close()

    def test_claims_mean_something(self, here: Blocker) -> None:
        assert here.shuts_out
        assert not here.is_shut_out

    def test_who_is_shut_out_changes_nothing_any_more(self, here: Blocker, there: Blocker) -> None:
        here.put("pack/a", b"kept")
        here.create_data("layer/a").close()
        version = here.put_record("volume/a", b"kept", None)
        there.claim("lock/a", "there/1")
        loose = there.open_data("layer/a", writable=True)
        claimed = there.open_data("layer/a", writable=True, claim="lock/a")
        loose.pwrite(0, b"before")
        here.shut_out("lock/a")
        check_is_shut_out(there)
        with pytest.raises(ShutOut):
            loose.pwrite(0, b"late")
        with pytest.raises(ShutOut):
            loose.pread(0, 6)
        late = Call(lambda: claimed.pwrite(0, b"late"))
        assert late.waits
        assert not here.is_shut_out
        assert here.open_data("layer/a", writable=False).pread(0, 6) == b"before"
        assert list(here.list("pack")) == ["pack/a"]
        assert list(here.list_data("layer")) == ["layer/a"]
        here.put_record("volume/a", b"new", version)
        there.disclaim("lock/a")
        assert isinstance(late.end(), StoreError)
        assert here.open_data("layer/a", writable=False).pread(0, 6) == b"before"

    def test_a_claim_shuts_out_whoever_had_it(self, here: Blocker, there: Blocker) -> None:
        there.claim("lock/a", "there/1")
        there.claim("lock/b", "there/1")
        here.claim("lock/a", "here/2")
        check_is_shut_out(there)
        # It lost the other one as well, so that this shuts nobody out.
        successor = there.reconnect()
        here.claim("lock/b", "here/2")
        assert successor.get_record("volume/a") is None
        here.put_record("volume/a", b"x", None)
        successor.close()

    def test_so_does_a_claim_of_the_same_owner_in_another_process(self, here: Blocker, there: Blocker) -> None:
        there.claim("lock/a", "node/1")
        here.claim("lock/a", "node/1")
        check_is_shut_out(there)
        assert here.get_record("volume/a") is None

    def test_claiming_again_changes_nothing(self, here: Blocker) -> None:
        here.create_data("layer/a").close()
        here.claim("lock/a", "here/1")
        data = here.open_data("layer/a", writable=True, claim="lock/a")
        here.claim("lock/a", "here/1")
        data.pwrite(0, b"x")
        here.claim("lock/a", "here/2")
        data.pwrite(1, b"y")
        assert data.pread(0, 2) == b"xy"

    def test_what_was_given_up_is_free(self, here: Blocker, there: Blocker) -> None:
        there.claim("lock/a", "there/1")
        there.disclaim("lock/a")
        there.disclaim("lock/a")
        there.disclaim("lock/b")
        here.shut_out("lock/a")
        here.claim("lock/a", "here/2")
        assert there.get_record("volume/a") is None
        assert not there.is_shut_out
        there.disclaim("lock/a")
        there.shut_out("lock/a")
        assert Call(lambda: here.get_record("volume/a")).end().__class__ is ShutOut

    def test_nobody_shuts_himself_out(self, here: Blocker) -> None:
        here.claim("lock/a", "here/1")
        with pytest.raises(InvalidInput):
            here.shut_out("lock/a")
        here.shut_out("lock/b")
        assert here.get_record("volume/a") is None

    def test_what_was_opened_under_a_claim_fails_once_that_is_given_up(self, here: Blocker) -> None:
        here.create_data("layer/a").close()
        here.claim("lock/a", "here/1")
        data = here.open_data("layer/a", writable=True, claim="lock/a")
        here.disclaim("lock/a")
        with pytest.raises(StoreError):
            data.pwrite(0, b"x")
        here.claim("lock/a", "here/2")
        here.open_data("layer/a", writable=True, claim="lock/a").pwrite(0, b"y")

    def test_going_on_after_having_been_shut_out(self, here: Blocker, there: Blocker) -> None:
        for name in "abc":
            here.create_data(f"layer/{name}").close()
        for name in "ab":
            there.claim(f"lock/{name}", "there/1")
        a, b = (there.open_data(f"layer/{name}", writable=True, claim=f"lock/{name}") for name in "ab")
        c = there.open_data("layer/c", writable=True)
        here.shut_out("lock/a")
        with pytest.raises(ShutOut):
            there.get_record("volume/a")
        waiting_a, waiting_b = Call(lambda: a.pwrite(0, b"a")), Call(lambda: b.pwrite(0, b"b"))
        assert waiting_a.waits

        successor = there.reconnect()
        assert there.is_shut_out
        assert not successor.is_shut_out
        assert successor.get_record("volume/a") is None
        here.claim("lock/a", "here/2")
        there.adopt(successor)
        assert not there.is_shut_out
        c.pwrite(0, b"c")
        assert waiting_a.waits
        assert waiting_b.waits
        there.disclaim("lock/a")
        assert isinstance(waiting_a.end(), StoreError)
        assert waiting_b.waits
        there.claim("lock/b", "there/1")
        assert waiting_b.end() is None
        b.pwrite(1, b"b")

        contents = [here.open_data(f"layer/{name}", writable=False).pread(0, 2) for name in "abc"]
        assert contents == [bytes(2), b"bb", b"c\0"]
        assert not here.is_shut_out
        here.shut_out("lock/b")
        with pytest.raises(ShutOut):
            there.get_record("volume/a")

    def test_a_claim_comes_before_what_is_opened_under_it(self, here: Blocker) -> None:
        here.create_data("layer/a").close()
        with pytest.raises(StoreError):
            here.open_data("layer/a", writable=True, claim="lock/a")
        here.claim("lock/a", "here/1")
        here.disclaim("lock/a")
        with pytest.raises(StoreError):
            here.open_data("layer/a", writable=True, claim="lock/a")
