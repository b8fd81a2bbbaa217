"""What the outputs of a classification are called: `id2label` and `label2id` of `config.json`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nblora import checks

from .model import PretrainedModel


def labels_of(model: PretrainedModel) -> list[str]:
    """The names of a classification's outputs, in their order, "LABEL_0" and so on where `config.json` has none."""
    named = model.config.get("id2label")
    held = named if isinstance(named, dict) else {}
    return [str(held.get(str(place), f"LABEL_{place}")) for place in range(model.out_features)]


def name_labels(model: PretrainedModel, names: Sequence[str]) -> None:
    """Have a classification's outputs called so, in `config` and in every file that is written of it.

    Raises
    ------
    ValueError
        For another number of names than outputs.
    """
    checks.check_integer("the number of names", len(names), model.out_features, model.out_features)
    model._origin = replace(model._origin, config=with_names(model.config, names))


def with_names(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A configuration that calls its labels so."""
    rest = {name: value for name, value in config.items() if name != "num_labels"}
    id2label = {str(place): name for place, name in enumerate(names)}
    return rest | {"id2label": id2label, "label2id": {name: place for place, name in enumerate(names)}}
