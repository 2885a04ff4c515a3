"""Commands on more than one backend: making and forgetting them, copying and moving between them."""

import shutil
from pathlib import Path

import pytest

from archipfs.blockers.registry import DRIVERS
from archipfs.config import load_config
from archipfs.daemon.node import exclusive, open_node
from archipfs.errors import StoreUnavailable
from tests.cli.conftest import Cli


@pytest.fixture
def fast(cli: Cli, vm1: str, tmp_path: Path) -> str:
    """A second backend, beside ``default`` with ``vm1`` and a snapshot of it in it."""
    assert cli("backend-create", "fast", "--driver", "file", "--path", str(tmp_path / "fast")).code == 0
    assert cli("volume-snapshot", "vm1@monday").code == 0
    return "fast"


def where(cli: Cli) -> list[str]:
    return cli("volume-list", "-H", "-o", "name,backend").lines


def fill(root: Path, name: str, data: bytes) -> None:
    config = load_config(root=root)
    with exclusive(config, holder={}), open_node(config) as node:
        composer = node.composer
        with composer.using(composer.find(name)) as opened:
            opened.write(0, data)


def content(root: Path, name: str, length: int) -> bytes:
    config = load_config(root=root)
    with exclusive(config, holder={}), open_node(config) as node:
        composer = node.composer
        with composer.using(composer.find(name)) as opened:
            return opened.read(0, length)


def test_sync(cli: Cli, fast: str, root: Path) -> None:
    fill(root, "vm1", b"a" * 8192)
    would = cli("backend-sync", "--origin", "default", "--target", fast, "--dry-run")
    assert would.out.startswith("would copy 2 volumes and snapshots from default to fast, about ")
    done = cli("backend-sync", "--origin", "default", "--target", fast, "--format", "json").json
    assert (sorted(done["copied"]), done["current"], done["passed_over"]) == (["vm1", "vm1@monday"], [], [])
    assert cli("backend", "sync", "--origin", "default", "--target", fast).out == "fast lacks nothing of default\n"
    assert where(cli) == ["vm1\tdefault", "vm1@monday\tdefault"]
    listed = cli("volume-list", "--backend", fast, "-H", "-o", "name,backend,replica").lines
    assert listed == ["vm1\tfast\tyes", "vm1@monday\tfast\tyes"]
    assert cli("check").out == "no problems found\n"


def test_sync_falls_back(cli: Cli, fast: str, root: Path) -> None:
    """The copies are what names lead to once the origin is forgotten, for which it need not be there any more."""
    fill(root, "vm1", b"a" * 8192)
    cli("backend-sync", "--origin", "default", "--target", fast)
    shutil.rmtree(root / "state" / "store")
    cli("volume-list").failed(1, "backend default")
    cli("backend-remove", "default").failed(1, "backend default")
    gone = cli("backend-remove", "default", "--keep-data")
    assert gone.out.endswith("; new volumes lie in fast from now on\n")
    assert where(cli) == ["vm1\tfast", "vm1@monday\tfast"]
    assert content(root, "vm1", 8192) == b"a" * 8192


def test_sync_deletes_what_is_gone(cli: Cli, fast: str) -> None:
    sync = ["backend-sync", "--origin", "default", "--target", fast]
    cli(*sync)
    cli("volume-remove", "vm1@monday")
    assert cli(*sync).out == "fast lacks nothing of default\n"
    assert cli(*sync, "--delete", "--dry-run").out == "would remove 1 volume or snapshot from fast\n"
    assert cli(*sync, "--delete").out == "removed 1 volume or snapshot from fast\n"
    assert cli("volume-list", "--backend", fast, "-H", "-o", "name").lines == ["vm1"]


def test_replicas_are_removed_where_they_lie(cli: Cli, fast: str) -> None:
    cli("backend-sync", "--origin", "default", "--target", fast)
    would = cli("volume-remove", "vm1@monday", "--backend", fast, "--dry-run")
    assert would.out == "would remove vm1@monday, a snapshot of 1 GiB\n"
    assert cli("volume-remove", "vm1", "vm1@monday", "--backend", fast).code == 0
    assert cli("volume-list", "--backend", fast, "-H").out == ""
    assert where(cli) == ["vm1\tdefault", "vm1@monday\tdefault"]
    cli("volume-remove", "vm1", "--backend", fast).failed(1, "no volume in backend fast is called vm1")
    assert cli("backend-remove", fast).code == 0


def test_sync_passes_over(cli: Cli, fast: str, root: Path, tmp_path: Path) -> None:
    other = ["--root", str(tmp_path / "other"), "backend-create", "only", "--driver", "file", "--path"]
    cli(*other, str(tmp_path / "fast"))
    cli("--root", str(tmp_path / "other"), "volume-create", "--name", "vm1", "--size", "1M")
    done = cli("backend-sync", "--origin", "default", "--target", fast)
    assert (done.code, done.out) == (1, "copied 1 volume or snapshot from default to fast, 16 B of new data\n")
    assert done.err == ("archip: passed over vm1: backend fast has another volume called vm1; rename one of the two\n")


def test_sync_refused(cli: Cli, fast: str) -> None:
    cli("backend-sync", "--origin", "default", "--target", "default").failed(2, "give two backends")
    cli("backend-sync", "--origin", "default", "--target", "nowhere").failed(1, "no backend is called nowhere")
    cli("backend-sync", "--origin", "default", "--target", fast, "--rate", "x").failed(2, "x")
    cli("backend-sync", "--origin", "default").failed(2, "--target")


def test_move(cli: Cli, fast: str, root: Path) -> None:
    fill(root, "vm1", b"a" * 8192)
    uuid = cli("volume-info", "vm1", "-H", "-o", "uuid").out
    assert cli("volume-move", "vm1", "--from", "default", "--to", fast).out.startswith("moved vm1 from default to fast")
    assert where(cli) == ["vm1\tfast", "vm1@monday\tdefault"]
    assert cli("volume-info", "vm1", "-H", "-o", "uuid").out == uuid
    again = cli("volume-move", "vm1", "--from", "default", "--to", fast)
    assert (again.code, again.out) == (0, "vm1 is in backend fast already\n")
    cli("volume-rollback", "vm1@monday").failed(2, "vm1@monday")
    assert cli("volume-move", "vm1@monday", "--from", "default", "--to", fast, "-q").out == ""
    assert cli("volume-rollback", "vm1@monday").code == 0
    assert cli("check").out == "no problems found\n"


def test_move_with_snapshots(cli: Cli, fast: str) -> None:
    done = cli("volume-move", "vm1", "--from", "default", "--to", fast, "--with-snapshots", "--format", "json").json
    assert [each["name"] for each in done] == ["vm1@monday", "vm1"]
    assert where(cli) == ["vm1\tfast", "vm1@monday\tfast"]


def test_move_refused(cli: Cli, fast: str) -> None:
    cli("volume-move", "vm1", "--from", "default", "--to", "default").failed(2, "give two backends")
    cli("volume-move", "vm2", "--from", "default", "--to", fast).failed(1, "no volume is called vm2")
    cli("volume-move", "vm1", "--from", "default").failed(2, "--to")
    assert where(cli) == ["vm1\tdefault", "vm1@monday\tdefault"]


def test_remove(cli: Cli, fast: str, root: Path, tmp_path: Path) -> None:
    path = root / "archipfs.toml"
    path.write_text("# mine\n" + path.read_text() + "# the end\n")
    cli("backend-remove", "default").failed(1, "holds 2 volumes and snapshots", "--keep-data")
    assert cli("backend-remove", fast, "--dry-run").out == (
        f"would remove backend fast; its store stays in {tmp_path}/fast\n"
    )
    assert cli("backend-list", "-H", "-o", "name").lines == ["default", "fast"]
    assert cli("backend-remove", fast).out == f"removed backend fast; its store stays in {tmp_path}/fast\n"
    assert cli("backend-list", "-H", "-o", "name").lines == ["default"]
    text = path.read_text()
    assert text.startswith("# mine\n")
    assert "fast" not in text
    cli("backend-remove", "default", "--keep-data").failed(2, "default is the only backend")
    cli("backend-remove", "nowhere").failed(1, "no backend is called nowhere")
    assert cli("backend-create", "fast", "--driver", "file", "--path", str(tmp_path / "fast")).code == 0


def test_replicas_are_no_reason_to_lose_a_backend(cli: Cli, fast: str) -> None:
    cli("backend-sync", "--origin", "default", "--target", fast)
    cli("backend-remove", fast).failed(1, "holds 2 volumes and snapshots")
    assert cli("backend-remove", fast, "--keep-data", "--format", "json").json["name"] == fast


def test_drivers(archip: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["name"]: row for row in archip("driver-list", "--format", "json").json}
    assert sorted(rows) == ["file", "fuse", "rados"]
    assert (rows["file"]["kind"], rows["file"]["usable"], rows["file"]["needed"]) == ("backend", True, ["path"])
    assert "keyring" in rows["rados"]["optional"]
    assert archip("driver-list", "--backend", "-H", "-o", "name").lines == ["file", "rados"]
    assert archip("driver-list", "--endpoint", "-H", "-o", "name").lines == ["fuse"]

    def missing() -> None:
        raise StoreUnavailable("apt install it")

    rados = DRIVERS["rados"]
    driver = type(rados)(rados.needed, rados.optional, rados.create, rados.open, missing)
    monkeypatch.setitem(DRIVERS, "rados", driver)
    assert archip("driver-list", "-H", "-o", "name,usable,note").lines[1] == "rados\tno\tapt install it"


def test_options_are_the_drivers_own(cli: Cli, tmp_path: Path) -> None:
    cli("backend-create", "x", "--driver", "file", "--pool", "p").failed(2, "unknown option 'pool'")
    cli("backend-create", "x", "--driver", "rados", "--path", "/x").failed(2, "unknown option 'path'")
    cli("backend-create", "x", "--driver", "rados").failed(2, "pool is missing")
    missing = ["--pool", "p", "--conf", str(tmp_path / "none.conf")]
    cli("backend-create", "x", "--driver", "rados", *missing).failed(1, "none.conf")
