"""A PyTorch module, autograd and `torch.optim.SGD`: what most users write."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from . import torch_device
from .clock import Clock
from .peer import Peer


class DeltaLoRALinear(nn.Module):
    """z = x W + b + s (x A) B + c (x D), W and D stored as the layout says; without D where there is none."""

    def __init__(self, tensors: dict, scaling: float, delta_scaling: float, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors["W"], requires_grad=False)
        self.bias = nn.Parameter(tensors["b"], requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(tensors["A"]), nn.Parameter(tensors["B"])
        self.delta = nn.Parameter(tensors["D"]) if "D" in tensors else None
        self.scaling, self.delta_scaling, self.transposed = scaling, delta_scaling, transposed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.transposed:
            y = functional.linear(x, self.weight, self.bias)
        else:
            y = torch.addmm(self.bias, x, self.weight)
        y = y + self.scaling * ((x @ self.lora_A) @ self.lora_B)
        if self.delta is not None:
            y = y + self.delta_scaling * (functional.linear(x, self.delta) if self.transposed else x @ self.delta)
        return y


class TorchEager(Peer):
    """`SGD(momentum=m, dampening=m)` with a momentum buffer that holds V is the velocity's rule."""

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        return torch_device.unavailable(device)

    def clock(self) -> Clock:
        return torch_device.clock(self.device)

    def set_up(self, arrays: dict) -> None:
        torch.set_num_threads(self.case["threads"])
        tensors = torch_device.tensors(arrays, self.device)
        self.x, self.g = tensors["x"], tensors["g"]
        self.module = DeltaLoRALinear(tensors, self.s, self.c, self.transposed)
        groups = [{"params": [self.module.lora_A, self.module.lora_B]}]
        if self.has_delta:
            groups.append({"params": [self.module.delta], "momentum": self.m, "dampening": self.m})
        self.optimizer = torch.optim.SGD(groups, lr=0.0)
        if self.has_delta:
            self.optimizer.state[self.module.delta]["momentum_buffer"] = tensors["V"]
        if self.case["kind"] == "forward":
            self.module.eval()
        else:
            self.x.requires_grad_()

    def forward(self) -> None:
        with torch.inference_mode():
            self.y = self.module(self.x)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self, lr: float) -> None:
        self.set_lr(lr)
        self.optimizer.zero_grad()
        self.x.grad = None
        y = self.module(self.x)
        y.backward(self.g)
        self.optimizer.step()
        self.y = y.detach()

    def results(self) -> dict[str, np.ndarray]:
        got = {"y": self.y}
        if self.case["kind"] != "forward":
            got |= {"grad_input": self.x.grad, "A": self.module.lora_A, "B": self.module.lora_B}
            if self.has_delta:
                got["D"] = self.module.delta
                got["V"] = self.optimizer.state[self.module.delta]["momentum_buffer"]
        return torch_device.to_numpy(got)
