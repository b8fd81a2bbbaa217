"""Where PyTorch's tensors of a case live, and the clock of that device."""

from typing import Any

import numpy as np
import torch

from .clock import Clock, EventClock, HostClock


def unavailable(device: str) -> str | None:
    """What keeps this PyTorch from the device; None where nothing does."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    return f"PyTorch {torch.__version__} finds no CUDA device"


def tensors(arrays: dict[str, np.ndarray], device: str) -> dict[str, torch.Tensor]:
    """The arrays as tensors: views on the CPU, copies on a GPU."""
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def to_numpy(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as NumPy arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}


def clock(device: str) -> Clock:
    """The host's clock for the CPU, CUDA's events for a GPU."""
    if device == "cpu":
        return HostClock()
    torch.cuda.set_device(torch.device(device).index or 0)  # "cuda" alone is no device to it
    return EventClock(lambda: torch.cuda.Event(enable_timing=True), lambda begin, end: begin.elapsed_time(end))
