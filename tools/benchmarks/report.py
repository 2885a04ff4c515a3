"""Tables, and the page that they are added to."""

import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULTS = REPOSITORY / "docs" / "benchmarks.md"

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = (
        [cell.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)] for cell, *rest in lines
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def median(values: Iterable[float], form: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    return format(statistics.median(known), form) if known else "failed"


def ratio(value: float, base: float) -> float:
    return value / base if base else math.nan


def spread(values: list[float]) -> list[str]:
    return [f"{statistics.median(values):.2f}", f"{max(values):.2f}"]


def machine() -> str:
    revision = subprocess.run(
        ["git", "-C", REPOSITORY, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    version = revision.stdout.strip() or "unknown"
    return f"kernel {platform.release()}, {os.cpu_count()} CPUs, {memory_gib:.0f} GiB, archipfs {version}"


def load_now() -> str:
    """Read before a run: after it, the load is our own."""
    return f"load average {os.getloadavg()[0]:.1f} before"


def report(title: str, body: str, *, load: str, record: bool) -> None:
    """Print it, and add it at the end of the page of results."""
    command = shlex.join(["tools/bench", *sys.argv[1:]])
    text = f"### {time.strftime('%Y-%m-%d %H:%M')}: {title}\n\n{machine()}, {load}; `{command}`\n\n{body}\n"
    print(f"\n{text}")
    if record:
        with RESULTS.open("a") as page:
            page.write(f"\n{text}")
