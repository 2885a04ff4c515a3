"""Omaps as a cluster has them, without one, and operations on them that take turns, step by step.

``test_rados`` checks on a cluster that its omaps do what these do.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from archipfs.blockers.rados.omap import Condition, Is

CONNECTION: Any = SimpleNamespace(main=None)


def holds(entries: Mapping[str, bytes], condition: Condition) -> bool:
    found, wanted = entries.get(condition.name, b""), condition.value.encode()
    match condition.how:
        case Is.EQUAL:
            return found == wanted
        case Is.LESS:
            return found < wanted
        case Is.GREATER:
            return found > wanted


class Died(BaseException):
    """The process that an operation ran in is gone."""


@dataclass(slots=True, eq=False)
class _Operation:
    """An operation in a thread, which makes a step whenever it is told to."""

    may_step: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    has_stopped: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    dies: bool = False
    ended: bool = False


@dataclass
class FakeOmap:
    """In place of the functions of ``omap``. Each call is a step."""

    shards: dict[str, dict[str, bytes]] = field(default_factory=dict)
    watch: Callable[[str, bytes], None] = lambda name, value: None
    """Told of each entry that is put."""
    _turns: dict[threading.Thread, _Operation] = field(default_factory=dict)

    def put_into(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        for name in ("change", "read", "scan"):
            monkeypatch.setattr(module, name, getattr(self, name))

    def read(self, connection: Any, ioctx: Any, shard: str, names: Sequence[str], doing: str) -> dict[str, bytes]:
        self.step()
        entries = self.shards.get(shard, {})
        return {name: entries[name] for name in names if name in entries}

    def change(
        self,
        connection: Any,
        ioctx: Any,
        shard: str,
        doing: str,
        *,
        conditions: Iterable[Condition] = (),
        put: Mapping[str, bytes] | None = None,
        remove: Sequence[str] = (),
    ) -> bool:
        self.step()
        if shard not in self.shards and not put:
            return False
        entries = dict(self.shards.get(shard, {}))
        if not all(holds(entries, condition) for condition in conditions):
            return False
        for name in remove:
            entries.pop(name, None)
        for name, value in (put or {}).items():
            self.watch(name, value)
            entries[name] = value
        self.shards[shard] = entries
        return True

    def scan(self, connection: Any, ioctx: Any, names: Sequence[str], doing: str) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield from self.shards.get(name, {}).items()

    def step(self) -> None:
        """Wait for the turn of the operation that calls this; whoever is none goes on."""
        operation = self._turns.get(threading.current_thread())
        if operation is not None:
            operation.has_stopped.release()
            operation.may_step.acquire()
            if operation.dies:
                raise Died

    def interleave(
        self, operations: Sequence[Callable[[], object]], schedule: Iterable[int], *, deaths: Mapping[int, int] | None
    ) -> None:
        """Run all to their ends. Each number of ``schedule`` is the one that makes a step, of those that are left; when
        it is over, they go on one by one.

        ``deaths``: how many steps an operation makes before its process is gone.
        """
        errors: list[BaseException] = []
        running: list[_Operation] = []
        steps: dict[_Operation, int] = {}
        threads = []
        for number, action in enumerate(operations):
            operation = _Operation()
            steps[operation] = (deaths or {}).get(number, -1)

            def run(operation: _Operation = operation, action: Callable[[], object] = action) -> None:
                try:
                    self.step()
                    action()
                except Died:
                    return
                except BaseException as error:
                    errors.append(error)
                finally:
                    operation.ended = True
                    operation.has_stopped.release()

            thread = threading.Thread(target=run)
            self._turns[thread] = operation
            running.append(operation)
            threads.append(thread)
            thread.start()
            operation.has_stopped.acquire()
        choices = iter(schedule)
        while running:
            operation = running[next(choices, 0) % len(running)]
            operation.dies = steps[operation] == 0
            steps[operation] -= 1
            operation.may_step.release()
            operation.has_stopped.acquire()
            if operation.ended:
                running.remove(operation)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
