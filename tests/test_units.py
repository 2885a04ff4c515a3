"""Sizes, written and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.errors import InvalidSize
from archipfs.types import SIZE_BYTES_MAX
from archipfs.units import check_size, format_size, parse_size

UNITS = "KMGTPE"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("17B", 17),
        ("20G", 20 << 30),
        ("20g", 20 << 30),
        ("20GB", 20 << 30),
        ("20GiB", 20 << 30),
        ("20 gib", 20 << 30),
        ("  512MiB\n", 512 << 20),
        ("1.5T", 3 << 39),
        ("0.5K", 512),
        ("1.0", 1),
        ("00012", 12),
        ("8E", 1 << 63),
        ("2P", 2 << 50),
        ("9223372036854775808", SIZE_BYTES_MAX),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "G", "B", "-1", "+1", "-20G", "1e3", "0x10", "1,5G", "1_000", "1.G", ".5G", "1..5G", "20Gi"),
        *("20 G B", "20X", "20Gb/s", "twenty", "NaN", "inf", "1 2", "٣", "１", "²", "20G\0", "1\n2"),
        *("1\N{KELVIN SIGN}", "1G\N{LATIN SMALL LETTER DOTLESS I}B", "9" * 5000, "1." + "0" * 5000),
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidSize, match="not a size") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "size 0 is not positive"),
        ("0.0G", "size 0 is not positive"),
        ("0.1K", "not a whole number of bytes"),
        ("1.5", "not a whole number of bytes"),
        ("1.0000000001K", "not a whole number of bytes"),
        ("9E", "over 8 EiB"),
        ("9223372036854775809", "over 8 EiB"),
        ("99999999999999999999999999999999E", "over 8 EiB"),
    ],
)
def test_sizes_out_of_range_are_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidSize, match=reason):
        parse_size(text)


@given(st.integers(1, SIZE_BYTES_MAX))
def test_a_number_of_bytes_means_itself(size: int) -> None:
    assert parse_size(str(size)) == parse_size(f"{size}B") == check_size(size) == size


@given(st.integers(1, 1023), st.sampled_from(UNITS[:5]), st.sampled_from(["", "B", "iB", "ib", "b"]))
def test_units_are_binary(number: int, unit: str, ending: str) -> None:
    expected = number << 10 * (UNITS.index(unit) + 1)
    for text in (f"{number}{unit}{ending}", f"{number} {unit.lower()}{ending}"):
        assert parse_size(text) == expected


@given(st.one_of(st.integers(max_value=0), st.integers(SIZE_BYTES_MAX + 1)))
def test_numbers_that_are_no_sizes_are_refused(size: int) -> None:
    with pytest.raises(InvalidSize):
        check_size(size)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (20 << 30, "20 GiB"),
        (3 << 39, "1.5 TiB"),
        (SIZE_BYTES_MAX, "8 EiB"),
        (1 << 80, "1048576 EiB"),
    ],
)
def test_sizes_as_they_are_shown(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, SIZE_BYTES_MAX))
def test_what_is_shown_is_near_the_size(size: int) -> None:
    number, unit = format_size(size).split(" ")
    shown = float(number) * 1024 ** ("B", *(f"{unit}iB" for unit in UNITS)).index(unit)
    assert abs(shown - size) <= max(0, size * 0.05)


@given(st.integers(1, 1023), st.integers(0, 5))
def test_what_is_shown_of_round_sizes_can_be_read_again(number: int, power: int) -> None:
    size = number << 10 * power
    assert parse_size(format_size(size)) == size


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except InvalidSize:
        return
    assert 1 <= size <= SIZE_BYTES_MAX
