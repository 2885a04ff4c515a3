"""The session: what one daemon writes of it, the next one reads, whenever the first one died."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.daemon.process import wait_to_go_on
from archipfs.endpoints.fuse.session import HANDLES_OFFSET, REMOVALS_MAX, Handle, Session
from archipfs.errors import DaemonError
from archipfs.types import VolumeId

NUMBERS = st.integers(1, 20)
HANDLES = st.builds(
    Handle, NUMBERS, st.sampled_from([VolumeId("1" * 32), VolumeId("ab" * 16)]), st.integers(0, (1 << 64) - 2)
)


@pytest.fixture
def session() -> Iterator[Session]:
    made = Session.create(request_bytes=1 << 20, device_number=53)
    yield made
    os.close(made.descriptor)


def test_the_next_process_reads_the_same(session: Session) -> None:
    again = Session(session.descriptor)
    assert (again.id, again.request_bytes, again.device_number) == (session.id, 1 << 20, 53)
    assert again.request_id(7) == session.request_id(7) != session.request_id(9)


def test_no_two_sessions_give_a_request_the_same_id(session: Session) -> None:
    other = Session.create(request_bytes=1 << 20, device_number=53)
    assert other.request_id(7) != session.request_id(7)
    os.close(other.descriptor)


@given(st.lists(st.one_of(HANDLES, NUMBERS), max_size=60))
def test_handles_are_the_same_after_every_step(steps: list[Handle | int]) -> None:
    session = Session.create(request_bytes=4096, device_number=1)
    try:
        model: dict[int, Handle] = {}
        for step in steps:
            if isinstance(step, Handle):
                session.put(step)
                model[step.number] = step
            else:
                session.remove(step)
                model.pop(step, None)
            for reader in (session, Session(session.descriptor)):
                assert sorted(reader.handles(), key=lambda handle: handle.number) == [
                    model[number] for number in sorted(model)
                ]
            assert session.get(1) == model.get(1)
        assert os.fstat(session.descriptor).st_size <= HANDLES_OFFSET + 32 * 20, "free slots are used again"
    finally:
        os.close(session.descriptor)


@given(st.lists(st.tuples(st.integers(100, 110), st.sampled_from(["1" * 32, "ab" * 16])), max_size=30))
def test_removals_are_noted_beside_the_handles(noted: list[tuple[int, str]]) -> None:
    session = Session.create(request_bytes=4096, device_number=1)
    try:
        open_file = Handle(1, VolumeId("c" * 32), 7)
        session.put(open_file)
        for number, volume in noted:
            session.note_removal(number, VolumeId(volume))
        for reader in (session, Session(session.descriptor)):
            assert reader.handles() == [open_file]
            assert {number: reader.removal(number) for number in dict(noted)} == dict(noted)
            assert reader.removal(1) is None
    finally:
        os.close(session.descriptor)


def test_only_the_last_removals_are_kept(session: Session) -> None:
    volume = VolumeId("1" * 32)
    for number in range(1, REMOVALS_MAX + 3):
        session.note_removal(number, volume)
    again = Session(session.descriptor)
    assert [number for number in range(1, REMOVALS_MAX + 3) if again.removal(number)] == [*range(3, REMOVALS_MAX + 3)]
    assert os.fstat(session.descriptor).st_size == HANDLES_OFFSET + 32 * REMOVALS_MAX


@pytest.mark.parametrize(
    ("offset", "damage", "says"),
    [
        (0, b"x", "no header"),
        (8, b"\x02", "format 2"),
        (12, b"\x01", "checksum"),
        (17, b"\x01\x02\x03", "checksum"),
        (40, b"\x00" * 8, "checksum"),
    ],
)
def test_what_is_not_a_session_is_refused(session: Session, offset: int, damage: bytes, says: str) -> None:
    os.pwrite(session.descriptor, damage, offset)
    with pytest.raises(DaemonError, match=says):
        Session(session.descriptor)


def test_an_empty_file_is_refused() -> None:
    descriptor = os.memfd_create("empty")
    with pytest.raises(DaemonError, match="no header"):
        Session(descriptor)
    os.close(descriptor)


def test_who_cannot_read_the_session_does_not_stand_by(session: Session) -> None:
    """Else the daemon that it comes for would end, and nobody go on with the mount."""
    os.pwrite(session.descriptor, (2).to_bytes(4, "little"), 8)
    reading, writing = os.pipe()
    try:
        with pytest.raises(DaemonError, match="format 2"):
            wait_to_go_on({"go": reading, "session": session.descriptor})
    finally:
        os.close(reading)
        os.close(writing)
