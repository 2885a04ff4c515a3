"""How a command reaches the node: through the daemon's control socket, or by being the node itself for a moment."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from archipfs import errors
from archipfs.config import Config
from archipfs.daemon import commands
from archipfs.daemon.control import SOCKET_NAME
from archipfs.daemon.node import Node, create_default_backend, exclusive, no_backend, open_node
from archipfs.errors import ArchipError, DaemonError


class Client(Protocol):
    """Something that carries out commands; see ``commands.COMMANDS``."""

    def call(self, command: str, **arguments: Any) -> Any:
        """The command's answer. Raises the error it ended with."""


class DaemonClient:
    """Commands by way of the control socket, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rw", encoding="utf-8", newline="\n")

    def call(self, command: str, **arguments: Any) -> Any:
        try:
            self._stream.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
            self._stream.flush()
            line = self._stream.readline()
        except OSError as error:
            raise DaemonError(f"the daemon hung up during {command}: {error.strerror}; see its log") from error
        if not line:
            raise DaemonError(f"the daemon hung up during {command}; see its log, and `archip status`")
        reply = json.loads(line)
        if "error" in reply:
            raise _error_of(reply["error"])
        return reply["answer"]


class _NodeClient:
    def __init__(self, node: Node) -> None:
        self._node = node

    def call(self, command: str, **arguments: Any) -> Any:
        return commands.call(self._node, command, arguments)


@contextmanager
def connect(config: Config, *, make_default_backend: bool = False) -> Iterator[Client]:
    """Reach the daemon if there is one, else be the node for the length of the block.

    ``make_default_backend``: where no backend is configured, make the default one first, as a mount does.
    """
    connection = connect_daemon(config)
    if connection is not None:
        with connection:
            yield DaemonClient(connection)
        return
    if not config.backends and not make_default_backend:
        raise no_backend(config)
    with exclusive(config, holder={"pid": os.getpid()}):
        if make_default_backend and not config.backends:
            config = create_default_backend(config)
        with open_node(config) as node:
            yield _NodeClient(node)


def connect_daemon(config: Config) -> socket.socket | None:
    """A connection to the running daemon's control socket, ``None`` if there is no daemon."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(config.run_dir / SOCKET_NAME))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise DaemonError(
            f"cannot reach the daemon in {config.run_dir}: {error.strerror}; be the user who mounted, or root"
        ) from error
    return connection


def _error_of(reply: dict[str, str]) -> ArchipError:
    kind = getattr(errors, reply["type"], ArchipError)
    if not (isinstance(kind, type) and issubclass(kind, ArchipError)):
        kind = ArchipError
    return kind(reply["message"])
