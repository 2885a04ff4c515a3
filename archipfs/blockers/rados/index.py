"""Which objects of a kind there are, in omap entries, since listing a pool means going through all that is in it.

An entry is ``ident`` → a state and a nonce, in the objects ``<area>.<kind>.<shard>``:

=====  ============  ===================================================================
state  name          what it says
=====  ============  ===================================================================
``?``  pending       somebody makes the object, or died at it: look whether it is there
``=``  there         the object is there; unless it is just being removed, of which the next state then tells
``-``  removing      somebody removes it, or died at it: look whether it is there
=====  ============  ===================================================================

Making an object: pending, with a new nonce; the object; then *there*, if the entry is still as we left it.
Removing one: removing, with a new nonce; no object; then no entry, if it is still as we left it.

Why a list never misses an object whose making returned, and lists no other but for a moment:

(a) Only a removal takes an entry away, and only if it is the one that this removal put there itself. Nonces are new, so
    nobody has put or changed it meanwhile. Whoever made the object meanwhile began before that, and finds at his end
    that the entry is not his; then he looks who has it. If that is a removal, or nobody, he begins again: his object
    may be gone, or may be there without an entry. If it is another maker, he is done: the object is there, and an entry
    too, which says so or has everybody look.
(b) A removal that finds at its end that somebody is making the object, or has, may have removed it after that. It puts
    a pending of its own there: so everybody looks, and the maker, whose entry that is not, does not say *there*.
(c) Whoever dies leaves pending or removing, and then everybody looks. So it is with requests that arrive late, since
    all that a late one can put there is one of those two; putting *there*, and taking away, are conditional.
(d) Only where one is made and removed at the same time *and* one of the two dies, something stays: if it is the maker,
    perhaps an object without an entry, room that nobody gives back; if it is the removal, perhaps an entry that says
    there of an object that is not, which the next removal takes away. Keys are not made again while they are removed:
    a pack's says when it was made and by whom, a layer's is random.
"""

import secrets
from collections.abc import Callable, Iterator
from enum import Enum

from archipfs.blockers.rados.connection import Connection
from archipfs.blockers.rados.omap import Condition, Is, change, read, scan, shard, shards
from archipfs.errors import AlreadyExists, ObjectDamaged, StoreError

_TRIES_MAX = 100


class State(Enum):
    PENDING = "?"
    THERE = "="
    REMOVING = "-"


class Index:
    """The objects of one area (packs, data objects). Thread-safe."""

    def __init__(self, connection: Connection, area: str, shards: int) -> None:
        self._connection = connection
        self._area = area
        self._shards = shards

    def make(self, kind: str, ident: str, make: Callable[[], None]) -> None:
        """Have ``make`` make the object, again if somebody removes it at the same time.

        ``AlreadyExists`` from it means that the object is there, and is passed on.
        """
        doing = f"noting {self._area} {kind}/{ident}"
        for _ in range(_TRIES_MAX):
            entry = _entry(State.PENDING)
            self._change(kind, ident, doing, put=entry)
            try:
                make()
            except AlreadyExists:
                self._change(kind, ident, doing, was=entry, put=_entry(State.THERE))
                raise
            if self._change(kind, ident, doing, was=entry, put=_entry(State.THERE)):
                return
            if self._state(kind, ident, doing) in (State.PENDING, State.THERE):
                return
        raise StoreError(f"{doing}: others remove it again and again; try later")

    def remove(self, kind: str, ident: str, remove: Callable[[], None]) -> None:
        """Have ``remove`` remove the object, which need not be there."""
        doing = f"noting the end of {self._area} {kind}/{ident}"
        entry = _entry(State.REMOVING)
        self._change(kind, ident, doing, put=entry)
        remove()
        if self._change(kind, ident, doing, was=entry):
            return
        for _ in range(_TRIES_MAX):
            found = self._read(kind, ident, doing)
            if found is None or _state(self._area, kind, ident, found) is State.REMOVING:
                return
            if self._change(kind, ident, doing, was=found.decode(), put=_entry(State.PENDING)):
                return
        raise StoreError(f"{doing}: others make it again and again; try later")

    def list(self, kind: str) -> Iterator[tuple[str, bool]]:
        """Idents, and whether the object is there for certain. Of the others, one has to look."""
        names = shards(f"{self._area}.{kind}", self._shards)
        doing = f"listing {self._area} of kind {kind}"
        for ident, found in scan(self._connection, self._connection.main, names, doing):
            yield ident, _state(self._area, kind, ident, found) is State.THERE

    def _state(self, kind: str, ident: str, doing: str) -> State | None:
        found = self._read(kind, ident, doing)
        return None if found is None else _state(self._area, kind, ident, found)

    def _read(self, kind: str, ident: str, doing: str) -> bytes | None:
        return read(self._connection, self._connection.main, self._shard(kind, ident), (ident,), doing).get(ident)

    def _change(self, kind: str, ident: str, doing: str, *, was: str | None = None, put: str | None = None) -> bool:
        """Put the entry, or take it away; if ``was`` is given, only where it is still that."""
        return change(
            self._connection,
            self._connection.main,
            self._shard(kind, ident),
            doing,
            conditions=() if was is None else (Condition(ident, Is.EQUAL, was),),
            put=None if put is None else {ident: put.encode()},
            remove=() if put is not None else (ident,),
        )

    def _shard(self, kind: str, ident: str) -> str:
        return shard(f"{self._area}.{kind}", self._shards, ident)


def _entry(state: State) -> str:
    return state.value + secrets.token_hex(8)


def _state(area: str, kind: str, ident: str, found: bytes) -> State:
    try:
        return State(found[:1].decode("ascii"))
    except ValueError:
        raise ObjectDamaged(
            f"the index of {area} has no state for {kind}/{ident}; check the store with `archip check`"
        ) from None
