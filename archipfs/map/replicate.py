"""Copying a map into another store whose hash is the same: what that store lacks of its pages and chunks.

A digest means the same bytes in both stores, so nothing is read of what the target has already: neither what lies below
a page that its *base*, a map there, has in the same place, nor chunks that its index knows. A page alone proves nothing
about what it leads to, since garbage collection takes chunks and pages one by one: only a map that a layer's record
names is whole.

Everything is hashed as it is read, so that a damaged chunk of the origin is an error here, and never copied.

Memory: a leaf page and a chunk for each thread, and what the session keeps of the packs it is making.
"""

from collections.abc import Callable, Iterator

from archipfs.errors import ObjectDamaged
from archipfs.map.chunks import ChunkStore, Session
from archipfs.map.pages import ROOT_LEVEL, decode_leaf, decode_node
from archipfs.map.seal import in_threads
from archipfs.map.tree import Fetch
from archipfs.types import Digest

Progress = Callable[[int], None]
"""Told how many bytes more were copied, in the thread that copies. What it raises ends the copying."""


def copy_map(
    origin: ChunkStore,
    fetch: Fetch,
    session: Session,
    root: Digest,
    base: Digest | None,
    *,
    threads: int,
    progress: Progress,
) -> None:
    """Have ``session``, which is not flushed, keep all that the map of ``root`` leads to in ``origin``.

    ``base``: the root of a map in the session's store, whose pages ``fetch`` has. Raises what both stores raise; then
    nothing names what was stored.
    """

    def copy_leaf(digest: Digest) -> int:
        page = origin.page(digest)
        copied_bytes = 0
        for chunk in session.lacks(extent.digest for extent in decode_leaf(page)):
            data = origin.read(chunk)
            copied_bytes += len(data) * session.add_chunk(chunk, data)
        session.add_page(page)
        return copied_bytes

    leaves = _new_leaves(origin.page, fetch, session.add_page, root, base, ROOT_LEVEL)
    for copied_bytes in in_threads(copy_leaf, leaves, threads):
        progress(copied_bytes)


def _new_leaves(
    fetch: Fetch,
    fetch_base: Fetch,
    add_page: Callable[[bytes], Digest],
    digest: Digest,
    base: Digest | None,
    level: int,
) -> Iterator[Digest]:
    """The leaf pages below ``digest`` that the base does not have in the same place. The pages on the way are added."""
    if digest == base:
        return
    if level == 0:
        yield digest
        return
    page = fetch(digest)
    slots, in_base = _slots(digest, page, level), _slots(base, fetch_base(base), level) if base is not None else {}
    for slot, below in slots.items():
        yield from _new_leaves(fetch, fetch_base, add_page, below, in_base.get(slot), level - 1)
    add_page(page)


def _slots(digest: Digest, page: bytes, level: int) -> dict[int, Digest]:
    found, slots = decode_node(page)
    if found != level:
        raise ObjectDamaged(
            f"map page {digest.hex()} is of level {found} where one of level {level} belongs; run `archip check`"
        )
    return {slot.slot: slot.digest for slot in slots}
