"""A command whose connection breaks is sent once more, with the same id; the node then does it once."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from archipfs.config import Config, load_config
from archipfs.daemon.client import connect_daemon
from archipfs.daemon.commands import Sent, call
from archipfs.daemon.control import SOCKET_NAME
from archipfs.daemon.node import Node, create_default_backend, open_node
from archipfs.errors import AlreadyExists, DaemonError, NotFound
from archipfs.types import RequestId

Serve = Callable[[dict[str, Any], socket.socket], None]
"""What one life of the daemon does with a request: answers it, or hangs up."""


def hang_up(request: dict[str, Any], connection: socket.socket) -> None:
    pass


def answer_half(request: dict[str, Any], connection: socket.socket) -> None:
    connection.sendall(b'{"answer": ')


def answer(request: dict[str, Any], connection: socket.socket) -> None:
    connection.sendall(b'{"answer": "done"}\n')


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = load_config(root=tmp_path)
    config.run_dir.mkdir()
    return config


@contextmanager
def daemon(config: Config, *lives: Serve) -> Iterator[list[dict[str, Any]]]:
    """A control socket that outlives the daemon behind it, which serves one request a life; the requests that came."""
    came: list[dict[str, Any]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(config.run_dir / SOCKET_NAME))
        listening.listen()
        listening.settimeout(60)

        def serve() -> None:
            for life in lives:
                connection, _ = listening.accept()
                with connection, connection.makefile() as lines:
                    came.append(json.loads(lines.readline()))
                    life(came[-1], connection)
            listening.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield came
        finally:
            thread.join(60)


@pytest.mark.parametrize("death", [hang_up, answer_half])
def test_the_next_daemon_is_asked_the_same_once_more(config: Config, death: Serve) -> None:
    with daemon(config, death, answer) as came:
        client = connect_daemon(config)
        assert client is not None
        with client:
            assert client.call("volume-create", name="vm1", size=4096) == "done"
    first, second = came
    assert (first.pop("again"), second.pop("again")) == (False, True)
    assert first == second
    assert first["id"]


def test_every_request_has_an_id_of_its_own(config: Config) -> None:
    with daemon(config, answer, answer) as came:
        for _ in range(2):
            client = connect_daemon(config)
            assert client is not None
            with client:
                client.call("volume-list")
    assert came[0]["id"] != came[1]["id"]


@pytest.mark.parametrize("lives", [(hang_up,), (hang_up, hang_up)], ids=["no other daemon", "another that dies too"])
def test_it_is_not_asked_for_ever(config: Config, lives: tuple[Serve, ...]) -> None:
    with daemon(config, *lives) as came:
        client = connect_daemon(config)
        assert client is not None
        with client, pytest.raises(DaemonError, match="hung up during volume-list; see its log"):
            client.call("volume-list")
    assert len(came) == len(lives)


# What the node does with it


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with open_node(create_default_backend(load_config(root=tmp_path))) as node:
        yield node


FIRST = Sent(RequestId("command:1"))
AGAIN = Sent(RequestId("command:1"), again=True)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("volume-create", {"name": "new", "size": 4096}),
        ("volume-snapshot", {"name": "vm1", "snapshot": "new"}),
        ("volume-clone", {"name": "vm1", "clone": "new"}),
        ("volume-rename", {"name": "vm1", "new_name": "new"}),
        ("volume-rollback", {"name": "vm1", "snapshot": "base"}),
        ("volume-remove", {"name": "vm1"}),
    ],
)
def test_what_comes_again_is_done_once(node: Node, command: str, arguments: dict[str, Any]) -> None:
    call(node, "volume-create", {"name": "vm1", "size": 4096})
    call(node, "volume-snapshot", {"name": "vm1", "snapshot": "base"})
    first = call(node, command, arguments, FIRST)
    there = call(node, "volume-list", {})
    second = call(node, command, arguments, AGAIN)
    for each in (first, second):
        each.pop("seconds", None)
    assert first == second
    assert call(node, "volume-list", {}) == there


def test_what_comes_from_somebody_else_is_refused(node: Node) -> None:
    call(node, "volume-create", {"name": "vm1", "size": 4096}, FIRST)
    with pytest.raises(AlreadyExists):
        call(node, "volume-create", {"name": "vm1", "size": 4096}, Sent(RequestId("command:2"), again=True))
    with pytest.raises(NotFound):
        call(node, "volume-remove", {"name": "vm2"}, FIRST)
