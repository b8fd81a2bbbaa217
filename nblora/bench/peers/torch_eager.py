"""A PyTorch module, autograd and `torch.optim.SGD`: what most users write."""

import torch
from torch import nn
from torch.nn import functional

from .torch_peer import TorchPeer


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


class TorchEager(TorchPeer):
    """`SGD(momentum=m, dampening=m)` with a momentum buffer that holds V is the velocity's rule."""

    def make_module(self, tensors: dict) -> nn.Module:
        """The module around the case's tensors."""
        return DeltaLoRALinear(tensors, self.s, self.c, self.transposed)

    def set_up(self, arrays: dict) -> None:
        tensors = self.tensors(arrays)
        self.x, self.g = tensors["x"], tensors["g"]
        self.module = module = self.make_module(tensors)
        self.A, self.B = module.lora_A, module.lora_B
        groups = [{"params": [self.A, self.B]}]
        if self.has_delta:
            self.D, self.V = module.delta, tensors["V"]
            groups.append({"params": [self.D], "momentum": self.m, "dampening": self.m})
        self.optimizer = torch.optim.SGD(groups, lr=0.0)
        self.update = self.optimizer.step
        if self.has_delta:
            self.optimizer.state[self.D]["momentum_buffer"] = self.V
        if self.case["kind"] == "forward":
            module.eval()
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
        self.update()
        self.y, self.grad_input = y.detach(), self.x.grad
