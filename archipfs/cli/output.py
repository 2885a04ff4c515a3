"""What a command prints: listings, details and one-line reports, for people, for scripts and as JSON.

A column knows how its value looks to people and, with ``-p``, exactly. JSON passes the answers on as they are: sizes
are integer bytes, times seconds since the epoch.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

import click
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from archipfs.errors import InvalidInput
from archipfs.units import format_size

Row = Mapping[str, Any]
F = TypeVar("F", bound=Callable[..., Any])

NOTHING = "-"
"""Stands where a value is absent."""


def printable(text: str) -> str:
    """``text`` on one line, harmless to a terminal: what does not print is escaped, as in ``a\\x1bb``."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


# How values look. The second argument is whether -p asked for exact numbers.


def as_text(value: Any, exact: bool) -> str:
    return printable(str(value))


def as_size(value: int, exact: bool) -> str:
    return str(value) if exact else format_size(value)


def as_time(value: float, exact: bool) -> str:
    return datetime.fromtimestamp(value).astimezone().isoformat(timespec="seconds")


def as_duration(value: float, exact: bool) -> str:
    return str(int(value)) if exact else str(timedelta(seconds=int(value)))


def as_yes(value: bool, exact: bool) -> str:
    return "yes" if value else "no"


def as_names(value: Sequence[str], exact: bool) -> str:
    return printable(", ".join(value)) or NOTHING


@dataclass(frozen=True, slots=True)
class Column:
    """One value of an answer, by its key there."""

    name: str
    look: Callable[[Any, bool], str] = as_text
    right: bool = False
    """Numbers stand to the right."""
    always: bool = True
    """Shown when ``-o`` does not say what to show."""

    def cell(self, row: Row, exact: bool) -> str:
        value = row.get(self.name)
        return NOTHING if value is None else self.look(value, exact)


@dataclass(frozen=True, slots=True)
class View:
    """How a listing is to be shown."""

    columns: Sequence[Column]
    """All there are."""
    selected: Sequence[Column] | None = None
    """Those that ``-o`` named."""
    as_json: bool = False
    header: bool = True
    exact: bool = False

    def table(self, rows: Sequence[Row]) -> None:
        """A line for each row under a header; as JSON a list."""
        if self.as_json:
            print_json([self._json(row) for row in rows])
            return
        columns = self._shown()
        cells = [[column.cell(row, self.exact) for column in columns] for row in rows]
        if not self.header:
            _print_lines(["\t".join(row) for row in cells])
            return
        cells.insert(0, [column.name.upper() for column in columns])
        _print_aligned(cells, [column.right for column in columns])

    def details(self, rows: Sequence[Row]) -> None:
        """A block of ``key  value`` lines for each row; without header one line for each; as JSON a list."""
        if self.as_json or not self.header:
            self.table(rows)
            return
        columns = self._shown()
        for number, row in enumerate(rows):
            if number:
                click.echo()
            _print_aligned([[column.name, column.cell(row, self.exact)] for column in columns], [False, False])

    def item(self, row: Row) -> None:
        """As ``details`` for one row; as JSON one object."""
        if self.as_json:
            print_json(self._json(row))
        else:
            self.details([row])

    def _shown(self) -> Sequence[Column]:
        if self.selected is not None:
            return self.selected
        return [column for column in self.columns if column.always]

    def _json(self, row: Row) -> Row:
        if self.selected is None:
            return row
        return {column.name: row.get(column.name) for column in self.selected}


@dataclass(frozen=True, slots=True)
class Report:
    """How a command that makes or changes something says so."""

    as_json: bool
    quiet: bool

    def done(self, sentence: str, answer: Row | Sequence[Row]) -> None:
        """One plain line, or the whole answer as JSON."""
        if self.quiet:
            return
        if self.as_json:
            print_json(answer)
        else:
            click.echo(printable(sentence))


def view_options(columns: Sequence[Column]) -> Callable[[F], F]:
    """The options of every listing; the command gets them as ``view``."""
    names = ", ".join(column.name for column in columns)

    def decorate(function: F) -> F:
        @_format_option
        @click.option("-H", "no_header", is_flag=True, help="For scripts: no header, values separated by one tab.")
        @click.option("-p", "exact", is_flag=True, help="Exact numbers: sizes in bytes.")
        @click.option("-o", "wanted", metavar="COLUMNS", help=f"Only these, separated by commas: {names}.")
        @functools.wraps(function)
        def command(
            *args: Any, output_format: str, no_header: bool, exact: bool, wanted: str | None, **kwargs: Any
        ) -> Any:
            selected = None if wanted is None else _select(columns, wanted)
            view = View(columns, selected, output_format == "json", not no_header, exact)
            return function(*args, view=view, **kwargs)

        return command  # type: ignore[return-value]

    return decorate


def report_options(function: F) -> F:
    """The options of every command that makes or changes something; the command gets them as ``report``."""

    @_format_option
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing when it is done.")
    @functools.wraps(function)
    def command(*args: Any, output_format: str, quiet: bool, **kwargs: Any) -> Any:
        return function(*args, report=Report(output_format == "json", quiet), **kwargs)

    return command  # type: ignore[return-value]


_format_option = click.option(
    "--format",
    "output_format",
    type=click.Choice(["plain", "json"]),
    default="plain",
    show_default=True,
    help="For people, or JSON with sizes in bytes and times in seconds since 1970.",
)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Show on a terminal that something long is under way."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(doing):
        yield


@contextmanager
def advancing(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal how far something long is: call what this yields with bytes done and bytes in total."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(printable(doing)), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _select(columns: Sequence[Column], wanted: str) -> list[Column]:
    by_name = {column.name: column for column in columns}
    selected = []
    for name in wanted.lower().split(","):
        column = by_name.get(name.strip())
        if column is None:
            raise InvalidInput(f"no column {name.strip()!r}; the columns are {', '.join(by_name)}")
        selected.append(column)
    return selected


def _print_aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = []
        for cell, width, to_right in zip(row, widths, right, strict=True):
            padding = " " * (width - cell_len(cell))
            padded.append(padding + cell if to_right else cell + padding)
        lines.append("  ".join(padded).rstrip())
    _print_lines(lines)


def _print_lines(lines: Sequence[str]) -> None:
    """All at once, because each ``echo`` flushes."""
    if lines:
        click.echo("\n".join(lines))
