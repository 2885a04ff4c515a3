"""Sealing in the background: what is due, how fast, and for whom it gives way."""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import structlog.testing
import trio

from archipfs.blockers.contract import Space
from archipfs.blockers.memory import MemoryBlocker
from archipfs.compose.composer import Composer
from archipfs.config import SealConfig
from archipfs.daemon.sealing import BackgroundSealing
from archipfs.errors import StoreError, StoreUnavailable
from archipfs.map.mapper import data_key
from archipfs.types import REGION_BYTES, SECTOR_BYTES
from tests.compose.world import World, fill, pattern

AT_ONCE = SealConfig(after_seconds=0)


@pytest.fixture
def composer(tmp_path: Path) -> Composer:
    composer = World(tmp_path / "nodes").composer()
    composer.create("vm", 8 * REGION_BYTES)
    for region in range(8):
        fill(composer, "vm", pattern(region, 4), region * REGION_BYTES)
    composer.snapshot("vm", "snap")
    return composer


def in_background(work: Callable[[], object]) -> None:
    """As the daemon calls it."""

    async def call() -> None:
        await trio.to_thread.run_sync(work)

    trio.run(call)


def state(composer: Composer) -> str:
    found = composer.find("snap")
    return "sealed" if found.mapper.catalog.layer(found.record.layer).record.sealed else "frozen"


def test_only_what_is_old_enough_is_sealed(composer: Composer) -> None:
    in_background(BackgroundSealing(composer, SealConfig(after_seconds=3600)).seal_what_is_due)
    assert state(composer) == "frozen"
    in_background(BackgroundSealing(composer, AT_ONCE).seal_what_is_due)
    assert state(composer) == "sealed"


def test_it_does_not_look_all_the_time(composer: Composer) -> None:
    sealing = BackgroundSealing(composer, SealConfig(after_seconds=3600))
    in_background(sealing.seal_what_is_due)
    old = msgspec.structs.replace(composer.find("snap").record, created_ns=0)
    composer.mapper().change(old.id, lambda record: old)
    in_background(sealing.seal_what_is_due)
    assert state(composer) == "frozen"


def test_what_lies_below_a_volume_whose_snapshots_are_gone_is_sealed(composer: Composer) -> None:
    composer.remove("snap")
    in_background(BackgroundSealing(composer, AT_ONCE).seal_what_is_due)
    chain = composer.mapper().catalog.chain(composer.find("vm").record.layer)
    assert [layer.sealed is not None for layer in chain] == [False, True]


def test_a_volume_is_frozen_only_if_it_was_not_written_for_long(composer: Composer) -> None:
    fill(composer, "vm", pattern(9))
    in_background(BackgroundSealing(composer, SealConfig(after_seconds=0, live_after_seconds=3600)).seal_what_is_due)
    assert composer.stored_bytes(composer.find("vm")) >= SECTOR_BYTES
    time.sleep(0.02)
    in_background(BackgroundSealing(composer, SealConfig(after_seconds=0, live_after_seconds=0.01)).seal_what_is_due)
    assert composer.stored_bytes(composer.find("vm")) == 0


def test_what_cannot_be_looked_at_keeps_nothing_else_from_being_sealed(composer: Composer) -> None:
    composer.create("broken", REGION_BYTES)
    composer.mapper().blocker.delete_data(data_key(composer.find("broken").record.layer))
    sealing = BackgroundSealing(composer, SealConfig(after_seconds=0, live_after_seconds=0.001))
    time.sleep(0.01)
    with structlog.testing.capture_logs() as logs:
        in_background(sealing.seal_what_is_due)
    assert [each["volume"] for each in logs if each["log_level"] == "error"] == ["broken"]
    assert state(composer) == "sealed"


def test_a_store_that_does_not_answer_is_asked_again_later(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def volumes(self: Composer) -> None:
        asked.append(self)
        raise StoreUnavailable("wanted by the test")

    monkeypatch.setattr(Composer, "volumes", volumes)
    sealing = BackgroundSealing(composer, AT_ONCE)
    for _ in range(3):
        in_background(sealing.seal_what_is_due)
    assert len(asked) == 1


def test_what_another_node_made_is_left_to_it_for_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "nodes")
    theirs = world.composer(host="one")
    theirs.create("vm", REGION_BYTES)
    fill(theirs, "vm", pattern(1, 4))
    theirs.snapshot("vm", "snap")
    ours = world.composer(host="two")
    in_background(BackgroundSealing(ours, AT_ONCE).seal_what_is_due)
    assert state(ours) == "frozen"
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 3600 * 10**9)
    in_background(BackgroundSealing(ours, AT_ONCE).seal_what_is_due)
    assert state(ours) == "sealed"


def test_what_lies_under_a_volume_that_another_node_has_open_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path / "nodes")
    ours, others = world.composer(), world.composer(host="two")
    ours.create("vm", 8 * REGION_BYTES)
    fill(ours, "vm", pattern(1, 4))
    ours.snapshot("vm", "snap")
    ours.clone("snap", "copy")
    with others.using(others.find("copy")):
        in_background(BackgroundSealing(ours, AT_ONCE).seal_what_is_due)
        assert state(ours) == "frozen"
    in_background(BackgroundSealing(ours, AT_ONCE).seal_what_is_due)
    assert state(ours) == "sealed"


def test_it_takes_no_room_that_volumes_may_need(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives space back only in the end; what it has stored when the store is full helps nobody."""
    total, rest = 1 << 30, 8 * REGION_BYTES
    for available, expected in ((total // 32, "frozen"), (total // 32 + rest, "sealed")):
        monkeypatch.setattr(
            MemoryBlocker, "space", lambda self, available=available: Space(total, available, available)
        )
        in_background(BackgroundSealing(composer, AT_ONCE).seal_what_is_due)
        assert state(composer) == expected
        assert bool(list(composer.mapper().blocker.list("pack"))) == (expected == "sealed")
    composer.create("other", REGION_BYTES)
    fill(composer, "other", pattern(3, 4))
    composer.snapshot("other", "others")
    monkeypatch.setattr(MemoryBlocker, "space", lambda self: Space(total, 0, 0))
    assert composer.seal("others").layers == 1, "whoever asks for it gets it, as far as there is room"


def test_it_keeps_to_its_bandwidth(composer: Composer) -> None:
    fill(composer, "vm", pattern(10, 100))
    composer.snapshot("vm", "more")
    read_bytes = 132 * SECTOR_BYTES
    started = time.monotonic()
    in_background(BackgroundSealing(composer, SealConfig(after_seconds=0, bandwidth=read_bytes)).seal_what_is_due)
    assert state(composer) == "sealed"
    assert time.monotonic() - started > 0.7


def test_it_gives_way_to_a_seal_that_somebody_waits_for(composer: Composer) -> None:
    sealing = BackgroundSealing(composer, AT_ONCE)
    composer.seals_waited_for += 1
    in_background(sealing.seal_what_is_due)
    assert state(composer) == "frozen"
    composer.seals_waited_for -= 1
    in_background(sealing.seal_what_is_due)
    assert state(composer) == "sealed"


def test_it_ends_with_the_daemon(composer: Composer) -> None:
    sealing = BackgroundSealing(composer, SealConfig(after_seconds=0, bandwidth=1))

    async def live() -> None:
        with trio.move_on_after(0.3):
            await trio.to_thread.run_sync(sealing.seal_what_is_due)

    started = time.monotonic()
    trio.run(live)
    assert time.monotonic() - started < 60, "at this bandwidth it takes hours"
    assert state(composer) == "frozen"


def test_what_fails_is_said_and_left_alone_for_a_while(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    sealing = BackgroundSealing(composer, AT_ONCE)
    tried = []

    def fail(name: str, **options: object) -> None:
        tried.append(name)
        raise StoreError("the disk is on fire; put it out")

    monkeypatch.setattr(composer, "seal", fail)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            in_background(sealing.seal_what_is_due)
    assert sorted(tried) == ["snap", "vm"]
    assert {entry["log_level"] for entry in logs} == {"error"}
    monkeypatch.undo()
    in_background(sealing.seal_what_is_due)
    assert state(composer) == "frozen"
