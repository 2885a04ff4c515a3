"""Sealing in the background: what is old enough is sealed, slowly enough, and not while somebody waits for a seal.

Call it in threads of one's own; it ends early when trio cancels the task that waits for the thread.
"""

import time
from collections.abc import Iterator

import structlog
import trio

from archipfs.compose.composer import Composer, Found
from archipfs.config import SealConfig
from archipfs.errors import ArchipError, LockHeld, NotFound, StoreError, StoreFull
from archipfs.map.records import LayerRecord
from archipfs.types import LayerId, VolumeId

log = structlog.get_logger()

LOOK_SECONDS_MAX = 60.0
"""How often to look for what is old enough; that takes a look at all records."""
RETRY_SECONDS = 3600.0
"""How long what could not be sealed is left alone."""
FOREIGN_SECONDS = 3600.0
"""How much longer what another node made is left to that node, lest all of them do the same work."""
ROOM_LEFT = 32
"""That part of the store must stay free, whatever it takes to seal."""
PAUSE_SECONDS = 0.2
"""A thread that waits sees that often whether it is to end."""


class _GivesWay(Exception):
    """Somebody waits for another seal, which should have the machine."""


class BackgroundSealing:
    """Of one node. Used by one thread at a time."""

    def __init__(self, composer: Composer, config: SealConfig) -> None:
        self._composer = composer
        self._config = config
        self._next_look = 0.0
        self._left_alone: dict[VolumeId, float] = {}
        """Until when."""

    def seal_what_is_due(self) -> None:
        """Look, if it is time to, and seal what is found. Errors are logged, and tried again in an hour."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._left_alone = {volume: until for volume, until in self._left_alone.items() if until > now}
        try:
            due = list(self._due())
        except ArchipError as error:
            self._next_look = time.monotonic() + LOOK_SECONDS_MAX
            log.error("not looked for what is to be sealed, it is tried again", error=str(error))
            return
        for found, live in due:
            try:
                self._seal(found, live)
            except _GivesWay:
                break  # and look again soon
            except (LockHeld, NotFound):
                continue  # open on another node, or removed since
            except ArchipError as error:
                self._leave_alone(found, error)
        else:
            least = min(self._config.after_seconds, self._config.live_after_seconds or LOOK_SECONDS_MAX)
            self._next_look = time.monotonic() + min(LOOK_SECONDS_MAX, least)

    def _due(self) -> Iterator[tuple[Found, bool]]:
        """Volumes and snapshots that have something to seal, and whether the volume's head is to be frozen for it."""
        unsealed = {
            mapper.backend: {
                found.record.id: found.record
                for _, found in mapper.catalog.list(LayerRecord, skip_damaged=True)
                if found.record.sealed is None
            }
            for mapper in self._composer.mappers.values()
        }
        # Those who have a volume open elsewhere would, on NFS, lose the objects that go when a layer is sealed.
        elsewhere = {mapper.backend: mapper.layers_open_elsewhere() for mapper in self._composer.mappers.values()}
        for found in self._composer.volumes():
            if found.record.id in self._left_alone:
                continue
            layers = unsealed[found.mapper.backend]
            try:
                if self._is_idle(found) and not self._has_any(found, elsewhere[found.mapper.backend]):
                    yield found, True
                elif self._is_old(found, layers) and not self._has_any(found, elsewhere[found.mapper.backend]):
                    yield found, False
            except NotFound:
                continue  # removed since
            except StoreError as error:
                self._leave_alone(found, error)

    def _leave_alone(self, found: Found, error: ArchipError) -> None:
        self._left_alone[found.record.id] = time.monotonic() + RETRY_SECONDS
        log.error("not sealed, it is tried again in an hour", volume=found.record.name, error=str(error))

    def _is_old(self, found: Found, unsealed: dict[LayerId, LayerRecord]) -> bool:
        """Whether its frozen layer has been frozen for long enough, and has no map."""
        record = found.record
        frozen, since_ns = unsealed.get(record.layer), record.created_ns
        if record.writable and frozen is not None:
            # The head is as old as what lies below it has been frozen.
            since_ns = frozen.created_ns
            frozen = unsealed.get(frozen.parent) if frozen.parent is not None else None
        if frozen is None:
            return False
        wanted = self._config.after_seconds
        if frozen.node != found.mapper.node.id:
            wanted += FOREIGN_SECONDS
        return _age_seconds(since_ns) >= wanted

    def _has_any(self, found: Found, layers: set[LayerId]) -> bool:
        """Whether its chain has one of these."""
        return bool(layers) and any(layer.id in layers for layer in found.mapper.catalog.chain(found.record.layer))

    def _is_idle(self, found: Found) -> bool:
        """Whether it is a volume that was not written for so long that what it holds is to be sealed."""
        record, wanted = found.record, self._config.live_after_seconds
        if not wanted or not record.writable or record.size == 0 or _age_seconds(record.mtime_ns) < wanted:
            return False
        return self._composer.stored_bytes(found) > 0

    def _seal(self, found: Found, live: bool) -> None:
        started = time.monotonic()

        def progress(done: int, total: int) -> None:
            self._pause()
            self._refuse_crowding(found, total - done)
            while self._config.bandwidth and time.monotonic() - started < done / self._config.bandwidth:
                time.sleep(PAUSE_SECONDS)
                self._pause()

        self._composer.seal(
            str(found.record.name), live=live, threads=self._config.threads, progress=progress, waited_for=False
        )

    def _refuse_crowding(self, found: Found, rest_bytes: int) -> None:
        """Raises ``StoreFull`` where sealing might take the room that volumes are about to be written to: it gives
        space back only when it is done, and until then may take as much as it reads. A store that does not say
        how large it is has room."""
        blocker, space = found.mapper.blocker, found.mapper.blocker.space()
        if space.total_bytes and space.available_bytes < rest_bytes + space.total_bytes // ROOM_LEFT:
            raise StoreFull(
                f"{blocker.describe()} may have too little room to seal {found.record.name} beside what is written "
                "meanwhile; make room, or seal it with `archip volume-seal`"
            )

    def _pause(self) -> None:
        trio.from_thread.check_cancelled()
        if self._composer.seals_waited_for:
            raise _GivesWay


def _age_seconds(since_ns: int) -> float:
    return (time.time_ns() - since_ns) / 1e9
