"""The peers: the same step written as each library's users write it, one class a peer.

These modules run in the peers' own processes, where the package is loaded by its folder under another name, without
nblora (whose import would cost every peer time and memory) and under any interpreter that has NumPy. So they import
nothing of nblora, but for the peer that is nblora.
"""

from typing import NamedTuple


class PeerSpec(NamedTuple):
    """Where a peer is: module (with a dot: one of this folder) and class; whose versions a report pins; what it is."""

    module: str
    cls: str
    distributions: tuple[str, ...]
    about: str
    kinds: tuple[str, ...] = ("step", "forward", "lora-step")
    folders: tuple[str, ...] = ()  # further import paths of its process
    devices: tuple[str, ...] = ("cpu",)  # kinds of device it runs on


BOTH = ("cpu", "cuda")

PEERS = {
    "nblora": PeerSpec(
        ".nblora_peer", "NbloraPeer", ("nblora", "numba", "numpy", "numba-cuda"), "this library", devices=BOTH
    ),
    "numpy": PeerSpec(".numpy_peer", "NumpyPeer", ("numpy",), "the formulas written plainly"),
    "torch-eager": PeerSpec(".torch_eager", "TorchEager", ("torch",), "a module, autograd, `SGD`", devices=BOTH),
    "torch-manual": PeerSpec(
        ".torch_manual",
        "TorchManual",
        ("torch",),
        "what a skilful user writes: merged weight kept from forward to backward, gradients by hand, in place",
        devices=BOTH,
    ),
    "torch-compile": PeerSpec(
        ".torch_compiled",
        "TorchCompiled",
        ("torch",),
        "the module of torch-eager and its optimiser, `torch.compile`d",
        devices=BOTH,
    ),
    "cupy": PeerSpec(
        ".cupy_peer",
        "CupyPeer",
        ("cupy-cuda12x", "cupy-cuda13x", "cupy"),
        "the formulas of numpy on a GPU",
        devices=("cuda",),
    ),
    "peft": PeerSpec(
        ".peft_peer", "PeftPeer", ("peft", "torch"), "PEFT's LoRA on `nn.Linear`, autograd, `SGD`", ("lora-step",)
    ),
    "jax": PeerSpec(".jax_peer", "JaxPeer", ("jax", "jaxlib"), "`jax.vjp` under `jax.jit`, donated buffers"),
}
BASELINE = "nblora"


def peers_of(device: str) -> dict[str, PeerSpec]:
    """The peers that run on a device of this kind: "cpu", "cuda" or "cuda:N"."""
    return {name: spec for name, spec in PEERS.items() if device.partition(":")[0] in spec.devices}
