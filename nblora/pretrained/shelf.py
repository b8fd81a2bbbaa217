"""`Shelf`: several adapters of one model, of which the tree holds the one that is active, or a weighted sum of some."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nblora import checks
from nblora.adapters import Adapter, LoRAAdapter
from nblora.formats import load_peft
from nblora.formats.peft import PeftAdapter
from nblora.layers import Layer
from nblora.layers.base import _kind, layer_from_state

if TYPE_CHECKING:
    from .model import PretrainedModel

DEFAULT = "default"
_ALONE = (
    "changes base layers themselves (lora_bias, or a base that is trained), so that its model can have no other "
    "adapter: load it into a model of its own"
)
_TENSORS = "adapter.:"  # that no parameter's name begins with: layers' names have no colon


class Held(NamedTuple):
    """An adapter that is not active.

    Attributes
    ----------
    layers : dict
        By their names the layers that it puts into the tree, adapters and whole ones, and whether they are trained.
    config : dict or None
        The `adapter_config.json` that it came with.
    """

    layers: dict[str, tuple[Layer, bool]]
    config: dict[str, Any] | None


class Shelf:
    """The adapters of a model by name.

    Layers of the base are in no adapter's possession: all are put around the same ones. What a sum computes with are
    the factors of its adapters side by side, x [A1 A2] [w1 s1 B1; w2 s2 B2], one low-rank step.

    Parameters
    ----------
    model : PretrainedModel

    Attributes
    ----------
    active : dict
        The active adapters and their weights; one of weight 1 lies in the tree itself, and is not held here.
    plain : dict
        Layers as they were before an adapter brought whole ones in their place.
    alone : bool
        Whether the active adapter came with base layers of its own.
    """

    def __init__(self, model: "PretrainedModel") -> None:
        self._model = model
        self._held: dict[str, Held] = {}
        self.active: dict[str, float] = {}
        self.plain: dict[str, Layer] = {}
        self.alone = False

    @property
    def names(self) -> list[str]:
        """Of all adapters, the active ones first."""
        return list(dict.fromkeys([*self.active, *self._held]))

    @property
    def in_tree(self) -> str | None:
        """The adapter that lies in the tree, as it is when it is trained."""
        return next(iter(self.active), None) if list(self.active.values()) == [1.0] else None

    def begin(self) -> None:
        """Note that layers of the tree were adapted."""
        if not self.active:
            self.active = {DEFAULT: 1.0}

    def load(self, folder: Any, name: str) -> None:
        """Load a PEFT adapter; it is active where none is."""
        checks.check_name("name", name)
        self._check_alone()
        if name in self.names:
            raise ValueError(
                f"the model has an adapter already that is called {name!r}: load this one by another name=..., or into "
                "what model.merge() returns"
            )
        before, base = self._tree(), self._base()
        self._put({slot: (layer, False) for slot, layer in base.items()})
        try:
            load_peft(folder, self._model)
            with PeftAdapter(folder) as opened:
                raw = dict(opened.config.raw)
            loaded = self._tree()
            adapters = {slot: layer for slot, (layer, _) in loaded.items() if isinstance(layer, Adapter)}
            alone = any(layer.base_layer is not base[slot] for slot, layer in adapters.items())
            if alone and self.active:
                raise ValueError(f"the adapter in {folder} {_ALONE}")
        except BaseException:
            self._put(before)
            raise
        new = {slot: (layer, on) for slot, (layer, on) in loaded.items() if layer is not base[slot]}
        for slot, (layer, _) in new.items():
            if not isinstance(layer, Adapter):
                self.plain.setdefault(slot, base[slot])
        if not self.active:
            self.active, self.alone, self._model._adapter_config = {name: 1.0}, alone, raw
        else:
            self._held[name] = Held(new, raw)
            self._put(before)

    def set(self, chosen: Any) -> None:
        """Make an adapter active, or a sum of several."""
        weights = self._weights(chosen)
        if any(isinstance(layer, Adapter) and not layer._enabled for layer, _ in self._tree().values()):
            raise RuntimeError("set_adapter inside of disable_adapter(): leave its block first")
        if weights == self.active:
            return
        self._check_alone()
        held = self._held | self._lying()
        base = self._base()
        single = next(iter(weights)) if list(weights.values()) == [1.0] else None
        layers = held[single].layers if single is not None else _joined({n: held[n] for n in weights}, weights, base)
        self._put({slot: (layer, False) for slot, layer in base.items()} | layers)
        self.active = weights
        self._held = {name: one for name, one in held.items() if name != single}
        self._model._adapter_config = None if single is None else held[single].config

    def drop(self, name: str) -> None:
        """Forget an adapter that is not active."""
        self._weights(name)
        if name in self.active:
            raise ValueError(f"the adapter {name!r} is active: make another active before, by set_adapter")
        del self._held[name]

    def _weights(self, chosen: Any) -> dict[str, float]:
        if not isinstance(chosen, str | Mapping):
            raise TypeError(f"name must be an adapter's name, or a dict of names and weights, got {chosen!r}")
        weights = {chosen: 1.0} if isinstance(chosen, str) else dict(chosen)
        if not weights:
            raise ValueError("name must name at least one adapter: disable_adapter() computes without any")
        for name, weight in weights.items():
            if name not in self.names:
                known = ", ".join(map(repr, self.names)) or "none"
                raise ValueError(f"there is no adapter {name!r}; the model has {known}")
            weights[name] = checks.check_number(f"the weight of adapter {name!r}", weight)
            if not math.isfinite(weights[name]):
                raise ValueError(f"the weight of adapter {name!r} must be finite, got {weight}")
        return weights

    # --- the tree ----------------------------------------------------------------------------------------------

    def _tree(self) -> dict[str, tuple[Layer, bool]]:
        return {name: (layer, layer.trainable) for name, (_, _, layer) in self._model._slots().items()}

    def _base(self) -> dict[str, Layer]:
        """Every layer as it is below all adapters."""
        found = {}
        for name, (_, _, layer) in self._model._slots().items():
            found[name] = self.plain.get(name, layer.base_layer if isinstance(layer, Adapter) else layer)
        return found

    def _lying(self) -> dict[str, Held]:
        """The adapter in the tree."""
        if self.in_tree is None:
            return {}
        base = self._base()
        layers = {n: (layer, on) for n, (layer, on) in self._tree().items() if on or layer is not base[n]}
        return {self.in_tree: Held(layers, self._model._adapter_config)}

    def _check_alone(self) -> None:
        """ValueError where the adapter in the tree changes base layers."""
        layers = (layer for layer, _ in self._tree().values())
        if self.alone or any(isinstance(layer, Adapter) and not layer.is_base_layer_frozen for layer in layers):
            raise ValueError(f"the adapter {self.in_tree!r} {_ALONE}")

    def _put(self, layers: Mapping[str, tuple[Layer, bool]]) -> None:
        """Put layers into the tree, and set what is trained."""
        model = self._model
        model._forget_forward()
        for name, (owner, key, layer) in model._slots().items():
            new, trained = layers[name]
            if new is not layer:
                new._move(model._backend)
                new._set_mode(model.training)
                owner._set_child(key, new)
            new.trainable = trained
        model._forget_forward()

    # --- files -------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """What a file says of it."""
        base = self._base()
        held = []
        for name, adapter, peft in self._all():
            entries = []
            for slot, (layer, trained) in adapter.items():
                config = layer._config()
                if isinstance(layer, Adapter):
                    config = {key: value for key, value in config.items() if key != "base"}
                shared = bool(name) and layer is base[slot]
                entries.append({
                    "name": slot, "kind": type(layer).__name__, "trained": trained, "shared": shared,
                    "config": {} if shared else config,
                })  # fmt: skip
            held.append({"name": name, "layers": entries, "config": peft})
        return {"active": self.active, "held": held, "alone": self.alone}

    def tensors(self) -> dict[str, np.ndarray]:
        """Copies of what is not in the tree, by names that no parameter has."""
        base, found = self._base(), {}
        for name, adapter, _ in self._all():
            for slot, (layer, _) in adapter.items():
                if layer is not base[slot] or not name:
                    found.update({f"{_TENSORS}{name}.{slot}.{n}": array for n, array in _own_tensors(layer).items()})
        return found

    def restore(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        """Take the state of a file, the tree's layers being there already."""
        names = {checks.check_name("name", entry["name"]) for entry in config["held"] if entry["name"]}
        for entry in sorted(config["held"], key=lambda entry: entry["name"] != ""):  # what others lie around, first
            layers = {}
            base = self._base()
            for one in entry["layers"]:
                slot, prefix = one["name"], f"{_TENSORS}{entry['name']}.{one['name']}."
                own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                if one["shared"] and entry["name"]:
                    layer = base[slot]
                elif not own:
                    break  # in the checkpoint of a run, which holds what was trained
                elif "rank" in one["config"]:
                    layer = _adapter_class(one["kind"])._on_base(base[slot], one["config"], own)
                else:
                    layer = layer_from_state(one["kind"], one["config"], own)
                layers[slot] = layer, checks.check_flag("trained", one["trained"])
            else:
                if entry["name"]:
                    self._held[entry["name"]] = Held(layers, entry["config"])
                else:
                    self.plain = {slot: layer for slot, (layer, _) in layers.items()}
        self.alone = checks.check_flag("alone", config["alone"])
        self.active = {
            checks.check_name("name", name): checks.check_number("weight", weight)
            for name, weight in config["active"].items()
        }
        if self.in_tree is None and not names >= set(self.active):
            raise ValueError("the active adapters are not those of the file")
        if self.active and self.in_tree is None:
            for layer, _ in self._tree().values():
                layer.trainable = False

    def _all(self) -> Iterator[tuple[str, dict[str, tuple[Layer, bool]], dict[str, Any] | None]]:
        """What is not in the tree: plain layers under an empty name, and every adapter that is held."""
        if self.plain:
            yield "", {slot: (layer, False) for slot, layer in self.plain.items()}, None
        for name, held in self._held.items():
            yield name, held.layers, held.config


def _own_tensors(layer: Layer) -> dict[str, np.ndarray]:
    """Copies of its parameters, of an adapter without those of its base."""
    if not isinstance(layer, Adapter):
        return layer._tensors()
    own = (named for named in layer._parameters() if not named.name.startswith("base."))
    return {named.name: layer._logical_copy(named.parameter) for named in own}


def _adapter_class(kind: str) -> type[Adapter]:
    found = _kind(kind)
    if not issubclass(found, Adapter):
        raise ValueError(f"{kind} is no adapter")
    return found


def _joined(
    held: Mapping[str, Held], weights: Mapping[str, float], base: Mapping[str, Layer]
) -> dict[str, tuple[Layer, bool]]:
    """One adapter in the place of several, for each layer; nothing of it is trained."""
    found: dict[str, tuple[Layer, bool]] = {}
    for slot, plain in base.items():
        there = {name: one.layers[slot][0] for name, one in held.items() if slot in one.layers}
        whole = [name for name, layer in there.items() if not isinstance(layer, Adapter)]
        factors = {name: layer.as_factors() for name, layer in there.items() if isinstance(layer, Adapter)}
        more = [name for name, held in factors.items() if held.dense_error or held.magnitude is not None]
        if more:
            what = "a magnitude" if factors[more[0]].magnitude is not None else "a dense delta"
            raise ValueError(
                f"the adapter {more[0]!r} has more than low-rank factors at {slot!r}, {what}: it can be active alone, "
                "with weight 1, and not in a sum"
            )
        if whole and len(there) > 1:
            raise ValueError(
                f"the adapters {', '.join(there)} each bring their own {slot!r}, and at least one brings it whole: "
                "there is no sum of them"
            )
        if whole:
            found[slot] = there[whole[0]], False
        elif there:
            A = np.concatenate([held.A.astype(plain.dtype) for held in factors.values()], axis=1)
            scaled = [
                held.B.astype(plain.dtype) * plain.dtype.type(weights[name] * held.scaling)
                for name, held in factors.items()
            ]
            found[slot] = LoRAAdapter.from_factors(plain, A, np.concatenate(scaled)), False
    return found
