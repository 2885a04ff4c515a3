"""``tools/bench sealed``: reading a sealed volume beside a fresh one, warm and cold, and opening a sealed tebibyte."""

import argparse
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.fio import Job, fill, fio, write_count
from benchmarks.report import GIB, MIB, TIB, load_now, markdown_table, median, ratio, report, spread
from benchmarks.scale import time_opens
from benchmarks.targets import Archipfs, Bench

JOBS = (
    Job("4k random read, depth 1", "randread", "4k", 1),
    Job("4k random read, depth 16", "randread", "4k", 16),
    Job("1m read, depth 4", "read", "1m", 4, once=True),
)
FRESH, SEALED = "fresh", "sealed"
Rates = dict[tuple[str, str, str], list[float]]
"""By job, warm or cold, fresh or sealed: one a round."""


def evict(directory: Path) -> None:
    """Have the page cache forget every file in it that is durable and that nobody has mapped."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def become_cold(archipfs: Archipfs) -> None:
    """As after a reboot: no daemon that remembers anything, nothing in the page cache."""
    archipfs.unmount()
    evict(archipfs.root)
    archipfs.mount()


def measure(archipfs: Archipfs, volumes: dict[str, Path], size_bytes: int, seconds: float, rounds: int) -> Rates:
    rates: Rates = {}
    for count in range(rounds):
        for job in JOBS:
            for which, path in volumes.items():
                become_cold(archipfs)
                for state in ("cold", "warm"):
                    if state == "warm":
                        fio(path, Job("warm up", "read", "1m", 4, once=True), size_bytes, seconds)
                    rate = fio(path, job, size_bytes, seconds).per_second
                    rates.setdefault((job.name, state, which), []).append(rate)
                    label = f"round {count + 1}/{rounds}  {job.name:26} {state} {which:6}"
                    print(f"{label} {rate:10,.0f} {job.unit}", file=sys.stderr)
    return rates


def rate_table(rates: Rates) -> str:
    rows = []
    for state in ("warm", "cold"):
        for job in JOBS:
            fresh, sealed = (rates[job.name, state, which] for which in (FRESH, SEALED))
            cells = [median(fresh, ",.0f"), median(sealed, ",.0f"), median(map(ratio, sealed, fresh), ".2f")]
            rows.append([f"{state}: {job.name}, {job.unit}", *cells])
    return markdown_table(["job", FRESH, SEALED, f"{SEALED} : {FRESH}"], rows)


def seal(archipfs: Archipfs, volume: Path) -> float:
    """Seconds to seal all that the volume holds."""
    with archipfs.control() as control:
        started = time.monotonic()
        control.ask("volume-seal", name=volume.name, live=True)
        return time.monotonic() - started


def bench_sealed(options: argparse.Namespace) -> None:
    load = load_now()
    size_bytes = int(options.gib * GIB)
    with ExitStack() as stack:
        archipfs = Bench(stack, options.directory, options.archip).archipfs
        volumes = {which: archipfs.volume(which, size_bytes) for which in (FRESH, SEALED)}
        for path in volumes.values():
            fill(path, size_bytes)
        seal(archipfs, volumes[SEALED])
        rates = measure(archipfs, volumes, size_bytes, options.seconds, options.rounds)

        large = archipfs.volume("large", TIB)
        write_count(large, TIB, options.writes, depth=16)
        sealing_s = seal(archipfs, large)
        opens = time_opens(large, options.opens)
        memory = archipfs.servers().memory()
        assert memory is not None
        opening = markdown_table(
            [f"sealed 1 TiB after {options.writes:,} random writes", "median", "longest"],
            [[f"open, in ms, {options.opens} times", *spread(opens)]],
        )
        said = (
            f"Sealing that took {sealing_s:.0f} s; afterwards the daemon had {memory.resident / MIB:.0f} MiB resident, "
            f"{memory.anonymous / MIB:.0f} of them its own, and {archipfs.servers().peak_bytes() / MIB:.0f} at most."
        )
        title = f"reading what is sealed, {options.gib:g} GiB, median of {options.rounds} × {options.seconds:g} s"
        report(title, "\n\n".join([rate_table(rates), opening, said]), load=load, record=options.record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=2, help="of each random job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=1, help="size of each volume")
    parser.add_argument("--writes", type=int, default=50_000, help="random writes to 1 TiB before it is sealed")
    parser.add_argument("--opens", type=int, default=20, help="how often that is opened")
    parser.set_defaults(action=bench_sealed)
