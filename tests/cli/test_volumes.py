"""Commands on volumes, on a private instance without a daemon."""

import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from archipfs.config import load_config
from archipfs.daemon.node import exclusive, open_node
from tests.cli.conftest import Cli


def names(cli: Cli) -> list[str]:
    return cli("volume-list", "-H", "-o", "name").lines


@pytest.fixture
def another_node(root: Path) -> Callable[[], None]:
    """Go on as another node on the same store."""

    def become() -> None:
        (root / "state" / "node-id").write_text(uuid.uuid4().hex + "\n")

    return become


class TestMaking:
    def test_create(self, cli: Cli) -> None:
        assert cli("volume-create", "--name=vm1", "--size=20G").out == "created vm1, 20 GiB\n"
        assert cli("volume-create", "--name", "vm2", "--size", "512MiB", "--backend", "default", "-q").out == ""
        made = cli("volume-create", "--name", "vm3", "--size", "4096", "--format", "json").json
        assert (made["name"], made["kind"], made["size"]) == ("vm3", "volume", 4096)
        assert cli("volume-list", "-Hp", "-o", "name,kind,size,backend,parent").lines == [
            f"vm1\tvolume\t{20 << 30}\tdefault\t-",
            f"vm2\tvolume\t{512 << 20}\tdefault\t-",
            "vm3\tvolume\t4096\tdefault\t-",
        ]

    def test_what_is_made_belongs_to_whoever_made_it(self, cli: Cli, vm1: str) -> None:
        info = cli("volume-info", vm1, "--format", "json").json
        assert (info["uid"], info["gid"], info["mode"]) == (os.geteuid(), os.getegid(), "0600")

    def test_name_exists(self, cli: Cli, vm1: str) -> None:
        cli("volume-create", "--name", vm1, "--size", "1G").failed(1, "vm1 exists already")

    @pytest.mark.parametrize("name", ["", "a/b", ".hidden", ".", "..", "x" * 256, "ü" * 128, "\udcff", "a\0b"])
    def test_invalid_name(self, cli: Cli, vm1: str, name: str) -> None:
        mention = "invalid name"
        cli("volume-create", "--name", name, "--size", "1G").failed(2, mention)
        cli("volume-clone", vm1, "--name", name).failed(2, mention)
        cli("volume-snapshot", vm1, "--name", name).failed(2, mention)
        cli("volume-rename", vm1, name).failed(2, mention)
        cli("volume-info", name).failed(2, mention)
        assert names(cli) == [vm1]

    @pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a b", "-x", "a@b@c", "a\nb", "'\"$(x)", "…"])
    def test_unusual_name(self, cli: Cli, name: str) -> None:
        assert cli("volume-create", "--name", name, "--size", "1G").code == 0
        assert [row["name"] for row in cli("volume-list", "--format", "json").json] == [name]
        assert cli("volume-remove", "--", name).code == 0
        assert names(cli) == []

    @pytest.mark.parametrize(
        "size", ["0", "0G", "-1", "-20G", "nan", "inf", "ten", "", "1.5", "1e3", "20 X", "9EiB", "9223372036854775809"]
    )
    def test_invalid_size(self, cli: Cli, vm1: str, size: str) -> None:
        mention = "size" if size != "1.5" else "whole number of bytes"
        cli("volume-create", "--name", "new", "--size", size).failed(2, mention)
        cli("volume-resize", vm1, "--size", size).failed(2, mention)
        cli("volume-clone", vm1, "--name", "new", "--size", size).failed(2, mention)
        cli("volume-snapshot", vm1, "--name", "new", "--size", size).failed(2, mention)
        assert cli("volume-list", "-Hp", "-o", "name,size").lines == [f"vm1\t{1 << 30}"]

    def test_more_than_the_driver_can_keep(self, cli: Cli, vm1: str) -> None:
        most = int(cli("backend-info", "-Hp", "-o", "volume_size_max").out)
        cli("volume-create", "--name", "new", "--size", str(most + 1)).failed(1, "backend default")
        assert cli("volume-create", "--name", "new", "--size", str(most)).code == 0

    def test_unknown_backend(self, cli: Cli) -> None:
        cli("volume-create", "--name", "new", "--size", "1G", "--backend", "nowhere").failed(1, "nowhere")

    @pytest.mark.parametrize("given", [["--size", "1G"], ["--name", "new"], ["new", "--name", "new", "--size", "1G"]])
    def test_wrong_usage(self, cli: Cli, given: list[str]) -> None:
        cli("volume-create", *given).failed(2, "see archip volume-create --help")

    def test_clone(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-clone", vm1, "--name=vm2").out == "cloned vm1 to vm2, 1 GiB\n"
        assert cli("volume-clone", vm1, "--name", "vm3", "--size", "2G").out == "cloned vm1 to vm3, 2 GiB\n"
        assert cli("volume-list", "-H", "-o", "name,kind,parent").lines[1:] == ["vm2\tclone\tvm1", "vm3\tclone\tvm1"]

    def test_clone_of_a_snapshot(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        assert cli("volume-clone", "vm1@monday", "--name", "vm2").code == 0
        assert cli("volume-info", "vm2", "-H", "-o", "kind,parent").out == "clone\tvm1@monday\n"

    def test_clone_refused(self, cli: Cli, vm1: str) -> None:
        cli("volume-clone", vm1, "--name", "vm2", "--size", "1M").failed(2, "1 MiB", "smaller than vm1", "1 GiB")
        cli("volume-clone", vm1, "--name", vm1).failed(1, "vm1 exists already")
        cli("volume-clone", "nothing", "--name", "vm2").failed(1, "nothing")
        cli("volume-clone", vm1).failed(2, "'--name'")
        assert names(cli) == [vm1]


class TestSnapshots:
    def test_with_a_name(self, cli: Cli, vm1: str) -> None:
        done = cli("volume-snapshot", vm1, "--name", "monday")
        assert done.out == "made monday, a snapshot of vm1, 1 GiB\n"
        assert cli("volume-info", "monday", "-H", "-o", "kind,parent,mode").out == "snapshot\tvm1\t0444\n"

    def test_volume_at_snapshot(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-snapshot", "vm1@monday").out == "made vm1@monday, a snapshot of vm1, 1 GiB\n"
        assert cli("volume-info", "vm1@monday", "-H", "-o", "parent").out == "vm1\n"
        cli("volume-snapshot", "vm1@monday").failed(1, "vm1@monday exists already")

    def test_without_a_name(self, cli: Cli, vm1: str) -> None:
        made = cli("volume-snapshot", vm1, "--format", "json").json
        assert re.fullmatch(r"vm1@\d{8}-\d{6}", made["name"])

    def test_of_a_volume_with_an_at_in_its_name(self, cli: Cli) -> None:
        cli("volume-create", "--name", "ann@home", "--size", "1G")
        assert cli("volume-snapshot", "ann@home@monday").out == "made ann@home@monday, a snapshot of ann@home, 1 GiB\n"
        made = cli("volume-snapshot", "ann@home", "--format", "json").json
        assert re.fullmatch(r"ann@home@\d{8}-\d{6}", made["name"])
        assert cli("volume-rollback", "ann@home@monday").code == 0

    def test_larger(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-snapshot", "vm1@large", "--size", "2G").out.endswith("2 GiB\n")
        cli("volume-snapshot", "vm1@small", "--size", "1M").failed(2, "smaller than vm1")

    def test_of_nothing(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "nothing").failed(1, "nothing")
        cli("volume-snapshot", "nothing@monday").failed(1, "no volume is called nothing;")
        cli("volume-snapshot", "vm1@").failed(2, "'vm1@'", "VOLUME@SNAPSHOT")
        cli("volume-snapshot", "@monday").failed(2, "'@monday'")
        assert names(cli) == [vm1]

    def test_of_a_file_that_has_no_size_yet(self, cli: Cli, vm1: str, root: Path) -> None:
        config = load_config(root=root)
        with exclusive(config, holder={}), open_node(config) as node:
            node.composer.create("empty", 0)
        cli("volume-snapshot", "empty@monday").failed(2, "empty has no size yet")

    def test_does_not_change(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        cli("volume-resize", "vm1@monday", "--size", "2G").failed(1, "vm1@monday is a snapshot")
        cli("volume-rollback", "vm1@monday", "vm1@monday").failed(1, "vm1@monday is a snapshot")


class TestRollback:
    def test_keeps_what_it_leaves(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        cli("volume-resize", vm1, "--size", "2G")
        done = cli("volume-rollback", "vm1@monday", "--format", "json").json
        assert (done["name"], done["snapshot"], done["size"]) == (vm1, "vm1@monday", 1 << 30)
        assert cli("volume-list", "-H", "-o", "name,size").lines == [
            "vm1\t1 GiB",
            f"{done['kept']}\t2 GiB",
            "vm1@monday\t1 GiB",
        ]

    def test_with_two_arguments(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", vm1, "--name", "monday")
        done = cli("volume-rollback", vm1, "monday")
        assert re.fullmatch(r"rolled vm1 back to monday; what it held is kept as vm1@\S+\n", done.out)

    def test_dry_run(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        would = cli("volume-rollback", "vm1@monday", "--dry-run").out
        assert would == "would roll vm1 back to vm1@monday, 1 GiB, and keep the 1 GiB it holds now as a snapshot\n"
        assert names(cli) == [vm1, "vm1@monday"]

    def test_refused(self, cli: Cli, vm1: str) -> None:
        cli("volume-clone", vm1, "--name", "vm2")
        cli("volume-snapshot", "vm2@monday")
        before = names(cli)
        cli("volume-rollback", vm1).failed(2, "'vm1'", "VOLUME@SNAPSHOT")
        cli("volume-rollback", "vm1@monday").failed(1, "vm1@monday")
        cli("volume-rollback", vm1, "vm2").failed(2, "vm2 is not a snapshot")
        cli("volume-rollback", vm1, "vm2@monday").failed(2, "vm2@monday is not a snapshot of vm1")
        cli("volume-open", "vm2")
        cli("volume-rollback", "vm2@monday").failed(1, "vm2", "volume-close")
        assert names(cli) == before


class TestChanging:
    def test_rename(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-rename", vm1, "vm2").out == "renamed vm1 to vm2\n"
        assert names(cli) == ["vm2"]

    def test_rename_refused(self, cli: Cli, vm1: str) -> None:
        cli("volume-create", "--name", "vm2", "--size", "1G")
        cli("volume-rename", vm1, "vm2").failed(1, "vm2 exists already")
        cli("volume-rename", "nothing", "vm3").failed(1, "nothing")
        cli("volume-rename", vm1).failed(2, "'NEW'")
        assert names(cli) == ["vm1", "vm2"]

    def test_resize_both_ways(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-resize", vm1, "--size", "2G").out == "resized vm1 to 2 GiB\n"
        assert cli("volume-resize", vm1, "--size", "1M", "--format", "json").json == {"name": vm1, "size": 1 << 20}
        assert cli("volume-info", vm1, "-H", "-o", "size").out == "1 MiB\n"
        assert "lost" in cli("volume-resize", "--help").out

    def test_resize_dry_run(self, cli: Cli, vm1: str) -> None:
        would = cli("volume-resize", vm1, "--size", "1M", "--dry-run")
        assert would.out == "would resize vm1 from 1 GiB to 1 MiB; the last 1023 MiB would be lost\n"
        assert cli("volume-info", vm1, "-H", "-o", "size").out == "1 GiB\n"

    def test_resize_refused(self, cli: Cli, vm1: str) -> None:
        cli("volume-resize", "nothing", "--size", "1G").failed(1, "nothing")
        cli("volume-resize", vm1).failed(2, "'--size'")

    def test_remove(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        cli("volume-clone", "vm1@monday", "--name", "vm2")
        assert cli("volume-remove", vm1, "vm1@monday").out == "removed vm1\nremoved vm1@monday\n"
        assert names(cli) == ["vm2"]
        assert cli("check").code == 0

    def test_remove_dry_run(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-remove", vm1, "--dry-run").out == "would remove vm1, a volume of 1 GiB\n"
        would = cli("volume-remove", vm1, "--dry-run", "--format", "json").json
        assert would == [{"name": vm1, "kind": "volume", "size": 1 << 30, "dry_run": True}]
        cli("volume-remove", "--dry-run", "nothing").failed(1, "nothing")
        assert names(cli) == [vm1]

    def test_remove_stops_at_the_first_that_fails(self, cli: Cli, vm1: str) -> None:
        cli("volume-create", "--name", "vm2", "--size", "1G")
        done = cli("volume-remove", vm1, "nothing", "vm2")
        assert (done.code, done.out) == (1, "removed vm1\n")
        assert done.err.startswith("archip: no volume is called nothing")
        assert done.err.endswith("; removed before that: vm1\n")
        assert names(cli) == ["vm2"]

    def test_remove_refused(self, cli: Cli, vm1: str) -> None:
        cli("volume-remove", "nothing").failed(1, "nothing")
        cli("volume-remove").failed(2, "'NAME...'")
        cli("volume-open", vm1)
        cli("volume-remove", vm1).failed(1, "vm1", "volume-close vm1")


class TestLocks:
    def test_lock_and_unlock(self, cli: Cli, vm1: str) -> None:
        host = os.uname().nodename
        assert cli("volume-lock", vm1).out == f"locked vm1 for {host}\n"
        assert cli("volume-lock", vm1, "--format", "json").json["holds"] == ["locked"]
        assert host in cli("volume-info", vm1, "-H", "-o", "lock").out
        assert cli("volume-unlock", vm1).out == "unlocked vm1\n"
        assert cli("volume-unlock", vm1).code == 0
        assert cli("volume-info", vm1, "-H", "-o", "lock").out == "-\n"

    def test_open_and_close(self, cli: Cli, vm1: str) -> None:
        assert cli("volume-open", vm1).out == f"opened vm1 on {os.uname().nodename}\n"
        assert cli("volume-info", vm1, "--format", "json").json["lock"]["holds"] == ["opened"]
        assert cli("volume-close", vm1).out == "closed vm1\n"
        assert cli("volume-info", vm1, "--format", "json").json["lock"] is None

    @pytest.mark.parametrize("force", ["-f", "--force"])
    def test_lock_of_another_node(self, cli: Cli, vm1: str, another_node: Callable[[], None], force: str) -> None:
        cli("volume-lock", vm1)
        another_node()
        for command in (
            ["volume-lock", vm1],
            ["volume-open", vm1],
            ["volume-unlock", vm1],
            ["volume-snapshot", vm1],
            ["volume-resize", vm1, "--size", "2G"],
            ["volume-rename", vm1, "vm2"],
            ["volume-remove", vm1],
        ):
            cli(*command).failed(1, "vm1")
        assert cli("volume-unlock", vm1, force).code == 0
        assert cli("volume-remove", vm1).code == 0

    @pytest.mark.parametrize("command", ["volume-lock", "volume-unlock", "volume-open", "volume-close", "volume-info"])
    def test_of_nothing(self, cli: Cli, command: str) -> None:
        cli(command, "nothing").failed(1, "no volume is called nothing")
        cli(command).failed(2, "'NAME'", f"see archip {command} --help")


class TestSealing:
    def test_a_snapshot(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        assert cli("volume-info", "vm1@monday", "-H", "-o", "state,sealed").out == "frozen\tno\n"
        assert cli("volume-seal", "vm1@monday").out.startswith("sealed vm1@monday: read 0 B, stored ")
        assert cli("volume-info", "vm1@monday", "-H", "-o", "state,sealed").out == "sealed\tyes\n"
        assert cli("volume-seal", "vm1@monday").out == "vm1@monday has nothing to seal\n"

    def test_several(self, cli: Cli, vm1: str) -> None:
        cli("volume-snapshot", "vm1@monday")
        done = cli("volume-seal", "vm1", "vm1@monday", "--format", "json").json
        assert [(each["name"], each["layers"]) for each in done] == [("vm1", 1), ("vm1@monday", 0)]

    def test_all_but_what_another_node_has(
        self, cli: Cli, vm1: str, another_node: Callable[[], None], tmp_path: Path
    ) -> None:
        cli("volume-create", "--name", "vm2", "--size", "1G")
        cli("volume-snapshot", "vm2@monday")
        cli("volume-lock", "vm1")
        another_node()
        lines = cli("volume-seal", "--all").lines
        assert lines[0].startswith("passed over vm1: vm1 is locked by ")
        assert [line.partition(" ")[0] for line in lines[1:]] == ["sealed", "vm2@monday"]
        cli("volume-seal", "vm1").failed(1, "vm1 is locked by ")

    @pytest.mark.parametrize("given", [[], ["vm1", "--all"]])
    def test_wrong_usage(self, cli: Cli, vm1: str, given: list[str]) -> None:
        cli("volume-seal", *given).failed(2, "--all")

    def test_unknown(self, cli: Cli, vm1: str) -> None:
        cli("volume-seal", "nothing").failed(1, "nothing")


class TestImport:
    def test_a_file(self, cli: Cli, tmp_path: Path) -> None:
        image = tmp_path / "image"
        image.write_bytes(os.urandom(20000))
        os.truncate(image, 1 << 20)
        assert cli("volume-import", str(image), "--name", "vm1").out.startswith(
            "imported vm1, 1 MiB: 20 KiB of data, stored 20."
        )
        made = cli("volume-import", str(image), "--name", "vm2", "--format", "json").json
        assert (made["size"], made["data"], made["added"]) == (1 << 20, 5 * 4096, 0)
        assert cli("volume-info", "vm2", "-H", "-o", "kind,sealed").out == "volume\tyes\n"

    def test_refused(self, cli: Cli, vm1: str, tmp_path: Path) -> None:
        image = tmp_path / "image"
        image.touch()
        cli("volume-import", str(image), "--name", "vm2").failed(2, "size 0 is not positive")
        image.write_bytes(b"x")
        cli("volume-import", str(image), "--name", vm1).failed(1, "vm1 exists already")
        cli("volume-import", str(image), "--name", "a/b").failed(2, "invalid name")
        cli("volume-import", str(image), "--name", "vm2", "--backend", "nowhere").failed(1, "nowhere")
        cli("volume-import", str(tmp_path / "none"), "--name", "vm2").failed(1, "there is no file")
        cli("volume-import", str(tmp_path), "--name", "vm2").failed(2, "neither a file nor a disk")
        assert names(cli) == [vm1]
