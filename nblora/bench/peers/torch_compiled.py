"""The module of `torch_eager`, through `torch.compile`."""

import torch

from .torch_eager import TorchEager


class TorchCompiled(TorchEager):
    """Module (forward and backward) and `optimizer.step` compiled for the case's own shapes.

    The learning rate is a tensor, as PyTorch advises for a compiled optimiser: a new number would compile anew.
    """

    def set_up(self, arrays: dict) -> None:
        torch._dynamo.reset()
        super().set_up(arrays)
        self.lr = torch.tensor(0.0, dtype=torch.float64)
        super().set_lr(self.lr)
        self.module = torch.compile(self.module, dynamic=False)
        self.update = torch.compile(self.update)

    def set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)
