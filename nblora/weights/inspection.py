"""Look into an adapter: what each module's change is made of, from its factors alone."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nblora.errors import MissingExtraError
from nblora.formats.peft import CONFIG_NAME, TENSORS_NAME, PeftAdapter
from nblora.formats.peft_tensors import LoraModule
from nblora.linalg import product_svd
from nblora.weights.algebra import read_factors
from nblora.weights.checkpoints import CheckpointReport, inspect_checkpoint
from nblora.weights.report import plain

MOST_LINES = 7  # of a picture


@dataclass(frozen=True)
class ModuleReport:
    """What one module's change s·B·A is made of.

    Attributes
    ----------
    name, kind : str
        Kind is "linear", "conv" or "embedding".
    dtype : str
        Of the factors, as safetensors spells it.
    in_features, out_features, rank : int
    alpha, scaling : float
        scaling is s.
    norm_A, norm_B, norm : float
        Frobenius norms of the factors, and of s·B·A.
    singular_values : list of float
        Of s·B·A, descending.
    stable_rank : float
        ‖sBA‖²_F / ‖sBA‖²₂: how many directions carry the change; 0 for a change of zeros.
    dora, lora_bias : bool
    not_finite : int
        Infinities and NaN in the factors; with any the norms and singular values are NaN.
    """

    name: str
    kind: str
    dtype: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scaling: float
    norm_A: float
    norm_B: float
    norm: float
    singular_values: list[float]
    stable_rank: float
    dora: bool
    lora_bias: bool
    not_finite: int


@dataclass
class InspectReport:
    """The result of `inspect`.

    Attributes
    ----------
    path : str
    modules : list of ModuleReport
    replaced : dict of str to list of int
        Whole tensors that the adapter brings, and their shapes.
    parameters : int
        Numbers that the adapter holds.
    config : dict
        `adapter_config.json` as it is.
    """

    path: str
    modules: list[ModuleReport]
    replaced: dict[str, list[int]]
    parameters: int
    config: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return plain(asdict(self))

    def table(self) -> str:
        """Return the report as text, a line for every module."""
        width = max([len(module.name) for module in self.modules] + [6])
        heads = f"{'rank':>5}  {'scale':>8}  {'|A|':>9}  {'|B|':>9}  {'|sBA|':>9}  {'largest':>9}  stable rank"
        lines = [f"{'module':<{width}}  {'kind':<9}  {'shape':>13}  {heads}"]
        for each in self.modules:
            shape = f"{each.out_features}×{each.in_features}"
            largest = each.singular_values[0] if each.singular_values else 0.0
            lines.append(
                f"{each.name:<{width}}  {each.kind:<9}  {shape:>13}  {each.rank:>5}  {each.scaling:>8.4g}  "
                f"{each.norm_A:>9.4g}  {each.norm_B:>9.4g}  {each.norm:>9.4g}  {largest:>9.4g}  {each.stable_rank:.3g}"
            )
        lines += [f"{name}: replaced whole, {tuple(shape)}" for name, shape in self.replaced.items()]
        lines.append(f"{len(self.modules)} modules, {self.parameters} parameters")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw singular values and stable ranks of all modules into a picture (PNG, SVG or PDF by its suffix).

        Raises
        ------
        MissingExtraError
            If matplotlib is not installed.
        ValueError
            If the suffix is of no picture format.
        """
        _plot(self.modules, Path(path))


def inspect(path: str | os.PathLike[str]) -> InspectReport | CheckpointReport:
    """Describe an adapter, or the checkpoint that one could change.

    Of an adapter: rank, scale, norms, singular values and stable rank of every module. The dense change is never
    formed: singular values come from QR of the factors and a small SVD. Of a checkpoint: its tensors, their types,
    shapes and sizes, and which of them a LoRA adapter could change; no tensor is read.

    Parameters
    ----------
    path : path-like
        A PEFT adapter's folder; or a safetensors file, the index of a sharded checkpoint, or a folder that holds
        either.

    Returns
    -------
    InspectReport
        Of an adapter.
    CheckpointReport
        Of a checkpoint.

    Raises
    ------
    FormatError, OSError
        If the file is broken, not supported or cannot be read.
    """
    place = Path(path)
    is_adapter = place.name == TENSORS_NAME or any((place / name).exists() for name in (CONFIG_NAME, TENSORS_NAME))
    if not is_adapter:
        os.stat(place)  # or it says that there is no such file
    return _inspect_adapter(place) if is_adapter else inspect_checkpoint(place)


def _inspect_adapter(adapter: Path) -> InspectReport:
    with PeftAdapter(adapter) as opened:
        modules = [_describe(opened, module) for module in opened.modules.values()]
        return InspectReport(
            path=str(adapter),
            modules=modules,
            replaced={name: list(info.shape) for name, info in opened.replaced.items()},
            parameters=sum(info.size for info in opened.file.tensors.values()),
            config=opened.config.raw,
        )


def _describe(adapter: PeftAdapter, module: LoraModule) -> ModuleReport:
    B, A = read_factors(adapter, module)
    not_finite = int((~np.isfinite(A)).sum() + (~np.isfinite(B)).sum())
    if not_finite or module.groups > 1:
        # The factors of a grouped convolution are no factors of one matrix.
        values = np.full(min(module.rank, *A.shape, *B.shape), np.nan)
    else:
        values = abs(module.scaling) * product_svd(B, A)[1]
    norm, largest = float(np.linalg.norm(values)), float(values[0])
    return ModuleReport(
        name=module.name,
        kind=module.kind,
        dtype=module.A.dtype,
        in_features=module.in_features,
        out_features=module.out_features,
        rank=module.rank,
        alpha=module.alpha,
        scaling=module.scaling,
        norm_A=float(np.linalg.norm(A)),
        norm_B=float(np.linalg.norm(B)),
        norm=norm,
        singular_values=[float(value) for value in values],
        stable_rank=0.0 if largest == 0 else (norm / largest) ** 2,
        dora=module.magnitude is not None,
        lora_bias=module.bias is not None,
        not_finite=not_finite,
    )


def _plot(modules: Sequence[ModuleReport], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a picture needs matplotlib: pip install 'nblora[plot]'") from error
    figure = Figure(figsize=(10, 4 + 0.16 * len(modules)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    formats = canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"{path}: expected a picture's name, ending in one of {', '.join(sorted(formats))}")
    values, ranks = figure.subplots(1, 2)
    largest = sorted(modules, key=lambda module: -module.norm)[:MOST_LINES]
    for module in (module for module in modules if module in largest):
        values.plot(range(1, len(module.singular_values) + 1), module.singular_values, marker=".", label=module.name)
    if modules:
        values.legend(fontsize=6, loc="lower left")
    among = f" of the {len(largest)} largest of {len(modules)} modules" if len(largest) < len(modules) else ""
    values.set(xlabel="index", ylabel="singular value of s·B·A", title=f"Singular values{among}", yscale="log")
    values.xaxis.get_major_locator().set_params(integer=True)
    places = np.arange(len(modules))
    ranks.barh(places, [module.stable_rank for module in modules])
    ranks.set_yticks(places, [module.name for module in modules], fontsize=6)
    ranks.set_ylim(-0.6, max(len(modules), 3) - 0.4)
    ranks.invert_yaxis()
    ranks.set(xlabel="stable rank", title="Stable rank")
    figure.savefig(path)
