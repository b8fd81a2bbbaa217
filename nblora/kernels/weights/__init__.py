"""Arithmetic of weight files: number formats, merging, comparing."""
