"""The control socket: several clients, nonsense, and clients that go away."""

import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from archipfs.config import load_config
from archipfs.daemon import commands, control
from archipfs.daemon.client import connect_daemon
from archipfs.daemon.commands import COMMANDS, Sent
from archipfs.daemon.node import Node, create_default_backend, open_node
from archipfs.errors import NotFound


def serve_while(root: Path, talk: Callable[[], Awaitable[None]]) -> None:
    """Run ``talk`` beside a control socket of a fresh node in ``root``."""
    config = create_default_backend(load_config(root=root))

    async def main() -> None:
        config.run_dir.mkdir(exist_ok=True)
        listener = await control.listen(config.run_dir)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.serve, node, listener)
            with trio.fail_after(60):
                await talk()
            nursery.cancel_scope.cancel()

    with open_node(config) as node:
        trio.run(main)


def test_a_command_and_its_error_travel_both_ways(tmp_path: Path) -> None:
    def ask() -> None:
        client = connect_daemon(load_config(root=tmp_path))
        assert client is not None
        with client:
            assert client.call("volume-create", name="vm1", size=4096)["name"] == "vm1"
            with pytest.raises(NotFound, match="no volume is called vm2"):
                client.call("volume-info", name="vm2")
            assert client.call("volume-info", name="vm1")["size"] == 4096

    serve_while(tmp_path, lambda: trio.to_thread.run_sync(ask))


def test_nonsense_is_answered_in_one_line_and_the_next_request_is_served(tmp_path: Path) -> None:
    async def talk() -> None:
        stream = await trio.open_unix_socket(str(tmp_path / "run" / control.SOCKET_NAME))
        async with stream:
            answers = b""
            for request in (b"nonsense\n", b"[]\n", b'{"command": 3}\n', b'{"command":"volume-list","arguments":{}}\n'):
                await stream.send_all(request)
            while answers.count(b"\n") < 4:
                answers += await stream.receive_some()
        replies = [json.loads(line) for line in answers.splitlines()]
        assert ["error" in reply for reply in replies] == [True, True, True, False]

    serve_while(tmp_path, talk)


def test_a_client_that_hangs_up_harms_nobody(tmp_path: Path) -> None:
    async def talk() -> None:
        path = str(tmp_path / "run" / control.SOCKET_NAME)
        for _ in range(20):
            stream = await trio.open_unix_socket(path)
            await stream.send_all(b'{"command":"volume-list","arguments":{}}\n{"comm')
            await stream.aclose()
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(b'{"command":"volume-list","arguments":{}}\n')
            assert json.loads(await stream.receive_some()) == {"answer": []}

    serve_while(tmp_path, talk)


def test_a_request_without_end_is_cut_off(tmp_path: Path) -> None:
    async def talk() -> None:
        stream = await trio.open_unix_socket(str(tmp_path / "run" / control.SOCKET_NAME))
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x" * (64 << 20))

    serve_while(tmp_path, talk)


def test_the_socket_is_the_owners_alone(tmp_path: Path) -> None:
    async def talk() -> None:
        assert (tmp_path / "run" / control.SOCKET_NAME).stat().st_mode & 0o777 == 0o600

    serve_while(tmp_path, talk)


def test_arguments_of_the_wrong_kind_are_answered_and_end_nothing(tmp_path: Path) -> None:
    async def talk() -> None:
        stream = await trio.open_unix_socket(str(tmp_path / "run" / control.SOCKET_NAME))
        async with stream:
            request = {"command": "volume-create", "arguments": {"name": "vm1", "size": "1M"}}
            await stream.send_all(json.dumps(request).encode() + b"\n")
            assert "TypeError" in json.loads(await stream.receive_some())["error"]["message"]
            await stream.send_all(b'{"command":"volume-list","arguments":{}}\n')
            assert json.loads(await stream.receive_some()) == {"answer": []}

    serve_while(tmp_path, talk)


@contextmanager
def long_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A command that goes on until its progress raises; the event is set when it has ended so."""
    ended = threading.Event()

    def count(node: Node, sent: Sent, until: int) -> int:
        try:
            for done in range(until):
                sent.progress(done, until)
                time.sleep(0.01)
        except BaseException:
            ended.set()
            raise
        return until

    monkeypatch.setitem(COMMANDS, "count", count)
    monkeypatch.setattr(commands, "LONG", commands.LONG | {"count"})
    yield ended


def test_a_long_command_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int]] = []

    def ask() -> None:
        client = connect_daemon(load_config(root=tmp_path))
        assert client is not None
        with client:
            assert client.follow("count", lambda done, total: said.append((done, total)), until=40) == 40
            assert client.call("count", until=1) == 1

    with long_command(monkeypatch):
        serve_while(tmp_path, lambda: trio.to_thread.run_sync(ask))
    assert len(said) > 1
    assert said == sorted(said)
    assert {total for _, total in said} == {40}


def test_hanging_up_ends_a_long_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class EnoughSeenError(Exception):
        pass

    def enough(done: int, total: int) -> None:
        raise EnoughSeenError

    def ask() -> None:
        client = connect_daemon(load_config(root=tmp_path))
        assert client is not None
        with client, pytest.raises(EnoughSeenError):
            client.follow("count", enough, until=100_000)
        assert ended.wait(60)

    with long_command(monkeypatch) as ended:
        serve_while(tmp_path, lambda: trio.to_thread.run_sync(ask))


@pytest.mark.parametrize("wants_progress", [True, False])
def test_the_end_of_the_daemon_ends_a_long_command(
    wants_progress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> None:
        connection.connect(str(tmp_path / "run" / control.SOCKET_NAME))
        request = {"command": "count", "arguments": {"until": 1000}, "progress": wants_progress}
        connection.sendall(json.dumps(request).encode() + b"\n")
        if wants_progress:
            assert json.loads(connection.recv(4096))["progress"][1] == 1000
        else:
            assert begun.wait(60)

    # It stays open: it is not the hanging up that ends the command.
    with socket.socket(socket.AF_UNIX) as connection, long_command(monkeypatch) as ended:
        begun = threading.Event()
        count = COMMANDS["count"]

        def begin(node: Node, sent: Sent, until: int) -> int:
            begun.set()
            return int(count(node, sent, until))

        monkeypatch.setitem(COMMANDS, "count", begin)
        serve_while(tmp_path, lambda: trio.to_thread.run_sync(ask))
        assert ended.is_set()
