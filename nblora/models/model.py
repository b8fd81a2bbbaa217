"""`Model`: what every model does with its tree: adapting, merging, disabling, counting."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, cast

import numpy as np

from nblora import checks
from nblora.adapters import ADAPTERS, DEFAULT_ADAPTER, Adapter
from nblora.layers import Layer, tree
from nblora.layers.diagnostics import describe_sizes

from .targets import match_names


class Model(Layer, abstract=True):
    """A tree whose layers can be adapted by name."""

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

        As in PEFT, every other layer is frozen, but for those that `modules_to_save` names (a new head, say).

        Parameters
        ----------
        target : str, compiled expression, int, or a list of them
            Names (dotted inside nested models), fnmatch patterns (`"hidden*"`), regular expressions that match whole
            names, or places.
        adapter : str
            Which method, by its name in `nblora.adapters.ADAPTERS`.
        rank : int
            Of every new adapter.
        lower_rank : bool
            Give a layer that is too small for `rank` the largest that it can have, with a warning that names it. By
            default that is an error.
        modules_to_save : like `target`, optional
            Layers to train as they are.
        seed : int or Generator, optional
            Each adapter draws from its own child of it.
        **settings
            The adapter's other arguments: `alpha`, `delta_scaling`, `momentum_factor`, `lora_dropout`, ...

        Raises
        ------
        ValueError
            For a pattern that matches no layer (the message lists the names), for a layer that is adapted already,
            and for one that is too small for `rank`. Nothing is changed then.
        """
        kind = ADAPTERS[checks.check_choice("adapter", adapter, tuple(ADAPTERS))]
        slots = {name: (owner, key, owner.children()[key]) for name, owner, key in tree.slots(self, Adapter)}
        names = list(slots)
        chosen = match_names("target", target, names)
        trained = [] if modules_to_save is None else match_names("modules_to_save", modules_to_save, names)
        both = sorted(set(chosen) & set(trained))
        if both:
            raise ValueError(f"target and modules_to_save both name {', '.join(both)}: a layer is one or the other")
        _check_plain({name: slots[name][2] for name in (*chosen, *trained)})
        children = np.random.default_rng(seed).spawn(len(chosen))
        new: dict[str, Layer] = {}
        for name, child in zip(chosen, children, strict=True):
            layer = slots[name][2]
            new[name] = kind(layer, _rank_of(name, layer, rank, lower_rank), seed=child, **settings)
            new[name]._set_mode(self.training)
        for name, (owner, key, layer) in slots.items():
            if name in new:
                owner._set_child(key, new[name])
            elif not isinstance(layer, Adapter):
                layer.trainable = name in trained
        return self

    def merge(self) -> Self:
        """Return a plain model, with every adapter merged into a new layer; it shares no memory with this one."""
        merged = tree.rebuilt(self, Adapter, lambda adapter: adapter.merge_to_original_layer())
        tree.tie_again(merged, tree.ties(self))
        return cast(Self, merged)

    def _own_names(self, names: Sequence[str]) -> dict[str, str]:
        """What this model calls the layers and parameters that an adapter's file names so."""
        return {name: name for name in names}

    def _peft_names(self, names: Sequence[str]) -> dict[str, str]:
        """What PEFT calls the layers of these names."""
        return {name: name for name in names}

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Self]:
        """Compute the base layers alone inside the `with` block."""
        with contextlib.ExitStack() as stack:
            for _, layer, _ in tree.walk(self):
                if isinstance(layer, Adapter):
                    stack.enter_context(layer.disable_adapter())
            yield self

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all, and their share, as PEFT does.

        A dense delta counts among both, so a share above 50 % is possible.
        """
        trainable = self.parameter_count
        total = sum(int(np.prod(named.shape)) for named in self._parameters() if not named.parameter.state)
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def diagnostics(self) -> dict[str, Any]:
        """Return a flat dict: the model's sizes and counts, then each layer's figures under its name."""
        described = {name: layer.diagnostics() for name, layer in self.children().items()}
        result = describe_sizes(self) | {
            "layer_count": len(described),
            "non_finite_count": sum(figures["non_finite_count"] for figures in described.values()),
        }
        for name, figures in described.items():
            result.update({f"{name}.{key}": value for key, value in figures.items()})
        return result

    def close(self) -> None:
        """Close every layer, then the model."""
        if not self._closed:
            for layer in self.children().values():
                layer.close()
        super().close()


def _check_plain(layers: Mapping[str, Layer]) -> None:
    """ValueError where an adapter is among the layers to adapt, or to train as they are."""
    for name, layer in layers.items():
        if isinstance(layer, Adapter):
            raise ValueError(
                f"layer {name!r} has an adapter already, a {type(layer).__name__} of rank {layer.rank}: train that one "
                "on, name other layers, or adapt what model.merge() returns, where it is part of the weight"
            )


def _rank_of(name: str, layer: Layer, rank: int, lower: bool) -> int:
    """`rank`, or the largest that a small layer can have, where `lower` allows it."""
    largest = min(layer.in_features, layer.out_features)
    small = f"layer {name!r} maps {layer.in_features} to {layer.out_features} features"
    if not checks.check_flag("lower_rank", lower):
        remedy = f"{small}; take a lower rank, leave that layer out of target, or pass lower_rank=True"
        return checks.check_integer("rank", rank, 1, largest, remedy)
    asked = checks.check_integer("rank", rank, 1)
    if asked > largest:
        warnings.warn(f"{small}, so its adapter has rank {largest} instead of {asked}", UserWarning, stacklevel=3)
    return min(asked, largest)
