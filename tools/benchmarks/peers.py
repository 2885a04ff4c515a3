"""``tools/bench fio``: the same jobs for archipfs and its peers, their CPU time, and their memory in the end."""

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.fio import Job, fio
from benchmarks.processes import CannotRun, cpu_between, machine_cpu_s
from benchmarks.report import GIB, MIB, load_now, markdown_table, median, ratio, report
from benchmarks.targets import TARGETS, Bench, Target

JOBS = (
    Job("4k random read, depth 1", "randread", "4k", 1),
    Job("4k random read, depth 16", "randread", "4k", 16),
    Job("4k random write, depth 1", "randwrite", "4k", 1),
    Job("4k random write, depth 16", "randwrite", "4k", 16),
    Job("4k random write + fsync, depth 1", "randwrite", "4k", 1, fsync=True),
    Job("1m read, depth 4", "read", "1m", 4),
    Job("1m write, depth 4", "write", "1m", 4),
)


@dataclass(frozen=True)
class Sample:
    per_second: float
    serving_us: float
    """CPU time that the serving processes took for a request."""
    machine_us: float
    """CPU time that the whole machine took for a request."""


FAILED = Sample(math.nan, math.nan, math.nan)
Samples = dict[str, dict[str, list[Sample]]]
"""Job name to target name to one result a round."""


def take(target: Target, job: Job, size_bytes: int, seconds: float) -> Sample:
    cpu, machine_s = target.servers.cpu(), machine_cpu_s()
    result = fio(target.path, job, size_bytes, seconds)
    machine_s, serving_s = machine_cpu_s() - machine_s, cpu_between(cpu, target.servers.cpu())
    return Sample(result.per_second, ratio(serving_s, result.requests) * 1e6, ratio(machine_s, result.requests) * 1e6)


def measure(targets: dict[str, Target], size_bytes: int, seconds: float, rounds: int) -> Samples:
    samples: Samples = {job.name: {name: [] for name in targets} for job in JOBS}
    for count in range(rounds):
        for job in JOBS:
            for name, target in targets.items():
                label = f"round {count + 1}/{rounds}  {job.name:32} {name:20}"
                try:
                    sample = take(target, job, size_bytes, seconds)
                except CannotRun as error:
                    sample = FAILED
                    print(f"{label} failed: {error}", file=sys.stderr)
                else:
                    print(f"{label} {sample.per_second:10,.0f} {job.unit}", file=sys.stderr)
                samples[job.name][name].append(sample)
    return samples


def speed_table(samples: Samples, names: list[str]) -> str:
    """A column of medians for each target, then the first target's ratio to each other: the median over the rounds."""
    first, *others = names
    rows = []
    for job in JOBS:
        speeds = {name: [sample.per_second for sample in samples[job.name][name]] for name in names}
        cells = [median(speeds[name], ",.0f") for name in names]
        ratios = [median(map(ratio, speeds[first], speeds[name]), ".2f") for name in others]
        rows.append([f"{job.name}, {job.unit}", *cells, *ratios])
    return markdown_table(["job", *names, *(f"{first} : {name}" for name in others)], rows)


def cpu_table(samples: Samples, names: list[str]) -> str:
    def cells(job: Job, value: Callable[[Sample], float]) -> list[str]:
        return [median(map(value, samples[job.name][name]), ",.1f") for name in names]

    rows = [
        [job.name, *cells(job, lambda sample: sample.serving_us), *cells(job, lambda sample: sample.machine_us)]
        for job in JOBS
    ]
    head = ["µs of CPU a request", *(f"{name}, serving" for name in names), *(f"{name}, machine" for name in names)]
    return markdown_table(head, rows)


def memory_table(targets: dict[str, Target]) -> str:
    rows = []
    for name, target in targets.items():
        memory = target.servers.memory()
        if memory is not None:
            rows.append([name, f"{memory.resident / MIB:.0f}", f"{memory.proportional / MIB:.0f}"])
    return markdown_table(["serving process after the jobs, MiB", "RSS", "PSS"], rows)


def bench_fio(options: argparse.Namespace) -> None:
    load = load_now()
    with ExitStack() as stack:
        bench = Bench(stack, options.directory, options.archip, int(options.gib * GIB))
        targets: dict[str, Target] = {}
        missing = []
        for name in options.targets:
            try:
                targets[name] = stack.enter_context(TARGETS[name](bench))
            except (CannotRun, OSError) as error:
                missing.append(f"- {name} did not run: {error}")
        for line in missing:
            print(f"bench: {line}", file=sys.stderr)
        if not targets:
            raise CannotRun("none of the targets can run here")
        samples = measure(targets, bench.size_bytes, options.seconds, options.rounds)
        memory = memory_table(targets)
        title = f"fio, {options.gib:g} GiB, median of {options.rounds} × {options.seconds:g} s"
        names = list(targets)
        body = "\n\n".join([speed_table(samples, names), cpu_table(samples, names), memory, *missing])
        report(title, body, load=load, record=options.record)


def target_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TARGETS:
            raise argparse.ArgumentTypeError(f"no target {name!r}; there are {', '.join(TARGETS)}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=2, help="of each job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=1, help="size of each volume")
    parser.add_argument("--targets", type=target_names, default=list(TARGETS), help=", ".join(TARGETS))
    parser.set_defaults(action=bench_fio)
