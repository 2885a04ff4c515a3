"""Build ``archipfs.map._chunker``: the chunker's source and cffi's binding to ``chunker.h``."""

import re
from pathlib import Path

from cffi import FFI

HERE = Path("archipfs/map/chunker")
"""Relative to the root of the source tree, where setuptools runs: its file lists may not hold absolute paths."""

ffibuilder = FFI()
ffibuilder.cdef(re.sub(r"^#.*\n", "", (HERE / "chunker.h").read_text(), flags=re.MULTILINE))
ffibuilder.set_source(
    "archipfs.map._chunker",
    '#include "chunker.h"\n',
    sources=[str(HERE / "chunker.c")],
    depends=[str(HERE / "chunker.h")],
    include_dirs=[str(HERE)],
    # xxhash.h is inlined: its vector code wants all the optimisation there is.
    extra_compile_args=["-O3", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra"],
)
