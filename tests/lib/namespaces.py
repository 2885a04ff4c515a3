"""Hosts on one machine: network namespaces on a bridge, which stands for the network that they share."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

_numbers = itertools.count(os.getpid() % 100 * 10)


@dataclass(frozen=True)
class Host:
    """``prefix`` before a command has it run with the host's network, and all else as it is."""

    namespace: str
    cable: str

    @property
    def prefix(self) -> tuple[str, ...]:
        # `ip netns exec` would give it other mounts as well.
        return ("nsenter", f"--net=/run/netns/{self.namespace}")

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Its cable is out, within the block: nothing that it sends arrives, and nobody tells it so."""
        _ip("link", "set", self.cable, "down")
        try:
            yield
        finally:
            _ip("link", "set", self.cable, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@contextmanager
def network(count: int) -> Iterator[tuple[str, list[Host]]]:
    """So many hosts, and the address at which they reach this machine."""
    number = next(_numbers)
    bridge, subnet = f"archipfs{number}", f"10.{200 + number // 250 % 50}.{number % 250}"
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "delete", bridge)
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        hosts = []
        for index in range(count):
            host = Host(f"{bridge}-{index}", f"af{number}-{index}")
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
            _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.cable, "master", bridge, "up")
            _ip("-n", host.namespace, "address", "add", f"{subnet}.{index + 2}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", host.namespace, "link", "set", device, "up")
            hosts.append(host)
        yield f"{subnet}.1", hosts
