"""``mount``, ``umount`` and ``status`` up to the daemon's door; behind it, tests of the daemon go on."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from archipfs.cli.instance import Instance
from archipfs.cli.mounts import MountOptions, parse_mount_options
from archipfs.config import Config
from archipfs.daemon.lifecycle import Upgraded
from archipfs.errors import InvalidInput
from tests.cli.conftest import Cli


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path, bool]]:
    """What was asked to be mounted; nothing is."""
    asked: list[tuple[Config, Path, bool]] = []

    def mount(config: Config, mountpoint: Path, *, foreground: bool, **options: object) -> tuple[str, ...]:
        asked.append((config, mountpoint, foreground))
        return ()

    monkeypatch.setattr("archipfs.daemon.lifecycle.mount", mount)
    return asked


def test_mount(cli: Cli, root: Path, tmp_path: Path, mounted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("mount", "mnt").out == f"mounted at {tmp_path}/mnt\n"
    assert cli("mount", str(tmp_path / "mnt"), "--format", "json").json == {"mountpoint": f"{tmp_path}/mnt"}
    assert cli("mount", "mnt", "--foreground").out == ""
    assert [(config.run_dir, mountpoint, foreground) for config, mountpoint, foreground in mounted] == [
        (root / "run", tmp_path / "mnt", False),
        (root / "run", tmp_path / "mnt", False),
        (root / "run", tmp_path / "mnt", True),
    ]


def test_mount_as_fstab_spells_it(archip: Cli, root: Path, mounted: list[Any]) -> None:
    options = f"rw,noatime,x-systemd.automount,_netdev,root={root}"
    assert archip("mount", "/mnt", "-o", options, "-o", "nofail").code == 0
    assert mounted[0][0].run_dir == root / "run"


def test_what_a_mount_lacks_is_said_beside_its_answer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archipfs.daemon.lifecycle.mount", lambda *arguments, **options: ["this kernel is old"])
    mounted = cli("mount", "/mnt/a")
    assert (mounted.code, mounted.out, mounted.err) == (0, "mounted at /mnt/a\n", "archip: this kernel is old\n")


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ("colour=red", "'colour=red'"),
        ("rw,ro", "'ro'"),
        ("threads=0", "threads=0"),
        ("threads=many", "1 to 64"),
        ("front=maybe", "'front=maybe'"),
        ("supervisor=yes", "'supervisor=yes'"),
        ("front=off,supervisor=on", "needs the front"),
        ("root=", "root has no value"),
        ("config", "config has no value"),
        ("root=/a,config=/b", "exclude each other"),
        ("config=/nowhere.toml", "/nowhere.toml"),
    ],
)
def test_wrong_option(cli: Cli, mounted: list[Any], options: str, mention: str) -> None:
    cli("mount", "/mnt", "-o", options).failed(2, mention)
    assert mounted == []


def test_options() -> None:
    here = Instance(Path("/here"))
    assert parse_mount_options(here, []) == MountOptions(here, front=True, supervised=True, threads=None)
    assert parse_mount_options(here, ["rw,,front=off, default_permissions", ""]) == MountOptions(
        here, front=False, supervised=False
    )
    assert parse_mount_options(here, ["front=off", "front=on,threads=3"]) == MountOptions(here, front=True, threads=3)
    assert parse_mount_options(here, ["supervisor=off"]) == MountOptions(here, front=True, supervised=False)
    assert parse_mount_options(here, ["root=/there"]) == MountOptions(Instance(Path("/there")))
    assert parse_mount_options(here, ["config=/a=b"]) == MountOptions(Instance(None, Path("/a=b")))


def test_only_roots_mounts_are_open_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert parse_mount_options(Instance(), ["allow_other"]) == MountOptions(Instance())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(InvalidInput, match="allow_other"):
        parse_mount_options(Instance(), ["allow_other"])


def test_mount_point_is_missing(cli: Cli, tmp_path: Path) -> None:
    cli("mount", str(tmp_path / "none")).failed(1, f"{tmp_path}/none")
    (tmp_path / "plain").write_text("")
    cli("mount", str(tmp_path / "plain")).failed(1, f"{tmp_path}/plain")
    cli("mount").failed(2, "'MNT'")


def test_mount_point_in_use(cli: Cli) -> None:
    cli("mount", "/proc").failed(1, "/proc")


def test_umount(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("umount").failed(1, "nothing is mounted")
    cli("umount", str(tmp_path)).failed(1, str(tmp_path))
    asked = []
    monkeypatch.setattr("archipfs.daemon.lifecycle.umount", lambda config, mountpoint: asked.append(mountpoint))
    assert cli("umount").out == "unmounted\n"
    assert cli("umount", str(tmp_path)).out == f"unmounted {tmp_path}\n"
    assert asked == [None, tmp_path]


def test_status_without_a_daemon(cli: Cli, root: Path) -> None:
    status = cli("status")
    assert (status.code, status.out, status.err) == (0, "nothing is mounted\n", "")
    assert cli("status", "--format", "json").json == []
    assert cli("status", "-H").out == ""
    assert not root.exists()


def test_status_of_a_mount(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = {
        "mountpoint": "/mnt/a",
        "daemon_pid": 17,
        "supervisor_pid": None,
        "front": "off",
        "backends": ["default", "fast"],
        "open_volumes": [],
        "uptime": 3723.4,
        "pause_ms": None,
    }

    class Daemon(nullcontext[None]):
        def call(self, command: str) -> Any:
            return {"status": mount}[command]

    monkeypatch.setattr("archipfs.cli.mounts.connect_daemon", lambda config: Daemon())
    assert cli("status").lines == [
        "mountpoint      /mnt/a",
        "daemon_pid      17",
        "supervisor_pid  -",
        "front           off",
        "backends        default, fast",
        "open_volumes    -",
        "uptime          1:02:03",
    ]
    assert cli("status", "-Hp", "-o", "daemon_pid,uptime").out == "17\t3723\n"
    assert cli("status", "-H", "-o", "pack_cache").out == "-\n"
    mount["pack_cache"] = {"bytes": 3 << 30, "files": 900, "fetched_bytes": 5 << 30, "hits": 12345, "evictions": 4}
    assert cli("status", "-H", "-o", "pack_cache").out == (
        "3 GiB in 900 files; 5 GiB fetched; 12345 hits; 4 evictions\n"
    )
    assert cli("status", "--format", "json").json == [mount]


def test_upgrade(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("upgrade").failed(1, "nothing is mounted")
    monkeypatch.setattr("archipfs.daemon.lifecycle.upgrade", lambda config: Upgraded(17, 18, 87.4))
    assert cli("upgrade").out == "upgraded: daemon 17 was replaced by 18, with a pause of 87 ms\n"
    assert cli("upgrade", "--format", "json").json == {"old_pid": 17, "new_pid": 18, "pause_ms": 87.4}
