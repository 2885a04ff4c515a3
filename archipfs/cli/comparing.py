"""The commands that say what volumes hold, and where two of them differ."""

import click

from archipfs.cli.instance import Instance, pass_instance
from archipfs.cli.output import advancing, print_json


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


COMMANDS = (volume_hash,)
