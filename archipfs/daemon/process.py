"""The daemon's life: be the node, mount, serve until unmounted or told to stop, flush, give the locks back.

Where a service manager keeps descriptors for us, a daemon's death is not the end of the mount: the next daemon inherits
them and goes on (docs/architecture.md, "A killed daemon").
"""

import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog
import trio

from archipfs.config import Config
from archipfs.daemon import control
from archipfs.daemon.node import Node, create_default_backend, exclusive, open_node
from archipfs.daemon.sd_notify import forget, notify, store
from archipfs.daemon.sealing import BackgroundSealing
from archipfs.daemon.supervisor import DEVICE, GO, SUPERVISOR_PID
from archipfs.daemon.upkeep import collect_in_background
from archipfs.endpoints.fuse.inodes import inode_of
from archipfs.endpoints.fuse.mount import Kept, Mount
from archipfs.endpoints.fuse.session import Session
from archipfs.errors import FAILED_EXIT_CODE, StoreUnavailable
from archipfs.map.mapper import LOOK_SECONDS
from archipfs.types import VolumeId

log = structlog.get_logger()

HOUSEKEEPING_SECONDS = 1.0
STORE_RETRY_SECONDS = 1.0
HANDED_OVER_EXIT_CODE = 75
"""EX_TEMPFAIL: not the end, also for a service manager that starts again only what failed."""
SESSION, CONTROL = "session", "control"
"""Names of what the service manager keeps, beside ``DEVICE`` and the node's locks."""
NOT_RESTARTED = "a killed daemon is not restarted: this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9 has)"


def goes_on(inherited: Mapping[str, int]) -> bool:
    """Whether we go on with the mount of an earlier daemon."""
    return DEVICE in inherited and SESSION in inherited


def wait_to_go_on(inherited: Mapping[str, int]) -> int | None:
    """Wait until the daemon before us has ended; since when nobody serves, on the monotonic clock in nanoseconds.

    ``None`` where no supervisor says it. Raises ``SystemExit`` if it does not want us to go on, and ``DaemonError``
    for a session that we cannot read: as long as we have not said that we stand by, the daemon before us stays.
    """
    if GO not in inherited:
        return None
    if SESSION in inherited:
        Session(inherited[SESSION])
    notify("X_STANDBY=1")
    with open(inherited[GO], encoding="ascii") as pipe:
        since_ns = pipe.read()
    if not since_ns:
        raise SystemExit(1)
    return int(since_ns)


def serve(
    config: Config,
    mountpoint: Path,
    *,
    front: bool,
    threads: int | None,
    ready: Callable[[Sequence[str]], None],
    inherited: Mapping[str, int],
    since_ns: int | None = None,
) -> None:
    """Mount at ``mountpoint`` and serve it; ``ready`` is called once it can be used, with what its user should know.

    With the native ``front`` or without; ``threads`` as ``Mount`` has it. ``inherited`` is what the service manager
    kept of an earlier daemon, ``since_ns`` since when nobody serves. Returns when it was unmounted, or stopped by
    SIGTERM or SIGINT; everything is flushed by then. Does not return when it hands over to another daemon.
    """
    _allow_many_files()
    kept = Kept(inherited[DEVICE], inherited[SESSION]) if goes_on(inherited) else None
    with exclusive(config, holder={"pid": os.getpid(), "mountpoint": str(mountpoint)}, inherited=inherited) as locks:
        if not config.backends:
            config = create_default_backend(config)
        with ExitStack() as stack:
            if kept is None:
                node = stack.enter_context(open_node(config, all_backends=False))
            else:
                node = _open_patiently(config, stack)
            mount = Mount(node.composer, mountpoint, front=front, threads=threads, kept=kept)
            life = _Life(node, mount, ready, locks, inherited.get(CONTROL), since_ns, went_on=kept is not None)
            trio.run(life.live)
            notify("STOPPING=1")
            for name in life.left_with_manager:
                forget(name)
    log.info("ended", mountpoint=str(mountpoint))


def _open_patiently(config: Config, stack: ExitStack) -> Node:
    """The node, as soon as its store can be reached: there are programs that have files open, and they wait."""
    while True:
        try:
            return stack.enter_context(open_node(config, recover=False))
        except StoreUnavailable as error:
            log.error("cannot go on yet, it is tried again", error=str(error))
            time.sleep(STORE_RETRY_SECONDS)


@dataclass
class _Life:
    """From mounting to unmounting, on the trio thread."""

    node: Node
    mount: Mount
    ready: Callable[[Sequence[str]], None]
    locks: Mapping[str, int]
    control: int | None
    """The listening socket of the daemon before us."""
    since_ns: int | None
    went_on: bool
    left_with_manager: Sequence[str] = ()
    """The names of what the next daemon finds."""
    pause_ms: float | None = None

    async def live(self) -> None:
        started = time.monotonic()
        node, mount = self.node, self.mount
        with mount, trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:

            def status() -> Mapping[str, Any]:
                return {
                    "mountpoint": str(mount.mountpoint),
                    "daemon_pid": os.getpid(),
                    "supervisor_pid": supervisor_pid(),
                    "front": "on" if mount.front is not None else "off",
                    "backends": list(node.config.backends),
                    "open_volumes": sorted(volume.name for volume in node.composer.open_volumes()),
                    "uptime": time.monotonic() - started,
                    "pause_ms": self.pause_ms,
                    "pack_cache": asdict(cache) if (cache := node.composer.pack_cache()) is not None else None,
                }

            token = trio.lowlevel.current_trio_token()

            def changed(volume: str) -> None:
                trio.from_thread.run(mount.operations.invalidate, inode_of(VolumeId(volume)), trio_token=token)

            node.status, node.changed = status, changed
            try:
                await self._live_mounted(signals)
            except Exception:
                if not self._is_kept():
                    raise
                # To leave in order would unmount. So we end as if we were killed, and the next daemon goes on.
                log.exception("bug", pid=os.getpid())
                os._exit(FAILED_EXIT_CODE)

    async def _live_mounted(self, signals: AsyncIterator[int]) -> None:
        node, mount = self.node, self.mount
        listener = await control.listen(node.config.run_dir, self.control)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed, signals)
            nursery.start_soon(self._serve, nursery.cancel_scope)
            # Until then nobody else may believe that a volume is unused: neither commands nor recovery.
            await mount.initialised()
            nursery.start_soon(control.serve, node, listener)
            await self._is_ready(listener.socket.fileno())
            nursery.start_soon(_end_seals, node)
            self._start_chores(nursery)

    def _start_chores(self, nursery: trio.Nursery) -> None:
        """What is done now and then beside requests, each in a thread of its own, since it may have to wait."""
        node, composer = self.node, self.node.composer

        def watch_locks() -> None:
            for volume in composer.watch_locks():
                trio.from_thread.run(self.mount.operations.invalidate, inode_of(volume))

        def collect_garbage() -> None:
            collect_in_background(composer, list(node.upkeep.values()))

        recover = composer.recover if self.went_on else None
        nursery.start_soon(_every, HOUSEKEEPING_SECONDS, composer.reclaim, recover)
        composer.begin_watching_stores()
        nursery.start_soon(_every, HOUSEKEEPING_SECONDS, watch_locks)
        nursery.start_soon(_every, LOOK_SECONDS, composer.go_over_to_seals)
        nursery.start_soon(_once, composer.learn_packs)
        nursery.start_soon(_every, STORE_RETRY_SECONDS, node.look_for_away)
        if node.config.seal.background:
            sealing = BackgroundSealing(composer, node.config.seal)
            nursery.start_soon(_every, HOUSEKEEPING_SECONDS, sealing.seal_what_is_due)
        if node.config.gc.background:
            nursery.start_soon(_every, max(node.config.gc.every_seconds, HOUSEKEEPING_SECONDS), collect_garbage)

    async def _serve(self, life: trio.CancelScope) -> None:
        await self.mount.serve()
        life.cancel()

    async def _is_ready(self, control_fd: int) -> None:
        notes = [
            f"{error}; it is tried again, and its volumes are missing until then"
            for error in self.node.composer.away.values()
        ]
        for name, error in self.node.composer.away.items():
            log.warning("a backend is away", backend=name, error=str(error))
        kept = self.mount.kept
        if kept is not None:
            keep = {DEVICE: kept.device, SESSION: kept.session, CONTROL: control_fd, **self.locks}
            if await trio.to_thread.run_sync(_leave_with_manager, keep):
                self.left_with_manager = tuple(keep)
        elif self.mount.front is not None and supervisor_pid() is not None:
            notes.append(NOT_RESTARTED)
            log.warning(NOT_RESTARTED)
        if self.since_ns is not None:
            self.pause_ms = round((time.monotonic_ns() - self.since_ns) / 1e6, 1)
        event = "went on" if self.went_on else "mounted"
        pause = {"pause_ms": self.pause_ms} if self.pause_ms is not None else {}
        mountpoint = str(self.mount.mountpoint)
        log.info(event, mountpoint=mountpoint, pid=os.getpid(), backends=list(self.node.config.backends), **pause)
        # First the service manager: from the moment that our user knows of the mount, a death must not end it.
        await trio.to_thread.run_sync(notify, f"READY=1\nSTATUS=mounted at {mountpoint}")
        self.ready(notes)

    async def _heed(self, signals: AsyncIterator[int]) -> None:
        """SIGTERM and SIGINT stop us. So does SIGHUP, unless somebody keeps the mount: then the next daemon gets it."""
        async for number in signals:
            if number == signal.SIGHUP and self._is_kept():
                # Whatever ends meanwhile, as pyfuse3 does, must not have us unmount.
                with trio.CancelScope(shield=True):
                    async with trio.open_nursery() as watch:
                        # What waits until we are back in a store is to be answered too. What is lost the next daemon
                        # finds out when it opens it.
                        back = self.node.composer.return_to_stores
                        watch.start_soon(_every, HOUSEKEEPING_SECONDS, back, back)
                        await self.mount.hand_over()
                        log.info("handed over", pid=os.getpid())
                        os._exit(HANDED_OVER_EXIT_CODE)
            log.info("stopping", signal=signal.Signals(number).name)
            await self.mount.stop()

    def _is_kept(self) -> bool:
        alone = SUPERVISOR_PID in os.environ and supervisor_pid() is None
        return bool(self.left_with_manager) and not alone


def supervisor_pid() -> int | None:
    """The supervisor that started us; ``None`` if there is none, or it is gone."""
    parent = os.getppid()
    return parent if os.environ.get(SUPERVISOR_PID) == str(parent) else None


def _leave_with_manager(descriptors: Mapping[str, int]) -> bool:
    """Whether the service manager was given all of them."""
    return all(store(name, descriptor) for name, descriptor in descriptors.items())


async def _once(chore: Callable[[], object]) -> None:
    """Do a chore in a thread of its own. A bug in it is logged, and does not end the mount."""
    try:
        await trio.to_thread.run_sync(chore, limiter=trio.CapacityLimiter(1))
    except Exception:
        log.exception("bug", chore=chore.__name__)


async def _every(seconds: float, chore: Callable[[], object], first: Callable[[], object] | None = None) -> None:
    """Do a chore again and again, after a pause each time; before the first pause, ``first``."""
    if first is not None:
        await _once(first)
    while True:
        await trio.sleep(seconds)
        await _once(chore)


async def _end_seals(node: Node) -> None:
    """As soon as we are to end, have nobody go on sealing whom we would have to wait for."""
    try:
        await trio.sleep_forever()
    finally:
        node.composer.end_seals()


def _allow_many_files() -> None:
    """An open volume takes a few descriptors a layer: have as many as the system lets us."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
