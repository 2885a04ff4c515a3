"""What the mapper's tests share: they look at stores through the same world as the composer's."""

from pathlib import Path

import pytest

from tests.compose.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)
