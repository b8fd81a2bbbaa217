"""`PretrainedModel`: a body, a head and what the folder said that they came from."""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from nblora import checks
from nblora.adapters import DEFAULT_ADAPTER, Adapter
from nblora.backends.protocol import Array
from nblora.formats.peft_export import ExportedModule
from nblora.layers import Dense, FullyConnected, Layer, tree
from nblora.layers.base import layer_from_state
from nblora.layers.diagnostics import describe_sizes
from nblora.layers.run import Run
from nblora.models.model import Model

from . import saving
from .blocks import Block
from .config import Config
from .families import FAMILIES
from .heads import Classifier, Head, LanguageHead, Pooled
from .shelf import DEFAULT, Shelf
from .source import Source

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Pooling:
    """How an embedding becomes one row: of which rows ("mean", "first", "last"), and whether it has length 1."""

    rows: str = "mean"
    normalised: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes
    ----------
    model_type, task : str
    config : dict
        The folder's `config.json`, with the task's labels.
    labels : int
        Outputs of a classification.
    pooling : Pooling
    folder : str
        Of the file, "" where there is none.
    names : dict
        What the file calls each tensor, by the name that the model's class would save.
    drawn : tuple of str
        Layers that the file lacked.
    """

    model_type: str
    task: str
    config: dict[str, Any]
    labels: int = 0
    pooling: Pooling = Pooling()
    folder: str = ""
    names: dict[str, str] = field(default_factory=dict)
    drawn: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        pooling = {"rows": self.pooling.rows, "normalised": self.pooling.normalised}
        return {**vars(self), "pooling": pooling, "drawn": list(self.drawn)}

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> "Origin":
        """The inverse of `as_dict`."""
        return cls(**{**held, "pooling": Pooling(**held["pooling"]), "drawn": tuple(held["drawn"])})


class PretrainedModel(Model, abstract=True):
    """A model of a family, loaded by `load_pretrained`.

    Its layers bear the names that transformers' class for the task saves; `adapt` and `load_adapter` know PEFT's too.
    """

    def __init__(self, origin: Origin, source: Source) -> None:
        family = FAMILIES[origin.model_type]
        self._origin, self._family = origin, family
        config = Config(origin.config, Path(origin.folder, "config.json"))
        self.body = family.body(config, source, family.prefix)
        self.head = _head(self.body, config, source, origin)
        self.dtype = self.body.dtype
        self.in_features, self.out_features = self.body.in_features, self.head.out_features
        self._adapter_config: dict[str, Any] | None = None
        self._shelf = Shelf(self)
        self._open(self.body._backend)
        self.freeze()
        self._training = False
        self._set_mode(False)

    # --- the tree ----------------------------------------------------------------------------------------------

    @property
    def task(self) -> str:
        """What it was loaded for."""
        return self._origin.task

    @property
    def model_type(self) -> str:
        """Its family, as `config.json` calls it."""
        return self._origin.model_type

    @property
    def source(self) -> str:
        """The folder or file that it was loaded from."""
        return self._origin.folder

    @property
    def config(self) -> dict[str, Any]:
        """A copy of its `config.json`."""
        return dict(self._origin.config)

    def children(self) -> dict[str, Layer]:
        self._require_open()
        return {self._family.prefix: self.body, "": self.head}

    def _slots(self) -> dict[str, tuple[Layer, str, Layer]]:
        """Every layer and adapter by its name, with its owner and what that calls it."""
        return {name: (owner, key, owner.children()[key]) for name, owner, key in tree.slots(self, Adapter)}

    def _with(self, layers: Mapping[str, Layer], origin: Origin | None = None) -> Self:
        """A model of the same origin around other layers, which it takes."""
        origin = self._origin if origin is None else origin
        model = type(self)(origin, Source(self.dtype, origin.names))
        slots = model._slots()
        if slots.keys() != layers.keys():
            raise ValueError(
                f"layers must be those of the model, and {sorted(slots.keys() ^ layers.keys())[0]!r} is not"
            )
        for name, (owner, key, _) in slots.items():
            owner._set_child(key, layers[name])
        tree.tie_again(model, tree.ties(self))
        model._adapter_config = self._adapter_config
        model._move(self._backend)
        return model

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Iterate over pairs of name and layer: the layers and adapters that hold parameters."""
        return ((name, layer) for name, (_, _, layer) in self._slots().items())

    # --- computing ---------------------------------------------------------------------------------------------

    def _forward(self, x: Any, run: Run) -> Array:
        run.reads = self.head.reads
        return self.head._forward(self.body._forward(x, run), run)

    def _backward(self, grad: Array, run: Run) -> Array | None:
        below = self.head._backward(grad, run)
        return None if below is None else self.body._backward(below, run)

    def _loss_name(self) -> str:
        if self.task == "embedding":
            return super()._loss_name()
        kind = self._origin.config.get("problem_type")
        if self.task == "causal-lm" or kind in (None, "single_label_classification"):
            return "cross_entropy"
        return "mse" if kind == "regression" else "binary_cross_entropy"

    def _drop_base(self, rng: np.random.Generator | None) -> None:
        for _, block, _ in tree.walk(self):
            if isinstance(block, Block) and block.drops:
                block._rng = None if rng is None else rng.spawn(1)[0]

    # --- what is trained ---------------------------------------------------------------------------------------

    def freeze(self) -> Self:
        """Train nothing but layers that the file lacked; return self. Adapters are frozen too."""
        for name, (_, _, layer) in self._slots().items():
            layer.trainable = name in self._origin.drawn
        self._forget_forward()
        return self

    def unfreeze(self, target: Any = "*") -> Self:
        """Train the layers that `target` names, as in `adapt`, beside what is trained; return self.

        Raises
        ------
        ValueError
            For a pattern that matches no layer.
        """
        slots = self._slots()
        for name in self._named("target", target, list(slots)):
            slots[name][2].trainable = True
        self._forget_forward()
        return self

    def adapt(
        self,
        target: Any,
        adapter: str = DEFAULT_ADAPTER,
        *,
        rank: int,
        lower_rank: bool = False,
        modules_to_save: Any = None,
        seed: int | np.random.Generator | None = None,
        **settings: Any,
    ) -> Self:
        """Wrap the layers that `target` names in new adapters, in place, and return self.

        Parameters
        ----------
        target : str, compiled expression, int, or a list of them
            As in `Sequential.adapt`; a name also means every layer whose dotted name ends with it, as in PEFT
            ("query", "attention.output.dense"), in the spellings of transformers 4 and 5. "all-linear" is every linear
            layer but the head.
        adapter, rank, lower_rank, seed, **settings
            As in `Sequential.adapt`.
        modules_to_save : like `target`, optional
            Layers, or blocks of them, to train as they are, which `target` then does not adapt. A name that matches
            nothing is ignored where another matches. By default the whole head of a classification.

        Raises
        ------
        ValueError
            As `Sequential.adapt`, and for a layer that has no weight to adapt. Nothing is changed then.
        """
        if self._shelf.active and self._shelf.in_tree is None:
            raise ValueError("a sum of adapters is active: make one of them active first, by set_adapter")
        slots = self._slots()
        trained = self._modules_to_save(modules_to_save, slots)
        chosen = [name for name in self._named("target", target, list(slots)) if name not in trained]
        if not chosen:
            raise ValueError(f"target {target!r} names only layers of modules_to_save, which are trained as they are")
        for name in chosen:
            layer = slots[name][2]
            if not isinstance(layer, Adapter) and not layer.adaptable:
                raise ValueError(
                    f"layer {name!r} is a {type(layer).__name__}, which no adapter wraps: leave it out of target"
                )
        saved = [re.compile(re.escape(name)) for name in trained] or None
        super().adapt(chosen, adapter, rank=rank, lower_rank=lower_rank, modules_to_save=saved, seed=seed, **settings)
        for name in trained:  # as in PEFT, what is trained as it is is no other layer's
            owner, key, layer = slots[name]
            if any(parameter.shared for parameter in layer._own_parameters().values()):
                owner._set_child(key, layer.clone())
                self._shelf.plain.setdefault(name, layer)
        self._shelf.begin()
        self._adapter_config = None
        return self

    def _modules_to_save(self, given: Any, slots: Mapping[str, Any]) -> list[str]:
        if given is None:
            heads = self.head.own if isinstance(self.head, Classifier) else ()
            return [name for name in slots if name in heads or name in self._origin.drawn]
        patterns = [given] if isinstance(given, str | re.Pattern) else list(given)
        found = {name for pattern in patterns for name in slots if self._is_part(name, pattern)}
        if patterns and not found:
            raise ValueError(f"modules_to_save {given!r} matches none of the layers {_some(list(slots))}")
        return [name for name in slots if name in found]

    def _is_part(self, name: str, pattern: Any) -> bool:
        """Whether a layer, or a block that holds it, is called so."""
        parts = name.split(".")
        return any(self._is_called(".".join(parts[: count + 1]), pattern) for count in range(len(parts)))

    def _named(self, argument: str, target: Any, names: list[str]) -> list[str]:
        """The layers that a target names, in their order."""
        single = isinstance(target, str | re.Pattern | int) and not isinstance(target, bool)
        patterns = [target] if single else list(target) if isinstance(target, Iterable) else []
        if not patterns:
            raise TypeError(f"{argument} must be a layer's name, a pattern, or a list of them, got {target!r}")
        chosen: set[str] = set()
        for pattern in patterns:
            if isinstance(pattern, int) and not isinstance(pattern, bool):
                found = [names[pattern]] if -len(names) <= pattern < len(names) else []
            elif pattern == ALL_LINEAR:
                found = [name for name in names if self._is_linear(name)]
            elif isinstance(pattern, str | re.Pattern):
                found = [name for name in names if self._is_called(name, pattern)]
            else:
                raise TypeError(f"{argument} must hold strings, compiled expressions or ints, got {pattern!r}")
            if not found:
                shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
                raise ValueError(f"{argument} {shown!r} matches none of the layers {_some(names)}")
            chosen.update(found)
        return [name for name in names if name in chosen]

    def _is_called(self, name: str, pattern: Any) -> bool:
        """Whether a pattern means the layer of this name, in any of its spellings."""
        spellings = {name, self._family.adapter_name(name), name.removeprefix(f"{self._family.prefix}.")}
        if isinstance(pattern, re.Pattern):
            return any(pattern.fullmatch(each) for each in spellings)
        if any(
            each == pattern or each.endswith(f".{pattern}") or fnmatch.fnmatchcase(each, pattern) for each in spellings
        ):
            return True
        try:
            return any(re.fullmatch(pattern, each) for each in spellings)
        except re.error:
            return False

    def _is_linear(self, name: str) -> bool:
        layer = self._slots()[name][2]
        plain = layer.base_layer if isinstance(layer, Adapter) else layer
        return isinstance(plain, FullyConnected | Dense) and name not in self.head.own

    # --- adapters of PEFT --------------------------------------------------------------------------------------

    @property
    def adapter_names(self) -> list[str]:
        """Of all adapters, the active ones first."""
        return self._shelf.names

    @property
    def active_adapters(self) -> dict[str, float]:
        """The adapters that the model computes with, and their weights."""
        return dict(self._shelf.active)

    def load_adapter(self, folder: Any, name: str = DEFAULT) -> Self:
        """Load a PEFT adapter of this base, in place, and return self: its modules become trainable adapters.

        A model can have several, of other layers and ranks. The first is active; `set_adapter` makes others active.

        Parameters
        ----------
        folder : path-like
            With `adapter_config.json` and `adapter_model.safetensors`.
        name : str
            What to call it; one that `adapt` makes is called "default".

        Raises
        ------
        FormatError
            For a broken folder, and an adapter of another base. Nothing is changed then.
        ValueError
            Where there is an adapter of this name, and for a further adapter that changes the base's own layers (DoRA,
            `lora_bias`).
        """
        self._shelf.load(folder, name)
        return self

    def set_adapter(self, name: str | Mapping[str, float]) -> Self:
        """Compute with another adapter, or with a weighted sum of several, and return self.

        y = base(x) + Σ weight s (x A) B, in one step of the layer, whose base is neither copied nor changed. One
        adapter of weight 1 is trained as it was when it was active last; nothing of a sum is trained. What
        `modules_to_save` brings of a layer is in force while its adapter is active.

        Parameters
        ----------
        name : str, or dict of names and weights
            `{"french": 0.7, "medical": 0.3}`.

        Raises
        ------
        ValueError
            For an unknown name, a weight that is not finite, and a sum that there is not: of dense deltas, or of two
            adapters that bring the same layer whole. Nothing is changed then.
        """
        self._shelf.set(name)
        return self

    def delete_adapter(self, name: str) -> Self:
        """Forget an adapter that is not active, and return self.

        Raises
        ------
        ValueError
            For an unknown name, and an active adapter.
        """
        self._shelf.drop(name)
        return self

    def save_adapter(
        self,
        folder: Any,
        *,
        name: str | None = None,
        fold_delta: int | None = None,
        dtype: str | None = None,
        force: bool = False,
    ) -> list[ExportedModule]:
        """Write the adapters, and the layers that are trained as they are, to a folder that PEFT loads on this base.

        Of a model without adapters a head that is trained is written alone.

        What was written is read back, and its outputs are compared with the model's.

        Parameters
        ----------
        folder : path-like
            What nblora wrote there before is replaced.
        name : str, optional
            Which adapter; by default the active one.
        fold_delta : int, optional
            Rank of the best approximation of each dense delta that is appended to the factors. By default deltas are
            left out, with a warning that says the share of the change that is lost; `save` keeps everything.
        dtype : {"float64", "float32", "float16", "bfloat16"}, optional
            Of the numbers; the model's by default.
        force : bool
            Replace a folder that is there already, though nblora did not write it.

        Returns
        -------
        list of ExportedModule

        Raises
        ------
        ValueError
            For a model without adapters, an unknown name, and without a name where a sum of adapters is active.
        FormatError
            For a folder that is someone else's, and where what was read back computes something else.
        """
        before = self.active_adapters
        if name is None and before and self._shelf.in_tree is None:
            raise ValueError(f"a sum of {', '.join(before)} is active: say by name=... which of them to save")
        try:
            if name is not None:
                self.set_adapter(name)
            return saving.save_adapter(self, folder, fold_delta, dtype, force)
        finally:
            if self.active_adapters != before:
                self.set_adapter(before)

    def save_pretrained(self, folder: Any, *, dtype: str | None = None, force: bool = False) -> None:
        """Write the model to a folder that transformers loads, with every other file of the folder that it came from.

        Of a model from a GGUF file these are the tokenizer's.

        Tensors are named as there, and tied ones are written once. What was written is read back, and its outputs are
        compared with the model's.

        Parameters
        ----------
        folder : path-like
            What nblora wrote there before is replaced.
        dtype : {"float64", "float32", "float16", "bfloat16"}, optional
            Of the numbers; the model's by default.
        force : bool
            Replace a folder that is there already, though nblora did not write it.

        Raises
        ------
        ValueError
            For a model with adapters: save what `merge` returns.
        FormatError
            For a folder that is someone else's, and where what was read back computes something else.
        """
        saving.save_pretrained(self, folder, dtype, force)

    def _probe(self) -> Any:
        """A small input, to compare models by."""
        raise NotImplementedError

    def _own_names(self, names: Sequence[str]) -> dict[str, str]:
        """What this model calls the layers and parameters that an adapter's file names."""
        bare, slots = self._family.is_bare(list(names)), self._slots()
        own = {name: self._family.own_name(name, bare) for name in names}
        return {n: other if other in slots or other.rpartition(".")[0] in slots else n for n, other in own.items()}

    def _peft_names(self, names: Sequence[str]) -> dict[str, str]:
        """What PEFT calls these layers."""
        called = {name: self._family.adapter_name(name) for name in names}
        if self.task != "embedding":
            return called
        return {name: other.removeprefix(f"{self._family.prefix}.") for name, other in called.items()}

    def to_onnx(self, path: Any) -> None:
        """Not there for whole models: their folders are what other tools read.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(
            "a pretrained model has no ONNX graph in nblora: write merge().save_pretrained(folder), which exporters of "
            "transformers' models read; its layers have to_onnx"
        )

    # --- describing and keeping --------------------------------------------------------------------------------

    def merge(self) -> Self:
        def merged(layer: Layer) -> Layer:
            return layer.merge_to_original_layer() if isinstance(layer, Adapter) else layer.clone()

        ties, origin = tree.ties(self), self._origin
        if self.task == "causal-lm" and (not ties or any(".base." in name for pair in ties.items() for name in pair)):
            # A head that was merged, or trained as it is, and the table are one no more.
            origin = replace(origin, config=origin.config | {"tie_word_embeddings": False})
        model = self._with({name: merged(layer) for name, layer in self.named_layers()}, origin)
        model._adapter_config = None
        model._set_mode(self.training)
        return model

    def diagnostics(self) -> dict[str, Any]:
        described = {name: layer.diagnostics() for name, layer in self.named_layers()}
        result = describe_sizes(self) | {
            "model_type": self.model_type,
            "task": self.task,
            "layer_count": len(described),
            "non_finite_count": sum(figures["non_finite_count"] for figures in described.values()),
        }
        for name, figures in described.items():
            result.update({f"{name}.{key}": value for key, value in figures.items()})
        return result

    def close(self) -> None:
        """Close every layer, then the model."""
        if not self._closed:
            for _, layer in list(self.named_layers()):
                layer.close()
        Layer.close(self)

    def _config(self) -> dict[str, Any]:
        layers = [
            {"name": name, "kind": type(layer).__name__, "config": layer._config()}
            for name, layer in self.named_layers()
        ]
        turned = tree.turned(self)
        tied = {name: [first, (name in turned) != (first in turned)] for name, first in tree.ties(self).items()}
        held = {"origin": self._origin.as_dict(), "dtype": self.dtype.name, "layers": layers, "training": self.training}
        return {**held, "tied": tied, "adapter_config": self._adapter_config, "adapters": self._shelf.config()}

    def _tensors(self) -> dict[str, np.ndarray]:
        return super()._tensors() | self._shelf.tensors()

    @classmethod
    def _from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        origin = Origin.from_dict(config["origin"])
        tied = config["tied"]
        held = dict(tensors) | {
            n: tensors[first].T if turned else tensors[first] for n, (first, turned) in tied.items()
        }
        own: dict[str, dict[str, np.ndarray]] = {entry["name"]: {} for entry in config["layers"]}
        for name, tensor in held.items():
            owner = name
            while owner and owner not in own:
                owner = owner.rpartition(".")[0]
            if owner:
                own[owner][name.removeprefix(f"{owner}.")] = tensor
        layers = {
            entry["name"]: layer_from_state(entry["kind"], entry["config"], own[entry["name"]])
            for entry in config["layers"]
        }
        model = cls(origin, Source(checks.check_dtype(config["dtype"]), origin.names))._with(layers)
        tree.tie_again(model, {name: first for name, (first, _) in tied.items()})
        model._adapter_config = config["adapter_config"]
        model._training = checks.check_flag("training", config["training"])
        for _, layer, _ in tree.walk(model):
            if isinstance(layer, Block):
                layer._training = model._training
        model._shelf.restore(config["adapters"], tensors)
        return model

    def __repr__(self) -> str:
        if self._closed:
            return f"{type(self).__name__}(closed)"
        adapters = sum(isinstance(layer, Adapter) for _, layer in self.named_layers())
        count = sum(int(np.prod(named.shape)) for named in self._parameters() if not named.parameter.state)
        adapted = f", {adapters} adapters" if adapters else ""
        return f"{type(self).__name__}({self.model_type!r}, {self.task!r}, {count:,d} parameters{adapted})"


def _head(body: Any, config: Config, source: Source, origin: Origin) -> Head:
    """The head of a task."""
    family = FAMILIES[origin.model_type]
    if origin.task == "causal-lm":
        table, tied = body.table, config.flag("tie_word_embeddings", family.tied)
        if tied:
            head = FullyConnected(np.empty_like(table.weight))
            head._tie(table)
            return LanguageHead(head)
        return LanguageHead(source.linear("lm_head", table.out_features, table.in_features, bias=False))
    if origin.task == "embedding":
        return Pooled(body, origin.pooling.rows, origin.pooling.normalised, family.idle(config, source))
    layers = family.classifier(config, source, origin.labels)
    return Classifier(layers, family.place, family.head, family.dropouts(config))


def _some(names: list[str]) -> str:
    """Names for a message, of which a model has many."""
    shown = ", ".join(map(repr, names[:12]))
    return shown if len(names) <= 12 else f"{shown}, ... ({len(names)} in all; model.parameter_names() lists them)"
