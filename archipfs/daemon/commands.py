"""What can be asked of a node: one table of functions, for the control socket and for a command line without daemon.

Arguments and answers are plain values that JSON can carry. Sizes are integer bytes, times are seconds since the epoch.
"""

import base64
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from archipfs.compose.composer import Found, Made
from archipfs.compose.describe import describe, describe_lock, summary
from archipfs.compose.diff import bitmap, check_granularity, differing_runs
from archipfs.compose.hashing import hash_volume
from archipfs.compose.sealing import mask_bits
from archipfs.compose.sparse_file import SparseFile
from archipfs.config import BackendConfig
from archipfs.daemon.node import Node, refuse_last
from archipfs.errors import Busy, DaemonError, NotFound, ObjectDamaged, ObjectMissing, StoreError
from archipfs.map.catalog import Versioned
from archipfs.map.mapper import Attributes, Mapper
from archipfs.map.pithos import top_hash
from archipfs.map.records import VolumeRecord
from archipfs.types import Digest, RequestId

if TYPE_CHECKING:
    from archipfs.map.gc import Collected
    from archipfs.map.space import Space

log = structlog.get_logger()

PAUSE_SECONDS = 0.1
"""A command that is slowed down sees that often whether it is to end."""

Answer = Mapping[str, Any]
Progress = Callable[[int, int], None]
"""Told by a long command how much it has done, and of how much; only in the thread in which the command was called.

It raises to have the command end, because nobody waits for the answer any more."""


def ignored(done: int, total: int) -> None:
    """For those who do not want to know how far it is."""


@dataclass(frozen=True, slots=True)
class Sent:
    """How a command came, for those that must not be done twice and for those that take long."""

    request: RequestId | None = None
    """The same when it comes again; ``None`` if it never does."""
    again: bool = False
    """It was sent before, and may have been done."""
    progress: Progress = ignored


def call(node: Node, command: str, arguments: Mapping[str, Any], sent: Sent = Sent()) -> Any:
    """Carry out ``command``. Raises whatever it raises, and ``DaemonError`` for one that another version sent."""
    function = COMMANDS.get(command)
    if function is None:
        raise DaemonError(f"the daemon does not know {command}; it is of another version, mount again")
    context = (node, sent) if command in NOT_TWICE or command in LONG else (node,)
    try:
        inspect.signature(function).bind(*context, **arguments)
    except TypeError as error:
        raise DaemonError(f"the daemon does not understand {command} ({error}); mount again") from error
    return function(*context, **arguments)


# Volumes


def volume_list(node: Node, backend: str | None = None) -> list[Answer]:
    """Every volume, by name; of one backend, what has no name of its own on this node too: replicas, and what lies
    behind others of its name. Cheap: what takes a look at the bytes is in ``volume_info``."""
    volumes = node.composer.volumes() if backend is None else node.composer.volumes_in(backend)
    found = sorted(volumes, key=lambda each: str(each.record.name))
    names = {each.record.id: each.record.name for each in found}
    return [summary(each, names.get(each.record.origin) if each.record.origin else None) for each in found]


def volume_info(node: Node, name: str, space: bool = False) -> Answer:
    """With ``space`` also whose the bytes are, which takes a look at all volumes of the backend and at their maps."""
    found = node.composer.find(name)
    return {**describe(node.composer, found), **(_space_of(node, found) if space else {})}


def _space_of(node: Node, found: Found) -> dict[str, Any]:
    """``None`` for what nobody can say: too much to count, or a map that cannot be read, which ``check`` tells of."""
    try:
        space = node.upkeep[found.mapper.backend].space().of_volume(found.record)
    except (ObjectMissing, ObjectDamaged):
        space = None
    exclusive = None if space is None else space.exclusive_bytes
    return {
        "exclusive": exclusive,
        "shared": None if space is None else space.shared_bytes,
        "removal_frees": None if found.record.writable else exclusive,
    }


def volume_create(
    node: Node,
    sent: Sent,
    name: str,
    size: int,
    backend: str | None = None,
    mode: int = 0o600,
    uid: int = 0,
    gid: int = 0,
) -> Answer:
    node.composer.mapper(backend).check_fits(size)
    attributes = Attributes(mode, uid, gid)
    return _made(node.composer.create(name, size, backend=backend, attributes=attributes, request=sent.request))


def volume_snapshot(node: Node, sent: Sent, name: str, snapshot: str, size: int | None = None) -> Answer:
    return _made(node.composer.snapshot(name, snapshot, size=size, request=sent.request))


def volume_clone(node: Node, sent: Sent, name: str, clone: str, size: int | None = None) -> Answer:
    return _made(node.composer.clone(name, clone, size=size, request=sent.request))


def volume_rename(node: Node, sent: Sent, name: str, new_name: str) -> Answer:
    node.composer.rename(name, new_name, request=sent.request)
    return {"name": new_name}


def volume_resize(node: Node, name: str, size: int) -> Answer:
    record = node.composer.resize(node.composer.find(name), size)
    node.changed(record.id)
    return {"name": name, "size": record.size}


def volume_rollback(node: Node, sent: Sent, name: str, snapshot: str) -> Answer:
    done = node.composer.rollback(name, snapshot, request=sent.request)
    node.changed(done.record.id)
    return {"name": name, "snapshot": snapshot, "kept": done.kept.name, "size": done.record.size}


def volume_remove(node: Node, sent: Sent, name: str, backend: str | None = None) -> Answer:
    """With ``backend`` what has that name there, whether names lead to it from here or not."""
    try:
        if backend is None:
            node.composer.remove(name)
        else:
            node.composer.remove_in(backend, name)
    except NotFound:
        if not sent.again:
            raise
    return {"name": name}


def volume_seal(node: Node, sent: Sent, name: str, live: bool = False) -> Answer:
    done = node.composer.seal(name, live=live, progress=sent.progress)
    return {"name": name, "layers": done.layers, "read": done.read_bytes, "added": done.added_bytes}


def volume_import(
    node: Node,
    sent: Sent,
    path: str,
    name: str,
    backend: str | None = None,
    mode: int = 0o600,
    uid: int = 0,
    gid: int = 0,
) -> Answer:
    attributes = Attributes(mode, uid, gid)
    with SparseFile(Path(path)) as file:
        made = node.composer.import_sealed(
            name,
            file.size,
            file,
            about_bytes=file.data_bytes(),
            backend=backend,
            attributes=attributes,
            request=sent.request,
            progress=sent.progress,
        )
    return {**_made(made.made), "data": made.data_bytes, "added": made.added_bytes}


def volume_move(node: Node, sent: Sent, name: str, origin: str, target: str) -> Answer:
    """To another backend, where it is then, whether it came there just now or before."""
    moved = node.composer.move(name, origin=origin, target=target, progress=sent.progress)
    return {
        "name": name,
        "origin": origin,
        "target": target,
        "size": moved.record.size,
        "added": moved.added_bytes,
        "was_there": moved.was_there,
    }


def volume_lock(node: Node, name: str) -> Answer:
    return describe_lock(node.composer.lock(name))


def volume_unlock(node: Node, name: str, force: bool = False) -> Answer:
    node.composer.unlock(name, force=force)
    return {"name": name}


def volume_open(node: Node, name: str) -> Answer:
    return describe_lock(node.composer.hold_open(name))


def volume_close(node: Node, name: str) -> Answer:
    node.composer.close(name)
    return {"name": name}


def volume_hash(node: Node, sent: Sent, name: str) -> Answer:
    """Pithos' hash map, and the top of the tree over it."""
    with node.composer.using(node.composer.find(name)) as opened, opened.reading_frozen() as engine:
        hash_map = hash_volume(engine, sent.progress)
    return {**hash_map.as_json(), "top_hash": top_hash(hash_map.hashes).hex()}


def volume_diff(node: Node, sent: Sent, one: str, other: str, granularity: int | None = None) -> Answer:
    """Where two volumes differ: pairs of offset and length; with a granularity, a bitmap in base64 instead."""
    composer = node.composer
    with composer.using(composer.find(one)) as mine, composer.using(composer.find(other)) as theirs:
        size = max(mine.size, theirs.size)
        if granularity is not None:
            check_granularity(size, granularity)

        def fetch(digest: Digest) -> bytes:
            return composer.sealed_store(mine.mapper).chunks.page(digest)

        runs = differing_runs(mine, theirs, fetch, sent.progress)
        if granularity is None:
            return {"size": size, "ranges": [(start, end - start) for start, end in runs]}
        bits = bitmap(runs, size, granularity)
    return {"size": size, "granularity": granularity, "bitmap": base64.b64encode(bits).decode()}


# Backends and the node


def backend_list(node: Node) -> list[Answer]:
    """All that are configured; nobody knows how much room there is in those that cannot be reached."""
    return [_backend_or_away(node, backend) for backend in node.config.backends.values()]


def _backend_or_away(node: Node, backend: BackendConfig) -> Answer:
    try:
        return _backend(node, node.composer.mapper(backend.name))
    except StoreError as error:
        log.warning("backend cannot be looked at", backend=backend.name, error=str(error))
        place = backend.options.get("path") or backend.options.get("pool")
        return {"name": backend.name, "driver": backend.driver, "place": place, "total": None, "available": None}


def backend_attach(node: Node, name: str) -> Answer:
    """Use a backend that was just added to the configuration."""
    node.attach(name)
    return {"name": name}


def backend_remove(node: Node, name: str, keep_data: bool = False, dry_run: bool = False) -> Answer:
    """Forget a backend. ``keep_data``: whatever it holds, and without a look at it."""
    refuse_last(node.config, name)
    if not keep_data:
        _refuse_volumes(name, list(node.composer.mapper(name).volumes()))
    if not dry_run:
        node.detach(name)
    return {"name": name, "default": node.composer.default_backend, "dry_run": dry_run}


def _refuse_volumes(backend: str, volumes: Sequence[Versioned[VolumeRecord]]) -> None:
    if volumes:
        some = min(str(found.record.name) for found in volumes)
        count = f"{len(volumes)} volumes and snapshots" if len(volumes) > 1 else "a volume or snapshot"
        raise Busy(
            f"backend {backend} holds {count}, {some} for one; remove or move them (see `archip volume-list --backend "
            f"{backend}`), or give --keep-data to forget the backend and leave its store as it is"
        )


def backend_sync(
    node: Node,
    sent: Sent,
    origin: str,
    target: str,
    delete: bool = False,
    dry_run: bool = False,
    rate: int | None = None,
) -> Answer:
    """Copy to ``target`` what it lacks of ``origin``, ``rate`` bytes a second at most."""
    done = node.composer.sync(origin, target, delete=delete, dry_run=dry_run, progress=_slowly(sent.progress, rate))
    return {
        "origin": origin,
        "target": target,
        "copied": done.copied,
        "current": done.current,
        "removed": done.removed,
        "passed_over": [{"name": name, "why": why} for name, why in done.passed_over],
        "added": done.added_bytes,
        "dry_run": dry_run,
    }


def _slowly(progress: Progress, rate: int | None) -> Progress:
    """``progress`` that returns no sooner than so many bytes a second allow."""
    if rate is None:
        return progress
    started = time.monotonic()

    def slow(done: int, total: int) -> None:
        progress(done, total)
        while time.monotonic() - started < done / rate:
            time.sleep(PAUSE_SECONDS)
            progress(done, total)

    return slow


def backend_info(node: Node, name: str) -> Answer:
    mapper = node.composer.mapper(name)
    volumes = [found.record for found in mapper.volumes()]
    return {
        **_backend(node, mapper),
        "store": mapper.store.id,
        "hash": mapper.store.hash,
        "created": mapper.store.created_ns / 1e9,
        "volumes": sum(record.writable for record in volumes),
        "snapshots": sum(not record.writable for record in volumes),
        "provisioned": sum(record.size for record in volumes),
        "volume_size_max": mapper.blocker.data_bytes_max,
        "compression": mapper.store.compression,
        **_totals(node.upkeep[mapper.backend].space()),
    }


def _totals(space: "Space") -> dict[str, Any]:
    """What is sealed, and what it takes; ``None`` for what nobody can say, as for ``_space_of``."""
    try:
        account = space.account()
    except (ObjectMissing, ObjectDamaged):
        account = None
    logical = space.sealed_bytes
    return {
        "unsealed": space.unsealed_bytes,
        "logical": logical,
        "unique": None if account is None else account.unique_bytes,
        "stored": None if account is None else account.pack_bytes,
        "dedup_ratio": None if account is None else _ratio(logical, account.unique_bytes),
        "compression_ratio": None if account is None else _ratio(account.unique_bytes, account.chunk_bytes),
        "reclaimable": None if account is None else account.reclaimable_bytes,
    }


def _ratio(before: int, after: int) -> float | None:
    return round(before / after, 2) if after else None


def check(node: Node, sent: Sent) -> list[Answer]:
    """What is wrong in the stores, and what a crash left behind; nothing found is an empty list."""
    return [
        {"backend": name, "severity": found.severity.value, "what": found.what, "which": found.which}
        for name, upkeep in node.upkeep.items()
        for found in upkeep.check(lambda: sent.progress(0, 0))
    ]


def scrub(node: Node, sent: Sent, rate: int | None = None, repair: bool = False) -> Answer:
    """``check`` after all that is sealed was read and hashed, at ``rate`` bytes a second at most; mended if wanted."""
    done = []
    for name, upkeep in node.upkeep.items():
        scrubbed = upkeep.scrub(rate, sent.progress)
        if scrubbed is None:
            continue
        answer = {
            "backend": name,
            "packs": scrubbed.packs,
            "read": scrubbed.read_bytes,
            "damaged": scrubbed.damaged,
            "resumed": scrubbed.resumed_after is not None,
        }
        if repair:
            others = [other for other in node.upkeep.values() if other is not upkeep]
            repaired = upkeep.repair(others, mask_bits(upkeep.mapper), sent.progress)
            answer |= {"mended": repaired.mended, "lost": repaired.lost, "tried": list(repaired.tried)}
        done.append(answer)
    return {"findings": check(node, sent), "backends": done}


def gc(node: Node, sent: Sent, dry_run: bool = False) -> list[Answer]:
    """Delete what nothing leads to any more; with ``dry_run`` only say how much that is."""
    if not dry_run:
        node.composer.reclaim()
    done: list[Answer] = []
    for name, upkeep in node.upkeep.items():
        collected = upkeep.collect(lambda: sent.progress(0, 0), dry_run=dry_run)
        waiting = node.composer.layers_waiting(name)
        if collected is not None or waiting:
            done.append({"backend": name, **_collected(collected), "layers_waiting": waiting, "dry_run": dry_run})
    return done


def _collected(collected: "Collected | None") -> Answer:
    """Of packs; ``None`` where nothing was ever sealed."""
    if collected is None:
        return {"packs": 0, "freed": 0, "repacked": 0, "copied": 0, "needed_again": 0, "kept": {}}
    return {
        "packs": collected.packs,
        "freed": collected.freed_bytes,
        "repacked": collected.repacked,
        "copied": collected.copied_bytes,
        "needed_again": collected.needed_again,
        "kept": dict(collected.kept),
    }


def status(node: Node) -> Answer:
    """What the daemon says of itself; empty where there is none."""
    return node.status()


# Answers


def _made(made: Made) -> Answer:
    record = made.record
    return {
        "name": record.name,
        "kind": record.kind.value,
        "size": record.size,
        "uuid": record.id,
        "seconds": made.seconds,
    }


def _backend(node: Node, mapper: Mapper) -> dict[str, Any]:
    backend = node.config.backends[mapper.backend]
    space = mapper.blocker.space()
    return {
        "name": backend.name,
        "driver": backend.driver,
        "place": mapper.blocker.describe(),
        "total": space.total_bytes,
        "available": space.available_bytes,
    }


COMMANDS: dict[str, Callable[..., Any]] = {
    "volume-list": volume_list,
    "volume-info": volume_info,
    "volume-create": volume_create,
    "volume-snapshot": volume_snapshot,
    "volume-clone": volume_clone,
    "volume-rename": volume_rename,
    "volume-resize": volume_resize,
    "volume-rollback": volume_rollback,
    "volume-remove": volume_remove,
    "volume-seal": volume_seal,
    "volume-import": volume_import,
    "volume-move": volume_move,
    "volume-lock": volume_lock,
    "volume-unlock": volume_unlock,
    "volume-open": volume_open,
    "volume-close": volume_close,
    "volume-hash": volume_hash,
    "volume-diff": volume_diff,
    "backend-list": backend_list,
    "backend-info": backend_info,
    "backend-attach": backend_attach,
    "backend-remove": backend_remove,
    "backend-sync": backend_sync,
    "check": check,
    "scrub": scrub,
    "gc": gc,
    "status": status,
}

NOT_TWICE = frozenset(
    {"volume-create", "volume-snapshot", "volume-clone", "volume-rename", "volume-rollback", "volume-remove"}
)
"""Their functions are told how the command came. All others may be carried out again: they say what shall be so."""

LONG = frozenset(
    {
        "backend-sync",
        "volume-move",
        "volume-seal",
        "volume-import",
        "volume-hash",
        "volume-diff",
        "check",
        "scrub",
        "gc",
    }
)
"""Their functions are told how the command came too: they say how far they are."""
