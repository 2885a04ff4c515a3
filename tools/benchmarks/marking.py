"""``tools/bench marking``: how long garbage collection takes to mark what maps lead to, and in how much memory.

The map is made up: regions full of chunks that occur once, each page as a seal would store it, in a store of its own.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.processes import Memory, Servers
from benchmarks.report import MIB, load_now, markdown_table, report

if TYPE_CHECKING:
    from archipfs.map.chunks import ChunkStore
    from archipfs.types import Digest

EXTENT_SECTORS = 8
EXTENTS_A_REGION = 128


@contextmanager
def chunk_store(directory: Path) -> Iterator["ChunkStore"]:
    # Imported where it is needed: of the package's environment, which other benchmarks do without.
    from archipfs.blockers.file import FileBlocker
    from archipfs.map.cache import Cache
    from archipfs.map.chunks import ChunkStore
    from archipfs.map.hashes import content_hash

    with Cache(directory / "cache") as cache:
        yield ChunkStore(FileBlocker.create(str(directory / "store")), cache, content_hash("blake3"), node="0" * 32)


def make_map(directory: Path, extents: int) -> "Digest":
    """A map of so many extents; the digest of its root."""
    from archipfs.map.pages import Extent, encode_leaf
    from archipfs.map.tree import updated
    from archipfs.types import Digest

    with chunk_store(directory) as store, store.session() as session:
        size = store.hash.digest_bytes
        leaves = {}
        for region in range(-(-extents // EXTENTS_A_REGION)):
            digests = os.urandom(EXTENTS_A_REGION * size)
            page = encode_leaf(
                [
                    Extent(at * EXTENT_SECTORS, EXTENT_SECTORS, Digest(digests[at * size : (at + 1) * size]), 0)
                    for at in range(EXTENTS_A_REGION)
                ],
                size,
            )
            leaves[region] = session.add_page(page)
        root = updated(store.page, session.add_page, None, leaves, size)
        session.flush()
        return root


@dataclass(frozen=True)
class Marked:
    seconds: float
    digests: int
    own_bytes: int
    """Memory of its own that the process had at most, without what it had before."""
    peak_bytes: int
    """Resident in all: with the pages of LMDB that it has mapped, which the kernel may take back."""


def mark(directory: str, root: "Digest") -> Marked:
    """In a process of its own."""
    from archipfs.map.marking import Marking
    from archipfs.types import LayerId

    before = own_bytes()
    with chunk_store(Path(directory)) as store, watching(own_bytes) as most:
        started = time.monotonic()
        marking = Marking(store.page)
        marking.mark(root, LayerId("0" * 32), lambda: None)
        digests = len(marking.marks)
        seconds = time.monotonic() - started
    return Marked(seconds, digests, most[0] - before, Servers((os.getpid(),)).peak_bytes())


def own_bytes() -> int:
    return Memory.of(os.getpid()).anonymous


@contextmanager
def watching(value: Callable[[], int]) -> Iterator[list[int]]:
    """The most that the value was in the block, looked at a hundred times a second."""
    most, ended = [value()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], value())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def bench_marking(options: argparse.Namespace) -> None:
    load = load_now()
    rows = []
    with tempfile.TemporaryDirectory(prefix="archipfs-bench-", dir=options.directory) as directory:
        root = make_map(Path(directory), options.extents)
        print("the map is made", file=sys.stderr)
        for what in ("pages from packs", "pages from LMDB"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                marked = pool.apply(mark, (directory, root))
            cells = [f"{marked.digests:,}", f"{marked.seconds:.1f}", f"{marked.own_bytes / MIB:.0f}"]
            rows.append([what, *cells, f"{marked.own_bytes / marked.digests:.0f}", f"{marked.peak_bytes / MIB:.0f}"])
        head = ["marking", "marked", "s", "memory it took at most, MiB", "bytes a mark", "RSS with LMDB's pages, MiB"]
        report(f"marking {options.extents:,} extents", markdown_table(head, rows), load=load, record=options.record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--extents", type=int, default=10_000_000)
    parser.set_defaults(action=bench_marking)
