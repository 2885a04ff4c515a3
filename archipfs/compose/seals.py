"""Sealing volumes: which layers, in which order, and what goes over to them; importing as sealed."""

import os
import time
from dataclasses import dataclass

import structlog

from archipfs.compose.making import Made, Making
from archipfs.compose.sealing import (
    Advance,
    Progress,
    SealedVolume,
    bytes_to_seal,
    import_layer,
    layers_to_seal,
    seal_layer,
    unheeded,
)
from archipfs.compose.volumes import Backends, Found
from archipfs.errors import ArchipError, Fenced, ObjectMissing
from archipfs.map.mapper import Attributes, Mapper
from archipfs.map.reclaim import delete_objects
from archipfs.map.records import LayerRecord, Sealed, VolumeRecord
from archipfs.map.seal import Reader
from archipfs.types import LayerId, RequestId

log = structlog.get_logger()

SEAL_THREADS = max(1, os.cpu_count() or 1)
"""That hash, when somebody waits for it."""


@dataclass(frozen=True, slots=True)
class Imported:
    """An import; one that was done when it came first has nothing to say of its bytes."""

    made: Made
    data_bytes: int
    added_bytes: int


class Seals(Making):
    def __init__(self, backends: Backends) -> None:
        super().__init__(backends)
        self.seals_waited_for = 0
        self._seals_end = False

    def seal(
        self,
        name: str,
        *,
        live: bool = False,
        threads: int = SEAL_THREADS,
        progress: Progress = unheeded,
        waited_for: bool = True,
    ) -> SealedVolume:
        """Give a snapshot's layer a map, and all below it; of a volume, what lies below its head.

        ``live``: what a volume holds now is frozen first, so that all of it is sealed. Returns when nothing is left to
        do. Raises what ``progress`` raises, and ``NotFound`` if it is removed meanwhile; what was done so far is found
        again by the next who seals it. ``waited_for``: somebody waits for it; ``seals_waited_for`` counts those.
        """
        with self._table.changed:
            self.seals_waited_for += waited_for
        try:
            return self._seal(self.find(name), live, threads, progress)
        finally:
            with self._table.changed:
                self.seals_waited_for -= waited_for

    def _seal(self, found: Found, live: bool, threads: int, progress: Progress) -> SealedVolume:
        try:
            return self._seal_found(found, live, threads, progress)
        except ObjectMissing:
            self._refuse_moved(found)  # then its layers may be gone, and nothing is wrong with the store
            raise

    def _seal_found(self, found: Found, live: bool, threads: int, progress: Progress) -> SealedVolume:
        target = self._frozen_layer(found, live)
        if target is None:
            return SealedVolume(0, 0, 0)
        advance = Advance(self._heeding_the_end(progress), bytes_to_seal(found.mapper, target))
        sealed = [
            self._seal_layer(found.mapper, layer, threads, advance)
            for layer in layers_to_seal(found.mapper.catalog, target)
        ]
        return SealedVolume(len(sealed), advance.read_bytes, sum(each.added_bytes for each in sealed))

    def import_sealed(
        self,
        name: str,
        size: int,
        reader: Reader,
        *,
        about_bytes: int,
        backend: str | None = None,
        attributes: Attributes | None = None,
        threads: int = SEAL_THREADS,
        progress: Progress = unheeded,
        request: RequestId | None = None,
    ) -> Imported:
        """A volume that holds what ``reader`` shows, which goes straight to packs: a head over a sealed layer.

        ``about_bytes``: how much there is to read. What was stored before an error is found again by the next import.
        """
        sealed: Sealed | None = None

        def make() -> VolumeRecord:
            nonlocal sealed
            self._refuse_taken(name)
            mapper = self.mapper(backend)
            mapper.check_fits(size)
            advance = Advance(self._heeding_the_end(progress), about_bytes)
            with (
                mapper.reserve(name) as reservation,
                import_layer(mapper, self._sealed[mapper.backend], reader, size, threads, advance) as layer,
            ):
                sealed = layer.sealed
                return mapper.publish_over(reservation, layer.id, size, attributes or Attributes(), request).record

        made = self._make("imported", name, request, make)
        return Imported(made, sealed.data_bytes if sealed else 0, sealed.added_bytes if sealed else 0)

    def end_seals(self) -> None:
        """Have those under way, and imports, end soon, with an error: this process is to end. What they have stored is
        found again."""
        self._seals_end = True

    def learn_packs(self) -> None:
        """Read which packs there are, before somebody has to wait for it who reads.

        Where that fails now, or is cut short by the end, whoever reads first does it, and is told.
        """
        for mapper in self._mappers.values():
            sealed = self._sealed[mapper.backend]
            try:
                if sealed.has_packs():
                    sealed.learn(self._heeding_the_end(unheeded))
            except ArchipError as error:
                log.info("packs not looked at ahead", backend=mapper.backend, error=str(error))

    def _heeding_the_end(self, progress: Progress) -> Progress:
        def heed(done: int, total: int) -> None:
            progress(done, total)
            if self._seals_end:
                raise ArchipError("cut short, since the daemon ends; begin it again, and it goes on")

        return heed

    def _frozen_layer(self, found: Found, live: bool) -> LayerId | None:
        """The uppermost layer of the volume that does not change any more, durable."""
        if not found.record.writable:
            return found.record.layer
        with self._owning(found) as opened:
            if live and not opened.head_is_empty():
                return opened.freeze().layer
            return opened.frozen_below()

    def _seal_layer(self, mapper: Mapper, layer: LayerId, threads: int, advance: Advance) -> Sealed:
        started = time.perf_counter()
        record = seal_layer(mapper, self._sealed[mapper.backend], layer, threads=threads, advance=advance)
        assert record.sealed is not None
        self._reclaim_wanted = True
        self._go_over(mapper, record)
        seconds = round(time.perf_counter() - started, 3)
        log.info("sealed", layer=layer, data=record.sealed.data_bytes, added=record.sealed.added_bytes, seconds=seconds)
        return record.sealed

    def _go_over(self, mapper: Mapper, sealed: LayerRecord) -> None:
        """Have all that is open here read the sealed layer, then delete the objects that it was before. Where others
        could not go on reading them, that is left to ``reclaim``.

        A volume that is just being opened has its ``control`` held until it is; whoever opens it later finds the layer
        sealed, or objects missing, and looks again.
        """
        with self._table.changed:
            opened_all = list(self._table.volumes.values())
        failed: ArchipError | None = None
        for opened in opened_all:
            if opened.mapper is mapper:
                try:
                    opened.rebase(sealed)
                except ArchipError as error:
                    # It goes on with the objects that it has open. The layer is sealed: nobody comes by again for the
                    # others.
                    log.error("reads on what was sealed until it is closed", volume=opened.id, error=str(error))
                    failed = failed or error
        if failed is not None:
            raise failed
        self._live[mapper.backend].forget(sealed.id)
        if mapper.blocker.keeps_deleted:
            delete_objects(mapper.blocker, sealed.id)

    def go_over_to_seals(self) -> None:
        """To be called every ``LOOK_SECONDS``: have open volumes read what other nodes have sealed, before the objects
        go that it was before."""
        for opened in self.open_volumes():
            if opened.mapper.blocker.keeps_deleted or not opened.control.acquire(blocking=False):
                continue  # whoever is at work with it comes to its layers' records himself
            try:
                opened.go_over_to_seal()
            except Fenced:
                continue  # it reads no more
            except ArchipError as error:
                log.error("not looked for seals, it is tried again", volume=opened.id, error=str(error))
            finally:
                opened.control.release()
