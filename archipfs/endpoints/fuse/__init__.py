"""The mount: every volume is a sparse raw file in one flat directory.

A protocol adapter and nothing else: ``operations`` turns requests into calls of the composer, ``xattrs`` has the
commands that are given as extended attributes, ``inodes`` says which number means which volume. ``front`` is C code
that serves the bytes of open volumes without passing Python; ``device`` mounts for it.
"""
