"""The one error tree and its tables."""

import errno
from collections.abc import Iterator

import pytest

from archipfs import errors
from archipfs.errors import ERRNOS, ArchipError, InvalidInput, StoreError, errno_of, exit_code_of, from_errno


def tree(root: type[ArchipError] = ArchipError) -> Iterator[type[ArchipError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


@pytest.mark.parametrize("cls", list(tree()))
def test_every_error_has_an_errno_and_an_exit_code(cls: type[ArchipError]) -> None:
    error = cls("what went wrong; what to do")
    assert errno_of(error) in errno.errorcode
    assert exit_code_of(error) in (1, 2)
    assert (exit_code_of(error) == 2) == isinstance(error, InvalidInput)
    assert cls.__doc__
    assert str(error) == "what went wrong; what to do"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("ArchipError", errno.EIO),
        ("InvalidInput", errno.EINVAL),
        ("InvalidName", errno.EINVAL),
        ("InvalidSize", errno.EINVAL),
        ("InvalidConfig", errno.EINVAL),
        ("NotFound", errno.ENOENT),
        ("AlreadyExists", errno.EEXIST),
        ("Busy", errno.EBUSY),
        ("LockHeld", errno.EBUSY),
        ("ReadOnlyVolume", errno.EROFS),
        ("TooLarge", errno.EFBIG),
        ("NotSupported", errno.EOPNOTSUPP),
        ("Conflict", errno.EBUSY),
        ("StoreError", errno.EIO),
        ("StoreFull", errno.ENOSPC),
        ("StoreUnavailable", errno.EIO),
        ("ObjectMissing", errno.EIO),
        ("ObjectDamaged", errno.EIO),
        ("FormatTooNew", errno.EIO),
        ("Fenced", errno.EIO),
        ("DaemonError", errno.EIO),
    ],
)
def test_errnos_are_those_that_fit(name: str, number: int) -> None:
    assert errno_of(getattr(errors, name)("")) == number


def test_the_table_names_only_errors_of_the_tree() -> None:
    assert ERRNOS.keys() <= set(tree())
    assert ArchipError in ERRNOS
    assert set(ERRNOS.values()) <= errno.errorcode.keys()


def test_a_new_error_has_the_errno_of_its_nearest_ancestor() -> None:
    class FullOfSomething(errors.StoreFull):
        """No space of another kind."""

    class Both(errors.LockHeld, errors.NotFound):
        """The first of the two counts."""

    assert errno_of(FullOfSomething("")) == errno.ENOSPC
    assert errno_of(Both("")) == errno.EBUSY


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), KeyboardInterrupt(), OSError("no number")])
def test_what_is_not_ours_is_an_input_output_error(error: BaseException) -> None:
    assert errno_of(error) == errno.EIO


def test_an_error_of_the_system_keeps_its_number() -> None:
    assert errno_of(OSError(errno.EACCES, "denied")) == errno.EACCES
    assert errno_of(FileNotFoundError(errno.ENOENT, "gone")) == errno.ENOENT


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_errno_becomes_an_error_in_one_line(number: int) -> None:
    error = from_errno(number, "writing layer/a")
    assert isinstance(error, ArchipError)
    assert str(error).startswith("writing layer/a: ")
    assert errno.errorcode[number] in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
def test_errnos_go_through_the_engine_and_back(number: int) -> None:
    assert errno_of(from_errno(number, "writing")) == number


def test_what_is_missing_or_unknown_is_the_store_failing() -> None:
    assert isinstance(from_errno(errno.ENOENT, "opening"), errors.ObjectMissing)
    assert isinstance(from_errno(errno.EDQUOT, "writing"), errors.StoreFull)
    assert type(from_errno(errno.ETIMEDOUT, "reading")) is StoreError
    assert str(from_errno(99999, "reading")).startswith("reading: 99999")
