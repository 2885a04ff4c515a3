"""The group: how commands are found, and how everything that goes wrong ends."""

import os
import pty
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from archipfs.cli.main import EPILOG
from archipfs.cli.main import archip as group
from tests.cli.conftest import Cli

Process = Callable[..., "subprocess.Popen[str]"]

COMMANDS = [
    "backend-create",
    "backend-info",
    "backend-list",
    "backend-remove",
    "backend-sync",
    "check",
    "driver-list",
    "gc",
    "mount",
    "status",
    "umount",
    "upgrade",
    "volume-clone",
    "volume-close",
    "volume-create",
    "volume-diff",
    "volume-hash",
    "volume-import",
    "volume-info",
    "volume-list",
    "volume-lock",
    "volume-move",
    "volume-open",
    "volume-remove",
    "volume-rename",
    "volume-resize",
    "volume-rollback",
    "volume-seal",
    "volume-snapshot",
    "volume-unlock",
]


def test_every_command_is_there() -> None:
    assert sorted(group.commands) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help(archip: Cli, command: str) -> None:
    shown = archip(command, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"Usage: archip {command} ")
    assert (archip(*command.split("-"), "--help").out == shown.out) or "-" not in command
    short = group.commands[command].get_short_help_str(57)
    assert short.endswith(".")
    assert not short.endswith("...")


def test_help_of_all(archip: Cli) -> None:
    shown = archip("--help")
    assert (shown.code, shown.err) == (0, "")
    assert all(f"\n  {command} " in shown.out for command in COMMANDS)
    assert "archip mount /mnt/archip" in shown.out
    assert max(map(len, EPILOG.splitlines())) < 80
    assert archip("--version").out.startswith("archip ")


def test_two_words_mean_the_same(cli: Cli) -> None:
    assert cli("volume", "create", "--name", "vm1", "--size", "1G").code == 0
    assert cli("volume", "list").out == cli("volume-list").out
    assert cli("backend", "info", "default", "-H", "-o", "name").out == "default\n"
    cli("volume", "info").failed(2, "see archip volume-info --help")


def test_no_such_command(archip: Cli) -> None:
    archip("foo").failed(2, "no such command 'foo'", "archip --help")
    archip("volume-lst").failed(2, "no such command 'volume-lst'", "did you mean volume-list")
    archip("volume").failed(2, "archip volume", "list")
    archip("volume", "paint").failed(2, "archip volume", "list")
    archip("backend", "--help").failed(2, "archip backend", "create, info, list")
    archip("").failed(2, "no such command ''")
    archip().failed(2, "archip --help")


def test_no_such_option(archip: Cli) -> None:
    archip("--colour", "volume-list").failed(2, "--colour", "see archip --help")
    archip("volume-list", "--colour").failed(2, "--colour", "see archip volume-list --help")
    archip("volume-list", "extra").failed(2, "extra")
    archip("volume-list", "--format", "xml").failed(2, "'xml'", "'plain', 'json'")
    archip("volume-create", "--name").failed(2, "'--name'")


def test_which_instance(archip: Cli, tmp_path: Path) -> None:
    archip("--root", str(tmp_path), "--config", "x", "status").failed(2, "--root and --config")
    archip("--root", "", "status").failed(2, "--root is empty")
    archip("--config", "", "status").failed(2, "--config is empty")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_below_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "/run/x")

    monkeypatch.setattr("archipfs.daemon.client.connect", refuse)
    cli("volume-list").failed(1, "/run/x: Permission denied")


def test_interrupted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("archipfs.daemon.client.connect", interrupt)
    cli("volume-list").failed(130, "interrupted")


def test_a_defect_is_not_hidden(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*arguments: Any, **options: Any) -> None:
        raise LookupError

    monkeypatch.setattr("archipfs.daemon.client.connect", stumble)
    with pytest.raises(LookupError):
        cli("volume-list")


def test_as_a_process(process: Process) -> None:
    out, err = process("volume-create", "--name", "vm1", "--size", "1G").communicate(timeout=60)
    assert (out, err) == ("created vm1, 1 GiB\n", "")
    failed = process("volume-create", "--name", "vm1", "--size", "1G")
    out, err = failed.communicate(timeout=60)
    assert (failed.returncode, out, err.count("\n")) == (1, "", 1)


def test_whoever_reads_us_has_had_enough(cli: Cli, process: Process) -> None:
    assert cli("backend-list").code == 0
    reading, writing = os.pipe()
    os.close(reading)
    closed = process("volume-list", stdout=writing)
    os.close(writing)
    assert closed.communicate(timeout=60)[1] == ""
    assert closed.returncode == 128 + signal.SIGPIPE


def test_nowhere_to_write_to(cli: Cli, process: Process) -> None:
    assert cli("backend-list").code == 0
    with open("/dev/full", "w") as full:
        failed = process("volume-list", stdout=full)
        assert failed.communicate(timeout=60)[1] == "archip: cannot go on: No space left on device\n"
    assert failed.returncode == 1


def test_progress_is_for_terminals(cli: Cli, process: Process) -> None:
    assert cli("backend-list").code == 0
    ours, theirs = pty.openpty()
    checking = process("check", stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break  # the terminal's other end is closed
        shown += piece
    os.close(ours)
    assert checking.communicate(timeout=60)[0] == "no problems found\n"
    assert b"checking" in shown
    silent = process("check")
    assert silent.communicate(timeout=60) == ("no problems found\n", "")


def test_completion(process: Process) -> None:
    typed = {"COMP_WORDS": "archip volume-r", "COMP_CWORD": "1"}
    out, err = process(env={**os.environ, "_ARCHIP_COMPLETE": "bash_complete", **typed}).communicate(timeout=60)
    assert [line.partition(",")[2] for line in out.splitlines()] == [
        "volume-remove",
        "volume-rename",
        "volume-resize",
        "volume-rollback",
    ]
    assert err == ""


def test_options_are_spelled_alike() -> None:
    """Where two commands have an option of the same name, it is the same option."""
    spellings: dict[str, set[tuple[str, ...]]] = {}
    for command in group.commands.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                for spelling in parameter.opts:
                    spellings.setdefault(spelling, set()).add(tuple(parameter.opts))
    assert {spelling: ways for spelling, ways in spellings.items() if len(ways) > 1} == {}
