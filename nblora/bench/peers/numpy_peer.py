"""The formulas as they stand in the documentation, in NumPy."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .peer import Peer, Tools


class NumpyPeer(Peer):
    """Plain NumPy: every product and every sum an array of its own, parameters updated in place."""

    @classmethod
    def tools(cls, device: str, threads: int) -> Tools:
        pool = ThreadPoolExecutor(threads)

        def copy(source: np.ndarray, target: np.ndarray) -> None:
            parts = (np.array_split(array, threads) for array in (target, source))
            list(pool.map(np.copyto, *parts))

        return Tools(np.asarray, np.zeros_like, np.dot, copy)

    def set_up(self, arrays: dict) -> None:
        self.__dict__.update(arrays)
        scalar = self.x.dtype.type  # a Python float would do; a NumPy float64 would widen everything
        self.c, self.m, self.s = scalar(self.c), scalar(self.m), scalar(self.s)

    def forward(self) -> None:
        x = self.x
        W = self.W.T if self.transposed else self.W
        self.low = x @ self.A
        self.y = x @ W + self.b + self.s * (self.low @ self.B)
        if self.has_delta:
            self.y += self.c * (x @ (self.D.T if self.transposed else self.D))

    def step(self, lr: float) -> None:
        self.forward()
        x, g, scalar = self.x, self.g, self.x.dtype.type
        low_gradient = g @ self.B.T
        grad_A = self.s * (x.T @ low_gradient)
        grad_B = self.s * (self.low.T @ g)
        self.grad_input = g @ (self.W if self.transposed else self.W.T) + self.s * (low_gradient @ self.A.T)
        if self.has_delta:
            self.grad_input += self.c * (g @ (self.D if self.transposed else self.D.T))
            grad_D = self.c * (g.T @ x if self.transposed else x.T @ g)
            self.V *= self.m
            self.V += (1 - self.m) * grad_D
            self.D -= scalar(lr) * self.V
        self.A -= scalar(lr) * grad_A
        self.B -= scalar(lr) * grad_B
