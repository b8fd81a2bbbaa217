"""nblora itself, through its public interface."""

import numpy as np

import nblora
from nblora.backends import cuda_problem, describe, resolve

from .clock import Clock, EventClock, HostClock
from .peer import Peer


def device_clock(device: str) -> Clock:
    """The host's clock for the CPU and for Numba's simulator, whose events carry no time; CUDA's events for a GPU."""
    from numba.core import config

    if device == "cpu" or getattr(config, "ENABLE_CUDASIM", False):
        return HostClock()
    from numba import cuda

    cuda.select_device(int(device.partition(":")[2] or 0))
    return EventClock(cuda.event, lambda begin, end: begin.elapsed_time(end))


class NbloraPeer(Peer):
    """`DeltaLoRAAdapter` or `LoRAAdapter` on `Dense` or `FullyConnected`: `forward` and `backward_update`."""

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        return None if device == "cpu" else cuda_problem()

    @classmethod
    def describe(cls, device: str) -> str:
        return "" if device == "cpu" else describe(device)

    def clock(self) -> Clock:
        return device_clock(self.device)

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
        if self.device != "cpu":
            self.adapter.to(self.device)
            self.x, self.g = map(resolve(self.device).from_host, (self.x, self.g))

    def forward(self) -> None:
        self.y = self.adapter.forward(self.x)

    def step(self, lr: float) -> None:
        self.y = self.adapter.forward(self.x)
        self.grad_input = self.adapter.backward_update(self.g, lr)

    def results(self) -> dict[str, np.ndarray]:
        if self.case["kind"] == "forward":
            return {"y": np.asarray(self.y)}
        got = {name: self.adapter.get_parameter(f"lora_{name}") for name in ("A", "B")}
        if isinstance(self.adapter, nblora.DeltaLoRAAdapter):
            D, V = self.adapter.delta, self.adapter.velocity
            got |= {"D": D.T, "V": V.T} if self.transposed else {"D": D, "V": V}
        got |= {"y": self.y, "grad_input": self.grad_input}
        return {name: np.asarray(array) for name, array in got.items()}
