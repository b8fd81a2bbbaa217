"""Patches of images as rows of a matrix, and the way back: what makes a convolution a linear step."""
