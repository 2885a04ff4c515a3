"""``tools/bench memory`` and ``listing``: one large volume, and many small ones."""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from benchmarks.fio import write_count
from benchmarks.processes import CannotRun, Memory, run
from benchmarks.report import GIB, MIB, TIB, load_now, markdown_table, report, spread
from benchmarks.snapshots import flush
from benchmarks.targets import Archipfs, Bench

# A large volume


def time_opens(path: Path, count: int) -> list[float]:
    """Milliseconds of open(2), each after the last close had closed the volume."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        descriptor = os.open(path, os.O_RDWR)
        times.append(1e3 * (time.perf_counter() - start))
        os.close(descriptor)
        time.sleep(0.1)  # RELEASE is asynchronous
    return times


def memory_cells(memory: Memory) -> list[str]:
    values = (memory.resident, memory.proportional, memory.anonymous, memory.resident - memory.anonymous)
    return [f"{value / MIB:.0f}" for value in values]


def bench_memory(options: argparse.Namespace) -> None:
    load = load_now()
    opens: list[list[str]] = []
    with ExitStack() as stack:
        archipfs = Bench(stack, options.directory, options.archip).archipfs

        def row(what: str) -> list[str]:
            memory = archipfs.servers().memory()
            assert memory is not None
            return [what, *memory_cells(memory)]

        rows = [row("mounted")]
        small, large = archipfs.volume("small", GIB), archipfs.volume("large", TIB)
        for what, path, size_bytes in (("1 GiB", small, GIB), ("1 TiB", large, TIB)):
            descriptor = os.open(path, os.O_RDWR)
            write_count(path, size_bytes, options.writes, depth=16)
            rows.append(row(f"{what}, open, after {options.writes:,} random writes"))
            flush(path)
            rows.append(row("… flushed"))
            os.close(descriptor)
        time.sleep(1)
        rows.append(row("all closed"))
        archipfs.unmount()
        archipfs.mount()
        for what, path in (("1 GiB", small), ("1 TiB", large)):
            opens.append([f"open of {what}, in ms, {options.opens} times", *spread(time_opens(path, options.opens))])
        rows.append(row(f"mounted again, each opened {options.opens} times"))
        body = "\n\n".join(
            [
                markdown_table(["daemon, MiB", "RSS", "PSS", "of RSS: its own", "of RSS: files, live bitmaps"], rows),
                markdown_table(["from outside, as open(2) takes", "median", "longest"], opens),
            ]
        )
        report("memory and opening", body, load=load, record=options.record)


# Many volumes

MAKERS = 8


def make_volumes(archipfs: Archipfs, count: int) -> None:
    def make(first: int) -> None:
        with archipfs.control() as control:
            for number in range(first, count, MAKERS):
                control.ask("volume-create", name=f"vm-{number:06}", size=GIB)

    with ThreadPoolExecutor(MAKERS) as pool:
        for _ in pool.map(make, range(MAKERS)):
            pass


def time_command(expected_lines: int, times: int, *command: str | Path) -> list[float]:
    """Seconds, from start to end of the process. Raises ``CannotRun`` if its output is shorter."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        output = run(*command, timeout_s=120)
        taken.append(time.perf_counter() - start)
        lines = output.count("\n") + 1
        if lines < expected_lines:
            raise CannotRun(f"{command[0]} said {lines} lines where {expected_lines} were expected")
    return taken


def bench_listing(options: argparse.Namespace) -> None:
    load = load_now()
    with ExitStack() as stack:
        archipfs = Bench(stack, options.directory, options.archip).archipfs
        start = time.monotonic()
        make_volumes(archipfs, options.count)
        made_s = time.monotonic() - start
        archip = (archipfs.command, "--root", archipfs.root)
        commands: dict[str, tuple[str | Path, ...]] = {
            "ls -l": ("ls", "-l", archipfs.mountpoint),
            "archip volume-list": (*archip, "volume-list"),
            "archip volume-list --format json": (*archip, "volume-list", "--format", "json"),
        }
        rows = []
        for label, command in commands.items():
            lines = 1 if "json" in command else options.count
            rows.append([label, *spread(time_command(lines, options.times, *command))])
        body = markdown_table([f"{options.count:,} volumes, in s, {options.times} times", "median", "longest"], rows)
        made = f"Making them took {made_s:.0f} s, by {MAKERS} clients of the control socket."
        report("many volumes", f"{body}\n\n{made}", load=load, record=options.record)


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--writes", type=int, default=200_000, help="random writes of 4 KiB to each volume")
    parser.add_argument("--opens", type=int, default=20, help="how often each is opened")
    parser.set_defaults(action=bench_memory)


def add_listing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=10_000, help="how many volumes")
    parser.add_argument("--times", type=int, default=5, help="how often each listing is timed")
    parser.set_defaults(action=bench_listing)
