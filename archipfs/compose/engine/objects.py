"""Data objects as the engine takes them: by their file descriptor, by the driver's own C functions, or called back.

A callback runs on the thread that called the engine. What it raises cannot pass through C: it becomes an errno there,
and :func:`call` raises it again on the other side.
"""

import errno
import threading
from collections.abc import Callable
from typing import Any

import structlog

from archipfs.blockers.contract import DataObject
from archipfs.compose._engine import ffi, lib
from archipfs.errors import ArchipError, FormatTooNew, ObjectDamaged, ObjectMissing, StoreError, errno_of, from_errno

log = structlog.get_logger()


class _ThreadState(threading.local):
    """What a thread knows of the engine call it is in."""

    in_call = False
    raised: BaseException | None = None

    def begin(self) -> tuple[bool, BaseException | None]:
        """Nothing was raised yet. Returns what ``end`` restores: a callback may call the engine in its turn."""
        outer = self.in_call, self.raised
        self.in_call, self.raised = True, None
        return outer

    def end(self, outer: tuple[bool, BaseException | None]) -> BaseException | None:
        """What was raised since ``begin``."""
        raised = self.raised
        self.in_call, self.raised = outer
        return raised


_state = _ThreadState()


class _Adapter:
    """A data object that the engine calls back. It lives until the engine closes it."""

    def __init__(self, data_object: DataObject, owned: bool) -> None:
        self.data_object = data_object
        self.owned = owned
        self.handle = ffi.new_handle(self)


_adapters: set[_Adapter] = set()
"""Those the engine holds: C keeps a pointer, which the garbage collector does not see."""


def open_object(data_object: DataObject, *, owned: bool) -> Any:
    """A ``struct ae_object *`` for it; when it is ``owned``, it is closed as soon as the engine has no more use for it.

    The engine keeps a duplicate of a file descriptor, and what ``native`` gives is its own, so an owned object that has
    either is closed at once.
    """
    made = ffi.new("struct ae_object *")
    descriptor = data_object.fileno()
    native = data_object.native() if descriptor is None else None
    if descriptor is not None:
        call("opening a data object", lib.ae_object_file, descriptor, made)
    elif native is not None:
        made[0] = ffi.cast("struct ae_object *", native)[0]
    else:
        adapter = _Adapter(data_object, owned)
        _adapters.add(adapter)
        made.ops = _OPERATIONS
        made.ctx = adapter.handle
        return made
    if owned:
        data_object.close()
    return made


def close_object(made: Any) -> None:
    """Close a ``struct ae_object`` that the engine did not take over."""
    made.ops.close(made.ctx)


def call(doing: str, function: Callable[..., int], *arguments: Any) -> int:
    """Call the engine. Raises what its result stands for, with what a data object raised meanwhile as the cause."""
    result, raised = attempt(function, *arguments)
    if result < 0:
        raise error_of(-result, doing) from raised
    return result


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[int, Exception | None]:
    """Call the engine. Returns its result, and what a data object raised meanwhile.

    Something that is no ``Exception`` (``KeyboardInterrupt``) is raised as it is.
    """
    outer = _state.begin()
    try:
        result = function(*arguments)
    finally:
        raised = _state.end(outer)
    if raised is not None and not isinstance(raised, Exception):
        raise raised
    return result, raised


def error_of(number: int, doing: str) -> ArchipError:
    """The error for an errno of the engine."""
    if number == errno.EPROTONOSUPPORT:
        return FormatTooNew(f"{doing}: the bitmap was written by a later archipfs; use that one")
    if number == errno.EUCLEAN:
        return ObjectDamaged(f"{doing}: the bitmap's header is damaged; run archip check")
    return from_errno(number, doing)


def _adapter_of(context: Any) -> _Adapter:
    adapter: _Adapter = ffi.from_handle(context)
    return adapter


def _run(context: Any, action: Callable[[DataObject], int]) -> int:
    """Do it, and turn what it raises into an errno."""
    try:
        return action(_adapter_of(context).data_object)
    except BaseException as error:
        return keep(error, "a data object")


def keep(error: BaseException, what: str) -> int:
    """What a callback returns for what it raised: the errno. The error itself is kept for :func:`attempt`.

    The first one of a call counts, unless a later one is no ``Exception``.
    """
    if not _state.in_call:
        log.error("a callback failed where no caller can be told", what=what, exc_info=error)
    elif _state.raised is None or (isinstance(_state.raised, Exception) and not isinstance(error, Exception)):
        _state.raised = error
    return -(errno.ENOENT if isinstance(error, ObjectMissing) else errno_of(error))


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_pread(context: Any, buffer: Any, length: int, offset: int) -> int:
    def action(data_object: DataObject) -> int:
        data = data_object.pread(offset, length)
        if len(data) != length:
            raise StoreError(f"a data object gave {len(data)} bytes of {length} at {offset}; this is the driver's bug")
        ffi.memmove(buffer, data, length)
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_pwrite(context: Any, buffer: Any, length: int, offset: int) -> int:
    def action(data_object: DataObject) -> int:
        # A copy, since the driver may keep what it is given and the buffer is gone after the call.
        data_object.pwrite(offset, bytes(ffi.buffer(buffer, length)))
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_punch(context: Any, offset: int, length: int) -> int:
    def action(data_object: DataObject) -> int:
        data_object.punch(offset, length)
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_truncate(context: Any, size: int) -> int:
    def action(data_object: DataObject) -> int:
        data_object.truncate(size)
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_flush(context: Any) -> int:
    def action(data_object: DataObject) -> int:
        data_object.flush()
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_size(context: Any, size: Any) -> int:
    def action(data_object: DataObject) -> int:
        size[0] = data_object.size()
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_next_data(context: Any, offset: int, found: Any) -> int:
    def action(data_object: DataObject) -> int:
        at = data_object.next_data(offset)
        if at is None:
            return -errno.ENXIO
        found[0] = at
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_next_hole(context: Any, offset: int, found: Any) -> int:
    def action(data_object: DataObject) -> int:
        found[0] = data_object.next_hole(offset)
        return 0

    return _run(context, action)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def archipfs_close(context: Any) -> None:
    def action(data_object: DataObject) -> int:
        data_object.close()
        return 0

    adapter = _adapter_of(context)
    if adapter.owned:
        _run(context, action)
    _adapters.discard(adapter)


_OPERATIONS = ffi.new(
    "struct ae_object_ops *",
    {
        "pread": lib.archipfs_pread,
        "pwrite": lib.archipfs_pwrite,
        "punch": lib.archipfs_punch,
        "truncate": lib.archipfs_truncate,
        "flush": lib.archipfs_flush,
        "size": lib.archipfs_size,
        "next_data": lib.archipfs_next_data,
        "next_hole": lib.archipfs_next_hole,
        "close": lib.archipfs_close,
    },
)
