"""``tools/bench seal``: how fast data is sealed, beside what copies and backs it up, and what a second seal costs.

The data is that of a Debian image, without its holes. Stores are empty at the beginning, all data is in the page cache,
and what is timed ends when all is on the disk.
"""

import argparse
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.backups import PACKAGES, Borg, Restic, disk_bytes
from benchmarks.images import debian_images
from benchmarks.processes import CannotRun, install, run
from benchmarks.report import GIB, MIB, load_now, markdown_table, median, ratio, report
from benchmarks.targets import Archipfs, Bench

SECTOR_BYTES = 4096
TIMEOUT_S = 900.0
PIECE_BYTES = 1 << 20
OURS = "volume-seal"


@dataclass(frozen=True)
class Time:
    seconds: float
    cpu_s: float
    """Of the processes that did it; unlike the seconds, it says little of what else the machine had to do."""


@dataclass(frozen=True)
class SecondSeal:
    """Of what has been sealed before, after some of its sectors were written anew."""

    time: Time
    changed_bytes: int
    grown_bytes: int


@dataclass(frozen=True)
class Round:
    times: dict[str, Time]
    """Of each who stores the data."""
    second: SecondSeal
    peak_bytes: int
    """The most memory that the daemon had resident in all of it."""


def timed(action: Callable[[], object], cpu: Callable[[], float]) -> Time:
    started, used = time.monotonic(), cpu()
    action()
    return Time(time.monotonic() - started, cpu() - used)


def cpu_of_children() -> float:
    """Seconds of all commands that were run and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_source(path: Path, image: Path, size_bytes: int) -> None:
    """The first ``size_bytes`` of an image that are not holes."""
    with image.open("rb") as reading, path.open("wb") as writing:
        size, end = os.fstat(reading.fileno()).st_size, 0
        while end < size and writing.tell() < size_bytes:
            start = os.lseek(reading.fileno(), end, os.SEEK_DATA)
            end = os.lseek(reading.fileno(), start, os.SEEK_HOLE)
            reading.seek(start)
            left = min(end - start, size_bytes - writing.tell())
            while left > 0:
                piece = reading.read(min(PIECE_BYTES, left))
                writing.write(piece)
                left -= len(piece)
        writing.truncate(writing.tell() // SECTOR_BYTES * SECTOR_BYTES)
        os.fsync(writing.fileno())


def sync(path: Path) -> None:
    run("sync", path, timeout_s=TIMEOUT_S)


def copy(source: Path, directory: Path) -> Time:
    target = directory / "copy"

    def act() -> None:
        run("cp", source, target, timeout_s=TIMEOUT_S)
        sync(target)

    try:
        return timed(act, cpu_of_children)
    finally:
        target.unlink(missing_ok=True)


def back_up_with_borg(source: Path, directory: Path) -> Time:
    with Borg.made(directory) as repository:
        return timed(lambda: repository.backup(source), cpu_of_children)


def back_up_with_restic(source: Path, directory: Path) -> Time:
    with Restic.made(directory) as repository:
        return timed(lambda: repository.backup(source), cpu_of_children)


PEERS: dict[str, Callable[[Path, Path], Time]] = {
    "cp": copy,
    "borg create --compression none": back_up_with_borg,
    "restic backup --compression off": back_up_with_restic,
}


@contextmanager
def fresh_archipfs(command: str, directory: Path) -> Iterator[Archipfs]:
    instance = Archipfs(command, directory / "sealing")
    try:
        instance.mount()
        yield instance
    finally:
        instance.unmount()
        shutil.rmtree(instance.root, ignore_errors=True)


def seal(archipfs: Archipfs, volume: Path, snapshot: str) -> Time:
    """Take a snapshot, and time its sealing, without the start of the command line."""
    archipfs.snapshot(volume, snapshot)
    servers = archipfs.servers()
    with archipfs.control() as control:
        return timed(lambda: control.ask("volume-seal", name=snapshot), lambda: sum(servers.cpu().values()))


def stored(archipfs: Archipfs) -> int:
    """Bytes of all packs."""
    return disk_bytes(archipfs.packs)


def change_some(volume: Path, share: float, seed: int) -> int:
    """Write a share of the sectors anew, here and there; how many bytes that were."""
    chance = random.Random(seed)
    sectors = os.path.getsize(volume) // SECTOR_BYTES
    chosen = chance.sample(range(sectors), round(sectors * share))
    descriptor = os.open(volume, os.O_WRONLY)
    try:
        for sector in chosen:
            os.pwrite(descriptor, chance.randbytes(SECTOR_BYTES), sector * SECTOR_BYTES)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return len(chosen) * SECTOR_BYTES


def seal_twice(command: str, source: Path, directory: Path, share: float, seed: int) -> tuple[Time, SecondSeal, int]:
    """The first, the second, and the daemon's peak of memory."""
    with fresh_archipfs(command, directory) as archipfs:
        volume = archipfs.volume("volume", source.stat().st_size)
        run("cp", source, volume, timeout_s=TIMEOUT_S)
        sync(volume)
        first = seal(archipfs, volume, "first")
        changed_bytes, before = change_some(volume, share, seed), stored(archipfs)
        second_time = seal(archipfs, volume, "second")
        second = SecondSeal(second_time, changed_bytes, stored(archipfs) - before)
        return first, second, archipfs.servers().peak_bytes()


def take_round(options: argparse.Namespace, source: Path, directory: Path, number: int, missing: set[str]) -> Round:
    """Everybody once, each round somebody else first: on a virtual machine, whoever is the first to touch memory that
    was free for long waits for the host."""
    names = [OURS, *PEERS]
    first = number % len(names)
    times: dict[str, Time] = {}
    for name in (*names[first:], *names[:first]):
        try:
            if name == OURS:
                times[name], second, peak_bytes = seal_twice(options.archip, source, directory, options.share, number)
                print(f"second seal: {second.time}", file=sys.stderr)
            else:
                times[name] = PEERS[name](source, directory)
        except CannotRun as error:
            if name == OURS:
                raise
            missing.add(f"- {name} did not run: {error}")
        else:
            print(f"{name}: {times[name]}", file=sys.stderr)
    return Round(times, second, peak_bytes)


def speed_table(rounds: list[Round], size_bytes: int) -> str:
    rows = []
    for name in (OURS, *PEERS):
        taken = [(each.times[name], each.times[OURS]) for each in rounds if name in each.times]
        seconds = [theirs.seconds for theirs, _ in taken]
        rows.append(
            [
                name,
                median(seconds, ".2f"),
                median([size_bytes / MIB / each for each in seconds], ",.0f"),
                median([theirs.cpu_s for theirs, _ in taken], ".2f"),
                median([ratio(theirs.seconds, ours.seconds) for theirs, ours in taken], ".2f"),
                median([ratio(theirs.cpu_s, ours.cpu_s) for theirs, ours in taken], ".2f"),
            ]
        )
    return markdown_table(["", "s", "MiB/s", "CPU, s", f"time, this : {OURS}", "CPU time, the same"], rows)


def second_table(rounds: list[Round], share: float) -> str:
    again = [each.second for each in rounds]
    first = [each.times[OURS] for each in rounds]
    changed = [each.changed_bytes / MIB for each in again]
    grown = [each.grown_bytes / MIB for each in again]
    cells = [
        median([each.time.seconds for each in again], ".2f"),
        median([ratio(each.time.seconds, of.seconds) for each, of in zip(again, first, strict=True)], ".1%"),
        median([each.time.cpu_s for each in again], ".2f"),
        median([ratio(each.time.cpu_s, of.cpu_s) for each, of in zip(again, first, strict=True)], ".1%"),
        median(changed, ",.1f"),
        median(grown, ",.1f"),
        median(map(ratio, grown, changed), ".2f"),
    ]
    head = [f"second seal, {share:.0%} of the sectors written anew", "s", "of the first's", "CPU, s", "of the first's"]
    return markdown_table([*head, "changed, MiB", "store grew, MiB", "grew : changed"], [["", *cells]])


def bench_seal(options: argparse.Namespace) -> None:
    load = load_now()
    if options.install:
        install(*PACKAGES, "debootstrap")
    with ExitStack() as stack:
        directory = Bench(stack, options.directory, options.archip).directory
        source = directory / "source"
        make_source(source, max(debian_images(), key=lambda image: image.packages).path, int(options.gib * GIB))
        size_bytes = source.stat().st_size
        missing: set[str] = set()
        rounds = [take_round(options, source, directory, number, missing) for number in range(options.rounds)]
        title = f"sealing {size_bytes / MIB:,.0f} MiB, median of {options.rounds} rounds"
        memory = max(each.peak_bytes for each in rounds) / MIB
        peak = f"The daemon's memory peaked at {memory:.0f} MiB resident, with both seals done."
        tables = [speed_table(rounds, size_bytes), second_table(rounds, options.share)]
        report(title, "\n\n".join([*tables, peak, *sorted(missing)]), load=load, record=options.record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=1, help="how much data")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.01, help="of the sectors that change before the second seal")
    parser.add_argument("--install", action="store_true", help="install what is missing of borg, restic, debootstrap")
    parser.set_defaults(action=bench_seal)
