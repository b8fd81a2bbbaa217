"""One step of training: forward, loss, backward, update, each layer by the cheapest way that its optimiser allows."""

import math
from typing import Any, NamedTuple

import numpy as np

from nblora.errors import NonFiniteError
from nblora.layers import Layer
from nblora.layers.named_parameters import Parameter

from .losses import Loss
from .optimizers import Optimizer


class Trained(NamedTuple):
    """A parameter that the optimiser updates: its full name, its state, and the ratio of its learning rate."""

    name: str
    parameter: Parameter
    slots: tuple[Any, ...]
    ratio: float


class Stage(NamedTuple):
    """A layer on the way back: whether one sweep may update its dense parameters, what the optimiser updates, and the
    names of all its trained parameters."""

    name: str
    layer: Layer
    fused: bool
    trained: list[Trained]
    names: list[str]


class StepResult(NamedTuple):
    """Mean loss of the batch, its outputs, and the gradient's norm before clipping (None without clipping)."""

    loss: float
    output: np.ndarray
    grad_norm: float | None


class Step:
    """Trains `model` by one batch a call; owns the optimiser's state.

    A layer takes the fused sweep unless its gradients' norm is needed first, or the optimiser wants to see the dense
    gradient of its weight. Layers before the first trainable one get no backward at all.
    """

    def __init__(
        self, model: Layer, loss: Loss, optimizer: Optimizer, delta_lr: float | None, clip_norm: float | None
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizer = optimizer
        self.delta_lr = optimizer.lr if delta_lr is None else delta_lr
        self.clip_norm = clip_norm
        self.count = 0
        leaves = list(model._sequence())
        first = next((i for i, (_, layer) in enumerate(leaves) if any(layer._trainable())), None)
        if first is None:
            raise ValueError(
                "model has no trainable parameters: wrap its layers in adapters (model.adapt), or set "
                "layer.trainable = True"
            )
        self.stages = [self._stage(name, layer) for name, layer in reversed(leaves[first:])]
        self._idle = [layer for _, layer in leaves[:first] if not layer._generators()]

    def _stage(self, name: str, layer: Layer) -> Stage:
        parameters = list(layer._trainable())
        dense = any(p.swept for p in parameters)
        fused = self.clip_norm is None and (self.optimizer.plain or not dense)
        trained = [
            self._trained(f"{name}.{p.name}" if name else p.name, p, fused) for p in parameters if not p.momentum
        ]
        return Stage(name, layer, fused, trained, [p.name for p in parameters])

    def _trained(self, name: str, parameter: Parameter, fused: bool) -> Trained:
        zeros = self.model._backend.zeros_like
        slots = tuple(zeros(parameter.array) for _ in self.optimizer.slots)
        is_B = name.rpartition(".")[2] == "lora_B"
        return Trained(name, parameter, slots, (self.optimizer.lora_plus_ratio or 1.0) if is_B else 1.0)

    @property
    def trained(self) -> list[Trained]:
        """Every parameter that the optimiser updates, in the model's order."""
        return [trained for stage in reversed(self.stages) for trained in stage.trained]

    def enter_training(self) -> None:
        """Put the model in training mode, but for layers that get no backward: theirs need keep nothing."""
        self.model.train()
        for layer in self._idle:
            layer.eval()

    def __call__(self, x: np.ndarray, y: np.ndarray, factor: float) -> StepResult:
        """Train by one batch, every learning rate multiplied by `factor`.

        Raises
        ------
        NonFiniteError
            That names the layer and the step; the model may then be half updated.
        """
        lr, delta_lr = factor * self.optimizer.lr, factor * self.delta_lr
        # On a GPU the batch is brought there once: output and gradients stay, the host sees the loss.
        output = self.model.forward(self.model._enter("x", x, self.model.in_features)[0])
        value, grad = self.loss.value_and_gradient(output, y, self.model._backend)
        self.count += 1
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss is {value} at step {self.count}, first from {first_fault(self.model, x)}")
        for stage in self.stages:
            grad = stage.layer._sweep(grad, lr, delta_lr) if stage.fused else stage.layer.backward(grad)
        norm = self._clip()
        for stage in self.stages:
            self._update(stage, lr, delta_lr)
        return StepResult(value, self.model._backend.to_host(output) if self.loss.metrics else output, norm)

    def _clip(self) -> float | None:
        """Scale all gradients so that their global norm is at most `clip_norm`; return the norm before."""
        if self.clip_norm is None:
            return None
        backend = self.model._backend
        gradients = [
            (stage, name, stage.layer._held_gradients()[name]) for stage in self.stages for name in stage.names
        ]
        squares = [backend.sum_of_squares(gradient) for _, _, gradient in gradients]
        norm = math.sqrt(sum(squares))
        if not math.isfinite(norm):
            stage, name, _ = gradients[[math.isfinite(square) for square in squares].index(False)]
            raise self._fault(stage, name)
        factor = self.clip_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
        if factor < 1:
            for _, _, gradient in gradients:
                backend.scale(gradient, factor)
        return norm

    def _update(self, stage: Stage, lr: float, delta_lr: float) -> None:
        """Apply the gradients that the backward left; a sweep has left none of dense parameters."""
        backend, layer = self.model._backend, stage.layer
        held = layer._held_gradients() if stage.trained else {}
        for _, parameter, slots, ratio in stage.trained:
            gradient = held.get(parameter.name)
            if gradient is None:
                continue
            # A fault in the gradient of a dense weight shows in its low-rank part, its bias, or the next loss; looking
            # through a matrix at each step would cost as much as its update.
            if not parameter.swept and not math.isfinite(backend.sum_of_squares(gradient)):
                raise self._fault(stage, parameter.name)
            self.optimizer.update(backend, parameter.array, gradient, slots, ratio * lr, self.count)
        if not stage.fused:
            layer._apply_momentum(delta_lr)
            layer._forget_forward()

    def _fault(self, stage: Stage, name: str) -> NonFiniteError:
        where = describe(stage.name, stage.layer)
        return NonFiniteError(f"the gradient of {name} in {where} is not finite at step {self.count}")

    def check_parameters(self) -> None:
        """NonFiniteError where any trained parameter or velocity is not finite."""
        for stage in reversed(self.stages):
            for parameter in stage.layer._parameters():
                if (parameter.trainable or parameter.optional) and not _is_finite(self.model, parameter.array):
                    raise NonFiniteError(
                        f"{parameter.name} of {describe(stage.name, stage.layer)} is not finite after step {self.count}"
                    )


def first_fault(model: Layer, x: np.ndarray) -> str:
    """Describe the first layer that holds or gives something not finite for the inputs `x`."""
    output: Any = x
    for name, layer in model._sequence():
        if any(not _is_finite(model, parameter.array) for parameter in layer._parameters()):
            return f"{describe(name, layer)}, whose parameters are not finite"
        output = layer.forward(output)
        if not np.isfinite(output).all():
            return f"{describe(name, layer)}, whose output is not finite"
    return f"the loss itself: the outputs of {describe(name, layer)} are finite"


def describe(name: str, layer: Layer) -> str:
    """What messages call a layer."""
    kind = type(layer).__name__
    return f"layer {name!r} ({kind})" if name else f"the {kind}"


def _is_finite(model: Layer, array: Any) -> bool:
    # NaN and infinity survive a sum of squares; a sum of large float64 values may overflow without any.
    return math.isfinite(model._backend.sum_of_squares(array)) or bool(np.isfinite(model._backend.to_host(array)).all())
