"""Drivers against models, on inputs nobody thought of; and the record protocol in all its interleavings.

The interleavings are those of the ``file`` driver's argument: some callers run as threads of which only one moves at a
time, and a schedule decides at each system call who is next. Schedules with up to two switches are all tried, others
drawn at random. What must come out is the same for all of them: a version is replaced or deleted by one caller at most.
"""

import itertools
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archipfs.blockers import file as file_module
from archipfs.blockers.contract import Blocker, DataObject
from archipfs.blockers.fault import FaultBlocker
from archipfs.blockers.file import FileBlocker
from archipfs.blockers.memory import MemoryBlocker
from archipfs.errors import Conflict
from archipfs.types import SECTOR_BYTES
from tests.lib.searching import searching

SIZE_MAX = 6 * SECTOR_BYTES


@contextmanager
def opened(driver: str) -> Iterator[Blocker]:
    if driver == "file":
        path = tempfile.mkdtemp()
        try:
            yield FileBlocker.create(path)
        finally:
            shutil.rmtree(path)
    else:
        yield MemoryBlocker() if driver == "memory" else FaultBlocker(MemoryBlocker())


# Data objects

offsets = st.one_of(st.integers(0, SIZE_MAX), st.integers(0, 6).map(lambda number: number * SECTOR_BYTES))
changes = st.lists(
    st.one_of(
        st.tuples(st.just("pwrite"), offsets, offsets, st.integers(1, 255)),
        st.tuples(st.just("punch"), offsets, offsets, st.just(0)),
        st.tuples(st.just("truncate"), offsets, st.just(0), st.just(0)),
        st.tuples(st.just("flush"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=12,
)


def apply(data: DataObject, model: bytearray, change: tuple[str, int, int, int]) -> None:
    name, offset, length, fill = change
    end = offset + length
    if name == "pwrite":
        content = bytes([fill]) * length
        data.pwrite(offset, content)
        if length:
            model.extend(bytes(max(0, end - len(model))))
            model[offset:end] = content
    elif name == "punch":
        data.punch(offset, length)
        end = min(end, len(model))
        model[offset:end] = bytes(max(0, end - offset))
    elif name == "truncate":
        data.truncate(offset)
        del model[offset:]
        model.extend(bytes(offset - len(model)))
    else:
        data.flush()


def check_data(data: DataObject, model: bytearray) -> None:
    assert data.size() == len(model)
    assert data.pread(0, SIZE_MAX * 3) == bytes(model).ljust(SIZE_MAX * 3, b"\0")
    offset = 0
    while True:
        begin = data.next_data(offset)
        assert not any(model[offset : len(model) if begin is None else begin])
        if begin is None:
            break
        assert offset <= begin < len(model)
        offset = data.next_hole(begin)
        assert begin < offset <= len(model)


@pytest.mark.parametrize("driver", ["file", "memory", "fault"])
@given(changes)
@searching(30)
def test_data_objects_are_byte_arrays(driver: str, todo: list[tuple[str, int, int, int]]) -> None:
    with opened(driver) as blocker:
        data = blocker.create_data("layer/a")
        other = blocker.open_data("layer/a", writable=True)
        model = bytearray()
        for number, change in enumerate(todo):
            apply((data, other)[number % 2], model, change)
            check_data(data, model)
        data.close()
        other.close()


@given(changes, changes, st.integers(0, 1 << 30))
@searching(80)
def test_power_loss_leaves_each_sector_old_or_new(
    before: list[tuple[str, int, int, int]], since: list[tuple[str, int, int, int]], seed: int
) -> None:
    """Old is the content at the last flush, new any that it had since: what is there must be one of them."""
    store = MemoryBlocker()
    data = store.create_data("layer/a")
    model = bytearray()
    for change in before:
        apply(data, model, change)
    blocker = FaultBlocker(store)
    data = blocker.open_data("layer/a", writable=True)
    seen = [bytes(model)]
    for change in since:
        apply(data, model, change)
        if change[0] == "flush":
            seen.clear()
        seen.append(bytes(model))
    blocker.power_loss(seed)
    found = store.open_data("layer/a", writable=False)
    assert found.size() in (len(seen[0]), len(seen[-1]))
    for begin in range(0, found.size(), SECTOR_BYTES):
        length = min(SECTOR_BYTES, found.size() - begin)
        allowed = {each[begin : begin + length].ljust(length, b"\0") for each in (seen[0], seen[-1])}
        assert found.pread(begin, length) in allowed


# Records

record_steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "delete"]),
        st.sampled_from(["volume/a", "volume/b", "lock/a"]),
        st.one_of(st.none(), st.just("current"), st.integers(-3, 3)),
        st.binary(max_size=5),
    ),
    max_size=15,
)


@pytest.mark.parametrize("driver", ["file", "memory", "fault"])
@given(record_steps)
@searching(30)
def test_records_are_a_dictionary(driver: str, todo: list[tuple[str, str, str | int | None, bytes]]) -> None:
    with opened(driver) as blocker:
        model: dict[str, tuple[bytes, int]] = {}
        newest: dict[str, int] = {}
        for action, key, which, value in todo:
            current = model[key][1] if key in model else None
            expected = current if which == "current" else None
            if isinstance(which, int):
                expected = newest.get(key, 5) + which
            if action == "put":
                try:
                    version = blocker.put_record(key, value, expected)
                except Conflict:
                    assert expected != current
                else:
                    assert expected == current
                    assert version > newest.get(key, 0)
                    model[key] = (value, version)
                    newest[key] = version
            elif expected is not None:
                try:
                    blocker.delete_record(key, expected)
                except Conflict:
                    assert current is not None
                    assert expected != current
                else:
                    assert current is None or expected == current
                    model.pop(key, None)
            for kind in ("volume", "lock"):
                found = {each: (record.value, record.version) for each, record in blocker.list_records(kind)}
                assert found == {each: kept for each, kept in model.items() if each.startswith(kind)}
            for each in ("volume/a", "volume/b", "lock/a"):
                record = blocker.get_record(each)
                assert (None if record is None else (record.value, record.version)) == model.get(each)


# Interleavings

STEPS = ("open", "link", "rename", "unlink", "rmdir", "mkdir", "listdir")
"""System calls through which callers meet. Nothing waits for another between two of them."""


class Stepper:
    """Stands in for ``os`` in the driver: each caller stops before each step until it is told to go on."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._stopped = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "fsync":
            return lambda fd: None
        if name not in STEPS:
            return real

        def call(*args: Any, **options: Any) -> Any:
            go = getattr(self._local, "go", None)
            if go is not None:
                self._stopped.release()
                go.acquire()
            return real(*args, **options)

        return call

    def run(self, actions: Sequence[Callable[[], None]], choose: Callable[[list[int], int | None], int]) -> int:
        """Run all; ``choose`` gets who can go on and who went last. Returns the number of steps."""
        gates = [threading.Semaphore(0) for _ in actions]
        errors: list[BaseException] = []
        left = list(range(len(actions)))

        def enter(number: int) -> None:
            self._local.go = gates[number]
            gates[number].acquire()
            try:
                actions[number]()
            except BaseException as error:
                errors.append(error)
            left.remove(number)
            self._stopped.release()

        threads = [threading.Thread(target=enter, args=(number,)) for number in left]
        for thread in threads:
            thread.start()
        steps, last = 0, None
        while left:
            last = choose(left, last)
            gates[last].release()
            self._stopped.acquire()
            steps += 1
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return steps


@dataclass
class Game:
    """One record, the versions of it that were made, and who replaced or deleted which."""

    blocker: FileBlocker
    key: str
    made: dict[int, bytes] = field(default_factory=dict)
    used: list[int] = field(default_factory=list)
    deleted: set[int] = field(default_factory=set)
    was_absent: bool = False
    """Whether anybody may see no record."""
    count: Iterator[int] = field(default_factory=itertools.count)

    def put(self, expected: int | None) -> int | None:
        value = b"%d" % next(self.count)
        try:
            version = self.blocker.put_record(self.key, value, expected)
        except Conflict:
            return None
        assert version not in self.made, "a version was made twice"
        self.made[version] = value
        if expected is not None:
            self.used.append(expected)
        return version

    def delete(self, expected: int) -> bool:
        self.was_absent = True
        try:
            self.blocker.delete_record(self.key, expected)
        except Conflict:
            return False
        self.deleted.add(expected)
        return True

    def now(self) -> int | None:
        found = self.blocker.get_record(self.key)
        if found is None:
            return None
        return found.version

    def check(self) -> None:
        assert len(set(self.used)) == len(self.used), "two callers won over the same version"
        assert set(self.used) <= set(self.made), "a version was replaced that nobody made"
        found = self.blocker.get_record(self.key)
        left = set(self.made) - set(self.used)
        if found is not None:
            assert found.version in left, "the record is one that was replaced"
            assert found.version not in self.deleted, "the record is one that was deleted"
            assert self.made[found.version] == found.value, "the record is not what its writer wrote"
            left.remove(found.version)
        assert left <= self.deleted, "a version was lost: it is neither there, nor replaced, nor deleted"
        again = self.blocker.put_record(self.key, b"end", None if found is None else found.version)
        assert again not in self.made
        assert dict(self.blocker.list_records("volume"))[self.key].version == again


Play = Callable[[Game, int], None]


def put_once(game: Game, version: int) -> None:
    game.put(version)


def put_again_and_again(game: Game, version: int) -> None:
    """Two more versions, so that the name of the first one becomes free."""
    second = game.put(version)
    if second is not None:
        third = game.put(second)
        if third is not None:
            game.put(third)


def die_before_clean_up(game: Game, version: int) -> None:
    """Somebody puts and is gone at once; the next one cleans up for both."""
    value = b"%d" % next(game.count)
    try:
        made = game.blocker._link_version(game.key, version, b"=" + value)
    except Conflict:
        return
    game.made[made] = value
    game.used.append(version)
    game.put(made)


def put_on_what_is_there(game: Game, _: int) -> None:
    now = game.now()
    if now is not None:
        game.put(now)


def delete_once(game: Game, version: int) -> None:
    game.delete(version)


def delete_what_is_there(game: Game, _: int) -> None:
    now = game.now()
    if now is not None:
        game.delete(now)


def delete_and_create(game: Game, version: int) -> None:
    if game.delete(version):
        game.put(None)


def create(game: Game, _: int) -> None:
    game.put(None)


def read(game: Game, version: int) -> None:
    found = game.blocker.get_record(game.key)
    assert found is not None or game.was_absent, "a record that is only replaced was absent"
    assert found is None or found.version >= version


PLAYS: list[tuple[Play, ...]] = [
    (put_once, put_once),
    (put_once, put_again_and_again),
    (put_once, die_before_clean_up),
    (put_once, delete_once),
    (put_once, delete_and_create),
    (delete_once, delete_and_create),
    (delete_once, create),
    (create, delete_and_create),
    (read, put_again_and_again),
    (put_on_what_is_there, delete_and_create),
    (delete_what_is_there, delete_and_create),
    (put_once, put_once, put_again_and_again),
    (put_once, delete_once, delete_and_create),
    (put_on_what_is_there, delete_and_create, delete_what_is_there),
    (delete_once, create, create),
    (put_once, delete_and_create, create, put_on_what_is_there),
    (read, read, put_on_what_is_there, put_again_and_again),
]


@pytest.fixture
def stepper(monkeypatch: pytest.MonkeyPatch) -> Stepper:
    stepper = Stepper()
    monkeypatch.setattr(file_module, "os", stepper)
    return stepper


class Table:
    """Where plays take place, each with a record of its own."""

    def __init__(self, path: Path, stepper: Stepper) -> None:
        self._blocker = FileBlocker.create(path)
        self._stepper = stepper
        self._path = path

    def play(self, plays: Sequence[Play], choose: Callable[[list[int], int | None], int]) -> int:
        """Returns the number of steps."""
        game = Game(self._blocker, "volume/a")
        first = game.put(None)
        assert first is not None
        second = game.put(first)
        assert second is not None
        actions = [lambda act=act, version=second: act(game, version) for act in plays]
        steps = self._stepper.run(actions, choose)
        game.check()
        assert os.listdir(self._path / "tmp") == []
        shutil.rmtree(self._path / "records" / "volume" / "a")
        return steps


@pytest.fixture
def table(tmp_path: Path, stepper: Stepper) -> Iterator[Table]:
    """In memory if there is such a place, for nothing here depends on the disk."""
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path))
    yield Table(path, stepper)
    shutil.rmtree(path)


def names(plays: Sequence[Play]) -> str:
    return "-".join(act.__name__ for act in plays)


@pytest.mark.parametrize("plays", [plays for plays in PLAYS if len(plays) == 2], ids=names)
def test_all_schedules_with_two_switches(table: Table, plays: Sequence[Play]) -> None:
    """The first caller stops at each of its steps, the second runs, stops at each of its own, and so on to the end."""
    for begin in (0, 1):
        for first_switch in itertools.count(1):
            longest = 0
            for second_switch in itertools.count(first_switch + 1):
                at = itertools.count()

                def choose(
                    left: list[int],
                    last: int | None,
                    at: Iterator[int] = at,
                    switches: tuple[int, int] = (first_switch, second_switch),
                    begin: int = begin,
                ) -> int:
                    number = next(at)
                    wanted = begin if last is None else last
                    if number in switches:
                        wanted = 1 - wanted
                    return wanted if wanted in left else left[0]

                longest = table.play(plays, choose)
                if second_switch >= longest:
                    break
            if first_switch >= longest:
                break


@pytest.mark.parametrize("clock", ["forward", "backward"])
@pytest.mark.parametrize("plays", PLAYS, ids=names)
def test_random_schedules(table: Table, plays: Sequence[Play], clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each new life of the record is created by a host whose clock is further behind."""
    for seed in range(25):
        draw = random.Random(seed)
        likely = draw.choice((0.05, 0.2, 0.5, 1.0))
        if clock == "backward":
            times = itertools.count(10**18, -(10**6))
            monkeypatch.setattr("archipfs.blockers.file.time.time_ns", lambda times=times: next(times))

        def choose(left: list[int], last: int | None, draw: random.Random = draw, likely: float = likely) -> int:
            if last in left and draw.random() > likely:
                assert last is not None
                return last
            return draw.choice(left)

        table.play(plays, choose)
