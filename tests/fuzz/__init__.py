"""Damaged and hostile files for every reader, many at a time: `python -m tests.fuzz --help`."""
