"""How a command reaches the node: through the daemon's control socket, or by being the node itself for a moment."""

import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol

from archipfs import errors
from archipfs.config import Config
from archipfs.daemon import commands
from archipfs.daemon.commands import Progress, Sent, ignored
from archipfs.daemon.control import SOCKET_NAME
from archipfs.daemon.node import Node, create_default_backend, exclusive, no_backend, open_node
from archipfs.errors import ArchipError, DaemonError


class Client(Protocol):
    """Something that carries out commands; see ``commands.COMMANDS``."""

    def call(self, command: str, **arguments: Any) -> Any:
        """The command's answer. Raises the error it ended with."""

    def follow(self, command: str, progress: Progress, **arguments: Any) -> Any:
        """As ``call``, for a command that takes long: ``progress`` is told how far it is.

        What ``progress`` raises ends the waiting, and hanging up ends the command.
        """


class DaemonClient:
    """Commands by way of the control socket, one after the other. A context manager: hangs up behind it.

    If the daemon goes away during a command, the next one is asked the same once more: a supervisor may be starting it.
    """

    def __init__(self, config: Config, connection: socket.socket) -> None:
        self._config = config
        self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stream = connection.makefile("rw", encoding="utf-8", newline="\n")

    def __enter__(self) -> "DaemonClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):  # what could not be sent any more was reported by the call that sent it
            self._stream.close()
        self._connection.close()

    def call(self, command: str, **arguments: Any) -> Any:
        return self._answer_to({"command": command, "arguments": arguments}, ignored)

    def follow(self, command: str, progress: Progress, **arguments: Any) -> Any:
        return self._answer_to({"command": command, "arguments": arguments, "progress": True}, progress)

    def _answer_to(self, wanted: Mapping[str, Any], progress: Progress) -> Any:
        request = {**wanted, "id": uuid.uuid4().hex, "again": False}
        reply = self._ask(request, progress) or self._ask_again(request, progress)
        if reply is None:
            raise DaemonError(f"the daemon hung up during {wanted['command']}; see its log, and `archip status`")
        if "error" in reply:
            raise _error_of(reply["error"])
        return reply["answer"]

    def _ask(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any] | None:
        """The answer or the error; ``None`` if the daemon went away instead."""
        try:
            self._stream.write(json.dumps(request) + "\n")
            self._stream.flush()
            while (line := self._stream.readline()).endswith("\n"):
                reply: dict[str, Any] = json.loads(line)
                if "progress" not in reply:
                    return reply
                progress(*reply["progress"])
        except (BrokenPipeError, ConnectionResetError):
            return None
        return None

    def _ask_again(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any] | None:
        self.close()
        connection = _connect(self._config)
        if connection is None:
            return None
        self._begin(connection)
        return self._ask({**request, "again": True}, progress)


class _NodeClient:
    def __init__(self, node: Node) -> None:
        self._node = node

    def call(self, command: str, **arguments: Any) -> Any:
        return commands.call(self._node, command, arguments)

    def follow(self, command: str, progress: Progress, **arguments: Any) -> Any:
        return commands.call(self._node, command, arguments, Sent(progress=progress))


@contextmanager
def connect(config: Config, *, make_default_backend: bool = False) -> Iterator[Client]:
    """Reach the daemon if there is one, else be the node for the length of the block.

    ``make_default_backend``: where no backend is configured, make the default one first, as a mount does.
    """
    daemon = connect_daemon(config)
    if daemon is not None:
        with daemon:
            yield daemon
        return
    if not config.backends and not make_default_backend:
        raise no_backend(config)
    with exclusive(config, holder={"pid": os.getpid()}):
        if make_default_backend and not config.backends:
            config = create_default_backend(config)
        with open_node(config) as node:
            yield _NodeClient(node)


def connect_daemon(config: Config) -> DaemonClient | None:
    """The running daemon, ``None`` if there is none. One that is just being started again is waited for."""
    connection = _connect(config)
    return DaemonClient(config, connection) if connection is not None else None


def _connect(config: Config) -> socket.socket | None:
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
