"""``tools/bench dedup``: what three Debian images built apart take, cut in one way and another, and in other stores."""

import argparse
import sys
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.backups import PACKAGES, TIMEOUT_S, Borg, Repository, Restic, disk_bytes
from benchmarks.images import Built, debian_images
from benchmarks.processes import CannotRun, install, run
from benchmarks.report import MIB, load_now, markdown_table, report
from benchmarks.targets import Bench

BORG_TUNED = "12,20,15,4095"
"""Chunks of 4 KiB to 1 MiB, 32 KiB on average, by a window of 4095 bytes."""


# Other stores


@dataclass(frozen=True)
class Taken:
    stored_bytes: int
    pieces: int


def others(directory: Path, images: list[Built]) -> tuple[dict[str, Taken], list[str]]:
    """What they took, and who is missing."""
    stores: dict[str, AbstractContextManager[Repository]] = {
        "borg, as it comes": Borg.made(directory),
        f"borg, --chunker-params {BORG_TUNED}": Borg.made(directory, f"--chunker-params={BORG_TUNED}"),
        "restic": Restic.made(directory),
    }
    taken, missing = {}, []
    for name, made in stores.items():
        try:
            with made as repository:
                for image in images:
                    repository.backup(image.path)
                taken[name] = Taken(repository.stored_bytes(), repository.pieces())
        except CannotRun as error:
            missing.append(f"- {name} did not run: {error}")
        print(f"stored in {name}", file=sys.stderr)
    return taken, missing


def in_archipfs(bench: Bench, images: list[Built]) -> int:
    """Bytes of a real store after all were imported: chunks, map pages, and the packs' own indexes."""
    archipfs = bench.archipfs
    for image in images:
        name = image.path.stem
        command = (archipfs.command, "--root", archipfs.root, "volume-import", image.path, "--name", name)
        run(*command, timeout_s=TIMEOUT_S)
    return disk_bytes(archipfs.packs)


# The table


def bench_dedup(options: argparse.Namespace) -> None:
    from benchmarks.cutting import Stored  # of the package's environment, which other benchmarks do without

    load = load_now()
    if options.install:
        install(*PACKAGES, "debootstrap")
    images = debian_images()
    with ExitStack() as stack:
        bench = Bench(stack, options.directory, options.archip)
        stored = Stored()
        for image in images:
            stored.add_image(image.path)
            print(f"cut {image.path.name}", file=sys.stderr)
        data_bytes = stored.data_bytes
        rows = [row(way, sum(sizes.values()), data_bytes, len(sizes)) for way, sizes in stored.sizes.items()]
        rows.append(row("archipfs, imported: all that its packs take", in_archipfs(bench, images), data_bytes, None))
        taken, missing = others(bench.directory, images)
        rows += [row(name, each.stored_bytes, data_bytes, each.pieces) for name, each in taken.items()]
        title = f"dedup of three Debian images, {data_bytes / MIB:,.0f} MiB not zero"
        packages = ", ".join(f"{image.path.stem} ({image.packages} packages)" for image in images)
        head = ["", "stored, MiB", "ratio", "index entries", "bytes an entry"]
        body = "\n\n".join([f"The images: {packages}.", markdown_table(head, rows), *missing])
        report(title, body, load=load, record=options.record)


def row(name: str, stored_bytes: int, data_bytes: int, pieces: int | None) -> list[str]:
    counted = ["", ""] if pieces is None else [f"{pieces:,}", f"{stored_bytes / pieces:,.0f}"]
    return [name, f"{stored_bytes / MIB:,.0f}", f"{data_bytes / stored_bytes:.2f}", *counted]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--install", action="store_true", help="install what is missing of borg, restic, debootstrap")
    parser.set_defaults(action=bench_dedup)
