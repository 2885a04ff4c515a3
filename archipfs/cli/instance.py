"""Which archipfs a command is about, and how it reaches it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from archipfs.config import Config, load_config
from archipfs.daemon import client
from archipfs.daemon.client import Client


@dataclass(frozen=True, slots=True)
class Instance:
    """What ``--root`` and ``--config`` said; without either it is the machine's own."""

    root: Path | None = None
    config_path: Path | None = None

    def config(self) -> Config:
        """Raises ``InvalidConfig``."""
        path = self.config_path.absolute() if self.config_path is not None else None
        return load_config(root=self.root, path=path)

    @contextmanager
    def connect(self) -> Iterator[Client]:
        """Reach the daemon, or be the node for the length of the block. A private instance makes its backend itself."""
        with client.connect(self.config(), make_default_backend=self.root is not None) as connected:
            yield connected


pass_instance = click.make_pass_decorator(Instance)
