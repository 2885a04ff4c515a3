"""The daemon's side of the protocol with its service manager: sd_notify(3) and sd_listen_fds(3), without libsystemd.

The manager is our own supervisor or systemd. Without one, nothing is sent and nothing is inherited.
"""

import os
import socket
from collections.abc import Sequence

import structlog

log = structlog.get_logger()

_FIRST_PASSED = 3


def notify(state: str, descriptors: Sequence[int] = ()) -> bool:
    """Send ``state``, lines like ``READY=1``, and copies of ``descriptors`` to the service manager.

    Whether it was sent: not where there is no manager, nor where it is gone, which is logged and harms nobody.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [state.encode()], list(descriptors))
        except OSError as error:
            log.warning("the service manager does not listen", state=state, error=str(error))
            return False
    return True


def store(name: str, descriptor: int) -> bool:
    """Have the service manager keep a descriptor for the process after us; whether it was asked to."""
    return notify(f"FDSTORE=1\nFDNAME={name}", [descriptor])


def forget(name: str) -> None:
    """Have the service manager close what it keeps under that name."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def take_inherited() -> dict[str, int]:
    """The descriptors that the service manager gave us, by name; they are ours to close. Empty when called again.

    Whoever starts us with posix_spawn(3) cannot say LISTEN_PID; where it is said, it must mean us.
    """
    count, pid, names = (os.environ.pop(f"LISTEN_{name}", None) for name in ("FDS", "PID", "FDNAMES"))
    if count is None or (pid is not None and pid != str(os.getpid())):
        return {}
    descriptors = range(_FIRST_PASSED, _FIRST_PASSED + int(count))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return dict(zip((names or "").split(":"), descriptors, strict=False))
