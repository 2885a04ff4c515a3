"""The command line: ``archip``."""
