"""fio on the mount: everything it writes it reads back and verifies, with all its ways to write and to verify."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.lib.disks import loop_device
from tests.lib.instance import Instance
from tests.lib.programs import run
from tests.lib.volumes import clone, create, snapshot

pytestmark = [pytest.mark.mount, pytest.mark.outside]

SIZE_MIB = int(os.environ.get("ARCHIPFS_FIO_MIB", "16"))
"""How much each job writes, in MiB; a quarter of that without the front, which is slower."""
SECONDS = 60.0 + 5 * SIZE_MIB

DIGESTS = [
    *("md5", "crc64", "crc32c", "crc32c-intel", "crc32", "crc16", "crc7", "xxhash"),
    *("sha1", "sha256", "sha512", "sha3-224", "sha3-256", "sha3-384", "sha3-512"),
]
ENGINES = {
    "libaio": ["--ioengine=libaio", "--direct=1", "--iodepth=16"],
    "io_uring": ["--ioengine=io_uring", "--direct=1", "--iodepth=16"],
    "io_uring-fixed": ["--ioengine=io_uring", "--direct=1", "--iodepth=16", "--fixedbufs", "--registerfiles"],
    "io_uring-buffered": ["--ioengine=io_uring", "--direct=0", "--iodepth=16"],
    "posixaio": ["--ioengine=posixaio", "--direct=0", "--iodepth=16"],
    "sync": ["--ioengine=sync", "--direct=0"],
    "psync": ["--ioengine=psync", "--direct=1", "--thread"],
    "pvsync2": ["--ioengine=pvsync2", "--direct=1", "--thread"],
    "mmap": ["--ioengine=mmap", "--direct=0", "--fsync=100"],
    "splice": ["--ioengine=splice", "--direct=0"],
}


@pytest.fixture(scope="module", params=[True, False], ids=["front", "plain"])
def front(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def size_mib(mount: Instance) -> int:
    return SIZE_MIB if mount.front else SIZE_MIB // 4


def fio(mount: Instance, *options: str, jobs: dict[str, list[str]], directory: Path | None = None) -> list[Any]:
    """Run the jobs beside each other, on volumes named for them unless they say another. All must verify their data.

    Returns fio's report of each. ``directory``: where the files are that are no volumes of the mount.
    """
    common = [
        f"--directory={directory or mount.path}",
        f"--size={size_mib(mount)}M",
        "--output-format=json",
        "--verify_state_save=0",
    ]
    words = [word for name, own in jobs.items() for word in (f"--name={name}", *own)]
    with tempfile.NamedTemporaryFile() as output:
        run("fio", f"--output={output.name}", *common, *options, *words, seconds=SECONDS)
        text = output.read().decode()
    reports: list[Any] = json.loads(text[text.index("{") :])["jobs"]
    assert len(reports) == len(jobs)
    for job in reports:
        assert job["error"] == 0, f"{job['jobname']}: error {job['error']}"
        assert job["read"]["total_ios"] > 0, f"{job['jobname']} verified nothing"
    return reports


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_reads_back_what_it_wrote(mount: Instance, engine: str) -> None:
    blocks = ["--bsrange=4k-64k", "--bs_unaligned"] if engine in ("sync", "posixaio") else ["--bs=4k"]
    # Blocks of changing size overlap: only what is written in order can be verified then.
    patterns = ("write", "rw") if len(blocks) > 1 else ("randwrite", "randrw", "write")
    jobs = {pattern: [f"--rw={pattern}"] for pattern in patterns}
    fio(mount, *ENGINES[engine], *blocks, "--verify=crc32c", "--verify_fatal=1", jobs=jobs)


def test_every_digest_agrees(mount: Instance, front: bool) -> None:
    if not front:
        pytest.skip("the digest is fio's own matter: once is enough")
    for start in range(0, len(DIGESTS), 5):
        jobs = {digest: [f"--verify={digest}"] for digest in DIGESTS[start : start + 5]}
        fio(mount, *ENGINES["libaio"], "--rw=randwrite", "--bs=8k", "--verify_fatal=1", jobs=jobs)


def test_patterns_headers_and_offsets_within_blocks_agree(mount: Instance) -> None:
    jobs = {
        "pattern": ["--verify=pattern", '--verify_pattern=0xdeadbeef"archipfs"%o'],
        "offsets": ["--verify=pattern", "--verify_pattern=%o"],
        "interval": ["--verify=crc32c", "--verify_interval=512"],
        "header-offset": ["--verify=md5", "--verify_interval=4096", "--verify_offset=64"],
        "dump": ["--verify=sha1", "--verify_dump=1"],
    }
    fio(mount, *ENGINES["libaio"], "--rw=randwrite", "--bs=8k", "--verify_fatal=1", jobs=jobs)


def test_verifying_beside_writing_agrees(mount: Instance) -> None:
    jobs = {
        "backlog": ["--rw=randwrite", "--verify_backlog=64"],
        "backlog-batch": ["--rw=randwrite", "--verify_backlog=256", "--verify_backlog_batch=32"],
        "async": ["--rw=randwrite", "--verify_backlog=128", "--verify_async=2"],
        "synced": ["--rw=write", "--verify_backlog=64", "--fdatasync=32"],
        "only-later": ["--rw=randrw", "--rwmixwrite=80", "--fsync=64", "--end_fsync=1"],
    }
    fio(mount, *ENGINES["io_uring"], "--bs=4k", "--verify=crc32c", "--verify_fatal=1", jobs=jobs)


@pytest.mark.parametrize("pattern", ["trimwrite", "randtrimwrite"])
@pytest.mark.parametrize("engine", ["libaio", "io_uring", "psync"])
def test_blocks_that_are_trimmed_and_written_again_agree(
    mount: Instance, front: bool, engine: str, pattern: str
) -> None:
    """fio trims block devices only, so it works on a loop device here, which punches holes."""
    if not front:
        pytest.skip("plain pyfuse3 has no handler for FALLOCATE")
    volume = create(mount.path / "vm1", SIZE_MIB << 20)
    with loop_device(volume) as device:
        job = [f"--rw={pattern}", "--bs=4k", f"--filename={device.name}", "--verify=crc32c", "--verify_fatal=1"]
        [report] = fio(mount, *ENGINES[engine], jobs={pattern: job}, directory=device.parent)
    assert report["trim"]["total_ios"] > 0


def test_several_processes_on_one_volume_agree(mount: Instance) -> None:
    """Each writes its own part, whose borders lie inside sectors of others' requests."""
    share = size_mib(mount) << 20
    jobs = {
        f"part{number}": ["--filename=vm1", f"--offset={number * share}", *ENGINES[engine]]
        for number, engine in enumerate(("libaio", "io_uring", "psync", "sync"))
    }
    fio(mount, "--rw=randwrite", "--bs=4k", "--verify=crc32c", "--verify_fatal=1", jobs=jobs)


def test_what_was_written_verifies_in_a_clone_and_is_read_in_a_snapshot(mount: Instance) -> None:
    job = ["fio", "--name=job", f"--size={size_mib(mount)}M", *ENGINES["libaio"], "--rw=randwrite", "--bs=4k"]
    job += ["--verify=sha256", "--randseed=11", "--verify_state_save=0"]
    volume = mount.path / "vm1"
    run(*job, f"--filename={volume}", "--do_verify=0", seconds=SECONDS)
    monday = snapshot(volume, "monday")
    for path in (volume, clone(volume, "vm2")):
        run(*job, f"--filename={path}", "--verify_only", seconds=SECONDS)
    run(*job, f"--filename={monday}", "--rw=randread", seconds=SECONDS)
