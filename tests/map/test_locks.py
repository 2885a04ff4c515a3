"""Locks of two nodes on one store: who has one, who is refused, who is fenced."""

import threading
from functools import partial

import pytest

from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import Fenced, LockHeld
from archipfs.map.locks import Locks, Node
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
