"""Processes beside us, and what they cost: CPU time and memory as /proc has them."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
INSTALL_TIMEOUT_S = 600.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class CannotRun(Exception):
    """A target or a tool is not to be had on this machine."""


def run(*command: str | Path, timeout_s: float = START_TIMEOUT_S, more_env: Mapping[str, str] | None = None) -> str:
    """Run to the end; its output. Raises ``CannotRun`` with what it said."""
    env = {**os.environ, **(more_env or {})}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, env=env
        )
    except FileNotFoundError:
        raise CannotRun(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise CannotRun(f"{shlex.join(map(str, command))} took longer than {timeout_s:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CannotRun(f"{command[0]} ended with status {done.returncode}: {said[-1] if said else 'no message'}")
    return done.stdout.strip()


def install(*packages: str) -> None:
    """Debian's packages, those that are missing. Raises ``CannotRun``."""
    quiet = ("apt-get", "-q", "-q", "-o", "DPkg::Lock::Timeout=300")
    run(*quiet, "update", timeout_s=INSTALL_TIMEOUT_S)
    run(*quiet, "install", "--yes", "--no-install-recommends", *packages, timeout_s=INSTALL_TIMEOUT_S)


@contextmanager
def process(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process beside us that is gone afterwards: asked first, killed if it does not listen."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise CannotRun(f"{command[0]} is not installed") from None
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def wait_until(ready: Callable[[], bool], child: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if child.poll() is not None:
            raise CannotRun(f"{what} ended with status {child.returncode}")
        if time.monotonic() > deadline:
            raise CannotRun(f"{what} was not ready in {START_TIMEOUT_S:.0f} s")
        time.sleep(0.02)


def unmount_lazily(mountpoint: Path) -> None:
    if mountpoint.is_mount():
        subprocess.run(["umount", "--lazy", mountpoint], stdin=subprocess.DEVNULL, check=False)


# What they cost

CpuTimes = dict[int, float]
"""Process id to seconds of CPU time, user and system, since it began."""


def _cpu_of(pid: int) -> tuple[str, float]:
    """Name and CPU seconds of a process, all its threads together; see proc_pid_stat(5)."""
    head, _, tail = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    user, system = tail.split()[11:13]
    return head.partition("(")[2], (int(user) + int(system)) / TICKS_PER_SECOND


def _every_process() -> Iterator[tuple[int, str, float]]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            name, seconds = _cpu_of(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        yield int(entry), name, seconds


@dataclass(frozen=True)
class Servers:
    """Who serves a target: processes of ours, or the kernel's workers.

    All kernel workers count as the loop device's, since it has none of its own: their write-back is among it, for the
    other targets it is not.
    """

    pids: tuple[int, ...] = ()
    kernel_workers: bool = False

    def cpu(self) -> CpuTimes:
        if self.kernel_workers:
            return {pid: seconds for pid, name, seconds in _every_process() if name.startswith("kworker/")}
        return {pid: _cpu_of(pid)[1] for pid in self.pids}

    def memory(self) -> "Memory | None":
        """All processes together; ``None`` where the kernel serves."""
        if self.kernel_workers:
            return None
        return Memory.sum(Memory.of(pid) for pid in self.pids)

    def peak_bytes(self) -> int:
        """The most memory that they ever had resident, together."""
        return sum(_kilobytes(Path(f"/proc/{pid}/status"))["VmHWM"] for pid in self.pids)


def cpu_between(before: CpuTimes, after: CpuTimes) -> float:
    """Seconds. Who was not there before began at zero; who is not there any more is not counted."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def machine_cpu_s() -> float:
    """Seconds that all processors together were not idle since the machine started; see proc_stat(5)."""
    first = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = map(int, first.split()[1:9])
    return (user + nice + system + irq + softirq) / TICKS_PER_SECOND


@dataclass(frozen=True)
class Memory:
    """Of processes, in bytes. The proportional set counts a page that n processes share as 1/n."""

    resident: int
    proportional: int
    anonymous: int
    """Of the resident: its own. The rest are files and shared memory: programs, live bitmaps."""

    @classmethod
    def of(cls, pid: int) -> "Memory":
        rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
        return cls(rollup["Rss"], rollup["Pss"], rollup["Anonymous"])

    @classmethod
    def sum(cls, parts: "Iterator[Memory]") -> "Memory":
        each = list(parts)
        return cls(
            sum(part.resident for part in each),
            sum(part.proportional for part in each),
            sum(part.anonymous for part in each),
        )


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines ``Name: n kB`` of a file, in bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if len(words) == 3 and words[2] == "kB"}
