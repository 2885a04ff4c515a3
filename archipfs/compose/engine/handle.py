"""A handle: an object of the engine, used by several threads and given back once."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from archipfs.errors import ArchipError


class Handle:
    """An object of the engine, and how many threads are in a call with it."""

    def __init__(self, pointer: Any, what: str) -> None:
        self._pointer = pointer
        self._what = what
        self._closed = False
        self._users = 0
        self._changed = threading.Condition(threading.Lock())

    def __enter__(self) -> Any:
        with self._changed:
            if self._closed:
                raise ArchipError(f"{self._what} is closed; this is a bug, please report it")
            self._users += 1
            return self._pointer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._users -= 1
            if self._closed and self._users == 0:
                self._changed.notify_all()

    def close(self, release: Callable[[Any], None], hurry: Callable[[Any], None] | None = None) -> None:
        """Let nobody in any more, ``hurry`` those inside, and ``release`` the object when they have left."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
        if hurry is not None:
            hurry(self._pointer)
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0)
        release(self._pointer)
        self._pointer = None
