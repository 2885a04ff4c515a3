"""The command on drivers: what can store bytes, and how volumes can be reached."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from archipfs.blockers.registry import DRIVERS, FOR_TESTS
from archipfs.cli.output import Column, View, as_names, as_yes, view_options
from archipfs.errors import ArchipError, NotSupported

FUSE_DEVICE = "/dev/fuse"

LISTED = (
    Column("name"),
    Column("kind"),
    Column("usable", as_yes),
    Column("needed", as_names),
    Column("optional", as_names),
    Column("note"),
)


@click.command("driver-list")
@click.option("--endpoint", "endpoints", is_flag=True, help="Only what volumes can be reached by.")
@click.option("--backend", "backends", is_flag=True, help="Only what can store their bytes.")
@view_options(LISTED)
def driver_list(endpoints: bool, backends: bool, view: View) -> None:
    """List the drivers and whether they can be used here.

    The options of a backend's driver are those of backend-create, and the keys of its table in the configuration.
    """
    everything = endpoints == backends
    view.table(
        [
            *(_backend_drivers() if backends or everything else ()),
            *(_endpoint_drivers() if endpoints or everything else ()),
        ]
    )


def _backend_drivers() -> Iterator[Mapping[str, Any]]:
    for name, driver in sorted(DRIVERS.items()):
        if name not in FOR_TESTS:
            yield _row(name, "backend", driver.check, needed=sorted(driver.needed), optional=sorted(driver.optional))


def _endpoint_drivers() -> Iterator[Mapping[str, Any]]:
    yield _row("fuse", "endpoint", _check_fuse, needed=[], optional=["front", "threads", "supervisor"])


def _check_fuse() -> None:
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise NotSupported(f"{FUSE_DEVICE} cannot be opened; load the module fuse, and see who may use it")


def _row(name: str, kind: str, check: Callable[[], object], **options: list[str]) -> Mapping[str, Any]:
    note = None
    try:
        check()
    except ArchipError as error:
        note = str(error)
    return {"name": name, "kind": kind, "usable": note is None, **options, "note": note}


COMMANDS = (driver_list,)
