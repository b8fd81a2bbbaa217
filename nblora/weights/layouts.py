"""Which way round a layer stores its weight: (out, in) as Linear does, or (in, out) as GPT-2's Conv1D does."""

from collections.abc import Mapping
from dataclasses import replace

from nblora.errors import FormatError
from nblora.formats.model_files import ModelFiles
from nblora.formats.peft_config import PeftConfig
from nblora.formats.peft_tensors import LoraModule

CONV1D_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""The names of Conv1D layers, and the model types of `config.json` whose layers of these names they are."""


class Layouts:
    """Finds out which of an adapter's linear layers are stored transposed.

    The shape tells, except for a square weight. PEFT's `fan_in_fan_out` is one flag for all layers (the last one it
    replaced set it), so where other layers of the adapter contradict it, a square layer goes by the model's type or by
    its namesakes.
    """

    def __init__(self, model: ModelFiles, config: PeftConfig, warnings: list[str]) -> None:
        self._model, self._config, self._warnings = model, config, warnings

    def resolve(
        self, label: str, modules: Mapping[str, LoraModule], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, bool]:
        """Return for every parameter whether it is stored (in, out), after checking its shape.

        Parameters
        ----------
        label : str
            The adapter, for messages.
        modules : mapping of str to LoraModule
            By the name of their weight in the checkpoint.
        shapes : mapping of str to tuple of int
            The stored weights' shapes, by the same names.

        Raises
        ------
        FormatError
            If a factor does not fit the weight, or a convolution is grouped.
        """
        known = {name: _by_shape(label, name, module, shapes[name]) for name, module in modules.items()}
        proven = {name: way for name, way in known.items() if way is not None and modules[name].kind == "linear"}
        flag = self._config.fan_in_fan_out
        against = [name for name, way in proven.items() if way != flag]
        if against:
            self._warnings.append(
                f"{label}: fan_in_fan_out is {str(flag).lower()}, but {', '.join(against[:3])} "
                f"{'and others are' if len(against) > 3 else 'is'} stored the other way round; the shapes decide"
            )
        return {
            name: self._square(label, name, proven, bool(against)) if way is None else way
            for name, way in known.items()
        }

    def _square(self, label: str, name: str, proven: Mapping[str, bool], contradicted: bool) -> bool:
        leaf = _leaf(name)
        if self._model.config.get("model_type") in CONV1D_MODELS:
            return leaf in CONV1D_LEAVES
        if not contradicted:
            return self._config.fan_in_fan_out
        namesakes = {way for other, way in proven.items() if _leaf(other) == leaf}
        if len(namesakes) == 1:
            return namesakes.pop()
        raise FormatError(
            f"{label}: {name} is square, and fan_in_fan_out contradicts other layers of the adapter, so it is unclear "
            "which way round it is stored; put the model's config.json beside its weights"
        )


def _leaf(name: str) -> str:
    return name.split(".")[-2] if "." in name else name


def _by_shape(label: str, name: str, module: LoraModule, shape: tuple[int, ...]) -> bool | None:
    """Whether the weight is stored (in, out); None where a square one could be either."""
    if module.kind == "embedding":
        if shape != (module.in_features, module.out_features):
            raise _misfit(label, name, module, shape, (module.in_features, module.out_features))
        return False
    if module.kind == "conv":
        expected = (module.out_features, *module.A.shape[1:])
        groups = module.A.shape[1] // shape[1] if len(shape) == len(expected) and shape[1] else 1
        if module.groups > 1 or (groups > 1 and shape == (expected[0], expected[1] // groups, *expected[2:])):
            raise FormatError(
                f"{label}: {name} belongs to a grouped convolution (groups={max(groups, module.groups)}); its adapter "
                "is no change of the weight and cannot be merged (PEFT cannot either)"
            )
        if shape != expected:
            raise _misfit(label, name, module, shape, expected)
        return False
    if module.single and len(shape) == 2:  # whatever its inputs are
        module = replace(module, inputs=shape[1] if shape[0] == module.out_features else shape[0])
    elif module.single:
        module = replace(module, inputs=1)
    expected = (module.out_features, module.in_features)
    if shape not in (expected, expected[::-1]):
        raise _misfit(label, name, module, shape, expected)
    return None if expected[0] == expected[1] else shape != expected


def _misfit(
    label: str, name: str, module: LoraModule, shape: tuple[int, ...], expected: tuple[int, ...]
) -> FormatError:
    return FormatError(
        f"{label}: {name} has shape {shape}, but lora_A {module.A.shape} and lora_B {module.B.shape} of {module.name} "
        f"change a weight of shape {expected}; is the adapter made for this base?"
    )
