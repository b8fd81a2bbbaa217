"""The CPU backend."""

import math

import numpy as np

from ..kernels.cpu import losses as loss_kernel
from .protocol import Array, Gradients, Operands, Saved

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _act(z, code):
    if code == 0:
        return z
    if code == 1:
        return np.where(z > 0, z, np.where(z != z, z, 0)).astype(z.dtype)
    if code == 2:
        return (0.5 * z * (1 + (_erf(z / math.sqrt(2)) if z.size else z))).astype(z.dtype)
    if code == 3:
        return np.tanh(z)
    with np.errstate(over="ignore"):
        return (1 / (1 + np.exp(-z))).astype(z.dtype)


def _dact(z, code):
    if code == 1:
        return np.where(z > 0, 1, np.where(z != z, z, 0)).astype(z.dtype)
    if code == 2:
        cdf = 0.5 * (1 + (_erf(z / math.sqrt(2)) if z.size else z))
        return (cdf + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)).astype(z.dtype)
    if code == 3:
        return 1 - np.tanh(z) ** 2
    s = _act(z, 4)
    return s * (1 - s)


class CPUBackend:
    device = "cpu"

    def from_host(self, array):
        return array

    def to_host(self, array):
        return array

    def zeros_like(self, array):
        return np.zeros(array.shape, array.dtype)

    def _effective(self, o):
        m = None
        if o.base is not None:
            m = o.base.weight.T if o.base.transposed else o.base.weight
        if o.delta is not None:
            d = o.delta.delta.T if o.base.transposed else o.delta.delta
            m = m + m.dtype.type(o.delta.scaling) * d
        return m

    def forward(self, x: Array, operands: Operands, mask, keep: bool):
        o = operands
        m = self._effective(o)
        z = low = None
        if m is not None:
            z = x @ m
        if o.low_rank is not None:
            low = x.dtype.type(o.low_rank.scaling) * ((x if mask is None else x * mask) @ o.low_rank.A)
            z = low @ o.low_rank.B if z is None else z + low @ o.low_rank.B
        if o.base is not None and o.base.bias is not None:
            z = z + o.base.bias
        y = _act(z, o.activation)
        return y, Saved(x, low, z if o.activation else None, mask) if keep else None

    def backward(self, grad_output, saved, operands):
        o = operands
        dt = saved.x.dtype.type
        gz = grad_output if saved.z is None else grad_output * _dact(saved.z, o.activation)
        m = self._effective(o)
        gx = gz @ m.T if m is not None else np.zeros(saved.x.shape, saved.x.dtype)
        dA = dB = dD = dW = db = None
        if o.low_rank is not None:
            t = dt(o.low_rank.scaling) * (gz @ o.low_rank.B.T)
            xm = saved.x if saved.mask is None else saved.x * saved.mask
            dA, dB = xm.T @ t, saved.low.T @ gz
            g = t @ o.low_rank.A.T
            gx = gx + (g if saved.mask is None else g * saved.mask)
        if o.delta is not None or o.train_base:
            g = gz.T @ saved.x if o.base.transposed else saved.x.T @ gz
            dD = dt(o.delta.scaling) * g if o.delta is not None else None
            dW = g if o.train_base else None
        if o.train_base and o.base.bias is not None:
            db = gz.sum(0)
        return Gradients(gx, dA, dB, dD, dW, db)

    def backward_update(self, grad_output, saved, operands, lr, delta_lr):
        g = self.backward(grad_output, saved, operands)
        if operands.delta is not None:
            self.momentum_update(
                operands.delta.delta, operands.delta.velocity, g.delta, operands.delta.momentum, delta_lr
            )
        if operands.train_base:
            self.sgd_update(operands.base.weight, g.weight, lr)
        return g._replace(delta=None, weight=None)

    def merge(self, operands):
        o = operands
        w = self._effective(o)
        if o.low_rank is not None:
            w = w + w.dtype.type(o.low_rank.scaling) * (o.low_rank.A @ o.low_rank.B)
        return np.array(w.T if o.base.transposed else w, order="C")

    def sgd_update(self, parameter, gradient, lr):
        parameter -= parameter.dtype.type(lr) * gradient

    def momentum_update(self, delta, velocity, gradient, momentum, lr):
        dt = delta.dtype.type
        velocity *= dt(momentum)
        velocity += dt(1 - momentum) * gradient
        delta -= dt(lr) * velocity

    def adamw_update(self, parameter, gradient, first, second, lr, betas, eps, weight_decay, step):
        dt = parameter.dtype.type
        b1, b2 = betas
        first *= dt(b1)
        first += dt(1 - b1) * gradient
        second *= dt(b2)
        second += dt(1 - b2) * gradient * gradient
        parameter *= dt(1 - lr * weight_decay)
        parameter -= dt(lr / (1 - b1**step)) * first / (np.sqrt(second / dt(1 - b2**step)) + dt(eps))

    def add(self, target, source):
        target += source

    def scale(self, target, factor):
        target *= target.dtype.type(factor)

    def sum_of_squares(self, array):
        return float(np.sum(np.square(array, dtype=np.float64)))

    def mean_squared_error(self, output: Array, target: Array) -> tuple[float, Array]:
        """Mean squared error and its gradient."""
        return self._loss(loss_kernel.mean_squared_error, output, target)

    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[float, Array]:
        """Softmax cross-entropy with integer labels and its gradient."""
        return self._loss(loss_kernel.softmax_cross_entropy, logits, labels)

    def binary_cross_entropy(self, logits: Array, target: Array) -> tuple[float, Array]:
        """Binary cross-entropy with logits and its gradient."""
        return self._loss(loss_kernel.binary_cross_entropy, logits, target)

    @staticmethod
    def _loss(function, output, target):
        gradient, total = np.empty(output.shape, output.dtype), np.zeros(1)
        function(output, target, gradient, total)
        return float(total[0]), gradient
