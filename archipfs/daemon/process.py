"""The daemon's life: be the node, mount, serve until unmounted or told to stop, flush, give the locks back."""

import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import trio

from archipfs.config import Config
from archipfs.daemon import control
from archipfs.daemon.node import Node, create_default_backend, exclusive, open_node
from archipfs.daemon.sd_notify import notify
from archipfs.endpoints.fuse.inodes import inode_of
from archipfs.endpoints.fuse.mount import Mount
from archipfs.types import VolumeId

log = structlog.get_logger()

HOUSEKEEPING_SECONDS = 1.0


def serve(config: Config, mountpoint: Path, *, front: bool, threads: int | None, ready: Callable[[], None]) -> None:
    """Mount at ``mountpoint`` and serve it; ``ready`` is called once it can be used.

    With the native ``front`` or without; ``threads`` as ``Mount`` has it. Returns when it was unmounted, or
    stopped by SIGTERM or SIGINT; everything is flushed by then.
    """
    _allow_many_files()
    with exclusive(config, holder={"pid": os.getpid(), "mountpoint": str(mountpoint)}):
        if not config.backends:
            config = create_default_backend(config)
        with open_node(config) as node:
            trio.run(_serve, node, Mount(node.composer, mountpoint, front=front, threads=threads), ready)
            notify("STOPPING=1")
    log.info("ended", mountpoint=str(mountpoint))


async def _serve(node: Node, mount: Mount, ready: Callable[[], None]) -> None:
    started = time.monotonic()
    mountpoint = mount.mountpoint
    with mount:

        def status() -> Mapping[str, Any]:
            return {
                "mountpoint": str(mountpoint),
                "daemon_pid": os.getpid(),
                "supervisor_pid": None,
                "front": "on" if mount.front is not None else "off",
                "backends": list(node.config.backends),
                "open_volumes": sorted(volume.name for volume in node.composer.open_volumes()),
                "uptime": time.monotonic() - started,
            }

        token = trio.lowlevel.current_trio_token()

        def changed(volume: str) -> None:
            trio.from_thread.run(mount.operations.invalidate, inode_of(VolumeId(volume)), trio_token=token)

        node.status, node.changed = status, changed
        listener = await control.listen(node.config.run_dir)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.serve, node, listener)
            nursery.start_soon(_stop_on_signal, mount)
            nursery.start_soon(_reclaim_space, node)
            nursery.start_soon(_watch_locks, node, mount)
            log.info("mounted", mountpoint=str(mountpoint), pid=os.getpid(), backends=list(node.config.backends))
            ready()
            notify(f"READY=1\nSTATUS=mounted at {mountpoint}")
            await mount.serve()
            nursery.cancel_scope.cancel()


async def _stop_on_signal(mount: Mount) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("stopping", signal=signal.Signals(number).name)
            await mount.stop()


async def _reclaim_space(node: Node) -> None:
    """Every now and then delete what removed volumes have left."""
    threads = trio.CapacityLimiter(1)
    while True:
        await trio.sleep(HOUSEKEEPING_SECONDS)
        try:
            await trio.to_thread.run_sync(node.composer.reclaim, limiter=threads)
        except Exception:
            log.exception("bug", chore="reclaim")


async def _watch_locks(node: Node, mount: Mount) -> None:
    """Every now and then see whether others have broken our locks, and have the kernel forget what it caches then."""
    threads = trio.CapacityLimiter(1)
    while True:
        await trio.sleep(HOUSEKEEPING_SECONDS)
        try:
            for volume in await trio.to_thread.run_sync(node.composer.verify_leases, limiter=threads):
                await mount.operations.invalidate(inode_of(volume))
        except Exception:
            log.exception("bug", chore="watch locks")


def _allow_many_files() -> None:
    """An open volume takes a few descriptors a layer: have as many as the system lets us."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
