"""What the composer's tests share."""

from pathlib import Path

import pytest
from hypothesis import settings

from tests.compose.world import World

settings.register_profile("long", max_examples=2000, stateful_step_count=100, deadline=None)
"""``pytest tests/compose/test_model.py --hypothesis-profile=long``: as long as one likes to wait."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)
