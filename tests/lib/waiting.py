"""Waiting for something to become true, with a deadline, and threads that are always joined with one."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

WAIT_SECONDS = 120.0
"""Only so that nothing waits for ever: ten times what a busy machine with a slow disk takes for anything here."""
_PAUSE_SECONDS_MAX = 0.1


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Return when ``condition`` holds. Raises ``TimeoutError`` that says ``what`` was waited for."""
    deadline = time.monotonic() + seconds
    pause_seconds = 0.002
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _PAUSE_SECONDS_MAX)


Task = Callable[[threading.Event], None]
"""Runs in a thread until it is done or the event is set."""


@contextmanager
def threads(tasks: Sequence[Task], *, seconds: float = WAIT_SECONDS) -> Iterator[threading.Event]:
    """Run every task in a thread beside the block; behind it they are told to stop and joined.

    The first error of a task is raised at the end. A task that does not stop within ``seconds`` is an error too, and
    its thread is left behind: it hangs in a system call, and ends when the daemon does.
    """
    stop = threading.Event()
    errors: list[BaseException] = []

    def run(task: Task) -> None:
        try:
            task(stop)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in running:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        deadline = time.monotonic() + seconds
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    hanging = sum(thread.is_alive() for thread in running)
    if hanging:
        raise TimeoutError(f"{hanging} of {len(running)} threads still hang after {seconds:.0f} s")
