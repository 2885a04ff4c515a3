"""Telling the service manager how we are: sd_notify(3), the datagram protocol behind it."""

import os
import socket


def notify(state: str) -> None:
    """Send ``state`` (``READY=1``, ``STOPPING=1``) to the service manager; does nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        connection.sendto(state.encode(), address)
