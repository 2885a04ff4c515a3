"""Which mounts a test runs on: with the front or without it, and whether volumes lie in a directory or in a pool.

A module says ``pytest.mark.ways(FRONT, PLAIN, POOL)``, and each of its tests that uses a mount runs once on each, under
that name. A test of it that says ``pytest.mark.directory("why")`` leaves out the pool, for the reason given; one of
another module says ``also_on_a_pool``. All that runs on a pool is marked ``ceph``, and has a namespace of its own for
each instance. A pool without the front would show nothing new: what differs lies below the engine.
"""

from enum import StrEnum

import pytest


class Way(StrEnum):
    FRONT = "front"
    """A directory, with the native front."""
    PLAIN = "plain"
    """A directory, plain pyfuse3."""
    POOL = "pool"
    """A RADOS pool, with the native front."""


FRONT, PLAIN, POOL = Way.FRONT, Way.PLAIN, Way.POOL
also_on_a_pool = pytest.mark.ways(FRONT, POOL)
"""For single tests of a module that has the front only, and mostly to do with that."""


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Have the fixture ``way`` take each of the ways that the test's markers ask for."""
    asked = metafunc.definition.get_closest_marker("ways")
    if asked is None or "way" not in metafunc.fixturenames:
        return
    alone = metafunc.definition.get_closest_marker("directory")
    if alone is not None:
        [reason] = alone.args
        assert reason, f"{metafunc.definition.nodeid}: say why it needs a directory"
    taken = [Way(way) for way in asked.args if way != POOL or alone is None]
    marks = {POOL: pytest.mark.ceph}
    metafunc.parametrize(
        "way", [pytest.param(way, marks=marks.get(way, ()), id=way) for way in taken], indirect=True, scope="module"
    )
