"""A step of an adapted `Conv2d` beside PyTorch's: `python benchmarks/convolutions.py [--python PEERS_PYTHON]`.

A step is forward, backward with the input's gradient, and update, in float32, of LoRA alone and of Delta-LoRA, at the
convolutions of a ResNet. Two PyTorch modules under autograd take part: LoRA as PEFT computes it beside the convolution
of W + c D ("eager"), and one convolution of W + s A B + c D ("merged"). Each peer is a process of its own; results are
compared first; then they take turns, and a round gives one ratio a pair. Printed are the median milliseconds and the
median ratio, PyTorch's time over nblora's, with its quartiles.
"""

import contextlib
import sys
import time
from typing import Any, NamedTuple

import click
import numpy as np

from nblora.bench.cases import DELTA_SCALING, MOMENTUM, SCALING, TIMED_LR
from nblora.bench.peers import PeerSpec
from nblora.bench.process import Worker

PEERS = {
    "nblora": PeerSpec(".nblora_peer", "NbloraConvolution", ("nblora", "numba", "numpy"), "this library"),
    "eager": PeerSpec(".torch_convolution", "TorchConvolution", ("torch",), "LoRA beside the convolution"),
    "merged": PeerSpec(".torch_convolution", "TorchMergedConvolution", ("torch",), "one convolution"),
}
RANK, BATCH = 8, 8
CHECKED_LR = 0.1
TOLERANCE = 1e-3  # of the largest number, and of a parameter's largest change


class Shape(NamedTuple):
    """A convolution without dilation, and the images' side."""

    channels: int
    outputs: int
    side: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return (
            f"{self.channels} -> {self.outputs}, {self.kernel}x{self.kernel} / {self.stride}, {self.side}x{self.side}"
        )


SHAPES = (
    Shape(64, 64, 56, 3, 1),
    Shape(128, 128, 28, 3, 1),
    Shape(256, 256, 14, 3, 1),
    Shape(512, 512, 7, 3, 1),
    Shape(64, 128, 56, 3, 2),
    Shape(64, 256, 56, 1, 1),
    Shape(256, 64, 56, 1, 1),
    Shape(256, 512, 56, 1, 2),
    Shape(3, 64, 224, 7, 2),
)


def settings(shape: Shape, kind: str, threads: int) -> dict[str, Any]:
    """The case as peers take it."""
    return {
        "kind": kind,
        "threads": threads,
        "device": "cpu",
        "layout": "fullyconnected",
        "rank": RANK,
        "stride": shape.stride,
        "padding": shape.kernel // 2,
        "delta_scaling": DELTA_SCALING,
        "momentum": MOMENTUM,
        "scaling": SCALING,
    }


def make_arrays(shape: Shape, kind: str) -> dict[str, np.ndarray]:
    """Images, the gradient of the output, and the parameters as PyTorch and PEFT store them."""
    rng = np.random.default_rng(0)
    places = (shape.side - 1) // shape.stride + 1
    inner, weight = shape.channels * shape.kernel**2, (shape.outputs, shape.channels, shape.kernel, shape.kernel)

    def normal(scale: float, *sizes: int) -> np.ndarray:
        return (scale * rng.standard_normal(sizes)).astype(np.float32)

    arrays = {
        "x": normal(1, BATCH, shape.channels, shape.side, shape.side),
        "g": normal((BATCH * shape.outputs * places**2) ** -0.5, BATCH, shape.outputs, places, places),
        "W": normal(inner**-0.5, *weight),
        "b": normal(0.1, shape.outputs),
        "A": normal(inner**-0.5, RANK, *weight[1:]),
        "B": normal(RANK**-0.5, shape.outputs, RANK, 1, 1),
    }
    if kind == "step":
        arrays |= {"D": normal(inner**-0.5, *weight), "V": normal(0.1 * shape.outputs**-0.5, *weight)}
    return arrays


def check(arrays: dict[str, np.ndarray], own: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """ClickException where two peers' results differ."""
    for name, value in own.items():
        moved = value - arrays[name] if name in ("A", "B", "D") else value
        error, largest = np.abs(value - other[name]).max(), np.abs(moved).max()
        if not error <= TOLERANCE * largest:
            raise click.ClickException(f"{name} differs by {error:.2g}, of at most {largest:.2g}")


def measure(workers: dict[str, Worker], shape: Shape, kind: str, threads: int, rounds: int) -> dict[str, np.ndarray]:
    """The seconds of a step in every round, by peer."""
    case, arrays, counts, results = settings(shape, kind, threads), make_arrays(shape, kind), {}, {}
    for name, worker in workers.items():
        worker.ask("set_up", case=case, arrays=arrays)
        results[name] = worker.ask("check", lr=CHECKED_LR)
        counts[name] = max(3, round(0.15 / worker.ask("warm", lr=TIMED_LR, seconds=0.3, least=3)))
    for name in results:
        check(arrays, results["nblora"], results[name])
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds):
        for name in np.roll(list(workers), -turn).tolist():
            time.sleep(0.05)  # thread pools of the peer before keep spinning for about as long
            seconds[name].append(workers[name].ask("burst", lr=TIMED_LR, count=counts[name]))
    return {name: np.array(taken) for name, taken in seconds.items()}


@click.command()
@click.option("--python", default=sys.executable, help="The interpreter of PyTorch's peers.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--shape", "chosen", multiple=True, type=int, help="Only the shape of this number, from 0.")
@click.option("--kind", "kinds", multiple=True, default=("lora-step", "step"), help="Only steps of this kind.")
def main(python: str, threads: int, rounds: int, chosen: tuple[int, ...], kinds: tuple[str, ...]) -> None:
    """Print the table, one line a shape and kind."""
    print("| convolution | step | nblora ms | eager ms | merged ms | eager / nblora | merged / nblora |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for number, kind in ((number, kind) for number in chosen or range(len(SHAPES)) for kind in kinds):
        with contextlib.ExitStack() as stack:
            workers = {}
            for name, spec in PEERS.items():
                interpreter = sys.executable if name == "nblora" else python
                workers[name] = stack.enter_context(Worker(spec, threads, interpreter))
                workers[name].ask("start")
            taken = measure(workers, SHAPES[number], kind, threads, rounds)
        cells = [str(SHAPES[number]), "LoRA" if kind == "lora-step" else "Delta-LoRA"]
        cells += [f"{1e3 * np.median(taken[name]):.1f}" for name in PEERS]
        for name in ("eager", "merged"):
            low, middle, high = np.quantile(taken[name] / taken["nblora"], [0.25, 0.5, 0.75])
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
