"""Locks of two nodes on one store: who has one, who is refused, who is fenced."""

import threading
from collections.abc import Callable
from functools import partial

import pytest

from archipfs.blockers.memory import MemoryBlocker, MemoryStore
from archipfs.errors import Fenced, LockHeld, StoreUnavailable
from archipfs.map.locks import Locks, Node, lock_key
from archipfs.map.records import Hold, LockRecord
from archipfs.types import VolumeId, new_volume_id
from tests.compose.interleave import SteppedBlocker, every_second, schedules

VOLUME = VolumeId("0" * 32)


class Nodes:
    """Two nodes, and the volume they want."""

    def __init__(self) -> None:
        self.store = MemoryBlocker()
        self.one, self.two = self.locks("one"), self.locks("two")

    def locks(self, host: str) -> Locks:
        return Locks(self.store, Node(f"node-{host}", host))


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def take(locks: Locks, hold: Hold = Hold.IO) -> LockRecord:
    return locks.take(VOLUME, hold, called="vm")


def give_back(locks: Locks, hold: Hold = Hold.IO) -> None:
    locks.give_back(VOLUME, hold, called="vm")


def test_a_lock_nobody_took_is_free(nodes: Nodes) -> None:
    assert nodes.one.get(VOLUME) is None
    assert nodes.one.holder(VOLUME) is None
    give_back(nodes.one)
    nodes.one.break_(VOLUME)
    nodes.one.forget(VOLUME)
    assert nodes.one.get(VOLUME) is None


def test_taking_is_idempotent_for_its_owner(nodes: Nodes) -> None:
    first = take(nodes.one)
    assert take(nodes.one) == first
    assert take(nodes.locks("one")) == first, "also for the same node's next process"
    give_back(nodes.one)
    assert nodes.one.holder(VOLUME) is None


def test_another_node_is_refused_and_told_who_has_it(nodes: Nodes) -> None:
    take(nodes.one)
    for refused in (take, give_back):
        with pytest.raises(LockHeld, match=r"vm is locked by one \(node node-one\).*volume-unlock -f vm") as caught:
            refused(nodes.two)
        assert "\n" not in str(caught.value)
    holder = nodes.two.holder(VOLUME)
    assert holder is not None
    assert holder.host == "one"
    assert nodes.one.is_ours(holder)
    assert not nodes.two.is_ours(holder)


def test_a_lock_given_back_is_anybodys(nodes: Nodes) -> None:
    take(nodes.one)
    give_back(nodes.one)
    assert take(nodes.two).host == "two"


def test_a_lock_is_held_until_its_last_reason_is_gone(nodes: Nodes) -> None:
    since = take(nodes.one).since_ns
    both = take(nodes.one, Hold.OPENED)
    assert both.holds == (Hold.IO, Hold.OPENED)
    assert both.since_ns == since
    give_back(nodes.one)
    with pytest.raises(LockHeld):
        take(nodes.two)
    give_back(nodes.one, Hold.LOCKED)
    assert nodes.one.holder(VOLUME) is not None
    give_back(nodes.one, Hold.OPENED)
    assert nodes.one.holder(VOLUME) is None


def test_breaking_frees_the_lock_and_fences_its_owner(nodes: Nodes) -> None:
    lease = take(nodes.one)
    nodes.one.verify(lease, called="vm")
    nodes.two.break_(VOLUME)
    assert nodes.one.holder(VOLUME) is None
    with pytest.raises(Fenced, match="lock of vm was broken"):
        nodes.one.verify(lease, called="vm")


def test_an_owner_that_takes_its_broken_lock_again_is_still_fenced_with_the_old_one(nodes: Nodes) -> None:
    lease = take(nodes.one)
    nodes.two.break_(VOLUME)
    again = take(nodes.one)
    assert again.generation > lease.generation
    nodes.one.verify(again, called="vm")
    with pytest.raises(Fenced):
        nodes.one.verify(lease, called="vm")


def test_generations_never_fall(nodes: Nodes) -> None:
    generations = []
    for number in range(4):
        generations.append(take(nodes.one).generation)
        (nodes.two.break_ if number % 2 else nodes.one.break_)(VOLUME)
        generations.append(take(nodes.two).generation)
        give_back(nodes.two)
    assert generations == sorted(generations)
    assert generations[-1] == 3 * 4  # taken when free, broken, taken when free


def test_a_lock_that_was_free_in_between_is_another_one(nodes: Nodes) -> None:
    """Else a live bitmap from before would be believed after another node has had the volume."""
    lease = take(nodes.one)
    assert take(nodes.one, Hold.LOCKED).generation == lease.generation
    give_back(nodes.one)
    assert take(nodes.one).generation == lease.generation
    give_back(nodes.one)
    give_back(nodes.one, Hold.LOCKED)
    assert take(nodes.one).generation > lease.generation


def test_a_lease_stays_good_when_a_reason_is_added(nodes: Nodes) -> None:
    lease = take(nodes.one)
    take(nodes.one, Hold.LOCKED)
    nodes.one.verify(lease, called="vm")


def test_an_owner_whose_volume_is_gone_is_fenced(nodes: Nodes) -> None:
    lease = take(nodes.one)
    nodes.one.forget(VOLUME)
    with pytest.raises(Fenced):
        nodes.one.verify(lease, called="vm")


def test_locks_of_different_volumes_are_different(nodes: Nodes) -> None:
    take(nodes.one)
    assert nodes.two.take(new_volume_id(), Hold.IO, called="other").host == "two"


def test_of_racing_nodes_one_wins() -> None:
    nodes = Nodes()
    won: list[int] = []
    start = threading.Barrier(8)

    def race(number: int) -> None:
        locks = nodes.locks(str(number))
        start.wait()
        for _ in range(50):
            try:
                take(locks)
            except LockHeld:
                continue
            won.append(number)
            assert won.count(number) == len(won), "two nodes have one lock"

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holder = nodes.one.holder(VOLUME)
    assert holder is not None
    assert {holder.host} == {str(number) for number in won}


def test_in_every_order_of_their_calls_one_of_two_nodes_wins() -> None:
    for schedule in schedules(every_second(4)):
        nodes = Nodes()
        blocker = SteppedBlocker(nodes.store)
        one, two = (Locks(blocker, Node(host, host)) for host in ("one", "two"))
        *outcomes, whole = schedule.run(blocker, partial(take, one), partial(take, two))
        assert sorted(outcome.succeeded for outcome in outcomes) == [False, True]
        if whole:
            return


def test_breaking_beside_taking_leaves_no_lease_that_is_good_by_mistake() -> None:
    """Whatever the order: after the break, either the lease is fenced or it was got after it."""
    for schedule in schedules(every_second(4)):
        nodes = Nodes()
        first = take(nodes.one)
        blocker = SteppedBlocker(nodes.store)
        one, two = (Locks(blocker, Node(f"node-{host}", host)) for host in ("one", "two"))
        taken, broken, whole = schedule.run(blocker, partial(take, one, Hold.LOCKED), partial(two.break_, VOLUME))
        assert taken.succeeded
        assert broken.succeeded
        lease = taken.result
        assert isinstance(lease, LockRecord)
        now = nodes.one.get(VOLUME)
        assert now is not None
        assert now.generation > first.generation
        if lease.generation == first.generation:
            with pytest.raises(Fenced):
                nodes.one.verify(lease, called="vm")
        else:
            nodes.one.verify(lease, called="vm")
        if whole:
            return


# Where the store shuts nobody out


def test_a_lock_that_was_broken_says_so_until_its_next_owner_has_seen_to_it(nodes: Nodes) -> None:
    take(nodes.one)
    nodes.two.break_(VOLUME)
    lease = take(nodes.two)
    assert lease.broken
    give_back(nodes.two)
    lease = take(nodes.one)
    assert lease.broken
    mended = nodes.one.mended(lease)
    assert not mended.broken
    assert nodes.one.mended(lease) == mended
    nodes.one.verify(lease, called="vm")
    give_back(nodes.one)
    assert not take(nodes.two).broken


def test_a_lock_under_which_nobody_wrote_is_not_marked(nodes: Nodes) -> None:
    take(nodes.one, Hold.LOCKED)
    nodes.two.break_(VOLUME)
    assert not take(nodes.two).broken


def test_who_lost_the_lock_again_does_not_take_the_mark_away(nodes: Nodes) -> None:
    take(nodes.one)
    nodes.two.break_(VOLUME)
    lease = take(nodes.two)
    nodes.one.break_(VOLUME)
    with pytest.raises(Fenced):
        nodes.two.mended(lease)
    assert take(nodes.one).broken


# Where it shuts out


class Clients:
    """Two nodes, each a client of one store; what they do can be stepped through."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.blockers = [SteppedClient(self.store) for _ in range(2)]
        self.one, self.two = (
            Locks(blocker, Node(f"node-{host}", host))
            for blocker, host in zip(self.blockers, ("one", "two"), strict=True)
        )


class SteppedClient(SteppedBlocker):
    """Steps through claims as well."""

    def __init__(self, store: MemoryStore) -> None:
        self.client = MemoryBlocker(store)
        super().__init__(self.client)

    @property
    def shuts_out(self) -> bool:
        return True

    def claim(self, key: str, owner: str) -> None:
        self.call("claim", lambda: self.client.claim(key, owner))

    def disclaim(self, key: str) -> None:
        self.call("disclaim", lambda: self.client.disclaim(key))

    def shut_out(self, key: str) -> None:
        self.call("shut_out", lambda: self.client.shut_out(key))


def test_the_owner_has_the_claim_and_nobody_else() -> None:
    clients = Clients()
    take(clients.one)
    assert clients.one.claimed().keys() == {VOLUME}
    assert list(clients.store.claims) == [lock_key(VOLUME)]
    with pytest.raises(LockHeld):
        take(clients.two)
    assert not clients.blockers[0].client.is_shut_out
    give_back(clients.one)
    assert clients.one.claimed() == {}
    assert not clients.store.claims


def test_a_lock_that_cannot_be_claimed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = Clients()

    def fail(key: str, owner: str) -> None:
        raise StoreUnavailable("wanted by the test")

    monkeypatch.setattr(clients.blockers[0], "claim", fail)
    with pytest.raises(StoreUnavailable):
        take(clients.one)
    assert clients.one.holder(VOLUME) is None
    take(clients.two)


def test_a_lock_that_was_ours_and_cannot_be_claimed_stays_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the live bitmap that a crash left beside it would be worth nothing."""
    clients = Clients()
    lease = take(clients.one)

    def fail(key: str, owner: str) -> None:
        raise StoreUnavailable("wanted by the test")

    monkeypatch.setattr(clients.blockers[0], "claim", fail)
    with pytest.raises(StoreUnavailable):
        take(clients.one)
    monkeypatch.undo()
    assert take(clients.one).generation == lease.generation


def test_breaking_shuts_out_also_who_had_freed_the_record_only() -> None:
    """As a breaker that died between its steps leaves it."""
    clients = Clients()
    take(clients.one)
    clients.two._break_record(VOLUME)
    assert not clients.blockers[0].client.is_shut_out
    clients.two.break_(VOLUME)
    assert clients.blockers[0].client.is_shut_out


@pytest.mark.parametrize("comes_back", [False, True], ids=["taking", "coming back"])
def test_whatever_the_order_a_broken_owner_is_shut_out_or_knows(comes_back: bool) -> None:
    for schedule in schedules(every_second(8)):
        clients = Clients()
        if comes_back:
            lease = take(clients.one)
            clients.blockers[0].client.disclaim(lock_key(VOLUME))
            acquire: Callable[[], object] = partial(clients.one.claim_again, lease)
        else:
            acquire = partial(take, clients.one)
        # Both step through the gates of one blocker.
        clients.blockers[1].gates = clients.blockers[0].gates
        acquired, broken, whole = schedule.run(clients.blockers[0], acquire, partial(clients.two.break_, VOLUME))
        assert broken.succeeded, broken.error
        record = clients.two.get(VOLUME)
        believes = bool(acquired.result) and not clients.blockers[0].client.is_shut_out
        is_owner = record is not None and record.node == "node-one"
        assert believes <= is_owner, schedule
        if whole:
            return
