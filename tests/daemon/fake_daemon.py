"""A daemon that serves nothing and does what it is told, for tests of the supervisor. Standard library only: quick.

    fake_daemon.py EVENTS LIVES

LIVES is JSON: for each life a list of steps, the last list for all lives that follow. What happens is appended to the
file EVENTS, a line of JSON each: ``[pid, what, detail]``.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable

EVENTS = sys.argv[1]
HANDLED = {signal.SIGTERM, signal.SIGHUP}


def happened(what: str, detail: object = None) -> None:
    descriptor = os.open(EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, json.dumps([os.getpid(), what, detail]).encode() + b"\n")
    os.close(descriptor)


def notify(state: str, *descriptors: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.connect("\0" + os.environ["NOTIFY_SOCKET"][1:])
        socket.send_fds(connection, [state.encode()], descriptors)


def inherited() -> dict[str, int]:
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return dict(zip(os.environ.get("LISTEN_FDNAMES", "").split(":"), range(3, 3 + count), strict=False))


def store(name: str) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(f"{name} of {os.getpid()}".encode())
        file.flush()
        notify(f"FDSTORE=1\nFDNAME={name}", file.fileno())


def show() -> None:
    """Say what was inherited, and what else is open."""
    kept = {name: os.pread(descriptor, 100, 0).decode() for name, descriptor in inherited().items() if name != "go"}
    happened("inherited", kept)
    happened("open", sorted(map(int, os.listdir("/proc/self/fd")))[:-1])


def go() -> None:
    with open(inherited()["go"]) as pipe:
        since_ns = pipe.read()
    happened("go", (time.monotonic_ns() - int(since_ns)) / 1e6)


def serve() -> None:
    number = signal.sigwait(HANDLED)
    happened(signal.Signals(number).name)
    if number == signal.SIGTERM:
        notify("STOPPING=1")


def serve_deaf() -> None:
    """Take a SIGHUP and do nothing about it."""
    happened(signal.Signals(signal.sigwait({signal.SIGHUP})).name)
    time.sleep(60)


def ready() -> None:
    notify("READY=1\nSTATUS=serving")
    happened("ready")  # behind it: who reads this may kill us


def store_many() -> None:
    for number in range(20):
        store(f"n{number}")


def from_a_child() -> None:
    """Let another process say it."""
    if os.fork() == 0:
        notify("STOPPING=1")
        os._exit(0)
    os.wait()


def wait() -> None:
    """Until a file says so."""
    while not os.path.exists(f"{EVENTS}.go-on"):
        time.sleep(0.01)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


STEPS: dict[str, Callable[[], None]] = {
    "store": lambda: store("device"),
    "store lock": lambda: store("lock"),
    "store many": store_many,
    "remove": lambda: notify("FDSTOREREMOVE=1\nFDNAME=device"),
    "show": show,
    "go": go,
    "ready": ready,
    "standby": lambda: notify("X_STANDBY=1"),
    "serve": serve,
    "serve deaf": serve_deaf,
    "child says stopping": from_a_child,
    "nonsense": lambda: notify("no assignment\n=1\nFDSTORE=1"),
    "stopping": lambda: notify("STOPPING=1"),
    "die": die,
    "exit 3": lambda: os._exit(3),
    "sleep": lambda: time.sleep(60),
    "wait": wait,
}


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    lives = json.loads(sys.argv[2])
    life = 0
    if os.path.exists(EVENTS):
        with open(EVENTS) as events:
            life = sum(json.loads(line)[1] == "started" for line in events)
    happened("started")
    for step in lives[min(life, len(lives) - 1)]:
        STEPS[step]()
    happened("ended")


if __name__ == "__main__":
    main()
