"""What the daemon does that a test cannot have from outside: old kernels, and ends that fall into a hand-over."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from archipfs.daemon import process
from archipfs.daemon.process import HANDED_OVER_EXIT_CODE, NOT_RESTARTED, _Life, goes_on, wait_to_go_on
from archipfs.daemon.supervisor import SUPERVISOR_PID


def life(mount: Any, notes: list[str]) -> _Life:
    node: Any = SimpleNamespace(
        config=SimpleNamespace(backends={"default": None}), composer=SimpleNamespace(away={}, return_to_stores=list)
    )
    return _Life(node, mount, notes.extend, locks={}, control=None, since_ns=None, went_on=False)


@pytest.mark.parametrize("supervised", [True, False])
def test_a_mount_that_cannot_be_kept_says_so_where_it_is_supervised(
    monkeypatch: pytest.MonkeyPatch, supervised: bool
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv(SUPERVISOR_PID, str(os.getppid() if supervised else 1 << 30))
    mount = SimpleNamespace(kept=None, front=object(), mountpoint=Path("/mnt/a"))
    notes: list[str] = []
    trio.run(life(mount, notes)._is_ready, 0)
    assert notes == ([NOT_RESTARTED] if supervised else [])


class Exited(BaseException):
    """Stands for the end of the process."""


def heed_hangup(monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]) -> list[str]:
    """What becomes of a SIGHUP while everything else in the daemon ends."""
    happened: list[str] = []

    async def hand_over() -> None:
        await trio.sleep(0.01)
        happened.append("handed over")

    async def stop() -> None:
        happened.append("stopped")

    def leave(code: int) -> None:
        happened.append(f"exit {code}")
        raise Exited

    async def signals() -> AsyncIterator[int]:
        yield signal.SIGHUP

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.delenv(SUPERVISOR_PID, raising=False)
    alive = life(SimpleNamespace(hand_over=hand_over, stop=stop), [])
    alive.left_with_manager = left

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alive._heed, signals())
            await trio.sleep(0)
            nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    except* Exited:
        pass
    return happened


def test_a_hand_over_is_finished_whatever_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = heed_hangup(monkeypatch, ("device", "session"))
    assert happened == ["handed over", f"exit {HANDED_OVER_EXIT_CODE}"]


def test_a_hangup_stops_a_daemon_whose_mount_nobody_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heed_hangup(monkeypatch, ()) == ["stopped"]


def test_a_standby_without_a_word_to_go_on_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(process, "notify", said.append)
    for words, expected in ((b"", SystemExit), (b"17", None)):
        reading, writing = os.pipe()
        os.write(writing, words)
        os.close(writing)
        if expected is None:
            assert wait_to_go_on({"go": reading}) == 17
        else:
            with pytest.raises(expected):
                wait_to_go_on({"go": reading})
    assert said == ["X_STANDBY=1", "X_STANDBY=1"]
    assert wait_to_go_on({}) is None


def test_without_both_halves_there_is_nothing_to_go_on_with() -> None:
    assert goes_on({"device": 3, "session": 4})
    assert not goes_on({"device": 3, "control": 4})
    assert not goes_on({})
