"""PyTorch without autograd, as a skilful user writes it for speed."""

import torch

from .torch_peer import TorchPeer


class TorchManual(TorchPeer):
    """Merged weight M = W + c D kept from forward to backward, gradients by hand, every result into its own buffer.

    Three large products: the delta's gradient goes into the velocity within its product (`addmm_` with beta = m).
    The lone forward merges or makes two products instead, whichever the set-up found faster.
    """

    def set_up(self, arrays: dict) -> None:
        self.__dict__.update(self.tensors(arrays))
        self.y, self.grad_input = torch.empty_like(self.g), torch.empty_like(self.x)
        rank = self.case["rank"]
        self.low, self.low_gradient = (self.x.new_empty(len(self.x), rank) for _ in range(2))
        self.M = torch.empty_like(self.W) if self.has_delta else self.W
        self.merges = True
        if self.case["kind"] == "forward":
            self.merges = self._merging_is_faster()
            if not self.merges:
                self.M = None

    def _merging_is_faster(self) -> bool:
        taken = {}
        for merges in (True, False):
            self.merges = merges
            self.forward()
            taken[merges] = min(self.clock(self.device)(self.forward, 5))
        return taken[True] <= taken[False]

    def _logical(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.t() if self.transposed else stored

    @torch.inference_mode()
    def forward(self) -> None:
        self._forward()

    def _forward(self) -> None:
        x = self.x
        if not self.merges:
            torch.addmm(self.b, x, self._logical(self.W), out=self.y)
            self.y.addmm_(x, self._logical(self.D), alpha=self.c)
        else:
            if self.has_delta:
                torch.add(self.W, self.D, alpha=self.c, out=self.M)
            torch.addmm(self.b, x, self._logical(self.M), out=self.y)
        torch.mm(x, self.A, out=self.low)
        self.y.addmm_(self.low, self.B, alpha=self.s)

    @torch.inference_mode()
    def step(self, lr: float) -> None:
        self._forward()
        x, g, t = self.x, self.g, self.low_gradient
        torch.mm(g, self.B.t(), out=t)
        torch.mm(g, self._logical(self.M).t(), out=self.grad_input)
        self.grad_input.addmm_(t, self.A.t(), alpha=self.s)
        if self.has_delta:
            rows, columns = (g, x) if self.transposed else (x, g)
            self.V.addmm_(rows.t(), columns, beta=self.m, alpha=(1 - self.m) * self.c)
            self.D.add_(self.V, alpha=-lr)
        self.A.addmm_(x.t(), t, alpha=-lr * self.s)
        self.B.addmm_(self.low.t(), g, alpha=-lr * self.s)
