"""Combine adapters into one: the weighted sum of their changes, exact by stacking factors, or recompressed."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nblora.errors import FormatError
from nblora.formats.peft import CONFIG_NAME, TENSORS_NAME
from nblora.formats.peft_tensors import LoraModule
from nblora.formats.peft_writer import only_these, pattern_fields, write_adapter
from nblora.formats.replace import check_output
from nblora.formats.rounding import narrow
from nblora.storage.dtypes import itemsize
from nblora.weights.algebra import read_factors, truncate
from nblora.weights.merging import AdapterSpec, PathLike, adapter_files, open_adapters, stored_dtype
from nblora.weights.names import same_bytes
from nblora.weights.plan import WeightedAdapter
from nblora.weights.report import plain


@dataclass(frozen=True)
class CombinedModule:
    """One module of a combination: its rank, and how far off its change is.

    Attributes
    ----------
    name : str
    rank : int
    error : float
        ‖kept − exact‖ / ‖exact‖ in the Frobenius norm, rounding to the stored dtype left out.
    """

    name: str
    rank: int
    error: float


@dataclass
class CombineReport:
    """The result of `combine`."""

    output: str
    modules: list[CombinedModule] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    dtype: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return plain(asdict(self))

    def table(self) -> str:
        """Return the report as text."""
        width = max([len(module.name) for module in self.modules] + [6])
        lines = [f"{'module':<{width}}  {'rank':>5}  relative error"]
        lines += [f"{each.name:<{width}}  {each.rank:>5}  {each.error:.3g}" for each in self.modules]
        return "\n".join([*lines, f"{len(self.modules)} modules as {self.dtype} in {self.seconds:.2f} s"])


def combine(
    adapters: AdapterSpec | Sequence[AdapterSpec],
    output: PathLike,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> CombineReport:
    """Write one adapter whose change is the weighted sum of several adapters' changes.

    Stacking the factors is exact: [B₁ … Bₙ] [A₁; …; Aₙ] with the scalings and weights folded into the B. With `rank`
    the sum is replaced by its best approximation of that rank, by QR of the stacked factors and a small SVD; the dense
    change is never formed.

    Parameters
    ----------
    adapters : path-like, (path-like, float), or a sequence of these
        Adapters with their weights. DoRA adapters do not add up, and whole tensors (`modules_to_save`, trained biases)
        only where they are equal or one adapter of weight 1 brings them.
    output : path-like
        The new adapter's folder.
    rank : int, optional
        Rank to recompress every module to that has a larger one.
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        Of the factors; the widest of the adapters' by default.
    force : bool
        Replace a folder that is there already, though nblora did not write it.

    Returns
    -------
    CombineReport

    Raises
    ------
    FormatError
        If an adapter is broken, or the adapters cannot be added up.
    ValueError
        If an argument is out of range.
    OSError
        If a file cannot be read or written.
    """
    began = time.perf_counter()
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}; expected a whole number of at least 1")
    with open_adapters(adapters) as opened:
        check_output(Path(output), adapter_files(opened), {CONFIG_NAME, TENSORS_NAME}, force)
        stored = stored_dtype(dtype) or _widest(opened)
        names = list(dict.fromkeys(name for each in opened for name in each.adapter.modules))
        report = CombineReport(str(output), dtype=stored)
        tensors: dict[str, np.ndarray] = {}
        ranks, alphas = {}, {}
        for name in names:
            parts = [(each, each.adapter.modules[name]) for each in opened if name in each.adapter.modules]
            _check_alike(name, parts)
            factors, scaling, error = _combined(parts, rank)
            ranks[name] = factors["A"].shape[0]
            alphas[name] = scaling * (math.sqrt(ranks[name]) if opened[0].adapter.config.use_rslora else ranks[name])
            report.modules.append(CombinedModule(name, ranks[name], error))
            _store(tensors, parts, factors, stored)
        for name in dict.fromkeys(name for each in opened for name in each.adapter.replaced):
            owner = _owner(name, opened)
            info = owner.adapter.replaced[name]
            tensors[info.name] = owner.adapter.read(info)
            report.replaced.append(name)
        write_adapter(Path(output), _config(opened, ranks, alphas), tensors, force)
    report.seconds = time.perf_counter() - began
    return report


def _widest(adapters: Iterable[WeightedAdapter]) -> str:
    """The widest dtype of all factors; two 16-bit types that differ need float32."""
    found = {info.dtype for each in adapters for m in each.adapter.modules.values() for info in (m.A, m.B)}
    return "F32" if found == {"F16", "BF16"} else max(found, key=itemsize)


def _check_alike(name: str, parts: Sequence[tuple[WeightedAdapter, LoraModule]]) -> None:
    first_owner, first = parts[0]
    for owner, module in parts:
        if module.single:
            raise FormatError(f"{owner.label}: {name} has one matrix, which is no LoRA factor and does not add up")
        if module.magnitude:
            raise FormatError(f"{owner.label}: {name} is a DoRA module; its change scales the base and does not add up")
        if (module.kind, module.in_features, module.out_features) != (
            first.kind, first.in_features, first.out_features,
        ):  # fmt: skip
            raise FormatError(
                f"{owner.label}: {name} is {module.kind} {module.out_features}×{module.in_features}, but in "
                f"{first_owner.label} it is {first.kind} {first.out_features}×{first.in_features}"
            )
        if module.kind == "linear" and owner.adapter.config.fan_in_fan_out != first_owner.adapter.config.fan_in_fan_out:
            raise FormatError(f"{owner.label} and {first_owner.label} differ in fan_in_fan_out")
        if module.groups > 1:
            raise FormatError(f"{owner.label}: {name} belongs to a grouped convolution, whose factors do not add up")


def _combined(
    parts: Sequence[tuple[WeightedAdapter, LoraModule]], rank: int | None
) -> tuple[dict[str, np.ndarray], float, float]:
    """Stacked factors of a module, recompressed if asked for; their scaling; and the relative error."""
    scales = [each.weight * module.scaling for each, module in parts]
    scaling = next((scale for scale in scales if scale), 1.0)  # the first adapter's B keeps its bits
    factors = [read_factors(each.adapter, module) for each, module in parts]
    for (each, module), (B, A) in zip(parts, factors, strict=True):
        for info, factor in ((module.B, B), (module.A, A)):
            if not np.isfinite(factor).all():
                raise FormatError(
                    f"{each.adapter.file.path}: {info.name} holds NaN or infinity, which nothing adds up to"
                )
    B = np.concatenate([B * (scale / scaling) for (B, _), scale in zip(factors, scales, strict=True)], axis=1)
    A = np.concatenate([A for _, A in factors])
    error = 0.0
    if rank is not None and rank < A.shape[0]:
        B, A, error = truncate(B, A, rank)
    stacked = {"A": A, "B": B}
    if any(each.adapter.config.lora_bias for each, _ in parts) and parts[0][1].kind != "embedding":
        stacked["bias"] = np.zeros(B.shape[0])
        for (each, module), scale in zip(parts, scales, strict=True):
            if module.bias:
                stacked["bias"] += each.adapter.file.read_wide(module.bias.name) * (scale / scaling)
    return stacked, scaling, error


def _store(
    tensors: dict[str, np.ndarray],
    parts: Sequence[tuple[WeightedAdapter, LoraModule]],
    factors: dict[str, np.ndarray],
    dtype: str,
) -> None:
    module = parts[0][1]
    rank = factors["A"].shape[0]
    tensors[module.A.name] = narrow(factors["A"].reshape(rank, *module.A.shape[1:]), dtype)
    tensors[module.B.name] = narrow(factors["B"].reshape(module.out_features, rank, *module.B.shape[2:]), dtype)
    if "bias" in factors:
        tensors[module.B.name.removesuffix("weight") + "bias"] = narrow(factors["bias"], dtype)


def _owner(name: str, adapters: Sequence[WeightedAdapter]) -> WeightedAdapter:
    """The adapter whose whole tensor the combination takes."""
    owners = [each for each in adapters if name in each.adapter.replaced]
    first = owners[0]
    for other in owners[1:]:
        ours, theirs = first.adapter.replaced[name], other.adapter.replaced[name]
        if not same_bytes(first.adapter.file, ours, other.adapter.file, theirs):
            raise FormatError(
                f"{first.label} and {other.label} replace {name} by different numbers, which do not add up"
            )
    if len(owners) == 1 and first.weight != 1:
        raise FormatError(f"{first.label}: {name} is replaced whole and cannot have the weight {first.weight:g}")
    return first


def _config(adapters: Sequence[WeightedAdapter], ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    configs = [each.adapter.config for each in adapters]
    raw = dict(configs[0].raw)
    raw |= pattern_fields(ranks, alphas) if ranks else {}
    raw["lora_bias"] = any(config.lora_bias for config in configs)
    raw["init_lora_weights"] = True
    saved = [name for config in configs for name in config.raw.get("modules_to_save") or []]
    raw["modules_to_save"] = list(dict.fromkeys(saved)) or None
    raw["bias"] = next((config.bias for config in configs if config.bias != "none"), "none")
    targets = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if any(config.raw.get(field) != raw.get(field) for config in configs for field in targets):
        raw |= dict.fromkeys(targets) | {"target_modules": only_these(list(ranks))}
    return raw
