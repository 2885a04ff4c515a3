"""Inode numbers: derived from the volume's id, so that they mean the same volume in every process. No I/O."""

from archipfs.errors import StoreError
from archipfs.types import VolumeId

ROOT = 1
_BITS = 60


def inode_of(volume: VolumeId) -> int:
    """The volume's number: 60 bits of its random id, and never that of the root directory."""
    return (int(volume[:16], 16) & ((1 << _BITS) - 1)) + ROOT + 1


class Inodes:
    """Which volumes the kernel has numbers of, counted as FUSE counts look-ups."""

    def __init__(self) -> None:
        self._volumes: dict[int, VolumeId] = {}
        self._lookups: dict[int, int] = {}

    def remember(self, volume: VolumeId) -> int:
        """One more look-up. Raises ``StoreError`` should two volumes ever share a number."""
        inode = inode_of(volume)
        if self._volumes.setdefault(inode, volume) != volume:
            raise StoreError(f"volume {volume} has the inode number of {self._volumes[inode]}; clone it and remove it")
        self._lookups[inode] = self._lookups.get(inode, 0) + 1
        return inode

    def learn(self, volume: VolumeId) -> None:
        """The kernel may have looked it up in the time of an earlier process. One more that is not counted."""
        self._volumes.setdefault(inode_of(volume), volume)

    def forget(self, inode: int, lookups: int) -> None:
        left = self._lookups.get(inode, 0) - lookups
        if left > 0:
            self._lookups[inode] = left
        else:
            self._lookups.pop(inode, None)
            self._volumes.pop(inode, None)

    def volume(self, inode: int) -> VolumeId | None:
        return self._volumes.get(inode)
