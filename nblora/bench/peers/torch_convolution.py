"""A convolution with an adapter in PyTorch: a module, autograd and `torch.optim.SGD`, written in two ways."""

import torch
from torch import nn
from torch.nn import functional

from .torch_eager import TorchEager


class AdaptedConv2d(nn.Module):
    """The frozen convolution of W + c D, and LoRA as PEFT computes it: a convolution of `rank` channels, then a
    pointwise one."""

    def __init__(self, tensors: dict, case: dict) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors["W"], requires_grad=False)
        self.bias = nn.Parameter(tensors["b"], requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(tensors["A"]), nn.Parameter(tensors["B"])
        self.delta = nn.Parameter(tensors["D"]) if "D" in tensors else None
        self.scaling, self.delta_scaling = case["scaling"], case["delta_scaling"]
        self.settings = {"stride": case["stride"], "padding": case["padding"]}

    def _dense(self) -> torch.Tensor:
        return self.weight if self.delta is None else self.weight + self.delta_scaling * self.delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.conv2d(x, self._dense(), self.bias, **self.settings)
        low = functional.conv2d(x, self.lora_A, **self.settings)
        return y + self.scaling * functional.conv2d(low, self.lora_B)


class MergedConv2d(AdaptedConv2d):
    """One convolution, of W + s A B + c D."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = (self.lora_B[:, :, 0, 0] @ self.lora_A.flatten(1)).view_as(self.weight)
        return functional.conv2d(x, self._dense() + self.scaling * low, self.bias, **self.settings)


class TorchConvolution(TorchEager):
    """`AdaptedConv2d`; A is stored (rank, in, kh, kw), B (out, rank, 1, 1), as PEFT stores them."""

    module_of = AdaptedConv2d

    def make_module(self, tensors: dict) -> nn.Module:
        return self.module_of(tensors, self.case)


class TorchMergedConvolution(TorchConvolution):
    """`MergedConv2d`."""

    module_of = MergedConv2d
