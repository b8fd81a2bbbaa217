"""Pooling of images, and their channels scaled and shifted."""
