"""The configuration: TOML in ``/etc/archipfs/archipfs.toml``, another file by ``--config``, or a root directory.

``--root DIR`` (or ``ARCHIPFS_ROOT``) puts everything under DIR and reads ``DIR/archipfs.toml`` if it is there:
a private instance. Unknown keys are errors, so that a misspelt one is never silently without effect.
"""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import InlineTable

from archipfs.errors import InvalidConfig, InvalidSize
from archipfs.units import parse_size

DEFAULT_PATH = Path("/etc/archipfs/archipfs.toml")
DEFAULT_STATE_DIR = Path("/var/lib/archipfs")
DEFAULT_RUN_DIR = Path("/run/archipfs")
DEFAULT_BACKEND = "default"
THREADS_MAX = 64


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """One configured backend: the driver's name and its own options, unchecked here."""

    name: str
    driver: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SealConfig:
    """When the daemon seals by itself, and how much it may take of the machine."""

    background: bool = True
    after_seconds: float = 300
    """How old a snapshot must be."""
    threads: int = 1
    bandwidth: int = 0
    """Bytes read a second at most; 0: no limit."""
    live_after_seconds: float = 0
    """A volume that was not written for so long is frozen and sealed too; 0: never."""


@dataclass(frozen=True, slots=True)
class GcConfig:
    """When the daemon collects garbage by itself."""

    background: bool = True
    every_seconds: float = 3600


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """What is kept to read sealed volumes fast."""

    extents: int = 64 << 20
    """Bytes of memory for where regions lie; a region of 4 MiB takes about 2 KiB."""
    objects: int = 1 << 30
    """Bytes in ``state_dir`` for chunks that are compressed."""
    packs: int = 10 << 30
    """Bytes in ``state_dir`` for packs that lie in a store without files."""


@dataclass(frozen=True, slots=True)
class Config:
    path: Path
    """Where it was read from, or would be written to."""
    state_dir: Path
    run_dir: Path
    root: Path | None = None
    """The private instance's directory, if it is one."""
    backends: Mapping[str, BackendConfig] = field(default_factory=dict)
    seal: SealConfig = SealConfig()
    gc: GcConfig = GcConfig()
    cache: CacheConfig = CacheConfig()

    @property
    def default_store(self) -> Path:
        """Where the file backend made on first use keeps its bytes."""
        return self.state_dir / "store"


def load_config(*, root: Path | None = None, path: Path | None = None) -> Config:
    """Read the configuration. A missing default file is an empty one; a missing ``path`` is an error.

    Raises ``InvalidConfig`` with the file and the key.
    """
    if root is not None:
        root = root.absolute()
        base = Config(root / "archipfs.toml", root / "state", root / "run", root)
    else:
        base = Config(path or DEFAULT_PATH, DEFAULT_STATE_DIR, DEFAULT_RUN_DIR)
    try:
        text = base.path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is not None:
            raise InvalidConfig(f"no configuration file {path}; create it or leave --config out") from None
        return base
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{base.path} is not UTF-8; mend it there") from error
    except OSError as error:
        raise InvalidConfig(f"cannot read configuration {base.path}: {error.strerror}") from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(f"{base.path} is not TOML: {error}; mend it there") from error
    return _interpret(base, document)


def save_backend(config: Config, backend: BackendConfig) -> Config:
    """Add a backend to the configuration file, durably. What else is in it stays as it is, comments too."""
    document = tomlkit.parse(config.path.read_text(encoding="utf-8")) if config.path.exists() else tomlkit.document()
    table = tomlkit.table()
    table.update({"driver": backend.driver, **backend.options})
    backends = document.setdefault("backend", tomlkit.table(is_super_table=True))
    if isinstance(backends, InlineTable):
        raise InvalidConfig(f"{config.path}: backend stands in braces; write it as [backend.NAME] to have one added")
    backends[backend.name] = table
    _write(config.path, document)
    return replace(config, backends={**config.backends, backend.name: backend})


def forget_backend(config: Config, name: str) -> Config:
    """Take a backend out of the configuration file, durably. What else is in it stays as it is, comments too."""
    document = tomlkit.parse(config.path.read_text(encoding="utf-8"))
    document["backend"].remove(name)
    _write(config.path, document)
    return replace(config, backends={other: each for other, each in config.backends.items() if other != name})


def _write(path: Path, document: tomlkit.TOMLDocument) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(tomlkit.dumps(document))
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _interpret(base: Config, document: Mapping[str, Any]) -> Config:
    _known(base.path, "", document, {"node", "backend", "seal", "gc", "cache"})
    node = _table(base.path, "node", document.get("node", {}))
    _known(base.path, "node.", node, {"state_dir", "run_dir"})
    backends = {}
    for name, value in _table(base.path, "backend", document.get("backend", {})).items():
        options = dict(_table(base.path, f"backend.{name}", value))
        driver = options.pop("driver", None)
        if not isinstance(driver, str):
            raise InvalidConfig(f'{base.path}: backend.{name} has no driver; add driver = "file"')
        backends[name] = BackendConfig(name, driver, options)
    return replace(
        base,
        state_dir=_path(base.path, "node.state_dir", node.get("state_dir"), base.state_dir),
        run_dir=_path(base.path, "node.run_dir", node.get("run_dir"), base.run_dir),
        backends=backends,
        seal=_seal(base.path, _table(base.path, "seal", document.get("seal", {}))),
        gc=_gc(base.path, _table(base.path, "gc", document.get("gc", {}))),
        cache=_cache(base.path, _table(base.path, "cache", document.get("cache", {}))),
    )


def _seal(path: Path, table: Mapping[str, Any]) -> SealConfig:
    _known(path, "seal.", table, {"background", "after", "threads", "bandwidth", "live_after"})
    default = SealConfig()
    threads = table.get("threads", default.threads)
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= THREADS_MAX:
        raise InvalidConfig(f"{path}: seal.threads is not a number from 1 to {THREADS_MAX}: {threads!r}")
    return SealConfig(
        _flag(path, "seal.background", table.get("background", default.background)),
        _seconds(path, "seal.after", table.get("after", default.after_seconds)),
        threads,
        _bytes(path, "seal.bandwidth", table.get("bandwidth", default.bandwidth)),
        _seconds(path, "seal.live_after", table.get("live_after", default.live_after_seconds)),
    )


def _gc(path: Path, table: Mapping[str, Any]) -> GcConfig:
    _known(path, "gc.", table, {"background", "every"})
    default = GcConfig()
    return GcConfig(
        _flag(path, "gc.background", table.get("background", default.background)),
        _seconds(path, "gc.every", table.get("every", default.every_seconds)),
    )


def _cache(path: Path, table: Mapping[str, Any]) -> CacheConfig:
    _known(path, "cache.", table, {"extents", "objects", "packs"})
    default = CacheConfig()
    return CacheConfig(
        _bytes(path, "cache.extents", table.get("extents", default.extents)),
        _bytes(path, "cache.objects", table.get("objects", default.objects)),
        _bytes(path, "cache.packs", table.get("packs", default.packs)),
    )


def _flag(path: Path, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidConfig(f"{path}: {name} is neither true nor false: {value!r}")
    return value


def _seconds(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InvalidConfig(f"{path}: {name} is not a number of seconds: {value!r}")
    return value


def _bytes(path: Path, name: str, value: object) -> int:
    """A number of bytes, or a text like "64MiB"; 0 is allowed."""
    if isinstance(value, str) and value != "0":
        try:
            return parse_size(value)
        except InvalidSize as error:
            raise InvalidConfig(f"{path}: {name}: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidConfig(f'{path}: {name} is not a size: {value!r}; write it like "64MiB"')
    return value


def _known(path: Path, prefix: str, table: Mapping[str, Any], keys: set[str]) -> None:
    for key in table:
        if key not in keys:
            known = ", ".join(sorted(keys))
            raise InvalidConfig(f"{path}: unknown key {prefix}{key}; the keys there are {known}")


def _table(path: Path, name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidConfig(f"{path}: {name} is not a table; write it as [{name}]")
    return value


def _path(path: Path, name: str, value: object, default: Path) -> Path:
    if value is None:
        return default
    if not isinstance(value, str) or not value.startswith("/"):
        raise InvalidConfig(f"{path}: {name} is not an absolute path: {value!r}")
    return Path(value)
