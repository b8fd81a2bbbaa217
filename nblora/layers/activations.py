"""Activation functions by name: the codes that kernels switch on."""

from typing import Any

from nblora.checks import check_choice

ACTIVATIONS = ("identity", "relu", "gelu", "tanh", "sigmoid", "silu", "gelu_tanh", "quick_gelu")


def activation_code(activation: Any) -> int:
    """The code that kernels know `activation` by: its place in `ACTIVATIONS`."""
    return ACTIVATIONS.index(check_choice("activation", activation, ACTIVATIONS))
