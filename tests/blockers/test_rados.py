"""The ``rados`` driver against the contract, on a cluster, and what is its own."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from archipfs.blockers.contract import Blocker
from archipfs.blockers.rados import packs as packs_module
from archipfs.blockers.rados import records as records_module
from archipfs.blockers.rados.blocker import RadosBlocker
from archipfs.blockers.rados.claims import LOCK
from archipfs.blockers.rados.connection import Connection
from archipfs.blockers.rados.omap import Condition, Is, change, read, scan
from archipfs.blockers.rados.settings import Settings
from archipfs.errors import NotSupported, ShutOut, StoreError, StoreFull, StoreUnavailable, TooLarge
from tests.blockers.claims import ClaimConformance
from tests.blockers.conformance import Conformance, Store, check_churn, churn, run_threads
from tests.blockers.fake_omap import FakeOmap
from tests.lib.ceph import POOL, Cluster
from tests.lib.waiting import wait_until

pytestmark = pytest.mark.ceph

CLIENT = Path(__file__).with_name("rados_client.py")

Options = dict[str, str]


class TestRados(Conformance, ClaimConformance):
    @pytest.fixture
    def store(self, ceph_backend: Options) -> Store:
        return Store(lambda: RadosBlocker.from_options(**ceph_backend))


@pytest.fixture
def connection(ceph_backend: Options) -> Iterator[Connection]:
    with closing(Connection(Settings.from_options(ceph_backend))) as made:
        yield made


@pytest.fixture
def blocker(ceph_backend: Options) -> Iterator[RadosBlocker]:
    with closing(RadosBlocker.from_options(**ceph_backend)) as made:
        yield made


def objects_of(cluster: Cluster, options: Options, space: str = "") -> set[str]:
    """The names of all RADOS objects of a store, in one of its namespaces."""
    return set(cluster.rados("--namespace", options["namespace"] + space, "ls").split())


# Connecting


def problem_of(options: Options) -> str:
    began = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        RadosBlocker.from_options(**{"timeout": "60", **options})
    assert time.monotonic() < began + 30, "it waited for what will not come"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pool_that_is_not_there(ceph_backend: Options) -> None:
    assert "ceph osd pool create none && " in problem_of({**ceph_backend, "pool": "none"})


def test_a_wrong_key(ceph_backend: Options, tmp_path: Path) -> None:
    keyring = tmp_path / "keyring"
    keyring.write_text(f"[client.{ceph_backend['user']}]\nkey = AQB9YiBn6HqCFRAAzqWfUjGqGsTXFzKpm5bVRw==\n")
    said = problem_of({**ceph_backend, "keyring": str(keyring)})
    assert f"refuses client.{ceph_backend['user']} (EACCES)" in said


def test_a_keyring_that_the_conf_file_names_and_that_is_not_there(ceph_backend: Options, tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text(Path(ceph_backend["conf"]).read_text() + f"\n[client]\nkeyring = {tmp_path}/none\n")
    options = {**ceph_backend, "conf": str(conf)}
    del options["keyring"]
    assert f"no key of client.{ceph_backend['user']}" in problem_of(options)


def test_monitors_that_do_not_answer(tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nmon_host = [v2:127.0.0.1:1/0,v1:127.0.0.1:2/0]\nauth_client_required = none\n")
    assert "answered within 1 s" in problem_of({"pool": "p", "conf": str(conf), "timeout": "1"})


def test_a_conf_file_that_is_none(tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text("no = [\n[[[")
    assert "is not understood" in problem_of({"pool": "p", "conf": str(conf)})


def user_with(cluster: Cluster, directory: Path, *caps: str) -> Options:
    """The options for a new user with these permissions."""
    name = directory.name
    (made,) = cluster.ceph("auth", "get-or-create", f"client.{name}", *caps)
    keyring = directory / "keyring"
    keyring.write_text(f"[client.{name}]\nkey = {made['key']}\n")
    return {"user": name, "keyring": str(keyring)}


def test_a_user_who_may_do_nothing_there(ceph_cluster: Cluster, ceph_backend: Options, tmp_path: Path) -> None:
    user = user_with(ceph_cluster, tmp_path, "mon", "allow r")
    with pytest.raises(StoreError, match=r"EPERM.*docs/operations\.md"):
        RadosBlocker.from_options(**{**ceph_backend, **user})


def test_a_user_of_one_namespace_has_all_that_a_store_needs(
    ceph_cluster: Cluster, ceph_backend: Options, tmp_path: Path
) -> None:
    """The permissions that docs/operations.md names."""
    namespace = ceph_backend["namespace"]
    caps = ["mon", "profile rbd", "osd", f"allow rwx pool={POOL} namespace={namespace}*"]
    options = {**ceph_backend, **user_with(ceph_cluster, tmp_path, *caps)}
    with closing(RadosBlocker.from_options(**options)) as here, closing(RadosBlocker.from_options(**options)) as there:
        there.put("pack/a", b"x")
        there.create_data("layer/a").pwrite(0, b"x")
        there.claim("lock/a", "there/1")
        here.shut_out("lock/a")
        with pytest.raises(ShutOut):
            there.exists("pack/a")
        assert here.get("pack/a") == b"x"
        wait_until(lambda: here.space().total_bytes > 0, "the cluster has counted")
    with pytest.raises(StoreError, match="EPERM"):
        RadosBlocker.from_options(**{**options, "namespace": "another"})


def test_an_erasure_coded_pool(ceph_cluster: Cluster, ceph_backend: Options) -> None:
    pool = "coded"
    ceph_cluster.ceph("osd", "pool", "create", pool, "1", "1", "erasure")
    try:
        with pytest.raises(NotSupported, match="pool coded is erasure-coded"):
            RadosBlocker.create(**{**ceph_backend, "pool": pool})
    finally:
        ceph_cluster.ceph("osd", "pool", "rm", pool, pool, "--yes-i-really-really-mean-it")


def test_closing(ceph_backend: Options) -> None:
    blocker = RadosBlocker.from_options(**ceph_backend)
    blocker.put("pack/a", b"x")
    listing = blocker.list("pack")
    assert next(listing) == "pack/a"
    blocker.close()
    for call in (lambda: blocker.exists("pack/a"), lambda: list(listing)):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_describe_names_all_that_tells_stores_apart(ceph_cluster: Cluster, blocker: RadosBlocker) -> None:
    fsid = ceph_cluster.ceph("fsid")["fsid"]
    assert blocker.describe().startswith(f"pool {POOL}, namespace test-")
    assert blocker.describe().endswith(f", of cluster {fsid}")


def test_space_is_that_of_the_pool(blocker: RadosBlocker) -> None:
    wait_until(lambda: blocker.space().total_bytes > 0, "the cluster has counted")
    space = blocker.space()
    assert 1 << 28 < space.available_bytes <= space.total_bytes


def test_stores_in_one_pool_know_nothing_of_each_other(ceph_cluster: Cluster) -> None:
    first, second = (RadosBlocker.from_options(**ceph_cluster.options()) for _ in range(2))
    with closing(first), closing(second):
        first.put("pack/a", b"x")
        first.create_data("layer/a").close()
        first.put_record("volume/a", b"x", None)
        first.claim("lock/a", "node/1")
        assert not list(second.list("pack"))
        assert not second.exists("pack/a")
        assert not list(second.list_data("layer"))
        assert second.get_record("volume/a") is None
        second.claim("lock/a", "node/2")
        assert first.exists("pack/a")


# Omaps


def test_omaps_are_as_the_tests_without_a_cluster_have_them(connection: Connection) -> None:
    draw = random.Random(1)
    fake = FakeOmap()
    values = ["", "0", "1", "10", "2"]
    outcomes = {True: 0, False: 0}
    for number in range(300):
        shard = f"s.{draw.randrange(2)}"
        conditions = [
            Condition(draw.choice("abc"), draw.choice(list(Is)), draw.choice(values)) for _ in range(draw.randrange(3))
        ]
        put = {name: draw.choice(values[1:]).encode() for name in draw.sample("abc", draw.randrange(3))}
        remove = draw.sample("abc", draw.randrange(3))
        results = [
            each(connection, connection.main, shard, f"step {number}", conditions=conditions, put=put, remove=remove)
            for each in (change, fake.change)
        ]
        assert results[0] == results[1]
        outcomes[results[0]] += 1
        found = [each(connection, connection.main, shard, "x", tuple("abc")) for each in (read, fake.read)]
        assert found[0] == found[1]
    assert min(outcomes.values()) > 50
    shards = ["s.0", "s.1", "none"]
    found = [sorted(each(connection, connection.main, shards, "x")) for each in (scan, fake.scan)]
    assert found[0] == found[1]


def test_a_list_goes_on_where_a_page_ends(blocker: RadosBlocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archipfs.blockers.rados.omap.PAGE_ENTRIES", 3)
    for number in range(150):
        blocker.put_record(f"volume/{number}", b"x", None)
    blocker.delete_record("volume/5", records_version(blocker, "volume/5"))
    found = [key for key, _ in blocker.list_records("volume")]
    assert len(found) == 149
    assert set(found) == {f"volume/{number}" for number in range(150) if number != 5}


def records_version(blocker: Blocker, key: str) -> int:
    found = blocker.get_record(key)
    assert found is not None
    return found.version


def test_records_by_nodes_whose_clocks_jump(ceph_backend: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    monkeypatch.setattr(records_module.time, "time_ns", lambda: draw.randrange(1, 1000))
    blockers = [RadosBlocker.from_options(**ceph_backend) for _ in range(3)]
    histories: list[Any] = []
    try:
        run_threads(
            [
                lambda each=each, seed=seed: histories.append(churn(each, "volume/a", 40, seed))  # type: ignore[misc]
                for seed, each in enumerate(blockers)
            ]
        )
        check_churn(histories, blockers[0], "volume/a")
    finally:
        for each in blockers:
            each.close()


# Packs


def test_a_pack_whose_writer_died_is_listed_once_it_is_there(
    blocker: RadosBlocker, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(packs_module.Index, "_change", after_first(packs_module.Index._change, die))
        with pytest.raises(OSError, match="gone"):
            blocker.put("pack/written", b"x")
        connection.packs.remove_object("pack/written")
    assert list(blocker.list("pack")) == []
    connection.packs.write_full("pack/written", b"x")
    assert list(blocker.list("pack")) == ["pack/written"]
    blocker.delete("pack/written")
    assert list(blocker.list("pack")) == []


def after_first(real: Callable[..., Any], later: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter((real,))
    return lambda *args, **options: next(calls, later)(*args, **options)


def test_many_packs_that_are_perhaps_there(blocker: RadosBlocker, connection: Connection) -> None:
    for number in range(40):
        blocker.put(f"pack/{number}", b"x")
    for entries in range(packs_module.SHARDS):
        shard = f"packs.pack.{entries}"
        idents = [ident for ident, _ in scan(connection, connection.main, [shard], "x")]
        if idents:
            change(connection, connection.main, shard, "x", put=dict.fromkeys(idents, b"?0"))
    for number in range(10):
        connection.packs.remove_object(f"pack/{number}")
    assert set(blocker.list("pack")) == {f"pack/{number}" for number in range(10, 40)}


def test_a_long_object_is_read_in_pieces(blocker: RadosBlocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs_module, "_READ_BYTES", 1000)
    content = random.Random(3).randbytes(50_500)
    blocker.put("pack/a", content)
    assert blocker.get("pack/a") == content
    assert blocker.get("pack/a", 1_500, 40_000) == content[1_500:41_500]
    assert blocker.get("pack/a", 30_000, 1 << 40) == content[30_000:]


def test_an_object_that_is_too_large_to_be_written_at_once(blocker: RadosBlocker) -> None:
    with pytest.raises(TooLarge, match="osd_max_write_size"):
        blocker.put("pack/a", bytes(91 << 20))
    assert list(blocker.list("pack")) == []


# A full pool


@pytest.fixture
def small_pool(ceph_cluster: Cluster) -> Iterator[Options]:
    """A store in a pool that is full after 100 kB, some seconds later."""
    pool = "small"
    ceph_cluster.ceph("osd", "pool", "create", pool, "1")
    try:
        ceph_cluster.ceph("osd", "pool", "set-quota", pool, "max_bytes", "100000")
        keyring = str(ceph_cluster.directory / "keyring.admin")
        yield {**ceph_cluster.options(), "pool": pool, "user": "admin", "keyring": keyring}
    finally:
        ceph_cluster.ceph("osd", "pool", "rm", pool, pool, "--yes-i-really-really-mean-it")


def test_from_a_full_pool_everything_can_be_removed(ceph_cluster: Cluster, small_pool: Options) -> None:
    with closing(RadosBlocker.from_options(**small_pool)) as blocker:
        data = blocker.create_data("layer/a")
        version = blocker.put_record("volume/a", b"x", None)
        numbers = iter(range(1000))

        def is_full() -> bool:
            try:
                blocker.put(f"pack/{next(numbers)}", bytes(20_000))
            except StoreFull:
                return True
            return False

        wait_until(is_full, "the pool is full")
        for call in (lambda: data.pwrite(0, b"x"), lambda: blocker.create_data("layer/b")):
            with pytest.raises(StoreFull):
                call()
        blocker.claim("lock/a", "here/1")
        blocker.put_record("condemned/a", b"x", None)
        version = blocker.put_record("volume/a", b"removed", version)
        space = blocker.space()
        assert (space.available_bytes, space.total_bytes > 0) == (0, True)
        for key in list(blocker.list("pack")):
            blocker.delete(key)
        blocker.delete_data("layer/a")
        blocker.delete_record("volume/a", version)
        blocker.disclaim("lock/a")
        assert not list(blocker.list("pack"))


# Claims


def test_a_claim_is_a_lock_that_ceph_shows(ceph_cluster: Cluster, ceph_backend: Options, blocker: RadosBlocker) -> None:
    blocker.claim("lock/a", "node/1")
    shown = json.loads(
        ceph_cluster.rados(
            *("--namespace", ceph_backend["namespace"], "lock", "info", "claim/lock/a", LOCK, "--format", "json")
        )
    )
    assert shown["tag"] == "node/1"
    assert [each["cookie"] for each in shown["lockers"]] == ["node/1", "node/1"]
    blocker.disclaim("lock/a")
    assert "claim/lock/a" not in objects_of(ceph_cluster, ceph_backend)


def test_what_was_broken_leaves_nothing(ceph_cluster: Cluster, ceph_backend: Options, blocker: RadosBlocker) -> None:
    with closing(RadosBlocker.from_options(**ceph_backend)) as there:
        there.claim("lock/a", "there/1")
        there.claim("lock/b", "there/1")
        blocker.shut_out("lock/a")
        there.disclaim("lock/b")
    blocker.claim("lock/b", "here/2")
    blocker.disclaim("lock/b")
    assert objects_of(ceph_cluster, ceph_backend) == set()


def test_both_clients_stay_on_the_blocklist_for_years(ceph_cluster: Cluster, ceph_backend: Options) -> None:
    def listed() -> dict[str, str]:
        found: dict[str, str] = ceph_cluster.ceph("osd", "dump")["blocklist"]
        return found

    before = listed()
    with closing(RadosBlocker.from_options(**ceph_backend)) as here:
        with closing(RadosBlocker.from_options(**ceph_backend)) as there:
            there.claim("lock/a", "there/1")
            here.shut_out("lock/a")
        added = {address: until for address, until in listed().items() if address not in before}
    assert len(added) == 2
    years = time.gmtime().tm_year + 9
    assert all(int(until[:4]) >= years for until in added.values())


def picture(blocker: Blocker) -> dict[str, Any]:
    """All that tests.blockers.rados_client changes."""
    found: dict[str, Any] = {key: blocker.get(key) for key in blocker.list("pack")}
    for name in "abc":
        with closing(blocker.open_data(f"layer/{name}", writable=False)) as data:
            found[name] = data.pread(0, 8192)
    found["record"] = blocker.get_record("volume/a")
    return found


def test_a_process_that_is_stopped_shut_out_and_goes_on_changes_nothing(
    ceph_backend: Options, blocker: RadosBlocker
) -> None:
    for name in "abc":
        blocker.create_data(f"layer/{name}").close()
    command = [sys.executable, str(CLIENT), json.dumps(ceph_backend)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, signal.SIGSTOP)
            blocker.shut_out("lock/a")
            blocker.claim("lock/a", "here/2")
            before = picture(blocker)
            os.kill(process.pid, signal.SIGCONT)
            said = json.loads(process.stdout.readline())
            assert said == {
                **dict.fromkeys(("record", "pack", "loose"), "ShutOut"),
                **dict.fromkeys("ab", ""),
                "is_shut_out": True,
            }
            assert picture(blocker) == before

            print(file=process.stdin, flush=True)
            assert json.loads(process.stdout.readline()) == {"a": "StoreError", "b": ""}
            after = picture(blocker)
            assert after.pop("b") > before.pop("b")
            assert after == before
        finally:
            with suppress(ProcessLookupError):
                process.kill()
