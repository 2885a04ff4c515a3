"""The native client of a RADOS cluster, in C. Its face is ``archipfs.blockers.rados.data``."""
