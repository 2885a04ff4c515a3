"""Records as bytes: there and back, and never back to something else."""

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from archipfs.errors import ArchipError, FormatTooNew, ObjectDamaged
from archipfs.map.records import (
    KIND_NAMES,
    AnyRecord,
    Hold,
    Kind,
    LayerRecord,
    LockRecord,
    NameRecord,
    StoreRecord,
    VolumeRecord,
    decode,
    encode,
)

ids = st.text("0123456789abcdef", min_size=32, max_size=32)
numbers = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(codec="utf-8"), max_size=40)

volumes = st.builds(
    VolumeRecord,
    id=ids,
    name=st.none() | texts,
    kind=st.sampled_from(Kind),
    size=numbers,
    layer=ids,
    visible=numbers,
    origin=st.none() | ids,
    created_ns=numbers,
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 1),
    gid=st.integers(0, 2**32 - 1),
    atime_ns=st.integers(-(2**63), 2**63 - 1),
    mtime_ns=numbers,
    ctime_ns=numbers,
    xattrs=st.dictionaries(texts, st.binary(max_size=40), max_size=3),
)

records = st.one_of(
    st.builds(StoreRecord, ids, st.sampled_from(["blake3", "sha256"]), numbers),
    volumes,
    st.builds(LayerRecord, ids, st.none() | ids, numbers, ids, numbers),
    st.builds(NameRecord, texts, ids, st.none() | ids),
    st.builds(
        LockRecord,
        ids,
        numbers,
        st.none() | ids,
        texts,
        numbers,
        st.lists(st.sampled_from(Hold), unique=True).map(tuple),
    ),
)

NAME = NameRecord("vm", "0" * 32)  # type: ignore[arg-type]


def read(record: AnyRecord, value: bytes) -> AnyRecord:
    return decode(type(record), "kind/ident", value)  # type: ignore[type-var]


def framed(payload: bytes, *, kind: str = "name", version: str = "1", nonce: str = "00") -> bytes:
    """A record with a good checksum, whatever its content."""
    return f"archipfs-record {version} {kind} {nonce} {xxhash.xxh3_64_hexdigest(payload)}\n".encode() + payload


@given(records)
def test_there_and_back(record: AnyRecord) -> None:
    assert read(record, encode(record)) == record


@given(records)
def test_no_two_encodings_are_equal(record: AnyRecord) -> None:
    assert encode(record) != encode(record)


@given(records)
def test_the_header_is_one_line_of_five_words(record: AnyRecord) -> None:
    header, _, payload = encode(record).partition(b"\n")
    words = header.split(b" ")
    assert words[:3] == [b"archipfs-record", b"4", KIND_NAMES[type(record)].encode()]
    assert len(words) == 5
    assert msgspec.json.decode(payload) == msgspec.json.decode(msgspec.json.encode(record))


def test_every_changed_byte_is_noticed() -> None:
    """Every byte, to every other value. The nonce alone says nothing, so what it is does not matter; nor does it
    whether the version is this one or the one before, which is read alike."""
    value = encode(NAME)
    at = value.index(b" name ")
    harmless = {at - 1, *range(at + 6, at + 22)}
    for place in range(len(value)):
        for other in range(256):
            changed = value[:place] + bytes([other]) + value[place + 1 :]
            try:
                found = read(NAME, changed)
            except (ObjectDamaged, FormatTooNew):
                assert changed != value
            else:
                assert found == NAME
                assert changed == value or place in harmless


def test_every_truncation_is_noticed() -> None:
    value = encode(NAME)
    for length in range(len(value)):
        with pytest.raises(ObjectDamaged):
            read(NAME, value[:length])


@given(records, st.binary(min_size=1, max_size=20))
def test_trailing_bytes_are_noticed(record: AnyRecord, trailing: bytes) -> None:
    for value in (encode(record) + trailing, encode(record) + encode(record)):
        with pytest.raises(ObjectDamaged):
            read(record, value)


@given(records, st.data())
def test_damage_is_noticed(record: AnyRecord, data: st.DataObject) -> None:
    """Any piece replaced by any other: the same record, or the right error."""
    value = encode(record)
    begin = data.draw(st.integers(0, len(value)))
    end = data.draw(st.integers(begin, len(value)))
    changed = value[:begin] + data.draw(st.binary(max_size=40)) + value[end:]
    try:
        assert read(record, changed) == record
    except (ObjectDamaged, FormatTooNew):
        assert changed != value


@given(st.sampled_from(sorted(KIND_NAMES, key=str)), st.binary(max_size=200))
def test_nonsense_is_damage(kind: type[AnyRecord], value: bytes) -> None:
    for content in (value, framed(value, kind=KIND_NAMES[kind]), b"archipfs-record " + value):
        with pytest.raises((ObjectDamaged, FormatTooNew)):
            decode(kind, "kind/ident", content)  # type: ignore[type-var]


@given(records)
def test_a_record_of_another_kind_is_damage(record: AnyRecord) -> None:
    for kind in KIND_NAMES.keys() - {type(record)}:
        with pytest.raises(ObjectDamaged, match="wrong header"):
            decode(kind, "kind/ident", encode(record))


@given(volumes)
def test_a_volume_of_version_1_is_read(record: VolumeRecord) -> None:
    """It had no ``request``."""
    fields = {name: getattr(record, name) for name in VolumeRecord.__struct_fields__ if name != "request"}
    value = framed(msgspec.json.encode(fields), kind="volume", version="1")
    assert read(record, value) == msgspec.structs.replace(record, request=None)


@pytest.mark.parametrize("version", ["5", "10", "999999999"])
def test_a_later_format_is_named_as_such_whatever_follows(version: str) -> None:
    for rest in (b" name", b" name 0 0\n{}", b" something else\n\xff"):
        with pytest.raises(FormatTooNew, match=f"format {version}.*upgrade archipfs"):
            read(NAME, f"archipfs-record {version}".encode() + rest + b"\n")


@pytest.mark.parametrize("version", ["0", "-1", "01", "", "one", "1.0", "²", "1" * 5000])
def test_a_version_that_is_none_is_damage(version: str) -> None:
    with pytest.raises(ObjectDamaged):
        read(NAME, framed(msgspec.json.encode(NAME), version=version))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b'{"name": "vm"}',
        b'{"name": "vm", "volume": 1}',
        b'{"name": "vm", "volume": "a", "more": 1}',
        b'{"name": "vm", "volume": "a"} {}',
        b'{"name": "\xed\xa0\x80", "volume": "a"}',
        b"[" * 100_000,
    ],
)
def test_content_that_is_no_such_record_is_damage(payload: bytes) -> None:
    with pytest.raises(ObjectDamaged):
        read(NAME, framed(payload))


@given(records, st.binary(max_size=60))
def test_errors_are_one_line(record: AnyRecord, value: bytes) -> None:
    with pytest.raises(ArchipError) as caught:
        read(record, value)
    assert "\n" not in str(caught.value)
