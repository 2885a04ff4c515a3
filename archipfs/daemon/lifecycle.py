"""Mounting and unmounting as a command does it: start the daemon and wait until it is ready, or until it is gone."""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from archipfs import errors
from archipfs.config import Config, load_config
from archipfs.daemon.client import connect_daemon
from archipfs.daemon.logs import configure_logs
from archipfs.daemon.node import exclusive, make_directory
from archipfs.daemon.process import goes_on, serve, wait_to_go_on
from archipfs.daemon.sd_notify import take_inherited
from archipfs.daemon.supervisor import SOCKET_NAME as UPGRADE_SOCKET_NAME
from archipfs.daemon.supervisor import __file__ as supervisor_program
from archipfs.endpoints.fuse.mount import FS_TYPE, is_stale, mounted_at
from archipfs.errors import ArchipError, Busy, DaemonError, NotFound, NotSupported, exit_code_of

log = structlog.get_logger()

END_SECONDS = 300.0
"""How long an unmount may take to flush before we stop waiting for it."""
UPGRADE_SECONDS = 60.0
"""How long a supervisor may take to answer; it sets itself shorter limits."""


def mount(
    config: Config, mountpoint: Path, *, foreground: bool, front: bool, supervised: bool, threads: int | None
) -> Sequence[str]:
    """Mount at ``mountpoint``; return when it is ready, with what its user should know.

    With ``foreground``, return when it ends, or not at all if it is ``supervised``: then we become the supervisor. A
    mount that a crashed daemon left there is taken away first. Raises ``Busy`` for a mount point or a node in use,
    ``NotFound`` for a directory that is not there, and what the daemon could not start for.
    """
    mountpoint = Path(os.path.abspath(mountpoint))
    inherited = take_inherited() if foreground else {}
    if not goes_on(inherited):
        _clear(mountpoint)
    daemon = _daemon_command(config, mountpoint, foreground=foreground, front=front, threads=threads)
    if foreground and supervised:
        make_directory(config.run_dir)
        supervisor = _supervisor_command(config, mountpoint, daemon, log_path="what is written here")
        os.execv(supervisor[0], supervisor)
    if foreground:
        configure_logs()
        serve(config, mountpoint, front=front, threads=threads, ready=lambda notes: None, inherited=inherited)
        return ()
    make_directory(config.state_dir)
    make_directory(config.run_dir)
    log_path = config.state_dir / "daemon.log"
    command = _supervisor_command(config, mountpoint, daemon, str(log_path)) if supervised else daemon
    return _start(command, log_path)


def umount(config: Config, mountpoint: Path | None) -> None:
    """Unmount, and wait until the daemon has flushed everything and ended, and its supervisor with it.

    Without a mount point, that of this configuration's daemon. Raises ``Busy`` if files in it are open.
    """
    daemon = connect_daemon(config)
    if daemon is None:
        _take_away_stale(config, mountpoint)
        return
    with daemon:
        status = daemon.call("status")
    ours = Path(status["mountpoint"])
    if mountpoint is not None and os.path.abspath(mountpoint) != str(ours):
        raise NotFound(f"{mountpoint} is not mounted from here, {ours} is; see `archip status`")
    with _waiting_for_end(status["supervisor_pid"]):
        _unmount(ours, lazy=False)
        try:
            with exclusive(config, holder={"pid": os.getpid()}, wait_seconds=END_SECONDS, wait_for_daemon=True):
                pass
        except Busy:
            raise Busy(
                f"{ours} is unmounted, but the daemon, process {status['daemon_pid']}, has not ended in "
                f"{END_SECONDS:.0f} s; it does when its stores have answered, or have not in their time: see its log"
            ) from None


@contextmanager
def _waiting_for_end(pid: int | None) -> Iterator[None]:
    """Behind the block, wait until a process that is not our child has ended too."""
    if pid is None:
        yield
        return
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield
        return
    try:
        yield
        if not select.select([pidfd], [], [], END_SECONDS)[0]:
            raise Busy(f"the supervisor, process {pid}, does not end; see the daemon's log")
    finally:
        os.close(pidfd)


@dataclass(frozen=True, slots=True)
class Upgraded:
    old_pid: int
    new_pid: int
    pause_ms: float
    """How long nobody served, in milliseconds."""


def upgrade(config: Config) -> Upgraded:
    """Have the daemon replaced by one with the code that is installed now, under the mount.

    Raises ``NotFound`` if nothing is mounted, ``NotSupported`` if there is no supervisor, ``DaemonError`` if the new
    daemon fails: the old one goes on then.
    """
    daemon = connect_daemon(config)
    if daemon is None:
        raise NotFound(f"nothing is mounted from {config.run_dir}; see `archip status`")
    with daemon:
        status = daemon.call("status")
    if status["supervisor_pid"] is None:
        raise NotSupported(f"daemon {status['daemon_pid']} has no supervisor to replace it; unmount and mount again")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking, asking.makefile() as answers:
            asking.settimeout(UPGRADE_SECONDS)
            asking.connect(str(config.run_dir / UPGRADE_SOCKET_NAME))
            line = answers.readline()
    except OSError as error:
        raise DaemonError(f"cannot reach the supervisor, process {status['supervisor_pid']}: {error}") from error
    answer: Mapping[str, Any] = json.loads(line) if line else {"error": "the supervisor died"}
    if "error" in answer:
        raise DaemonError(f"not upgraded: {answer['error']}; {_who_serves(config)}")
    return Upgraded(answer["old"], answer["new"], answer["pause_ms"])


def _who_serves(config: Config) -> str:
    daemon = connect_daemon(config)
    if daemon is None:
        return "nobody serves the mount any more, see the daemon's log and mount again"
    with daemon:
        status = daemon.call("status")
    return f"{status['mountpoint']} is still served, by daemon {status['daemon_pid']}; see its log"


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
    """The daemon's side of ``mount``: the request that ``_daemon_command`` wrote, and what was inherited."""
    request = json.loads(arguments[0])
    configure_logs()
    inherited = take_inherited()
    report = _Report(foreground=request["foreground"], first=not goes_on(inherited))
    try:
        config = _config_of(request)
        serve(
            config,
            Path(request["mountpoint"]),
            front=request["front"],
            threads=request["threads"],
            ready=report.ready,
            since_ns=wait_to_go_on(inherited),
            inherited=inherited,
        )
    except ArchipError as error:
        report.failed(error)
        raise SystemExit(exit_code_of(error)) from error


def _config_of(request: Mapping[str, Any]) -> Config:
    if request["root"]:
        return load_config(root=Path(request["root"]))
    return load_config(path=Path(request["config"]) if request["config"] else None)


class _Report:
    """What becomes of the start: a line of JSON on standard output for ``_start``; in the foreground, for people.

    Where nobody waits for it, because the mount is there already, the log has it.
    """

    def __init__(self, *, foreground: bool, first: bool) -> None:
        self._awaited = first
        self._foreground = foreground

    def ready(self, notes: Sequence[str]) -> None:
        if self._awaited and not self._foreground:
            self._tell({"ready": True, "notes": list(notes)})
        self._awaited = False

    def failed(self, error: ArchipError) -> None:
        if not self._awaited:
            log.error("ended by an error", error=str(error))
        elif self._foreground:
            print(f"archip: {error}", file=sys.stderr)
        else:
            self._tell({"ready": False, "type": type(error).__name__, "message": str(error)})

    def _tell(self, line: Mapping[str, Any]) -> None:
        """Standard output goes where the log goes from here on, so that the reader sees its end."""
        os.write(1, json.dumps(line).encode() + b"\n")
        os.dup2(2, 1)


def _clear(mountpoint: Path) -> None:
    if is_stale(mountpoint):
        _unmount(mountpoint, lazy=True)
    if not mountpoint.is_dir():
        what = "is not a directory" if mountpoint.exists() else "does not exist"
        raise NotFound(f"mount point {mountpoint} {what}; make it with mkdir")
    fs_type = mounted_at(mountpoint)
    if fs_type is not None:
        raise Busy(f"mount point {mountpoint} is in use: {fs_type} is mounted there; unmount it or choose another")


def _daemon_command(
    config: Config, mountpoint: Path, *, foreground: bool, front: bool, threads: int | None
) -> list[str]:
    request = {
        "root": str(config.root) if config.root else None,
        "config": str(config.path) if config.path.exists() else None,
        "mountpoint": str(mountpoint),
        "front": front,
        "threads": threads,
        "foreground": foreground,
    }
    return [sys.executable, "-m", "archipfs.daemon", json.dumps(request)]


def _supervisor_command(config: Config, mountpoint: Path, daemon: list[str], log_path: str) -> list[str]:
    """It needs nothing that is installed, and nothing of the environment: less to load, and nothing to load later."""
    plan = {"command": daemon, "mountpoint": str(mountpoint), "run_dir": str(config.run_dir), "log": log_path}
    return [sys.executable, "-I", "-S", supervisor_program, json.dumps(plan)]


def _start(command: Sequence[str], log_path: Path) -> Sequence[str]:
    """Start a daemon, or its supervisor, in the background, and wait for the daemon's report."""
    with open(log_path, "ab") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,
            cwd="/",
        )
    assert process.stdout is not None
    with process.stdout as pipe:
        line = pipe.readline()
    if not line:
        raise DaemonError(f"the daemon died while it started; see {log_path}")
    report = json.loads(line)
    if report["ready"]:
        return tuple(report["notes"])
    raise getattr(errors, report["type"], ArchipError)(report["message"])


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
