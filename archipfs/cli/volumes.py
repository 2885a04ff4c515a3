"""The commands on volumes, snapshots and clones."""

import functools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import click

from archipfs.cli.instance import Instance, pass_instance
from archipfs.cli.output import (
    Column,
    Report,
    View,
    advancing,
    as_size,
    as_time,
    as_yes,
    report_options,
    view_options,
)
from archipfs.daemon.client import Client
from archipfs.errors import ArchipError, Busy, InvalidInput, LockHeld, NotFound, ReadOnlyVolume
from archipfs.units import format_size, parse_size


def _parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


_size_option = functools.partial(click.option, "--size", metavar="SIZE", callback=_parse_size)
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would happen and change nothing.")


def _as_lock(lock: Mapping[str, Any], exact: bool) -> str:
    holds = ", ".join(lock["holds"])
    return f"{lock['host']} since {as_time(lock['since'], exact)} ({holds}; generation {lock['generation']})"


LISTED = (
    Column("name"),
    Column("kind"),
    Column("size", as_size, right=True),
    Column("backend"),
    Column("parent"),
    Column("created", as_time),
    Column("uuid", always=False),
    Column("replica", as_yes, always=False),
)

DETAILS = (
    Column("name"),
    Column("kind"),
    Column("size", as_size),
    Column("written", as_size),
    Column("exclusive", as_size),
    Column("shared", as_size),
    Column("removal_frees", as_size),
    Column("backend"),
    Column("parent"),
    Column("state"),
    Column("lock", _as_lock),
    Column("created", as_time),
    Column("modified", as_time),
    Column("mode"),
    Column("uid"),
    Column("gid"),
    Column("uuid"),
    Column("layer"),
    Column("layers"),
    Column("sealed", as_yes),
)


@click.command("volume-list")
@click.option("--backend", help="Only what lies there; also replicas, and what lies behind others of its name.")
@view_options(LISTED)
@pass_instance
def volume_list(instance: Instance, backend: str | None, view: View) -> None:
    """List volumes, snapshots and clones."""
    with instance.connect() as client:
        view.table(client.call("volume-list", **({} if backend is None else {"backend": backend})))


@click.command("volume-info")
@click.argument("name")
@view_options(DETAILS)
@pass_instance
def volume_info(instance: Instance, name: str, view: View) -> None:
    """Show all there is to know of a volume.

    Written is what came since the last snapshot; exclusive is what only this volume holds, shared what others hold too;
    and removing a snapshot frees what only it holds, once garbage is collected.
    """
    with instance.connect() as client:
        view.item(client.call("volume-info", name=name, space=True))


@click.command("volume-create")
@click.option("--name", required=True, help="The new volume's name.")
@_size_option(required=True, help="Its size, like 20G or 512MiB.")
@click.option("--backend", help="Where it is to lie; the default backend if not given.")
@report_options
@pass_instance
def volume_create(instance: Instance, name: str, size: int, backend: str | None, report: Report) -> None:
    """Create an empty volume."""
    with instance.connect() as client:
        made = client.call("volume-create", name=name, size=size, backend=backend, uid=os.geteuid(), gid=os.getegid())
    report.done(f"created {name}, {format_size(made['size'])}", made)


@click.command("volume-clone")
@click.argument("source", metavar="NAME")
@click.option("--name", required=True, help="The clone's name.")
@_size_option(help="Its size, at least that of NAME, which is the default.")
@report_options
@pass_instance
def volume_clone(instance: Instance, source: str, name: str, size: int | None, report: Report) -> None:
    """Make a writable copy of a volume or snapshot.

    It takes constant time, whatever the size."""
    with instance.connect() as client:
        made = client.call("volume-clone", name=source, clone=name, size=size)
    report.done(f"cloned {source} to {name}, {format_size(made['size'])}", made)


@click.command("volume-snapshot")
@click.argument("source", metavar="NAME")
@click.option("--name", help="The snapshot's name; NAME@ and the time if not given.")
@_size_option(help="Its size, at least that of NAME, which is the default.")
@report_options
@pass_instance
def volume_snapshot(instance: Instance, source: str, name: str | None, size: int | None, report: Report) -> None:
    """Make a read-only copy of a volume or snapshot.

    It takes constant time, whatever the size.

    `volume-snapshot vm1@monday` means `volume-snapshot vm1 --name vm1@monday`, unless there is a volume, not a
    snapshot, that is itself called vm1@monday.
    """
    with instance.connect() as client:
        if name is None:
            source, name = _source_and_snapshot(client, source)
        made = client.call("volume-snapshot", name=source, snapshot=name, size=size)
    report.done(f"made {name}, a snapshot of {source}, {format_size(made['size'])}", made)


def _source_and_snapshot(client: Client, given: str) -> tuple[str, str]:
    """The volume and the snapshot's name that ``given`` alone stands for."""
    timed = f"{given}@{time.strftime('%Y%m%d-%H%M%S')}"
    if "@" not in given:
        return given, timed
    with suppress(NotFound):
        if client.call("volume-info", name=given)["kind"] != "snapshot":
            return given, timed
    return _volume_of(given), given


def _volume_of(snapshot: str) -> str:
    """The volume in ``VOLUME@SNAPSHOT``. The snapshot's name is the whole, so a volume's name may have an '@' too."""
    volume, _, label = snapshot.rpartition("@")
    if not volume or not label:
        raise InvalidInput(f"{snapshot!r} does not name a volume and a snapshot of it; give VOLUME@SNAPSHOT")
    return volume


@click.command("volume-rename")
@click.argument("name")
@click.argument("new_name", metavar="NEW")
@report_options
@pass_instance
def volume_rename(instance: Instance, name: str, new_name: str, report: Report) -> None:
    """Give a volume or snapshot another name."""
    with instance.connect() as client:
        answer = client.call("volume-rename", name=name, new_name=new_name)
    report.done(f"renamed {name} to {new_name}", answer)


@click.command("volume-resize")
@click.argument("name")
@_size_option(required=True, help="The new size, like 20G or 512MiB.")
@_dry_run
@report_options
@pass_instance
def volume_resize(instance: Instance, name: str, size: int, dry_run: bool, report: Report) -> None:
    """Grow or shrink a volume.

    What is added reads as zeros. Shrinking below the present size is allowed: what lies beyond the new size is lost,
    and growing again does not bring it back. Snapshots keep theirs.
    """
    with instance.connect() as client:
        if dry_run:
            present = _writable(client.call("volume-info", name=name))["size"]
            sentence = f"would resize {name} from {format_size(present)} to {format_size(size)}"
            if size < present:
                sentence += f"; the last {format_size(present - size)} would be lost"
            report.done(sentence, {"name": name, "size": size, "size_before": present, "dry_run": True})
            return
        answer = client.call("volume-resize", name=name, size=size)
    report.done(f"resized {name} to {format_size(answer['size'])}", answer)


@click.command("volume-rollback")
@click.argument("name")
@click.argument("snapshot", required=False)
@_dry_run
@report_options
@pass_instance
def volume_rollback(instance: Instance, name: str, snapshot: str | None, dry_run: bool, report: Report) -> None:
    """Have a volume read as one of its snapshots does.

    The volume must not be open. What it holds now is kept as another snapshot, which the answer names.
    `volume-rollback vm1@monday` means `volume-rollback vm1 vm1@monday`.
    """
    if snapshot is None:
        name, snapshot = _volume_of(name), name
    with instance.connect() as client:
        if dry_run:
            volume = _unused(_writable(client.call("volume-info", name=name)), "roll back")
            source = client.call("volume-info", name=snapshot)
            if source["kind"] != "snapshot":
                raise InvalidInput(f"{snapshot} is not a snapshot; see `archip volume-list`")
            report.done(
                f"would roll {name} back to {snapshot}, {format_size(source['size'])}, "
                f"and keep the {format_size(volume['size'])} it holds now as a snapshot",
                {"name": name, "snapshot": snapshot, "size": source["size"], "dry_run": True},
            )
            return
        answer = client.call("volume-rollback", name=name, snapshot=snapshot)
    report.done(f"rolled {name} back to {snapshot}; what it held is kept as {answer['kept']}", answer)


@click.command("volume-remove")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--backend", help="Those in that backend, be they replicas, or behind others of their names.")
@_dry_run
@report_options
@pass_instance
def volume_remove(instance: Instance, names: Sequence[str], backend: str | None, dry_run: bool, report: Report) -> None:
    """Remove volumes and snapshots.

    Snapshots and clones that were made from them stay whole. Stops at the first that cannot be removed.
    """
    where = {} if backend is None else {"backend": backend}
    lines = Report(as_json=False, quiet=report.quiet or report.as_json)
    done: list[Mapping[str, Any]] = []
    with instance.connect() as client:
        try:
            for name in names:
                if dry_run:
                    volume = _to_be_removed(client, name, backend)
                    done.append({"name": name, "kind": volume["kind"], "size": volume["size"], "dry_run": True})
                    lines.done(f"would remove {name}, a {volume['kind']} of {format_size(volume['size'])}", done[-1])
                else:
                    done.append(client.call("volume-remove", name=name, **where))
                    lines.done(f"removed {name}", done[-1])
        except ArchipError as error:
            if not done or dry_run:
                raise
            removed = ", ".join(each["name"] for each in done)
            raise type(error)(f"{error}; removed before that: {removed}") from error
        finally:
            if report.as_json:
                report.done("", done)


def _to_be_removed(client: Client, name: str, backend: str | None) -> Mapping[str, Any]:
    if backend is None:
        return _unused(client.call("volume-info", name=name), "remove")
    listed: Sequence[Mapping[str, Any]] = client.call("volume-list", backend=backend)
    found = next((each for each in listed if each["name"] == name), None)
    if found is None:
        raise NotFound(f"no volume in backend {backend} is called {name}; see `archip volume-list`")
    return found


def _writable(volume: Mapping[str, Any]) -> Mapping[str, Any]:
    if volume["kind"] == "snapshot":
        raise ReadOnlyVolume(f"{volume['name']} is a snapshot and does not change; clone it to write")
    return volume


def _unused(volume: Mapping[str, Any], doing: str) -> Mapping[str, Any]:
    if volume["state"] == "open":
        raise Busy(f"{volume['name']} is open; close it before you {doing} it")
    return volume


@click.command("volume-seal")
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every volume and snapshot that no other node has locked.")
@click.option("--live", is_flag=True, help="Also what a volume holds now: it is frozen first, as for a snapshot.")
@report_options
@pass_instance
def volume_seal(instance: Instance, names: Sequence[str], every: bool, live: bool, report: Report) -> None:
    """Deduplicate what snapshots and volumes hold.

    Of a volume, what was written before its last snapshot or clone; with --live, all of it. Volumes stay in use
    meanwhile. The daemon does it by itself after a while; see [seal] in the configuration. Ctrl-C ends it, and what was
    done until then is not done again.
    """
    if bool(names) == every:
        raise InvalidInput("give the names of volumes or snapshots, or --all for every one")
    lines = Report(as_json=False, quiet=report.quiet or report.as_json)
    done: list[Mapping[str, Any]] = []
    with instance.connect() as client:
        if every:
            names = [each["name"] for each in client.call("volume-list")]
        try:
            for name in names:
                done.append(_sealed(client, name, live, spare_locked=every))
                lines.done(_seal_sentence(done[-1]), done[-1])
        finally:
            if report.as_json:
                report.done("", done)


def _sealed(client: Client, name: str, live: bool, *, spare_locked: bool) -> Mapping[str, Any]:
    try:
        with advancing(f"sealing {name}") as progress:
            answer: Mapping[str, Any] = client.follow("volume-seal", progress, name=name, live=live)
            return answer
    except (LockHeld, NotFound) as error:
        if not spare_locked:
            raise
        return {"name": name, "passed_over": str(error)}


def _seal_sentence(done: Mapping[str, Any]) -> str:
    if "passed_over" in done:
        return f"passed over {done['name']}: {done['passed_over']}"
    if not done["layers"]:
        return f"{done['name']} has nothing to seal"
    return f"sealed {done['name']}: read {format_size(done['read'])}, stored {format_size(done['added'])}"


@click.command("volume-import")
@click.argument("file", metavar="FILE")
@click.option("--name", required=True, help="The new volume's name.")
@click.option("--backend", help="Where it is to lie; the default backend if not given.")
@report_options
@pass_instance
def volume_import(instance: Instance, file: str, name: str, backend: str | None, report: Report) -> None:
    """Make a volume of a raw file or disk.

    It is deduplicated from the start, and holes are not read. Ctrl-C ends it; begun again, it finds what was stored
    until then.
    """
    path = os.path.abspath(file)
    with instance.connect() as client, advancing(f"importing {file}") as progress:
        made = client.follow(
            "volume-import", progress, path=path, name=name, backend=backend, uid=os.geteuid(), gid=os.getegid()
        )
    report.done(
        f"imported {name}, {format_size(made['size'])}: {format_size(made['data'])} of data, "
        f"stored {format_size(made['added'])}",
        made,
    )


@click.command("volume-move")
@click.argument("name")
@click.option("--from", "origin", required=True, help="The backend that it lies in.")
@click.option("--to", "target", required=True, help="The backend that it is to lie in.")
@click.option("--with-snapshots", is_flag=True, help="Also the snapshots of the volume, which go first.")
@report_options
@pass_instance
def volume_move(instance: Instance, name: str, origin: str, target: str, with_snapshots: bool, report: Report) -> None:
    """Move a volume or a snapshot to another backend.

    A volume stays in use meanwhile; at the end, requests wait for a moment. A snapshot must not be open. What is shared
    with volumes and snapshots that stay is copied, so that all of them are whole. Ctrl-C ends it: then it is where it
    was, and the next try goes on.
    """
    lines = Report(as_json=False, quiet=report.quiet or report.as_json)
    done: list[Mapping[str, Any]] = []
    with instance.connect() as client:
        names = [*_snapshots_of(client, name), name] if with_snapshots else [name]
        try:
            for each in names:
                with advancing(f"moving {each}") as progress:
                    done.append(client.follow("volume-move", progress, name=each, origin=origin, target=target))
                lines.done(_move_sentence(done[-1]), done[-1])
        finally:
            if report.as_json:
                report.done("", done)


def _snapshots_of(client: Client, volume: str) -> list[str]:
    """The oldest first."""
    listed = [each for each in client.call("volume-list") if each["kind"] == "snapshot" and each["parent"] == volume]
    return [each["name"] for each in sorted(listed, key=lambda each: each["created"])]


def _move_sentence(done: Mapping[str, Any]) -> str:
    if done["was_there"]:
        return f"{done['name']} is in backend {done['target']} already"
    return f"moved {done['name']} from {done['origin']} to {done['target']}, stored {format_size(done['added'])}"


@click.command("volume-lock")
@click.argument("name")
@report_options
@pass_instance
def volume_lock(instance: Instance, name: str, report: Report) -> None:
    """Lock a volume for this node.

    Nobody else writes to it until `volume-unlock`, whatever becomes of this node."""
    with instance.connect() as client:
        lock = client.call("volume-lock", name=name)
    report.done(f"locked {name} for {lock['host']}", {"name": name, **lock})


@click.command("volume-unlock")
@click.argument("name")
@click.option("-f", "--force", is_flag=True, help="Break the lock of another node, which then writes no more.")
@report_options
@pass_instance
def volume_unlock(instance: Instance, name: str, force: bool, report: Report) -> None:
    """Give back the lock that `volume-lock` took."""
    with instance.connect() as client:
        answer = client.call("volume-unlock", name=name, force=force)
    report.done(f"unlocked {name}", answer)


@click.command("volume-open")
@click.argument("name")
@report_options
@pass_instance
def volume_open(instance: Instance, name: str, report: Report) -> None:
    """Open a volume on this node.

    No other node can write to it until `volume-close`."""
    with instance.connect() as client:
        lock = client.call("volume-open", name=name)
    report.done(f"opened {name} on {lock['host']}", {"name": name, **lock})


@click.command("volume-close")
@click.argument("name")
@report_options
@pass_instance
def volume_close(instance: Instance, name: str, report: Report) -> None:
    """Close a volume that `volume-open` opened."""
    with instance.connect() as client:
        answer = client.call("volume-close", name=name)
    report.done(f"closed {name}", answer)


COMMANDS = (
    volume_list,
    volume_info,
    volume_create,
    volume_clone,
    volume_snapshot,
    volume_remove,
    volume_rename,
    volume_resize,
    volume_rollback,
    volume_seal,
    volume_import,
    volume_move,
    volume_open,
    volume_close,
    volume_lock,
    volume_unlock,
)
