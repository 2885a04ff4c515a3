"""Build ``archipfs.blockers.rados._native``: the native client's sources and cffi's binding to ``native.h``."""

import re
from pathlib import Path

from cffi import FFI

HERE = Path("archipfs/blockers/rados/native")
"""Relative to the root of the source tree, where setuptools runs: its file lists may not hold absolute paths."""
OBJECT = Path("archipfs/blockers/object.h")
"""The contract between drivers and engine."""

CONSTANTS = """
#define RA_STRIPE_BYTES ...
#define RA_DATA_BYTES_MAX ...
"""


def declarations() -> str:
    """``object.h`` and ``native.h`` without their preprocessor lines."""
    headers = OBJECT.read_text() + (HERE / "native.h").read_text()
    return CONSTANTS + re.sub(r"^#.*\n", "", headers, flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "archipfs.blockers.rados._native",
    '#include "native.h"\n',
    sources=[str(path) for path in sorted(HERE.glob("*.c"))],
    depends=[str(path) for path in [OBJECT, *sorted(HERE.glob("*.h"))]],
    include_dirs=[str(HERE), str(OBJECT.parent)],
    libraries=["pthread", "dl"],
    extra_compile_args=["-O2", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra"],
)
