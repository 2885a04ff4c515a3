"""Pithos' hash map of a volume, from what its engine reads. ``map/pithos.py`` has the definition."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from archipfs.compose.engine import EngineVolume
from archipfs.map.pithos import BLOCK_BYTES, HOLE, HashMap, block_count, block_hash


def hash_volume(engine: EngineVolume, progress: Callable[[int, int], None]) -> HashMap:
    """Hash what the engine shows, a block in each of as many threads as there are processors. Holes are not read.

    Nobody may write to it meanwhile. ``progress`` is told, in the caller's thread, how many bytes of the volume are
    done and how many there are; what it raises ends the hashing. Memory: two blocks (4 MiB) a thread, and 32 bytes for
    each block of the volume.
    """
    size = engine.size
    hashes = [HOLE] * block_count(size)
    threads = os.cpu_count() or 1
    under_way: deque[tuple[int, Future[bytes]]] = deque()

    def hash_block(block: int) -> bytes:
        return block_hash(engine.read(block * BLOCK_BYTES, BLOCK_BYTES))

    def finish_one() -> None:
        block, future = under_way.popleft()
        hashes[block] = future.result()
        progress(min((block + 1) * BLOCK_BYTES, size), size)

    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        try:
            for block in _blocks_with_data(engine):
                under_way.append((block, pool.submit(hash_block, block)))
                if len(under_way) > threads:
                    finish_one()
            while under_way:
                finish_one()
        finally:
            for _, future in under_way:
                future.cancel()
    return HashMap(size, hashes)


def _blocks_with_data(engine: EngineVolume) -> Iterator[int]:
    data = engine.seek_data(0)
    while data is not None:
        block = data // BLOCK_BYTES
        yield block
        data = engine.seek_data((block + 1) * BLOCK_BYTES)
