"""`adapter_model.safetensors` of PEFT: its tensor names sorted into modules, checked against the configuration."""

import re
from dataclasses import dataclass, field

from nblora.adapters import ADAPTERS
from nblora.errors import FormatError
from nblora.formats.peft_config import PeftConfig
from nblora.storage.dtypes import FLOATS
from nblora.storage.safetensors_reader import SafetensorsFile, TensorInfo

TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_OWN = {suffix for cls in ADAPTERS.values() for suffix in cls.peft_parts}
"""Tensors of methods whose first factor no file holds, (rank, out)."""
_PARTS |= dict.fromkeys(_OWN, "block")
_SUFFIX = re.compile(rf"(?:(.*)\.)?({'|'.join(re.escape(part) for part in _PARTS)})")

_WRAPPERS = re.compile(r"(^|\.)(?:base_layer|modules_to_save(?:\.default)?)\.")
_ORIGINAL = re.compile(r"(^|\.)original_module\.")
"""Parts of names that PEFT's wrappers add. With `bias="all"` a bias of `modules_to_save` is saved three times: as its
own, as the wrapper's, and as the original module's, which the merged model does not have."""


@dataclass
class LoraModule:
    """One adapted layer of an adapter.

    Attributes
    ----------
    name : str
        The layer's name in the base model.
    kind : str
        "linear" (A (r, in), B (out, r); GPT-2's Conv1D too), "embedding" (A (r, rows), B (dim, r)) or
        "conv" (A (r, in, k...), B (out, r, 1...)).
    A, B : TensorInfo
        Both the one of a method with a single matrix, (rank, out), whose other factor follows from the layer's size.
    bias : TensorInfo or None
        Of `lora_B`, (out,).
    magnitude : TensorInfo or None
        DoRA's m, one number an output.
    rank : int
    alpha, scaling : float
    groups : int
        Groups of an adapted convolution.
    """

    name: str
    kind: str
    A: TensorInfo
    B: TensorInfo
    bias: TensorInfo | None
    magnitude: TensorInfo | None
    rank: int
    alpha: float
    scaling: float
    groups: int = 1
    single: bool = False
    inputs: int | None = None

    @property
    def out_features(self) -> int:
        """Outputs of the layer (the dimension of an embedding)."""
        return self.B.shape[1 if self.single else 0]

    @property
    def in_features(self) -> int:
        """Inputs of the layer, a convolution's kernel included (the rows of an embedding); `inputs`, once they are
        known, of a method with a single matrix."""
        if not self.single:
            return self.A.size // self.rank
        assert self.inputs is not None  # nobody asks before the layer is known
        return self.inputs


@dataclass
class SortedTensors:
    """The tensors of an adapter: modules by name, and whole tensors by the name of the parameter they replace."""

    modules: dict[str, LoraModule] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)


def sort_tensors(file: SafetensorsFile, config: PeftConfig) -> SortedTensors:
    """Sort an adapter's tensors by what they are for and check them against its configuration.

    Parameters
    ----------
    file : SafetensorsFile
    config : PeftConfig

    Returns
    -------
    SortedTensors

    Raises
    ------
    FormatError
        If a tensor is missing, unknown, of a dtype or shape that cannot be, or contradicts the configuration.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    superseded: dict[str, str] = {}
    embeddings: set[str] = set()
    result = SortedTensors()
    for name, info in file.tensors.items():
        if info.dtype not in FLOATS:
            raise FormatError(f"{file.path}: {name} is {info.dtype}; adapters hold F64, F32, F16 or BF16")
        short = name.removeprefix(PREFIX)
        match = _SUFFIX.fullmatch(short)
        if match is None:
            parameter = _ORIGINAL.sub(r"\1", short)
            if parameter != short:
                superseded[parameter] = name
            else:
                _sort_replaced(file, config, result, name, short, info)
            continue
        module, part = match[1] or "", _PARTS[match[2]]
        if part in parts.setdefault(module, {}):
            raise FormatError(f"{file.path}: {name} occurs a second time under another name")
        parts[module][part] = info
        if "embedding" in match[2]:
            embeddings.add(module)
    for module, found in parts.items():
        result.modules[module] = _module(file, config, module, found, module in embeddings)
    if parts and not config.targets(parts):
        raise FormatError(
            f"{config.path}: target_modules is {config.raw['target_modules']!r}, which names none of the modules that "
            f"{file.path.name} holds factors for ({', '.join(list(parts)[:3])}, ...)"
        )
    for parameter, name in superseded.items():
        if parameter not in result.replaced:
            raise FormatError(f"{file.path}: {name} is what modules_to_save replaces, but nothing replaces {parameter}")
    if not file.tensors:
        raise FormatError(f"{file.path}: holds no tensors")
    return result


def _sort_replaced(
    file: SafetensorsFile, config: PeftConfig, result: SortedTensors, name: str, short: str, info: TensorInfo
) -> None:
    parameter = _WRAPPERS.sub(r"\1", short)
    unknown = {part for part in parameter.split(".") if re.fullmatch("lora_[A-Za-z_]+", part)}
    if unknown - set(config.modules_to_save):
        raise FormatError(f"{file.path}: {name} is not a tensor of a LoRA adapter that nblora knows")
    known = result.replaced.get(parameter)
    if known and (known.dtype != info.dtype or file.read(known.name).tobytes() != file.read(name).tobytes()):
        raise FormatError(f"{file.path}: {name} and {known.name} replace {parameter} by different numbers")
    result.replaced.setdefault(parameter, info)


def _module(
    file: SafetensorsFile, config: PeftConfig, name: str, found: dict[str, TensorInfo], embedding: bool
) -> LoraModule:
    def fault(text: str) -> FormatError:
        return FormatError(f"{file.path}: module {name!r}: {text}")

    if block := found.get("block"):
        if len(found) > 1 or len(block.shape) != 2 or 0 in block.shape or block.shape[0] != config.module_rank(name):
            raise fault(f"its tensor has shape {block.shape}; expected rank {config.module_rank(name)} and outputs")
        rank = block.shape[0]
        return LoraModule(name, "linear", block, block, None, None, rank, float(rank), 1.0, single=True)
    for part in ("A", "B"):
        if part not in found:
            raise fault(f"lora_{part} is missing")
    A, B, bias, magnitude = found["A"], found["B"], found.get("bias"), found.get("magnitude")
    if len(A.shape) < 2 or len(A.shape) != len(B.shape) or 0 in A.shape + B.shape:
        raise fault(f"lora_A has shape {A.shape} and lora_B {B.shape}; they are no factors of a weight")
    kind = "embedding" if embedding else "linear" if len(A.shape) == 2 else "conv"
    rank = A.shape[0]
    groups = rank // B.shape[1] if kind == "conv" and rank % B.shape[1] == 0 else 1
    if B.shape[1] * groups != rank or any(size != 1 for size in B.shape[2:]):
        raise fault(f"lora_A has shape {A.shape} and lora_B {B.shape}; their ranks differ")
    if rank != config.module_rank(name):
        raise fault(f"its tensors have rank {rank}, but {config.path.name} says {config.module_rank(name)}")
    if config.lora_bias and bias is None and kind != "embedding":
        raise fault("lora_bias is set, but lora_B.bias is missing")
    if config.use_dora and magnitude is None:
        raise fault("use_dora is set, but lora_magnitude_vector is missing")
    for switch, is_on, part, info in (
        ("lora_bias", config.lora_bias, "lora_B.bias", bias),
        ("use_dora", config.use_dora, "lora_magnitude_vector", magnitude),
    ):
        if info is not None and not is_on:
            raise fault(f"{part} is there, but {switch} is not set")
        if info is not None and (info.size != B.shape[0] or max(info.shape) != B.shape[0]):
            raise fault(f"{part} has shape {info.shape}; expected {B.shape[0]} numbers")
    return LoraModule(name, kind, A, B, bias, magnitude, rank, config.module_alpha(name), config.scaling(name), groups)
