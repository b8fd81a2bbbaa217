"""PEFT's LoRA on `nn.Linear`, autograd and SGD."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from .peer import Peer


class PeftPeer(Peer):
    """The LoRA-only step, called at the wrapped layer: a network pays for `PeftModel`'s own wrapper once, not a layer.

    `nn.Linear` stores (out, in), so that is PEFT's layout in every case.
    """

    def set_up(self, arrays: dict) -> None:
        torch.set_num_threads(self.case["threads"])
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.x, self.g = tensors["x"].requires_grad_(), tensors["g"]
        n_in, n_out, rank = self.case["in_features"], self.case["out_features"], self.case["rank"]
        with torch.device("meta"):
            base = nn.Linear(n_in, n_out, dtype=self.x.dtype)
        stored = tensors["W"] if self.transposed else tensors["W"].t().contiguous()
        base.weight, base.bias = nn.Parameter(stored), nn.Parameter(tensors["b"])
        config = LoraConfig(r=rank, lora_alpha=self.s * rank, lora_dropout=0.0, target_modules=["layer"])
        model = get_peft_model(nn.ModuleDict({"layer": base}), config, autocast_adapter_dtype=False)
        self.layer = model.base_model.model["layer"]
        self.A, self.B = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        self.A.data, self.B.data = (tensors[name].t().contiguous() for name in ("A", "B"))
        self.optimizer = torch.optim.SGD([self.A, self.B], lr=0.0)

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        self.x.grad = None
        y = self.layer(self.x)
        y.backward(self.g)
        self.optimizer.step()
        self.y = y.detach()

    def results(self) -> dict[str, np.ndarray]:
        got = {"y": self.y, "grad_input": self.x.grad, "A": self.A.t(), "B": self.B.t()}
        return {name: tensor.detach().numpy() for name, tensor in got.items()}
