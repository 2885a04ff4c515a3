"""A node: the configuration brought to life, with its backends, its identity and its exclusive use of both.

One process at a time is the node: the daemon, or a command that found none. It holds locks on two files, in the run
directory and in the state directory. The kernel drops them when the process dies, however it dies; unless a supervisor
keeps the open files, for the next daemon.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from archipfs.blockers.contract import Blocker
from archipfs.blockers.registry import create_blocker, open_blocker
from archipfs.blockers.retry import RetryBlocker
from archipfs.compose.composer import Backends, Composer
from archipfs.compose.engine import format_bitmap
from archipfs.compose.layers import LiveBitmaps
from archipfs.compose.sealed import SealedStore, Shared
from archipfs.config import DEFAULT_BACKEND, BackendConfig, Config, forget_backend, load_config, save_backend
from archipfs.daemon.upkeep import Upkeep
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Busy,
    InvalidConfig,
    InvalidInput,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from archipfs.map.locks import Node as NodeIdentity
from archipfs.map.mapper import AS_USUAL, Mapper, StoreOptions, create_store
from archipfs.map.names import check_name

log = structlog.get_logger()

RUN_LOCK, STATE_LOCK = "run-lock", "state-lock"
LOCK_WAIT_SECONDS = 5.0
"""How long a command waits for another command to finish."""


@dataclass(slots=True)
class Node:
    """What commands work on. ``changed`` and ``renamed`` are set by an endpoint whose clients keep caches."""

    config: Config
    identity: NodeIdentity
    composer: Composer
    status: Callable[[], Mapping[str, Any]]
    """What the daemon says of itself; of a node without a mount, an empty mapping."""
    changed: Callable[[str], None]
    """Called with a volume's id after its content or size changed other than by writing."""
    upkeep: Mapping[str, Upkeep]
    """By backend."""
    _stores: "_Stores"
    _backends_change: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, name: str) -> None:
        """Use a backend that was added to the configuration since it was read; nothing happens if we do already."""
        with self._backends_change:
            if name in self.composer.mappers:
                return
            config = load_config(root=self.config.root, path=None if self.config.root else self.config.path)
            backend = config.backends.get(name)
            if backend is None:
                raise NotFound(f"no backend is called {name} in {config.path}; make it with `archip backend-create`")
            mapper, sealed = self._stores.open(backend, self.identity, self.composer.mappers)
            self.composer.add_backend(mapper, sealed)
            self.upkeep = {**self.upkeep, name: Upkeep(mapper, sealed, config.state_dir)}
            self.config = replace(self.config, backends={**self.config.backends, name: backend})

    def look_for_away(self) -> None:
        """Use those of the backends that are away which can be reached again. Waits for each as its driver does."""
        for name in self.composer.away:
            try:
                self.attach(name)
                self.composer.recover()
                log.info("a backend is back", backend=name)
            except StoreUnavailable:
                continue
            except ArchipError as error:
                log.error("a backend is away, it is tried again", backend=name, error=str(error))

    def detach(self, name: str) -> None:
        """Take a backend out of the configuration and use it no more. Raises ``Busy`` if a volume of it is open."""
        with self._backends_change:
            refuse_last(self.config, name)
            if name in self.composer.away:
                self.config = forget_backend(self.config, name)
                self.composer.away = {other: why for other, why in self.composer.away.items() if other != name}
                return
            mapper, sealed = self.composer.drop_backend(name)
            try:
                self.config = forget_backend(self.config, name)
            except BaseException:
                self.composer.add_backend(mapper, sealed)
                raise
            # What is under way in it comes to its end: its store is closed when the node ends.
            self.upkeep = {other: upkeep for other, upkeep in self.upkeep.items() if other != name}


@contextmanager
def exclusive(
    config: Config,
    *,
    holder: Mapping[str, Any],
    wait_seconds: float = LOCK_WAIT_SECONDS,
    wait_for_daemon: bool = False,
    inherited: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Mapping[str, int]]:
    """Be the only process of this node; the open lock files, by the names under which a supervisor may keep them.

    ``holder`` describes us to those who come second. ``inherited`` are lock files that were kept so from an earlier
    daemon, whose place we take: a lock belongs to the open file. They are ours to close.

    Raises ``Busy``, naming the process that is the node: at once if that is a daemon, unless we are to wait for it.
    """
    make_directory(config.run_dir)
    make_directory(config.state_dir)
    # What a boot does not outlive lies in the one, the identity in the other: both are ours, or neither is.
    paths = {RUN_LOCK: config.run_dir / "node.lock", STATE_LOCK: config.state_dir / "node.lock"}
    with ExitStack() as stack:
        files = {name: stack.enter_context(_lock_file(path, inherited.get(name))) for name, path in paths.items()}
        deadline = time.monotonic() + wait_seconds
        while True:
            taken = next((path for name, path in paths.items() if not _try_lock(files[name])), None)
            if taken is None:
                break
            other = _read_holder(taken)
            if (other.get("mountpoint") and not wait_for_daemon) or time.monotonic() > deadline:
                at = f", mounted at {other['mountpoint']}" if other.get("mountpoint") else ""
                raise Busy(
                    f"{taken.parent} is used by process {other.get('pid', 'unknown')}{at}; "
                    "unmount it or wait until it is done"
                )
            time.sleep(0.05)
        for file in files.values():
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(holder).encode(), 0)
        yield files


@contextmanager
def _lock_file(path: Path, inherited: int | None) -> Iterator[int]:
    """``inherited`` if that is the file at ``path``, which somebody may have deleted meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if inherited is not None:
        kept, other = (inherited, descriptor) if _same_file(inherited, descriptor) else (descriptor, inherited)
        os.close(other)
        descriptor = kept
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # it is just being written
    return holder if isinstance(holder, dict) else {}


@contextmanager
def open_node(config: Config, *, recover: bool = True, all_backends: bool = True) -> Iterator[Node]:
    """Bring the node to life and recover from whatever happened before. Call it inside ``exclusive``.

    Without ``recover`` that is left to the caller: it takes a while, and may be done beside everything else.

    Raises ``StoreUnavailable`` if a backend cannot be reached; without ``all_backends`` only if it is the one in which
    volumes are made when none is named. Others are noted in ``Composer.away``.
    """
    if not config.backends:
        raise no_backend(config)
    make_directory(config.state_dir)
    identity = NodeIdentity(_node_id(config.state_dir), socket.gethostname())
    with _Stores(config) as stores:
        mappers: dict[str, Mapper] = {}
        sealed: dict[str, SealedStore] = {}
        away: dict[str, StoreUnavailable] = {}
        default = DEFAULT_BACKEND if DEFAULT_BACKEND in config.backends else next(iter(config.backends))
        for backend in config.backends.values():
            try:
                mappers[backend.name], sealed[backend.name] = stores.open(backend, identity, mappers)
            except StoreUnavailable as error:
                if all_backends or backend.name == default:
                    raise
                away[backend.name] = error
        composer = Composer(Backends(mappers, sealed, LiveBitmaps(config.run_dir / "live"), default))
        composer.away = away
        if recover:
            composer.recover()
        upkeep = {name: Upkeep(mapper, sealed[name], config.state_dir) for name, mapper in mappers.items()}
        yield Node(config, identity, composer, dict, lambda volume: None, upkeep, stores)
        composer.return_to_stores()
        composer.close_all()
        composer.reclaim()


@dataclass(frozen=True, slots=True)
class _Store:
    backend: BackendConfig
    mapper: Mapper
    sealed: SealedStore


class _Stores:
    """What is open of the backends; closed in the order in which it leans on one another."""

    def __init__(self, config: Config) -> None:
        self._shared = Shared(
            config.state_dir,
            table_bytes_max=config.cache.extents,
            objects_bytes_max=config.cache.objects,
            packs_bytes_max=config.cache.packs,
        )
        self._blockers, self._sealed = ExitStack(), ExitStack()
        self._opened: dict[str, _Store] = {}
        """By the store's id; also those that were detached since, in which something may still be under way."""

    def __enter__(self) -> "_Stores":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._blockers, ExitStack() as closing:
            closing.callback(self._shared.close)
            closing.callback(self._sealed.close)

    def open(
        self, backend: BackendConfig, identity: NodeIdentity, others: Mapping[str, Mapper]
    ) -> tuple[Mapper, SealedStore]:
        """Raises ``InvalidConfig`` if the store is that of another backend.

        A store is opened once in the life of a process: one that was detached is taken up again as it is.
        """
        with ExitStack() as opening:
            blocker = open_backend(backend)
            opening.callback(blocker.close)
            mapper = Mapper(backend.name, blocker, identity, format_bitmap)
            _refuse_twin(mapper, others)
            known = self._opened.get(mapper.store.id)
            if known is not None:
                if known.backend != backend:
                    raise InvalidConfig(
                        f"backend {backend.name}: this process has its store open as {known.backend.name}, as it was "
                        "configured before; unmount and mount again to use it"
                    )
                return known.mapper, known.sealed
            self._blockers.push(opening.pop_all())
        sealed = SealedStore(mapper, self._shared)
        self._sealed.callback(sealed.close)
        self._opened[mapper.store.id] = _Store(backend, mapper, sealed)
        return mapper, sealed


def no_backend(config: Config) -> InvalidConfig:
    """The error for a node that has nowhere to keep volumes."""
    return InvalidConfig(
        f"no backend is configured in {config.path}; make one with "
        f"`archip backend-create default --driver file --path {config.default_store}`"
    )


def _refuse_twin(mapper: Mapper, others: Mapping[str, Mapper]) -> None:
    """Two mappers on one store would not know of each other's layers under way, and delete them as left behind."""
    for other in others.values():
        if other.store.id == mapper.store.id:
            raise InvalidConfig(
                f"backends {other.backend} and {mapper.backend} are the same store, {mapper.blocker.describe()}; "
                "remove one of them from the configuration"
            )


def open_backend(backend: BackendConfig) -> Blocker:
    """The backend's driver, with retries. Errors name the backend."""
    try:
        return RetryBlocker(open_blocker(backend.driver, backend.options))
    except ArchipError as error:
        raise type(error)(f"backend {backend.name}: {error}") from error


def create_backend(config: Config, backend: BackendConfig, options: StoreOptions = AS_USUAL) -> Config:
    """Make the store if there is none in its place, then add it to the configuration.

    Raises ``AlreadyExists`` for a name that is configured with something else, and for a store that is not as
    ``options`` say.
    """
    check_name(backend.name)
    known = config.backends.get(backend.name)
    if known is not None:
        if known == backend:
            return config
        raise AlreadyExists(f"backend {backend.name} is configured already in {config.path}; choose another name")
    for other in config.backends.values():
        if (other.driver, dict(other.options)) == (backend.driver, dict(backend.options)):
            raise AlreadyExists(f"backend {other.name} lies in that place already; choose another place")
    blocker = create_blocker(backend.driver, backend.options)
    try:
        create_store(blocker, options)
    finally:
        blocker.close()
    return save_backend(config, backend)


def refuse_last(config: Config, backend: str) -> None:
    """Raises ``InvalidInput`` if it is the only one, and ``NotFound`` if there is none of that name."""
    if backend not in config.backends:
        raise NotFound(f"no backend is called {backend}; see `archip backend-list`")
    if len(config.backends) == 1:
        raise InvalidInput(f"{backend} is the only backend; make another one first, or volumes have nowhere to lie")


def create_default_backend(config: Config) -> Config:
    """The file backend that a first mount makes by itself."""
    return create_backend(config, BackendConfig(DEFAULT_BACKEND, "file", {"path": str(config.default_store)}))


def make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot make {path}: {error.strerror}; be root, or use --root with a place of your own"
        ) from error


def _node_id(state_dir: Path) -> str:
    """Who this node is, made up on its first day."""
    path = state_dir / "node-id"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        node_id = uuid.uuid4().hex
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w") as stream:
            stream.write(node_id + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, path)
        return node_id
