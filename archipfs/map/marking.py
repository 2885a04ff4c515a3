"""Which chunks and pages the maps of a store lead to: the marking of garbage collection, of checks and of accounts.

A digest is marked by its first eight bytes. So two digests may be taken for one: whoever asks whether something is
needed may be told yes where no would be right, and never the other way. Maps never change, so nothing is marked twice,
and what was marked once need not be looked at again when further roots are to be marked.

Memory: 8 bytes a distinct digest, up to 32 while they are put in order, and about 150 bytes a distinct page (a page
stands for up to 4 MiB and has about a hundred digests): ten million distinct chunks take 350 MB at most.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy

from archipfs.errors import FormatTooNew, ObjectDamaged, ObjectMissing
from archipfs.map.pages import leaf_digests, level_of
from archipfs.map.tree import Fetch, Tree
from archipfs.types import Digest, LayerId

Prefixes = numpy.ndarray[Any, numpy.dtype[numpy.uint64]]
Mask = numpy.ndarray[Any, numpy.dtype[numpy.bool_]]
Places = numpy.ndarray[Any, numpy.dtype[numpy.int64]]

_BUFFERED_MIN = 1 << 20


def prefixes(digests: Iterable[bytes]) -> Prefixes:
    """The first eight bytes of each, little-endian, in order, as ``pages.leaf_digests`` has them."""
    return numpy.frombuffer(b"".join(digest[:8] for digest in digests), dtype="<u8").astype(numpy.uint64, copy=False)


class Marks:
    """A set of digest prefixes that only grows."""

    def __init__(self) -> None:
        self._sorted: Prefixes = numpy.empty(0, numpy.uint64)
        self._buffer: list[Prefixes] = []
        self._buffered = 0

    def add(self, some: Prefixes) -> None:
        self._buffer.append(some)
        self._buffered += len(some)
        # As many as there are already: so each is put in order a few times only, however many come.
        if self._buffered >= max(_BUFFERED_MIN, len(self._sorted)):
            self._settle()

    def sorted(self) -> Prefixes:
        """All of them, each once, in order; not to be changed."""
        self._settle()
        return self._sorted

    def __len__(self) -> int:
        return len(self.sorted())

    def _settle(self) -> None:
        if self._buffered:
            together = numpy.concatenate([self._sorted, *self._buffer])
            self._buffer, self._buffered = [], 0
            together.sort()
            first = numpy.empty(len(together), numpy.bool_)
            first[0] = True
            numpy.not_equal(together[1:], together[:-1], out=first[1:])
            self._sorted = together[first]


def look_up(marks: Prefixes, some: Prefixes) -> tuple[Mask, Places]:
    """Which of ``some`` are in ``marks`` (sorted), and where; the place of one that is not means nothing."""
    if not len(marks):
        return numpy.zeros(len(some), numpy.bool_), numpy.zeros(len(some), numpy.int64)
    places = numpy.minimum(numpy.searchsorted(marks, some), len(marks) - 1)
    return marks[places] == some, places


class Marking:
    """Marks what maps lead to, more with each root."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._seen: set[Digest] = set()
        self.marks = Marks()

    @property
    def pages(self) -> int:
        """How many distinct pages were read."""
        return len(self._seen)

    def mark(self, root: Digest, layer: LayerId, each_page: Callable[[], None]) -> None:
        """Mark the root page, all pages below it, and their chunks.

        Raises ``ObjectMissing``, ``ObjectDamaged`` or ``FormatTooNew`` at a page that cannot be read, naming ``layer``:
        nobody knows what it leads to.
        """
        pages: list[Digest] = []
        try:
            for digest, page in Tree(self._fetch, root).pages(self._seen):
                pages.append(digest)
                if level_of(page) == 0:
                    self.marks.add(leaf_digests(page))
                each_page()
        except (ObjectMissing, ObjectDamaged, FormatTooNew) as error:
            raise type(error)(
                f"map of layer {layer} cannot be read, so nobody knows what it needs, and nothing is deleted: {error}"
            ) from error
        finally:
            self.marks.add(prefixes(pages))
