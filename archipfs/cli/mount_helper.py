"""``mount.fuse.archipfs``: what mount(8) runs for ``mount -t fuse.archipfs archipfs /mnt/archip`` and for fstab lines.

mount(8) calls it as ``mount.fuse.archipfs SOURCE DIRECTORY [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]``. The source
says nothing here: what to mount is the machine's configuration, or the one that ``root=`` or ``config=`` names.
"""

import getopt
import sys
from collections.abc import Sequence
from typing import NoReturn

from archipfs.cli.main import run
from archipfs.daemon.logs import configure_command_logs
from archipfs.errors import USAGE_EXIT_CODE

USAGE = "usage: mount.fuse.archipfs SOURCE DIRECTORY [-o OPTIONS]; mount(8) calls it, see `archip mount --help`"


def translate(arguments: Sequence[str]) -> list[str] | None:
    """The arguments of ``archip`` that mean the same; none if there is nothing to do. Raises ``ValueError``."""
    try:
        options, places = getopt.gnu_getopt(list(arguments), "sfnvN:t:o:")
    except getopt.GetoptError as error:
        raise ValueError(f"{error}; {USAGE}") from error
    if len(places) != 2:
        raise ValueError(USAGE)
    if ("-f", "") in options:
        return None  # a dry run, as mount(8) has it
    wanted = [part for name, value in options if name == "-o" for part in ("-o", value)]
    return ["mount", *wanted, "--", places[1]]


def main() -> NoReturn:
    """The console script."""
    configure_command_logs()
    try:
        arguments = translate(sys.argv[1:])
    except ValueError as error:
        print(f"mount.fuse.archipfs: {error}", file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    sys.exit(run(arguments) if arguments is not None else 0)
