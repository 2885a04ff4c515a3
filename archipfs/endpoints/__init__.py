"""Endpoints: northbound, where clients reach volumes. One package a protocol."""
