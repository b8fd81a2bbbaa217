"""PEFT's LoRA on `nn.Linear`, autograd and SGD."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from .torch_eager import TorchEager


class PeftPeer(TorchEager):
    """The LoRA-only step, called at the wrapped layer: a network pays for `PeftModel`'s own wrapper once, not a layer.

    `nn.Linear` stores (out, in), so that is PEFT's layout in every case.
    """

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        return None if device == "cpu" else f"it does not run on {device}"

    def set_up(self, arrays: dict) -> None:
        tensors = self.tensors(arrays)
        self.x, self.g = tensors["x"].requires_grad_(), tensors["g"]
        with torch.device("meta"):
            base = nn.Linear(self.case["in_features"], self.case["out_features"], dtype=self.x.dtype)
        stored = tensors["W"] if self.transposed else tensors["W"].t().contiguous()
        base.weight, base.bias = nn.Parameter(stored), nn.Parameter(tensors["b"])
        rank = self.case["rank"]
        config = LoraConfig(r=rank, lora_alpha=self.s * rank, lora_dropout=0.0, target_modules=["layer"])
        model = get_peft_model(nn.ModuleDict({"layer": base}), config, autocast_adapter_dtype=False)
        self.module = model.base_model.model["layer"]
        factors = [self.module.lora_A["default"].weight, self.module.lora_B["default"].weight]
        for factor, name in zip(factors, "AB", strict=True):
            factor.data = tensors[name].t().contiguous()
        self.A, self.B = (factor.detach().t() for factor in factors)  # views of what is trained
        self.optimizer = torch.optim.SGD(factors, lr=0.0)
        self.update = self.optimizer.step
