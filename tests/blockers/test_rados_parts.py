"""Parts of the ``rados`` driver that need no cluster: options, the binding, what a lock's holders look like."""

import errno
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from archipfs.blockers.rados import blocker as blocker_module
from archipfs.blockers.rados import claims as claims_module
from archipfs.blockers.rados import connection as connection_module
from archipfs.blockers.rados import data as data_module
from archipfs.blockers.rados.binding import load_rados
from archipfs.blockers.rados.blocker import RadosBlocker
from archipfs.blockers.rados.claims import Claims
from archipfs.blockers.rados.connection import plain_address
from archipfs.blockers.rados.data import NativeClient
from archipfs.blockers.rados.in_flight import at_once
from archipfs.blockers.rados.lock_class import Locker, LockInfo, get_info
from archipfs.blockers.rados.omap import shard, shards
from archipfs.blockers.rados.records import Records
from archipfs.blockers.rados.settings import Settings
from archipfs.blockers.registry import open_blocker
from archipfs.errors import InvalidConfig, ObjectDamaged, ShutOut, StoreUnavailable

ANSWER = bytes.fromhex(
    "01015700000001000000"
    "010110000000081f10000000000000030000006e2f31"
    "01012f0000000000000000000000010101"
    "1c000000010000008963d4501000000002000000" + "7f000001" + "0000000000000000" + "00000000"
    "02030000006e2f31"
)
"""As an OSD of Ceph 16.2 gave it: a shared lock with one holder."""


# Options


def test_options() -> None:
    assert Settings.from_options({"pool": "p"}) == Settings("p")
    given = {
        "pool": "p",
        "conf": "/c",
        "user": "u",
        "keyring": "/k",
        "namespace": "n-1.x_Y",
        "timeout": "5",
        "operation_timeout": "0",
    }
    assert Settings.from_options(given) == Settings("p", "/c", "u", "/k", "n-1.x_Y", 5, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("namespace", "a/b"),
        ("namespace", ".a"),
        ("namespace", "a" * 65),
        ("timeout", "0"),
        ("timeout", "-1"),
        ("timeout", "1.5"),
        ("timeout", "86401"),
        ("timeout", "1" * 4000),
        ("operation_timeout", ""),
        ("operation_timeout", "٣"),
    ],
)
def test_options_that_mean_nothing(name: str, value: str) -> None:
    with pytest.raises(InvalidConfig, match=name):
        Settings.from_options({"pool": "p", name: value})


def test_what_the_registry_asks_for() -> None:
    with pytest.raises(InvalidConfig, match="pool is missing"):
        open_blocker("rados", {})
    with pytest.raises(InvalidConfig, match="unknown option 'path'; its options are: conf, keyring, namespace, "):
        open_blocker("rados", {"pool": "p", "path": "/x"})


def test_a_conf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"ceph\.conf is not there; .* option conf$"):
        open_blocker("rados", {"pool": "p", "conf": str(tmp_path / "ceph.conf")})


# The binding


def test_without_the_binding_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rados", None)
    with pytest.raises(StoreUnavailable, match="apt install python3-rados"):
        load_rados(tmp_path)


def test_a_binding_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rados", None)
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    path = tmp_path / f"rados.cpython-{version}-x86_64-linux-gnu.so"
    path.write_bytes(b"no library")
    with pytest.raises(StoreUnavailable, match="reinstall python3-rados") as caught:
        load_rados(tmp_path)
    assert str(path) in str(caught.value)


# Who holds a lock


def test_lock_info() -> None:
    assert LockInfo.decode(ANSWER) == LockInfo((Locker(4127, "n/1", "127.0.0.1:0/1356096393"),), "n/1")


def test_lock_info_of_a_version_6_address() -> None:
    v6 = struct.pack("<H", 10) + struct.pack(">H", 6789) + bytes(4) + bytes(15) + b"\1" + bytes(4)
    address = ANSWER.index(bytes.fromhex("10000000020000007f"))
    answer = bytearray(ANSWER[:address] + struct.pack("<I", len(v6)) + v6 + ANSWER[address + 20 :])
    for at, grown in ((2, 12), (34, 12), (49, 12)):
        struct.pack_into("<I", answer, at, struct.unpack_from("<I", answer, at)[0] + grown)
    assert LockInfo.decode(bytes(answer)).lockers == (Locker(4127, "n/1", "[::1]:6789/1356096393"),)


def test_lock_info_with_what_a_later_version_adds() -> None:
    answer = bytearray(b"\2" + ANSWER[1:] + b"more")
    struct.pack_into("<I", answer, 2, len(ANSWER) - 6 + 4)
    assert LockInfo.decode(bytes(answer)) == LockInfo.decode(ANSWER)


def test_nobody_holds_it() -> None:
    assert LockInfo.decode(bytes.fromhex("010109000000" + "00000000" + "00" + "00000000")) == LockInfo()


@pytest.mark.parametrize("length", range(len(ANSWER)))
def test_lock_info_that_ends_too_early(length: int) -> None:
    with pytest.raises(ObjectDamaged):
        LockInfo.decode(ANSWER[:length])


@pytest.mark.parametrize("at", [1, 11, 33, 46, 48, 65])
def test_lock_info_that_is_something_else(at: int) -> None:
    with pytest.raises(ObjectDamaged):
        LockInfo.decode(ANSWER[:at] + b"\xee" + ANSWER[at + 1 :])


def test_asking_for_it() -> None:
    assert get_info("ab") == b"\1\1\6\0\0\0\2\0\0\0ab"


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("1.2.3.4:0/5", "1.2.3.4:0/5"),
        ("v1:1.2.3.4:0/5", "1.2.3.4:0/5"),
        ("v2:[::1]:0/5", "[::1]:0/5"),
        ("any:1.2.3.4:0/5", "1.2.3.4:0/5"),
    ],
)
def test_addresses_as_the_blocklist_takes_them(given: str, plain: str) -> None:
    assert plain_address(given) == plain


# Smaller parts


def test_shards_have_all_their_entries() -> None:
    assert {shard("records.volume", 4, str(number)) for number in range(100)} == set(shards("records.volume", 4))


def test_what_was_sent_is_waited_for_when_another_cannot_be() -> None:
    finished = []

    class Sent:
        def finish(self) -> None:
            finished.append(self)

    def fail() -> Sent:
        raise OSError("no more")

    sends: list[Callable[[], Sent]] = [Sent, Sent, fail, Sent]
    with pytest.raises(OSError, match="no more"):
        at_once(sends)
    assert len(finished) == 2


# Clients


class Native:
    """In place of the native client."""

    def __init__(self, kept: bool = False) -> None:
        self.kept = kept
        self.is_shut_out = False
        self.waited = 0

    def addresses(self) -> list[str]:
        return ["10.0.0.1:0/2"]

    def disclaim(self, key: str) -> bool:
        return self.kept

    def adopt(self, successor: object) -> None:
        return

    def wait_for_latest_map(self) -> None:
        self.waited += 1

    def close(self) -> None:
        return


@pytest.mark.parametrize("kept", [False, True])
def test_a_native_lock_whose_end_was_not_answered_goes_with_the_claim(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever claims next would shut this process out; unless it is kept for just that."""
    ours: Any = SimpleNamespace(address="10.0.0.1:0/1")
    native: Any = Native(kept)
    claims = Claims(ours, native)
    lockers = tuple(Locker(number, "n/1", f"10.0.0.1:0/{number}") for number in (1, 2))
    done: list[str] = []
    monkeypatch.setattr(claims, "_read", lambda _: claims_module._Claimed(LockInfo(lockers, "n/1"), 7))
    monkeypatch.setattr(claims, "_remove", lambda *_: done.append("object removed"))
    monkeypatch.setattr(claims, "_give_up", lambda *_: done.append("own lock given up"))
    claims.disclaim("lock/a")
    assert done == (["own lock given up"] if kept else ["object removed"])


class Binding:
    """In place of python3-rados: a cluster that has nothing."""

    class Error(Exception):
        errno = errno.EIO

    class ObjectNotFound(Error):
        errno = errno.ENOENT

    def __init__(self) -> None:
        self.waited = 0

    def Rados(self, **_: object) -> Any:  # noqa: N802 - as the binding calls it
        return self

    def get_fsid(self) -> str:
        return "fsid"

    def get_addrs(self) -> str:
        return "v2:10.0.0.1:0/1"

    def open_ioctx(self, pool: str) -> Any:
        return SimpleNamespace(
            set_namespace=lambda _: None, set_osdmap_full_try=lambda: None, close=lambda: None, name=pool
        )

    def connect(self) -> None:
        return

    def shutdown(self) -> None:
        return

    def pool_lookup(self, pool: str) -> int:
        return 1

    def wait_for_latest_osdmap(self) -> None:
        self.waited += 1


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Binding:
    binding = Binding()
    monkeypatch.setattr(connection_module, "load_rados", lambda: binding)
    monkeypatch.setattr(blocker_module, "NativeClient", lambda _: Native())
    monkeypatch.setattr(Records, "get", lambda *_: None)
    return binding


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    conf = tmp_path / "ceph.conf"
    conf.touch()
    return Settings("p", str(conf))


def test_who_is_late_for_a_connection_that_was_replaced_is_shut_out_by_it(binding: Binding, settings: Settings) -> None:
    """And not told that the store is closed: it comes again by the next one."""
    blocker = RadosBlocker(settings)
    former = blocker._client.connection
    successor = blocker.reconnect()
    blocker.adopt(successor)
    successor.close()
    with pytest.raises(ShutOut), former.call("looking"):
        pytest.fail("a connection that is closed was used")
    with blocker._client.connection.call("looking"):
        assert not blocker.is_shut_out
    blocker.close()


def test_who_comes_back_knows_the_newest_map(binding: Binding, settings: Settings) -> None:
    """Else it could write to an OSD that does not know yet that the former client was shut out."""
    blocker = RadosBlocker(settings)
    before = binding.waited
    successor = blocker.reconnect()
    native: Any = successor._native
    assert (binding.waited - before, native.waited) == (1, 1)
    successor.close()
    blocker.close()


def test_a_native_client_that_is_closed_outlives_the_calls_that_use_it(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    inside, end, closed = threading.Event(), threading.Event(), threading.Event()

    def delete(client: object, key: bytes) -> int:
        inside.set()
        end.wait(60)
        return -errno.EIO if closed.is_set() else 0

    calls = {"ra_client_open": lambda *_: 0, "ra_data_delete": delete, "ra_client_close": lambda _: closed.set()}
    monkeypatch.setattr(data_module, "lib", SimpleNamespace(**calls))
    client = NativeClient(settings)
    deletion = threading.Thread(target=client.delete, args=("layer/a",))
    deletion.start()
    assert inside.wait(60)
    client.close()
    was_closed = closed.is_set()
    end.set()
    deletion.join()
    assert not was_closed
    assert closed.is_set()
