"""The ``rados`` driver: a store in a pool of a Ceph cluster."""
