"""Drivers by name."""

from pathlib import Path

import pytest

from archipfs.blockers.file import FileBlocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.blockers.registry import create_blocker, open_blocker
from archipfs.errors import InvalidConfig, InvalidInput, StoreUnavailable


def test_file(tmp_path: Path) -> None:
    options = {"path": str(tmp_path / "store")}
    with pytest.raises(StoreUnavailable):
        open_blocker("file", options)
    assert isinstance(create_blocker("file", options), FileBlocker)
    assert open_blocker("file", options).describe() == options["path"]


def test_memory() -> None:
    assert isinstance(create_blocker("memory", {}), MemoryBlocker)
    assert isinstance(open_blocker("memory", {}), MemoryBlocker)


def test_unknown_driver_names_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"'tape'; known are .*file"):
        open_blocker("tape", {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "path is missing"),
        ({"path": ""}, "path must be"),
        ({"path": 5}, "path must be"),
        ({"path": "a\0b"}, "path must be"),
        ({"path": "/x", "pool": "y"}, "unknown option 'pool'; its options are: path"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], said: str) -> None:
    for call in (open_blocker, create_blocker):
        with pytest.raises(InvalidConfig, match=said):
            call("file", options)


def test_memory_has_no_options() -> None:
    with pytest.raises(InvalidConfig, match="its options are: none"):
        create_blocker("memory", {"path": "x"})
