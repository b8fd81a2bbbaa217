"""The experiment: pretrain, choose settings on the validation split, adapt with each seed, measure on the test split;
with a dense network, and with a convolutional one.

Everything that is drawn comes from the seeds, so a second run measures the same, but for the seconds.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from nblora import DeltaLoRAAdapter, Sequential
from nblora.backends import default_backend, resolve
from nblora.errors import NbloraError
from nblora.kernels.common import cache, jit
from nblora.training import AdamW, Optimizer, fit

from .data import Digits, Split, load_digits
from .methods import CONVOLUTIONAL, DELTA_LORA, DENSE, LORA, METHODS, Candidate, Method, Network
from .results import DemoResult, MethodResult, NetworkResult, Settings, mean

PRETRAIN_LR = 0.003
TUNING_SEEDS = 2
TINY_STEPS = 3
# Largest difference between merged and unmerged outputs, over the largest output, three float32 layers deep.
MERGE_TOLERANCE = 1e-4
HEAT_MAP_LAYER = "hidden1"

Adapted = tuple[Sequential, list[dict[str, float]], float]
"""A trained model, its curve and the seconds of its training."""


def run_demo(settings: Settings, progress: bool = True) -> DemoResult:
    """Run the whole experiment and write the adapter files; tables and figure are `report`'s and `figure`'s.

    Parameters
    ----------
    settings : Settings
        What to run.
    progress : bool
        Show a bar, where standard error is a terminal.

    Raises
    ------
    MissingExtraError
        Without scikit-learn.
    NbloraError
        Where a merged model computes something else than the adapted one.
    """
    from tqdm import tqdm

    start = time.perf_counter()
    digits = load_digits(settings.seed)
    networks = (DENSE, CONVOLUTIONAL) if runs_convolutions(settings.device) else (DENSE,)
    experiments = [_Experiment(settings, digits, network) for network in networks]
    runs = sum(experiment.run_count() for experiment in experiments)
    # disable=None: silent where standard error is no terminal
    with one_thread(), tqdm(total=runs, unit="run", disable=None if progress else True) as bar:
        compiled = cache_is_empty()
        found, machine = [experiment.run(bar) for experiment in experiments], _machine()
    first, dense = experiments[0], found[0]
    return DemoResult(
        settings,
        machine,
        first.samples(),
        first.steps(),
        dense,
        found[1] if len(found) > 1 else None,
        learned_delta(first.first_models[DELTA_LORA.name]),
        time.perf_counter() - start,
        compiled,
    )


def runs_convolutions(device: str | None) -> bool:
    """Whether the convolutional network is for the device: Numba's simulator would take hours."""
    return not (default_backend() if device is None else resolve(device)).simulated


def cache_is_empty() -> bool:
    """Whether the kernels are still to be compiled."""
    folder = None if jit.JIT_DISABLED else cache.cache_folder()
    return folder is None or not any(folder.glob("*.nbi"))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let kernels run in the calling thread. These layers are too small to share: a second thread gains nothing on an
    idle machine, and where another program has its core each kernel waits for it (0.1 s a run became 3 s)."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)


class _Experiment:
    def __init__(self, settings: Settings, digits: Digits, network: Network = DENSE) -> None:
        self.settings, self.network = settings, network
        self.digits = digits
        self.methods: tuple[Method, ...] = METHODS
        self.candidates = {method.name: network.candidates(method) for method in METHODS}
        self.seeds = [settings.seed + place for place in range(settings.seeds)]
        self.epochs, self.pretrain_epochs = settings.epochs, settings.pretrain_epochs
        if settings.tiny:
            self.methods = (LORA, DELTA_LORA)
            self.candidates = {method.name: method.candidates[:1] for method in self.methods}
            self.seeds = self.seeds[:1]
            self.epochs = self.pretrain_epochs = 1
            self.digits = digits.first(TINY_STEPS * settings.batch_size, settings.batch_size)
        if network.convolutional:
            self.digits = self.digits.as_images()
        self.bases: dict[int, Sequential] = {}
        self.first_models: dict[str, Sequential] = {}

    def tuning_seeds(self) -> list[int]:
        return self.seeds[:TUNING_SEEDS]

    def run_count(self) -> int:
        tuning = sum(len(self.candidates[method.name]) for method in self.methods) * len(self.tuning_seeds())
        return len(self.seeds) * (1 + len(self.methods)) + tuning

    def samples(self) -> dict[str, int]:
        """Images of each split."""
        return {name: len(split.y) for name, split in self.digits._asdict().items() if name != "upright_test"}

    def steps(self) -> int:
        """Steps of an adaptation."""
        return self.epochs * -(-len(self.digits.adaptation.y) // self.settings.batch_size)

    def say(self, bar: Any, what: str) -> None:
        bar.set_description(f"{self.network.name}: {what}")

    def run(self, bar: Any) -> NetworkResult:
        before = MethodResult("Not adapted")
        for seed in self.seeds:
            self.say(bar, "pretraining")
            base = self.bases[seed] = self.pretrain(seed)
            before.test_accuracy.append(accuracy(base, self.digits.test))
            before.upright_accuracy.append(accuracy(base, self.digits.upright_test))
            bar.update()
        folder = self.settings.output / "adapters"
        folder.mkdir(parents=True, exist_ok=True)
        before.adapter_file = str(folder / f"{self.network.prefix}pretrained.safetensors")
        self.bases[self.seeds[0]].save(before.adapter_file)
        rows = []
        for method in self.methods:
            row, first_model = self.measure(method, bar)
            row.adapter_file = str(folder / f"{self.network.prefix}{method.slug}.safetensors")
            first_model.save(row.adapter_file)
            check_merge(first_model, row, self.digits.test)
            self.first_models[method.name] = first_model
            rows.append(row)
        return NetworkResult(before, rows)

    def pretrain(self, seed: int) -> Sequential:
        model = self.network.make(seed)
        if self.settings.device is not None:
            model.to(self.settings.device)
        self.train(model, self.digits.pretraining, Candidate(PRETRAIN_LR), self.pretrain_epochs, seed)
        return model

    def train(self, model: Sequential, split: Split, candidate: Candidate, epochs: int, seed: int) -> Any:
        return fit(
            model,
            split.x,
            split.y,
            loss="cross_entropy",
            optimizer=AdamW(lr=candidate.lr),
            epochs=epochs,
            batch_size=self.settings.batch_size,
            validation=self.digits.validation,
            delta_lr=candidate.delta_lr,
            seed=seed,
            progress=False,
        )

    def adapt(self, method: Method, candidate: Candidate, seed: int) -> Adapted:
        """Adapt a copy of the seed's pretrained network."""
        model = self.bases[seed].clone()
        method.prepare(model, seed)
        start = time.perf_counter()
        history = self.train(model, self.digits.adaptation, candidate, self.epochs, seed)
        return model, list(curve(history)), time.perf_counter() - start

    def choose(self, method: Method, bar: Any) -> tuple[Candidate, dict[str, float], dict[int, Adapted]]:
        """The candidate with the best mean accuracy on the validation split, the first of equals; every candidate's
        accuracy; and the best one's runs by their seeds, which another run would only repeat."""
        scores: dict[Candidate, float] = {}
        best: dict[int, Adapted] = {}
        for candidate in self.candidates[method.name]:
            self.say(bar, f"{method.name}, choosing settings")
            found, runs = [], {}
            for seed in self.tuning_seeds():
                runs[seed] = self.adapt(method, candidate, seed)
                found.append(accuracy(runs[seed][0], self.digits.validation))
                bar.update()
            if mean(found) > max(scores.values(), default=-1.0):
                best = runs
            scores[candidate] = mean(found)
        return max(scores, key=lambda candidate: scores[candidate]), {c.label: s for c, s in scores.items()}, best

    def measure(self, method: Method, bar: Any) -> tuple[MethodResult, Sequential]:
        """The method's row, and the first seed's adapted model."""
        candidate, scores, made = self.choose(method, bar)
        row = MethodResult(method.name, candidate=candidate, validation_accuracy=scores)
        models = []
        for seed in self.seeds:
            self.say(bar, method.name)
            model, rows, seconds = made[seed] if seed in made else self.adapt(method, candidate, seed)
            row.test_accuracy.append(accuracy(model, self.digits.test))
            row.upright_accuracy.append(accuracy(model, self.digits.upright_test))
            row.curves.append(rows)
            row.seconds.append(seconds)
            models.append(model)
            bar.update()
        row.trainable_parameters, row.state_bytes = (
            models[0].parameter_count,
            state_bytes(models[0], AdamW(lr=candidate.lr)),
        )
        return row, models[0]


def curve(history: Any) -> Iterator[dict[str, float]]:
    """Rows of epoch, training loss, validation loss and validation accuracy."""
    for row in history.rows:
        yield {key: row[key] for key in ("epoch", "loss", "val_loss", "val_accuracy")}


def accuracy(model: Sequential, split: Split) -> float:
    """The fraction of images whose largest output is their label's; the model is left in evaluation mode."""
    return float(np.mean(model.eval().forward(split.x).argmax(axis=1) == split.y))


def learned_delta(model: Sequential) -> np.ndarray:
    """c D of the heat map's layer, (in, out)."""
    adapter = model[HEAT_MAP_LAYER]
    if not isinstance(adapter, DeltaLoRAAdapter):
        raise TypeError(f"{HEAT_MAP_LAYER} must be a DeltaLoRAAdapter, got {type(adapter).__name__}")
    return adapter.delta_scaling * adapter.get_current_delta()


def state_bytes(model: Sequential, optimizer: Optimizer) -> int:
    """Bytes that training holds beyond the frozen weights: trainable parameters, each with the optimiser's arrays
    (AdamW's two moments) or, for a delta, its velocity. Gradients are left out: a fused delta has none."""
    copies = {True: 2, False: 1 + len(optimizer.slots)}
    return sum(
        int(np.prod(p.shape)) * model.dtype.itemsize * copies[p.parameter.velocity is not None]
        for p in model._trainable()
    )


def check_merge(model: Sequential, row: MethodResult, split: Split) -> None:
    """Put into `row` how far the merged model's outputs lie from the adapted one's.

    Raises
    ------
    NbloraError
        Where that is more than rounding.
    """
    adapted = model.eval().forward(split.x)
    merged = model.merge().eval().forward(split.x)
    row.merge_difference = float(np.max(np.abs(merged - adapted)))
    row.merge_relative_difference = row.merge_difference / float(np.max(np.abs(adapted)))
    row.merge_changed_labels = int(np.sum(merged.argmax(axis=1) != adapted.argmax(axis=1)))
    if not row.merge_relative_difference <= MERGE_TOLERANCE:
        raise NbloraError(
            f"{row.method}: merged and unmerged outputs differ by {row.merge_relative_difference:.1e} of the largest "
            f"output, expected at most {MERGE_TOLERANCE:.0e}: please report this with the output of `nblora info`"
        )


def _machine() -> dict[str, Any]:
    from nblora.info import collect

    found = collect()
    return {
        "cpu": found["cpu"]["name"],
        "cores": found["cpu"]["usable_cores"],
        "threads": found["threads"]["numba_threads"],
        "versions": found["versions"],
    }
