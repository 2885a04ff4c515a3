"""The commands on backends."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from archipfs.cli.instance import Instance, pass_instance
from archipfs.cli.output import (
    Column,
    Report,
    View,
    advancing,
    as_size,
    as_time,
    printable,
    report_options,
    view_options,
)
from archipfs.config import DEFAULT_BACKEND, BackendConfig, forget_backend
from archipfs.daemon.client import connect_daemon
from archipfs.daemon.node import create_backend, exclusive, refuse_last
from archipfs.errors import ArchipError
from archipfs.map.mapper import StoreOptions
from archipfs.units import format_size, parse_size

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = {
    "path": "Driver file: the directory that keeps the store.",
    "pool": "Driver rados: the pool that keeps the store; it must be there.",
    "conf": "Driver rados: the cluster's configuration; /etc/ceph/ceph.conf if not given.",
    "user": 'Driver rados: as whom to connect, without "client."; admin if not given.',
    "keyring": "Driver rados: the file with the user's key, if it is not where the configuration says.",
    "namespace": "Driver rados: where in the pool, which several stores can share; archipfs if not given.",
    "timeout": "Driver rados: seconds until a cluster counts as unreachable; 30 if not given.",
    "operation_timeout": "Driver rados: seconds until a call that is not answered fails, 0: never; 60 if not given.",
}
"""Of drivers; which of them a driver takes is its own to say."""
PATHS = frozenset({"path", "conf", "keyring"})


def _parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


LISTED = (
    Column("name"),
    Column("driver"),
    Column("place"),
    Column("total", as_size, right=True),
    Column("available", as_size, right=True),
)

DETAILS = (
    *(Column(column.name, column.look) for column in LISTED),
    Column("volumes"),
    Column("snapshots"),
    Column("provisioned", as_size),
    Column("unsealed", as_size),
    Column("logical", as_size),
    Column("unique", as_size),
    Column("stored", as_size),
    Column("dedup_ratio"),
    Column("compression_ratio"),
    Column("reclaimable", as_size),
    Column("volume_size_max", as_size),
    Column("hash"),
    Column("compression"),
    Column("created", as_time),
    Column("store"),
)


@click.command("backend-list")
@view_options(LISTED)
@pass_instance
def backend_list(instance: Instance, view: View) -> None:
    """List the backends that are configured."""
    with instance.connect() as client:
        view.table(client.call("backend-list"))


@click.command("backend-info")
@click.argument("name", default=DEFAULT_BACKEND)
@view_options(DETAILS)
@pass_instance
def backend_info(instance: Instance, name: str, view: View) -> None:
    """Show all there is to know of a backend.

    Provisioned is how large all volumes and snapshots are, unsealed what they take that is not deduplicated yet. Of
    what is, logical is what they hold as if nothing were shared, unique that with each chunk once, stored what the
    packs take, and reclaimable what of it garbage collection can give back.
    """
    with instance.connect() as client:
        view.item(client.call("backend-info", name=name))


def _driver_options(function: F) -> F:
    """The options of all drivers; the command gets those that were given as ``options``."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in OPTIONS}
        options = {name: value for name, value in given.items() if value is not None}
        for name in PATHS & options.keys():
            options[name] = os.path.abspath(options[name])
        return function(*args, options=options, **kwargs)

    for name, text in reversed(OPTIONS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, help=text)(command)
    return command  # type: ignore[return-value]


@click.command("backend-create")
@click.argument("name")
@click.option("--driver", required=True, help="What stores the bytes: file or rados; see `archip driver-list`.")
@_driver_options
@click.option("--hash", "hash_name", help="What chunks are called by: blake3 (default), sha256 or xxh3-128.")
@click.option("--compression", help="How sealed chunks are compressed: none (default) or zstd.")
@click.option("--chunk-size", callback=_parse_size, help="How large a sealed chunk is on average; 32K if not given.")
@report_options
@pass_instance
def backend_create(
    instance: Instance,
    name: str,
    driver: str,
    options: Mapping[str, str],
    hash_name: str | None,
    compression: str | None,
    chunk_size: int | None,
    report: Report,
) -> None:
    """Make a store and configure it as a backend.

    A store that is there already is taken up as it is. Its hash, compression and chunk size never change. A daemon that
    runs uses the backend at once.
    """
    config = instance.config()
    store = StoreOptions(hash_name, compression, chunk_size)
    backend = BackendConfig(name, driver, options)
    later = None
    daemon = connect_daemon(config)
    if daemon is not None:
        with daemon:
            create_backend(config, backend, store)
            try:
                daemon.call("backend-attach", name=name)
            except ArchipError as error:
                later = str(error)
    else:
        with exclusive(config, holder={"pid": os.getpid()}):
            config = instance.config()
            create_backend(config, backend, store)
    places = [options[option] for option in ("path", "pool") if option in options]
    place = f" in {places[0]}" if places else ""
    done = f"backend {name} is there already" if name in config.backends else f"created backend {name}"
    report.done(f"{done}: driver {driver}{place}", {"name": name, "driver": driver, **options})
    if later is not None:
        click.echo(f"archip: the daemon that is running uses backend {name} from the next mount on: {later}", err=True)


@click.command("backend-remove")
@click.argument("name")
@click.option("--keep-data", is_flag=True, help="Also a backend that holds volumes, or that cannot be reached.")
@click.option("--dry-run", is_flag=True, help="Say what would happen and change nothing.")
@report_options
@pass_instance
def backend_remove(instance: Instance, name: str, keep_data: bool, dry_run: bool, report: Report) -> None:
    """Take a backend out of the configuration.

    Its store stays where it is, and backend-create takes it up again. A backend that holds volumes or snapshots is only
    forgotten with --keep-data.
    """
    config = instance.config()
    refuse_last(config, name)
    options = config.backends[name].options
    place = next((options[each] for each in ("path", "pool") if each in options), name)
    daemon = connect_daemon(config)
    if daemon is None and keep_data:
        # Without a look at the store, which may be gone.
        with exclusive(config, holder={"pid": os.getpid()}):
            config = instance.config()
            refuse_last(config, name)
            after = config if dry_run else forget_backend(config, name)
        others = [other for other in after.backends if other != name]
        default = DEFAULT_BACKEND if DEFAULT_BACKEND in others else others[0]
        answer: Mapping[str, Any] = {"name": name, "default": default, "dry_run": dry_run}
    else:
        if daemon is not None:
            daemon.close()
        with instance.connect() as client:
            answer = client.call("backend-remove", name=name, keep_data=keep_data, dry_run=dry_run)
    sentence = f"{'would remove' if dry_run else 'removed'} backend {name}; its store stays in {place}"
    if name == DEFAULT_BACKEND:
        sentence += f"; new volumes lie in {answer['default']} from now on"
    report.done(sentence, answer)


@click.command("backend-sync")
@click.option("--origin", required=True, help="The backend to copy from.")
@click.option("--target", required=True, help="The backend to copy to.")
@click.option("--rate", metavar="SIZE", callback=_parse_size, help="Copy so much a second at most, as 100M.")
@click.option("--delete", is_flag=True, help="Also remove from the target the replicas of what the origin has no more.")
@click.option("--dry-run", is_flag=True, help="Say what would happen and change nothing.")
@report_options
@click.pass_context
@pass_instance
def backend_sync(
    instance: Instance,
    ctx: click.Context,
    origin: str,
    target: str,
    rate: int | None,
    delete: bool,
    dry_run: bool,
    report: Report,
) -> None:
    """Copy to one backend what it lacks of another.

    All volumes and snapshots, as they are now; what was copied before is not copied again. The copies are replicas: no
    name leads to them as long as the origin is configured. Ctrl-C ends it, and the next one goes on. Exit code 1 if
    anything was passed over.
    """
    with instance.connect() as client, advancing(f"copying {origin} to {target}") as progress:
        wanted = {"origin": origin, "target": target, "rate": rate, "delete": delete, "dry_run": dry_run}
        done = client.follow("backend-sync", progress, **wanted)
    for each in done["passed_over"]:
        click.echo(f"archip: passed over {printable(each['name'])}: {printable(each['why'])}", err=True)
    report.done(_sync_sentence(done), done)
    if done["passed_over"]:
        ctx.exit(1)


def _sync_sentence(done: Mapping[str, Any]) -> str:
    copied, removed = done["copied"], done["removed"]
    copy, about, remove = ("would copy", "about ", "would remove") if done["dry_run"] else ("copied", "", "removed")
    sentences = []
    if copied:
        added = f"{about}{format_size(done['added'])}"
        sentences.append(f"{copy} {_count(copied)} from {done['origin']} to {done['target']}, {added} of new data")
    if removed:
        sentences.append(f"{remove} {_count(removed)} from {done['target']}")
    if sentences:
        return "; ".join(sentences)
    return "copied nothing" if done["passed_over"] else f"{done['target']} lacks nothing of {done['origin']}"


def _count(names: Sequence[str]) -> str:
    return "1 volume or snapshot" if len(names) == 1 else f"{len(names)} volumes and snapshots"


COMMANDS = (backend_list, backend_info, backend_create, backend_remove, backend_sync)
