"""The FUSE messages that pass libfuse by: whole ones are understood, all others refused, whatever their bytes say."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.endpoints.fuse.wire import (
    RESENT,
    CopyRange,
    Header,
    Ioctl,
    Malformed,
    answer,
    attributes_changed,
    error_answer,
    parse,
)
from archipfs.errors import InvalidInput

# As <linux/fuse.h> of Linux 6.18 has them.
IOCTL, COPY_FILE_RANGE, COPY_FILE_RANGE_64 = 39, 47, 53
U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
OFFSETS = st.integers(0, (1 << 63) - 1)
HEADERS = st.builds(Header, U64, U64, U32, U32, U32)


def request(opcode: int, header: Header, body: bytes, *, length: int | None = None) -> bytes:
    """struct fuse_in_header, and what follows it."""
    length = 40 + len(body) if length is None else length
    fields = (length, opcode, header.unique, header.inode, header.uid, header.gid, header.pid, 0, 0)
    return struct.pack("=IIQQIIIHH", *fields) + body


def ioctl_body(
    handle: int, flags: int, command: int, data: bytes, out_bytes: int, in_bytes: int | None = None
) -> bytes:
    """struct fuse_ioctl_in, and the structure of the command."""
    in_bytes = len(data) if in_bytes is None else in_bytes
    return struct.pack("=QIIQII", handle, flags, command, 0x7FFF1234, in_bytes, out_bytes) + data


def copy_body(handle: int, offset: int, target: int, target_offset: int, length: int, flags: int = 0) -> bytes:
    """struct fuse_copy_file_range_in."""
    return struct.pack("=QQQQQQQ", handle, offset, 77, target, target_offset, length, flags)


@given(HEADERS, U64, U32, st.booleans(), st.binary(max_size=400), U32)
def test_an_ioctl_is_read_as_the_kernel_wrote_it(
    header: Header, handle: int, command: int, directory: bool, data: bytes, out_bytes: int
) -> None:
    body = ioctl_body(handle, 16 if directory else 0, command, data, out_bytes)
    assert parse(request(IOCTL, header, body)) == Ioctl(header, handle, command, directory, data, out_bytes)


@given(HEADERS, U64, OFFSETS, U64, OFFSETS, U64, st.booleans())
def test_a_copy_is_read_as_the_kernel_wrote_it_and_cut_to_what_can_be_answered(
    header: Header, handle: int, offset: int, target: int, target_offset: int, length: int, wide: bool
) -> None:
    body = copy_body(handle, offset, target, target_offset, length)
    parsed = parse(request(COPY_FILE_RANGE_64 if wide else COPY_FILE_RANGE, header, body))
    assert isinstance(parsed, CopyRange)
    assert (parsed.header, parsed.handle, parsed.offset) == (header, handle, offset)
    assert (parsed.target_handle, parsed.target_offset, parsed.wide) == (target, target_offset, wide)
    assert parsed.length <= length
    assert parsed.length < 1 << (63 if wide else 32)
    assert max(offset, target_offset) + parsed.length < 1 << 63
    if length < 1 << 31 and max(offset, target_offset) < 1 << 62:
        assert parsed.length == length
    assert len(answer(parsed, parsed.length)) == 24


@given(HEADERS, st.sampled_from([IOCTL, COPY_FILE_RANGE, COPY_FILE_RANGE_64]), st.data())
def test_a_request_that_is_cut_short_or_too_long_is_refused(header: Header, opcode: int, data: st.DataObject) -> None:
    body = ioctl_body(1, 0, 2, bytes(30), 0) if opcode == IOCTL else copy_body(1, 2, 3, 4, 5)
    whole = request(opcode, header, body)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(InvalidInput):
        parse(whole[:cut])
    with pytest.raises(Malformed):  # also when the header says that so much is right
        parse(request(opcode, header, body[: max(0, cut - 40)]))
    with pytest.raises(Malformed):
        parse(request(opcode, header, body + data.draw(st.binary(min_size=1, max_size=20))))


@given(HEADERS, st.binary(max_size=50), U32)
def test_an_ioctl_that_announces_other_than_what_it_has_is_refused(header: Header, data: bytes, announced: int) -> None:
    if announced != len(data):
        with pytest.raises(Malformed):
            parse(request(IOCTL, header, ioctl_body(1, 0, 2, data, 0, in_bytes=announced)))


@given(HEADERS, U32, OFFSETS)
def test_what_we_do_not_know_or_cannot_be_is_refused(header: Header, flags: int, offset: int) -> None:
    refused = [
        request(IOCTL, header, ioctl_body(1, flags | 64, 2, b"", 0)),
        request(COPY_FILE_RANGE, header, copy_body(1, 2, 3, 4, 5, flags=flags | 1)),
        request(COPY_FILE_RANGE_64, header, copy_body(1, offset | 1 << 63, 3, 4, 5)),
        request(COPY_FILE_RANGE_64, header, copy_body(1, 2, 3, offset | 1 << 63, 5)),
        request(15, header, bytes(40)),
    ]
    for message in refused:
        with pytest.raises(Malformed) as caught:
            parse(message)
        assert caught.value.unique == header.unique


@given(st.binary(max_size=200))
def test_any_bytes_are_either_understood_or_refused(message: bytes) -> None:
    try:
        parsed = parse(message)
    except InvalidInput:
        return
    assert parsed.header.unique == int.from_bytes(message[8:16], "little")


@given(HEADERS, st.binary(max_size=400), st.integers(-3, 3))
def test_an_ioctl_is_answered_only_where_there_is_room(header: Header, result: bytes, room: int) -> None:
    asked = Ioctl(header, 1, 2, False, b"", max(0, len(result) + room))
    if asked.out_bytes < len(result):
        with pytest.raises(Malformed):
            answer(asked, result)
        return
    message = answer(asked, result)
    length, error, unique, value, flags, in_iovs, out_iovs = struct.unpack_from("=IiQiIII", message)
    assert (length, error, unique) == (len(message), 0, header.unique)
    assert (value, flags, in_iovs, out_iovs) == (0, 0, 0, 0)
    assert message[32:] == result


def test_a_copy_is_answered_in_the_width_it_was_asked_in() -> None:
    header = Header(RESENT | 6, 1, 0, 0, 0)
    narrow, wide = (CopyRange(header, 1, 0, 2, 0, 9, each) for each in (False, True))
    assert answer(narrow, 0xFFFF_F000) == struct.pack("=IiQII", 24, 0, RESENT | 6, 0xFFFF_F000, 0)
    assert answer(wide, 1 << 40) == struct.pack("=IiQQ", 24, 0, RESENT | 6, 1 << 40)


@given(U64, st.integers(1, 511))
def test_an_error_carries_the_number_as_it_came(unique: int, number: int) -> None:
    assert error_answer(unique, number) == struct.pack("=IiQ", 16, -number, unique)


@given(U64)
def test_a_notification_spares_the_content(inode: int) -> None:
    assert attributes_changed(inode) == struct.pack("=IiQQqq", 40, 2, 0, inode, -1, 0)


@given(st.integers(0, (1 << 63) - 1))
def test_a_request_that_is_sent_again_keeps_its_number(number: int) -> None:
    first, again = (Header(unique, 1, 0, 0, 0) for unique in (number, number | RESENT))
    assert first.number == again.number == number
