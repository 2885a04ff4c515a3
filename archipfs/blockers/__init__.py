"""Blockers: southbound drivers that keep the bytes. ``contract`` says what a driver must do."""
