"""The configuration: what is read, what is refused and why, what is kept when a backend is added."""

import os
import threading
from pathlib import Path

import pytest

from archipfs.config import (
    DEFAULT_RUN_DIR,
    DEFAULT_STATE_DIR,
    BackendConfig,
    CacheConfig,
    Config,
    SealConfig,
    load_config,
    save_backend,
)
from archipfs.errors import InvalidConfig

WHOLE = """\
# kept by hand
[node]
state_dir = "/srv/archipfs"   # a disk of its own
run_dir = "/run/elsewhere"

[backend.default]
driver = "file"
path = "/srv/store"

[backend.ceph]   # not yet
driver = "rados"
pool = "archip"
conf = "/etc/ceph/ceph.conf"
"""


def written(directory: Path, text: str) -> Path:
    path = directory / "archipfs.toml"
    path.write_text(text)
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    config = load_config(path=path)
    assert config.path == path
    assert (config.state_dir, config.run_dir) == (Path("/srv/archipfs"), Path("/run/elsewhere"))
    assert config.root is None
    assert config.default_store == Path("/srv/archipfs/store")
    assert dict(config.backends) == {
        "default": BackendConfig("default", "file", {"path": "/srv/store"}),
        "ceph": BackendConfig("ceph", "rados", {"pool": "archip", "conf": "/etc/ceph/ceph.conf"}),
    }
    assert list(config.backends) == ["default", "ceph"], "names are looked for in the order of the file"


def test_when_to_seal_and_what_to_keep_is_read(tmp_path: Path) -> None:
    text = """
    [seal]
    background = false
    after = 1.5
    threads = 4
    bandwidth = "100MiB"
    live_after = 86400
    [cache]
    extents = "1MiB"
    packs = "2GiB"
    objects = 0
    """
    config = load_config(path=written(tmp_path, text))
    assert config.seal == SealConfig(False, 1.5, 4, 100 << 20, 86400)
    assert config.cache == CacheConfig(extents=1 << 20, objects=0, packs=2 << 30)


def test_an_empty_file_has_the_defaults(tmp_path: Path) -> None:
    config = load_config(path=written(tmp_path, ""))
    assert (config.state_dir, config.run_dir) == (DEFAULT_STATE_DIR, DEFAULT_RUN_DIR)
    assert dict(config.backends) == {}


def test_a_root_has_everything_under_it(tmp_path: Path) -> None:
    config = load_config(root=tmp_path)
    assert config.root == tmp_path
    assert (config.path, config.state_dir, config.run_dir) == (
        tmp_path / "archipfs.toml",
        tmp_path / "state",
        tmp_path / "run",
    )
    assert config.default_store == tmp_path / "state" / "store"


def test_a_root_reads_its_own_file(tmp_path: Path) -> None:
    written(tmp_path, WHOLE)
    config = load_config(root=tmp_path)
    assert set(config.backends) == {"default", "ceph"}
    assert config.run_dir == Path("/run/elsewhere")


def test_a_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(root=Path("here")).state_dir == tmp_path / "here" / "state"


def test_a_file_that_was_asked_for_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"no configuration file .*none\.toml; create it or leave --config out"):
        load_config(path=tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[node", "is not TOML"),
        ("a = ", "is not TOML"),
        ("a = 1\na = 2", "is not TOML"),
        ("colour = 1", "unknown key colour; the keys there are backend, cache, gc, node, seal"),
        ("[nodes]", "unknown key nodes"),
        (
            "[seal]\nlate = 1",
            r"unknown key seal\.late; the keys there are after, background, bandwidth, live_",
        ),
        ("[gc]\nbackground = 1", "gc.background is neither true nor false: 1"),
        ("[gc]\nevery = -1", "gc.every is not a number of seconds: -1"),
        ("[gc]\noften = 1", r"unknown key gc\.often; the keys there are background, every"),
        ("[seal]\nbackground = 1", "seal.background is neither true nor false: 1"),
        ("[seal]\nafter = -1", "seal.after is not a number of seconds: -1"),
        ("[seal]\nafter = nan", "seal.after is not a number of seconds: nan"),
        ('[seal]\nlive_after = "1h"', "seal.live_after is not a number of seconds: '1h'"),
        ("[seal]\nthreads = 0", "seal.threads is not a number from 1 to 64: 0"),
        ("[seal]\nthreads = true", "seal.threads is not a number from 1 to 64: True"),
        ('[seal]\nbandwidth = "fast"', "seal.bandwidth: not a size: 'fast'"),
        ("[cache]\nextents = 1.5", "cache.extents is not a size: 1.5"),
        ("[cache]\nextent = 1", r"unknown key cache\.extent; the keys there are extents, objects, packs"),
        ('[node]\nstatedir = "/a"', r"unknown key node\.statedir; the keys there are run_dir, state_dir"),
        ("node = 1", "node is not a table; write it as \\[node\\]"),
        ("[[node]]", "node is not a table"),
        ("backend = []", "backend is not a table"),
        ('[backend]\ndefault = "file"', r"backend\.default is not a table"),
        ("[backend.default]", r"backend\.default has no driver"),
        ("[backend.default]\ndriver = 1", r"backend\.default has no driver"),
        ("[node]\nstate_dir = 1", r"node\.state_dir is not an absolute path: 1"),
        ('[node]\nstate_dir = "var"', r"node\.state_dir is not an absolute path: 'var'"),
        ('[node]\nrun_dir = ""', r"node\.run_dir is not an absolute path: ''"),
        ('[node]\nrun_dir = ["/run"]', r"node\.run_dir is not an absolute path"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidConfig, match=message) as caught:
        load_config(path=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot read configuration"):
        load_config(path=tmp_path)


def test_what_is_not_utf8_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "archipfs.toml"
    path.write_bytes(b"[node]\n# \xff\n")
    with pytest.raises(InvalidConfig, match=r"archipfs\.toml is not UTF-8"):
        load_config(path=path)


# Adding a backend


def test_a_file_whose_backends_stand_in_braces_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, text := 'backend = {a = {driver = "x"}}\n')
    with pytest.raises(InvalidConfig, match="stands in braces"):
        save_backend(load_config(path=path), BackendConfig("new", "file", {}))
    assert path.read_text() == text


def test_a_first_backend_makes_the_file(tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    added = BackendConfig("default", "file", {"path": "/srv/store", "pack_bytes": 1 << 20})
    config = save_backend(load_config(root=root), added)
    assert dict(config.backends) == {"default": added}
    assert load_config(root=root) == config


def test_what_was_there_stays_with_its_comments(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    added = BackendConfig("fast", "file", {"path": "/srv/fast"})
    config = save_backend(load_config(path=path), added)
    text = path.read_text()
    assert text.startswith(WHOLE.rstrip())
    assert "# kept by hand" in text
    assert "# a disk of its own" in text
    assert load_config(path=path) == config
    assert list(config.backends) == ["default", "ceph", "fast"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "[node]\n",
        "[backend]\n",
        "[backend.a]\ndriver = 'file'\n[node]\n",
        'backend.a.driver = "x"\n',
        '[backend.a]\ndriver = "x"',
        '[backend."a.b"]\ndriver = "x"\n',
    ],
)
def test_a_backend_is_added_to_any_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    before = load_config(path=path)
    added = BackendConfig("new", "file", {"path": "/srv/new"})
    config = save_backend(before, added)
    assert load_config(path=path) == config
    assert dict(config.backends) == {**before.backends, "new": added}


@pytest.mark.parametrize("name", ["a b", "a.b", "ü", '"', "a'b", "a#b", "[x]", "1", "a=b", "\\"])
def test_names_and_values_need_not_be_plain(tmp_path: Path, name: str) -> None:
    config = save_backend(load_config(root=tmp_path), BackendConfig(name, "file", {"path": f"/srv/{name}\n\t#"}))
    assert load_config(root=tmp_path) == config


def test_a_backend_saved_again_replaces_itself(tmp_path: Path) -> None:
    config = load_config(root=tmp_path)
    for path in ("/a", "/b"):
        config = save_backend(config, BackendConfig("default", "file", {"path": path}))
    assert dict(load_config(root=tmp_path).backends) == {"default": BackendConfig("default", "file", {"path": "/b"})}


def test_the_file_is_never_seen_half_written(tmp_path: Path) -> None:
    config = save_backend(load_config(root=tmp_path), BackendConfig("default", "file", {"path": "/a"}))
    stop = threading.Event()
    seen: list[Config] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(load_config(root=tmp_path))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        config = save_backend(config, BackendConfig("default", "file", {"path": f"/{number}"}))
    stop.set()
    reader.join()
    assert seen
    assert all(set(config.backends) == {"default"} for config in seen)
    assert os.listdir(tmp_path) == ["archipfs.toml"], "nothing temporary is left"
