"""A store that shuts out a whole process when one lock of it is broken: what that process does, and what it does not.

The store is the memory driver's, whose calls on what was claimed wait while the client is shut out.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from archipfs.blockers.contract import Blocker
from archipfs.blockers.memory import MemoryBlocker, MemoryStore
from archipfs.blockers.retry import RetryBlocker
from archipfs.compose import returning
from archipfs.compose.composer import Composer
from archipfs.compose.engine import EngineVolume
from archipfs.compose.volume import OpenVolume
from archipfs.errors import ArchipError, Fenced, ShutOut, StoreAway
from archipfs.map.check import Finding, Severity
from archipfs.map.locks import lock_key
from archipfs.types import SECTOR_BYTES, VolumeId
from tests.compose.world import World, content_of, fill, pattern

MIB = 1 << 20
SOON_SECONDS = 60.0
WAITS_SECONDS = 0.05
"""Whoever is not done after that waits."""


class Client(MemoryBlocker):
    """Runs ``interruption`` before call number ``at`` of the thread ``of``; calls on data objects do not count."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.of: threading.Thread | None = None
        self.at = 0
        self.calls = 0
        self.record_reads = 0
        self.interruption: Callable[[], None] = lambda: None

    @contextmanager
    def _entered(self) -> Iterator[MemoryStore]:
        if threading.current_thread() is self.of:
            self.calls += 1
            if self.calls == self.at:
                self.interruption()
        with super()._entered() as store:
            yield store

    def get_record(self, key: str) -> object:  # type: ignore[override]
        self.record_reads += 1
        return super().get_record(key)


class Nodes:
    """Two nodes, each a client of one store."""

    def __init__(self, world: World, store: MemoryStore) -> None:
        self.world, self.store = world, store
        self.client = Client(store)
        self.one = self.process(self.client)
        self.two = self.process(MemoryBlocker(store), "two")

    def process(self, client: Blocker, host: str = "one") -> Composer:
        composer = self.world.composer(RetryBlocker(client), host)
        composer.begin_watching_stores()
        return composer

    def open(self, name: str) -> OpenVolume:
        return self.one.open(self.one.find(name))

    def errors(self) -> list[Finding]:
        return [found for found in self.world.check() if found.severity is Severity.ERROR]

    def make(self, *names: str) -> list[OpenVolume]:
        """Volumes of a MiB that the first node has open, each with something flushed."""
        opened = []
        for name in names:
            self.one.create(name, MIB)
            opened.append(self.open(name))
            opened[-1].write(0, pattern(1))
            opened[-1].flush()
        return opened


@pytest.fixture
def nodes(world: World) -> Nodes:
    store = MemoryStore()
    return Nodes(World(world.directory, MemoryBlocker(store)), store)


class Call(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._action = action

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self.error = error

    def began(self) -> "Call":
        self.start()
        return self

    def waits(self) -> bool:
        self.join(WAITS_SECONDS)
        return self.is_alive()

    def ended(self) -> BaseException | None:
        self.join(SOON_SECONDS)
        assert not self.is_alive(), "it still waits"
        return self.error


def claims(nodes: Nodes, *names: str) -> bool:
    keys = {lock_key(nodes.two.find(name).record.id) for name in names}
    return keys == set(nodes.store.claims)


def test_a_volume_is_claimed_while_its_owner_may_write(nodes: Nodes) -> None:
    vm1, vm2 = nodes.make("vm1", "vm2")
    assert claims(nodes, "vm1", "vm2")
    nodes.one.release(vm1)
    assert claims(nodes, "vm2")
    nodes.one.release(vm2)
    nodes.one.rename("vm2", "vm3")
    nodes.one.remove("vm3")
    nodes.one.snapshot("vm1", "monday")
    assert claims(nodes)


def test_a_lock_that_is_held_by_hand_is_no_claim(nodes: Nodes) -> None:
    nodes.one.create("vm1", MIB)
    nodes.one.lock("vm1")
    nodes.one.hold_open("vm1")
    assert claims(nodes)
    fill(nodes.one, "vm1", b"x")
    assert claims(nodes)


def test_a_flush_looks_at_no_record(nodes: Nodes) -> None:
    (vm1,) = nodes.make("vm1")
    before = nodes.client.record_reads
    for number in range(3):
        vm1.write(0, pattern(number))
        vm1.flush()
    assert nodes.client.record_reads == before
    assert nodes.one.verify_leases() == []
    assert nodes.client.record_reads == before


def test_the_one_volume_is_lost_and_the_others_only_pause(nodes: Nodes) -> None:
    vm1, vm2, vm3 = nodes.make("vm1", "vm2", "vm3")
    vm1.write(SECTOR_BYTES, pattern(2))  # not flushed
    nodes.two.unlock("vm1", force=True)
    writes = [Call(lambda vm=vm: vm.write(0, pattern(3))).began() for vm in (vm1, vm2, vm3)]  # type: ignore[misc]
    looks = [Call(lambda: nodes.one.find("vm2")).began(), Call(lambda: content_of(nodes.one, "vm3")).began()]
    assert all(call.waits() for call in writes + looks)
    fill(nodes.two, "vm1", pattern(4), 2 * SECTOR_BYTES)
    assert nodes.one.watch_locks() == [vm1.id]
    assert isinstance(writes[0].ended(), ArchipError)
    assert [call.ended() for call in writes[1:] + looks] == [None] * 4
    for vm in (vm2, vm3):
        vm.flush()
        vm.write(SECTOR_BYTES, pattern(5))
        assert vm.read(0, 2 * SECTOR_BYTES) == pattern(3) + pattern(5)
    for refused in (vm1.flush, lambda: vm1.write(0, b"x"), lambda: vm1.read(0, 1), lambda: vm1.resize(2 * MIB)):
        with pytest.raises(Fenced):
            refused()
    assert nodes.one.watch_locks() == []
    with pytest.raises(Fenced):
        nodes.one.release(vm1)
    for vm in (vm2, vm3):
        nodes.one.release(vm)
    content = content_of(nodes.two, "vm1")
    assert (content[:SECTOR_BYTES], content[2 * SECTOR_BYTES :][:SECTOR_BYTES]) == (pattern(1), pattern(4))
    assert content_of(nodes.two, "vm2")[: 2 * SECTOR_BYTES] == pattern(3) + pattern(5)
    fill(nodes.one, "vm1", pattern(6))  # welcome again
    assert content_of(nodes.two, "vm1")[:SECTOR_BYTES] == pattern(6)
    assert nodes.world.problems() == []


def test_who_only_reads_notices_too(nodes: Nodes) -> None:
    (vm1,) = nodes.make("vm1")
    nodes.two.unlock("vm1", force=True)
    assert nodes.one.watch_locks() == [vm1.id]
    assert vm1.fenced


def test_a_process_shuts_out_the_one_before_it(nodes: Nodes) -> None:
    (vm1,) = nodes.make("vm1")
    late = Call(lambda: vm1.write(0, pattern(2)))
    following = nodes.process(MemoryBlocker(nodes.store))
    opened = following.open(following.find("vm1"))
    opened.write(0, pattern(3))
    late.start()
    assert late.waits(), "a process that is believed to be dead still writes"
    opened.flush()
    assert opened.read(0, SECTOR_BYTES) == pattern(3)
    following.release(opened)


def test_an_owner_that_lost_another_lock_while_it_came_back_loses_that_too(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm1, vm2, vm3 = nodes.make("vm1", "vm2", "vm3")
    nodes.two.unlock("vm1", force=True)
    adopt = MemoryBlocker.adopt

    def adopt_and_lose(self: MemoryBlocker, successor: Blocker) -> None:
        adopt(self, successor)
        monkeypatch.undo()
        nodes.two.unlock("vm2", force=True)

    monkeypatch.setattr(MemoryBlocker, "adopt", adopt_and_lose)
    assert nodes.one.watch_locks() == [vm1.id]
    write = Call(lambda: vm3.write(0, pattern(2))).began()
    assert write.waits()
    assert nodes.one.watch_locks() == [vm2.id]
    assert write.ended() is None
    assert (vm1.fenced, vm2.fenced, vm3.fenced) == (True, True, False)
    vm3.flush()
    assert nodes.one.watch_locks() == []


def test_a_lock_that_is_broken_between_the_look_and_the_claim_is_not_claimed(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm1, vm2 = nodes.make("vm1", "vm2")
    nodes.two.unlock("vm1", force=True)
    claim = MemoryBlocker.claim

    def break_and_claim(self: MemoryBlocker, key: str, owner: str) -> None:
        monkeypatch.undo()
        nodes.two.unlock("vm2", force=True)
        fill(nodes.two, "vm2", pattern(4))
        claim(self, key, owner)

    write = Call(lambda: vm2.write(0, pattern(3))).began()
    assert write.waits()
    monkeypatch.setattr(MemoryBlocker, "claim", break_and_claim)
    assert sorted(nodes.one.watch_locks()) == sorted([vm1.id, vm2.id])
    assert isinstance(write.ended(), ArchipError)
    assert claims(nodes)
    assert content_of(nodes.two, "vm2")[:SECTOR_BYTES] == pattern(4)


def test_a_volume_that_is_opened_anew_while_we_come_back_is_not_taken_for_a_lost_one(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm1, vm2 = nodes.make("vm1", "vm2")
    nodes.two.unlock("vm1", force=True)
    adopt = MemoryBlocker.adopt
    anew: list[OpenVolume] = []

    def adopt_and_open_anew(self: MemoryBlocker, successor: Blocker) -> None:
        adopt(self, successor)
        nodes.one.release(vm2)
        anew.append(nodes.open("vm2"))

    monkeypatch.setattr(MemoryBlocker, "adopt", adopt_and_open_anew)
    assert nodes.one.watch_locks() == [vm1.id]
    anew[0].write(0, pattern(3))
    anew[0].flush()
    assert not anew[0].fenced
    assert claims(nodes, "vm2")


def test_a_claim_that_is_made_anew_is_not_given_up_by_the_one_who_looks_after_the_old_one(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm1, vm2 = nodes.make("vm1", "vm2")
    nodes.two.unlock("vm1", force=True)
    adopt, get = MemoryBlocker.adopt, MemoryBlocker.get_record
    anew: list[OpenVolume] = []

    def look_and_open_anew(self: MemoryBlocker, key: str) -> Any:
        found = get(self, key)
        if key == lock_key(vm2.id) and not self.is_shut_out:
            monkeypatch.undo()
            nodes.one.release(vm2)
            anew.append(nodes.open("vm2"))
        return found

    def adopt_and_look(self: MemoryBlocker, successor: Blocker) -> None:
        adopt(self, successor)
        monkeypatch.setattr(MemoryBlocker, "get_record", look_and_open_anew)

    monkeypatch.setattr(MemoryBlocker, "adopt", adopt_and_look)
    assert nodes.one.watch_locks() == [vm1.id]
    anew[0].write(0, pattern(3))
    anew[0].flush()
    assert claims(nodes, "vm2")


def test_a_volume_that_is_closed_while_we_come_back_is_claimed_no_more(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm1, vm2 = nodes.make("vm1", "vm2")
    adopt = MemoryBlocker.adopt

    def close_and_adopt(self: MemoryBlocker, successor: Blocker) -> None:
        nodes.one.mapper().locks.give_up(vm2.id)  # as far as closing comes before it has to wait
        adopt(self, successor)

    nodes.two.unlock("vm1", force=True)
    monkeypatch.setattr(MemoryBlocker, "adopt", close_and_adopt)
    assert nodes.one.watch_locks() == [vm1.id]
    assert claims(nodes)
    nodes.two.open(nodes.two.find("vm1"))
    assert nodes.one.watch_locks() == []


class Copier:
    """An endpoint: whoever is in a call of an engine of it waits for a call on another volume, as a copy does."""

    def __init__(self) -> None:
        self.waits_for: Call | None = None

    def engine_opened(self, volume: VolumeId, engine: EngineVolume, size_max: int) -> None:
        return

    def engine_closing(self, volume: VolumeId) -> None:
        if self.waits_for is not None:
            assert self.waits_for.ended() is None


def test_what_waits_for_a_kept_volume_goes_on_before_the_lost_one_is_seen_out(nodes: Nodes) -> None:
    copier = Copier()
    nodes.one.add_engine_user(copier)
    vm1, vm2 = nodes.make("vm1", "vm2")
    nodes.two.unlock("vm1", force=True)
    copier.waits_for = Call(lambda: vm2.write(0, pattern(3))).began()
    assert copier.waits_for.waits()
    assert nodes.one.watch_locks() == [vm1.id]
    assert copier.waits_for.ended() is None


def test_who_is_at_work_with_a_lost_volume_and_waits_for_a_kept_one_is_not_waited_for_for_ever(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a copy that becomes a clone is, which has the ``control`` of both."""
    monkeypatch.setattr(returning, "LEAVING_SECONDS", 0.05)
    vm1, vm2 = nodes.make("vm1", "vm2")

    def copy() -> None:
        with vm1.control:
            vm2.write(0, pattern(3))
            vm1.freeze()

    nodes.two.unlock("vm1", force=True)
    before = list(MemoryBlocker(nodes.store).list_records("volume"))
    copying = Call(copy).began()
    assert copying.waits()
    back = Call(nodes.one.watch_locks).began()
    assert back.ended() is None
    assert isinstance(copying.ended(), Fenced)
    assert vm2.read(0, SECTOR_BYTES) == pattern(3)
    assert list(MemoryBlocker(nodes.store).list_records("volume")) == before


def test_who_is_at_work_with_a_lost_volume_does_not_keep_a_kept_one_from_being_claimed_at_the_second_try(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returning, "LEAVING_SECONDS", 0.05)
    vm1, vm2 = nodes.make("vm1", "vm2")
    adopt, claim = MemoryBlocker.adopt, MemoryBlocker.claim

    def adopt_and_fail(self: MemoryBlocker, successor: Blocker) -> None:
        adopt(self, successor)
        monkeypatch.setattr(MemoryBlocker, "claim", fail)

    def fail(self: MemoryBlocker, key: str, owner: str) -> None:
        monkeypatch.setattr(MemoryBlocker, "claim", claim)
        raise StoreAway("no luck; wanted by the test")

    def copy() -> None:
        with vm1.control:
            vm2.write(0, pattern(3))

    nodes.two.unlock("vm1", force=True)
    monkeypatch.setattr(MemoryBlocker, "adopt", adopt_and_fail)
    copying = Call(copy).began()
    assert copying.waits()
    for _ in range(2):
        assert Call(nodes.one.watch_locks).began().ended() is None
    assert copying.ended() is None
    assert vm2.read(0, SECTOR_BYTES) == pattern(3)


def test_a_volume_that_cannot_be_claimed_does_not_keep_the_others_from_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in a placement group that does not answer, say."""
    vm1, vm2, vm3 = nodes.make("vm1", "vm2", "vm3")
    adopt, claim = MemoryBlocker.adopt, MemoryBlocker.claim

    def adopt_and_fail(self: MemoryBlocker, successor: Blocker) -> None:
        adopt(self, successor)
        monkeypatch.setattr(MemoryBlocker, "claim", fail)

    def fail(self: MemoryBlocker, key: str, owner: str) -> None:
        if key == lock_key(vm2.id):
            raise StoreAway("no luck; wanted by the test")
        claim(self, key, owner)

    nodes.two.unlock("vm1", force=True)
    monkeypatch.setattr(MemoryBlocker, "adopt", adopt_and_fail)
    writes = [Call(lambda vm=vm: vm.write(0, pattern(3))).began() for vm in (vm2, vm3)]  # type: ignore[misc]
    assert all(write.waits() for write in writes)
    assert nodes.one.watch_locks() == [vm1.id]
    assert writes[1].ended() is None
    assert writes[0].waits()
    monkeypatch.undo()
    assert nodes.one.watch_locks() == []
    assert writes[0].ended() is None


def test_whoever_holds_the_table_while_we_are_outside_is_waited_for_by_nobody_who_waits(nodes: Nodes) -> None:
    """To drop a backend is to ask the store within the table's lock."""
    _, vm2 = nodes.make("vm1", "vm2")
    nodes.two.unlock("vm1", force=True)
    inside, others = threading.Event(), threading.Event()

    def ask_inside() -> None:
        with nodes.one._table.changed:
            inside.set()
            others.wait(SOON_SECONDS)
            nodes.one.mapper().catalog.volume(vm2.id)

    first = Call(ask_inside).began()
    assert inside.wait(SOON_SECONDS)
    second = Call(lambda: nodes.one.mapper().catalog.volume(vm2.id)).began()
    assert second.waits()
    others.set()
    assert first.waits()
    back = Call(nodes.one.return_to_stores).began()
    assert [back.ended(), first.ended(), second.ended()] == [None] * 3


@pytest.mark.parametrize("name", ["flush", "freeze", "grow", "shrink"])
def test_who_waits_for_a_volume_while_it_is_lost_changes_nothing_of_it(nodes: Nodes, name: str) -> None:
    """It began before, and goes on when we are back in the store."""
    (vm1,) = nodes.make("vm1")
    vm1.write(3 * MIB, pattern(2))
    vm1.engine.flush()  # all is durable but the size
    actions: dict[str, Callable[[], object]] = {
        "flush": vm1.flush,
        "freeze": vm1.freeze,
        "grow": lambda: vm1.resize(4 * MIB),
        "shrink": lambda: vm1.resize(MIB // 2),
    }
    with vm1.control:
        late = Call(actions[name]).began()
        assert late.waits()
        nodes.two.unlock("vm1", force=True)
        nodes.two.resize(nodes.two.find("vm1"), 2 * MIB)
        before = [*MemoryBlocker(nodes.store).list_records("volume"), *MemoryBlocker(nodes.store).list_records("layer")]
        assert nodes.one.watch_locks() == [vm1.id]
    assert isinstance(late.ended(), Fenced)
    after = [*MemoryBlocker(nodes.store).list_records("volume"), *MemoryBlocker(nodes.store).list_records("layer")]
    assert after == before


def test_a_store_that_cannot_be_reached_is_tried_again(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    vm1, vm2 = nodes.make("vm1", "vm2")
    nodes.two.unlock("vm1", force=True)

    def fail(self: MemoryBlocker) -> Blocker:
        raise ShutOut("no luck; wanted by the test")

    monkeypatch.setattr(MemoryBlocker, "reconnect", fail)
    assert nodes.one.watch_locks() == []
    write = Call(lambda: vm2.write(0, pattern(2))).began()
    assert write.waits()
    monkeypatch.undo()
    assert nodes.one.watch_locks() == [vm1.id]
    assert write.ended() is None


OPERATIONS: dict[str, Callable[[Nodes, OpenVolume], object]] = {
    "snapshot": lambda nodes, opened: nodes.one.snapshot(opened.name, "made"),
    "clone": lambda nodes, opened: nodes.one.clone(opened.name, "made"),
    "resize": lambda nodes, opened: nodes.one.resize(nodes.one.find(opened.name), 2 * MIB),
    "shrink": lambda nodes, opened: nodes.one.resize(nodes.one.find(opened.name), MIB // 2),
    "flush": lambda nodes, opened: (opened.write(MIB, pattern(7)), opened.flush()),
    "rename": lambda nodes, opened: nodes.one.rename(opened.name, "made"),
    "copy": lambda nodes, opened: copy_to_new(nodes, opened),
    "close": lambda nodes, opened: (opened.write(MIB, pattern(7)), nodes.one.release(opened)),
}


def copy_to_new(nodes: Nodes, source: OpenVolume) -> None:
    nodes.one.create("made", 0)
    with nodes.one.using(nodes.one.find("made")) as target:
        assert nodes.one.copy_range(source, 0, target, 0, MIB) == MIB


def interrupted(nodes: Nodes, at: int, operation: Call, interruption: Callable[[], None]) -> bool:
    """Run the operation, and the interruption before that call of the store; false if it does not make so many."""
    done = threading.Event()

    def interrupt() -> None:
        interruption()
        done.set()

    nodes.client.of, nodes.client.at, nodes.client.calls, nodes.client.interruption = operation, at, 0, interrupt
    operation.start()
    deadline = time.monotonic() + SOON_SECONDS
    while operation.is_alive():
        assert time.monotonic() < deadline, f"call {at}: it still waits"
        if done.is_set():
            nodes.one.watch_locks()
        operation.join(0.002)
    nodes.client.of = None
    return done.is_set()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_a_volume_that_is_kept_goes_on_wherever_it_was(name: str, world: World) -> None:
    at = 0
    while True:
        at += 1
        store = MemoryStore()
        nodes = Nodes(World(world.directory / str(at), MemoryBlocker(store)), store)
        lost, kept = nodes.make("lost", "kept")
        operation = Call(lambda: OPERATIONS[name](nodes, kept))  # noqa: B023 - it ends within the round
        reached = interrupted(nodes, at, operation, lambda: nodes.two.unlock("lost", force=True))  # noqa: B023
        if not reached:
            break
        assert operation.error is None, f"call {at}: {operation.error}"
        nodes.one.watch_locks()
        assert lost.fenced
        assert not kept.fenced
        if name != "close":
            kept.write(0, pattern(9))
            kept.flush()
            assert kept.read(0, SECTOR_BYTES) == pattern(9)
        assert nodes.errors() == []
    assert at > 2, "nothing was interrupted"


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_a_volume_that_is_lost_changes_nothing_of_it_any_more(name: str, world: World) -> None:
    at = 0
    while True:
        at += 1
        store = MemoryStore()
        nodes = Nodes(World(world.directory / str(at), MemoryBlocker(store)), store)
        lost, kept = nodes.make("lost", "kept")
        seen: list[Any] = []

        def lose(nodes: Nodes = nodes, lost: OpenVolume = lost, seen: list[Any] = seen) -> None:
            nodes.two.unlock(lost.name, force=True)
            theirs = nodes.two.open(nodes.two.find_by_id(lost.id))
            theirs.write(0, pattern(8))
            theirs.flush()
            seen.extend((theirs, theirs.mapper.catalog.volume(lost.id).record))

        operation = Call(lambda: OPERATIONS[name](nodes, lost))  # noqa: B023 - it ends within the round
        if not interrupted(nodes, at, operation, lose):
            break
        nodes.one.watch_locks()
        assert not kept.fenced
        kept.write(0, pattern(9))
        kept.flush()
        theirs, record = seen
        assert theirs.mapper.catalog.volume(lost.id).record == record, f"call {at} changed what is not ours any more"
        assert theirs.read(0, SECTOR_BYTES) == pattern(8)
        theirs.write(0, pattern(10))
        nodes.two.release(theirs)
        assert content_of(nodes.two, "lost")[:SECTOR_BYTES] == pattern(10)
        assert nodes.errors() == []
    assert at > 2, "nothing was interrupted"
