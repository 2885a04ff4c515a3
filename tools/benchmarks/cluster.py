"""``tools/bench cluster``: archipfs over RADOS beside rbd-fuse and fio's rbd engine, on a cluster of one osd.

All three have their data in one pool. The rbd engine's cache is off, as archipfs has none for what is written; rbd-fuse
has librbd's, as it comes.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fio import Job, Place, RbdImage, fill, fio
from benchmarks.processes import STOP_TIMEOUT_S, CannotRun, install, process, run, unmount_lazily, wait_until
from benchmarks.report import GIB, MIB, REPOSITORY, TIB, load_now, markdown_table, median, ratio, report
from benchmarks.targets import Archipfs

POOL = "archip"
CLUSTER_TIMEOUT_S = 120.0
BACKEND = "default"

VOLUME, SEALED, ENGINE, RBD_FUSE = "archipfs", "archipfs sealed", "rbd engine", "rbd-fuse"


@dataclass(frozen=True)
class Comparison:
    """One line of the table: the same job for one of ours and for a peer."""

    job: Job
    ours: str
    peer: str
    cold: bool = False
    """Ours with nothing in its caches: the daemon is started anew without its cache directory."""


COMPARISONS = (
    Comparison(Job("4k random write, depth 1", "randwrite", "4k", 1), VOLUME, ENGINE),
    Comparison(Job("4k random write, depth 16", "randwrite", "4k", 16), VOLUME, ENGINE),
    Comparison(Job("4k random read, depth 16", "randread", "4k", 16), VOLUME, ENGINE),
    Comparison(Job("1m write, depth 4", "write", "1m", 4), VOLUME, ENGINE),
    Comparison(Job("4k random read, depth 16, warm", "randread", "4k", 16), SEALED, RBD_FUSE),
    Comparison(Job("4k random read, depth 16, warm", "randread", "4k", 16), SEALED, ENGINE),
    Comparison(Job("1m read, depth 4, once, cold", "read", "1m", 4, once=True), SEALED, ENGINE, cold=True),
)


class Cluster:
    """A cluster of tools/ceph-dev."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.conf = directory / "ceph.conf"

    def start(self) -> None:
        self._run("up")

    def stop(self) -> None:
        self._run("down")

    def _run(self, what: str) -> None:
        run(REPOSITORY / "tools" / "ceph-dev", what, self.directory, timeout_s=CLUSTER_TIMEOUT_S)

    def image(self, name: str, size_bytes: int) -> RbdImage:
        """A new image. Its clients have no cache of their own."""
        uncached = self.directory / "uncached.conf"
        uncached.write_text(self.conf.read_text() + "\n[client]\nrbd cache = false\n")
        run("rbd", "--conf", self.conf, "create", f"{POOL}/{name}", "--size", f"{size_bytes >> 20}M")
        return RbdImage(uncached, POOL, name)

    @contextmanager
    def rbd_fuse(self, directory: Path, name: str) -> Iterator[Path]:
        """The image as a file, within the block."""
        directory.mkdir()
        try:
            with process("rbd-fuse", "-f", "-c", self.conf, "-p", POOL, directory) as child:
                wait_until((directory / name).exists, child, "rbd-fuse")
                yield directory / name
        finally:
            unmount_lazily(directory)


def instance_on(cluster: Cluster, archip: str, root: Path) -> Archipfs:
    instance = Archipfs(archip, root)
    options = ("--driver", "rados", "--pool", POOL, "--conf", str(cluster.conf))
    run(archip, "--root", root, "backend-create", BACKEND, *options, timeout_s=STOP_TIMEOUT_S)
    return instance


def become_cold(instance: Archipfs) -> None:
    """As on a node that has never seen the volume."""
    instance.unmount()
    # Not deleted: ext4 without a journal passes over inodes that went within a minute, one after the other.
    (instance.root / "state" / "cache").rename(instance.root / f"cache-{time.time_ns()}")
    instance.mount()


Rates = dict[Comparison, tuple[list[float], list[float]]]
"""Ours and the peer's, one a round."""


def measure(instance: Archipfs, places: dict[str, Place], size_bytes: int, seconds: float, rounds: int) -> Rates:
    rates: Rates = {comparison: ([], []) for comparison in COMPARISONS}
    for count in range(rounds):
        for comparison in COMPARISONS:
            for side, which in enumerate((comparison.ours, comparison.peer)):
                if comparison.cold and side == 0:
                    become_cold(instance)
                elif which == SEALED:
                    fio(places[which], Job("warm up", "read", "1m", 4, once=True), size_bytes, seconds)
                label = f"round {count + 1}/{rounds}  {comparison.job.name:32} {which:16}"
                try:
                    rate = fio(places[which], comparison.job, size_bytes, seconds).per_second
                except CannotRun as error:
                    rate = math.nan
                    print(f"{label} failed: {error}", file=sys.stderr)
                else:
                    print(f"{label} {rate:10,.0f} {comparison.job.unit}", file=sys.stderr)
                rates[comparison][side].append(rate)
    return rates


def rate_table(rates: Rates) -> str:
    rows = []
    for comparison, (ours, peers) in rates.items():
        cells = [comparison.ours, median(ours, ",.0f"), comparison.peer, median(peers, ",.0f")]
        rows.append([f"{comparison.job.name}, {comparison.job.unit}", *cells, median(map(ratio, ours, peers), ".2f")])
    return markdown_table(["job", "ours", "", "peer", "", "ours : peer"], rows)


def time_clones(instance: Archipfs, count: int) -> str:
    """Snapshots and clones of two volumes with little in them, in the daemon."""
    rows = []
    with instance.control() as control:
        for label, size_bytes in (("1 GiB", GIB), ("1 TiB", TIB)):
            volume = instance.volume(f"clone-of-{size_bytes}", size_bytes)
            fio(volume, Job("some writes", "randwrite", "4k", 16), size_bytes, 1)
            control.ask("volume-snapshot", name=volume.name, snapshot=f"{volume.name}-snapshot")
            times = [
                1e3 * control.ask("volume-clone", name=f"{volume.name}-snapshot", clone=f"{volume.name}-{n}")["seconds"]
                for n in range(count)
            ]
            rows.append([f"clone of {label}", median(times, ".1f"), f"{max(times):.1f}"])
    return markdown_table([f"of {count}, in ms, in the daemon", "median", "longest"], rows)


def seal(instance: Archipfs, volume: Path) -> float:
    with instance.control() as control:
        started = time.monotonic()
        control.ask("volume-seal", name=volume.name, live=True)
        return time.monotonic() - started


def bench_cluster(options: argparse.Namespace) -> None:
    if options.install:
        install("ceph-mon", "ceph-osd", "ceph-mgr", "ceph-common", "python3-rados", "rbd-fuse")
    load = load_now()
    size_bytes = int(options.gib * GIB)
    with ExitStack() as stack:
        directory = Path(options.directory) / f"archipfs-bench-cluster-{time.time_ns()}"
        directory.mkdir()
        stack.callback(shutil.rmtree, directory)
        cluster = Cluster(directory / "ceph")
        stack.callback(cluster.stop)
        cluster.start()
        instance = instance_on(cluster, options.archip, directory / "archipfs")
        stack.callback(instance.unmount)
        instance.mount()
        image = cluster.image("bench", size_bytes)
        places: dict[str, Place] = {
            VOLUME: instance.volume("volume", size_bytes),
            SEALED: instance.volume("sealed", size_bytes),
            ENGINE: image,
            RBD_FUSE: stack.enter_context(cluster.rbd_fuse(directory / "rbd-fuse", image.name)),
        }
        for which in (VOLUME, SEALED, ENGINE):
            fill(places[which], size_bytes)
        sealing_s = seal(instance, instance.mountpoint / "sealed")
        rates = measure(instance, places, size_bytes, options.seconds, options.rounds)
        clones = time_clones(instance, options.clones)
        memory = instance.servers().memory()
        assert memory is not None
        said = (
            f"Sealing took {sealing_s:.1f} s, {size_bytes / MIB / sealing_s:,.0f} MiB/s; in the end the daemon had "
            f"{memory.resident / MIB:.0f} MiB resident, {memory.anonymous / MIB:.0f} of them its own."
        )
        title = f"RADOS, one osd, {options.gib:g} GiB, median of {options.rounds} × {options.seconds:g} s"
        report(title, "\n\n".join([rate_table(rates), clones, said]), load=load, record=options.record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=4, help="of each job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=1, help="size of each volume")
    parser.add_argument("--clones", type=int, default=10, help="how many are made to time them")
    parser.add_argument("--install", action="store_true", help="install Ceph's packages first, those that are missing")
    parser.set_defaults(action=bench_cluster)
