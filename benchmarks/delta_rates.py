"""What `delta_lr="auto"` reaches, beside LoRA and the best number of a sweep, over the corners of where it is used.

    python benchmarks/delta_rates.py [--output delta_rates.json] [--jobs 1] [--table]

Each cell is a task, a scale, c, m and a width; its runs share data, network, order and AdamW's learning rate. A cell is
written to the file as it ends, so the command may be interrupted and goes on where it was. `--table` writes the tables
of docs/training.md to standard output from what the file holds, and trains nothing.

Scale: of the loss for classifiers; of the targets for regressors. `regression` starts from an untrained network of
ordinary weights whatever the targets are; `synthetic` from one that fits its targets' scale, and that a dense change of
every layer separates from them.
"""

import argparse
import itertools
import json
import os
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nblora
from nblora.errors import NonFiniteError
from nblora.sweep.task import limit_threads
from nblora.training import Loss, calibration, evaluate
from nblora.training.losses import as_loss

TASKS = ("digits", "breast_cancer", "regression", "synthetic")
SCALES, CS, MS, WIDTHS = (1e-3, 1e6), (0.01, 0.5), (0.0, 0.95), (16, 1024)
CENTRE = (30.0, 0.1, 0.9, 128)
WIDE = 4096
SHARES = (0.05, 0.1, 0.15)
SHARE = calibration.SHARE  # as it is shipped; a run with another sets it in its own process
CHOSEN = f"auto {SHARE:g}"
STEPS_OF_TEN = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)  # the swept numbers, from the smallest rate that auto found
SAMPLES, HELD_OUT, EPOCHS, BATCH, RANK = 300, 140, 15, 32, 4


class Cell(NamedTuple):
    """One column of settings."""

    task: str
    scale: float
    c: float
    m: float
    width: int

    @property
    def name(self) -> str:
        """Its key in the file."""
        return f"{self.task} scale={self.scale:g} c={self.c:g} m={self.m:g} width={self.width}"


class Scaled(Loss):
    """A loss times a constant."""

    def __init__(self, name: str, scale: float) -> None:
        self._loss, self._scale = as_loss(name), scale

    def value_and_gradient(self, output: Any, target: Any, backend: Any = None) -> tuple[float, Any]:
        """The scaled mean, and its gradient."""
        value, gradient = self._loss.value_and_gradient(output, target, backend)
        return value * self._scale, gradient * gradient.dtype.type(self._scale)

    def check_target(self, name: str, target: Any, shape: tuple[int, ...]) -> np.ndarray:
        """As the loss itself."""
        return self._loss.check_target(name, target, shape)


def cells() -> list[Cell]:
    """Corners and centre of every task, and two at the greatest width."""
    corners = [*itertools.product(SCALES, CS, MS, WIDTHS), CENTRE]
    found = [Cell(task, *corner) for task in TASKS for corner in corners]
    found.sort(key=lambda cell: cell.width)
    return [*found, Cell("synthetic", 1.0, 0.1, 0.9, WIDE), Cell("regression", 1.0, 0.1, 0.9, WIDE)]


def problem(cell: Cell) -> tuple[np.ndarray, np.ndarray, Any, nblora.Sequential]:
    """Inputs, targets, loss and the network that the adapters go around."""
    rng = np.random.default_rng(0)
    if cell.task == "synthetic":
        return synthetic(cell, rng)
    from sklearn import datasets
    from sklearn.preprocessing import StandardScaler

    load = {"digits": datasets.load_digits, "breast_cancer": datasets.load_breast_cancer}
    x, y = load.get(cell.task, datasets.load_diabetes)(return_X_y=True)
    chosen = rng.permutation(len(x))[: SAMPLES + HELD_OUT]
    x = StandardScaler().fit_transform(x[chosen]).astype(np.float32)
    y = y[chosen]
    if cell.task == "regression":
        y = (cell.scale * StandardScaler().fit_transform(y[:, None])).astype(np.float32)
        return x, y, "mse", network(x.shape[1], cell.width, 1)
    classes = int(y.max()) + 1
    return x, y, Scaled("cross_entropy", cell.scale), network(x.shape[1], cell.width, classes)


def network(features: int, width: int, outputs: int, middle: bool = False) -> nblora.Sequential:
    """An untrained network with one hidden layer, or two."""
    layers = {"hidden": nblora.Dense.random(features, width, activation="relu", seed=1)}
    if middle:
        layers["middle"] = nblora.Dense.random(width, width, activation="relu", seed=2)
    return nblora.Sequential(layers | {"head": nblora.Dense.random(width, outputs, seed=3)})


def synthetic(cell: Cell, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Any, nblora.Sequential]:
    """A network of three layers, and outputs of the same network after a full-rank change half as large as it."""
    base = network(32, cell.width, 8, middle=True)
    base["head"].weight[...] *= cell.scale
    base["head"].bias[...] *= cell.scale
    teacher = base.clone()
    for _, layer in teacher.named_layers():
        spread = 0.5 * np.std(layer.weight)
        layer.weight[...] += spread * rng.normal(size=layer.weight.shape).astype(np.float32)
    x = rng.normal(size=(SAMPLES + HELD_OUT, 32)).astype(np.float32)
    return x, teacher.eval().forward(x), "mse", base


def train(cell: Cell, method: str, delta_lr: Any = None, share: float | None = None) -> dict[str, Any]:
    """One run: the loss left, the deltas' rates and how often they were halved; a loss of None says it diverged."""
    x, y, loss, model = problem(cell)
    trained = slice(SAMPLES if cell.width < WIDE else SAMPLES // 3)
    training, held_out = (x[trained], y[trained]), (x[SAMPLES:], y[SAMPLES:])
    settings = {} if method == "lora" else {"delta_scaling": cell.c, "momentum_factor": cell.m}
    for name, layer in model.named_layers():
        model.adapt(name, method, rank=min(RANK, layer.in_features, layer.out_features), seed=0, **settings)
    options = {"loss": loss, "batch_size": BATCH, "seed": 0, "progress": False}
    before = evaluate(model, *training, loss=loss)["loss"]
    if share is not None:
        calibration.SHARE = share
    with warnings.catch_warnings(record=True) as told, limit_threads(1), np.errstate(all="ignore"):
        warnings.simplefilter("always")
        try:
            history = nblora.fit(model, *training, epochs=EPOCHS, delta_lr=delta_lr, **options)
        except NonFiniteError:
            return {"loss": None, "before": before, "warned": len(told)}
    found = {
        name: evaluate(model, *samples, loss=loss)["loss"]
        for name, samples in (("loss", training), ("held_out", held_out))
    }
    return found | {"before": before, "rates": history.delta_lr, "warned": len(told)}


def runs(cell: Cell, known: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The runs of a cell that can be made now: the swept numbers are known once auto has found its own."""
    wanted: dict[str, tuple[Any, ...]] = {"lora": ("lora",)}
    wanted.update({f"auto {share:g}": ("delta", calibration.AUTO, share) for share in shares(cell)})
    found = known.get(CHOSEN, {}).get("rates")
    if found:
        numbers = [
            min(found.values()) * 10**step for step in (STEPS_OF_TEN if cell.width < WIDE else STEPS_OF_TEN[1:5])
        ]
        wanted.update({f"swept {number:.4g}": ("delta", number) for number in numbers})
    return {key: run for key, run in wanted.items() if key not in known}


def shares(cell: Cell) -> tuple[float, ...]:
    """The shares tried; at the greatest width the chosen one."""
    return SHARES if cell.width < WIDE else (SHARE,)


def measure(cell: Cell, known: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Make every missing run of a cell, in a process of its own."""
    found = dict(known)
    while left := runs(cell, found):
        for key, run in left.items():
            found[key] = train(cell, *run)
    return cell.name, found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Auto at each share, beside LoRA and the best swept number: a row a task and a share, then one a wide cell."""
    lines = [
        "| task, share | cells | not below its start | rates halved | loss left, of LoRA's | at most 0.7 of it "
        "| held-out loss, of LoRA's | within 1.3 of the swept best, held out | trained on |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for wide, task, share in itertools.product((False, True), TASKS, SHARES):
        name = f"auto {share:g}"
        cells = [c for key, c in results.items() if key.startswith(task) and name in c and wide == is_wide(key)]
        if cells:
            lines.append(f"| {task}{f', width {WIDE}' if wide else ''}, {100 * share:g} % | {row(cells, name)} |")
    return "\n".join(lines)


def is_wide(name: str) -> bool:
    """Whether a cell is one of the greatest width."""
    return name.endswith(f"width={WIDE}")


def row(cells: list[dict[str, Any]], name: str) -> str:
    """The figures of one way of choosing the rates over some cells."""

    def of(reference: str, figure: str) -> list[float]:
        return [left(cell[name], figure) / best(cell, reference, figure) for cell in cells]

    return " | ".join(
        [
            str(len(cells)),
            str(sum(left(cell[name], "loss") >= cell[name]["before"] for cell in cells)),
            str(sum(cell[name]["warned"] > 0 for cell in cells)),
            f"{statistics.median(of('lora', 'loss')):.2g} (worst {max(of('lora', 'loss')):.2g})",
            str(sum(ratio <= 0.7 for ratio in of("lora", "loss"))),
            f"{statistics.median(of('lora', 'held_out')):.2g} (worst {max(of('lora', 'held_out')):.2g})",
            str(sum(ratio <= 1.3 for ratio in of("swept", "held_out"))),
            str(sum(ratio <= 1.3 for ratio in of("swept", "loss"))),
        ]
    )


def left(run: dict[str, Any], figure: str) -> float:
    """A run's loss, infinite where it diverged."""
    return np.inf if run["loss"] is None or not np.isfinite(run[figure]) else run[figure]


def best(cell: dict[str, Any], prefix: str, figure: str) -> float:
    """The least loss among the runs whose names begin so."""
    return min(left(run, figure) for key, run in cell.items() if key.startswith(prefix))


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """Make what is missing of the file, or the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("delta_rates.json"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    if arguments.table:
        print(table(results))
        return
    with ProcessPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(measure, cell, results.get(cell.name, {})) for cell in cells()]
        for done in as_completed(waiting):
            name, found = done.result()
            results[name] = found
            write(arguments.output, results)
            print(f"{len(results)}/{len(cells())} {name}", flush=True)


if __name__ == "__main__":
    main()
