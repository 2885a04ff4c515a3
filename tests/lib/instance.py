"""Private instances of archipfs for tests: mounted for real, killed, mounted again, and always taken away.

What is left behind when a test ends is looked at as well: the daemon's log must hold no bug, no traceback and no error
that the test did not declare, and ``archip check`` must find the store without errors.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import archipfs
from archipfs.blockers.contract import Blocker
from archipfs.blockers.registry import open_blocker
from archipfs.config import load_config
from archipfs.daemon.client import connect, connect_daemon
from archipfs.errors import ArchipError, DaemonError, ObjectMissing
from tests.lib.waiting import wait_until

TEMPORARY = Path("/var/tmp")
"""On a disk: /tmp may be a tmpfs, which has no O_DIRECT and forgets nothing that was not synced."""
COMMAND_SECONDS = 320.0
"""More than an unmount gives the daemon to end."""

_PACKAGE_PARENT = Path(archipfs.__file__).parents[1]

Completed = subprocess.CompletedProcess[str]
Place = Mapping[str, Any]
"""Where volumes lie, as arguments of ``Instance``; none: in a directory of the instance's own."""


def mount_type(mountpoint: Path) -> str | None:
    """The type of the file system on top there, as the kernel says it; ``None`` where nothing is mounted."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[4] == str(mountpoint):
            found = after.split(" ")[0]
    return found


def process_lives(pid: int) -> bool:
    """Whether a thread of the process runs; one that is dead and not reaped yet does not.

    The first thread may be dead for long while another one hangs in a system call and keeps the files open.
    """
    try:
        return any(_thread_lives(task) for task in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False  # the process went while its threads were listed


def _thread_lives(task: Path) -> bool:
    try:
        status = (task / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def kill_process(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_until(lambda: not process_lives(pid), f"process {pid} is gone")


class Instance:
    """One node in a directory of its own: ``root`` is its --root, ``path`` its mount point."""

    def __init__(
        self,
        *,
        store: Path | None = None,
        rados: Mapping[str, str] | None = None,
        front: bool = True,
        supervised: bool = False,
        prefix: Sequence[str] = (),
    ) -> None:
        """``store``: the directory of its default backend, where that is not its own; ``rados``: the options of one
        that is a pool. ``prefix``: what every command is started by, to have it run on another host.

        ``supervised``: a daemon that was killed is started again. Else the mount that it leaves is stale.
        """
        self.front = front
        self.supervised = supervised
        self._prefix = list(prefix)
        self.directory = Path(tempfile.mkdtemp(prefix="archipfs-test-", dir=TEMPORARY))
        self.root = self.directory / "root"
        self.path = self.directory / "mnt"
        self._rados = rados
        self._store = None if rados is not None else store or self.root / "state" / "store"
        self.checked_at_end = True
        """A test that damages its store on purpose says ``False`` here."""
        self._expected: list[re.Pattern[str]] = []
        self._log_start = 0
        self.root.mkdir()
        self.path.mkdir()
        options = {"driver": "rados", **rados} if rados is not None else {"driver": "file", "path": str(store)}
        if store is not None or rados is not None:
            words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
            try:
                self.archip("backend-create", "default", *words)
            except AssertionError:
                self.remove()  # nobody else knows of it yet
                raise

    @property
    def store(self) -> Path:
        """The directory that its volumes lie in."""
        assert self._store is not None, "its volumes lie in a pool"
        return self._store

    @property
    def place(self) -> Place:
        """That of another node on the same store."""
        return {"store": self._store} if self._rados is None else {"rados": self._rados}

    @contextmanager
    def blocker(self) -> Iterator[Blocker]:
        """Its store, opened beside the daemon to look into it."""
        driver = "file" if self._rados is None else "rados"
        blocker = open_blocker(driver, {"path": str(self._store)} if self._rados is None else self._rados)
        try:
            yield blocker
        finally:
            blocker.close()

    # The command line

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """``archip --root … ARGUMENT...``, not waited for."""
        return subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "archipfs.cli.main", "--root", str(self.root), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )

    def archip(self, *arguments: str | Path, check: bool = True, seconds: float = COMMAND_SECONDS) -> Completed:
        """Run ``archip --root … ARGUMENT...``. With ``check``, fail the test if the command fails."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError(f"archip {' '.join(map(str, arguments))} did not end in {seconds:.0f} s") from None
        done = Completed(process.args, process.returncode, out, err)
        if check:
            assert done.returncode == 0, f"archip {' '.join(map(str, arguments))}: {done.stderr.strip()}{done.stdout}"
        return done

    def json(self, *arguments: str) -> Any:
        """What a command answers with ``--format json``."""
        return json.loads(self.archip(*arguments, "--format", "json").stdout)

    def refused(self, *arguments: str | Path) -> str:
        """Run a command that has to fail, with one line on standard error, which is returned."""
        done = self.archip(*arguments, check=False)
        assert done.returncode != 0, f"archip {' '.join(map(str, arguments))} was not refused"
        lines = done.stderr.splitlines()
        assert len(lines) == 1, f"not one line: {done.stderr}"
        return lines[0]

    # Its life

    def mount(self) -> "Instance":
        options = f"front={_switch(self.front)},supervisor={_switch(self.supervised)}"
        self.archip("mount", "-o", options, self.path)
        return self

    def umount(self) -> None:
        self.archip("umount")

    def kill(self) -> None:
        """SIGKILL the daemon, with its supervisor if it has one, and wait until it is gone. The mount is stale then."""
        self.kill_supervisor()
        self.kill_daemon()

    def kill_daemon(self) -> int:
        """SIGKILL the daemon alone, and wait until it is gone; its process id. Its supervisor starts another one."""
        pid = self.daemon_pid()
        assert pid is not None, "there is no daemon to kill"
        kill_process(pid)
        return pid

    def kill_supervisor(self) -> None:
        """SIGKILL the supervisor, if there is one. The daemon goes on."""
        pid = self.supervisor_pid()
        if pid is not None:
            kill_process(pid)

    def remount(self) -> None:
        """Mount again, in order if the daemon runs, and with the one command if it was killed."""
        if self.daemon_pid() is not None:
            self.umount()
        self.mount()

    def daemon_pid(self) -> int | None:
        """The process that is this instance's daemon, by its lock file; ``None`` if it does not run."""
        try:
            pid = int(json.loads((self.root / "run" / "node.lock").read_text())["pid"])
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError, KeyError):
            return None
        ours = b"archipfs.daemon" in command and str(self.root).encode() in command
        return pid if ours and process_lives(pid) else None

    def wait_for_another_daemon(self, than: int) -> int:
        """Until a daemon that is not process ``than`` answers; its process id."""
        wait_until(lambda: self.daemon_pid() not in (None, than), f"another daemon than {than} serves")
        pid: int = self.call("status")["daemon_pid"]
        return pid

    def supervisor_pid(self) -> int | None:
        """The process that is this instance's supervisor; ``None`` if there is none."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"supervisor.py" in command and str(self.root).encode() in command and process_lives(int(process.name)):
                return int(process.name)
        return None

    # Looking

    def check(self) -> list[Mapping[str, Any]]:
        """What ``archip check`` finds; fails the test if anything of that is an error.

        Asked as the command does it, but in this process: to start another one takes longer than all that it does.
        """
        try:
            with connect(load_config(root=self.root), make_default_backend=True) as client:
                findings: list[Mapping[str, Any]] = client.call("check")
        except ArchipError as error:
            raise AssertionError(f"archip check: {error}") from None
        errors = [finding for finding in findings if finding["severity"] == "error"]
        assert not errors, f"archip check: {errors}"
        return findings

    def call(self, command: str, **arguments: Any) -> Any:
        """Ask the daemon as a command would, without starting one: that is some hundred times faster.

        Raises ``DaemonError`` where there is none, and whatever the command ends with.
        """
        daemon = connect_daemon(load_config(root=self.root))
        if daemon is None:
            raise DaemonError("there is no daemon")
        with daemon:
            return daemon.call(command, **arguments)

    def findings(self) -> list[Mapping[str, Any]]:
        """What the daemon finds wrong in the store."""
        findings: list[Mapping[str, Any]] = self.call("check")
        return findings

    def snapshot(self, volume: str, name: str) -> Path:
        """As ``archip volume-snapshot`` does it.

        The kernel lets no write to a file go on while an attribute of it is set, so this is the way in which writes
        really happen beside a snapshot.
        """
        self.call("volume-snapshot", name=volume, snapshot=name)
        return self.path / name

    def clone(self, source: str, name: str) -> Path:
        """As ``archip volume-clone`` does it."""
        self.call("volume-clone", name=source, clone=name)
        return self.path / name

    def stored_bytes(self) -> int:
        """What all data objects take in the store."""
        with self.blocker() as store:
            return sum(_allocated(store, key) for kind in ("bitmap", "layer") for key in store.list_data(kind))

    def packed_bytes(self) -> int:
        """How long all packs are together."""
        with self.blocker() as store:
            return sum(len(store.get(key)) for key in store.list("pack"))

    def log_lines(self) -> list[str]:
        """What was logged since the test began."""
        path = self.root / "state" / "daemon.log"
        return path.read_text(errors="replace").splitlines()[self._log_start :] if path.exists() else []

    def logged(self, text: str) -> bool:
        """Whether any line of the log has ``text`` in it."""
        return any(text in line for line in self.log_lines())

    def expect_log(self, pattern: str) -> None:
        """Lines that match ``pattern`` may be errors. A bug is never expected."""
        self._expected.append(re.compile(pattern))

    def log_problems(self) -> list[str]:
        """Lines of the log that a daemon should not have written in this test."""
        return [line for line in self.log_lines() if _is_problem(line) and not self._is_expected(line)]

    def _is_expected(self, line: str) -> bool:
        return not _is_bug(line) and any(pattern.search(line) for pattern in self._expected)

    # The end

    def take_down(self) -> list[str]:
        """Unmount, however that can be done; what went wrong with that. Never raises."""
        problems = []
        for step in (self._unmount_in_order, self._unmount_by_force):
            try:
                step()
            except (AssertionError, TimeoutError, OSError, subprocess.SubprocessError) as error:
                problems.append(f"{step.__name__.strip('_')}: {error}")
        return problems

    def verdict(self) -> list[str]:
        """What is wrong with what is left, log and store. Never raises."""
        problems = [f"daemon log: {line[:3000]}" for line in self.log_problems()]
        if self.checked_at_end:
            try:
                self.check()
            except (AssertionError, OSError, ValueError) as error:
                problems.append(str(error))
        return problems

    def empty(self) -> list[str]:
        """Ready for the next test: mounted, without a volume, lock or expectation. What is wrong before that."""
        if self.daemon_pid() is None:
            self.mount()
        problems = [f"daemon log: {line[:3000]}" for line in self.log_problems()]
        problems += [f"archip check: {each}" for each in self.findings() if each["severity"] == "error"]
        for volume in self.path.iterdir():
            os.setxattr(volume, "user.archip.unlock", b"")
            volume.unlink()
        self._expected.clear()
        self._log_start += len(self.log_lines())
        return problems

    def remove(self) -> None:
        """Delete all of it, unless something is still mounted there."""
        if mount_type(self.path) is None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _unmount_in_order(self) -> None:
        if self.daemon_pid() is not None:
            self.archip("umount")

    def _unmount_by_force(self) -> None:
        self.kill_supervisor()
        pid = self.daemon_pid()
        if pid is not None:
            kill_process(pid)
        while mount_type(self.path) is not None:
            subprocess.run(["umount", "-l", self.path], check=True, capture_output=True, timeout=COMMAND_SECONDS)

    def environment(self) -> dict[str, str]:
        """That of the processes that belong to it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ARCHIPFS_")}
        paths = [str(_PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _is_bug(line: str) -> bool:
    return '"event": "bug"' in line or "this is a bug" in line


def _is_problem(line: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return True  # a traceback, or something that went around the log
    return _is_bug(line) or entry.get("level") in ("error", "critical") or "exception" in entry


def _allocated(store: Blocker, key: str) -> int:
    try:
        data = store.open_data(key, writable=False)
    except ObjectMissing:
        return 0  # it went after it was listed
    try:
        return data.allocated()
    finally:
        data.close()


@contextmanager
def instances(new_place: Callable[[], Place] = dict) -> Iterator[Callable[..., Instance]]:
    """A function that makes instances, which are not mounted yet; arguments as for ``Instance``.

    ``new_place`` says where the volumes of one lie that is not told where. Behind the block all of them are unmounted
    and removed; it fails if a log or a store is not as it should be.
    """
    made: list[Instance] = []

    def make(**options: Any) -> Instance:
        place = {} if {"store", "rados"} & options.keys() else new_place()
        made.append(Instance(**place, **options))
        return made[-1]

    try:
        yield make
    finally:
        problems = [problem for instance in made for problem in instance.take_down()]
        problems += [problem for instance in made for problem in instance.verdict()]
        for instance in made:
            instance.remove()
    assert not problems, "\n".join(problems)
