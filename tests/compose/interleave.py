"""Two operations at once, call by call of the blocker: one stops before a call, the other goes on, and so forth.

A schedule is two numbers: how many calls the first operation makes before the second begins, and how many the second
makes before the first goes on to its end. All schedules of two short operations can be tried.
"""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from archipfs.blockers.contract import Blocker
from archipfs.blockers.fault import FaultBlocker
from archipfs.errors import ArchipError

T = TypeVar("T")

STUCK_SECONDS = 0.02
"""Who comes to no call for so long waits for the other one."""
NEVER = 1 << 30


@dataclass(slots=True)
class _Gate:
    """How many more calls a thread may make."""

    allowed: int = 0
    waiting: bool = False
    done: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def pass_through(self) -> None:
        with self.changed:
            self.waiting = True
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.allowed > 0, 60)
            self.allowed -= 1
            self.waiting = False

    def advance(self, calls: int) -> None:
        """Let it make that many calls; return when it wants to make another, is done, or waits for something else."""
        with self.changed:
            self.allowed += calls
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.done or (self.waiting and self.allowed == 0), STUCK_SECONDS)

    def open(self) -> None:
        """Let it make all the calls that it wants; return when it is done, or waits for something else."""
        with self.changed:
            self.allowed = NEVER
        self.advance(0)

    def finish(self) -> None:
        with self.changed:
            self.done = True
            self.changed.notify_all()


class SteppedBlocker(FaultBlocker):
    """Calls of a thread that runs under a schedule wait for their turn; those of all others pass."""

    def __init__(self, inner: Blocker) -> None:
        super().__init__(inner)
        self.gates: dict[threading.Thread, _Gate] = {}

    def call(self, doing: str, action: Callable[[], T], *, torn: Callable[[random.Random], object] | None = None) -> T:
        self._turn()
        return super().call(doing, action, torn=torn)

    def ask(self, doing: str, action: Callable[[], T]) -> T:
        self._turn()
        return super().ask(doing, action)

    def _turn(self) -> None:
        gate = self.gates.get(threading.current_thread())
        if gate is not None:
            gate.pass_through()


class Outcome:
    """An operation in a thread of its own, and what came of it."""

    def __init__(self, blocker: SteppedBlocker, action: Callable[[], object]) -> None:
        self.result: object = None
        self.error: BaseException | None = None
        self.gate = _Gate()
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)
        blocker.gates[self._thread] = self.gate
        self._thread.start()
        self.gate.advance(0)

    @property
    def succeeded(self) -> bool:
        return self.error is None

    def _run(self) -> None:
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        finally:
            self.gate.finish()

    def join(self) -> None:
        """Raises what is no refusal."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "the operation does not end"
        if self.error is not None and not isinstance(self.error, ArchipError):
            raise self.error


@dataclass(frozen=True, slots=True)
class Schedule:
    first: int
    second: int

    def run(
        self, blocker: SteppedBlocker, one: Callable[[], object], two: Callable[[], object]
    ) -> tuple[Outcome, Outcome, bool]:
        """Also whether the first operation was through before the second began: later schedules are the same."""
        first = Outcome(blocker, one)
        first.gate.advance(self.first)
        whole = first.gate.done
        second = Outcome(blocker, two)
        second.gate.advance(self.second)
        first.gate.open()
        second.gate.open()
        first.join()
        second.join()
        return first, second, whole


def schedules(second_calls: Callable[[int], Iterator[int]]) -> Iterator[Schedule]:
    """Without end: every number of calls of the first, with those numbers of the second that are asked for."""
    first = 0
    while True:
        for second in second_calls(first):
            yield Schedule(first, second)
        first += 1


def every_second(limit: int) -> Callable[[int], Iterator[int]]:
    """All numbers of calls of the second operation, up to ``limit``, and all of it."""
    return lambda first: iter((*range(limit), NEVER))


def whole_second(first: int) -> Iterator[int]:
    """All of the second operation within the first; at every third place also a part of it first."""
    return iter((NEVER,) if first % 3 else (NEVER, 3 + 5 * first % 11))
