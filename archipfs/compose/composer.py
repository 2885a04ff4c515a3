"""All volumes of all backends, by name: what the mount, the control socket and the command line ask for.

Every method blocks and may be called from any thread. Operations that change a volume open it first, so that what a
crash left behind is recovered before anything else happens to it. Each kind of operation is in a module of its own:

===============  ===========================================================
``volumes``      finding, opening and releasing, and who uses one in which way
``making``       creating, snapshots, clones
``changing``     rename, resize, rollback, remove, copies of ranges, attributes
``seals``        sealing, import
``locking``      locks that people ask for; ours that others break
``returning``    being shut out of a store, and coming back
``replicas``     copies in another backend
``moving``       going over to another backend
``recovery``     after a crash, after a removal, and at the end
===============  ===========================================================
"""

from archipfs.compose.changing import Changing, RolledBack
from archipfs.compose.locking import Locking
from archipfs.compose.making import Made
from archipfs.compose.moving import Moved, Moving
from archipfs.compose.replicas import Synced
from archipfs.compose.seals import Imported
from archipfs.compose.volumes import Backends, Found

__all__ = ["Backends", "Composer", "Found", "Imported", "Made", "Moved", "RolledBack", "Synced"]


class Composer(Moving, Changing, Locking):
    """One for each node."""
