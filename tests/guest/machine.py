"""A Debian guest under qemu, booted from a raw volume and driven over a serial port.

The image comes from ``tools/guest-image``. qemu boots its kernel directly; the guest's second serial port is one end of
a socket pair, on which process 1 of the guest takes a command a line and answers with its status and output. The first
serial port is a console that goes to a log file.
"""

import base64
import itertools
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPOSITORY = Path(__file__).resolve().parents[2]
BOOT_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 180.0
KVM_PROBE_TIMEOUT_S = 5.0
SHUTDOWN_TIMEOUT_S = 180.0
MIGRATION_TIMEOUT_S = 300.0


class GuestError(Exception):
    """The guest, or qemu around it, did not do what it was asked."""


@dataclass(frozen=True)
class Image:
    """What a guest boots: the root file system goes onto a volume, kernel and initrd are qemu's."""

    root: Path
    kernel: Path
    initrd: Path

    @property
    def size_bytes(self) -> int:
        return self.root.stat().st_size


def build_image() -> Image:
    """The image, built the first time (under a minute), found again later."""
    done = subprocess.run([REPOSITORY / "tools" / "guest-image"], check=True, stdout=subprocess.PIPE, text=True)
    directory = Path(done.stdout.strip())
    return Image(directory / "root.img", directory / "vmlinuz", directory / "initrd")


@cache
def accelerator(image: Image) -> str:
    """``kvm`` where it boots this kernel in good time, else ``tcg``.

    /dev/kvm may be there, make a machine, and still stall or fail half-way through the boot: inside some virtual
    machines it does. So the proof is a boot as far as the initrd.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    command = [*_qemu(image, "kvm", 256, "guest.probe"), "-serial", "stdio"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=KVM_PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "tcg"
    return "kvm" if b"guest is alive" in done.stdout else "tcg"


def _qemu(image: Image, accelerator: str, memory_mib: int, kernel_arguments: str = "") -> list[str]:
    return [
        "qemu-system-x86_64",
        *("-accel", accelerator, "-m", str(memory_mib)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", f"console=ttyS0 quiet panic=-1 {kernel_arguments}"),
    ]


class Monitor:
    """qemu's machine protocol (docs/interop/qmp-spec): a command a line, an answer a line, events in between."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._greeted = False

    def ask(self, command: str, **arguments: str) -> dict[str, Any]:
        """The answer. Raises ``GuestError`` if qemu refuses the command or has ended."""
        if not self._greeted:
            self._greeted = True
            self._next()  # the greeting
            self.ask("qmp_capabilities")
        self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self._next()
            if "error" in message:
                raise GuestError(f"qemu refuses {command}: {message['error']['desc']}")
            if "return" in message:
                answer: dict[str, Any] = message["return"]
                return answer

    def _next(self) -> dict[str, Any]:
        self._connection.settimeout(COMMAND_TIMEOUT_S)
        line = self._lines.readline()
        if not line:
            raise GuestError("qemu has closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


class Guest:
    """One running guest. As a context manager it starts on entry and is killed on exit if it still runs."""

    def __init__(
        self,
        volume: Path,
        image: Image,
        *,
        console: Path,
        cache: str = "none",
        aio: str = "io_uring",
        memory_mib: int = 256,
        extra_arguments: Sequence[str] = (),
    ) -> None:
        self.volume = volume
        self.image = image
        self.console = console
        self.accelerator = accelerator(image)
        self.boot_s = 0.0
        file = str(volume).replace(",", ",,")
        self._drive = f"file={file},if=virtio,format=raw,cache={cache},aio={aio},discard=unmap"
        self._memory_mib = memory_mib
        self._extra_arguments = list(extra_arguments)
        self._ids = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._serial: socket.socket | None = None
        self._received = b""
        self._monitor: Monitor | None = None

    def start(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Boot, and return when the guest takes commands."""
        begun = time.monotonic()
        try:
            self._launch()
            while self._read_line(begun + timeout_s) != "ready":
                pass
        except BaseException:
            self.kill()
            raise
        self.boot_s = time.monotonic() - begun

    def _launch(self, *arguments: str) -> None:
        self._serial, serial = socket.socketpair()
        monitor, theirs = socket.socketpair()
        self._monitor = Monitor(monitor)
        with serial, theirs, self.console.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._command(serial.fileno(), theirs.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[serial.fileno(), theirs.fileno()],
            )

    def move_to(self, target: "Guest", at: Path, timeout_s: float = MIGRATION_TIMEOUT_S) -> None:
        """Live migration to ``target``, which was not started, by a socket ``at`` a path.

        The target opens its disk while we still run; once it has all, our qemu ends, and commands go to the target.
        """
        deadline = time.monotonic() + timeout_s
        assert self._monitor is not None, "not started"
        try:
            target._launch("-incoming", f"unix:{at}")
            assert target._monitor is not None
            target._monitor.ask("query-status")  # it listens, and has its disk open
            self._monitor.ask("migrate", uri=f"unix:{at}")
            while (state := self._monitor.ask("query-migrate").get("status")) != "completed":
                if state == "failed" or time.monotonic() > deadline:
                    raise GuestError(f"migration is {state}: {self._last_words()}; there: {target._last_words()}")
                time.sleep(0.05)
            self._monitor.ask("quit")
            assert self._process is not None
            self._process.wait(timeout_s)
            while target._monitor.ask("query-status")["status"] != "running":
                if time.monotonic() > deadline:
                    raise GuestError(f"the guest does not run after its migration: {target._last_words()}")
                time.sleep(0.05)
        except BaseException:
            target.kill()
            raise

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """Run a shell command in the guest: its exit status, and what it wrote on both outputs.

        What the command leaves in the background must have its outputs redirected.
        """
        ident = self._send(command)
        deadline = time.monotonic() + timeout_s
        while True:
            answer, _, rest = self._read_line(deadline).partition(" ")
            if answer == ident:
                status, _, output = rest.partition(" ")
                return int(status), base64.b64decode(output).decode(errors="replace")

    def check(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """``run``, for a command that must succeed: its output, stripped."""
        status, output = self.run(command, timeout_s)
        if status:
            raise GuestError(f"{command!r} ended with status {status} in the guest: {output.strip()}")
        return output.strip()

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Unmount in order and power off."""
        assert self._process is not None
        self._send("kill -9 -1; sync; mount -o remount,ro / && echo o >/proc/sysrq-trigger")
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise GuestError(f"the guest did not power off in {timeout_s:.0f} s: {self._last_words()}") from None
        self.kill()
        if status:
            raise GuestError(f"qemu ended with status {status}: {self._last_words()}")

    def kill(self) -> None:
        """What pulling the plug is to a machine. Does nothing to a guest that has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._serial is not None:
            self._serial.close()
        if self._monitor is not None:
            self._monitor.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def _command(self, serial_fd: int, monitor_fd: int) -> list[str]:
        return [
            *_qemu(self.image, self.accelerator, self._memory_mib),
            *("-drive", self._drive),
            *("-serial", "stdio"),
            *("-chardev", f"socket,id=commands,fd={serial_fd}", "-serial", "chardev:commands"),
            *("-chardev", f"socket,id=monitor,fd={monitor_fd}", "-mon", "chardev=monitor,mode=control"),
            *self._extra_arguments,
        ]

    def _send(self, command: str) -> str:
        assert self._serial is not None, "not started"
        ident = str(next(self._ids))
        self._serial.settimeout(COMMAND_TIMEOUT_S)
        self._serial.sendall(f"{ident} {base64.b64encode(command.encode()).decode()}\n".encode())
        return ident

    def _read_line(self, deadline: float) -> str:
        assert self._serial is not None, "not started"
        while b"\n" not in self._received:
            self._serial.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._serial.recv(65536)
            except TimeoutError:
                raise GuestError(f"the guest did not answer in time: {self._last_words()}") from None
            if not data:
                raise GuestError(f"qemu ended: {self._last_words()}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip()

    def _last_words(self) -> str:
        return " | ".join(self.console.read_text(errors="replace").splitlines()[-5:]) or "(an empty console)"


def fill(volume: Path, image: Image) -> None:
    """Copy the image onto a volume that exists and is at least as large."""
    subprocess.run(
        ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "--target-is-zero", image.root, volume],
        check=True,
        stdin=subprocess.DEVNULL,
    )
