"""What a daemon holds on to: threads, descriptors and memory, and that it lets go of them again."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lib.instance import Instance
from tests.lib.waiting import wait_until

FRONT_THREADS_MAX = 64
"""The front keeps every thread that it ever needed, each with a buffer of a request's size."""
REQUEST_BYTES = 1 << 20
THREADS_MAX = FRONT_THREADS_MAX + 16
MEMORY_MORE_BYTES_MAX = FRONT_THREADS_MAX * REQUEST_BYTES + (32 << 20)


@dataclass(frozen=True)
class Usage:
    threads: int
    descriptors: int
    memory_bytes: int

    @classmethod
    def of(cls, instance: Instance) -> "Usage":
        pid = instance.daemon_pid()
        assert pid is not None, "the daemon is gone"
        process = Path(f"/proc/{pid}")
        status = dict(re.findall(r"^(\w+):\s+(\d+)", (process / "status").read_text(), re.MULTILINE))
        # What is mapped of files (live bitmaps) is the kernel's to drop.
        return cls(int(status["Threads"]), len(os.listdir(process / "fd")), int(status["RssAnon"]) << 10)

    def not_above(self, before: "Usage") -> bool:
        return (
            self.threads <= max(before.threads, THREADS_MAX)
            and self.descriptors <= before.descriptors
            and self.memory_bytes <= before.memory_bytes + MEMORY_MORE_BYTES_MAX
        )


@contextmanager
def given_back(instance: Instance) -> Iterator[None]:
    """Behind the block the same daemon comes back to what it held before it, once every volume is closed."""
    pid, before = instance.daemon_pid(), Usage.of(instance)
    yield
    assert instance.daemon_pid() == pid, "this is another daemon"
    try:
        wait_until(lambda: Usage.of(instance).not_above(before), "the daemon lets go")
    except TimeoutError:
        raise AssertionError(f"held before: {before}; held on to: {Usage.of(instance)}") from None
