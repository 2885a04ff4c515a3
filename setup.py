"""Only what setup.cfg cannot say: the parts in C are built by cffi."""

from setuptools import setup

setup(
    cffi_modules=[
        "archipfs/compose/engine/build_ffi.py:ffibuilder",
        "archipfs/endpoints/fuse/front/build_ffi.py:ffibuilder",
        "archipfs/map/chunker/build_ffi.py:ffibuilder",
        "archipfs/blockers/rados/native/build_ffi.py:ffibuilder",
    ]
)
