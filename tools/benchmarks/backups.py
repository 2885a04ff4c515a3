"""borg and restic, which store backups as chunks cut by content: the nearest to what sealing does. Uncompressed."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.processes import run

PACKAGES = ("borgbackup", "restic")
TIMEOUT_S = 900.0


class Repository(Protocol):
    def backup(self, path: Path) -> None:
        """Store a file. Raises ``CannotRun``."""

    def stored_bytes(self) -> int: ...

    def pieces(self) -> int:
        """How many distinct ones it says it has."""


@dataclass(frozen=True)
class Borg:
    directory: Path
    options: Sequence[str] = ()

    @classmethod
    @contextmanager
    def made(cls, parent: Path, *options: str) -> Iterator["Borg"]:
        """An empty repository, gone afterwards."""
        repository = cls(parent / "borg", options)
        try:
            repository._borg("init", "--encryption=none", repository.directory / "repository")
            yield repository
        finally:
            shutil.rmtree(repository.directory, ignore_errors=True)

    def backup(self, path: Path) -> None:
        place = f"{self.directory / 'repository'}::{path.stem}"
        self._borg("create", "--compression=none", *self.options, place, path)

    def stored_bytes(self) -> int:
        return disk_bytes(self.directory / "repository" / "data")

    def pieces(self) -> int:
        said = self._borg("info", self.directory / "repository").splitlines()
        return next(int(line.split()[2]) for line in said if line.startswith("Chunk index:"))

    def _borg(self, *arguments: str | Path) -> str:
        settings = (f"BORG_BASE_DIR={self.directory}", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes")
        self.directory.mkdir(exist_ok=True)
        return run("env", *settings, "borg", *arguments, timeout_s=TIMEOUT_S)


@dataclass(frozen=True)
class Restic:
    directory: Path

    @classmethod
    @contextmanager
    def made(cls, parent: Path) -> Iterator["Restic"]:
        """An empty repository, gone afterwards."""
        repository = cls(parent / "restic")
        try:
            repository._restic("init", "--repository-version=2")
            yield repository
        finally:
            shutil.rmtree(repository.directory, ignore_errors=True)

    def backup(self, path: Path) -> None:
        self._restic("backup", "--compression=off", path)

    def stored_bytes(self) -> int:
        return disk_bytes(self.directory / "repository" / "data")

    def pieces(self) -> int:
        return sum(line.startswith("data") for line in self._restic("list", "blobs").splitlines())

    def _restic(self, *arguments: str | Path) -> str:
        settings = ("RESTIC_PASSWORD=bench", f"RESTIC_CACHE_DIR={self.directory / 'cache'}")
        self.directory.mkdir(exist_ok=True)
        place = self.directory / "repository"
        return run("env", *settings, "restic", "--quiet", "--repo", place, *arguments, timeout_s=TIMEOUT_S)


def disk_bytes(directory: Path) -> int:
    """What the files in it take, by their sizes."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
