"""The commands that keep a store sound and small: check and gc."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from archipfs.cli.instance import Instance, pass_instance
from archipfs.cli.output import Column, Report, View, advancing, report_options, view_options, working
from archipfs.errors import InvalidInput
from archipfs.units import format_size, parse_size

FINDING_COLUMNS = (Column("severity"), Column("backend"), Column("which"), Column("what"))


def _parse_rate(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


def _unheeded(done: int, total: int) -> None:
    """For commands that cannot say how far they are, and are followed so that Ctrl-C ends them."""


@click.command("check")
@click.option(
    "--data", is_flag=True, help="Also read and hash all that is sealed; goes on where it was ended last time."
)
@click.option(
    "--rate", metavar="SIZE", callback=_parse_rate, help="With --data: read so much a second at most, as 100M."
)
@click.option("--repair", is_flag=True, help="With --data: mend what is damaged where another copy is found.")
@view_options(FINDING_COLUMNS)
@click.pass_context
@pass_instance
def check(instance: Instance, ctx: click.Context, data: bool, rate: int | None, repair: bool, view: View) -> None:
    """Look for damage and for what a crash left behind.

    Exit code 1 if anything is damaged. What is left behind harms nothing and goes away by itself. Changes nothing,
    except that with --data damage is written down, so that it is passed over, and with --repair is mended.
    """
    if (rate is not None or repair) and not data:
        raise InvalidInput("--rate and --repair go with --data; give that too")
    with instance.connect() as client:
        if data:
            with advancing("reading what is sealed") as progress:
                answer = client.follow("scrub", progress, rate=rate, repair=repair)
            findings: Sequence[Mapping[str, Any]] = answer["findings"]
            for done in answer["backends"]:
                click.echo(f"archip: {_scrub_sentence(done)}", err=True)
        else:
            with working("checking"):
                findings = client.follow("check", _unheeded)
    if findings or view.as_json or not view.header:
        view.table(findings)
    else:
        click.echo("no problems found")
    if any(finding["severity"] == "error" for finding in findings):
        ctx.exit(1)


def _scrub_sentence(done: Mapping[str, Any]) -> str:
    sentence = f"backend {done['backend']}: read {format_size(done['read'])} in {done['packs']} packs"
    if done["resumed"]:
        sentence += ", going on where it was ended before"
    sentence += f"; {done['damaged']} damaged"
    if "mended" in done:
        sentence += f", {done['mended']} mended, {done['lost']} without a good copy"
        if done["lost"]:
            sentence += f" (looked through {', '.join(done['tried'])})"
    return sentence


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="Say what would happen and change nothing.")
@report_options
@pass_instance
def gc(instance: Instance, dry_run: bool, report: Report) -> None:
    """Give back what removed volumes have left in the store.

    Volumes stay in use meanwhile. The daemon does it by itself every now and then; see [gc] in the configuration.
    Ctrl-C ends it, and the next one goes on.
    """
    with instance.connect() as client, working("collecting garbage"):
        done = client.follow("gc", _unheeded, dry_run=dry_run)
    sentences = [_gc_sentence(each) for each in done] or ["nothing is sealed, so there is no garbage"]
    report.done("; ".join(sentences), done)


def _gc_sentence(done: Mapping[str, Any]) -> str:
    """What was freed, or would be; and why more was not."""
    kept = ", ".join(f"{count} {why}" for why, count in done["kept"].items())
    tail = f"; kept: {kept}" if kept else ""
    if done["layers_waiting"]:
        tail += f"; {done['layers_waiting']} layers wait for a minute, since other nodes may be reading them"
    if not done["packs"]:
        return f"backend {done['backend']}: no garbage{tail}"
    verb = "would free" if done["dry_run"] else "freed"
    freed = f"{verb} {format_size(max(done['freed'], 0))} in {done['packs']} packs"
    if done["repacked"]:
        freed += f", {done['repacked']} of them after what is needed was copied"
    return f"backend {done['backend']}: {freed}{tail}"


COMMANDS = (check, gc)
