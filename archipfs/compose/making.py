"""Making volumes: empty ones, snapshots and clones."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from archipfs.compose.volume import OpenVolume
from archipfs.compose.volumes import Volumes
from archipfs.errors import AlreadyExists, InvalidInput, InvalidSize
from archipfs.map.mapper import Attributes
from archipfs.map.records import VolumeRecord
from archipfs.types import RequestId
from archipfs.units import format_size

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Made:
    """What an operation made, and how long it took in here."""

    record: VolumeRecord
    seconds: float


class Making(Volumes):
    def create(
        self,
        name: str,
        size: int,
        *,
        backend: str | None = None,
        attributes: Attributes | None = None,
        request: RequestId | None = None,
    ) -> Made:
        """An empty volume. ``size`` 0 is what a file just created has; commands refuse it."""

        def create() -> VolumeRecord:
            self._refuse_taken(name)
            return self.mapper(backend).create(name, size, attributes or Attributes(), request).record

        return self._make("created", name, request, create)

    def snapshot(self, name: str, snapshot: str, *, size: int | None = None, request: RequestId | None = None) -> Made:
        """A snapshot of a volume, or a second name for what a snapshot holds."""
        return self._make("snapshot", snapshot, request, lambda: self._snapshot(name, snapshot, size, request))

    def _snapshot(self, name: str, snapshot: str, size: int | None, request: RequestId | None) -> VolumeRecord:
        found = self.find(name)
        self._refuse_taken(snapshot)
        mapper = found.mapper
        with mapper.reserve(snapshot) as reservation:
            if not found.record.writable:
                wanted = self._at_least(found.record.size, size, name)
                return mapper.publish_again(reservation, found.record, wanted, request).record
            with self._owning(found) as opened:
                self._refuse_empty(opened)
                wanted = self._at_least(opened.size, size, name)
                frozen = opened.freeze()
                wanted = max(frozen.size, wanted if size else 0)
                return mapper.publish_snapshot(reservation, opened.record, frozen.layer, wanted, request).record

    def clone(
        self,
        name: str,
        clone: str,
        *,
        size: int | None = None,
        attributes: Attributes | None = None,
        request: RequestId | None = None,
    ) -> Made:
        """A writable volume that begins as a copy of a snapshot, or of a volume as it is now.

        Unless ``attributes`` say otherwise, it belongs to whom the source belongs to.
        """
        return self._make("cloned", clone, request, lambda: self._clone(name, clone, size, attributes, request))

    def _clone(
        self, name: str, clone: str, size: int | None, attributes: Attributes | None, request: RequestId | None
    ) -> VolumeRecord:
        found = self.find(name)
        self._refuse_taken(clone)
        record = found.record
        attributes = attributes or Attributes(0o600, record.uid, record.gid)
        wanted = self._at_least(record.size, size, name)
        found.mapper.check_fits(wanted)
        if record.writable:
            with self._owning(found) as opened:
                frozen = opened.freeze()
                record = msgspec.structs.replace(opened.record, layer=frozen.layer, size=frozen.size)
                return found.mapper.clone(record, clone, max(wanted, frozen.size), attributes, request).record
        return found.mapper.clone(record, clone, wanted, attributes, request).record

    def _make(self, event: str, name: str, request: RequestId | None, make: Callable[[], VolumeRecord]) -> Made:
        """Make what will be called ``name``, or return it if the same request made it when it came first."""
        started = time.perf_counter()
        try:
            record = make()
        except AlreadyExists:
            done = self._done_before(name, request)
            if done is None:
                raise
            record = done
        seconds = time.perf_counter() - started
        log.info(event, volume=record.name, kind=record.kind.value, size=record.size, seconds=round(seconds, 6))
        return Made(record, seconds)

    def _refuse_empty(self, opened: OpenVolume) -> None:
        if opened.size == 0:
            raise InvalidInput(
                f"{opened.name} has no size yet, there is nothing to take a snapshot of; resize it first"
            )

    def _at_least(self, least: int, size: int | None, name: str) -> int:
        if size is None:
            return least
        if size < least:
            raise InvalidSize(
                f"size {format_size(size)} is smaller than {name}, which has {format_size(least)}; give at least that"
            )
        return size
