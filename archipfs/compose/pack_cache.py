"""The pack cache: local files of what was fetched of packs that lie far away, one for each pack.

``state_dir/cache/packs/<store id>/<pack id>`` has the pack's bytes at their own offsets, as far as somebody read them,
so that the engine reads them as it reads the packs of a directory; docs/format.md has the layout. What is missing the
engine fetches, and when there is too much, it deletes the files that nobody has read for long. Here is only which files
there are when a process begins. Any of them may be deleted at any time.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import structlog

from archipfs.blockers.contract import DataObject
from archipfs.compose.engine import CacheFiles, CacheStatistics, EnginePack
from archipfs.compose.engine.cached import STAY_NS
from archipfs.types import PackId

log = structlog.get_logger()

BLOCK_BYTES = 512
"""What ``st_blocks`` counts in."""
_PACK_NAME = re.compile(r"[0-9a-f]{64}")


class PackCache:
    """Thread-safe. One process at a time has the directory: the node."""

    def __init__(self, directory: Path, bytes_max: int, stores: Collection[str], *, stay_ns: int = STAY_NS) -> None:
        """Take over what is there of these stores, and delete the rest: nobody reads the others any more."""
        self._directory = directory
        self._files = CacheFiles(bytes_max, stay_ns=stay_ns)
        try:
            _delete_others(directory, stores)
            for _, path, allocated_bytes in sorted(_files_of(directory)):
                self._files.adopt(path, allocated_bytes)
        except OSError as error:
            log.warning("pack cache not read", path=str(directory), error=error.strerror)

    def open(self, store: str, pack: PackId, data: DataObject) -> EnginePack:
        """The pack, read through its file. It takes over ``data``, which is the pack where it lies."""
        path = self._directory / store / pack
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            # The engine cannot make the file then, and fetches whatever is asked for.
            log.warning("pack cache not written", path=str(path.parent), error=error.strerror)
        return EnginePack(pack, data, data.size(), cached=(self._files, path))

    def statistics(self) -> CacheStatistics:
        return self._files.statistics()

    def close(self) -> None:
        """Write what was fetched, and fetch nothing ahead any more. Packs that are open can still be read."""
        self._files.close()


def _delete_others(directory: Path, stores: Collection[str]) -> None:
    if not directory.exists():
        return
    for path in directory.iterdir():
        if path.name not in stores:
            log.info("deleting the packs of a store that is not configured", path=str(path))
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _files_of(directory: Path) -> Iterator[tuple[int, Path, int]]:
    """When it was last used, path, and bytes on the disk. What is no pack's file is deleted."""
    if not directory.exists():
        return
    for store in directory.iterdir():
        for entry in os.scandir(store):
            path = Path(entry.path)
            if not entry.is_file(follow_symlinks=False) or not _PACK_NAME.fullmatch(entry.name):
                log.warning("deleting what is no pack's file", path=str(path))
                shutil.rmtree(path) if entry.is_dir(follow_symlinks=False) else path.unlink()
                continue
            status = entry.stat(follow_symlinks=False)
            yield max(status.st_atime_ns, status.st_mtime_ns), path, status.st_blocks * BLOCK_BYTES
