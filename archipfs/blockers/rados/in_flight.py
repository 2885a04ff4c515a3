"""Several requests at once, by asynchronous calls of the binding.

A request that was sent is always waited for, also when something else fails meanwhile: until it is answered, librados
writes into what it was given.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

IN_FLIGHT_MAX = 16
"""Requests that one call has under way at a time."""


class Request(Protocol):
    """A request that was sent when it was made."""

    def finish(self) -> None:
        """Wait until it is answered, whatever the answer is."""


R = TypeVar("R", bound=Request)


def at_once(sends: Iterable[Callable[[], R]]) -> list[R]:
    """Send all, of which there are ``IN_FLIGHT_MAX`` at most, and give them back when all are answered."""
    sent: list[R] = []
    try:
        for send in sends:
            sent.append(send())
    finally:
        # When one cannot be sent, this is for those before it.
        for request in sent:
            request.finish()
    return sent


def result_of(completion: Any) -> int:
    """Wait for an asynchronous call, and for its callback; a negative errno if it failed."""
    completion.wait_for_complete_and_cb()
    return int(completion.get_return_value())
