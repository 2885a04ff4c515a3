"""The native front: C threads on /dev/fuse that serve the bytes of volumes, and hand all else to pyfuse3."""

from archipfs.endpoints.fuse.front.face import Front

__all__ = ["Front"]
