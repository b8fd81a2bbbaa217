"""nblora itself, through its public interface."""

import numpy as np

import nblora

from .peer import Peer


class NbloraPeer(Peer):
    """`DeltaLoRAAdapter` or `LoRAAdapter` on `Dense` or `FullyConnected`: `forward` and `backward_update`."""

    def set_up(self, arrays: dict) -> None:
        self.x, self.g = arrays["x"], arrays["g"]
        layer = nblora.FullyConnected if self.transposed else nblora.Dense
        base = layer(arrays["W"], arrays["b"])
        rank = self.case["rank"]
        self.adapter: nblora.LoRAAdapter | nblora.DeltaLoRAAdapter
        if self.has_delta:
            self.adapter = delta = nblora.DeltaLoRAAdapter(
                base, rank, alpha=self.s * rank, delta_scaling=self.c, momentum_factor=self.m
            )
            for name, target in (("D", delta.delta), ("V", delta.velocity)):
                target[...] = arrays[name].T if self.transposed else arrays[name]
        else:
            self.adapter = nblora.LoRAAdapter(base, rank, alpha=self.s * rank)
        self.adapter.set_parameter("lora_A", arrays["A"])
        self.adapter.set_parameter("lora_B", arrays["B"])
        if self.case["kind"] == "forward":
            self.adapter.eval()

    def forward(self) -> None:
        self.y = self.adapter.forward(self.x)

    def step(self, lr: float) -> None:
        self.y = self.adapter.forward(self.x)
        self.grad_input = self.adapter.backward_update(self.g, lr)

    def results(self) -> dict[str, np.ndarray]:
        if self.case["kind"] == "forward":
            return {"y": self.y}
        got = {name: self.adapter.get_parameter(f"lora_{name}") for name in ("A", "B")}
        if isinstance(self.adapter, nblora.DeltaLoRAAdapter):
            D, V = self.adapter.delta, self.adapter.velocity
            got |= {"D": D.T, "V": V.T} if self.transposed else {"D": D, "V": V}
        return got | {"y": self.y, "grad_input": self.grad_input}
