"""Every module here has one mount, which is emptied between its tests and has to let go of what they had it hold."""

from collections.abc import Iterator

import pytest

from tests.lib.instance import Instance
from tests.lib.usage import given_back


@pytest.fixture(scope="module")
def used_instance(shared_instance: Instance) -> Instance:
    """What a daemon makes once, at the first request of a kind, it may keep."""
    volume = shared_instance.path / "first"
    volume.write_bytes(b"x" * 100_000)
    volume.read_bytes()
    list(shared_instance.path.iterdir())
    volume.unlink()
    return shared_instance


@pytest.fixture
def mount(used_instance: Instance, shared_mount: Instance) -> Iterator[Instance]:
    with given_back(shared_mount):
        yield shared_mount
