"""Convolutions: what the patches of images are multiplied with, forward and back, without making all patches."""
