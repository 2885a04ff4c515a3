"""The front's Python face, with a socket in the kernel's place and another one in libfuse's."""

import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pytest

from archipfs.endpoints.fuse.front import Front
from archipfs.errors import DaemonError

REQUEST_BYTES = 1 << 16
IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
RESENT = 1 << 63
GETATTR, INIT = 3, 26
INIT_AT = 4096
NOTIFY_RESEND = 7


class Ends(NamedTuple):
    kernel: socket.socket
    libfuse: socket.socket
    device: socket.socket
    socket: socket.socket
    upcalls: socket.socket


@contextmanager
def made_ends() -> Iterator[Ends]:
    with ExitStack() as undo:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        for end in (end for pair in pairs for end in pair):
            undo.enter_context(end)
            end.settimeout(60)
        (kernel, device), (libfuse, ours), (_, upcalls) = pairs
        for end in (device, ours, upcalls):
            end.setblocking(True)
        yield Ends(kernel, libfuse, device, ours, upcalls)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with made_ends() as ends:
        yield ends


@pytest.fixture
def session() -> Iterator[int]:
    descriptor = os.memfd_create("session")
    yield descriptor
    os.close(descriptor)


def make_front(ends: Ends, session: int | None = None) -> Front:
    return Front(
        ends.device.fileno(),
        ends.socket.fileno(),
        ends.upcalls.fileno(),
        request_bytes=REQUEST_BYTES,
        seats=1,
        session=session,
    )


def request(opcode: int, number: int, body: bytes = b"") -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, number, 1, 0, 0, 77, 0, 0) + body


def pid_of(message: bytes) -> int:
    return int(IN_HEADER.unpack_from(message)[6])


@pytest.mark.parametrize(("number", "resent"), [(4, False), ((1 << 40) + 2, False), ((1 << 62) + 6, True)])
def test_a_request_is_known_by_its_pid_until_it_is_answered(ends: Ends, number: int, resent: bool) -> None:
    front = make_front(ends)
    try:
        front.serve()
        ends.kernel.send(request(GETATTR, number | (RESENT if resent else 0)))
        pid = pid_of(ends.libfuse.recv(REQUEST_BYTES))
        assert front.number_of(pid) == (number, resent)
        ends.libfuse.send(OUT_HEADER.pack(OUT_HEADER.size, 0, number | (RESENT if resent else 0)))
        ends.kernel.recv(REQUEST_BYTES)
        with pytest.raises(AssertionError, match="no request is under way"):
            front.number_of(pid)
    finally:
        front.stop()


def test_what_one_front_keeps_of_the_session_the_next_one_goes_on_with(ends: Ends, session: int) -> None:
    init = request(INIT, 2, struct.pack("=5I", 7, 45, 0, 1 << 30, 1 << 7) + bytes(44))
    front = make_front(ends, session)
    try:
        front.serve()
        assert not front.resumable
        ends.kernel.send(init)
        ends.libfuse.recv(REQUEST_BYTES)
        assert front.resumable
    finally:
        front.stop()
    assert os.pread(session, 4096, INIT_AT)[: len(init)] == init
    with made_ends() as next_ends:
        front = make_front(next_ends, session)
        try:
            assert front.resumable
            replayed = next_ends.libfuse.recv(REQUEST_BYTES)
            assert replayed[IN_HEADER.size :] == init[IN_HEADER.size :]
            next_ends.libfuse.send(OUT_HEADER.pack(OUT_HEADER.size, 0, 2))
            assert select.select([front.initialised_fd], [], [], 60)[0]
            front.serve()
            assert next_ends.kernel.recv(REQUEST_BYTES) == OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)
        finally:
            front.stop()


def test_a_session_that_is_none_is_refused(ends: Ends, session: int) -> None:
    os.pwrite(session, b"not a request of FUSE, nor zeros" * 2, INIT_AT)
    with pytest.raises(DaemonError, match=r"session .* is damaged"):
        make_front(ends, session)
