"""The ``file`` driver against the contract, and what is its own: layout, order of system calls, crashes."""

import ctypes
import errno
import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archipfs.blockers import file as file_module
from archipfs.blockers.contract import Blocker, Record
from archipfs.blockers.fault import SimulatedCrash
from archipfs.blockers.file import RESERVE_BYTES, FileBlocker, store_error
from archipfs.errors import (
    AlreadyExists,
    ArchipError,
    Conflict,
    NotSupported,
    ObjectDamaged,
    ObjectMissing,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)
from tests.blockers.conformance import Conformance, History, Store, check_churn, churn, stands

CHANGES = ("open", "write", "writev", "fsync", "link", "rename", "unlink", "rmdir", "mkdir")
"""The system calls between which a crash makes a difference; ``open`` also where it only reads."""


class Calls:
    """Stands in for ``os`` in the driver: writes the calls down, and crashes at one of them."""

    def __init__(self, crash_at: int = 0, *, after: bool = False) -> None:
        self.trace: list[str] = []
        self.crashed = False
        self._crash_at = crash_at
        self._after = after
        self._names: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CHANGES:
            return real

        def call(*args: Any, **options: Any) -> Any:
            if self.crashed:
                raise SimulatedCrash(name)
            self.trace.append(f"{name} {self._what(args[0])}")
            self.crashed = len(self.trace) == self._crash_at
            if self.crashed and not self._after:
                raise SimulatedCrash(name)
            result = real(*args, **options)
            if name == "open":
                self._names[result] = self._what(args[0])
            if self.crashed:
                raise SimulatedCrash(name)
            return result

        return call

    def _what(self, target: int | str) -> str:
        if isinstance(target, int):
            return self._names[target]
        path = Path(target)
        if path.name.startswith("w0") or path.parent.name == "tmp" or path.name == "tmp":
            return "new"
        return "tmp-version" if path.parent.parent.name == "tmp" else path.name


class TestFile(Conformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        FileBlocker.create(tmp_path / "store").close()
        return Store(lambda: FileBlocker(tmp_path / "store"))


def test_version_paths_tell_of_a_change_whose_writer_died_before_it_cleaned_up(tmp_path: Path) -> None:
    blocker = FileBlocker.create(tmp_path)
    version = blocker.put_record("lock/a", b"1", None)
    paths = blocker.version_paths("lock/a", version)
    os.link(paths.present, paths.following)
    assert not stands(paths)
    newest = blocker.get_record("lock/a")
    assert newest is not None
    blocker.put_record("lock/a", b"3", newest.version)
    assert not stands(paths)


# Making and opening


def test_create_makes_the_layout_and_may_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "store"
    blocker = FileBlocker.create(path)
    version = blocker.put_record("volume/a", b"x", None)
    assert sorted(os.listdir(path)) == ["data", "objects", "records", "reserve", "tmp"]
    assert path.stat().st_mode & 0o777 == 0o700
    again = FileBlocker.create(str(path))
    assert again.get_record("volume/a") == Record(b"x", version)
    assert again.describe() == str(path)
    assert os.listdir(path / "tmp") == []


def test_create_where_a_directory_is(tmp_path: Path) -> None:
    FileBlocker.create(tmp_path)
    FileBlocker(tmp_path)


def test_open_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "file/below", "empty"):
        with pytest.raises(StoreUnavailable) as caught:
            FileBlocker(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    for name in ("file", "file/below"):
        with pytest.raises(StoreUnavailable):
            FileBlocker.create(tmp_path / name)


def test_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(NotSupported):
        FileBlocker.create(tmp_path / "store")
    assert os.listdir(tmp_path / "store" / "tmp") == []


def test_a_store_that_goes_away_is_no_empty_store(tmp_path: Path) -> None:
    blocker = FileBlocker.create(tmp_path / "store")
    version = blocker.put_record("volume/a", b"x", None)
    os.rename(tmp_path / "store", tmp_path / "elsewhere")
    calls: list[Callable[[], object]] = [
        lambda: blocker.get_record("volume/a"),
        lambda: list(blocker.list_records("volume")),
        lambda: list(blocker.list("pack")),
        lambda: blocker.exists("pack/a"),
        lambda: blocker.delete("pack/a"),
        lambda: blocker.delete_record("volume/a", version),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()


def test_old_leftovers_are_cleared(tmp_path: Path) -> None:
    FileBlocker.create(tmp_path).close()
    tmp = tmp_path / "tmp"
    (tmp / "old").write_bytes(b"x")
    (tmp / "old.d").mkdir()
    (tmp / "old.d" / "1").write_bytes(b"x")
    (tmp / "new").write_bytes(b"x")
    for name in ("old", "old.d"):
        os.utime(tmp / name, (0, time.time() - 25 * 3600))
    FileBlocker(tmp_path).close()
    assert os.listdir(tmp) == ["new"]


def test_layout(tmp_path: Path) -> None:
    blocker = FileBlocker.create(tmp_path)
    blocker.put("pack/abc", b"object")
    blocker.create_data("layer/abc").pwrite(0, b"data")
    version = blocker.put_record("volume/abc", b"value", None)
    fan = hashlib.sha256(b"abc").hexdigest()[:2]
    assert (tmp_path / "objects" / "pack" / fan / "abc").read_bytes() == b"object"
    assert (tmp_path / "data" / "layer" / "abc").read_bytes() == b"data"
    assert (tmp_path / "records" / "volume" / "abc" / f"{version:020d}").read_bytes() == b"=value"


# Data objects


def test_fileno_is_the_object(tmp_path: Path) -> None:
    data = FileBlocker.create(tmp_path).create_data("layer/a")
    fd = data.fileno()
    assert fd is not None
    os.pwrite(fd, b"abc", 10)
    assert data.pread(10, 3) == b"abc"


def test_short_writes_and_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FileBlocker.create(tmp_path).create_data("layer/a")
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, bytes(view)[:3], offset))
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 4), offset))
    data.pwrite(1, b"abcdefghij")
    assert data.pread(0, 13) == b"\0abcdefghij\0\0"


def test_short_writes_of_pieces_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = FileBlocker.create(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, view: write(fd, bytes(view)[:2]))
    for short in range(12):
        monkeypatch.setattr(os, "writev", lambda fd, pieces, short=short: write(fd, b"".join(pieces)[:short]))
        blocker.put(f"pack/{short}", [b"abc", b"", b"defg", b"hij"])
        assert blocker.get(f"pack/{short}") == b"abcdefghij"


def test_punch_gives_space_back(tmp_path: Path) -> None:
    data = FileBlocker.create(tmp_path).create_data("layer/a")
    data.pwrite(0, b"x" * (1 << 20))
    data.flush()
    before = data.allocated()
    data.punch(0, 1 << 19)
    assert data.allocated() <= before - (1 << 19)
    assert data.next_data(0) == 1 << 19


def test_punch_where_the_file_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    data = FileBlocker.create(tmp_path).create_data("layer/a")
    data.pwrite(0, b"x" * (3 << 20))
    monkeypatch.setattr(file_module, "_fallocate", refuse)
    data.punch(10, (3 << 20) - 20)
    assert data.pread(0, 3 << 20) == b"x" * 10 + bytes((3 << 20) - 20) + b"x" * 10
    data.punch(10, 1 << 40)
    assert data.size() == 3 << 20


def test_punch_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([errno.EINTR, errno.EIO])

    def refuse(*_: object) -> int:
        ctypes.set_errno(next(answers))
        return -1

    data = FileBlocker.create(tmp_path).create_data("layer/a")
    data.pwrite(0, b"x")
    monkeypatch.setattr(file_module, "_fallocate", refuse)
    with pytest.raises(StoreError):
        data.punch(0, 1)


# Errors


@pytest.mark.parametrize(
    ("number", "cls"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.ENOENT, ObjectMissing),
        (errno.EEXIST, AlreadyExists),
        (errno.EFBIG, TooLarge),
        (errno.EROFS, StoreError),
        (errno.EACCES, StoreError),
        (errno.EPERM, StoreError),
        (errno.EIO, StoreError),
        (errno.ESTALE, StoreUnavailable),
        (errno.ETIMEDOUT, StoreUnavailable),
        (errno.ELOOP, StoreError),
    ],
)
def test_store_error(number: int, cls: type[ArchipError]) -> None:
    error = store_error(OSError(number, "x"), "reading a")
    assert type(error) is cls
    assert str(error).startswith("reading a: ")
    assert errno.errorcode[number] in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"", b"x", b"-x"])
def test_damaged_record(tmp_path: Path, content: bytes) -> None:
    blocker = FileBlocker.create(tmp_path)
    version = blocker.put_record("volume/a", b"x", None)
    (tmp_path / "records" / "volume" / "a" / f"{version:020d}").write_bytes(content)
    with pytest.raises(ObjectDamaged):
        blocker.get_record("volume/a")
    with pytest.raises(ObjectDamaged):
        list(blocker.list_records("volume"))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is changed, nothing is left behind, and it works again once there is space."""
    blocker = FileBlocker.create(tmp_path)
    version = blocker.put_record("volume/a", b"x", None)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        calls: list[Callable[[], object]] = [
            lambda: blocker.put("pack/a", b"x"),
            lambda: blocker.put_record("volume/a", b"y", version),
            lambda: blocker.put_record("volume/b", b"y", None),
            lambda: blocker.delete_record("volume/a", version),
        ]
        for call in calls:
            with pytest.raises(StoreFull):
                call()
    assert os.listdir(tmp_path / "tmp") == []
    assert os.listdir(tmp_path / "records" / "volume" / "a") == [f"{version:020d}"]
    assert not blocker.exists("pack/a")
    assert dict(blocker.list_records("volume")) == {"volume/a": Record(b"x", version)}
    blocker.put_record("volume/a", b"y", version)


def test_create_data_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = FileBlocker.create(tmp_path)
    blocker.create_data("layer/a")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "bad disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError):
            blocker.create_data("layer/b")
    blocker.create_data("layer/b")


# The order of system calls: what must be durable before what


def traced(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[str]:
    calls = Calls()
    with monkeypatch.context() as patch:
        patch.setattr(file_module, "os", calls)
        action()
    return [call for call in calls.trace if not call.startswith("open")]


def test_order_of_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = FileBlocker.create(tmp_path)
    blocker.put("pack/a", b"x")
    fan = hashlib.sha256(b"a").hexdigest()[:2]
    os.unlink(tmp_path / "objects" / "pack" / fan / "a")
    trace = traced(monkeypatch, lambda: blocker.put("pack/a", b"x"))
    assert trace == ["write new", "fsync new", "link new", "unlink new", f"fsync {fan}"]


def test_order_of_new_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = FileBlocker.create(tmp_path)
    trace = traced(monkeypatch, lambda: blocker.put("pack/a", b"x"))
    fan = hashlib.sha256(b"a").hexdigest()[:2]
    assert trace[:4] == ["mkdir pack", "fsync objects", f"mkdir {fan}", "fsync pack"]


def test_order_of_create_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = FileBlocker.create(tmp_path)
    blocker.create_data("layer/b")
    assert traced(monkeypatch, lambda: blocker.create_data("layer/a")) == ["fsync a", "fsync layer"]


def test_order_of_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = FileBlocker.create(tmp_path)
    blocker.put_record("volume/b", b"x", None)
    trace = traced(monkeypatch, lambda: blocker.put_record("volume/a", b"x", None))
    assert trace == [
        "mkdir new",
        "write tmp-version",
        "fsync tmp-version",
        "fsync new",
        "rename new",
        "fsync volume",
    ]
    first = blocker.get_record("volume/a")
    assert first is not None
    trace = traced(monkeypatch, lambda: blocker.put_record("volume/a", b"y", first.version))
    assert trace == [
        "write new",
        "fsync new",
        "link new",
        "fsync a",
        "unlink new",
        f"unlink {first.version:020d}",
    ]
    trace = traced(monkeypatch, lambda: blocker.delete_record("volume/a", first.version + 1))
    assert trace == [
        "write new",
        "fsync new",
        "link new",
        "fsync a",
        "unlink new",
        "fsync a",
        f"unlink {first.version + 1:020d}",
        "fsync a",
        f"unlink {first.version + 2:020d}",
        "rmdir a",
    ]


# Crashes


def enumerate_crashes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Blocker], int],
    action: Callable[[Blocker, int], object],
    check: Callable[[Blocker, int, bool], None],
) -> int:
    """Crash before and after each system call of ``action``; ``check`` is told whether there was a crash at all."""
    crashes = 0
    for after in (False, True):
        for number in range(1, 100):
            path = tmp_path / f"{after}-{number}"
            blocker = FileBlocker.create(path)
            prepared = prepare(blocker)
            calls = Calls(number, after=after)
            with monkeypatch.context() as patch:
                patch.setattr(file_module, "os", calls)
                try:
                    action(blocker, prepared)
                except SimulatedCrash:
                    crashes += 1
            check(FileBlocker(path), prepared, calls.crashed)
            if not calls.crashed:
                break
        else:
            raise AssertionError("the action never ends")
    return crashes


def first_version(blocker: Blocker) -> int:
    return blocker.put_record("volume/a", b"old", blocker.put_record("volume/a", b"older", None))


def deleted(blocker: Blocker) -> int:
    version = first_version(blocker)
    blocker.delete_record("volume/a", version)
    return version


def only_tombstone(blocker: Blocker) -> int:
    """A deleter that crashed after its tombstone was durable, and a writer that died in the same directory."""
    version = first_version(blocker)
    directory = Path(blocker.describe()) / "records" / "volume" / "a"
    (directory / f"{version + 1:020d}").write_bytes(b"-")
    (directory / f"w{version:020d}.dead").write_bytes(b"=half")
    return version


def only_intent(blocker: Blocker) -> int:
    version = deleted(blocker)
    directory = Path(blocker.describe()) / "records" / "volume" / "a"
    directory.mkdir()
    (directory / f"w{version:020d}.dead").write_bytes(b"=half")
    return version


def test_crash_of_put_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(blocker: Blocker, prepared: int, crashed: bool) -> None:
        found = blocker.get_record("volume/a")
        assert found is not None
        assert found.value in ((b"old", b"new") if crashed else (b"new",))
        assert (found.version > prepared) == (found.value == b"new")
        assert dict(blocker.list_records("volume")) == {"volume/a": found}
        again = blocker.put_record("volume/a", b"again", found.version)
        assert blocker.get_record("volume/a") == Record(b"again", again)
        assert os.listdir(f"{blocker.describe()}/records/volume/a") == [f"{again:020d}"] or not crashed

    crashes = enumerate_crashes(
        tmp_path, monkeypatch, first_version, lambda blocker, v: blocker.put_record("volume/a", b"new", v), check
    )
    assert crashes > 10


@pytest.mark.parametrize("prepare", [lambda _: 0, deleted, only_tombstone, only_intent])
def test_crash_of_creating_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Blocker], int]
) -> None:
    def check(blocker: Blocker, prepared: int, crashed: bool) -> None:
        found = blocker.get_record("volume/a")
        assert dict(blocker.list_records("volume")) == ({"volume/a": found} if found else {})
        if found is None:
            assert crashed
            blocker.put_record("volume/a", b"new", None)
            found = blocker.get_record("volume/a")
        assert found is not None
        assert found.value == b"new"
        assert found.version > prepared + 1
        with pytest.raises(Conflict):
            blocker.put_record("volume/a", b"x", None)

    crashes = enumerate_crashes(
        tmp_path, monkeypatch, prepare, lambda blocker, _: blocker.put_record("volume/a", b"new", None), check
    )
    assert crashes > 10


def test_crash_of_delete_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(blocker: Blocker, prepared: int, crashed: bool) -> None:
        found = blocker.get_record("volume/a")
        assert found in ((None, Record(b"old", prepared)) if crashed else (None,))
        blocker.delete_record("volume/a", prepared)
        assert blocker.get_record("volume/a") is None
        assert list(blocker.list_records("volume")) == []
        assert blocker.put_record("volume/a", b"new", None) > prepared + 1

    crashes = enumerate_crashes(
        tmp_path, monkeypatch, first_version, lambda blocker, v: blocker.delete_record("volume/a", v), check
    )
    assert crashes > 20


@pytest.mark.parametrize("whole", [b"whole", [b"wh", b"", b"ole"]], ids=["one", "pieces"])
def test_crash_of_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes | list[bytes]) -> None:
    def check(blocker: Blocker, _: int, crashed: bool) -> None:
        assert crashed or blocker.exists("pack/a")
        if blocker.exists("pack/a"):
            assert blocker.get("pack/a") == b"whole"
            assert list(blocker.list("pack")) == ["pack/a"]
        blocker.put("pack/a", b"whole")
        assert blocker.get("pack/a") == b"whole"
        blocker.delete("pack/a")
        assert not blocker.exists("pack/a")

    assert enumerate_crashes(tmp_path, monkeypatch, lambda _: 0, lambda b, _: b.put("pack/a", whole), check) > 10


def test_crash_of_create_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(blocker: Blocker, _: int, crashed: bool) -> None:
        found = list(blocker.list_data("layer"))
        assert found in (([], ["layer/a"]) if crashed else (["layer/a"],))
        if found:
            assert blocker.open_data("layer/a", writable=True).size() == 0
        blocker.delete_data("layer/a")
        blocker.create_data("layer/a").close()

    assert enumerate_crashes(tmp_path, monkeypatch, lambda _: 0, lambda b, _: b.create_data("layer/a"), check) > 5


@pytest.mark.parametrize("what", ["pack", "layer"])
def test_crash_of_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def prepare(blocker: Blocker) -> int:
        blocker.put("pack/a", b"x")
        blocker.create_data("layer/a").close()
        return 0

    def act(blocker: Blocker, _: int) -> None:
        if what == "pack":
            blocker.delete("pack/a")
        else:
            blocker.delete_data("layer/a")

    def check(blocker: Blocker, _: int, __: bool) -> None:
        act(blocker, 0)
        assert not (list(blocker.list("pack")) if what == "pack" else list(blocker.list_data("layer")))

    assert enumerate_crashes(tmp_path, monkeypatch, prepare, act, check) > 3


def test_a_clock_that_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tombstone of the earlier life still knows how far its versions went."""
    blocker = FileBlocker.create(tmp_path)
    version = only_tombstone(blocker)
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    assert blocker.put_record("volume/a", b"new", None) == version + 2


# Several processes


def churn_in_process(path: str, seed: int, answers: Any) -> None:
    history = churn(FileBlocker(path), "volume/a", 60, seed)
    answers.put((history.made, history.used))


def test_create_replace_delete_by_processes(tmp_path: Path) -> None:
    blocker = FileBlocker.create(tmp_path)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=churn_in_process, args=(str(tmp_path), seed, answers), daemon=True) for seed in range(4)
    ]
    for process in processes:
        process.start()
    histories = [History(*answers.get(timeout=60)) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    check_churn(histories, blocker, "volume/a")
    assert os.listdir(tmp_path / "tmp") == []
    assert len(os.listdir(tmp_path / "records" / "volume" / "a")) == 1


def test_the_reserve_is_given_up_once_and_kept_anew_after_a_deletion(tmp_path: Path) -> None:
    blocker = FileBlocker.create(tmp_path)
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= RESERVE_BYTES
    assert blocker.relieve()
    assert not (tmp_path / "reserve").exists()
    assert not blocker.relieve()
    blocker.create_data("layer/a").close()
    blocker.delete_data("layer/a")
    assert (tmp_path / "reserve").exists()
