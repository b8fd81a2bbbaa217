"""Loops along one row, each a function of its own: as part of a larger one the compiler often fails to vectorise it."""

from . import elementwise
from .jit import part
from .microkernel import once

momentum_step = part(elementwise.momentum_step)
descend = part(elementwise.descend)


@part
def copy_row(target, source):
    """target = source."""
    once()
    for j in range(target.shape[0]):
        target[j] = source[j]


@part
def scale_row(target, source, factor):
    """target = factor·source."""
    once()
    for j in range(target.shape[0]):
        target[j] = factor * source[j]


@part
def add_row(target, left, right):
    """target = left + right."""
    once()
    for j in range(target.shape[0]):
        target[j] = left[j] + right[j]


@part
def accumulate_row(target, source):
    """target += source."""
    once()
    for j in range(target.shape[0]):
        target[j] += source[j]


@part
def combine_row(target, weight, delta, scaling):
    """target = weight + scaling·delta."""
    once()
    for j in range(target.shape[0]):
        target[j] = weight[j] + scaling * delta[j]


@part
def descend_row(p, g, lr):
    """p -= lr g."""
    once()
    for j in range(p.shape[0]):
        p[j] = descend(p[j], g[j], lr)


@part
def momentum_row(V, D, g, momentum, gain, lr):
    """V = momentum V + gain g, D -= lr V."""
    once()
    for j in range(V.shape[0]):
        V[j] = momentum_step(V[j], g[j], momentum, gain)
        D[j] = descend(D[j], V[j], lr)
