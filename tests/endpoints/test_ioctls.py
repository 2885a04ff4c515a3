"""The structures of tools/archip-ioctl.h in Python: they hold what was put in, and refuse what is not one."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.endpoints.fuse import ioctls
from archipfs.endpoints.fuse.ioctls import Info, InfoFlags, decode_info, decode_name, encode_info, encode_name
from archipfs.errors import InvalidInput, InvalidName
from archipfs.map.names import check_name
from archipfs.map.records import Kind
from archipfs.types import VolumeId

HEADER = Path(__file__).parents[2] / "tools" / "archip-ioctl.h"


def is_name(text: str) -> bool:
    try:
        check_name(text)
    except InvalidName:
        return False
    return True


NAMES = st.text(min_size=1, max_size=255).filter(is_name)
IDS = st.uuids().filter(lambda each: each.int > 0).map(lambda each: VolumeId(each.hex))
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
INFOS = st.builds(
    Info,
    U32,
    st.sampled_from(Kind),
    st.integers(0, 31).map(InfoFlags),
    U64,
    U64,
    IDS,
    st.none() | IDS,
    st.none() | NAMES,
)


@given(NAMES)
def test_a_name_comes_back_whatever_lies_behind_its_end(name: str) -> None:
    encoded = encode_name(name)
    assert decode_name(encoded) == name
    used = len(name.encode()) + 1
    assert decode_name(encoded[:used] + b"\xff" * (256 - used) + encoded[256:]) == name


@given(INFOS)
def test_an_info_comes_back(info: Info) -> None:
    assert decode_info(encode_info(info)) == info


INFO_LIKE = st.builds(
    lambda kind, rest: bytes(4) + bytes([kind, 0, 0, 0]) + rest,
    st.integers(0, 4),
    st.binary(min_size=376, max_size=376),
)


@given(st.binary(max_size=300) | st.binary(min_size=288, max_size=288) | INFO_LIKE)
def test_any_bytes_are_a_structure_or_refused(data: bytes) -> None:
    for decode in (decode_name, decode_info):
        try:
            decode(data)
        except InvalidInput:
            continue


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (b"", "empty"),
        (b"a/b", "'/'"),
        (b".hidden", "dot"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * 256, "not ended by a NUL"),
    ],
)
def test_what_is_no_name_is_refused(name: bytes, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        decode_name(name.ljust(288, b"\0"))


def test_what_is_reserved_must_be_zero() -> None:
    for place in range(256, 288):
        data = bytearray(encode_name("vm1"))
        data[place] = 1
        with pytest.raises(InvalidInput, match="reserved"):
            decode_name(bytes(data))


@pytest.mark.parametrize("compiler", [["gcc", "-x", "c", "-std=c11"], ["g++", "-x", "c++"]], ids=["C", "C++"])
def test_the_header_stands_by_itself_and_says_the_same(tmp_path: Path, compiler: list[str]) -> None:
    source, program = tmp_path / "source", tmp_path / "program"
    flags = ("OPEN", "KEPT", "LOCKED", "FOREIGN", "REMOVED")
    names = ["IOC_SNAPSHOT", "IOC_CLONE", "IOC_INFO", *(f"INFO_{flag}" for flag in flags)]
    names += ["KIND_VOLUME", "KIND_SNAPSHOT", "KIND_CLONE"]
    lines = "".join(f'printf("%lu\\n", (unsigned long)ARCHIP_{name});' for name in names)
    source.write_text(f'#include "{HEADER}"\n#include <stdio.h>\nint main(void) {{ {lines} return 0; }}\n')
    subprocess.run([*compiler, "-Wall", "-Wextra", "-Werror", "-pedantic", source, "-o", program], check=True)
    said = [int(line) for line in subprocess.run([program], check=True, capture_output=True).stdout.split()]
    assert said[:3] == [ioctls.SNAPSHOT, ioctls.CLONE, ioctls.INFO]
    assert said[3:8] == [InfoFlags[flag] for flag in flags]
    assert said[8:] == [kind_number(kind) for kind in (Kind.VOLUME, Kind.SNAPSHOT, Kind.CLONE)]


def kind_number(kind: Kind) -> int:
    info = Info(2, kind, InfoFlags(0), 0, 0, VolumeId("0" * 31 + "1"), None, None)
    return int.from_bytes(encode_info(info)[4:8], "little")
