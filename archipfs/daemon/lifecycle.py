"""Mounting and unmounting as a command does it: start the daemon and wait until it is ready, or until it is gone."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import structlog

from archipfs import errors
from archipfs.config import Config, load_config
from archipfs.daemon.client import DaemonClient, connect_daemon
from archipfs.daemon.logs import configure_logs
from archipfs.daemon.node import exclusive, make_directory
from archipfs.daemon.process import serve
from archipfs.endpoints.fuse.mount import FS_TYPE, is_stale, mounted_at
from archipfs.errors import ArchipError, Busy, DaemonError, NotFound

log = structlog.get_logger()

END_SECONDS = 60.0
"""How long an unmount may take to flush before we stop waiting for it."""
READY = "ready"


def mount(config: Config, mountpoint: Path, *, foreground: bool, front: bool, threads: int | None) -> None:
    """Mount at ``mountpoint``; return when it is ready, or with ``foreground`` when it ends.

    A mount that a crashed daemon left there is taken away first. Raises ``Busy`` for a mount point or a node in use,
    ``NotFound`` for a directory that is not there, and what the daemon could not start for.
    """
    mountpoint = Path(os.path.abspath(mountpoint))
    _clear(mountpoint)
    if foreground:
        configure_logs()
        serve(config, mountpoint, front=front, threads=threads, ready=lambda: None)
    else:
        _start_daemon(config, mountpoint, front=front, threads=threads)


def umount(config: Config, mountpoint: Path | None) -> None:
    """Unmount, and wait until the daemon has flushed everything and ended.

    Without a mount point, that of this configuration's daemon. Raises ``Busy`` if files in it are open.
    """
    connection = connect_daemon(config)
    if connection is None:
        _take_away_stale(config, mountpoint)
        return
    with connection:
        ours = Path(DaemonClient(connection).call("status")["mountpoint"])
    if mountpoint is not None and os.path.abspath(mountpoint) != str(ours):
        raise NotFound(f"{mountpoint} is not mounted from here, {ours} is; see `archip status`")
    _unmount(ours, lazy=False)
    with exclusive(config, holder={"pid": os.getpid()}, wait_seconds=END_SECONDS, wait_for_daemon=True):
        return


def _take_away_stale(config: Config, mountpoint: Path | None) -> None:
    if mountpoint is None:
        raise NotFound(f"nothing is mounted from {config.run_dir}; see `archip status`")
    mountpoint = Path(os.path.abspath(mountpoint))
    if is_stale(mountpoint):
        _unmount(mountpoint, lazy=True)
    elif mounted_at(mountpoint) == FS_TYPE:
        raise NotFound(f"{mountpoint} is mounted by another instance; give the --root or --config it was mounted with")
    else:
        raise NotFound(f"{mountpoint} is not an archipfs mount; see `archip status`")


def run_daemon(arguments: Sequence[str]) -> None:
    """The daemon's side of ``mount``: its configuration, its mount point, and the pipe to be told ready on."""
    request = json.loads(arguments[0])
    configure_logs()
    root = request["root"]
    config = (
        load_config(root=Path(root))
        if root
        else load_config(path=Path(request["config"]) if request["config"] else None)
    )
    pipe = os.fdopen(request["ready_fd"], "w")
    try:
        serve(
            config,
            Path(request["mountpoint"]),
            front=request["front"],
            threads=request["threads"],
            ready=lambda: _tell(pipe, READY),
        )
    except ArchipError as error:
        if pipe.closed:
            log.error("ended by an error", error=str(error))
        else:
            _tell(pipe, json.dumps({"type": type(error).__name__, "message": str(error)}))
        raise SystemExit(1) from error


def _tell(pipe: TextIO, line: str) -> None:
    pipe.write(line + "\n")
    pipe.close()


def _clear(mountpoint: Path) -> None:
    if is_stale(mountpoint):
        _unmount(mountpoint, lazy=True)
    if not mountpoint.is_dir():
        what = "is not a directory" if mountpoint.exists() else "does not exist"
        raise NotFound(f"mount point {mountpoint} {what}; make it with mkdir")
    fs_type = mounted_at(mountpoint)
    if fs_type is not None:
        raise Busy(f"mount point {mountpoint} is in use: {fs_type} is mounted there; unmount it or choose another")


def _start_daemon(config: Config, mountpoint: Path, *, front: bool, threads: int | None) -> None:
    make_directory(config.state_dir)
    log_path = config.state_dir / "daemon.log"
    reading, writing = os.pipe()
    try:
        request = json.dumps(
            {
                "root": str(config.root) if config.root else None,
                "config": str(config.path) if config.path.exists() else None,
                "mountpoint": str(mountpoint),
                "front": front,
                "threads": threads,
                "ready_fd": writing,
            }
        )
        with open(log_path, "ab") as log_file:
            subprocess.Popen(
                [sys.executable, "-m", "archipfs.daemon", request],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                pass_fds=[writing],
                cwd="/",
            )
    finally:
        os.close(writing)
    with os.fdopen(reading) as pipe:
        line = pipe.readline().strip()
    if line == READY:
        return
    if not line:
        raise DaemonError(f"the daemon died while it started; see {log_path}")
    failure = json.loads(line)
    raise getattr(errors, failure["type"], ArchipError)(failure["message"])


def _unmount(mountpoint: Path, *, lazy: bool) -> None:
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), str(mountpoint)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), str(mountpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().replace("\n", " ")
        if "busy" in said:
            raise Busy(f"{mountpoint} is in use; close the files in it (`fuser -vm {mountpoint}` shows who has them)")
        raise DaemonError(f"cannot unmount {mountpoint}: {said}")
