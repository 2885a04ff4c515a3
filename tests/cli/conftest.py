"""A command line without a terminal, and a private instance without a daemon."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from archipfs.cli.main import run


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def failed(self, code: int, *mentions: str) -> None:
        """Assert an error as every error has to be: its code, nothing on stdout, one line that names the thing."""
        assert (self.code, self.out) == (code, ""), self
        assert self.err.startswith("archip: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n"), self
        for mention in mentions:
            assert mention in self.err, self


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _quiet_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ARCHIPFS_ROOT", raising=False)
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture
def archip(capsys: pytest.CaptureFixture[str]) -> Cli:
    """``archip`` with these arguments, in this process."""

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def cli(archip: Cli, root: Path) -> Cli:
    """``archip --root`` of a private instance."""
    return lambda *arguments: archip("--root", str(root), *arguments)


@pytest.fixture
def vm1(cli: Cli) -> str:
    """A volume of 1 GiB."""
    assert cli("volume-create", "--name", "vm1", "--size", "1G").code == 0
    return "vm1"


@pytest.fixture
def process(root: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """``archip --root`` as a process of its own."""

    def start(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "archipfs.cli.main", "--root", str(root), *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(command, **options)

    return start
