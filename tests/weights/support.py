"""Checkpoints and adapters for the tests, written without nblora, and the formulas of a merge in plain NumPy."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

FIXTURES = Path(__file__).parent.parent / "data" / "peft"
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
SPELLED = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
DIGITS = {"F16": 10, "BF16": 7, "F32": 23}
SMALLEST = {"F16": -24, "BF16": -133, "F32": -149}


def write_file(path, tensors, metadata=None):
    """A safetensors file from arrays, in the order given."""
    header, at, blobs = ({"__metadata__": metadata} if metadata else {}), 0, []
    for name, array in tensors.items():
        blob = np.ascontiguousarray(array).tobytes()
        dtype = SPELLED[np.asarray(array).dtype]
        header[name] = {"dtype": dtype, "shape": list(np.shape(array)), "data_offsets": [at, at + len(blob)]}
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def read_header(path):
    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def read_file(path):
    """Every array of a safetensors file, 16-bit types included."""
    header, data = read_header(path)
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def read_model(path):
    """Every array of a checkpoint: a file, or the safetensors files of a folder."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: array for file in files for name, array in read_file(file).items()}


def write_adapter(folder, tensors, **config):
    """A PEFT adapter; tensor names without the `base_model.model.` that PEFT puts before them."""
    write_file(Path(folder) / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in tensors.items()})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
    return Path(folder)


def linear_factors(rng, name, out, inputs, rank=4, dtype=np.float32, scale=0.5):
    """lora_A and lora_B of a linear layer."""
    A, B = rng.standard_normal((rank, inputs)) * scale, rng.standard_normal((out, rank)) * scale
    return {f"{name}.lora_A.weight": A.astype(dtype), f"{name}.lora_B.weight": B.astype(dtype)}


def exact_change(tensors, name, scaling):
    """s·B·A of a linear layer in float64."""
    A, B = (np.asarray(tensors[f"{name}.lora_{x}.weight"], np.float64) for x in "AB")
    return scaling * B @ A


def spacing(values, dtype):
    """The distance between numbers of a 16-bit or float32 type around values, float64."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(np.asarray(values, np.float64))))
    return 2.0 ** np.maximum(exponent - DIGITS[dtype], SMALLEST[dtype])


def snapshot(*paths):
    """The bytes of every file below the paths."""
    files = [file for path in map(Path, paths) for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return {file: file.read_bytes() for file in files if file.is_file()}
