"""Commands on backends, the configuration they read, and a store that is not as it should be."""

from pathlib import Path

import pytest

from archipfs.blockers.registry import open_blocker
from archipfs.config import load_config
from archipfs.daemon.node import exclusive, open_node
from tests.cli.conftest import Cli


def test_a_private_instance_makes_its_backend(cli: Cli, root: Path) -> None:
    rows = cli("backend-list", "--format", "json").json
    assert [(row["name"], row["driver"]) for row in rows] == [("default", "file")]
    assert cli("backend-list", "-H", "-o", "name,place").out == f"default\t{root}/state/store\n"


def test_create(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "fast"
    assert cli("backend-create", "fast", "--driver", "file", "--path", "fast").out == (
        f"created backend fast: driver file in {place}\n"
    )
    again = cli("backend-create", "fast", "--driver", "file", "--path", str(place), "--format", "json")
    assert again.json == {"name": "fast", "driver": "file", "path": str(place)}
    assert cli("backend-create", "fast", "--driver", "file", "--path", "fast").out.startswith("backend fast is there")
    assert cli("backend-list", "-H", "-o", "name,place").lines == [f"fast\t{place}"]


def test_how_a_store_keeps_what_is_sealed(cli: Cli, tmp_path: Path) -> None:
    place = str(tmp_path / "fast")
    made = ["backend-create", "fast", "--driver", "file", "--path", place]
    chosen = ["--hash", "sha256", "--compression", "zstd", "--chunk-size", "64K"]
    assert cli(*made, *chosen).code == 0
    info = cli("backend-info", "fast", "--format", "json").json
    assert (info["hash"], info["compression"]) == ("sha256", "zstd")
    again = ["backend-create", "again", "--driver", "file", "--path", place]
    cli("--root", str(tmp_path / "other"), *again, "--hash", "blake3").failed(1, "its hash is sha256")
    cli("--root", str(tmp_path / "other"), *again, "--compression", "none").failed(1, "its compression is zstd")
    cli("--root", str(tmp_path / "other"), *again, "--chunk-size", "4K").failed(1, "sectors a chunk is 16")
    assert cli("--root", str(tmp_path / "other"), *again, *chosen).code == 0
    third = ["backend-create", "third", "--driver", "file", "--path", str(tmp_path / "third")]
    cli(*third, "--hash", "md5").failed(2, "no content hash is called 'md5'")
    cli(*third, "--compression", "gzip").failed(2, "no compression is called 'gzip'")
    cli(*third, "--chunk-size", "3K").failed(2, "chunks of 3 KiB on average cannot be")


def test_volumes_lie_where_they_were_wanted(cli: Cli, vm1: str, tmp_path: Path) -> None:
    cli("backend-create", "fast", "--driver", "file", "--path", str(tmp_path / "fast"))
    cli("volume-create", "--name", "vm2", "--size", "2G", "--backend", "fast")
    cli("volume-snapshot", "vm2@monday")
    assert cli("volume-list", "-H", "-o", "name,backend").lines == ["vm1\tdefault", "vm2\tfast", "vm2@monday\tfast"]
    info = cli("backend-info", "fast", "--format", "json").json
    assert (info["volumes"], info["snapshots"], info["provisioned"]) == (1, 1, 4 << 30)
    assert cli("backend-info", "-H", "-o", "name,volumes").out == "default\t1\n"


def test_create_refused(cli: Cli, tmp_path: Path) -> None:
    cli("backend-create", "fast", "--driver", "file", "--path", str(tmp_path / "fast"))
    other = str(tmp_path / "other")
    cli("backend-create", "fast", "--driver", "file", "--path", other).failed(1, "backend fast is configured already")
    cli("backend-create", "x", "--driver", "tape", "--path", other).failed(2, "unknown driver 'tape'")
    cli("backend-create", "x", "--driver", "file").failed(2, "path is missing")
    cli("backend-create", "a/b", "--driver", "file", "--path", other).failed(2, "invalid name 'a/b'")
    cli("backend-create", "x", "--path", other).failed(2, "'--driver'")
    (tmp_path / "plain").write_text("")
    cli("backend-create", "x", "--driver", "file", "--path", str(tmp_path / "plain")).failed(1, "plain")
    assert cli("backend-list", "-H", "-o", "name").lines == ["fast"]
    assert not Path(other).exists()


def test_unknown_backend(cli: Cli) -> None:
    cli("backend-info", "nowhere").failed(1, "no backend is called nowhere")


def test_another_configuration(archip: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "archipfs.toml"
    config.write_text(f'[node]\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n')
    archip("--config", str(config), "volume-list").failed(2, "no backend is configured", "backend-create")
    made = archip("--config", str(config), "backend-create", "b", "--driver", "file", "--path", str(tmp_path / "b"))
    assert made.code == 0
    monkeypatch.setenv("ARCHIPFS_ROOT", str(tmp_path / "unused"))
    assert archip("--config", str(config), "backend-list", "-H", "-o", "name").lines == ["b"]
    assert not (tmp_path / "unused").exists()


def test_root_by_the_environment(archip: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHIPFS_ROOT", str(root))
    assert archip("volume-create", "--name", "vm1", "--size", "1G").code == 0
    monkeypatch.delenv("ARCHIPFS_ROOT")
    assert archip("--root", str(root), "volume-list", "-H", "-o", "name").lines == ["vm1"]


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("colour = 1", "unknown key colour"),
        ("[node]\nstatedir = '/x'", "unknown key node.statedir"),
        ("[node]\nstate_dir = 'x'", "node.state_dir"),
        ("node = 1", "node is not a table"),
        ("[backend.b]\npath = '/x'", "backend.b has no driver"),
        ("[backend.b]\ndriver = 'tape'", "unknown driver 'tape'"),
        ("[backend.b]\ndriver = 'file'", "path is missing"),
        ("[backend.b]\ndriver = 'file'\npath = '/x'\ncolour = 1", "unknown option 'colour'"),
        ("[", "is not TOML"),
    ],
)
def test_configuration_is_wrong(cli: Cli, root: Path, text: str, mention: str) -> None:
    root.mkdir()
    (root / "archipfs.toml").write_text(text)
    cli("volume-list").failed(2, mention)


def test_configuration_is_missing(archip: Cli, tmp_path: Path) -> None:
    archip("--config", str(tmp_path / "none.toml"), "volume-list").failed(2, "none.toml")


def test_root_is_a_file(archip: Cli, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    archip("--root", str(tmp_path / "plain"), "volume-list").failed(2, "plain")


def _replace_in_records(root: Path, kind: str, old: bytes, new: bytes) -> None:
    store = open_blocker("file", {"path": str(root / "state" / "store")})
    for key, record in list(store.list_records(kind)):
        assert old in record.value
        store.put_record(key, record.value.replace(old, new, 1), record.version)
    store.close()


def test_a_store_of_a_later_version(cli: Cli, vm1: str, root: Path) -> None:
    _replace_in_records(root, "store", b"archipfs-record 4", b"archipfs-record 5")
    cli("volume-list").failed(1, "format 5", "upgrade archipfs")


def test_a_damaged_record(cli: Cli, vm1: str, root: Path) -> None:
    _replace_in_records(root, "volume", b'"size":1073741824', b'"size":1073741825')
    cli("volume-info", vm1).failed(1, "damaged", "checksum")
    cli("volume-remove", vm1).failed(1, "damaged", "checksum")


def test_what_check_finds(cli: Cli, vm1: str, root: Path) -> None:
    assert cli("check").out == "no problems found\n"
    config = load_config(root=root)
    with exclusive(config, holder={}), open_node(config) as node:
        mapper = node.composer.mapper()
        mapper.blocker.delete_data(f"layer/{node.composer.find(vm1).record.layer}")
    found = cli("check", "-H", "-o", "severity,what")
    assert (found.code, found.lines) == (1, ["error\tits layer object is missing"])
    assert cli("check", "--format", "json").json[0]["backend"] == "default"
