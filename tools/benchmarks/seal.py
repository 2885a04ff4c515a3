"""``tools/bench seal``: how fast data is sealed, beside what copies and backs it up, and what a second seal costs.

The data is that of a Debian image, without its holes. Each round begins with empty stores and has all of it in the page
cache; what is timed ends when all is on the disk.
"""

import argparse
import os
import random
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
class SecondSeal:
    """Of what has been sealed before, after some of its sectors were written anew."""

    seconds: float
    changed_bytes: int
    grown_bytes: int


@dataclass(frozen=True)
class Round:
    seconds: dict[str, float]
    """Of each who stores the data."""
    second: SecondSeal
    peak_bytes: int
    """The most memory that the daemon had resident in all of it."""


def timed(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


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


def copy(source: Path, directory: Path) -> float:
    target = directory / "copy"

    def act() -> None:
        run("cp", source, target, timeout_s=TIMEOUT_S)
        sync(target)

    try:
        return timed(act)
    finally:
        target.unlink(missing_ok=True)


def back_up_with_borg(source: Path, directory: Path) -> float:
    with Borg.made(directory) as repository:
        return timed(lambda: repository.backup(source))


def back_up_with_restic(source: Path, directory: Path) -> float:
    with Restic.made(directory) as repository:
        return timed(lambda: repository.backup(source))


PEERS: dict[str, Callable[[Path, Path], float]] = {
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


def seal(archipfs: Archipfs, volume: Path, snapshot: str) -> float:
    """Take a snapshot, and time its sealing as a user has it."""
    archipfs.snapshot(volume, snapshot)
    return timed(lambda: run(archipfs.command, "--root", archipfs.root, "volume-seal", snapshot, timeout_s=TIMEOUT_S))


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


def seal_twice(command: str, source: Path, directory: Path, share: float, seed: int) -> tuple[float, SecondSeal, int]:
    """Seconds of the first, the second, and the daemon's peak of memory."""
    with fresh_archipfs(command, directory) as archipfs:
        volume = archipfs.volume("volume", source.stat().st_size)
        run("cp", source, volume, timeout_s=TIMEOUT_S)
        sync(volume)
        first_s = seal(archipfs, volume, "first")
        changed_bytes, before = change_some(volume, share, seed), stored(archipfs)
        second_s = seal(archipfs, volume, "second")
        second = SecondSeal(second_s, changed_bytes, stored(archipfs) - before)
        return first_s, second, archipfs.servers().peak_bytes()


def take_round(options: argparse.Namespace, source: Path, directory: Path, seed: int, missing: set[str]) -> Round:
    first_s, second, peak_bytes = seal_twice(options.archip, source, directory, options.share, seed)
    seconds = {OURS: first_s}
    for name, peer in PEERS.items():
        try:
            seconds[name] = peer(source, directory)
        except CannotRun as error:
            missing.add(f"- {name} did not run: {error}")
    for name, taken in seconds.items():
        print(f"{name}: {taken:.2f} s", file=sys.stderr)
    print(f"second seal: {second.seconds:.2f} s", file=sys.stderr)
    return Round(seconds, second, peak_bytes)


def speed_table(rounds: list[Round], size_bytes: int) -> str:
    rows = []
    for name in (OURS, *PEERS):
        taken = [each.seconds[name] for each in rounds if name in each.seconds]
        speeds = [size_bytes / MIB / seconds for seconds in taken]
        ratios = [each.seconds[name] / each.seconds[OURS] for each in rounds if name in each.seconds]
        rows.append([name, median(taken, ".2f"), median(speeds, ",.0f"), median(ratios, ".2f")])
    return markdown_table(["", "s", "MiB/s", f"speed of {OURS} : this"], rows)


def second_table(rounds: list[Round], share: float) -> str:
    seconds = [each.second.seconds for each in rounds]
    changed = [each.second.changed_bytes / MIB for each in rounds]
    grown = [each.second.grown_bytes / MIB for each in rounds]
    cells = [
        median(seconds, ".2f"),
        median([ratio(each.second.seconds, each.seconds[OURS]) for each in rounds], ".1%"),
        median(changed, ",.1f"),
        median(grown, ",.1f"),
        median(map(ratio, grown, changed), ".2f"),
    ]
    head = [f"second seal, {share:.0%} of the sectors written anew", "s", "of the first's time"]
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
        rounds = [take_round(options, source, directory, seed, missing) for seed in range(options.rounds)]
        title = f"sealing {size_bytes / MIB:,.0f} MiB, median of {options.rounds} rounds"
        memory = max(each.peak_bytes for each in rounds) / MIB
        peak = f"The daemon's memory peaked at {memory:.0f} MiB resident, with both seals done."
        tables = [speed_table(rounds, size_bytes), second_table(rounds, options.share)]
        report(title, "\n\n".join([*tables, peak, *sorted(missing)]), load=load, record=options.record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=1, help="how much data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.01, help="of the sectors that change before the second seal")
    parser.add_argument("--install", action="store_true", help="install what is missing of borg, restic, debootstrap")
    parser.set_defaults(action=bench_seal)
