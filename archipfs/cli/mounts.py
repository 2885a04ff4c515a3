"""The commands on the mount and on the node as a whole."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from archipfs.cli.instance import Instance, pass_instance
from archipfs.cli.output import (
    Column,
    Report,
    View,
    as_duration,
    as_names,
    as_size,
    report_options,
    view_options,
    working,
)
from archipfs.daemon import lifecycle
from archipfs.daemon.client import connect_daemon
from archipfs.errors import InvalidInput


def as_pack_cache(value: Mapping[str, int], exact: bool) -> str:
    taken, fetched = (as_size(value[key], exact) for key in ("bytes", "fetched_bytes"))
    return f"{taken} in {value['files']} files; {fetched} fetched; {value['hits']} hits; {value['evictions']} evictions"


MOUNT_COLUMNS = (
    Column("mountpoint"),
    Column("daemon_pid"),
    Column("supervisor_pid"),
    Column("front"),
    Column("backends", as_names),
    Column("open_volumes", as_names),
    Column("uptime", as_duration),
    Column("pack_cache", as_pack_cache, always=False),
)

WITHOUT_EFFECT = frozenset(
    {"rw", "dev", "nodev", "suid", "nosuid", "exec", "auto", "noauto", "nouser", "async", "noatime", "relatime"}
    | {"nofail", "_netdev", "defaults", "default_permissions"}
)
"""What fstab and mount(8) hand on and does not concern us, and what is so anyway. So is all that begins with ``x-``."""

KNOWN = "root=DIR, config=FILE, front=on|off, supervisor=on|off, threads=N, allow_other, default_permissions"
THREADS_MAX = 64


@dataclass(frozen=True, slots=True)
class MountOptions:
    instance: Instance
    """The one that root= or config= names, else that of the command line."""
    front: bool = True
    supervised: bool = True
    """Whether somebody starts a daemon again that was killed; only the front can go on with a mount."""
    threads: int | None = None
    """Of the front, that read requests at a time; ``None``: as many as suits the machine."""


def parse_mount_options(instance: Instance, texts: Sequence[str]) -> MountOptions:
    """Raises ``InvalidInput`` for an option that is not known or that cannot be had."""
    places: dict[str, Path] = {}
    front, supervised, threads = True, None, None
    for option in (option.strip() for text in texts for option in text.split(",")):
        key, _, value = option.partition("=")
        if key in ("root", "config"):
            if not value:
                raise InvalidInput(f"mount option {key} has no value; give {key}=PATH")
            places[key] = Path(value)
        elif option == "allow_other":
            if os.geteuid() != 0:
                raise InvalidInput("mount option allow_other: only root's mounts are open to others; leave it out")
        elif option in ("front=on", "front=off"):
            front = value == "on"
        elif option in ("supervisor=on", "supervisor=off"):
            supervised = value == "on"
        elif key == "threads":
            if not value.isdecimal() or not 1 <= int(value) <= THREADS_MAX:
                raise InvalidInput(f"mount option threads={value} is not a number from 1 to {THREADS_MAX}")
            threads = int(value)
        elif option and option not in WITHOUT_EFFECT and not option.startswith("x-"):
            raise InvalidInput(f"unknown mount option {option!r}; known are {KNOWN}")
    if len(places) > 1:
        raise InvalidInput("mount options root and config exclude each other; give one of them")
    if supervised and not front:
        raise InvalidInput("mount option supervisor=on needs the front; leave front=off out")
    named = Instance(places.get("root"), places.get("config")) if places else instance
    return MountOptions(named, front, front if supervised is None else supervised, threads)


class MountPoint(click.Path):
    """A path that is not looked at: where nobody serves a mount, and its device is kept, that waits for us."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(value)


@click.command("mount")
@click.argument("mountpoint", metavar="MNT", type=MountPoint())
@click.option("--foreground", is_flag=True, help="Stay in the foreground, as a service manager wants it.")
@click.option("-o", "options", metavar="OPTIONS", multiple=True, help=f"Separated by commas: {KNOWN}.")
@report_options
@pass_instance
def mount(instance: Instance, mountpoint: Path, foreground: bool, options: Sequence[str], report: Report) -> None:
    """Show every volume as a file under MNT.

    Returns when the mount is ready. The first mount of all makes the default backend.
    """
    mountpoint = mountpoint.absolute()
    wanted = parse_mount_options(instance, options)
    notes = lifecycle.mount(
        wanted.instance.config(),
        mountpoint,
        foreground=foreground,
        front=wanted.front,
        supervised=wanted.supervised,
        threads=wanted.threads,
    )
    for note in notes:
        click.echo(f"archip: {note}", err=True)
    if not foreground:
        report.done(f"mounted at {mountpoint}", {"mountpoint": str(mountpoint)})


@click.command("umount")
@click.argument("mountpoint", metavar="[MNT]", required=False, type=MountPoint())
@report_options
@pass_instance
def umount(instance: Instance, mountpoint: Path | None, report: Report) -> None:
    """Flush, give the locks back and end the daemon."""
    if mountpoint is not None:
        mountpoint = mountpoint.absolute()
    with working("flushing"):
        lifecycle.umount(instance.config(), mountpoint)
    where = f" {mountpoint}" if mountpoint is not None else ""
    report.done(f"unmounted{where}", {"mountpoint": str(mountpoint) if mountpoint is not None else None})


@click.command("upgrade")
@report_options
@pass_instance
def upgrade(instance: Instance, report: Report) -> None:
    """Replace the daemon by one of the installed version.

    The mount stays, and so do open files; requests wait for a moment. If the new daemon fails, the old one stays.
    """
    with working("upgrading"):
        done = lifecycle.upgrade(instance.config())
    report.done(
        f"upgraded: daemon {done.old_pid} was replaced by {done.new_pid}, with a pause of {done.pause_ms:.0f} ms",
        {"old_pid": done.old_pid, "new_pid": done.new_pid, "pause_ms": done.pause_ms},
    )


@click.command("status")
@view_options(MOUNT_COLUMNS)
@pass_instance
def status(instance: Instance, view: View) -> None:
    """Show each mount: daemon, backends, open volumes."""
    daemon = connect_daemon(instance.config())
    mounts = []
    if daemon is not None:
        with daemon:
            mounts.append(daemon.call("status"))
    if mounts or view.as_json or not view.header:
        view.details(mounts)
    else:
        click.echo("nothing is mounted")


COMMANDS = (mount, umount, upgrade, status)
