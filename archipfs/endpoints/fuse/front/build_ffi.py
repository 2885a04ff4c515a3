"""Build ``archipfs.endpoints.fuse._front``: the front's sources and cffi's binding to ``front.h``.

The engine is not compiled in: the front is handed a table of its calls when it starts.
"""

import re
from pathlib import Path

from cffi import FFI

HERE = Path("archipfs/endpoints/fuse/front")
"""Relative to the root of the source tree, where setuptools runs: its file lists may not hold absolute paths."""
ENGINE = Path("archipfs/compose/engine")

SYSTEM_CALLS = """
#define AF_THREADS_MAX ...
int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data);
int umount2(const char *target, int flags);
"""


def declarations() -> str:
    """``front.h`` without its preprocessor lines, and the two system calls that Python does not have."""
    return SYSTEM_CALLS + re.sub(r"^#.*\n", "", (HERE / "front.h").read_text(), flags=re.MULTILINE)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "archipfs.endpoints.fuse._front",
    '#include "front.h"\n#include <sys/mount.h>\n',
    sources=[str(path) for path in sorted(HERE.glob("*.c"))],
    depends=[
        str(path) for path in [*sorted(HERE.glob("*.h")), ENGINE / "engine.h", Path("archipfs/blockers/object.h")]
    ],
    include_dirs=[str(HERE), str(ENGINE), "archipfs/blockers"],
    libraries=["pthread"],
    extra_compile_args=["-O2", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra"],
)
