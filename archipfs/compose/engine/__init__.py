"""The engine: C code that serves one volume out of its layers, and its Python face."""

from archipfs.compose.engine.face import EngineLayer, EngineVolume, Statistics, calls_address, format_bitmap

__all__ = ["EngineLayer", "EngineVolume", "Statistics", "calls_address", "format_bitmap"]
