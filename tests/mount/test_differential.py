"""One random sequence of operations on two mounts, one with the front and one without: they must never disagree.

Each operation is data, made from the seed before anything runs; so a sequence that fails is cut down by running it
again without parts of it, and what is left stands in the message. ``ARCHIPFS_DIFFERENTIAL_SEEDS="7 8"`` replays seeds,
``ARCHIPFS_DIFFERENTIAL_STEPS`` says how long a sequence is.

Not compared: FALLOCATE and SEEK_DATA, which plain pyfuse3 has no handlers for; times; and st_blocks, which depends on
when the file system under the store allocates, beyond what is plausible.
"""

import errno
import mmap
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.lib.instance import Instance, instances
from tests.lib.volumes import SECTOR_BYTES, command, fact, read_all
from tests.lib.waiting import wait_until

pytestmark = pytest.mark.mount

SEEDS = [int(seed) for seed in os.environ.get("ARCHIPFS_DIFFERENTIAL_SEEDS", "1 2 3").split()]
STEPS = int(os.environ.get("ARCHIPFS_DIFFERENTIAL_STEPS", "250"))
SIZE_MAX = 40 * SECTOR_BYTES
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
BAD_NAMES = (".bad", "x" * 256, "missing")
OPEN_MAX = 6
SMALL_BLOCKS = 64
"""What may be allocated beside the data itself, in units of 512 bytes."""

Result = object
"""What an operation returned, or the name of its errno."""


class Step(NamedTuple):
    kind: str
    which: int
    """Of the names that are there; beyond 100, a bad one."""
    other: str
    slot: int
    offset: int
    length: int
    byte: int


def an_offset(numbers: random.Random) -> int:
    sector = numbers.randrange(SIZE_MAX // SECTOR_BYTES) * SECTOR_BYTES
    return numbers.choice(
        (sector, sector + 512, max(0, sector + numbers.randint(-700, 700)), numbers.randrange(SIZE_MAX))
    )


def a_sequence(seed: int) -> list[Step]:
    numbers = random.Random(seed)
    kinds = [kind for kind, (_, weight) in OPERATIONS.items() for _ in range(weight)]
    return [
        Step(
            kind=numbers.choice(kinds),
            which=numbers.randrange(106),
            other=numbers.choice(NAMES if numbers.random() < 0.97 else BAD_NAMES),
            slot=numbers.randrange(OPEN_MAX),
            offset=an_offset(numbers),
            length=numbers.choice((0, 1, 511, 512, SECTOR_BYTES, 4097, numbers.randrange(5 * SECTOR_BYTES))),
            byte=numbers.randint(1, 255),
        )
        for _ in range(STEPS)
    ]


class Side:
    """One mount, and what is open on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[int, int] = {}
        self.buffer = mmap.mmap(-1, 16 * SECTOR_BYTES)
        for byte, name in enumerate(NAMES[:3], 1):
            self.path(name).write_bytes(bytes([byte]) * (byte * 3 * SECTOR_BYTES + 100))

    def path(self, name: str) -> Path:
        return self.root / name

    def some(self, step: Step) -> Path:
        """A volume or snapshot that is there, as a rule."""
        names = sorted(os.listdir(self.root))
        if step.which >= 100 or not names:
            return self.path(BAD_NAMES[step.which % len(BAD_NAMES)])
        return self.path(names[step.which % len(names)])

    def descriptor(self, step: Step) -> int:
        """Raises ``LookupError`` if nothing is open."""
        return self.open[sorted(self.open)[step.slot % len(self.open)]] if self.open else self.open[step.slot]

    def aligned(self, data: bytes) -> memoryview:
        self.buffer[: len(data)] = data
        return memoryview(self.buffer)[: len(data)]

    def close(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)
        self.open.clear()


# The operations: each does the same to whatever mount it is given


def open_(side: Side, step: Step) -> Result:
    ways = (
        os.O_RDWR,
        os.O_RDONLY,
        os.O_RDWR | os.O_DIRECT,
        os.O_RDWR | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_WRONLY | os.O_APPEND,
        os.O_RDWR | os.O_TRUNC,
        os.O_RDONLY | os.O_DIRECT,
    )
    if step.slot in side.open:
        os.close(side.open.pop(step.slot))
    path = side.path(step.other) if step.byte % 3 == 0 else side.some(step)
    side.open[step.slot] = os.open(path, ways[step.byte % len(ways)], 0o640)
    return "opened"


def close(side: Side, step: Step) -> Result:
    if step.slot in side.open:
        os.close(side.open.pop(step.slot))
    return "closed"


def write(side: Side, step: Step) -> Result:
    return os.pwrite(side.descriptor(step), side.aligned(bytes([step.byte]) * step.length), step.offset)


def write_aligned(side: Side, step: Step) -> Result:
    offset, length = step.offset // 512 * 512, -(-step.length // 512) * 512
    return os.pwrite(side.descriptor(step), side.aligned(bytes([step.byte]) * length), offset)


def append(side: Side, step: Step) -> Result:
    if os.fstat(side.descriptor(step)).st_size > SIZE_MAX:
        return "large enough"
    return os.write(side.descriptor(step), side.aligned(bytes([step.byte]) * step.length))


def read(side: Side, step: Step) -> Result:
    return os.pread(side.descriptor(step), step.length, step.offset)


def read_many(side: Side, step: Step) -> Result:
    pieces = [bytearray(step.length), bytearray(SECTOR_BYTES)]
    return os.preadv(side.descriptor(step), pieces, step.offset), b"".join(pieces)


def write_mapped(side: Side, step: Step) -> Result:
    descriptor = side.descriptor(step)
    size = os.fstat(descriptor).st_size
    if size == 0:
        return "nothing to map"
    at = step.offset % size
    with mmap.mmap(descriptor, size, mmap.MAP_SHARED) as mapping:
        before = bytes(mapping[at : at + step.length])
        mapping[at : at + len(before)] = bytes([step.byte]) * len(before)
        if step.byte % 2:
            mapping.flush()
        return before


def truncate(side: Side, step: Step) -> Result:
    return os.truncate(side.some(step), step.offset)


def truncate_open(side: Side, step: Step) -> Result:
    return os.ftruncate(side.descriptor(step), step.offset)


def truncate_wrongly(side: Side, step: Step) -> Result:
    return os.truncate(side.some(step), (1 << 62) + step.offset)


def sync(side: Side, step: Step) -> Result:
    return (os.fsync if step.byte % 2 else os.fdatasync)(side.descriptor(step))


def seek_end(side: Side, step: Step) -> Result:
    return os.lseek(side.descriptor(step), 0, os.SEEK_END)


def snapshot(side: Side, step: Step) -> Result:
    return command(side.some(step), "snapshot", step.other)


def clone(side: Side, step: Step) -> Result:
    return command(side.some(step), "clone", step.other)


def roll_back(side: Side, step: Step) -> Result:
    """A volume to one of its snapshots, where there is any; it is closed before, as a rule."""
    path, to = side.some(step), step.other
    if fact(path, "kind") == "snapshot" and fact(path, "parent"):
        path, to = side.path(fact(path, "parent")), path.name
    inode = path.stat().st_ino
    for slot, descriptor in list(side.open.items()):
        if step.byte % 4 and os.fstat(descriptor).st_ino == inode:
            os.close(side.open.pop(slot))
    if not any(os.fstat(descriptor).st_ino == inode for descriptor in side.open.values()):
        # The kernel tells of the last close a moment after close(2) has returned.
        wait_until(lambda: fact(path, "state") == "closed", "it is closed")
    command(path, "rollback", to)
    [kept] = [each for each in os.listdir(side.root) if "@before-rollback-" in each]
    os.rename(side.path(kept), side.path("kept"))  # its name held the time
    return read_all(side.path("kept")), read_all(path)


def rename(side: Side, step: Step) -> Result:
    return os.rename(side.some(step), side.path(step.other))


def unlink(side: Side, step: Step) -> Result:
    return os.unlink(side.some(step))


def copy(side: Side, step: Step) -> Result:
    """As cp(1) does it, whatever the mount makes of copy_file_range."""
    done = 0
    source, target = os.open(side.some(step), os.O_RDONLY), -1
    try:
        target = os.open(side.path(step.other), os.O_WRONLY | os.O_CREAT, 0o600)
        while done < step.length:
            count = os.copy_file_range(source, target, step.length - done, step.offset + done, step.offset + done)
            if count == 0:
                break
            done += count
        return done
    finally:
        os.close(source)
        if target >= 0:
            os.close(target)


def set_attribute(side: Side, step: Step) -> Result:
    names = ("user.one", "user.two", "user.archip.unknown", "trusted.one", "user.")
    flags = (0, os.XATTR_CREATE, os.XATTR_REPLACE)[step.byte % 3]
    return os.setxattr(side.some(step), names[step.slot % len(names)], bytes([step.byte]) * step.length, flags)


def get_attribute(side: Side, step: Step) -> Result:
    names = ("user.one", "user.two", "user.archip.kind", "user.archip.parent", "security.capability", "user.none")
    return os.getxattr(side.some(step), names[step.slot % len(names)])


def remove_attribute(side: Side, step: Step) -> Result:
    return os.removexattr(side.some(step), ("user.one", "user.two", "user.archip.kind")[step.slot % 3])


def list_attributes(side: Side, step: Step) -> Result:
    return sorted(os.listxattr(side.some(step)))


def change_mode(side: Side, step: Step) -> Result:
    return os.chmod(side.some(step), 0o400 + step.byte)


def change_owner(side: Side, step: Step) -> Result:
    return os.chown(side.some(step), step.byte, -1)


def make_wrongly(side: Side, step: Step) -> Result:
    path = side.some(step)
    return (os.mkdir, os.mkfifo, lambda path: os.symlink("a", path), os.rmdir)[step.slot % 4](path)


def look(side: Side, step: Step) -> Result:
    return facts_of(side.some(step).stat())


def look_open(side: Side, step: Step) -> Result:
    return facts_of(os.fstat(side.descriptor(step)))


def facts_of(status: os.stat_result) -> Result:
    assert status.st_blocks <= -(-status.st_size // 512) + SMALL_BLOCKS, f"{status.st_blocks} blocks: {status}"
    return status.st_size, status.st_mode, status.st_uid, status.st_gid, status.st_nlink


def list_(side: Side, step: Step) -> Result:
    return [(entry.name, facts_of(entry.stat())) for entry in sorted(os.scandir(side.root), key=lambda each: each.name)]


def read_whole(side: Side, step: Step) -> Result:
    return read_all(side.some(step), os.O_DIRECT if step.byte % 2 else 0)


OPERATIONS: dict[str, tuple[Callable[[Side, Step], Result], int]] = {
    operation.__name__: (operation, weight)
    for operation, weight in (
        *((open_, 14), (close, 4), (write, 12), (write_aligned, 8), (append, 4), (read, 10), (read_many, 3)),
        *((write_mapped, 5), (truncate, 3), (truncate_open, 4), (truncate_wrongly, 1), (sync, 4), (seek_end, 2)),
        *((snapshot, 4), (clone, 4), (roll_back, 3), (rename, 3), (unlink, 2), (copy, 3), (set_attribute, 3)),
        *((get_attribute, 3), (remove_attribute, 2), (list_attributes, 2), (change_mode, 1), (change_owner, 1)),
        *((make_wrongly, 1), (look, 3), (look_open, 3), (list_, 2), (read_whole, 4)),
    )
}


# Running and comparing


def outcome(side: Side, step: Step) -> Result:
    try:
        return OPERATIONS[step.kind][0](side, step)
    except LookupError:
        return "not open"
    except (OSError, ValueError) as error:  # mmap says ValueError of a file that is not long enough
        number = error.errno if isinstance(error, OSError) else None
        return errno.errorcode.get(number or 0, str(error))


def disagreement(mounts: Sequence[Instance], steps: Sequence[Step]) -> str | None:
    """Where the mounts, which are empty, first do not agree; ``None`` if they always do. They are empty afterwards."""
    sides = [Side(mount.path) for mount in mounts]
    try:
        for number, step in enumerate(steps):
            with_front, without = (outcome(side, step) for side in sides)
            if with_front != without:
                return f"step {number}, {step}: {shown(with_front)} with the front, {shown(without)} without"
        for side in sides:
            side.close()
        found = [{path.name: read_all(path) for path in side.root.iterdir()} for side in sides]
        if found[0] != found[1]:
            differing = [name for name in found[0] | found[1] if found[0].get(name) != found[1].get(name)]
            return f"in the end {differing} differ"
        return None
    finally:
        for side in sides:
            side.close()
            for path in side.root.iterdir():
                os.unlink(path)


def shown(result: Result) -> str:
    text = repr(result)
    return text if len(text) < 300 else f"{text[:150]}…{text[-100:]}"


def cut_down(mounts: Sequence[Instance], steps: list[Step]) -> list[Step]:
    """The least of them that still disagree, by leaving out ever smaller parts."""
    part = len(steps) // 2
    while part:
        start = 0
        while start < len(steps):
            fewer = steps[:start] + steps[start + part :]
            if disagreement(mounts, fewer) is not None:
                steps = fewer
            else:
                start += part
        part //= 2
    return steps


@pytest.fixture(scope="module")
def both() -> Iterator[list[Instance]]:
    with instances() as make:
        yield [make(front=front).mount() for front in (True, False)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_front_changes_nothing_that_can_be_seen(both: list[Instance], seed: int) -> None:
    steps = a_sequence(seed)
    found = disagreement(both, steps)
    if found is not None:
        few = cut_down(both, steps)
        told = "\n".join(map(str, few))
        pytest.fail(
            f"seed {seed}: {found}\ncut down to {len(few)} steps:\n{told}\n{disagreement(both, few)}", pytrace=False
        )
