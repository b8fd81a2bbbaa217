"""Optimisers: settings and rule of an update. Their state (moments, step) belongs to the run that `fit` makes."""

from typing import Any, ClassVar

from nblora import checks


class Optimizer:
    """How parameters follow their gradients: all trainable ones but a delta, which follows its own velocity.

    An optimiser holds settings only. Every `fit` begins with fresh state, so one object may serve many runs;
    `fit(resume=...)` goes on with the state that a checkpoint holds. An optimiser of your own derives from this class
    and overrides `update`, and `slots` where it needs arrays beside the parameters.

    Attributes
    ----------
    lr : float
        Learning rate, before a schedule's factor.
    lora_plus_ratio : float or None
        LoRA+ (Hayou et al., 2024): the learning rate of `lora_B` is this many times that of `lora_A`. The authors
        suggest 16. None means 1.
    slots : tuple of str
        Names of the arrays of a parameter's shape, zero at first, that `update` is given.
    plain : bool
        Whether the rule is `p -= lr g` and nothing else, so that a backward sweep may apply it.
    """

    slots: tuple[str, ...] = ()
    plain: bool = False
    settings: ClassVar[tuple[str, ...]] = ("lr", "lora_plus_ratio")

    def __init__(self, lr: float, *, lora_plus_ratio: float | None = None) -> None:
        self.lr = checks.check_not_negative("lr", lr)
        self.lora_plus_ratio = (
            None if lora_plus_ratio is None else checks.check_positive("lora_plus_ratio", lora_plus_ratio)
        )

    def update(self, backend: Any, parameter: Any, gradient: Any, slots: tuple[Any, ...], lr: float, step: int) -> None:
        """Update `parameter` and `slots` in place.

        Parameters
        ----------
        backend : Backend
            Offers the arithmetic.
        parameter, gradient : array
            Of the same shape.
        slots : tuple of arrays
            One for each name in `slots`, of the parameter's shape.
        lr : float
            This parameter's learning rate at this step.
        step : int
            Counts the updates, from 1.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"


class SGD(Optimizer):
    """p -= lr g; with momentum v = m v + g, p -= lr v, as `torch.optim.SGD`.

    Parameters
    ----------
    lr : float
    momentum : float
        m in [0, 1).
    lora_plus_ratio : float, optional
        See `Optimizer`.
    """

    settings = ("lr", "momentum", "lora_plus_ratio")

    def __init__(self, lr: float = 0.01, momentum: float = 0.0, *, lora_plus_ratio: float | None = None) -> None:
        super().__init__(lr, lora_plus_ratio=lora_plus_ratio)
        self.momentum = checks.check_fraction("momentum", momentum)
        self.plain = self.momentum == 0
        self.slots = () if self.plain else ("momentum",)

    def update(self, backend: Any, parameter: Any, gradient: Any, slots: tuple[Any, ...], lr: float, step: int) -> None:
        if slots:
            backend.scale(slots[0], self.momentum)
            backend.add(slots[0], gradient)
            gradient = slots[0]
        backend.sgd_update(parameter, gradient, lr)


class AdamW(Optimizer):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), with the defaults of `torch.optim.AdamW`.

        p *= 1 - lr weight_decay
        v1 = b1 v1 + (1 - b1) g;  v2 = b2 v2 + (1 - b2) g²
        p -= lr / (1 - b1^step) v1 / (√(v2 / (1 - b2^step)) + eps)

    Parameters
    ----------
    lr : float
    betas : pair of float
        b1 and b2 in [0, 1).
    eps : float
        Positive.
    weight_decay : float
        Not negative. As in PyTorch it acts on every parameter that the optimiser updates, biases included; the delta
        and frozen parameters do not decay.
    lora_plus_ratio : float, optional
        See `Optimizer`.
    """

    slots = ("first", "second")
    settings = ("lr", "betas", "eps", "weight_decay", "lora_plus_ratio")

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        lora_plus_ratio: float | None = None,
    ) -> None:
        super().__init__(lr, lora_plus_ratio=lora_plus_ratio)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
        self.betas = checks.check_fraction("betas[0]", betas[0]), checks.check_fraction("betas[1]", betas[1])
        self.eps = checks.check_positive("eps", eps)
        self.weight_decay = checks.check_not_negative("weight_decay", weight_decay)

    def update(self, backend: Any, parameter: Any, gradient: Any, slots: tuple[Any, ...], lr: float, step: int) -> None:
        first, second = slots
        backend.adamw_update(parameter, gradient, first, second, lr, self.betas, self.eps, self.weight_decay, step)


OPTIMIZERS: dict[str, type[SGD] | type[AdamW]] = {"adamw": AdamW, "sgd": SGD}


def as_optimizer(optimizer: Any, lr: float | None = None) -> Optimizer:
    """Return the optimiser that a name, with its defaults but for `lr`, or an object stands for."""
    if isinstance(optimizer, Optimizer):
        if lr is not None:
            raise ValueError(
                f"lr={lr!r} is for an optimizer given by name, and {optimizer!r} has its own: give one of the two"
            )
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(
            f"optimizer must be a name ({', '.join(map(repr, OPTIMIZERS))}) or an Optimizer object such as "
            f"AdamW(lr=1e-3), got {optimizer!r}"
        )
    kind = OPTIMIZERS[checks.check_choice("optimizer", optimizer, tuple(OPTIMIZERS))]
    return kind() if lr is None else kind(lr=checks.check_not_negative("lr", lr))
