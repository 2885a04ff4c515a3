"""The commands on backends."""

import os
from pathlib import Path

import click

from archipfs.cli.instance import Instance, pass_instance
from archipfs.cli.output import Column, Report, View, as_size, as_time, report_options, view_options
from archipfs.config import DEFAULT_BACKEND, BackendConfig
from archipfs.daemon.client import connect_daemon
from archipfs.daemon.node import create_backend, exclusive
from archipfs.map.mapper import StoreOptions
from archipfs.units import parse_size


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


@click.command("backend-create")
@click.argument("name")
@click.option("--driver", required=True, help="What stores the bytes: file.")
@click.option("--path", type=click.Path(path_type=Path), help="Driver file: the directory that keeps the store.")
@click.option("--hash", "hash_name", help="What chunks are called by: blake3 (default), sha256 or xxh3-128.")
@click.option("--compression", help="How sealed chunks are compressed: none (default) or zstd.")
@click.option("--chunk-size", callback=_parse_size, help="How large a sealed chunk is on average; 32K if not given.")
@report_options
@pass_instance
def backend_create(
    instance: Instance,
    name: str,
    driver: str,
    path: Path | None,
    hash_name: str | None,
    compression: str | None,
    chunk_size: int | None,
    report: Report,
) -> None:
    """Make a store and configure it as a backend.

    A store that is there already is taken up as it is. Its hash, compression and chunk size never change.
    """
    config = instance.config()
    store = StoreOptions(hash_name, compression, chunk_size)
    options = {} if path is None else {"path": str(path.absolute())}
    backend = BackendConfig(name, driver, options)
    daemon = connect_daemon(config)
    if daemon is not None:
        daemon.close()
        create_backend(config, backend, store)
    else:
        with exclusive(config, holder={"pid": os.getpid()}):
            config = instance.config()
            create_backend(config, backend, store)
    place = f" in {options['path']}" if options else ""
    done = f"backend {name} is there already" if name in config.backends else f"created backend {name}"
    report.done(f"{done}: driver {driver}{place}", {"name": name, "driver": driver, **options})
    if daemon is not None and name not in config.backends:
        click.echo(f"archip: the daemon that is running uses backend {name} from the next mount on", err=True)


COMMANDS = (backend_list, backend_info, backend_create)
