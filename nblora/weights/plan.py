"""What a merge will do: for every tensor of the checkpoint, the adapters' parts that change it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles
from nblora.formats.peft import PeftAdapter
from nblora.formats.peft_config import method_of
from nblora.formats.peft_tensors import LoraModule
from nblora.storage.dtypes import FLOATS
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo
from nblora.weights.layouts import Layouts
from nblora.weights.names import Ties, apply_maps, find_ties, parse_maps, same_bytes, unmatched

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True)
class WeightedAdapter:
    """An open adapter and the factor that its change is multiplied by."""

    adapter: PeftAdapter
    weight: float = 1.0

    @property
    def label(self) -> str:
        """The adapter's folder, for messages."""
        return str(self.adapter.path)


@dataclass(frozen=True)
class Factor:
    """A stored factor, seen as a matrix (n, rank), or as (rank, n) where `transposed`."""

    file: SafetensorsFile
    info: TensorInfo
    transposed: bool


@dataclass(frozen=True)
class Fixed:
    """A factor (n, rank) that no file holds: `rows(n, rank)` makes it."""

    rows: Callable[[int, int], np.ndarray]
    count: int


@dataclass(frozen=True)
class Term:
    """scale · left · rightᵀ, added to a matrix (rows, columns): left (rows, rank), right (columns, rank).

    `left` is None for a bias, whose one row of rank 1 is the scale itself. With `magnitude` (DoRA's m, along `axis`)
    the sum of the matrix, the terms before and this one is scaled to it, and `weight` is the share of that change
    taken; without, the weight is part of the scale.
    """

    label: str
    rank: int
    scale: float
    left: Factor | Fixed | None
    right: Factor | Fixed
    weight: float = 1.0
    magnitude: Factor | None = None
    axis: int = ROWS


@dataclass
class Recipe:
    """How one stored tensor changes: what it starts from, and what is added, in the order of the adapters.

    Attributes
    ----------
    rows, columns : int
        The matrix that the tensor is seen as, row-major.
    replacement : (SafetensorsFile, TensorInfo) or None
        What the tensor starts from instead of the checkpoint's own numbers.
    replaced_by : str
        The adapter that the replacement comes from.
    terms : list of Term
    """

    rows: int
    columns: int
    replacement: tuple[SafetensorsFile, TensorInfo] | None = None
    replaced_by: str = ""
    terms: list[Term] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Sum of the terms' ranks."""
        return sum(term.rank for term in self.terms)

    @property
    def dora(self) -> Term | None:
        """The term with a magnitude, if there is one."""
        return next((term for term in self.terms if term.magnitude), None)


@dataclass
class Plan:
    """Recipes by the name of the stored tensor, the ties that were found, and what the user should know."""

    recipes: dict[str, Recipe]
    ties: Ties
    warnings: list[str] = field(default_factory=list)


def make_plan(model: ModelFiles, adapters: Sequence[WeightedAdapter], maps: Iterable[str] = ()) -> Plan:
    """Match adapters to a checkpoint.

    Parameters
    ----------
    model : ModelFiles
    adapters : sequence of WeightedAdapter
        Applied in this order; the order matters only beside a DoRA adapter.
    maps : iterable of str
        `OLD=NEW` rules for names.

    Returns
    -------
    Plan

    Raises
    ------
    FormatError
        If a tensor of an adapter matches nothing, has a shape that does not fit, or asks for what cannot be merged.
    ValueError
        If a rule is malformed.
    """
    rules = parse_maps(maps)
    targets = [_Targets(weighted, rules) for weighted in adapters]
    planner = _Planner(model, find_ties(model, {name for each in targets for name in each.names}))
    for each in targets:
        each.check_known(planner)
        for name, info in each.replaced.items():
            planner.replace(each.weighted, name, info)
    for each in targets:
        planner.add_modules(each)
    planner.warn_of_ties()
    return planner.plan


class _Targets:
    """The parameters that one adapter changes, by their names in the checkpoint."""

    def __init__(self, weighted: WeightedAdapter, rules: Sequence[tuple[list[str], list[str]]]) -> None:
        self.weighted = weighted
        self.replaced: dict[str, TensorInfo] = {}
        self.weights: dict[str, LoraModule] = {}
        self.biases: dict[str, LoraModule] = {}
        for name, info in weighted.adapter.replaced.items():
            self._put(self.replaced, apply_maps(name, rules), info)
        for name, module in weighted.adapter.modules.items():
            self._put(self.weights, apply_maps(f"{name}.weight".lstrip("."), rules), module)
            if module.bias:
                self._put(self.biases, apply_maps(f"{name}.bias".lstrip("."), rules), module)

    def _put(self, names: dict, name: str, value: LoraModule | TensorInfo) -> None:
        if name in names:
            raise FormatError(f"{self.weighted.label}: --map leads two of its tensors to {name}")
        names[name] = value

    @property
    def names(self) -> list[str]:
        return [*self.replaced, *self.weights, *self.biases]

    def check_known(self, planner: "_Planner") -> None:
        """Raise FormatError for every tensor that matches nothing."""
        missing = [
            (name, part.A.name if isinstance(part, LoraModule) else part.name)
            for names in (self.replaced, self.weights)
            for name, part in names.items()
            if not planner.knows(name)
        ]
        if missing:
            raise unmatched(self.weighted.label, missing, planner.tensors)
        for name, module in self.biases.items():
            if not planner.knows(name):
                raise FormatError(
                    f"{self.weighted.label}: lora_bias is set, but the base layer {module.name} has no bias ({name})"
                )


class _Planner:
    """Fills a plan, one adapter after the other."""

    def __init__(self, model: ModelFiles, ties: Ties) -> None:
        self.model, self.tensors = model, model.tensors
        self.plan = Plan({}, ties)

    def knows(self, name: str) -> bool:
        return name in self.tensors or name in self.plan.ties.absent

    def stored(self, label: str, name: str) -> tuple[str, TensorInfo]:
        """The tensor that is stored for `name`."""
        name = self.plan.ties.absent.get(name, name)
        info = self.tensors[name][1]
        if info.dtype not in FLOATS:
            raise FormatError(
                f"{label}: {name} is stored as {info.dtype}, which nothing can be merged into; dequantise it"
            )
        return name, info

    def replace(self, weighted: WeightedAdapter, name: str, info: TensorInfo) -> None:
        """Let a tensor start from what the adapter holds for it."""
        label = weighted.label
        stored, old = self.stored(label, name)
        file = weighted.adapter.file
        if info.shape != old.shape:
            raise FormatError(f"{label}: {info.name} has shape {info.shape}, but {stored} has {old.shape}")
        is_parameter = ".base_layer." in info.name  # saved as it is, not trained apart from what it is tied to
        if is_parameter and info.dtype == old.dtype and same_bytes(*self.tensors[stored], file, info):
            return
        if weighted.weight != 1:
            raise FormatError(
                f"{label}: {info.name} replaces {stored} whole and cannot have the weight {weighted.weight:g}; "
                "use the weight 1 or an adapter without modules_to_save and trained biases"
            )
        recipe = self.plan.recipes.get(stored)
        if recipe and recipe.replacement:
            if not same_bytes(*recipe.replacement, file, info):
                raise FormatError(
                    f"{label} and {recipe.replaced_by} replace {stored} by different numbers; merge one of them"
                )
            return
        if stored != name and name not in self.tensors and not is_parameter:
            own = weighted.adapter.replaced.get(stored)
            if own is None or not same_bytes(file, info, file, own):
                raise FormatError(
                    f"{label}: {info.name} replaces {name}, which is tied to {stored} and not stored; "
                    "untie the two in the checkpoint (store both, tie_word_embeddings false) before merging"
                )
            return
        rows, columns = _matrix(old)
        self.plan.recipes[stored] = Recipe(rows, columns, (file, info), label)
        twins = self.plan.ties.stored.get(stored, [])
        if is_parameter:
            self.plan.recipes |= {twin: Recipe(rows, columns, (file, info), label) for twin in twins}
        elif twins:
            self.plan.warnings.append(f"{stored} is replaced by {label} and no longer tied to {', '.join(twins)}")

    def add_modules(self, targets: _Targets) -> None:
        """Add an adapter's low-rank terms and its `lora_bias`."""
        label, weight = targets.weighted.label, targets.weighted.weight
        file, config = targets.weighted.adapter.file, targets.weighted.adapter.config
        for field_name, value in config.unknown.items():
            self.plan.warnings.append(
                f"{label}: {config.path.name} holds {field_name} ({value!r}), which nblora does not know and skips"
            )
        stored = {name: self.stored(label, name) for name in targets.weights}
        layouts = Layouts(self.model, config, self.plan.warnings)
        shapes = {name: info.shape for name, (_, info) in stored.items()}
        transposed = layouts.resolve(label, targets.weights, shapes)
        for name, module in targets.weights.items():
            is_flat = transposed[name] or module.kind == "embedding"
            A: Factor | Fixed = Factor(file, module.A, True)
            B = Factor(file, module.B, module.single)
            if module.single:
                method = method_of(config.raw["peft_type"])
                assert method is not None  # or the file had been refused
                A = Fixed(method.fixed_factor, shapes[name][0 if is_flat else 1])
            left, right = (A, B) if is_flat else (B, A)
            term = Term(label, module.rank, module.scaling * weight, left, right)
            if module.magnitude:
                magnitude = Factor(file, module.magnitude, False)
                axis = COLUMNS if is_flat else ROWS
                term = Term(label, module.rank, module.scaling, left, right, weight, magnitude, axis)
            self._append(label, *stored[name], term)
        for name, module in targets.biases.items():
            assert module.bias
            term = Term(label, 1, module.scaling * weight, None, Factor(file, module.bias, False))
            self._append(label, *self.stored(label, name), term)

    def warn_of_ties(self) -> None:
        """Say where one change reaches two names: with the adapter unmerged the two would differ."""
        ties = self.plan.ties
        pairs = [(name, twins) for name, twins in ties.stored.items() if not self.plan.recipes[name].replacement]
        pairs += [(name, [alias]) for alias, name in ties.absent.items() if name in self.plan.recipes]
        for name, others in pairs:
            self.plan.warnings.append(f"{name} is tied to {', '.join(others)}: all of them get the same change")

    def _append(self, label: str, stored: str, info: TensorInfo, term: Term) -> None:
        rows, columns = _matrix(info)
        own = self.plan.recipes.setdefault(stored, Recipe(rows, columns))
        for name in (stored, *self.plan.ties.stored.get(stored, [])):
            recipe = self.plan.recipes.setdefault(name, Recipe(rows, columns))
            if recipe.replacement and recipe.replacement != own.replacement:
                continue
            if term.magnitude and recipe.dora:
                raise FormatError(
                    f"{label} and {recipe.dora.label} are both DoRA on {stored}; their norms exclude each other"
                )
            recipe.terms.append(term)


def _matrix(info: TensorInfo) -> tuple[int, int]:
    if len(info.shape) < 2:
        return 1, info.size
    return info.shape[0], info.size // max(info.shape[0], 1)
