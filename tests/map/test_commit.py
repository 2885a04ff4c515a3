"""Roots are committed by one of those who try, soon."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from archipfs.blockers.memory import MemoryBlocker
from archipfs.map.catalog import Catalog
from archipfs.map.chunks import Session
from archipfs.map.commit import commit_sealed
from archipfs.map.records import LayerRecord, Sealed
from archipfs.types import new_layer_id

LOOK_SECONDS = 0.02


class Looking:
    """What a commit needs of a session: a look at the packs, which takes a while."""

    def __init__(self) -> None:
        self.looks = 0

    def verify(self) -> None:
        self.looks += 1
        time.sleep(LOOK_SECONDS)


@pytest.mark.parametrize("lead", range(5))
def test_two_who_seal_the_same_at_the_same_pace_come_to_an_end(lead: int) -> None:
    """Each takes the other's token away, at the same point of his look each time."""
    catalog = Catalog(MemoryBlocker())
    layer = LayerRecord(new_layer_id(), None, 0, "node", 0)
    catalog.put(layer, layer.id, None)
    sessions = [Looking(), Looking()]
    together = threading.Barrier(2)

    def commit(number: int) -> LayerRecord:
        together.wait()
        time.sleep(number * lead * LOOK_SECONDS / 5)
        return commit_sealed(catalog, layer, None, Sealed(f"{number:02}", 0, 0), cast(Session, sessions[number]))

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(commit, range(2))
    assert one.sealed == other.sealed is not None
    assert max(session.looks for session in sessions) <= 30
