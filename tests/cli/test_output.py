"""How answers are shown. The answers are made up: what a client returns, a view prints."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from archipfs.cli.output import Column, View, as_duration, as_size, as_time, printable
from archipfs.config import Config
from archipfs.errors import ArchipError, Busy
from tests.cli.conftest import Cli

ROW = {
    "name": "vm1",
    "kind": "volume",
    "size": 20 << 30,
    "backend": "default",
    "parent": None,
    "created": 1_700_000_000.5,
    "uuid": "5d0c",
}
INFO = {
    **ROW,
    "written": 1536,
    "layers": 2,
    "layer": "77aa",
    "lock": {"host": "alpha", "node": "n1", "since": 1_700_000_000.0, "generation": 3, "holds": ["io", "locked"]},
    "state": "open",
    "mode": "0600",
    "uid": 1000,
    "gid": 1000,
    "modified": 1_700_000_001.0,
}


class StubClient:
    """Answers as told, and remembers what it was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def call(self, command: str, **arguments: Any) -> Any:
        self.calls.append((command, arguments))
        answer = self.answers[command]
        if isinstance(answer, ArchipError):
            raise answer
        return answer

    def follow(self, command: str, progress: Callable[[int, int], None], **arguments: Any) -> Any:
        progress(0, 0)
        return self.call(command, **arguments)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], StubClient]:
    def answering(answers: dict[str, Any]) -> StubClient:
        stub = StubClient(answers)

        @contextmanager
        def connect(config: Config, *, make_default_backend: bool) -> Iterator[StubClient]:
            yield stub

        monkeypatch.setattr("archipfs.daemon.client.connect", connect)
        return stub

    return answering


Answering = Callable[[dict[str, Any]], StubClient]


def test_columns_are_aligned_with_numbers_to_the_right(cli: Cli, client: Answering) -> None:
    client({"volume-list": [ROW, {**ROW, "name": "a-longer-name", "size": 512, "parent": "vm1"}]})
    assert cli("volume-list", "-o", "name,size,parent").lines == [
        "NAME             SIZE  PARENT",
        "vm1            20 GiB  -",
        "a-longer-name   512 B  vm1",
    ]


def test_wide_characters_keep_columns_aligned(cli: Cli, client: Answering) -> None:
    client({"volume-list": [{**ROW, "name": "仮想"}, {**ROW, "name": "abcd"}]})
    assert cli("volume-list", "-o", "name,kind").lines == ["NAME  KIND", "仮想  volume", "abcd  volume"]


def test_without_header_values_are_separated_by_one_tab(cli: Cli, client: Answering) -> None:
    client({"volume-list": [ROW]})
    assert cli("volume-list", "-H", "-o", "name,size,parent").out == "vm1\t20 GiB\t-\n"
    assert cli("volume-list", "-Hp", "-o", "name,size").out == f"vm1\t{20 << 30}\n"


def test_an_empty_listing(cli: Cli, client: Answering) -> None:
    client({"volume-list": []})
    assert cli("volume-list").lines == ["NAME  KIND  SIZE  BACKEND  PARENT  CREATED"]
    assert cli("volume-list", "-H").out == ""
    assert cli("volume-list", "--format", "json").json == []


def test_json_passes_the_answer_on(cli: Cli, client: Answering) -> None:
    client({"volume-list": [ROW], "volume-info": INFO})
    assert cli("volume-list", "--format=json").json == [ROW]
    assert cli("volume-info", "vm1", "--format", "json").json == INFO
    assert cli("volume-list", "--format=json", "-o", "size,name").json == [{"size": 20 << 30, "name": "vm1"}]


def test_unknown_column_is_refused_before_anything_is_asked(cli: Cli, client: Answering) -> None:
    stub = client({"volume-list": [ROW]})
    cli("volume-list", "-o", "name,colour").failed(2, "'colour'", "name, kind, size")
    cli("volume-list", "-o", "").failed(2, "''")
    assert stub.calls == []


def test_columns_may_be_spelled_as_in_the_header(cli: Cli, client: Answering) -> None:
    client({"volume-list": [ROW]})
    assert cli("volume-list", "-H", "-o", "NAME, Kind").out == "vm1\tvolume\n"


def test_details_are_aligned_lines(cli: Cli, client: Answering) -> None:
    client({"volume-info": INFO})
    lines = cli("volume-info", "vm1").lines
    assert lines[:4] == [
        "name           vm1",
        "kind           volume",
        "size           20 GiB",
        "written        1.5 KiB",
    ]
    (lock,) = (line for line in lines if line.startswith("lock"))
    assert re.fullmatch(r"lock           alpha since 2023-11-1\dT\S+ \(io, locked; generation 3\)", lock)


def test_one_detail_for_a_script(cli: Cli, client: Answering) -> None:
    client({"volume-info": INFO})
    assert cli("volume-info", "vm1", "-Hp", "-o", "written").out == "1536\n"


def test_several_details_are_apart(capsys: pytest.CaptureFixture[str]) -> None:
    View((Column("a"), Column("long"))).details([{"a": 1, "long": 2}, {"a": 3}])
    assert capsys.readouterr().out.splitlines() == ["a     1", "long  2", "", "a     3", "long  -"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("vm1", "vm1"),
        ("né 仮想", "né 仮想"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202egnp", "\\u202egnp"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("not \udcff utf-8", "not \\udcff utf-8"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_what_does_not_print_is_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_names_are_escaped_wherever_they_are_printed(cli: Cli, client: Answering) -> None:
    name = "a\x1b\nb"
    made = {"name": name, "kind": "volume", "size": 1, "uuid": "1", "seconds": 0.0}
    client({"volume-list": [{**ROW, "name": name}], "volume-create": made, "volume-remove": Busy(f"{name} is open")})
    assert cli("volume-list", "-H", "-o", "name").out == "a\\x1b\\nb\n"
    assert cli("volume-create", "--name", name, "--size", "1").out == "created a\\x1b\\nb, 1 B\n"
    cli("volume-remove", name).failed(1, "a\\x1b\\nb is open")
    assert cli("volume-list", "--format", "json", "-o", "name").json == [{"name": name}]


def test_how_values_look() -> None:
    assert (as_size(1536, False), as_size(1536, True)) == ("1.5 KiB", "1536")
    assert (as_duration(93784.9, False), as_duration(93784.9, True)) == ("1 day, 2:03:04", "93784")
    assert re.fullmatch(r"2023-11-1\dT\d\d:\d\d:20[+-]\d\d:\d\d", as_time(1_700_000_000.5, False))


def test_remove_shows_what_was_done_before_it_failed(cli: Cli, client: Answering) -> None:
    stub = client({"volume-remove": {"name": "a"}})
    assert cli("volume-remove", "a", "-q").out == ""
    assert cli("volume-remove", "a", "b", "--format", "json").json == [{"name": "a"}, {"name": "a"}]
    assert stub.calls[-1] == ("volume-remove", {"name": "b"})


def test_dry_run_changes_nothing(cli: Cli, client: Answering) -> None:
    snapshot = {**INFO, "kind": "snapshot", "state": "closed"}
    stub = client({"volume-info": snapshot})
    assert cli("volume-remove", "vm1", "--dry-run").lines == ["would remove vm1, a snapshot of 20 GiB"]
    cli("volume-resize", "vm1", "--size", "1G", "--dry-run").failed(1, "vm1 is a snapshot")
    cli("volume-rollback", "vm1@monday", "--dry-run").failed(1, "is a snapshot")
    stub.answers["volume-info"] = {**INFO, "state": "closed"}
    assert cli("volume-resize", "vm1", "--size", "15G", "--dry-run").lines == [
        "would resize vm1 from 20 GiB to 15 GiB; the last 5 GiB would be lost"
    ]
    assert cli("volume-resize", "vm1", "--size", "30G", "--dry-run").lines == ["would resize vm1 from 20 GiB to 30 GiB"]
    cli("volume-rollback", "vm1", "vm2", "--dry-run").failed(2, "vm2 is not a snapshot")
    stub.answers["volume-info"] = INFO
    cli("volume-rollback", "vm1", "vm1@monday", "--dry-run").failed(1, "vm1 is open")
    cli("volume-remove", "vm1", "--dry-run").failed(1, "vm1 is open")
    assert {command for command, _ in stub.calls} == {"volume-info"}


def test_findings_of_check(cli: Cli, client: Answering) -> None:
    left = {"backend": "default", "severity": "leftover", "what": "layer that nothing leads to", "which": "layer 1"}
    lost = {"backend": "default", "severity": "error", "what": "its layer object is missing", "which": "layer 2"}
    stub = client({"check": []})
    assert (cli("check").out, cli("check").code) == ("no problems found\n", 0)
    assert cli("check", "--format", "json").json == []
    stub.answers["check"] = [left]
    leftovers = cli("check", "-H")
    assert (leftovers.code, leftovers.out) == (0, "leftover\tdefault\tlayer 1\tlayer that nothing leads to\n")
    stub.answers["check"] = [lost, left]
    errors = cli("check")
    assert (errors.code, len(errors.lines), errors.err) == (1, 3, "")
    assert cli("check", "--format", "json").json == [lost, left]
