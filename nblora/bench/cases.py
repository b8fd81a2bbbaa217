"""What is timed: a case, its arrays, the results it must give, and when a result counts as right."""

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nblora import checks

KINDS = ("step", "forward", "lora-step")
LAYOUTS = ("dense", "fullyconnected")
DTYPES = ("float32", "float64")
DEVICES = r"cpu|cuda(:\d+)?"
DEFAULT_RANK = 8

DELTA_SCALING = 0.1
MOMENTUM = 0.9
SCALING = 2.0  # alpha / rank, with alpha = 2 rank, as PEFT users set it
CHECKED_LR = 0.1  # moves the parameters by far more than rounding does
TIMED_LR = 1e-7  # the same data for thousands of steps: nothing may grow

# max|error| / max|reference| of outputs, gradients and velocity.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
# The same of a parameter's change by one step, beside the rounding of the parameter itself.
CHANGE_TOLERANCE = {"float32": 1e-3, "float64": 1e-9}
SEED = 20231


@dataclass(frozen=True)
class Case:
    """One measured computation: `n` samples through a layer of (`in_features`, `out_features`) with an adapter.

    `kind` is "step" (forward and `backward_update` of a Delta-LoRA adapter, gradient of the input included),
    "forward" (of that adapter, in evaluation mode) or "lora-step" (a step without the delta).
    """

    kind: str
    n: int
    in_features: int
    out_features: int
    rank: int = DEFAULT_RANK
    dtype: str = "float32"
    layout: str = "dense"
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        checks.check_choice("kind", self.kind, KINDS)
        checks.check_choice("dtype", self.dtype, DTYPES)
        checks.check_choice("layout", self.layout, LAYOUTS)
        if not re.fullmatch(DEVICES, self.device):
            raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        for name in ("n", "in_features", "out_features", "threads"):
            checks.check_integer(name, getattr(self, name), 1)
        checks.check_rank(self.rank, self.in_features, self.out_features)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize

    @property
    def shape(self) -> str:
        """N, in, out and rank, as tables show them."""
        return f"{self.n} × {self.in_features} × {self.out_features}, r {self.rank}"

    def settings(self) -> dict[str, Any]:
        """All a peer must know, as JSON can carry it."""
        constants = {"delta_scaling": DELTA_SCALING, "momentum": MOMENTUM, "scaling": SCALING}
        return asdict(self) | constants


def parse_case(text: str) -> tuple[int, int, int, int]:
    """Read "N,IN,OUT" or "N,IN,OUT,RANK"; ValueError for anything else."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){2,3}", text):
        raise ValueError(f"case must be N,IN,OUT or N,IN,OUT,RANK, such as 64,768,768 or 64,768,768,16, got {text!r}")
    numbers = [int(part) for part in text.split(",")]
    if len(numbers) == 3:
        numbers.append(min(DEFAULT_RANK, *numbers[1:]))
    n, in_features, out_features, rank = numbers
    Case("step", n, in_features, out_features, rank)  # raises for what is out of range
    return n, in_features, out_features, rank


def make_arrays(case: Case, seed: int = SEED) -> dict[str, np.ndarray]:
    """Draw the arrays of `case`, the same for the same seed: x, g (the output's gradient), W, b, A, B, D, V.

    W, D and V are stored as the layout says: (in, out), or (out, in) for "fullyconnected". Everything is random,
    B, D and V too (zeros hide errors), and scaled so that every term counts: outputs of order 1, a gradient of norm 1,
    a velocity as large as the gradient of the delta.
    """
    rng = np.random.default_rng(seed)
    n, i, o, r = case.n, case.in_features, case.out_features, case.rank

    def normal(scale: float, *shape: int) -> np.ndarray:
        array = rng.standard_normal(shape, np.dtype(case.dtype))
        array *= array.dtype.type(scale)
        return array

    stored = (o, i) if case.layout == "fullyconnected" else (i, o)
    arrays = {
        "x": normal(1.0, n, i),
        "g": normal((n * o) ** -0.5, n, o),
        "W": normal(i**-0.5, *stored),
        "b": normal(0.1, o),
        "A": normal(i**-0.5, i, r),
        "B": normal(r**-0.5, r, o),
    }
    if case.kind != "lora-step":
        arrays["D"] = normal(i**-0.5, *stored)
        arrays["V"] = normal(DELTA_SCALING * o**-0.5, *stored)
    return arrays


def reference(case: Case, arrays: dict[str, np.ndarray], lr: float = CHECKED_LR) -> dict[str, np.ndarray]:
    """Compute in float64 what `case` must give: y, and for steps grad_input and the new A, B, D and V as stored.

    y  = x W + b + s (x A) B + c (x D)
    gx = g (W + c D)ᵀ + s (g Bᵀ) Aᵀ
    A' = A - lr s xᵀ (g Bᵀ);  B' = B - lr s (x A)ᵀ g;  V' = m V + (1 - m) c xᵀ g;  D' = D - lr V'
    """
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    x, g, A, B = (wide[name] for name in ("x", "g", "A", "B"))
    flip = case.layout == "fullyconnected"
    M = wide["W"].T if flip else wide["W"]
    if "D" in wide:
        M = M + DELTA_SCALING * (wide["D"].T if flip else wide["D"])
    low = x @ A
    results = {"y": x @ M + wide["b"] + SCALING * (low @ B)}
    if case.kind == "forward":
        return results
    t = SCALING * (g @ B.T)
    results["grad_input"] = g @ M.T + t @ A.T
    results["A"] = A - lr * (x.T @ t)
    results["B"] = B - lr * SCALING * (low.T @ g)
    if "D" in wide:
        gradient = DELTA_SCALING * (g.T @ x if flip else x.T @ g)
        results["V"] = MOMENTUM * wide["V"] + (1 - MOMENTUM) * gradient
        results["D"] = wide["D"] - lr * results["V"]
    return results


def faults(
    case: Case, arrays: dict[str, np.ndarray], right: dict[str, np.ndarray], got: dict[str, np.ndarray]
) -> list[str]:
    """Say in words what of `got` is not what `right`, the reference, has; nothing where all agrees."""
    found = []
    for name, wanted in right.items():
        value = got.get(name)
        if value is None:
            found.append(f"{name} is missing")
        elif value.shape != wanted.shape:
            found.append(f"{name} has shape {value.shape}, not {wanted.shape}")
        elif value.dtype != np.dtype(case.dtype):
            found.append(f"{name} has dtype {value.dtype}, not {case.dtype}")
        else:
            allowed = _allowed(case, name, arrays.get(name), wanted)
            error = float(np.max(np.abs(value - wanted)))
            if not error <= allowed:  # NaN is a fault too
                found.append(f"{name} is off by {error:.2g}, allowed {allowed:.2g}")
    return found


def _allowed(case: Case, name: str, before: np.ndarray | None, wanted: np.ndarray) -> float:
    """The largest error that `name` may have; of a parameter, measured by how far the step should have moved it."""
    largest = float(np.max(np.abs(wanted)))
    if name in ("A", "B", "D") and before is not None:
        moved = float(np.max(np.abs(wanted - before)))
        return CHANGE_TOLERANCE[case.dtype] * moved + 4 * float(np.finfo(case.dtype).eps) * largest
    return TOLERANCE[case.dtype] * largest
