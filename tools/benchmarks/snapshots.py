"""``tools/bench snapshots`` and ``stalls``: how long snapshots and clones take, and how writes fare beside them."""

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fio import GRACE_S, Job, Latency, fill, fio, running, write_some
from benchmarks.processes import CannotRun
from benchmarks.report import GIB, TIB, load_now, markdown_table, median, ratio, report, spread
from benchmarks.targets import Archipfs, Bench

SIZES = {"1 GiB": GIB, "1 TiB": TIB}

# How long they take


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def time_snapshots(
    archipfs: Archipfs, volume: Path, size_bytes: int, count: int, *, flushed: bool
) -> tuple[list[float], list[float]]:
    """Milliseconds of snapshots and of clones of them, each after fresh writes, flushed already or not."""
    snapshots, clones = [], []
    with archipfs.control() as control:
        for number in range(count):
            write_some(volume, size_bytes, 0.2)
            if flushed:
                flush(volume)
            name = f"{volume.name}-{'clean' if flushed else 'dirty'}-{number}"
            snapshots.append(1e3 * control.ask("volume-snapshot", name=volume.name, snapshot=name)["seconds"])
            clones.append(1e3 * control.ask("volume-clone", name=name, clone=f"{name}-clone")["seconds"])
    return snapshots, clones


def bench_snapshots(options: argparse.Namespace) -> None:
    load = load_now()
    rows: list[list[str]] = []
    with ExitStack() as stack:
        archipfs = Bench(stack, options.directory, options.archip).archipfs
        for label, size_bytes in SIZES.items():
            volume = archipfs.volume(f"volume-{size_bytes}", size_bytes)
            write_some(volume, size_bytes, options.seconds)
            clean, clones = time_snapshots(archipfs, volume, size_bytes, options.count, flushed=True)
            dirty, _ = time_snapshots(archipfs, volume, size_bytes, options.count, flushed=False)
            rows.append(["snapshot", label, *spread(clean)])
            rows.append(["snapshot, 0.2 s of random writes not flushed", label, *spread(dirty)])
            rows.append(["clone of a snapshot", label, *spread(clones)])
        body = markdown_table([f"of {options.count}, in ms, in the daemon", "volume", "median", "longest"], rows)
        report("snapshots and clones", body, load=load, record=options.record)


# What they do to writes

LOAD = Job("4k random write, depth 16", "randwrite", "4k", 16)
STALLS_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Round:
    quiet: Latency
    busy: Latency
    took_s: float
    snapshot_ms: list[float]


def write_beside_snapshots(
    archipfs: Archipfs, volume: Path, size_bytes: int, count: int, pause_s: float
) -> tuple[Latency, float, list[float]]:
    """Latency of the writes while ``count`` snapshots are taken, how long that took, and each one's milliseconds."""
    took: list[float] = []
    with running(volume, LOAD, size_bytes, STALLS_TIMEOUT_S) as job, archipfs.control() as control:
        time.sleep(0.5)
        start = time.monotonic()
        for number in range(count):
            if job.ended():
                job.result(GRACE_S)
                raise CannotRun(f"{count} snapshots took longer than {STALLS_TIMEOUT_S:.0f} s")
            name = f"{volume.name}-{number}"
            took.append(1e3 * control.ask("volume-snapshot", name=volume.name, snapshot=name)["seconds"])
            time.sleep(pause_s)
        seconds = time.monotonic() - start
        return job.end().writes, seconds, took


def bench_stalls(options: argparse.Namespace) -> None:
    load = load_now()
    rounds: list[Round] = []
    with ExitStack() as stack:
        bench = Bench(stack, options.directory, options.archip, GIB)
        for number in range(options.rounds):
            volume = bench.archipfs.volume(f"round-{number}", bench.size_bytes)
            fill(volume, bench.size_bytes)
            quiet = fio(volume, LOAD, bench.size_bytes, options.seconds).writes
            busy = write_beside_snapshots(bench.archipfs, volume, bench.size_bytes, options.count, options.pause)
            rounds.append(Round(quiet, *busy))
            os.unlink(volume)
        rows = [
            ["no snapshots", *middle([each.quiet for each in rounds]), ""],
            [
                f"{options.count} snapshots in {median([each.took_s for each in rounds], '.1f')} s",
                *middle([each.busy for each in rounds]),
                median([ratio(each.busy.p999, each.quiet.p999) for each in rounds], ".2f"),
            ],
        ]
        head = [f"{LOAD.name}, latency in µs", "p50", "p99", "p99.9", "longest", "p99.9 : quiet p99.9"]
        all_ms = [value for each in rounds for value in each.snapshot_ms]
        taken = f"Of a snapshot, in the daemon: median {spread(all_ms)[0]} ms, longest {spread(all_ms)[1]} ms."
        report(
            f"writes beside snapshots, 1 GiB, median of {options.rounds} rounds",
            f"{markdown_table(head, rows)}\n\n{taken}",
            load=load,
            record=options.record,
        )


def middle(latencies: list[Latency]) -> list[str]:
    """Cells: the median over the rounds of each percentile."""
    columns = zip(*((each.p50, each.p99, each.p999, each.longest) for each in latencies), strict=True)
    return [median(values, ",.0f") for values in columns]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=3, help="of random writes before anything is timed")
    parser.add_argument("--count", type=int, default=20, help="how many of each to time")
    parser.set_defaults(action=bench_snapshots)


def add_stalls_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=5, help="of the writes without snapshots")
    parser.add_argument("--count", type=int, default=100, help="how many snapshots in a round")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between a snapshot and the next")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(action=bench_stalls)
