"""Only what setup.cfg cannot say: the C engine is built by cffi."""

from setuptools import setup

setup(cffi_modules=["archipfs/compose/engine/build_ffi.py:ffibuilder"])
