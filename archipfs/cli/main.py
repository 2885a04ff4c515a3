"""``archip``: the group of all commands, and the global options."""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import click
from click.core import ParameterSource
from click.shell_completion import shell_complete

from archipfs.cli import backends, comparing, drivers, mounts, upkeep, volumes
from archipfs.cli.instance import Instance
from archipfs.cli.program import make_output_safe, run_program
from archipfs.daemon.logs import configure_command_logs
from archipfs.errors import InvalidInput

NAME = "archip"
COMPLETE_VARIABLE = "_ARCHIP_COMPLETE"

EPILOG = """\
\b
Examples:
  archip backend-create default --driver file --path /var/lib/archipfs/store
  archip mount /mnt/archip
  archip volume-create --name vm1 --size 20G
  archip volume-snapshot vm1@monday
  archip volume-clone vm1@monday --name vm2
  archip volume-rollback vm1@monday
  archip volume-list -H -p -o name,size
  archip --root ~/try mount ~/mnt

\b
`archip volume list` means `archip volume-list`, and so for every command.
Completion in bash: eval "$(_ARCHIP_COMPLETE=bash_source archip)"; zsh and fish
likewise, with zsh_source and fish_source.
"""


class Archip(click.Group):
    """All commands. ``volume list`` finds ``volume-list``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        joined = "-".join(args[:2])
        if args[0] not in self.commands and joined in self.commands:
            args = [joined, *args[2:]]
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise InvalidInput(self._no_such_command(args))
        return super().resolve_command(ctx, args)

    def _no_such_command(self, args: Sequence[str]) -> str:
        following = sorted(name.removeprefix(args[0] + "-") for name in self.commands if name.startswith(args[0] + "-"))
        if following:
            return f"{NAME} {args[0]} needs one of {', '.join(following)} behind it; see {NAME} --help"
        close = get_close_matches(args[0], self.commands, 1)
        meant = f"did you mean {close[0]}" if close else f"see {NAME} --help"
        return f"no such command {args[0]!r}; {meant}"


def _version() -> str:
    try:
        return version("archipfs")
    except PackageNotFoundError:
        return "(not installed)"


@click.group(cls=Archip, epilog=EPILOG, no_args_is_help=False)
@click.option(
    "--root",
    envvar="ARCHIPFS_ROOT",
    metavar="DIR",
    help="Keep everything under this directory: a private instance. Also by ARCHIPFS_ROOT.",
)
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    help="The configuration; /etc/archipfs/archipfs.toml if not given.",
)
@click.version_option(_version(), prog_name=NAME, message="%(prog)s %(version)s")
@click.pass_context
def archip(ctx: click.Context, root: str | None, config_path: str | None) -> None:
    """Volumes for virtual machines: constant-time snapshots and clones, over any object store."""
    if root is not None and config_path is not None:
        if ctx.get_parameter_source("root") is ParameterSource.COMMANDLINE:
            raise InvalidInput("--root and --config exclude each other; give one of them")
        root = None
    for option, value in (("--root", root), ("--config", config_path)):
        if value == "":
            raise InvalidInput(f"{option} is empty; give a path")
    ctx.obj = Instance(Path(root) if root else None, Path(config_path) if config_path else None)


for _command in (
    *volumes.COMMANDS,
    *comparing.COMMANDS,
    *backends.COMMANDS,
    *drivers.COMMANDS,
    *mounts.COMMANDS,
    *upkeep.COMMANDS,
):
    archip.add_command(_command)


def main() -> NoReturn:
    """The console script."""
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        sys.exit(shell_complete(archip, {}, NAME, COMPLETE_VARIABLE, instruction))
    configure_command_logs()
    make_output_safe()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; the exit code."""
    return run_program(archip, NAME, arguments)


if __name__ == "__main__":
    main()
