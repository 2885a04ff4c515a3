"""The engine: C code that serves one volume out of its layers, and its Python face."""

from archipfs.compose.engine.cached import CacheFiles, CacheStatistics
from archipfs.compose.engine.extents import (
    PACK_DAMAGED,
    EnginePack,
    ExtentTable,
    Region,
    Resolve,
    TableStatistics,
)
from archipfs.compose.engine.face import EngineLayer, EngineVolume, Statistics, calls_address, format_bitmap

__all__ = [
    "PACK_DAMAGED",
    "CacheFiles",
    "CacheStatistics",
    "EngineLayer",
    "EnginePack",
    "EngineVolume",
    "ExtentTable",
    "Region",
    "Resolve",
    "Statistics",
    "TableStatistics",
    "calls_address",
    "format_bitmap",
]
