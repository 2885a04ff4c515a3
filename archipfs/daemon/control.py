"""The control socket: one JSON object a line, a request and its answer in turn.

    {"command": "volume-info", "arguments": {"name": "vm1"}, "id": "5d41…", "again": false}
    {"answer": {…}}    or    {"error": {"type": "NotFound", "message": "…"}}

With ``"progress": true`` in the request of a long command, lines like {"progress": [done, total]} come before the
answer. A client that does not want the answer any more hangs up, and that ends the command.

A client whose connection broke sends its request once more, with the same ``id`` and ``again`` true: it may have been
carried out. Both may be left out by who does not do that.

The socket lies in the run directory, which only the node's user can enter. Several clients at once are served side by
side. A supervisor keeps it while no daemon is there: who connects meanwhile waits.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import structlog
import trio

from archipfs.daemon.commands import Progress, Sent, call
from archipfs.daemon.node import Node
from archipfs.errors import ArchipError
from archipfs.types import RequestId

log = structlog.get_logger()

SOCKET_NAME = "control.sock"
BACKLOG = 128
REQUEST_BYTES_MAX = 1 << 20
THREADS_MAX = 32
PROGRESS_SECONDS = 0.1
"""A command says how far it is no more often than that."""


async def listen(run_dir: Path, inherited: int | None = None) -> trio.SocketListener:
    """The listening socket: the one that was ``inherited``, which is ours then, or a new one.

    Whatever an earlier process left of it is replaced: the caller is the only one here.
    """
    if inherited is not None:
        return trio.SocketListener(trio.socket.from_stdlib_socket(socket.socket(fileno=inherited)))
    path = run_dir / SOCKET_NAME
    path.unlink(missing_ok=True)
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen(BACKLOG)
    return trio.SocketListener(listener)


async def serve(node: Node, listener: trio.SocketListener) -> None:
    """Answer clients until cancelled."""

    # Of their own: they must not be short because of whoever else uses threads, nor make others short.
    threads = trio.CapacityLimiter(THREADS_MAX)

    async def serve_client(stream: trio.SocketStream) -> None:
        await _serve_client(node, stream, threads)

    await trio.serve_listeners(serve_client, [listener])


async def _serve_client(node: Node, stream: trio.SocketStream, threads: trio.CapacityLimiter) -> None:
    pending = b""
    try:
        async for piece in stream:
            pending += piece
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                await stream.send_all(await _answer(node, line, threads, stream))
            if len(pending) > REQUEST_BYTES_MAX:
                return
    except (trio.BrokenResourceError, ConnectionError):
        log.info("a client of the control socket went away")


async def _answer(node: Node, line: bytes, threads: trio.CapacityLimiter, stream: trio.SocketStream) -> bytes:
    try:
        answer: dict[str, Any] = {
            "answer": await trio.to_thread.run_sync(_carry_out, node, line, _progress_to(stream), limiter=threads)
        }
    except trio.BrokenResourceError:
        raise  # whoever asked hung up, which ended the command
    except ArchipError as error:
        answer = {"error": {"type": type(error).__name__, "message": str(error)}}
    except Exception as error:
        # A bug, or a request of nonsense: whoever sent it is told, and the mount lives on.
        log.exception("bug", request=line[:80].decode(errors="replace"))
        answer = {"error": {"type": "ArchipError", "message": f"{type(error).__name__}: {error}; see the daemon's log"}}
    return json.dumps(answer).encode() + b"\n"


def _progress_to(stream: trio.SocketStream) -> Progress:
    """To be called in a thread of a command; when the client is gone, or the daemon ends, it raises."""
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            trio.from_thread.run(stream.send_all, json.dumps({"progress": [done, total]}).encode() + b"\n")

    return progress


def _heed_the_end(done: int, total: int) -> None:
    """For a client that does not want to know how far it is: the end of the daemon ends its command all the same."""
    trio.from_thread.check_cancelled()


def _carry_out(node: Node, line: bytes, progress: Progress) -> Any:
    try:
        request = json.loads(line)
        command, arguments = str(request["command"]), dict(request["arguments"])
        ident, again = request.get("id"), bool(request.get("again", False))
        wants_progress = bool(request.get("progress", False))
    except (ValueError, KeyError, TypeError) as error:
        raise ArchipError(f"not a request: {line[:80]!r}; send one JSON object with command and arguments") from error
    request_id = RequestId(f"command:{ident}") if ident is not None else None
    sent = Sent(request_id, again, progress if wants_progress else _heed_the_end)
    return call(node, command, arguments, sent)
