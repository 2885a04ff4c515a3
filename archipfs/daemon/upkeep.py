"""The upkeep of one backend: garbage, damage, accounts of space. What it takes is opened when it is first needed: a
store in which nothing was ever sealed has none of it. That goes for numpy too, which takes longer to load than all the
rest of a command: only collecting and accounting load it.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from archipfs.compose.composer import Composer
from archipfs.compose.sealed import SealedStore
from archipfs.errors import ArchipError, Busy, ObjectDamaged, ObjectMissing
from archipfs.map.check import Finding, check_backend
from archipfs.map.chunks import PACK_KIND
from archipfs.map.mapper import Mapper
from archipfs.map.records import DamageRecord
from archipfs.map.scrub import Bookmark, Elsewhere, Progress, Repaired, Scrubbed, repair, scrub
from archipfs.map.survey import sealed_roots
from archipfs.types import Digest

if TYPE_CHECKING:
    from archipfs.map.gc import Collected, Collector
    from archipfs.map.space import Accountant, Space

log = structlog.get_logger()

Pulse = Callable[[], None]
"""Called every now and then; what it raises ends the work."""


_Contents = tuple[frozenset[Digest], frozenset[str], frozenset[str]]
"""The roots, the packs, and what has a damage record: as long as they are the same, the same is garbage."""


class Upkeep:
    """Of one backend. Thread-safe."""

    def __init__(self, mapper: Mapper, sealed: SealedStore, state_dir: Path) -> None:
        self.mapper = mapper
        self._sealed = sealed
        self._bookmark = Bookmark(state_dir / "scrub" / f"{mapper.store.id}.json", mapper.store.id)
        self._scrubbing = threading.Lock()
        self._opening = threading.Lock()
        self._settled: _Contents | None = None
        """What the store had when a collection last found nothing to do."""
        self._collector: Collector | None = None
        self._accountant: Accountant | None = None

    def _the_collector(self) -> "Collector":
        from archipfs.map.gc import Collector

        with self._opening:
            if self._collector is None:
                chunks, mapper = self._sealed.chunks, self.mapper
                self._collector = Collector(mapper.catalog, mapper.blocker, chunks, mapper.node.id, self._sealed.forget)
            return self._collector

    def _the_accountant(self) -> "Accountant":
        from archipfs.map.space import Accountant

        with self._opening:
            if self._accountant is None:
                self._accountant = Accountant(self._sealed.chunks)
            return self._accountant

    def has_sealed(self) -> bool:
        """Whether there are packs, or should be."""
        return self._sealed.has_packs() or bool(sealed_roots(self.mapper.catalog))

    def check(self, pulse: Pulse) -> list[Finding]:
        return check_backend(self.mapper, self._sealed.chunks if self.has_sealed() else None, pulse)

    def collect(self, pulse: Pulse, *, dry_run: bool = False) -> "Collected | None":
        """``None`` where nothing was ever sealed."""
        return self._the_collector().collect(dry_run=dry_run, pulse=pulse) if self.has_sealed() else None

    def collect_if_changed(self, pulse: Pulse) -> "Collected | None":
        """As ``collect``; ``None`` also where nothing was sealed or removed since that last found nothing to do."""
        contents = self._contents()
        if contents == self._settled:
            return None
        done = self.collect(pulse)
        if done is not None and not (done.packs or done.needed_again or done.kept):
            self._settled = contents
        return done

    def _contents(self) -> _Contents:
        roots = frozenset(sealed_roots(self.mapper.catalog).values())
        packs = frozenset(self.mapper.blocker.list(PACK_KIND))
        return roots, packs, frozenset(self.mapper.catalog.idents(DamageRecord))

    def scrub(self, bytes_per_second: int | None, progress: Progress) -> Scrubbed | None:
        """``None`` where nothing was ever sealed. Raises ``Busy`` if a scrub is under way."""
        if not self.has_sealed():
            return None
        if not self._scrubbing.acquire(blocking=False):
            raise Busy(f"backend {self.mapper.backend} is being scrubbed already; wait until that is done")
        try:
            chunks = self._sealed.chunks
            return scrub(
                self.mapper.catalog, chunks, self._bookmark, bytes_per_second=bytes_per_second, progress=progress
            )
        finally:
            self._sealed.forget(())  # readers are to see what is known to be damaged now
            self._scrubbing.release()

    def repair(self, others: Sequence["Upkeep"], mask_bits: int, progress: Progress) -> Repaired:
        """Look for what is lost in all backends, and do without the damaged packs then."""
        elsewhere = [other.as_source() for other in (self, *others)]
        done = repair(self.mapper.catalog, self._sealed.chunks, elsewhere, mask_bits, progress)
        self._sealed.forget(())
        # Under way already, the damaged packs go with the next one; with pages lost, nothing does, and `check` says so.
        with suppress(Busy, ObjectMissing, ObjectDamaged):
            self._the_collector().collect(unreadable=True, pulse=lambda: progress(0, 0))
        return done

    def as_source(self) -> Elsewhere:
        """Where a repair may look."""
        chunks = self._sealed.chunks if self.has_sealed() else None
        return Elsewhere(self.mapper.backend, self.mapper.blocker, chunks)

    def space(self) -> "Space":
        from archipfs.map.space import Space

        return Space(self.mapper.catalog, self.mapper.blocker, self._the_accountant)


def collect_in_background(composer: Composer, upkeeps: Sequence[Upkeep]) -> None:
    """Collect the garbage of all backends, in a thread of trio's; ends early when the task that waits is cancelled."""
    composer.reclaim()
    for upkeep in upkeeps:
        backend = upkeep.mapper.backend
        try:
            done = upkeep.collect_if_changed(trio.from_thread.check_cancelled)
        except Busy as error:
            log.info("garbage not collected, it is tried again later", backend=backend, error=str(error))
        except ArchipError as error:
            log.error("garbage not collected, it is tried again later", backend=backend, error=str(error))
        else:
            if done is not None and (done.packs or done.needed_again):
                log.info(
                    "garbage collected",
                    backend=backend,
                    packs=done.packs,
                    freed_bytes=done.freed_bytes,
                    repacked=done.repacked,
                    kept=dict(done.kept),
                )
