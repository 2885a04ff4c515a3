"""check and gc on a private instance without a daemon: what is sealed comes from imported files."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from archipfs.blockers.file import FileBlocker
from tests.cli.conftest import Cli

SECTOR = 4096


@pytest.fixture
def image(tmp_path: Path) -> Callable[..., str]:
    """Makes a file of sectors that follow from numbers."""

    def make(name: str, numbers: range) -> str:
        path = tmp_path / name
        path.write_bytes(b"".join(random.Random(number).randbytes(SECTOR) for number in numbers))
        return str(path)

    return make


def packs(root: Path, store: str = "state/store") -> list[Path]:
    return sorted((root / store / "objects" / "pack").glob("*/*"))


def used(root: Path) -> int:
    return sum(path.stat().st_size for path in packs(root))


def damage(pack: Path, sector: bytes) -> None:
    data = bytearray(pack.read_bytes())
    data[data.index(sector)] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(bytes(data))


def test_what_was_never_sealed_has_no_garbage(cli: Cli, vm1: str, root: Path) -> None:
    assert cli("gc").out == "nothing is sealed, so there is no garbage\n"
    assert cli("gc", "--format", "json").json == []
    assert (cli("check", "--data").out, cli("check", "--data").code) == ("no problems found\n", 0)
    assert not (root / "state" / "cache").exists(), "nobody needed an index"


def test_gc_gives_back_what_a_removed_volume_left(cli: Cli, root: Path, image: Callable[..., str]) -> None:
    cli("volume-import", image("a", range(300)), "--name", "a")
    cli("volume-import", image("b", range(100, 500)), "--name", "b")
    assert cli("gc").out == "backend default: no garbage\n"
    cli("volume-remove", "a")
    before = used(root)
    would = cli("gc", "--dry-run", "--format", "json").json
    assert used(root) == before
    assert would[0]["dry_run"]
    done = cli("gc", "--format", "json").json
    assert before - used(root) == done[0]["freed"] == would[0]["freed"] == 0, "more than half of its pack is needed"
    cli("volume-remove", "b")
    assert cli("gc", "--dry-run").out.startswith("backend default: would free ")
    assert cli("gc").out.startswith("backend default: freed ")
    assert packs(root) == []
    assert cli("check").out == "no problems found\n"


def test_gc_says_what_waits_for_other_nodes(
    cli: Cli, vm1: str, root: Path, image: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a pool, whether anything was ever sealed or not."""
    monkeypatch.setattr(FileBlocker, "keeps_deleted", property(lambda self: False))
    cli("volume-snapshot", "vm1@a")
    for name in ("vm1", "vm1@a"):
        cli("volume-remove", name)
    waits = "layers wait for a minute, since other nodes may be reading them\n"
    said = cli("gc").out
    assert said.startswith("backend default: no garbage; ")
    assert said.endswith(waits)
    [done] = cli("gc", "--format", "json").json
    assert (done["packs"], done["kept"], done["layers_waiting"] > 0) == (0, {}, True)
    cli("volume-import", image("a", range(300)), "--name", "a")
    cli("volume-remove", "a")
    packed = packs(root)
    assert cli("gc").out.endswith(waits)
    assert packs(root) == packed, "its map may be being read as well"


def test_space_is_told(cli: Cli, image: Callable[..., str]) -> None:
    cli("volume-import", image("a", range(300)), "--name", "a")
    cli("volume-import", image("b", range(100, 500)), "--name", "b")
    cli("volume-snapshot", "a@s")
    a, b, snapshot = (cli("volume-info", name, "--format", "json").json for name in ("a", "b", "a@s"))
    assert b["exclusive"] == pytest.approx(200 * SECTOR, rel=0.2)
    assert b["shared"] == pytest.approx(200 * SECTOR, rel=0.2)
    assert b["removal_frees"] is None
    assert a["shared"] == pytest.approx(300 * SECTOR, rel=0.1)
    assert snapshot["removal_frees"] == snapshot["exclusive"] < SECTOR * 2
    info = cli("backend-info", "--format", "json").json
    assert info["logical"] == (300 + 300 + 400) * SECTOR
    assert info["unique"] == pytest.approx(500 * SECTOR, rel=0.1)
    assert info["dedup_ratio"] == pytest.approx(2.0, rel=0.1)
    assert info["compression_ratio"] == 1.0
    assert info["reclaimable"] == 0
    cli("volume-remove", "b")
    assert cli("backend-info", "--format", "json").json["reclaimable"] == pytest.approx(b["exclusive"])
    plain = cli("backend-info", "-H", "-o", "dedup_ratio,reclaimable,stored").lines
    assert len(plain) == 1


def test_damage_is_found_told_and_mended(cli: Cli, root: Path, tmp_path: Path, image: Callable[..., str]) -> None:
    file = image("a", range(300))
    cli("volume-import", file, "--name", "a")
    (pack,) = packs(root)
    whole = cli("check", "--data")
    assert (whole.code, whole.out) == (0, "no problems found\n")
    assert whole.err.startswith("archip: backend default: read 1.")
    damage(pack, random.Random(77).randbytes(SECTOR))
    assert cli("check").code == 0, "the structure is whole"
    found = cli("check", "--data", "-H", "-o", "severity,which,what")
    assert found.code == 1
    assert "1 damaged" in found.err
    assert len(found.lines) == 1
    severity, which, what = found.lines[0].split("\t")
    assert (severity, which.partition(" (")[0]) == ("error", "volume a")
    begin, end = (int(word) for word in what.split() if word.isdigit())
    assert begin <= 77 * SECTOR < end
    assert cli("check").code == 1, "it is written down"
    tried = cli("check", "--data", "--repair")
    assert tried.code == 1
    assert "0 mended, 1 without a good copy (looked through the other packs of this backend" in tried.err
    cli("backend-create", "second", "--driver", "file", "--path", str(tmp_path / "second"))
    cli("volume-import", file, "--name", "again", "--backend", "second")
    mended = cli("check", "--data", "--repair")
    assert (mended.code, mended.out) == (0, "no problems found\n"), mended
    assert "1 mended, 0 without" in mended.err
    assert pack not in packs(root)
    assert cli("check", "--data").code == 0


@pytest.mark.parametrize("arguments", [("--rate", "1M"), ("--repair",)])
def test_what_goes_with_data_needs_it(cli: Cli, arguments: tuple[str, ...]) -> None:
    cli("check", *arguments).failed(2, "--data")


def test_a_rate_has_to_be_a_size(cli: Cli) -> None:
    cli("check", "--data", "--rate", "fast").failed(2, "not a size")


def test_a_pack_that_is_gone_is_told_of_and_mended(
    cli: Cli, root: Path, tmp_path: Path, image: Callable[..., str]
) -> None:
    file = image("a", range(300))
    cli("volume-import", file, "--name", "a")
    packs(root)[0].unlink()
    for arguments in (("check",), ("check", "--data"), ("check", "--data", "--repair")):
        found = cli(*arguments, "-H", "-o", "which,what")
        assert found.code == 1
        assert found.out.startswith("volume a ("), "also where a page is lost and no garbage can be collected"
        assert "bytes 0 to " in found.out
    cli("gc").failed(1, "cannot be read", "nothing is deleted")
    assert cli("volume-info", "a", "--format", "json").json["exclusive"] is None
    assert cli("backend-info", "--format", "json").json["unique"] is None
    cli("backend-create", "second", "--driver", "file", "--path", str(tmp_path / "second"))
    cli("volume-import", file, "--name", "again", "--backend", "second")
    assert cli("check", "--data", "--repair").code == 0
    assert cli("volume-info", "a", "--format", "json").json["exclusive"] > 300 * SECTOR
