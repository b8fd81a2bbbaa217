"""`nblora warmup`: every kernel compiled into the cache, for images and CI."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np

import nblora
from nblora.adapters import ADAPTERS
from nblora.backends import default_backend
from nblora.kernels.common.cache import cache_folder
from nblora.layers.activations import ACTIVATIONS
from nblora.layers.attention import Attention, Rotary
from nblora.layers.base import Layer
from nblora.layers.functions import Activation, Gate
from nblora.layers.images import AvgPool2d, BatchNorm2d, GlobalAvgPool2d, MaxPool2d
from nblora.layers.run import Run, Sequences
from nblora.layers.sinks import Held
from nblora.training import fit
from nblora.training.losses import LOSSES
from nblora.weights.stream import load_kernels

DTYPES = ("float32", "float64")
SIZES = 32, 48
RANK = 4


@click.command(name="warmup")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), help="Only this one; both without it.")
def command(dtypes: tuple[str, ...]) -> None:
    """Compile every kernel into the cache, and say what took how long.

    A later process then loads the kernels instead of compiling them. Run it while an image is built or a CI cache is
    filled, as the user and with the NUMBA_CACHE_DIR of the work to come; a second run shows what loading takes.
    """
    begin = time.perf_counter()
    for dtype in dtypes or DTYPES:
        for label, warm in _work(dtype):
            start = time.perf_counter()
            warm()
            click.echo(f"{time.perf_counter() - start:8.2f} s  {dtype}  {label}")
    folder = cache_folder()
    where = "nowhere, for no folder is writable: set NUMBA_CACHE_DIR" if folder is None else str(folder)
    click.echo(f"{time.perf_counter() - begin:8.2f} s  in all; cached in {where}")


def _work(dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What compiles, and its name: every kind of layer, then what training needs beside them."""
    for label, layer in _layers(dtype):
        yield label, layer.compile
    yield "attention, gates", functools.partial(_attend, dtype)
    for loss in LOSSES:
        yield f"fit, {loss}", functools.partial(_fit, dtype, loss)
    base = nblora.Dense.random(*SIZES, dtype=dtype, seed=0)
    yield "nblora merge", functools.partial(load_kernels, [np.dtype(dtype).type])
    yield "merging", nblora.DeltaLoRAAdapter(base, RANK, seed=0).merge_to_original_layer


def _fit(dtype: str, loss: str) -> None:
    """One step of training, with a limit of the gradient's norm."""
    model = nblora.LoRAAdapter(nblora.Dense.random(*SIZES, dtype=dtype, seed=0), RANK, seed=0)
    x, y = np.zeros((2, SIZES[0]), dtype), np.zeros((2, SIZES[1]), dtype)
    labels = loss == "cross_entropy"
    fit(model, x, np.zeros(2, int) if labels else y, loss=loss, epochs=1, clip_norm=1.0, progress=False)


def _layers(dtype: str) -> Iterator[tuple[str, Layer]]:
    """A small object of every kind that needs kernels of its own, and its name."""
    yield "LoRALayer", nblora.LoRALayer(*SIZES, RANK, dtype=dtype, seed=0)
    for kind, activation in itertools.product((nblora.Dense, nblora.FullyConnected), ACTIVATIONS):
        base = kind.random(*SIZES, activation=activation, dtype=dtype, seed=0)
        name = f"{kind.__name__}, {activation}"
        yield name, base
        for adapter in ADAPTERS.values():
            yield f"{adapter.__name__} on {name}", adapter(base, RANK, seed=0)
    yield from _others(dtype)
    base = nblora.Dense.random(*SIZES, dtype=dtype, seed=0)
    for freeze, dropout in ((False, 0.0), (True, 0.1)):
        what = "lora_dropout" if freeze else "base trained"
        settings = {"lora_dropout": dropout} if dropout else {}
        for adapter in ADAPTERS.values():
            if settings.keys() <= set(adapter.settings()):
                yield f"{adapter.__name__}, {what}", adapter(base, RANK, freeze_base_layer=freeze, seed=0, **settings)


def _others(dtype: str) -> Iterator[tuple[str, Layer]]:
    """A small layer of every kind that multiplies something else than rows, or nothing, and its name."""
    ones, zeros = np.ones(8, dtype), np.zeros(8, dtype)
    for base in (
        nblora.Conv1d.random(8, 8, 3, dtype=dtype, seed=0),
        nblora.Conv2d.random(8, 8, 3, stride=2, activation="relu", dtype=dtype, seed=0),
        nblora.Embedding.random(*SIZES, dtype=dtype, seed=0),
    ):
        name = type(base).__name__
        yield name, base
        for adapter in ADAPTERS.values():
            yield f"{adapter.__name__} on {name}", adapter(base, RANK, seed=0)
    for layer in (
        nblora.LayerNorm(ones, zeros),
        nblora.RMSNorm(ones),
        MaxPool2d(8, 2, dtype=dtype),
        AvgPool2d(8, 2, dtype=dtype),
        GlobalAvgPool2d(8, dtype=dtype),
        BatchNorm2d(ones, zeros, zeros, ones),
    ):
        yield type(layer).__name__, layer


def _attend(dtype: str) -> None:
    """Attention with rotary positions and a gate, forward and back."""
    backend = default_backend()
    functions: tuple[tuple[Any, int], ...] = (
        (Attention(2, causal=True, rotary=Rotary(16)), 3),
        (Gate("silu"), 2),
        (Activation("silu"), 1),
    )
    for function, count in functions:
        run = Run(backend, training=True)
        run.sequences = Sequences.of([2, 3])
        values = [backend.from_host(np.ones((5, SIZES[0]), dtype)) for _ in range(count)]
        function._backward(function._forward(*values, run), run.back(Held()))
