"""Units and identities shared by every layer. No I/O, no dependencies."""

import uuid
from typing import NewType

SECTOR_BYTES = 4096
"""The unit of "has this been written since the last snapshot", and of alignment everywhere."""

REGION_SECTORS = 1024
REGION_BYTES = REGION_SECTORS * SECTOR_BYTES
"""4 MiB: the piece of a volume that one map page describes."""

CHUNK_SECTORS_MAX = 128

VOLUME_BYTES_MAX = 64 << 40
"""The engine's own bound; a backend's driver may set a lower one (ext4: 16 TiB)."""

SIZE_BYTES_MAX = 1 << 63
"""8 EiB: beyond it a size is not a size (off_t ends here)."""

NAME_BYTES_MAX = 255

VolumeId = NewType("VolumeId", str)
"""32 hexadecimal digits. Never derived from a name, never used again."""

LayerId = NewType("LayerId", str)
"""32 hexadecimal digits."""

Digest = NewType("Digest", bytes)
"""A content hash of the backend's kind: 32 bytes, or 16 (xxh3-128)."""

PackId = NewType("PackId", str)
"""64 hexadecimal digits: the hash of what the pack holds."""

RequestId = NewType("RequestId", str)
"""Who asks for something that must happen once; the same when it is asked again because the answer was lost."""


def new_volume_id() -> VolumeId:
    return VolumeId(uuid.uuid4().hex)


def new_layer_id() -> LayerId:
    return LayerId(uuid.uuid4().hex)


def sectors_of(size_bytes: int) -> int:
    """How many sectors it takes to hold ``size_bytes``."""
    return -(-size_bytes // SECTOR_BYTES)
