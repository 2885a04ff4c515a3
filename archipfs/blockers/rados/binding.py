"""python3-rados, Ceph's own binding: compiled for the system's Python, and so found beside it and not on PyPI."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from archipfs.errors import StoreUnavailable

SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")


def load_rados(system_packages: Path = SYSTEM_PACKAGES) -> Any:
    """The module ``rados``, also from inside a virtual environment, which does not see the system's packages.

    Only this one module is taken from there. Raises ``StoreUnavailable`` where it is not installed, or is for another
    Python.
    """
    try:
        import rados
    except ImportError:
        rados = _load_from(system_packages)
    return rados


def _load_from(directory: Path) -> Any:
    pattern = f"rados.cpython-{sys.version_info.major}{sys.version_info.minor}-*.so"
    for path in sorted(directory.glob(pattern)):
        spec = importlib.util.spec_from_file_location("rados", path)
        if spec is None or spec.loader is None:
            continue
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise StoreUnavailable(f"{path} cannot be loaded: {error}; reinstall python3-rados") from error
        sys.modules["rados"] = module
        return module
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise StoreUnavailable(
        f"the rados driver: python3-rados is not installed for Python {version}; apt install python3-rados"
    )
