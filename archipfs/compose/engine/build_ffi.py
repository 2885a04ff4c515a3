"""Build ``archipfs.compose._engine``: the engine's sources and cffi's binding to ``engine.h``.

The header is the only declaration of the engine's calls; what cffi's parser does not read of it (the preprocessor's
lines) is taken out here.
"""

import re
from pathlib import Path

from cffi import FFI

HERE = Path("archipfs/compose/engine")
"""Relative to the root of the source tree, where setuptools runs: its file lists may not hold absolute paths."""
OBJECT = Path("archipfs/blockers/object.h")
"""The contract between drivers and engine."""

SOURCES = sorted(HERE.glob("*.c"))
HEADERS = [OBJECT, *sorted(HERE.glob("*.h"))]

CONSTANTS = """
#define AE_SECTOR_BYTES ...
#define AE_SIZE_MAX ...
#define AE_LAYERS_MAX ...
#define AE_REGION_SECTORS ...
#define AE_REGION_BYTES ...
#define AE_REGIONS_MAX ...
#define AE_PACK_DAMAGED ...
"""

CALLBACKS = """
extern "Python" {
    int archipfs_pread(void *, void *, size_t, uint64_t);
    int archipfs_pwrite(void *, const void *, size_t, uint64_t);
    int archipfs_punch(void *, uint64_t, uint64_t);
    int archipfs_truncate(void *, uint64_t);
    int archipfs_flush(void *);
    int archipfs_size(void *, uint64_t *);
    int archipfs_next_data(void *, uint64_t, uint64_t *);
    int archipfs_next_hole(void *, uint64_t, uint64_t *);
    void archipfs_close(void *);
    int archipfs_resolve(void *, uint64_t, struct ae_region **);
    void archipfs_resolver_close(void *);
}
"""


def declarations() -> str:
    """``object.h`` and ``engine.h`` without their preprocessor lines."""
    headers = OBJECT.read_text() + (HERE / "engine.h").read_text()
    return CONSTANTS + re.sub(r"^#.*\n", "", headers, flags=re.MULTILINE) + CALLBACKS


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "archipfs.compose._engine",
    '#include "engine.h"\n',
    sources=[str(path) for path in SOURCES],
    depends=[str(path) for path in HEADERS],
    include_dirs=[str(HERE), str(OBJECT.parent)],
    libraries=["pthread"],
    extra_compile_args=["-O2", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra"],
)
