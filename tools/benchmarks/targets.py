"""What is measured: volumes of a private archipfs, and its peers, each as a path that holds ``size_bytes``."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.fio import fill
from benchmarks.processes import STOP_TIMEOUT_S, CannotRun, Servers, process, run, unmount_lazily, wait_until


class Control:
    """A connection to the daemon's control socket: what ``archip`` uses, and unlike setfattr it holds up no writes."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rw")

    def ask(self, command: str, **arguments: str | int) -> dict[str, Any]:
        self._stream.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
        self._stream.flush()
        reply: dict[str, Any] = json.loads(self._stream.readline())
        if "answer" not in reply:
            raise CannotRun(f"{command}: {reply['error']['message']}")
        answer: dict[str, Any] = reply["answer"]
        return answer


@dataclass
class Archipfs:
    """A private instance with a mount."""

    command: str
    root: Path

    @property
    def mountpoint(self) -> Path:
        return self.root / "mnt"

    @property
    def packs(self) -> Path:
        """Where its default backend keeps what is sealed."""
        return self.root / "state" / "store" / "objects" / "pack"

    def mount(self) -> None:
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        run(self.command, "--root", self.root, "mount", self.mountpoint)

    def unmount(self) -> None:
        try:
            run(self.command, "--root", self.root, "umount", self.mountpoint, timeout_s=STOP_TIMEOUT_S)
        except CannotRun as error:
            print(f"bench: {error}", file=sys.stderr)
        unmount_lazily(self.mountpoint)

    def servers(self) -> Servers:
        """The daemon, which is who holds the node's lock."""
        holder = json.loads((self.root / "run" / "node.lock").read_text())
        return Servers(pids=(int(holder["pid"]),))

    @contextmanager
    def control(self) -> Iterator[Control]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(self.root / "run" / "control.sock"))
            yield Control(connection)

    def volume(self, name: str, size_bytes: int) -> Path:
        path = self.mountpoint / name
        path.touch()
        os.truncate(path, size_bytes)
        return path

    def snapshot(self, path: Path, name: str) -> Path:
        os.setxattr(path, "user.archip.snapshot", name.encode())
        return path.with_name(name)

    def clone(self, path: Path, name: str) -> Path:
        os.setxattr(path, "user.archip.clone", name.encode())
        return path.with_name(name)


class Bench:
    """One run: a directory to work in, and an archipfs that is mounted when the first target asks for it.

    Report before the stack is unwound: removing layers in hundreds of thousands of extents may take minutes.
    """

    def __init__(self, stack: ExitStack, parent: str, archip: str, size_bytes: int = 0) -> None:
        """``size_bytes`` of the volumes that the targets make."""
        made = tempfile.TemporaryDirectory(prefix="archipfs-bench-", dir=parent)
        self.directory = Path(stack.enter_context(made))
        self.size_bytes = size_bytes
        self._stack = stack
        self._archip = archip

    @cached_property
    def archipfs(self) -> Archipfs:
        instance = Archipfs(self._archip, self.directory / "archipfs")
        self._stack.callback(instance.unmount)
        instance.mount()
        return instance

    def raw_file(self, name: str) -> Path:
        path = self.directory / name
        path.touch()
        os.truncate(path, self.size_bytes)
        return path


@dataclass(frozen=True)
class Target:
    path: Path
    servers: Servers


@contextmanager
def archipfs_volume(bench: Bench) -> Iterator[Target]:
    path = bench.archipfs.volume("volume", bench.size_bytes)
    fill(path, bench.size_bytes)
    yield Target(path, bench.archipfs.servers())


@contextmanager
def archipfs_clone(bench: Bench) -> Iterator[Target]:
    source = bench.archipfs.volume("source", bench.size_bytes)
    fill(source, bench.size_bytes)
    clone = bench.archipfs.clone(bench.archipfs.snapshot(source, "snapshot"), "clone")
    yield Target(clone, bench.archipfs.servers())


@contextmanager
def qemu_storage_daemon(bench: Bench) -> Iterator[Target]:
    """A qcow2 image that qemu-storage-daemon shows as a raw file over FUSE."""
    image, export = bench.directory / "qsd.qcow2", bench.directory / "qsd"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(bench.size_bytes))
    export.touch()
    command = (
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,filename={image},node-name=file"),
        *("--blockdev", "driver=qcow2,file=file,node-name=disk"),
        *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={export},writable=on"),
    )
    try:
        with process(*command) as child:
            wait_until(lambda: export.stat().st_size == bench.size_bytes, child, "qemu-storage-daemon")
            fill(export, bench.size_bytes)
            yield Target(export, Servers(pids=(child.pid,)))
    finally:
        unmount_lazily(export)


@contextmanager
def loop_device(bench: Bench) -> Iterator[Target]:
    device = Path(run("losetup", "--find", "--show", bench.raw_file("loop.raw")))
    try:
        fill(device, bench.size_bytes)
        yield Target(device, Servers(kernel_workers=True))
    finally:
        subprocess.run(["losetup", "--detach", device], stdin=subprocess.DEVNULL, check=False)


TARGETS: dict[str, Callable[[Bench], AbstractContextManager[Target]]] = {
    "archipfs": archipfs_volume,
    "archipfs clone": archipfs_clone,
    "qemu-storage-daemon": qemu_storage_daemon,
    "loop": loop_device,
}
