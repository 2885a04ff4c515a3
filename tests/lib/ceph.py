"""Ceph clusters for tests, each in a directory of its own, by ``tools/ceph-dev``.

A cluster ends with the process that asked for it, however that ends: a shell in a session of its own makes it, waits
until its standard input is closed, and takes it down again.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lib.instance import TEMPORARY, kill_process
from tests.lib.programs import run
from tests.lib.waiting import wait_until

CEPH_DEV = Path(__file__).parents[2] / "tools" / "ceph-dev"
POOL = "archip"
USER = "archip"
DOWN_SECONDS = 180.0

_LIFE = """
tool=$1 directory=$2
shift 2
"$tool" up "$directory" "$@"
echo "ended with $?"
cat >/dev/null
"$tool" down "$directory" >/dev/null && rm -rf "$directory"
"""

_namespaces = itertools.count(1)


class Cluster:
    """A running cluster, and what a test does to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.conf = directory / "ceph.conf"

    def options(self, namespace: str | None = None) -> dict[str, str]:
        """Those of a backend in it, for the restricted user; in a namespace that nothing has used if none is said."""
        return {
            "pool": POOL,
            "conf": str(self.conf),
            "user": USER,
            "keyring": str(self.directory / f"keyring.{USER}"),
            "namespace": namespace or f"test-{os.getpid()}-{next(_namespaces)}",
        }

    def dev(self, command: str, *arguments: str | int, fine: tuple[int, ...] = (0,)) -> str:
        """``tools/ceph-dev COMMAND DIR ARGUMENT...``; what it says."""
        return run(CEPH_DEV, command, self.directory, *arguments, seconds=DOWN_SECONDS, fine=fine)

    def ceph(self, *arguments: str) -> Any:
        """What the monitor answers to the administrator."""
        said = run("ceph", "--conf", self.conf, "--connect-timeout", 60, *arguments, "--format", "json")
        return json.loads(said) if said.strip() else None

    def rados(self, *arguments: str, user: str = "admin") -> str:
        """``rados`` in the pool, as that user."""
        return run("rados", "--conf", self.conf, "--name", f"client.{user}", "--pool", POOL, *arguments)

    def daemons(self) -> dict[str, int]:
        """The processes that run, by their names, such as ``osd.0``."""
        said = self.dev("status", fine=(0, 1))
        return {name: int(pid) for name, pid in re.findall(r"^(\S+) runs as process (\d+)$", said, re.MULTILINE)}

    def kill(self, name: str) -> None:
        """SIGKILL a daemon and wait until it is gone."""
        kill_process(self.daemons()[name])

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """A daemon that keeps its connections and answers nothing, as one whose disk or host hangs."""
        pid = self.daemons()[name]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def restore(self) -> None:
        """Start whatever of it does not run, and wait until a write is answered."""
        self.dev("up")

    def wait_until_clean(self) -> None:
        """Until every placement group has all its replicas: one more OSD may be stopped then."""

        def clean() -> bool:
            return not set(_states(self.ceph("pg", "stat"))) - {"active+clean"}

        wait_until(clean, "the cluster has recovered")


def _states(stat: dict[str, Any]) -> list[str]:
    return [each["name"] for each in stat["pg_summary"]["num_pg_by_state"]] or ["unknown"]


@contextmanager
def cluster(*, osds: int = 1, auth: bool = True, address: str | None = None) -> Iterator[Cluster]:
    """A cluster for the block. ``address``: of this machine, for clients in other network namespaces."""
    directory = Path(tempfile.mkdtemp(prefix="archipfs-ceph-", dir=TEMPORARY))
    choices = ["--osds", str(osds), *([] if auth else ["--no-auth"]), *(["--address", address] if address else [])]
    keeper = subprocess.Popen(
        ["sh", "-c", _LIFE, "sh", CEPH_DEV, directory, *choices],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # an interrupt at the terminal is not for it
    )
    assert keeper.stdout is not None
    said: list[str] = []
    try:
        for line in keeper.stdout:
            said.append(line.strip())
            if line.startswith("ended with "):
                break
        assert said[-1:] == ["ended with 0"], f"tools/ceph-dev up: {said}"
        yield Cluster(directory)
    finally:
        said += keeper.communicate(timeout=DOWN_SECONDS)[0].splitlines()
    assert keeper.returncode == 0, f"tools/ceph-dev down: {said}"
