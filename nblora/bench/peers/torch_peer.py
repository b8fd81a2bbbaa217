"""What the peers of PyTorch share: the device of a case's tensors, its clock, and PyTorch's own products and copies."""

from typing import Any

import numpy as np
import torch

from .clock import Clock, event_clock, host_clock
from .peer import Peer, Tools


class TorchPeer(Peer):
    """A peer whose arrays are tensors."""

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        if device == "cpu" or torch.cuda.is_available():
            return None
        return f"PyTorch {torch.__version__} finds no CUDA device"

    @classmethod
    def clock(cls, device: str) -> Clock:
        if device == "cpu":
            return host_clock
        torch.cuda.set_device(torch.device(device).index or 0)  # "cuda" alone is no device to it
        return event_clock(lambda: torch.cuda.Event(enable_timing=True), lambda begin, end: begin.elapsed_time(end))

    @classmethod
    def tools(cls, device: str, threads: int) -> Tools:
        torch.set_num_threads(threads)
        return Tools(
            bring=lambda array: torch.from_numpy(array).to(device),
            like=torch.zeros_like,
            product=lambda a, b, out: torch.mm(a, b, out=out),
            copy=lambda source, target: target.copy_(source),
        )

    def tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The arrays as tensors: views on the CPU, copies on a GPU."""
        torch.set_num_threads(self.case["threads"])
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    @staticmethod
    def to_numpy(array: Any) -> np.ndarray:
        found: np.ndarray = array.detach().cpu().numpy()
        return found
