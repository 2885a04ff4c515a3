"""Being the node: one process at a time, one store once, an identity that stays."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from archipfs.config import BackendConfig, Config, load_config
from archipfs.daemon.client import connect
from archipfs.daemon.commands import call
from archipfs.daemon.node import create_backend, create_default_backend, exclusive, open_node
from archipfs.errors import AlreadyExists, Busy, DaemonError, InvalidConfig, StoreUnavailable
from archipfs.map.records import LayerRecord


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return create_default_backend(load_config(root=tmp_path))


def test_a_second_process_is_refused_and_told_of_the_first(config: Config) -> None:
    first = exclusive(config, holder={"pid": 4711, "mountpoint": "/mnt/a"})
    with first, pytest.raises(Busy, match=r"process 4711, mounted at /mnt/a"):
        exclusive(config, holder={"pid": 1}).__enter__()


def test_a_command_waits_for_a_command_and_then_gives_up(config: Config) -> None:
    with exclusive(config, holder={"pid": 4711}), pytest.raises(Busy, match="process 4711"):
        exclusive(config, holder={"pid": 1}, wait_seconds=0.1).__enter__()


def test_the_node_is_free_again_when_its_process_was_killed(config: Config) -> None:
    program = (
        "import os, signal, pathlib, sys; from archipfs.config import load_config;"
        "from archipfs.daemon.node import exclusive;"
        "exclusive(load_config(root=pathlib.Path(sys.argv[1])), holder={}).__enter__();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, "-c", program, str(config.root)], env=environment, check=False)
    assert died.returncode == -9
    with exclusive(config, holder={"pid": 1}, wait_seconds=0):
        pass


def test_the_node_keeps_its_id(config: Config) -> None:
    with open_node(config) as first, open_node(config) as second:
        assert first.identity.id == second.identity.id


def test_a_node_without_backends_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="archip backend-create"), connect(load_config(root=tmp_path)):
        pass
    assert not (tmp_path / "run").exists()


def test_a_backend_in_anothers_place_is_refused(config: Config) -> None:
    twin = BackendConfig("twin", "file", dict(config.backends["default"].options))
    with pytest.raises(AlreadyExists, match="default lies in that place"):
        create_backend(config, twin)


def test_two_backends_that_turn_out_to_be_one_store_are_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(str(config.backends["default"].options["path"]))
    config = create_backend(config, BackendConfig("twin", "file", {"path": str(tmp_path / "link")}))
    with pytest.raises(InvalidConfig, match="default and twin are the same store"), open_node(config):
        pass


def test_commands_of_another_version_are_refused_in_one_line(config: Config) -> None:
    with open_node(config) as node:
        with pytest.raises(DaemonError, match="does not know volume-fold"):
            call(node, "volume-fold", {})
        with pytest.raises(DaemonError, match="does not understand volume-info"):
            call(node, "volume-info", {"name": "a", "colour": "blue"})


def test_locks_outlive_their_process_with_whoever_keeps_the_open_files(config: Config) -> None:
    with exclusive(config, holder={"pid": 4711, "mountpoint": "/mnt/a"}) as locks:
        kept = {name: os.dup(descriptor) for name, descriptor in locks.items()}
    with pytest.raises(Busy, match=r"process 4711, mounted at /mnt/a"):
        exclusive(config, holder={"pid": 1}).__enter__()
    with exclusive(config, holder={"pid": 4712, "mountpoint": "/mnt/a"}, inherited=kept) as locks:
        assert locks == kept
        with pytest.raises(Busy, match=r"process 4712"):
            exclusive(config, holder={"pid": 1}).__enter__()
    with exclusive(config, holder={"pid": 1}, wait_seconds=0):
        pass


def test_a_lock_on_a_file_that_is_gone_is_not_taken_for_the_nodes(config: Config) -> None:
    with exclusive(config, holder={"pid": 4711}) as locks:
        kept = {name: os.dup(descriptor) for name, descriptor in locks.items()}
        (config.run_dir / "node.lock").unlink()
        (config.state_dir / "node.lock").unlink()
    with (
        exclusive(config, holder={"pid": 4712, "mountpoint": "/mnt/a"}, inherited=kept),
        pytest.raises(Busy, match="process 4712"),
    ):
        exclusive(config, holder={"pid": 1}).__enter__()


def test_one_identity_is_not_used_by_two_processes_although_their_run_directories_differ(config: Config) -> None:
    other = replace(config, run_dir=config.run_dir.with_name("another-run"))
    first = exclusive(config, holder={"pid": 4711, "mountpoint": "/mnt/a"})
    with first, pytest.raises(Busy, match=r"process 4711, mounted at /mnt/a"):
        exclusive(other, holder={"pid": 1}).__enter__()


def test_a_backend_that_is_away_keeps_nobody_from_the_others(config: Config, tmp_path: Path) -> None:
    config = create_backend(config, BackendConfig("far", "file", {"path": str(tmp_path / "far")}))
    with open_node(config) as node:
        call(node, "volume-create", {"name": "near", "size": 1 << 20})
        call(node, "volume-create", {"name": "distant", "size": 1 << 20, "backend": "far"})
    (tmp_path / "far").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailable, match="backend far"), open_node(config):
        pass
    with open_node(config, all_backends=False) as node:
        assert node.composer.find("near").record.name == "near"
        with pytest.raises(StoreUnavailable, match="backend far"):
            node.composer.find("distant")
        with pytest.raises(StoreUnavailable, match="backend far"):
            call(node, "volume-create", {"name": "distant", "size": 1 << 20})
        shown = node.composer.volumes()
        assert next(shown).record.name == "near"
        with pytest.raises(StoreUnavailable, match="backend far"):
            next(shown)
        assert [each["available"] is None for each in call(node, "backend-list", {})] == [False, True]
        (tmp_path / "elsewhere").rename(tmp_path / "far")
        node.look_for_away()
        assert sorted(str(each.record.name) for each in node.composer.volumes()) == ["distant", "near"]


def test_a_backend_that_was_forgotten_can_be_used_again(config: Config, tmp_path: Path) -> None:
    """By the same process: what is sealed in it is read as before, and what is under way in it is known."""
    far = BackendConfig("far", "file", {"path": str(tmp_path / "far")})
    config = create_backend(config, far)
    with open_node(config) as node:
        composer = node.composer
        composer.create("vm", 1 << 16, backend="far")
        with composer.using(composer.find("vm")) as opened:
            opened.write(0, b"a" * (1 << 16))
        composer.snapshot("vm", "vm@1")
        composer.seal("vm@1")
        with composer.mapper("far").bare_layer() as under_way:
            node.detach("far")
            create_backend(node.config, far)
            node.attach("far")
            composer.mapper("far").reclaim()
            assert composer.mapper("far").catalog.get(LayerRecord, under_way.id) is not None
        with composer.using(composer.find("vm@1")) as opened:
            assert opened.read(0, opened.size) == b"a" * (1 << 16)
        node.detach("far")
        create_backend(node.config, replace(far, name="other"))
        with pytest.raises(InvalidConfig, match="open as far"):
            node.attach("other")


def test_the_backend_that_volumes_are_made_in_has_to_be_there(config: Config, tmp_path: Path) -> None:
    config = create_backend(config, BackendConfig("far", "file", {"path": str(tmp_path / "far")}))
    Path(config.backends["default"].options["path"]).rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailable, match="backend default"), open_node(config, all_backends=False):
        pass
