"""``tools/bench marking``: how long garbage collection takes to mark what maps lead to, and in how much memory.

The map is made up: regions full of chunks that occur once, each page as a seal would store it, in a store of its own.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.processes import Servers
from benchmarks.report import MIB, load_now, markdown_table, report

if TYPE_CHECKING:
    from archipfs.map.chunks import ChunkStore

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


def make_map(directory: Path, extents: int) -> bytes:
    """A map of so many extents; the digest of its root."""
    from archipfs.map.pages import Extent, encode_leaf
    from archipfs.map.tree import updated

    with chunk_store(directory) as store, store.session() as session:
        size = store.hash.digest_bytes
        leaves = {}
        for region in range(-(-extents // EXTENTS_A_REGION)):
            digests = os.urandom(EXTENTS_A_REGION * size)
            page = encode_leaf(
                [
                    Extent(at * EXTENT_SECTORS, EXTENT_SECTORS, digests[at * size : (at + 1) * size], 0)
                    for at in range(EXTENTS_A_REGION)
                ],
                size,
            )
            leaves[region] = session.add_page(page)
        root = updated(store.page, session.add_page, None, leaves, size)
        session.flush()
        return root


def mark(directory: str, root: bytes) -> tuple[float, int, int, int]:
    """In a process of its own: seconds, how many digests were marked, and its memory before and at most, in bytes."""
    from archipfs.map.marking import Marking

    us = Servers((os.getpid(),))
    before = us.peak_bytes()
    with chunk_store(Path(directory)) as store:
        started = time.monotonic()
        marking = Marking(store.page)
        marking.mark(root, "0" * 32, lambda: None)
        marked = len(marking.marks)
        return time.monotonic() - started, marked, before, us.peak_bytes()


def bench_marking(options: argparse.Namespace) -> None:
    load = load_now()
    rows = []
    with tempfile.TemporaryDirectory(prefix="archipfs-bench-", dir=options.directory) as directory:
        root = make_map(Path(directory), options.extents)
        print("the map is made", file=sys.stderr)
        for what in ("pages from packs", "pages from LMDB"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, marked, before, peak = pool.apply(mark, (directory, root))
            cells = [f"{marked:,}", f"{seconds:.1f}", f"{before / MIB:.0f}", f"{peak / MIB:.0f}"]
            rows.append([what, *cells, f"{(peak - before) / marked:.0f}"])
        head = ["marking", "marked", "s", "memory before, MiB", "at most, MiB", "bytes a mark"]
        report(f"marking {options.extents:,} extents", markdown_table(head, rows), load=load, record=options.record)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--extents", type=int, default=10_000_000)
    parser.set_defaults(action=bench_marking)
