"""Attention over ragged rows."""
