"""The ``rados`` driver: a store in a pool of a Ceph cluster, which several nodes share.

=================  ============================================================  ====================
module             what it has                                                   client
=================  ============================================================  ====================
``binding``        where python3-rados is found
``connection``     one client by python3-rados; errors                           Python
``omap``           reading and changing small entries of objects                 Python
``records``        records: compare-and-swap                                     Python
``index``          which objects there are, so that nobody has to list a pool    Python
``packs``          immutable objects                                             Python
``data``           data objects, and packs that are read in place                native (``native/``)
``claims``         who changes what, and how he is shut out                      both
``blocker``        all of it together, as the contract has it                    both
=================  ============================================================  ====================

docs/format.md has the objects field by field.
"""
