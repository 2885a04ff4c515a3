"""``tools/bench dedup``: what three Debian images built apart take, cut in one way and another, and in other stores."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.images import Built, debian_images
from benchmarks.processes import CannotRun, install, run
from benchmarks.report import MIB, load_now, markdown_table, report
from benchmarks.targets import Bench

TIMEOUT_S = 900.0
BORG_TUNED = "12,20,15,4095"
"""Chunks of 4 KiB to 1 MiB, 32 KiB on average, by a window of 4095 bytes."""


# Other stores


def disk_bytes(directory: Path) -> int:
    """What the files take, by their sizes."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Taken:
    stored_bytes: int
    pieces: int | None
    """As many as it says it has."""
    seconds: float


def borg(directory: Path, images: list[Built], *options: str) -> Taken:
    """One archive for each image."""
    repository = directory / "borg"
    environment = {
        "BORG_BASE_DIR": str(directory / "borg-home"),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
    }
    env = ("env", *(f"{name}={value}" for name, value in environment.items()))
    try:
        run(*env, "borg", "init", "--encryption=none", repository)
        started = time.monotonic()
        for image in images:
            place = f"{repository}::{image.path.stem}"
            run(*env, "borg", "create", "--compression=none", *options, place, image.path, timeout_s=TIMEOUT_S)
        seconds = time.monotonic() - started
        said = run(*env, "borg", "info", repository, timeout_s=TIMEOUT_S)
        pieces = next(line.split()[2] for line in said.splitlines() if line.startswith("Chunk index:"))
        return Taken(disk_bytes(repository / "data"), int(pieces), seconds)
    finally:
        shutil.rmtree(repository, ignore_errors=True)
        shutil.rmtree(directory / "borg-home", ignore_errors=True)


def restic(directory: Path, images: list[Built]) -> Taken:
    """Without compression, as the others; one snapshot for each image."""
    repository = directory / "restic"
    env = ("env", "RESTIC_PASSWORD=bench", f"RESTIC_CACHE_DIR={directory / 'restic-cache'}")
    call = (*env, "restic", "--quiet", "--repo", repository)
    try:
        run(*call, "init", "--repository-version=2")
        started = time.monotonic()
        for image in images:
            run(*call, "backup", "--compression=off", image.path, timeout_s=TIMEOUT_S)
        seconds = time.monotonic() - started
        blobs = run(*call, "list", "blobs", timeout_s=TIMEOUT_S).splitlines()
        return Taken(disk_bytes(repository / "data"), len(blobs), seconds)
    finally:
        shutil.rmtree(repository, ignore_errors=True)
        shutil.rmtree(directory / "restic-cache", ignore_errors=True)


def others(directory: Path, images: list[Built]) -> tuple[dict[str, Taken], list[str]]:
    """What they took, and who is missing."""
    stores: dict[str, Callable[[], Taken]] = {
        "borg, as it comes": lambda: borg(directory, images),
        f"borg, --chunker-params {BORG_TUNED}": lambda: borg(directory, images, f"--chunker-params={BORG_TUNED}"),
        "restic": lambda: restic(directory, images),
    }
    taken, missing = {}, []
    for name, store in stores.items():
        try:
            taken[name] = store()
            print(f"{name}: {taken[name].seconds:.0f} s", file=sys.stderr)
        except CannotRun as error:
            missing.append(f"- {name} did not run: {error}")
    return taken, missing


# The table


def bench_dedup(options: argparse.Namespace) -> None:
    from benchmarks.cutting import Stored  # of the package's environment, which other benchmarks do without

    load = load_now()
    if options.install:
        install("borgbackup", "restic", "debootstrap")
    images = debian_images()
    with ExitStack() as stack:
        bench = Bench(stack, options.directory, options.archip)
        stored = Stored()
        for image in images:
            stored.add_image(image.path)
            print(f"cut {image.path.name}", file=sys.stderr)
        data_bytes = stored.data_bytes
        rows = [row(way, sum(sizes.values()), data_bytes, len(sizes)) for way, sizes in stored.sizes.items()]
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
