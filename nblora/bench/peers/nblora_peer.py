"""nblora itself, through its public interface."""

from typing import Any

import numpy as np
from numba.core import config

import nblora
from nblora.backends import cuda_problem, describe, resolve
from nblora.backends.protocol import Base, Operands

from .clock import Clock, event_clock, host_clock
from .peer import Peer, Tools


class NbloraPeer(Peer):
    """`DeltaLoRAAdapter` or `LoRAAdapter` on `Dense` or `FullyConnected`: `forward` and `backward_update`."""

    @classmethod
    def unavailable(cls, device: str) -> str | None:
        return None if device == "cpu" else cuda_problem()

    @classmethod
    def describe(cls, device: str) -> str:
        return "" if device == "cpu" else describe(device)

    @classmethod
    def clock(cls, device: str) -> Clock:
        if device == "cpu" or getattr(config, "ENABLE_CUDASIM", False):  # the simulator's events carry no time
            return host_clock
        from numba import cuda

        cuda.select_device(int(device.partition(":")[2] or 0))
        return event_clock(cuda.event, lambda begin, end: begin.elapsed_time(end))

    @classmethod
    def tools(cls, device: str, threads: int) -> Tools:
        """What stands where there is no other library: a plain layer's forward, and copies by the driver."""
        backend = resolve(device)

        def product(a: Any, b: Any, out: Any) -> object:
            return backend.forward(a, Operands(Base(b, None, False), None, None, 0, False), None, False)

        return Tools(
            backend.from_host, backend.zeros_like, product, lambda source, target: target.__setitem__(..., source)
        )

    def make_base(self, weight: np.ndarray, bias: np.ndarray) -> nblora.Dense | nblora.FullyConnected | nblora.Conv2d:
        """The layer that the adapter goes around."""
        return (nblora.FullyConnected if self.transposed else nblora.Dense)(weight, bias)

    def set_up(self, arrays: dict) -> None:
        self.x, self.g = arrays["x"], arrays["g"]
        base = self.make_base(arrays["W"], arrays["b"])
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


class NbloraConvolution(NbloraPeer):
    """The adapters on `Conv2d`, and their parameters handed out as PyTorch stores them."""

    def make_base(self, weight: np.ndarray, bias: np.ndarray) -> nblora.Conv2d:
        return nblora.Conv2d(weight, bias, stride=self.case["stride"], padding=self.case["padding"])

    def set_up(self, arrays: dict) -> None:
        self.shapes = {name: arrays[name].shape for name in arrays}
        matrices = {
            name: arrays[name].reshape(len(arrays[name]), -1) for name in arrays if name in ("A", "B", "D", "V")
        }
        for name in ("A", "B"):
            matrices[name] = np.ascontiguousarray(matrices[name].T)
        super().set_up(arrays | matrices)

    def results(self) -> dict[str, np.ndarray]:
        got = super().results()
        for name in ("A", "B"):
            got[name] = np.ascontiguousarray(got[name].T)
        return {name: array.reshape(self.shapes.get(name, array.shape)) for name, array in got.items()}
