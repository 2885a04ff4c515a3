"""Reading a volume that another node writes: what it has flushed there, for every read anew.

What was flushed shows in the bitmaps of the head, and of layers that are being frozen, and no record says when those
change. So each read is served by an engine whose opening began after the read did: what was flushed before the read is
in it. One opening takes some round trips to the store; reads that come while one is under way share the next.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from archipfs.compose.engine import EngineVolume


@dataclass(slots=True, eq=False)
class _Opened:
    engine: EngineVolume
    users: int


@dataclass(slots=True, eq=False)
class _Waiter:
    """A read whose engine has not begun to be opened, or is not open yet."""

    opened: _Opened | None = None


class FreshReader:
    """Engines over what the store holds now, by ``open_now``. Thread-safe."""

    def __init__(self, open_now: Callable[[], EngineVolume]) -> None:
        self._open_now = open_now
        self._changed = threading.Condition()
        self._waiting: list[_Waiter] = []
        """Who is served by the next opening that begins."""
        self._opening = False

    @contextmanager
    def engine(self) -> Iterator[EngineVolume]:
        """An engine whose opening begins after this call. Raises what opening it does."""
        opened = self._acquire()
        try:
            yield opened.engine
        finally:
            self._release(opened)

    def _acquire(self) -> _Opened:
        waiter = _Waiter()
        with self._changed:
            self._waiting.append(waiter)
            self._changed.wait_for(lambda: waiter.opened is not None or not self._opening)
            if waiter.opened is not None:
                return waiter.opened
            self._opening = True
            served, self._waiting = self._waiting, []
        try:
            opened = _Opened(self._open_now(), len(served))
        except BaseException:
            with self._changed:
                # The others find out for themselves what is wrong.
                self._waiting += [other for other in served if other is not waiter]
                self._opening = False
                self._changed.notify_all()
            raise
        with self._changed:
            for each in served:
                each.opened = opened
            self._opening = False
            self._changed.notify_all()
        return opened

    def _release(self, opened: _Opened) -> None:
        with self._changed:
            opened.users -= 1
            last = opened.users == 0
        if last:
            opened.engine.close(clean=False)
