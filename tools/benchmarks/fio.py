"""Running fio, and what it says."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import CannotRun, run

FILL_TIMEOUT_S = 600.0
GRACE_S = 60.0
PERCENTILES = ("50.000000", "99.000000", "99.900000")


@dataclass(frozen=True)
class Job:
    name: str
    mode: str
    block: str
    depth: int
    fsync: bool = False
    """An fsync after each write."""
    once: bool = False
    """From one end to the other and no more, however long that takes."""

    @property
    def unit(self) -> str:
        return "MiB/s" if self.block == "1m" else "IOPS"


@dataclass(frozen=True)
class RbdImage:
    """An image that fio's rbd engine opens by itself."""

    conf: Path
    pool: str
    name: str

    @property
    def arguments(self) -> list[str]:
        return ["--ioengine=rbd", "--clientname=admin", f"--pool={self.pool}", f"--rbdname={self.name}"]

    @property
    def environment(self) -> dict[str, str]:
        return {"CEPH_CONF": str(self.conf)}


Place = Path | RbdImage
"""What fio works on."""


def arguments_of(place: Place) -> list[str]:
    if isinstance(place, RbdImage):
        return place.arguments
    return [f"--filename={place}", "--ioengine=libaio", "--direct=1"]


def environment_of(place: Place) -> dict[str, str]:
    return place.environment if isinstance(place, RbdImage) else {}


def command(place: Place, job: Job, size_bytes: int, seconds: float) -> list[str]:
    return [
        "fio",
        *("--name=bench", *arguments_of(place), "--thread"),
        *(f"--rw={job.mode}", f"--bs={job.block}", f"--iodepth={job.depth}", f"--size={size_bytes}"),
        *([] if job.once else ["--time_based", f"--runtime={round(seconds * 1e3)}ms"]),
        *("--norandommap", "--randrepeat=0"),
        *("--output-format=json", "--lat_percentiles=1", f"--percentile_list={':'.join(PERCENTILES)}"),
        *(["--fsync=1"] if job.fsync else []),
    ]


@dataclass(frozen=True)
class Latency:
    """Write latencies of one run, in microseconds."""

    p50: float
    p99: float
    p999: float
    longest: float


@dataclass(frozen=True)
class Result:
    requests: int
    per_second: float
    writes: Latency

    @classmethod
    def of(cls, output: str) -> "Result":
        """Of the one job. fio may put warnings before its JSON."""
        job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
        if job["error"]:
            raise CannotRun(f"fio: {os.strerror(job['error'])}")
        latency = job["write"]["lat_ns"]
        percentiles = latency.get("percentile", {})
        p50, p99, p999 = (percentiles.get(key, 0) for key in PERCENTILES)
        return cls(
            requests=job["read"]["total_ios"] + job["write"]["total_ios"],
            per_second=job["read"]["iops"] + job["write"]["iops"],
            writes=Latency(p50 / 1e3, p99 / 1e3, p999 / 1e3, latency["max"] / 1e3),
        )


def fio(place: Place, job: Job, size_bytes: int, seconds: float) -> Result:
    done = command(place, job, size_bytes, seconds)
    return Result.of(run(*done, timeout_s=seconds + GRACE_S, more_env=environment_of(place)))


class Running:
    """A job that goes on until its time is over or somebody has it end."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def ended(self) -> bool:
        return self._child.poll() is not None

    def end(self) -> Result:
        """End it now; what it did so far."""
        self._child.send_signal(signal.SIGINT)
        return self.result(GRACE_S)

    def result(self, timeout_s: float) -> Result:
        output, _ = self._child.communicate(timeout=timeout_s)
        return Result.of(output)


@contextmanager
def running(path: Path, job: Job, size_bytes: int, seconds: float) -> Iterator[Running]:
    child = subprocess.Popen(
        command(path, job, size_bytes, seconds), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Running(child)
    finally:
        child.kill()
        child.wait()


def fill(place: Place, size_bytes: int) -> None:
    """Write all of it once, so that nobody is measured on holes."""
    options = ("--name=fill", "--rw=write", "--bs=1m", f"--size={size_bytes}", "--end_fsync=1", "--thread")
    engine = arguments_of(place) if isinstance(place, RbdImage) else [f"--filename={place}", "--ioengine=psync"]
    run("fio", *options, *engine, timeout_s=FILL_TIMEOUT_S, more_env=environment_of(place))


def write_some(path: Path, size_bytes: int, seconds: float) -> None:
    """4 KiB here and there over the whole volume."""
    fio(path, Job("some writes", "randwrite", "4k", 1), size_bytes, seconds)


def write_count(path: Path, size_bytes: int, count: int, depth: int) -> None:
    """So many random writes of 4 KiB over the whole volume."""
    options = ("--name=count", f"--filename={path}", "--rw=randwrite", "--bs=4k", f"--size={size_bytes}")
    more = ("--ioengine=libaio", "--direct=1", "--thread", f"--iodepth={depth}", f"--number_ios={count}")
    run("fio", *options, *more, "--norandommap", "--randrepeat=0", timeout_s=FILL_TIMEOUT_S)
