"""The commands that say what volumes hold, and where two of them differ."""

import click

from archipfs.cli.instance import Instance, pass_instance
from archipfs.cli.output import Column, View, advancing, as_size, print_json, view_options
from archipfs.errors import InvalidInput
from archipfs.units import parse_size

DEFAULT_GRANULARITY = "64K"
"""What xapi has."""

RANGES = (Column("offset", right=True), Column("length", as_size, right=True))


@click.command("volume-hash")
@click.argument("name")
@click.option(
    "--json", "as_json", is_flag=True, help="As Pithos takes it: block_hash, block_size, bytes, hashes; and top_hash."
)
@pass_instance
def volume_hash(instance: Instance, name: str, as_json: bool) -> None:
    """Print the hash map of a volume, as Pithos has it.

    A line for each block of 4 MiB with its number and its SHA-256 (of what is left without the zeros at its end), then
    a line `top` with the hash of the tree over them, by which Pithos knows the volume as an image.

    A writable volume is hashed as it is at the moment when this begins, open or not: it is frozen, as for a clone.
    """
    with instance.connect() as client, advancing(f"hashing {name}") as progress:
        answer = client.follow("volume-hash", progress, name=name)
    if as_json:
        print_json(answer)
        return
    rows = [*enumerate(answer["hashes"]), ("top", answer["top_hash"])]
    width = max(len("top"), len(str(len(rows) - 2)))
    click.echo("\n".join(f"{which:>{width}}  {each}" for which, each in rows))


@click.command("volume-diff")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--bitmap", "as_bitmap", is_flag=True, help="A bit for each block instead, in base64.")
@click.option("--granularity", metavar="SIZE", help=f"The size of such a block; {DEFAULT_GRANULARITY} if not given.")
@view_options(RANGES)
@pass_instance
def volume_diff(instance: Instance, one: str, other: str, as_bitmap: bool, granularity: str | None, view: View) -> None:
    """List the ranges in which two volumes differ.

    They may be related or not, volumes or snapshots, of one backend or of two.

    Offset and length are multiples of 4 KiB, but for a length that ends with the larger volume; what lies beyond the
    end of the smaller one counts as zeros. The bitmap is as xapi's VDI.list_changed_blocks has it: the first block is
    the highest bit of the first byte.

    What both have from the same snapshot is not looked at, and what is sealed is compared by its hashes. A volume that
    is being written is compared with each sector as it is at some moment of the comparison.

    `archip volume-diff vm1@monday vm1` says what was changed since Monday.
    """
    if granularity is not None and not as_bitmap:
        raise InvalidInput("--granularity is that of the bitmap; give --bitmap too")
    block_bytes = parse_size(granularity or DEFAULT_GRANULARITY) if as_bitmap else None
    with instance.connect() as client, advancing(f"comparing {one} and {other}") as progress:
        answer = client.follow("volume-diff", progress, one=one, other=other, granularity=block_bytes)
    if not as_bitmap:
        view.table([{"offset": offset, "length": length} for offset, length in answer["ranges"]])
    elif view.as_json:
        print_json(answer)
    else:
        click.echo(answer["bitmap"])


COMMANDS = (volume_hash, volume_diff)
