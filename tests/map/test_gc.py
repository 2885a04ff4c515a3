"""Garbage goes, nothing else does: whoever seals meanwhile, and wherever the collector is killed."""

import itertools
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from archipfs.blockers.contract import Record
from archipfs.blockers.fault import FaultBlocker, FaultPlan, Moment, SimulatedCrash
from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import Busy, Fenced, ObjectDamaged, ObjectMissing, StoreFull, StoreUnavailable
from archipfs.map import gc as gc_module
from archipfs.map.census import PackUse
from archipfs.map.gc import DAMAGED, FULL, SEALING_HERE, YOUNG, Collected, Collector
from archipfs.map.records import CondemnedRecord, DamageRecord, GcRecord, Kind, LayerRecord, Sealed, VolumeRecord
from archipfs.types import LayerId, PackId, new_volume_id
from tests.compose.interleave import NEVER, SteppedBlocker, schedules
from tests.map.sealing import NODE, OTHER_NODE, Content, Sealer, chunk_of, expected, sealer

PACK_BYTES = 256 << 10
MUCH = {0: list(range(20)), 3: list(range(20, 40))}
"""More than one pack holds."""
NOTHING = Collected(0, 0, 0, 0, 0, {})


@pytest.fixture
def blocker() -> MemoryBlocker:
    return MemoryBlocker(pack_bytes=PACK_BYTES)


@pytest.fixture
def node(blocker: MemoryBlocker, tmp_path: Path) -> Iterator[Sealer]:
    with sealer(blocker, tmp_path / "cache") as node:
        yield node


def packs_of(blocker: MemoryBlocker) -> dict[str, int]:
    """The packs in the store and their sizes."""
    return {key.partition("/")[2]: len(blocker.get(key)) for key in blocker.list("pack")}


def records_of(blocker: MemoryBlocker, kind: str) -> list[str]:
    return [key for key, _ in blocker.list_records(kind)]


# What goes, and what stays


def test_what_nothing_leads_to_goes_and_is_told(blocker: MemoryBlocker, node: Sealer) -> None:
    kept = node.seal({0: [1, 2, 3]})
    lost = node.seal(MUCH)
    before = packs_of(blocker)
    node.drop(lost)
    done = node.collector().collect()
    after = packs_of(blocker)
    assert done.packs == len(before) - len(after) > 1
    assert done.freed_bytes == sum(before.values()) - sum(after.values())
    assert node.content(kept) == expected({0: [1, 2, 3]})
    assert records_of(blocker, "condemned") == []
    assert node.collector().collect() == NOTHING


def test_an_empty_store_has_no_garbage(node: Sealer) -> None:
    assert node.collector().collect() == NOTHING


def test_what_was_deleted_is_forgotten(blocker: MemoryBlocker, node: Sealer) -> None:
    """By the index, so that it is stored again, and by those who were to be told."""
    told: list[set[PackId]] = []

    def forget(packs: Iterable[PackId]) -> None:
        assert not packs_of(blocker), "they are told when it is done"
        told.append(set(packs))
        node.store.forget(packs)

    node.drop(node.seal({0: [1]}))
    gone = node.store.packs()
    Collector(node.catalog, blocker, node.store, NODE, forget).collect()
    assert told == [gone]
    assert node.store.packs() == set()
    assert node.content(node.seal({0: [1]})) == expected({0: [1]})


def test_what_only_an_older_map_leads_to_goes(blocker: MemoryBlocker, node: Sealer) -> None:
    first = node.seal({0: list(range(10)), 1: [50]})
    second = node.seal({0: list(range(60, 70))}, base=node.root(first))
    node.drop(first)
    freed = node.collector().collect()
    assert freed.packs == 1
    assert freed.repacked == 1, "one chunk of the first map is needed still"
    assert node.content(second) == expected({0: list(range(60, 70)), 1: [50]})


def test_a_pack_that_is_needed_for_less_than_half_is_repacked(blocker: MemoryBlocker, node: Sealer) -> None:
    lost = node.seal({0: list(range(16))})
    kept = node.seal({5: [3]})
    node.drop(lost)
    before = packs_of(blocker)
    done = node.collector().collect()
    after = packs_of(blocker)
    assert done.repacked == 1
    assert done.copied_bytes >= len(expected({0: [3]})[0][0])
    assert done.freed_bytes == sum(before.values()) - sum(after.values()) > 0
    assert node.content(kept) == expected({5: [3]})
    assert node.collector().collect() == NOTHING, "what was made of it is not garbage"


def test_a_pack_that_is_needed_for_more_than_half_stays(blocker: MemoryBlocker, node: Sealer) -> None:
    lost = node.seal({0: list(range(12))})
    node.seal({5: list(range(1, 12))})
    node.drop(lost)
    before = packs_of(blocker)
    assert node.collector().collect() == NOTHING
    assert packs_of(blocker) == before


def test_of_what_lies_in_two_packs_one_is_garbage(blocker: MemoryBlocker, node: Sealer) -> None:
    layer = node.seal({0: [1, 2, 3]})
    (pack,) = node.store.packs()
    both = {pack, node.copy_pack(pack)}
    assert node.collector().collect().packs == 1
    assert set(packs_of(blocker)) == {min(both)}, "whoever collects, the same one stays"
    assert node.collector().collect() == NOTHING
    assert node.content(layer) == expected({0: [1, 2, 3]})


def test_a_copy_stays_if_the_one_that_counts_is_damaged_and_nobody_knew(blocker: MemoryBlocker, node: Sealer) -> None:
    layer = node.seal({0: [1, 2, 3]})
    (pack,) = node.store.packs()
    both = {pack, node.copy_pack(pack)}
    place = next(entry for entry in node.store.index(min(both)).entries if entry.raw_bytes == len(chunk_of(2)))
    damage(blocker, min(both), place.offset)
    done = node.collector().collect()
    assert (done.packs, done.needed_again, dict(done.kept)) == (0, 1, {DAMAGED: 1})
    assert set(packs_of(blocker)) == both
    assert records_of(blocker, "condemned") == []
    assert node.content(layer) == expected({0: [1, 2, 3]})


@pytest.mark.parametrize("hash_name", ["sha256", "xxh3-128"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_hash_and_coding(tmp_path: Path, blocker: MemoryBlocker, hash_name: str, compression: str) -> None:
    with sealer(blocker, tmp_path / "cache", hash_name=hash_name, compression=compression) as node:
        lost = node.seal({0: list(range(16))})
        kept = node.seal({5: [3]})
        node.drop(lost)
        assert node.collector().collect().repacked == 1
        assert node.content(kept) == expected({5: [3]})


def test_a_dry_run_says_what_would_go_and_changes_nothing(blocker: MemoryBlocker, node: Sealer) -> None:
    lost = [node.seal({0: list(range(16))}), node.seal(MUCH)]
    kept = node.seal({5: [3]})
    for layer in lost:
        node.drop(layer)
    before = (packs_of(blocker), [list(blocker.list_records(kind)) for kind in ("condemned", "layer", "gc", "damage")])
    foreseen = node.collector().collect(dry_run=True)
    assert before == (
        packs_of(blocker),
        [list(blocker.list_records(kind)) for kind in ("condemned", "layer", "gc", "damage")],
    )
    done = node.collector().collect()
    assert (foreseen.packs, foreseen.repacked, foreseen.copied_bytes) == (done.packs, done.repacked, done.copied_bytes)
    assert abs(foreseen.freed_bytes - done.freed_bytes) <= 2 * 4096 + 1024, "but for the head of the new pack"
    assert node.content(kept) == expected({5: [3]})


# What is not known, or not ours


def damage(blocker: MemoryBlocker, pack: str, offset: int) -> None:
    data = bytearray(blocker.get(f"pack/{pack}"))
    data[offset] ^= 0x40
    blocker.delete(f"pack/{pack}")
    blocker.put(f"pack/{pack}", bytes(data))


def test_where_a_page_cannot_be_read_nothing_is_deleted(blocker: MemoryBlocker, tmp_path: Path) -> None:
    with sealer(blocker, tmp_path / "a") as node:
        kept = node.seal({0: [1]})
        lost = node.seal({0: [2]})
        root = node.root(kept)
        place = node.store.locate(root)
        node.drop(lost)
    damage(blocker, place.pack, place.offset)
    before = packs_of(blocker)
    with sealer(blocker, tmp_path / "b") as node:
        for dry_run in (False, True):
            with pytest.raises(ObjectDamaged, match=f"map of layer {kept} cannot be read"):
                node.collector().collect(dry_run=dry_run)
        blocker.delete(f"pack/{place.pack}")
        with pytest.raises(ObjectMissing, match=f"map of layer {kept} cannot be read"):
            node.collector().collect()
        del before[place.pack]
        assert packs_of(blocker) == before
        node.drop(kept)
        assert node.collector().collect().packs == 1, "nobody needs that page any more"


def test_where_a_layer_record_cannot_be_read_nothing_is_deleted(blocker: MemoryBlocker, node: Sealer) -> None:
    layer = node.seal({0: [1]})
    record = blocker.get_record(f"layer/{layer}")
    assert record is not None
    blocker.put_record(f"layer/{layer}", b"nonsense", record.version)
    with pytest.raises(ObjectDamaged, match=str(layer)):
        node.collector().collect()
    assert len(packs_of(blocker)) == 1


def test_where_a_layer_that_a_volume_needs_is_missing_nothing_is_deleted(blocker: MemoryBlocker, node: Sealer) -> None:
    """Else what its record, restored from a copy, leads to would be gone."""
    layer = node.seal({0: [1]})
    volume = new_volume_id()
    node.catalog.put_volume(
        VolumeRecord(volume, "snap", Kind.SNAPSHOT, 4096, layer, 4096, None, 0, 0o444, 0, 0, 0, 0, 0), None
    )
    record = node.catalog.layer(layer)
    node.drop(layer)
    for dry_run in (False, True):
        with pytest.raises(ObjectMissing, match=f"layer {layer} of snap is not in the store"):
            node.collector().collect(dry_run=dry_run)
    node.catalog.put(record.record, layer, None)
    assert node.collector().collect() == NOTHING
    assert node.content(layer) == expected({0: [1]})


def test_a_seal_that_cuts_chains_short_meanwhile_is_no_missing_layer(blocker: MemoryBlocker, node: Sealer) -> None:
    """The layers were listed while what the sealed one was merged with was deleted."""
    low = node.new_layer()
    high = node.new_layer(low)
    volume = new_volume_id()
    node.catalog.put_volume(
        VolumeRecord(volume, "snap", Kind.SNAPSHOT, 4096, high, 4096, None, 0, 0o444, 0, 0, 0, 0, 0), None
    )

    class Merging(FaultBlocker):
        merged = False

        def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
            listed = list(super().list_records(kind))
            if kind == "layer" and not self.merged:
                self.merged = True
                node.seal({0: [1]}, layer=high)
                node.drop(low)
                listed = [each for each in listed if low not in each[0]]
            yield from listed

    merging = Merging(blocker)
    assert Collector(type(node.catalog)(merging), merging, node.store, NODE).collect().packs == 0
    assert node.content(high) == expected({0: [1]})


def test_a_pack_of_a_later_format_is_not_taken_for_a_damaged_one(blocker: MemoryBlocker, node: Sealer) -> None:
    node.seal({0: [1]})
    (pack,) = packs_of(blocker)
    later = bytearray(blocker.get(f"pack/{pack}"))
    later[8:12] = (2).to_bytes(4, "little")
    blocker.put(f"pack/{'e' * 64}", bytes(later))
    blocker.put(f"pack/{'f' * 64}", b"nonsense" * 1024)
    assert node.collector().collect(unreadable=True).packs == 1
    assert set(packs_of(blocker)) == {pack, "e" * 64}


class FullBlocker(FaultBlocker):
    """A store that takes no more packs, and no records but for what is kept back."""

    def __init__(self, inner: MemoryBlocker, records: int) -> None:
        super().__init__(inner)
        self.records = records
        """How many it still takes."""
        self.kept_back = 50

    def put(self, key: str, data: bytes | Sequence[bytes]) -> None:
        raise StoreFull("no room for a pack; wanted by the test")

    def put_record(self, key: str, value: bytes, expected: int | None) -> int:
        if not self.records:
            raise StoreFull("no room for a record; wanted by the test")
        self.records -= 1
        return super().put_record(key, value, expected)

    def relieve(self) -> bool:
        self.records, self.kept_back = self.records + self.kept_back, 0
        return self.records > 0


@pytest.mark.parametrize("records", range(8))
def test_a_full_store_can_be_emptied(records: int, blocker: MemoryBlocker, tmp_path: Path) -> None:
    """There is no room to copy what some packs are needed for still; what is dead goes all the same."""
    with sealer(blocker, tmp_path / "before") as node:
        lost = node.seal({0: list(range(16))})
        kept = node.seal({5: [3]})
        node.drop(lost)
        node.drop(node.seal(MUCH))
    full = FullBlocker(blocker, records)
    before = packs_of(blocker)
    with sealer(full, tmp_path / "after") as node:
        done = node.collector().collect()
        assert len(packs_of(blocker)) < len(before)
        assert done.kept.get(FULL, 0) == (1 if full.kept_back else 0)
        assert node.content(kept) == expected({5: [3]})
    with sealer(blocker, tmp_path / "later") as node:
        assert node.collector().collect().repacked == 1, "now there is room"
        assert node.content(kept) == expected({5: [3]})


def test_a_store_that_stays_full_says_so(blocker: MemoryBlocker, tmp_path: Path) -> None:
    with sealer(blocker, tmp_path / "before") as node:
        node.drop(node.seal({0: [1]}))
    full = FullBlocker(blocker, 0)
    full.kept_back = 0
    with sealer(full, tmp_path / "after") as node, pytest.raises(StoreFull):
        node.collector().collect()


def test_packs_of_sessions_of_this_process_stay(blocker: MemoryBlocker, node: Sealer) -> None:
    hit = node.seal({0: [1]})
    data = expected({0: [1]})[0][0]
    with node.store.session() as session:
        assert session.add_chunk(node.store.hash.digest(b"x" * 4096), b"x" * 4096)
        assert not session.add_chunk(node.store.hash.digest(data), data)
        session.flush()
        node.drop(hit)
        assert node.collector().collect().kept == {SEALING_HERE: 2}
        session.verify()
    assert node.collector().collect().packs == 2


def test_young_packs_of_another_node_stay(
    blocker: MemoryBlocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sealer(blocker, tmp_path / "a") as one, sealer(blocker, tmp_path / "b", node=OTHER_NODE) as two:
        one.drop(one.seal({0: [1]}))
        assert two.collector().collect().kept == {YOUNG: 1}
        assert len(packs_of(blocker)) == 1
        later = time.time_ns() + gc_module.FOREIGN_GRACE_NS + 1
        monkeypatch.setattr(time, "time_ns", lambda: later)
        assert two.collector().collect().packs == 1


def test_a_pack_with_known_damage_gives_way_once_there_is_a_good_copy(blocker: MemoryBlocker, tmp_path: Path) -> None:
    with sealer(blocker, tmp_path / "a") as node, sealer(blocker, tmp_path / "b") as other:
        layer = node.seal({0: list(range(8))})
        place = node.store.locate(node.store.hash.digest(expected({0: [3]})[0][0]))
        damage(blocker, place.pack, place.offset)
        digest = node.store.hash.digest(expected({0: [3]})[0][0])
        node.catalog.put(DamageRecord(place.pack, [digest.hex()]), place.pack, None)
        assert node.collector().collect().kept == {DAMAGED: 1}
        assert list(packs_of(blocker)) == [place.pack]
        data = expected({0: [3]})[0][0]
        with other.store.session() as session:
            assert session.add_chunk(digest, data), "a copy that is known to be damaged is no copy"
            session.flush()
        assert node.collector().collect().repacked == 1
        assert place.pack not in packs_of(blocker)
        assert records_of(blocker, "damage") == records_of(blocker, "condemned") == []
        assert node.content(layer) == other.content(layer) == expected({0: list(range(8))})


def test_damage_that_nobody_knew_of_stops_repacking_of_that_pack_alone(blocker: MemoryBlocker, node: Sealer) -> None:
    lost = node.seal({0: list(range(16))})
    node.seal({5: [3]})
    place = node.store.locate(node.store.hash.digest(expected({0: [3]})[0][0]))
    node.drop(lost)
    damage(blocker, place.pack, place.offset)
    done = node.collector().collect()
    assert (done.packs, done.needed_again, dict(done.kept)) == (0, 1, {DAMAGED: 1})
    assert place.pack in packs_of(blocker)
    assert records_of(blocker, "condemned") == []


def test_records_of_packs_that_are_gone_go(blocker: MemoryBlocker, node: Sealer) -> None:
    gone = PackId("0" * 64)
    node.catalog.put(CondemnedRecord(gone, NODE, 0), gone, None)
    node.catalog.put(DamageRecord(gone, []), gone, None)
    node.collector().collect()
    assert records_of(blocker, "condemned") == records_of(blocker, "damage") == []


def test_whoever_asks_it_to_stop_leaves_the_rest_to_the_next(blocker: MemoryBlocker, node: Sealer) -> None:
    class Stop(Exception):
        pass

    kept = node.seal({0: [1]})
    node.drop(node.seal(MUCH))
    for allowed in itertools.count():
        left = iter(range(allowed))

        def pulse(left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Stop

        try:
            node.collector().collect(pulse=pulse)
        except Stop:
            assert node.content(kept) == expected({0: [1]})
            continue
        break
    assert allowed > 5
    assert len(packs_of(blocker)) == 1
    assert records_of(blocker, "condemned") == []


# The lock


def test_one_node_collects_at_a_time(blocker: MemoryBlocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sealer(blocker, tmp_path / "a") as one, sealer(blocker, tmp_path / "b", node=OTHER_NODE) as two:
        one.catalog.put(GcRecord(NODE, time.time_ns(), 7), "lock", None)
        with pytest.raises(Busy, match=f"node {NODE} is collecting garbage"):
            two.collector().collect()
        assert one.collector().collect() == NOTHING, "what a crash of ours left is ours"
        found = two.catalog.get(GcRecord, "lock")
        assert found is not None
        assert (found.record.node, found.record.generation) == (None, 8)
        assert two.collector().collect() == NOTHING
        now = two.catalog.get(GcRecord, "lock")
        assert now is not None
        one.catalog.put(GcRecord(NODE, time.time_ns(), 10), "lock", now.version)
        later = time.time_ns() + gc_module.FOREIGN_GRACE_NS + 1
        monkeypatch.setattr(time, "time_ns", lambda: later)
        assert two.collector().collect() == NOTHING, "who says nothing for an hour is dead"


def test_two_collections_in_one_process_exclude_each_other(node: Sealer) -> None:
    collector = node.collector()
    node.drop(node.seal({0: [1]}))

    def pulse() -> None:
        with pytest.raises(Busy, match="being collected already"):
            collector.collect(dry_run=True)

    assert collector.collect(pulse=pulse).packs == 1


def test_a_collector_that_was_taken_for_dead_deletes_nothing_more(blocker: MemoryBlocker, node: Sealer) -> None:
    node.drop(node.seal(MUCH))
    before = packs_of(blocker)

    class Overtaken(FaultBlocker):
        def delete(self, key: str) -> None:
            super().delete(key)
            found = node.catalog.get(GcRecord, "lock")
            assert found is not None
            node.catalog.put(GcRecord(OTHER_NODE, time.time_ns(), found.record.generation + 1), "lock", found.version)

    overtaken = Overtaken(blocker)
    collector = Collector(type(node.catalog)(overtaken), overtaken, node.store, NODE, intent_seconds=0)
    with pytest.raises(Fenced, match="another node took this garbage collection for dead"):
        collector.collect()
    assert len(packs_of(blocker)) == len(before) - 1
    found = node.catalog.get(GcRecord, "lock")
    assert found is not None
    assert found.record.node == OTHER_NODE, "it is not given back by who lost it"


def test_a_collector_that_was_taken_for_dead_absolves_nothing_more(blocker: MemoryBlocker, node: Sealer) -> None:
    """What was needed when it looked, the next one may be about to delete: who seals must not rely on it."""
    node.seal({0: [1]})
    (needed,) = packs_of(blocker)
    node.catalog.put(CondemnedRecord(PackId(needed), NODE, time.time_ns()), needed, None)

    class Overtaken(FaultBlocker):
        def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
            found = node.catalog.get(GcRecord, "lock")
            if kind == "damage" and found is not None and looks.pop():
                node.catalog.put(GcRecord(OTHER_NODE, time.time_ns(), 9), "lock", found.version)
            return super().list_records(kind)

    looks = [True, False]
    overtaken = Overtaken(blocker)
    with pytest.raises(Fenced, match="another node took this garbage collection for dead"):
        Collector(type(node.catalog)(overtaken), overtaken, node.store, NODE, intent_seconds=0).collect()
    assert looks == []
    assert node.catalog.get(CondemnedRecord, needed) is not None


def test_what_a_collector_condemns_that_was_taken_for_dead_is_not_deleted_by_the_next(
    blocker: MemoryBlocker, tmp_path: Path
) -> None:
    """Nobody has waited for the intents of those who looked before it was condemned."""
    with sealer(blocker, tmp_path / "a") as one, sealer(blocker, tmp_path / "b") as two:
        one.drop(one.seal({0: [1, 2]}))
        (late,) = packs_of(blocker)
        one.drop(one.seal({9: [7]}))

        class Late(FaultBlocker):
            """Condemns a pack when the other has marked for the second time."""

            marked = 0

            def list_records(self, kind: str) -> Iterator[tuple[str, Record]]:
                self.marked += kind == "condemned"
                if self.marked == 2 and kind == "condemned":
                    two.catalog.put(CondemnedRecord(PackId(late), OTHER_NODE, 0), late, None)
                yield from super().list_records(kind)

        class Hidden(Collector):
            """Finds the pack in use here when it looks first."""

            def _is_ours_to_take(self, use: PackUse, kept: Counter[str]) -> bool:
                return use.pack != late and super()._is_ours_to_take(use, kept)

        stepped = Late(blocker)
        collector = Hidden(type(one.catalog)(stepped), stepped, one.store, NODE, intent_seconds=0)
        assert collector.collect().packs == 1
        assert stepped.marked >= 2
        assert list(packs_of(blocker)) == [late]


# Intents


def test_an_intent_that_takes_too_long_is_taken_away(blocker: MemoryBlocker, node: Sealer) -> None:
    node.drop(node.seal({0: [1]}))
    layer = LayerId("a" * 32)
    node.catalog.put(LayerRecord(layer, None, 0, NODE, 0, sealing="token"), layer, None)
    started = time.monotonic()
    assert node.collector(intent_seconds=0.2).collect().packs == 1
    assert time.monotonic() - started >= 0.2
    assert node.catalog.layer(layer).record.sealing is None


def test_an_intent_that_is_committed_in_time_is_waited_for(blocker: MemoryBlocker, tmp_path: Path) -> None:
    """The sealer looked before anything was condemned: only its intent tells of it."""
    with sealer(blocker, tmp_path / "a") as one, sealer(blocker, tmp_path / "b") as two:
        lost = one.seal({0: [1, 2]})
        root = one.root(lost)
        one.drop(lost)
        layer = two.new_layer()
        found = two.catalog.layer(layer)
        record = found.record
        intent = two.catalog.put(
            LayerRecord(layer, None, 0, NODE, record.created_ns, sealing="token"), layer, found.version
        )
        pulses = 0

        def pulse() -> None:
            nonlocal pulses
            pulses += 1
            if records_of(blocker, "condemned") and intent.version == two.catalog.layer(layer).version:
                sealed = Sealed(root.hex(), 0, 0)
                committed = LayerRecord(layer, None, 0, NODE, record.created_ns, sealed=sealed)
                two.catalog.put(committed, layer, intent.version)

        done = one.collector(intent_seconds=30).collect(pulse=pulse)
        assert (done.packs, done.needed_again) == (0, 1)
        assert two.content(layer) == expected({0: [1, 2]})
        assert records_of(blocker, "condemned") == []


# Killed at any step


def collect_between_changes(node: Sealer, layers: dict[str, LayerId]) -> None:
    """What a crash is tried in: a collection, another layer, one layer less, and a collection again."""
    collector = node.collector()
    collector.collect()
    layers["third"] = node.seal({2: [5, 6, 7]})
    layer = layers.pop("second")
    node.drop(layer)
    collector.collect()


CONTENTS: dict[str, Content] = {
    "first": {0: [1, 2, 3, 4]},
    "second": {0: [1, 2], 1: list(range(20, 30))},
    "third": {2: [5, 6, 7]},
}


def crash_world(directory: Path) -> tuple[MemoryBlocker, dict[str, LayerId]]:
    """Packs that are dead, mostly dead, needed, and copies of each other."""
    blocker = MemoryBlocker(pack_bytes=32 << 10)
    with sealer(blocker, directory / "made") as node:
        lost = [node.seal({0: list(range(9))}), node.seal({7: list(range(30, 40))})]
        layers = {"first": node.seal(CONTENTS["first"])}
        for pack in sorted(node.store.packs())[::2]:
            node.copy_pack(pack)
        layers["second"] = node.seal(CONTENTS["second"])
        for layer in lost:
            node.drop(layer)
    return blocker, layers


@pytest.mark.parametrize("moment", Moment)
def test_killed_at_any_call_of_the_store_nothing_needed_is_lost_and_the_next_goes_on(
    moment: Moment, tmp_path: Path
) -> None:
    for crash_at in itertools.count(1):
        directory = tmp_path / str(crash_at)
        blocker, layers = crash_world(directory)
        mortal = FaultBlocker(blocker, FaultPlan(crash_at=crash_at, moment=moment, seed=crash_at))
        with sealer(mortal, directory / "mortal") as node, suppress(SimulatedCrash):
            collect_between_changes(node, layers)
        with sealer(blocker, directory / "after") as node:
            judge(node, blocker)
        if not mortal.crashed:
            break
    assert crash_at > 30


def judge(node: Sealer, blocker: MemoryBlocker) -> None:
    """Every layer that is sealed reads as it should, before and after one more collection; nothing is left then."""
    sealed = {
        LayerId(layer): found.record
        for layer, found in node.catalog.list(LayerRecord)
        if found.record.sealed is not None
    }
    wanted = [expected(content) for content in CONTENTS.values()]
    assert all(node.content(layer) in wanted for layer in sealed)
    node.collector().collect()
    assert all(node.content(layer) in wanted for layer in sealed)
    for kind in ("condemned", "damage"):
        assert records_of(blocker, kind) == []
    again = node.collector().collect()
    assert (again.packs, again.needed_again) == (0, 0)


def test_errors_of_the_store_stop_it_and_harm_nothing(tmp_path: Path) -> None:
    for error_at in itertools.count(1):
        directory = tmp_path / str(error_at)
        blocker, layers = crash_world(directory)
        failing = FaultBlocker(blocker, FaultPlan(error_at=error_at, moment=Moment.TORN, seed=error_at))
        with sealer(failing, directory / "failing") as node:
            with suppress(StoreUnavailable):
                node.collector().collect()
            assert node.content(layers["first"]) == expected(CONTENTS["first"])
        with sealer(blocker, directory / "after") as node:
            judge(node, blocker)
        if failing.calls < error_at:
            break
    assert error_at > 20


# A seal beside it, by force


class Race:
    """A store in which 1 and 2 are garbage that somebody is about to need again, and 3 is needed."""

    def __init__(self, directory: Path) -> None:
        self.blocker = MemoryBlocker(pack_bytes=256 << 10)
        with sealer(self.blocker, directory / "before") as node:
            lost = node.seal({0: [1, 2, 8, 9, 10, 11]})
            self.kept = node.seal({0: [3]})
            self.layer = node.new_layer()
            node.drop(lost)


@pytest.mark.parametrize("intent_seconds", [0.0, 60.0], ids=["intents are broken", "intents are waited for"])
@pytest.mark.parametrize("nodes", ["one process", "two nodes"])
@pytest.mark.parametrize("first", ["seal", "collection"])
def test_a_dedup_hit_never_points_into_what_the_sweep_removes(
    tmp_path: Path, nodes: str, first: str, intent_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every interleaving of the calls of both: either the seal begins anew, or the pack stays."""
    monkeypatch.setattr(gc_module, "_POLL_SECONDS", 0.001)
    outcomes = set()
    # Where intents are waited for, the collection gives way by itself: then all of the other is enough.
    seconds = all_of_the_second if intent_seconds else part_and_all_of_the_second
    for number, schedule in enumerate(schedules(seconds)):
        directory = tmp_path / str(number)
        race = Race(directory)
        stepped = SteppedBlocker(race.blocker)
        with sealer(stepped, directory / "one") as one, sealer(stepped, directory / "two") as two:
            sealing = one if nodes == "one process" else two
            sealing.store.refresh()  # so that it hits what is there
            seal = partial(sealing.seal, {0: [1, 2], 4: [3]}, layer=race.layer)
            collect = partial(one.collector(intent_seconds=intent_seconds).collect)
            operations: list[Callable[[], object]] = [seal, collect] if first == "seal" else [collect, seal]
            *both, whole = schedule.run(stepped, *operations)
            done = both[1 if first == "seal" else 0]
            assert all(outcome.succeeded for outcome in both), [outcome.error for outcome in both]
            assert isinstance(done.result, Collected)
        with sealer(race.blocker, directory / "after") as reader:
            assert reader.content(race.layer) == expected({0: [1, 2], 4: [3]})
            assert reader.content(race.kept) == expected({0: [3]})
            outcomes.add((done.result.packs > 0, done.result.needed_again > 0, bool(done.result.kept)))
            reader.collector().collect()
            assert reader.content(race.layer) == expected({0: [1, 2], 4: [3]})
            assert records_of(race.blocker, "condemned") == []
        if whole:
            break
    assert len(outcomes) > 1, "the schedules must not all come to the same"


def all_of_the_second(first: int) -> Iterator[int]:
    return iter((NEVER,))


def part_and_all_of_the_second(first: int) -> Iterator[int]:
    """All of the second operation; at every fifth place also parts of it first, others at each."""
    return iter((NEVER,) if first % 5 else (NEVER, *range(1 + first % 7, 28, 7)))


# All at once


def test_a_model_of_layers_under_seals_collections_crashes_and_lost_caches(tmp_path: Path) -> None:
    """Two nodes by turns; one dies at some call of the store, and sometimes with its cache."""
    for seed in range(15):
        draw = random.Random(seed)
        blocker = MemoryBlocker(pack_bytes=32 << 10)
        model: dict[LayerId, dict[int, list[int]]] = {}
        for turn in range(6):
            host = draw.choice("ab")
            directory = tmp_path / f"{seed}-{host}"
            if draw.random() < 0.3:
                shutil.rmtree(directory, ignore_errors=True)
            crash_at = draw.choice((None, draw.randrange(1, 60)))
            mortal = FaultBlocker(blocker, FaultPlan(crash_at=crash_at, moment=draw.choice(list(Moment)), seed=turn))
            with sealer(mortal, directory, node=NODE) as node, suppress(SimulatedCrash):
                for _ in range(4):
                    act(node, model, draw)
        with sealer(blocker, tmp_path / f"{seed}-reader") as reader:
            confirm(reader, model)
            reader.collector().collect()
            confirm(reader, model)
            leftover = reader.collector().collect()
            assert (leftover.packs, records_of(blocker, "condemned")) == (0, [])


def act(node: Sealer, model: dict[LayerId, dict[int, list[int]]], draw: random.Random) -> None:
    """One step of a process; the model has what it may leave before the step is begun."""
    step = draw.choice(("seal", "seal", "drop", "collect"))
    sealed = sorted(layer for layer in model if is_sealed(node, layer))
    if step == "seal":
        base = draw.choice([None, *sealed])
        changes = {draw.randrange(3): [draw.randrange(12) for _ in range(draw.randrange(4))] for _ in range(2)}
        layer = node.new_layer()
        model[layer] = {**(model[base] if base is not None else {}), **changes}
        node.seal(changes, layer=layer, base=node.root(base) if base is not None else None)
    elif step == "drop" and sealed:
        node.drop(draw.choice(sealed))
    elif step == "collect":
        node.collector().collect()


def is_sealed(node: Sealer, layer: LayerId) -> bool:
    found = node.catalog.get(LayerRecord, layer)
    return found is not None and found.record.sealed is not None


def confirm(reader: Sealer, model: dict[LayerId, dict[int, list[int]]]) -> None:
    for layer, content in model.items():
        if is_sealed(reader, layer):
            assert reader.content(layer) == expected(content)


def test_seals_and_collections_in_threads_at_once(tmp_path: Path) -> None:
    """Two sealers, one of them on another node, and a collector that never rests."""
    blocker = MemoryBlocker(pack_bytes=32 << 10)
    with sealer(blocker, tmp_path / "one") as one, sealer(blocker, tmp_path / "two") as two:
        made: dict[LayerId, Content] = {}

        def seal_again_and_again(node: Sealer, seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(100):
                content = {region: [draw.randrange(8) for _ in range(3)] for region in range(2)}
                layer = node.seal(content)
                assert node.content(layer) == expected(content)
                if draw.random() < 0.8:
                    node.drop(layer)
                else:
                    made[layer] = content

        with ThreadPoolExecutor(2) as threads:
            sealing = [threads.submit(seal_again_and_again, node, seed) for seed, node in enumerate((one, two))]
            collections = 0
            while not all(future.done() for future in sealing):
                collections += one.collector(intent_seconds=0.05).collect().packs > 0
            for future in sealing:
                future.result()
        assert collections > 0
        with sealer(blocker, tmp_path / "reader") as reader:
            for layer, content in made.items():
                assert reader.content(layer) == expected(content)
