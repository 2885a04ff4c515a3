"""A process that changes all kinds of things in a store at once, until it is shut out; then it comes back.

``python rados_client.py OPTIONS``, the options of a ``rados`` backend as JSON. It writes a line when it
has changed everything for some time, and a line of JSON when everything that does not wait has failed. Then it waits
for a line, comes back, gives up ``lock/a``, claims ``lock/b`` anew, and writes what came of that.
"""

import json
import sys
import threading
import time
from collections.abc import Callable

from archipfs.blockers.contract import DataObject
from archipfs.blockers.rados.blocker import RadosBlocker
from archipfs.errors import StoreError

SECTOR = 4096
ENOUGH = 20


class Changes(threading.Thread):
    """Makes one kind of change over and over, until that fails."""

    def __init__(self, change: Callable[[int], object]) -> None:
        super().__init__(daemon=True)
        self.made = 0
        self.error = ""
        self._change = change

    def run(self) -> None:
        try:
            while True:
                self._change(self.made)
                self.made += 1
        except StoreError as error:
            self.error = type(error).__name__


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def main(options: dict[str, str]) -> None:
    blocker = RadosBlocker.from_options(**options)
    for name in "ab":
        blocker.claim(f"lock/{name}", "there/1")
    objects: dict[str, DataObject] = {
        name: blocker.open_data(f"layer/{name}", writable=True, claim=None if name == "c" else f"lock/{name}")
        for name in "abc"
    }
    version = blocker.put_record("volume/a", b"", None)

    def replace(number: int) -> None:
        nonlocal version
        version = blocker.put_record("volume/a", b"%d" % number, version)

    def write(data: DataObject) -> Callable[[int], None]:
        return lambda number: data.pwrite(0, b"%08d" % number * (SECTOR // 8))

    changes = {
        "record": Changes(replace),
        "pack": Changes(lambda number: blocker.put(f"pack/{number}", b"%08d" % number * 10_000)),
        "loose": Changes(write(objects["c"])),
        "a": Changes(write(objects["a"])),
        "b": Changes(write(objects["b"])),
    }
    for each in changes.values():
        each.start()
    wait_for(lambda: all(each.made >= ENOUGH or each.error for each in changes.values()))
    print("ready", flush=True)

    wait_for(lambda: all(changes[name].error for name in ("record", "pack", "loose")))
    said = {name: each.error for name, each in changes.items()}
    print(json.dumps({**said, "is_shut_out": blocker.is_shut_out}), flush=True)

    sys.stdin.readline()
    made = changes["b"].made
    blocker.adopt(blocker.reconnect())
    blocker.disclaim("lock/a")
    blocker.claim("lock/b", "there/1")
    wait_for(lambda: bool(changes["a"].error) and changes["b"].made > made + ENOUGH)
    print(json.dumps({"a": changes["a"].error, "b": changes["b"].error}), flush=True)
    blocker.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
