"""Drivers by name: the one place that turns a backend's configuration into a blocker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from archipfs.blockers.contract import Blocker
from archipfs.blockers.file import FileBlocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.blockers.rados.binding import load_rados
from archipfs.blockers.rados.blocker import RadosBlocker
from archipfs.errors import InvalidConfig, InvalidInput


@dataclass(frozen=True, slots=True)
class Driver:
    """How to make and to open a store. All options are strings."""

    needed: frozenset[str]
    optional: frozenset[str]
    create: Callable[..., Blocker]
    open: Callable[..., Blocker]
    check: Callable[[], object] = lambda: None
    """Raises ``StoreUnavailable`` where something is not installed that it needs."""


DRIVERS: dict[str, Driver] = {
    "file": Driver(frozenset({"path"}), frozenset(), FileBlocker.create, FileBlocker),
    "memory": Driver(frozenset(), frozenset(), MemoryBlocker, MemoryBlocker),
    "rados": Driver(
        frozenset({"pool"}),
        frozenset({"conf", "user", "keyring", "namespace", "timeout", "operation_timeout"}),
        RadosBlocker.create,
        RadosBlocker.from_options,
        load_rados,
    ),
}
FOR_TESTS = frozenset({"memory"})
"""An empty store each time."""


def create_blocker(driver: str, options: Mapping[str, object]) -> Blocker:
    """Lay out a new store and open it; one that is there already is opened as it is.

    Raises ``InvalidInput`` for an unknown driver, ``InvalidConfig`` for options that do not fit it, and what the driver
    raises (``StoreUnavailable``, ``NotSupported``).
    """
    chosen, checked = _check(driver, options)
    return chosen.create(**checked)


def open_blocker(driver: str, options: Mapping[str, object]) -> Blocker:
    """Open a store that exists. Raises as :func:`create_blocker` does."""
    chosen, checked = _check(driver, options)
    return chosen.open(**checked)


def _check(driver: str, options: Mapping[str, object]) -> tuple[Driver, dict[str, str]]:
    chosen = DRIVERS.get(driver)
    if chosen is None:
        raise InvalidInput(f"unknown driver {driver!r}; known are {', '.join(sorted(DRIVERS))}")
    checked: dict[str, str] = {}
    for name, value in options.items():
        if name not in chosen.needed | chosen.optional:
            known = ", ".join(sorted(chosen.needed | chosen.optional)) or "none"
            raise InvalidConfig(f"driver {driver}: unknown option {name!r}; its options are: {known}")
        if not isinstance(value, str) or not value or "\0" in value:
            raise InvalidConfig(f"driver {driver}: {name} must be a string that is not empty; it is {value!r}")
        checked[name] = value
    for name in sorted(chosen.needed - checked.keys()):
        raise InvalidConfig(f"driver {driver}: {name} is missing; add it to the backend's configuration")
    return chosen, checked
