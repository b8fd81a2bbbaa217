"""JAX: `jax.vjp` of the forward under `jax.jit`, parameters donated so that XLA may update them in place."""

from functools import partial
from typing import Any

import jax

from .peer import Peer

jax.config.update("jax_enable_x64", True)


class JaxPeer(Peer):
    """The threads are XLA's own pool, sized through the environment (`process.environment`)."""

    def set_up(self, arrays: dict) -> None:
        on_device = {name: jax.device_put(array) for name, array in arrays.items()}
        self.x, self.g = on_device.pop("x"), on_device.pop("g")
        self.frozen = {name: on_device.pop(name) for name in ("W", "b")}
        self.V = on_device.pop("V", None)
        self.trained = on_device
        constants = {"c": self.c, "s": self.s, "transposed": self.transposed}
        self.compiled_forward = jax.jit(partial(_forward, **constants))
        self.compiled_step = jax.jit(partial(_step, m=self.m, **constants), donate_argnums=(0, 1))
        self.dtype = self.x.dtype.type

    def forward(self) -> None:
        self.y = self.compiled_forward(self.trained, self.x, self.frozen).block_until_ready()

    def step(self, lr: float) -> None:
        got = self.compiled_step(self.trained, self.V, self.x, self.g, self.frozen, self.dtype(lr))
        self.trained, self.V, self.y, self.grad_input = jax.block_until_ready(got)
        self.__dict__.update(self.trained)


def _forward(trained: dict, x: Any, frozen: dict, *, c: float, s: float, transposed: bool) -> Any:
    y = x @ (frozen["W"].T if transposed else frozen["W"]) + frozen["b"] + s * ((x @ trained["A"]) @ trained["B"])
    if "D" in trained:
        y = y + c * (x @ (trained["D"].T if transposed else trained["D"]))
    return y


def _step(trained: dict, velocity: Any, x: Any, g: Any, frozen: dict, lr: Any, *, m: float, **constants: Any) -> tuple:
    y, pull = jax.vjp(lambda parameters, samples: _forward(parameters, samples, frozen, **constants), trained, x)
    gradients, grad_input = pull(g)
    updates = dict(gradients)
    if velocity is not None:
        velocity = updates["D"] = m * velocity + (1 - m) * gradients["D"]
    return {name: value - lr * updates[name] for name, value in trained.items()}, velocity, y, grad_input
